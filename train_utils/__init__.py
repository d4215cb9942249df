"""Training: flags, data loading, loss, epochs, scores and checkpoints; the names that the tutorial has are here.

Each is imported when it is first asked for: predict.py needs few of them, and torchvision alone takes seconds.
"""

import importlib
from typing import Any

_NAMES = {
    "src.weights": ("load_checkpoint", "load_model"),
    "train_utils.checkpoint": ("save_checkpoint",),
    "train_utils.dice_coefficient_loss": ("build_target", "dice_coeff", "dice_loss", "multiclass_dice_coeff"),
    "train_utils.distributed_utils": (
        "get_rank",
        "get_world_size",
        "init_distributed_mode",
        "is_dist_avail_and_initialized",
        "is_main_process",
        "mkdir",
        "save_on_master",
    ),
    "train_utils.logger": ("MetricLogger", "SmoothedValue"),
    "train_utils.scoring.counts": ("ConfusionMatrix", "DiceCoefficient"),
    "train_utils.train_and_eval": ("create_lr_scheduler", "criterion", "evaluate", "train_one_epoch"),
}
_MODULES = {name: module for module, names in _NAMES.items() for name in names}

__all__ = sorted(_MODULES)


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_MODULES[name]), name)


def __dir__() -> list[str]:
    return __all__
