"""Training: flags, data loading, loss, epochs, scores and checkpoints; the names that the tutorial has are here."""

from src.weights import load_checkpoint, load_model

from .checkpoint import save_checkpoint
from .dice_coefficient_loss import build_target, dice_coeff, dice_loss, multiclass_dice_coeff
from .distributed_utils import (
    get_rank,
    get_world_size,
    init_distributed_mode,
    is_dist_avail_and_initialized,
    is_main_process,
    mkdir,
    save_on_master,
)
from .logger import MetricLogger, SmoothedValue
from .scoring.counts import ConfusionMatrix, DiceCoefficient
from .train_and_eval import create_lr_scheduler, criterion, evaluate, train_one_epoch

__all__ = [
    "ConfusionMatrix",
    "DiceCoefficient",
    "MetricLogger",
    "SmoothedValue",
    "build_target",
    "create_lr_scheduler",
    "criterion",
    "dice_coeff",
    "dice_loss",
    "evaluate",
    "get_rank",
    "get_world_size",
    "init_distributed_mode",
    "is_dist_avail_and_initialized",
    "is_main_process",
    "load_checkpoint",
    "load_model",
    "mkdir",
    "multiclass_dice_coeff",
    "save_checkpoint",
    "save_on_master",
    "train_one_epoch",
]
