"""Recipes: named sets of defaults for flags, chosen by `--recipe`. Flags on the command line override them."""

from typing import Any

_TABLE: dict[str, tuple[Any, Any, Any, Any]] = {
    # flag              tutorial     quick         best          any-camera
    "base_c":          (32,          8,            16,           16),
    "augmentation":    ("tutorial",  "tutorial",   "rotation",   "any-camera"),
    "normalization":   ("dataset",   "local",      "local",      "local"),
    "crop_size":       (480,         256,          256,          256),
    "batch_size":      (4,           4,            4,            4),
    "epochs":          (200,         4,            20,           20),
    "steps_per_epoch": (None,        200,          200,          200),
    "optimizer":       ("sgd",       "adamw",      "adamw",      "adamw"),
    "lr":              (0.01,        8e-3,         4e-3,         4e-3),
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
