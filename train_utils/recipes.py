"""Recipes: named sets of defaults for flags, chosen by `--recipe`. Flags on the command line override them.

How they were measured. FOLDER has DRIVE's 21-36 as `training` and 37-40 as `test`. Dice is the mean over photographs,
inside the field of view, without flips unless it says so. The best epoch is chosen on those same four photographs, as
the tutorial does. The recipes were tuned on held-out parts of 21-36. Where no commit is named, the figures of
any-camera, and what quick is made of, are older than c68c520, since which the moving average of the weights forgets
its first steps.

    python train.py --data-path FOLDER and                    best (last) epoch           steps
    (nothing: the tutorial's)                                 0.801 (0.795)                 800
    --recipe quick, seeds 0 to 9                              0.806 to 0.810 (same)         500
    --recipe best --amp, seeds 0, 1, 2                        0.822, 0.823, 0.822         1400
                                                              (0.821, 0.823, 0.820)
    the same at commit 38d1c62                                0.824, 0.823, 0.824         2000
                                                              (0.819, 0.819, 0.818)
    there with --base-c 16                                    0.821, 0.823, 0.821         2000
                                                              (0.818, 0.821, 0.819)

best over its two flips, as it scores in the end: 0.8224, 0.8231 and 0.8220, average precision 0.910 to 0.911. At
commit 38d1c62 it took 2000 steps, and the average of the weights (`--ema-decay 0.998`) began with the random ones, so
the first three epochs had a Dice of 0.00. There its best epochs have 0.8245, 0.8226 and 0.8246 over two flips (the
paired difference of now to them is -0.0014, standard error 0.0013). The last epochs, which nobody chose, have 0.8221,
0.8230 and 0.8211 now, and had 0.8208, 0.8198 and 0.8193 (+0.0021, 0.0005, higher in 4 of 4; `--test-only --resume
last_model.pth`). With `--base-c 16 --tta-scales 1` (the four flips) 38d1c62 has 0.8220, 0.8233 and 0.8226. On these
four photographs all of them find too much rather than too little; on all 20 the differences are clearer.

FOLDER20 has DRIVE's 20 as `training` and nothing else; `--data-path FOLDER20 --recipe best --amp --fold 1/2` and `2/2`,
seed 0, so 10 photographs to train on, the best epoch chosen on the other 10; over its flips. In brackets: the paired
difference from the column before, its standard error, and in how many of 20 it is higher. At a6c5c02 no crop kept the
pixels of the photograph, and best had 16 channels:

                   a6c5c02   38d1c62, --base-c 16          38d1c62                       now
                             --tta-scales 1
    Dice           0.8149    0.8189 (+0.0039, 0.0021, 13)  0.8211 (+0.0023, 0.0011, 16)  0.8207 (-0.0004, 0.0007,  6)
    clDice         0.8103    0.8212 (+0.0109, 0.0028, 19)  0.8219 (+0.0007, 0.0010, 10)  0.8218 (-0.0002, 0.0011,  9)
    sensitivity    0.7905    0.8148 (+0.0243, 0.0050, 18)  0.8211 (+0.0063, 0.0019, 16)  0.8199 (-0.0012, 0.0019,  7)
    precision      0.8477    0.8296 (-0.0181, 0.0044,  2)  0.8267 (-0.0028, 0.0014,  7)  0.8269 (+0.0001, 0.0017, 12)

Average precision by fold: 0.8970 and 0.9114; 0.8976 and 0.9144; 0.8995 and 0.9162; 0.8996 and 0.9162. Over four flips
32 channels have a Dice of 0.8217 at 38d1c62.

By seeds 0 and 1, beside the recipe of AdamW (commit 907ab24: 16 channels, 4000 steps, all crops resampled, four flips),
an earlier version of which had 0.827 on the official test. In brackets: paired differences of the means of both:

                   907ab24           now
    Dice           0.8136, 0.8141    0.8207, 0.8215  (+0.0073, 0.0022, 15)
    clDice         0.8087, 0.8093    0.8218, 0.8237  (+0.0137, 0.0024, 20)
    sensitivity    0.7903, 0.7905    0.8199, 0.8217  (+0.0304, 0.0037, 20)
    precision      0.8442, 0.8450    0.8269, 0.8270  (-0.0177, 0.0045,  1)

Average precision by fold, of both seeds: 0.8947 and 0.9095, 0.8950 and 0.9107; now 0.8996 and 0.9162, 0.9001 and
0.9168.

On the machine below, over two flips a photograph of DRIVE takes 1.1 s, or 0.6 s with --amp, and over four twice that
(`predict.py --image FOLDER/DRIVE/test/images`, half of `seconds` in predictions.csv, as two are worked on at once).

Not taken up, measured in the same way on both folds. `--crop-size 384 --batch-size 2` takes an eighth more time:

    now                               0.8207                               average precision by fold 0.8996, 0.9162
    --crop-size 384 --batch-size 2    0.8210  (+0.0003, 0.0014, 11)                                0.8988, 0.9170

and at 38d1c62 with `--base-c 16 --tta-scales 1`. The last of them is a change of code: `bend` of the rotation preset's
`RandomAffineCrop`, for its resampled crops alone:

    nothing else                      0.8189                               average precision by fold 0.8976, 0.9144
    `--init-weights` of HRF           0.8199  (+0.0010, 0.0011, 16)                                  0.9000, 0.9162
    bend=0.01                         0.8196  (+0.0008, 0.0006, 11)                                  0.8985, 0.9150

and at commit 6b45c3b with the same flags, in other folds, because 37-40 had their own names (`37_test.tif`):

    nothing else                      0.8128                               average precision by fold 0.9190, 0.8911
    `--fov-diameter 702`              0.8110  (-0.0019, 0.0008,  7)                                  0.9153, 0.8883
    deep supervision                  0.8136  (+0.0007, 0.0013, 10)                                  0.9191, 0.8915
    a second network refines          0.8135  (+0.0007, 0.0007, 14)                                  0.9186, 0.8908

The last two are changes of code, one seed each. Deep supervision: a 1 x 1 convolution of the output of `up3`, enlarged
bilinearly, as the output `aux`. The second network: a `UNet` of 8 channels, which gets the image and the first one's
probability of a vessel; the first one's logits are `aux`. Neither has a higher ROC-AUC (by fold 0.9816 and 0.9763,
0.9807 and 0.9764; without 0.9817 and 0.9765). A quarter of the Dice loss (fold 1/2 alone) has 0.9819, but loses 0.0053
of Dice (0.0011, higher in 0 of 10).

There, at commit db771b4 (the first line is the same run), each a change of code and one seed:

    nothing else                      0.8128                               average precision by fold 0.9190, 0.8911
    bicubic sampling                  0.8129  (+0.0000, 0.0007, 10)                                  0.9189, 0.8902
    drop-out at the bottom            0.8127  (-0.0002, 0.0005,  9)                                  0.9186, 0.8907

Bicubic sampling (the crops that are resampled) finds more: sensitivity +0.0042 (0.0008, higher in 19 of 20), clDice
+0.0014 (0.0005), but gains on one fold what it loses on the other. With bend=0.01 besides (fold 1/2 alone), -0.0003
(0.0004, average precision 0.9186). Weights of the first line, scored over other views (`--test-only --resume
last_model.pth --fold K/2 --amp --tta --tta-scales ...`), have less average precision: over 0.8 1 1.25 by fold 0.9127
and 0.8856, over 1 1.2 0.9143 and 0.8850. The drop-out is of whole channels, 0.3 of the output of `down4`.
The mean of the probabilities of these three runs (by hand) has 0.8131 (+0.0003, 0.0004), ROC-AUC by fold 0.9820 and
0.9766 (one of them: 0.9817 and 0.9765), so an ensemble gains as little here as on 37-40.

Deep supervision and bend=0.01 together (at commit 4a04ce8, paired with the first line) have 0.8106 (-0.0022, 0.0024,
higher in 8 of 20), average precision 0.9187 and 0.8908: what they find is ranked as before, but they find less of it
(sensitivity -0.0223, 0.0025, higher in 0 of 20), which loses 0.0086 on one fold and gains 0.0041 on the other.

The labels of one fold are wider than those of the other: the first line's weights would have 0.8340 at a threshold of
0.30 on fold 1/2, and 0.8016 at 0.68 on fold 2/2 (found on these photographs themselves, by hand), in place of 0.8275
and 0.7982. So what finds more gains on one of them and loses on the other, and the average precision tells more.

The weights of HRF are those of `--data-path HRF --recipe any-camera --train-on-all --fov-diameter 540 --epochs 12`.
With 1000 steps at `--lr 1e-3` from them (fold 1/2, at a6c5c02) it has less than without.

The recipe of AdamW (commit 907ab24, 4000 steps) had 0.8211, 0.8217 and 0.8214 on 37-40. More of Muon is too much: with
4000 steps (--epochs 20, seed 0, at a6c5c02) the Dice is 0.822 after 2200 steps, and falls to 0.817. So does
any-camera on 21-36 alone, from 0.819 after 1800 steps to 0.817 after 2200, where it was stopped. Tried and left
out: the mean of the last epochs of the three seeds has 0.8230, no more than one of them. As labels, a growing share
of the moving average's own probabilities (up to 0.6, one fold of two, 1600 steps) lost 0.016 on 10 photographs,
standard error 0.005.

On two cores of an AMD EPYC with AVX-512 and bfloat16 a step of best takes 0.8 s with --amp and 1.4 s without
(`--recipe best --epochs 1 --steps-per-epoch 20 --val-split 1`), so its 1400 steps take 19 or 33 minutes; with
--base-c 16 0.30 s and 0.44 to 0.51 s, so 7 or 11 minutes. The tutorial's settings take 74 (calculated). On two cores
with AVX2 alone a step of 16 channels took 0.7 to 0.9 s by AdamW, and one of 32 would take three times that. Dice on the
official test photographs, which the README quotes, was measured once, by its maintainers, with an earlier version: best
of 16 channels, over four flips.

quick is to reach the tutorial's Dice in the least time, and every seed did. By `python tests/benchmark.py
--data-path FOLDER --time-to-dice 10`, from the start of the process to the last weights, on two quiet cores with
AVX-512 of which only AVX2 was used (ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2), ten seeds have 0.8072, 0.8065,
0.8079, 0.8084, 0.8082, 0.8087, 0.8084, 0.8063, 0.8061 and 0.8098 after 58, 48, 50, 49, 42, 48, 43, 41, 40 and 43 s. At
commit 907ab24 (all crops resampled) ten seeds had 0.8041 to 0.8092, and three took 91 to 101 s on slow AVX2 cores. The
recipe of before (commit 1679893: AdamW, 800 steps of crops of 256) had 0.806, 0.806 and 0.807; there a step took 0.57 s
on the slow cores, so about 460 s in all.

What quick is made of, one change at a time: `--data-path FOLDER --fold 1/4 --recipe quick --epochs 1` and the flags
below, where FOLDER has 21-36 as `training` and nothing else (22, 27, 28 and 29 are held out), at commit 907ab24;
seconds of one AVX2 core:

    --optimizer adamw --lr 8e-3 --crop-size 256 --steps-per-epoch 200    0.777    115
    --optimizer adamw --lr 8e-3 --crop-size 192 --steps-per-epoch 360    0.785    115
    --optimizer adamw --lr 8e-3 --steps-per-epoch 800                    0.797    134
    --lr 8e-3 --steps-per-epoch 800                                      0.812    141
    --lr 8e-3 --steps-per-epoch 400                                      0.800     79
    --lr 8e-3 --steps-per-epoch 400 --fold 2/4                           0.806     76
    --steps-per-epoch 400                                                0.802     75
    --steps-per-epoch 400 --fold 2/4                                     0.808     77
    --lr 4e-3 --steps-per-epoch 400                                      0.796     74
    --lr 8e-3 --crop-size 256 --steps-per-epoch 200                      0.796    115
    --lr 8e-3 --crop-size 96 --steps-per-epoch 600                       0.800     72
    --lr 8e-3 --batch-size 2 --steps-per-epoch 800                       0.800     85
    --lr 8e-3 --ema-decay 0.95 --steps-per-epoch 400                     0.800     72
    --lr 8e-3 --augmentation tutorial --steps-per-epoch 400              0.802     86
    --lr 8e-3 --augmentation any-camera --steps-per-epoch 400            0.793     85

The first three rows had four epochs. Muon (0.015) and many small crops (0.020) count; the rest is within the noise of
one seed. Tried and left out: a network at half the resolution (twice the width, pixels moved into channels and back)
costs as much for less: 0.788 with AdamW and 0.809 with Muon, at 800 steps.

How many crops are resampled: `--data-path FOLDER20 --recipe quick --epochs 1 --steps-per-epoch 500 --fold 1/2` (`2/2`),
seed 0, with another `unresampled` in `transforms.SegmentationPresetRotation`:

    0 (all are)    0.776 (0.806)
    0.5            0.784 (0.805)
    0.8            0.786 (0.808)

With bicubic in place of bilinear sampling, 0.5 has 0.786 (0.807) and 0 has 0.784; not taken up yet.

any-camera by AdamW and by Muon, 1600 steps on 21-36 alone (`--recipe any-camera --epochs 8 --optimizer adamw` and
`muon`, seed 0; HRF without flips), and the paired difference by `python -m train_utils.scoring.compare ... --against`:

                          AdamW    Muon     difference, standard error
    DRIVE's 37-40         0.815    0.820    0.005, 0.001, higher in 4 of 4
    ARIA, 48              0.699    0.707    0.007, 0.001, higher in 45 of 48
    HRF, 45               0.739    0.741    0.003, 0.001, higher in 31 of 45

Small crops do not help there: trained on DRIVE and HRF, 4000 steps of crops of 128 by Muon have 0.698 on ARIA, 5000
steps of crops of 256 by AdamW 0.704, and 5000 of these by Muon 0.714 (pretrained/README.md).

any-camera at commit 7666c69 (best epochs; of today there is the row 2e5d41c below): `--recipe any-camera --epochs 8
--amp`, seeds 0, 1, 2, on 21-36 alone, all with flips. Commit a4ce218 has no gamma and no JPEG traces, and prepares a
photograph before it is shrunk. Commit e9df0b8 besides has crops of 0.7 to 1.4 times the working size in place of 0.6 to
1.6, no photograph seen larger (`src.segment.match_scale`), and WIDENING 0.75 in place of 1.1. There HRF is without
flips, and one number is missing:

                          DRIVE's 37-40            ARIA                     HRF
    7666c69               0.819, 0.821, 0.820      0.701, 0.707, 0.702      0.783, 0.783, 0.784
    a4ce218               0.820, 0.821, 0.820      0.710, 0.700, 0.707      0.787, 0.786, 0.788
    e9df0b8               0.820, 0.820, 0.820      0.707, 0.705, 0.714      0.741, 0.737, -

Gamma and JPEG traces are for poor photographs. By all three seeds, paired over photographs, the change from a4ce218
costs ARIA 0.0024 (standard error 0.0008) and HRF 0.0037 (0.0003; clDice 0.0095), 0.0005 of it by the preparation. By
seeds 0 and 1, copies of ARIA as JPEG files of quality 30 gain 0.009 (0.001, higher in 47 of 48), and copies whose
levels were raised to the power 1.8 (quality 75) 0.011 (0.002, 46 of 48). HRF's gain over e9df0b8 comes from the size at
which photographs of more pixels are seen, and from the width of their vessels: a4ce218's weights of seed 2 have 0.743
there by the code of before (paired difference 0.045, standard error 0.003, higher in 44 of 45; clDice 0.780 for 0.675).
With `--tta-scales 0.7 1 1.4` its DRIVE falls to 0.814 and ARIA's seed 0 to 0.706, so the recipe keeps the flips; the
weights in `pretrained`, whose working diameter is larger, gain by them.

Tried and not taken up: half of the crops unresampled, as in the rotation preset (a change of code: `unresampled=0.5` of
`RandomAffineCrop`, on the pictures of the working size), by the same commands, last epochs at commit 2e5d41c, seeds 0
and 1, all with flips and --amp. In brackets: paired differences of the means of both, their standard errors, and in how
many they are higher:

                          DRIVE's 37-40                   ARIA                             HRF
    2e5d41c               0.818, 0.818                    0.716, 0.715                     0.782, 0.782
    half unresampled      0.816, 0.817                    0.716, 0.714                     0.785, 0.784
                          (-0.0014, 0.0005, 1 of 4)       (-0.0007, 0.0005, 19 of 48)      (+0.0026, 0.0002, 43 of 45)
    sensitivity           (+0.0054, 0.0010, 4 of 4)       (+0.0044, 0.0009, 42 of 48)      (+0.0018, 0.0003, 37 of 45)

Photographs of other cameras, by the quick recipe of before (commit 1679893: AdamW, 800 steps of crops of 256) with
`--tta`, trained on 21-36 alone: DRIVE's 37-40, ARIA (48 of 768 x 576, no ROI masks) and HRF (45 of 3504 x 2336, without
flips), each in its own size. The first row is commit 55d96be; each row keeps what the rows above it changed:

    before, --seed 0                                             0.809                 0.627                 0.698
    the field of view by a circle fit, the same weights          0.809                 0.634                 0.698
    the width of vessels by the scale, the same weights          0.809                 0.633                 0.746
    --augmentation any-camera, seeds 0, 1, 2     0.808, 0.805, 0.808   0.695, 0.699, 0.696   0.733, 0.741, 0.735

ARIA and HRF: `python train.py --test-only --resume save_weights/best_model.pth --data-path FOLDER`. Tried and left out:
statistics of the colours without the rim and the outliers, and the mean colour around the field of view (ARIA 0.599
against 0.627, with the field of view of before; DRIVE 0.807).
"""

