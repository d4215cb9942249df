"""Recipes: named sets of defaults for flags, chosen by `--recipe`. Flags on the command line override them.

How they were measured. FOLDER has DRIVE's 21-36 as `training` and 37-40 as `test`. Dice is the mean over photographs,
inside the field of view, without flips unless it says so. The best epoch is chosen on those same four photographs, as
the tutorial does. The recipes were tuned on held-out parts of 21-36; only quick's choice between two augmentations was
also seen on 37-40. Two cores of an AMD EPYC with AVX-512 and bfloat16 instructions, torch 2.15:

    python train.py --data-path FOLDER and                    best (last) epoch           steps   start to scores
    (nothing: the tutorial's)                                 0.801 (0.795)                 800   74 minutes, calculated
    --recipe quick, seeds 0, 1, 2                             0.806, 0.806, 0.807 (same)    800   3:05, 3:16, 3:17
    --recipe best --amp, seeds 0, 1, 2                        0.821, 0.820, 0.820 (0.820)  4000   19 minutes

best with flips, as it scores in the end: 0.821, 0.822, 0.821. On two cores with AVX2 alone a step of best takes 0.7 to
0.9 s (`--recipe best --epochs 1 --steps-per-epoch 20 --val-split 1`). Dice on the official test photographs, which the
README quotes, was measured once, by its maintainers, with an earlier version: quick without flips, best with flips.

The effect of each part of quick, changed one at a time (`--recipe quick --amp --seed 0` and):

    (nothing)                                                                        0.806 (0.806)
    --normalization dataset (the tutorial's)                                         0.802 (0.802)
    --normalization photograph (uneven light stays)                                  0.807 (0.807)
    --optimizer sgd --schedule poly --lr 0.01 --weight-decay 1e-4 (the tutorial's)   0.791 (0.791)
    --dice-loss all --vessel-weight 2 (the tutorial's)                               0.806 (0.805)
    --ema-decay 0 (the tutorial's)                                                   0.808 (0.806)
    --augmentation rotation (that of best)                                           0.807 (0.807)
    --tta, in the final scores (the weights of the first row)                        0.809

One seed and four photographs: differences below 0.005 are within the noise, so only the optimizer with its schedule is
shown to count. best differs from quick in width, steps, augmentation and averaging; none of these was measured alone.

Photographs of other cameras, by `--recipe quick --tta`, trained on 21-36 alone: DRIVE's 37-40, ARIA (48 of 768 x 576,
no ROI masks) and HRF (45 of 3504 x 2336, without flips), each in its own size. The first row is the version before
(commit 55d96be); each row keeps what the rows above it changed:

    before, --seed 0                                             0.809                 0.627                 0.698
    the field of view by a circle fit, the same weights          0.809                 0.634                 0.698
    the width of vessels by the scale, the same weights          0.809                 0.633                 0.746
    --augmentation any-camera, seeds 0, 1, 2     0.808, 0.805, 0.808   0.695, 0.699, 0.696   0.733, 0.741, 0.735

ARIA and HRF: `python train.py --test-only --resume save_weights/best_model.pth --data-path FOLDER`. Tried and left out:
statistics of the colours without the rim and the outliers, and the mean colour around the field of view (ARIA 0.599
against 0.627, with the field of view of before; DRIVE 0.807). any-camera itself, with its 4000 steps on DRIVE alone,
was not measured; pretrained/README.md tells of its weights from DRIVE and HRF.
"""

from typing import Any

_TABLE: dict[str, tuple[Any, Any, Any, Any]] = {
    # flag              tutorial     quick         best          any-camera
    "base_c":          (32,          8,            16,           16),
    "augmentation":    ("tutorial",  "rotation",  "rotation",   "any-camera"),
    "normalization":   ("dataset",   "local",      "local",      "local"),
    "crop_size":       (480,         128,         256,          256),
    "batch_size":      (4,           4,            4,            4),
    "epochs":          (200,         2,           20,           20),
    "steps_per_epoch": (None,        250,         200,          200),
    "optimizer":       ("sgd",       "muon",      "adamw",      "adamw"),
    "lr":              (0.01,        16e-3,       4e-3,         4e-3),
    "weight_decay":    (1e-4,        1e-2,         1e-2,         1e-2),
    "schedule":        ("poly",      "one-cycle",  "one-cycle",  "one-cycle"),
    "vessel_weight":   (2.0,         1.0,          1.0,          1.0),
    "dice_loss":       ("all",       "foreground", "foreground", "foreground"),
    "ema_decay":       (0.0,         0.98,         0.998,        0.998),
    "tta":             (None,        None,         True,         True),
    "print_freq":      (1,           20,           20,           20),
}  # fmt: skip

RECIPES: dict[str, dict[str, Any]] = {
    name: {flag: values[column] for flag, values in _TABLE.items()}
    for column, name in enumerate(("tutorial", "quick", "best", "any-camera"))
}