from typing import Any

_TABLE: dict[str, tuple[Any, Any, Any, Any]] = {
    # flag            tutorial     quick         best          any-camera
    "base_c":          (32,          8,            32,           16),
    "augmentation":    ("tutorial",  "rotation",   "rotation",   "any-camera"),
    "normalization":   ("dataset",   "local",      "local",      "local"),
    "crop_size":       (480,         128,          256,          256),
    "batch_size":      (4,           4,            4,            4),
    "epochs":          (200,         2,            7,            20),
    "steps_per_epoch": (None,        250,          200,          200),
    "optimizer":       ("sgd",       "muon",       "muon",       "muon"),
    "lr":              (0.01,        16e-3,        4e-3,         4e-3),
    "weight_decay":    (1e-4,        1e-2,         1e-2,         1e-2),
    "schedule":        ("poly",      "one-cycle",  "one-cycle",  "one-cycle"),
    "vessel_weight":   (2.0,         1.0,          1.0,          1.0),
    "dice_loss":       ("all",       "foreground", "foreground", "foreground"),
    "ema_decay":       (0.0,         0.98,         0.999,        0.998),
    "tta":             (None,        None,         True,         True),
    "tta_scales":      (None,        None,         [1.0, 1.0],   None),
    "print_freq":      (1,           20,           20,           20),
}  # fmt: skip

RECIPES: dict[str, dict[str, Any]] = {
    name: {flag: values[column] for flag, values in _TABLE.items()}
    for column, name in enumerate(("tutorial", "quick", "best", "any-camera"))
}
