"""The epochs of a run: train, evaluate, log, save; and the flags and data that both training scripts share."""

import argparse
import statistics
import time
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader

from my_dataset import (
    DRIVE_MEAN,
    DRIVE_STD,
    OUTSIDE,
    DatasetError,
    DriveDataset,
    count_training_photographs,
    find_drive,
    has_test_labels,
)
from src import ARCHITECTURES, BackboneUNet
from src.photograph import field_of_view_diameter
from transforms import AUGMENTATIONS, get_transform

from .checkpoint import BEST_MODEL, LAST_MODEL, Checkpoint, load_backbone_weights, save_checkpoint
from .command_line import UsageError, add_switch, at_least, fraction, probability_or_auto
from .data_loading import photograph_preparation
from .distributed_utils import broadcast_buffers, is_main_process, on_main_process
from .files import make_output_folder
from .logger import ResultsFiles, Row
from .metrics import ConfusionMatrix
from .recipes import RECIPES
from .speed import add_speed_flags, amp_dtype
from .tensorboard_log import TensorBoardLog
from .train_and_eval import NonFiniteLossError, evaluate, train_one_epoch
from .training_state import TrainingState, load_to_resume

VAL_SPLIT_WITHOUT_TEST_LABELS = 4


def add_training_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags of both training scripts, with the tutorial's names and defaults."""
    add = parser.add_argument
    add(
        "--recipe",
        default="tutorial",
        choices=list(RECIPES),
        help="named defaults for the other flags (train_utils/recipes.py): the tutorial's; its Dice in minutes on a "
        "CPU; the best Dice",
    )
    add("--data-path", default="./", help="the folder that contains DRIVE")
    add("--num-classes", default=1, type=at_least(1), help="classes without the background")
    add("--device", default="cuda", help="where to train; cuda means the CPU where there is no GPU")
    add("-b", "--batch-size", type=at_least(1), help="photographs a step, in each process")
    add("--epochs", type=at_least(1), help="epochs of the whole run")
    add(
        "--steps-per-epoch",
        type=at_least(1),
        metavar="N",
        help="steps an epoch, however many photographs there are (default: each photograph once)",
    )
    add("--optimizer", choices=["sgd", "adamw"], help="optimizer")
    add("--lr", type=at_least(0, float), help="peak learning rate")
    add("--momentum", default=0.9, type=at_least(0, float), help="momentum of --optimizer sgd")
    add("--wd", "--weight-decay", type=at_least(0, float), dest="weight_decay", help="weight decay")
    add(
        "--schedule",
        choices=["poly", "one-cycle"],
        help="of the learning rate: an epoch of warm-up, then a polynomial decay; or one cycle, up and down on cosines",
    )
    add(
        "--vessel-weight",
        type=at_least(0, float),
        help="weight of the vessels in the cross-entropy, where the background has 1 and there is no third class",
    )
    add("--dice-loss", choices=["all", "foreground"], help="classes that the Dice loss averages over")
    add(
        "--ema-decay",
        type=fraction,
        help="evaluate and keep the exponential moving average of the weights, with this decay a step; 0: none",
    )
    add("--print-freq", type=at_least(1), help="steps between progress lines")
    add("--resume", default="", help="go on from this checkpoint; 'auto' means the newest in --output-dir, if any")
    add("--start-epoch", "--start_epoch", default=0, type=at_least(0), help="first epoch, where not resumed")
    add_switch(parser, "--save-best", default=True, help="keep the best epoch alone, not every one")
    add_speed_flags(parser)
    add("--seed", default=0, type=at_least(0), help="the same seed gives the same numbers")
    add("--arch", default="unet", choices=list(ARCHITECTURES), help="architecture of the model")
    add(
        "--backbone-weights",
        metavar="FILE",
        help="start mobilenet_v3 or vgg16 from this file of torchvision's ImageNet weights; 'imagenet' downloads it",
    )
    add(
        "--base-c",
        type=at_least(1),
        help="channels at full resolution, of unet and of unet_paper (whose default is 64)",
    )
    add(
        "--augmentation",
        choices=list(AUGMENTATIONS),
        help="training preset: the tutorial's; or scales nearer to 1, any rotation and colour jitter",
    )
    add(
        "--base-size",
        default=565,
        type=at_least(2),
        help="shorter side, pixels: the preset resizes to 0.5 - 1.2 times this (rotation: 0.8 - 1.15)",
    )
    add(
        "--normalization",
        choices=["dataset", "photograph", "local"],
        help="by the mean and standard deviation of the data set; of each photograph; or of each photograph after "
        "every pixel was divided by the mean of its surroundings (uneven light). Stored with the weights",
    )
    add(
        "--mean",
        nargs=3,
        default=list(DRIVE_MEAN),
        type=at_least(0, float),
        help="channel means, by compute_mean_std.py",
    )
    add("--std", nargs=3, default=list(DRIVE_STD), type=at_least(1e-6, float), help="channel standard deviations")
    add("--crop-size", type=at_least(32), help="side of the training crops")
    add(
        "--val-split",
        type=at_least(0),
        metavar="N",
        help="validate on the last N training photographs, not on the test ones "
        f"(default: 0 with test labels, else {VAL_SPLIT_WITHOUT_TEST_LABELS})",
    )
    add(
        "--threshold",
        default=0.5,
        type=probability_or_auto,
        help="probability above which a pixel is scored as a vessel; 'auto' takes the one of best Dice on the held-out "
        "photographs (without --val-split, on the training ones) and stores it with the weights",
    )
    add_switch(
        parser,
        "--tta",
        default=None,
        help="score the mean over the four flips, in four times the time; stored with the weights, for predict.py "
        "and --test-only (default: as stored, else not)",
    )
    add("--test-only", action="store_true", help="only score the weights that --resume names, on the test photographs")
    add("--tensorboard", action="store_true", help="also write TensorBoard events, into --output-dir")
    parser.set_defaults(**RECIPES["tutorial"])


def changed_defaults(asked: argparse.Namespace, demo: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """The defaults that --arch, --demo (by `demo`) and --recipe change; where several change one, the last of these."""
    widths = {name: value for name, value in ARCHITECTURES[asked.arch][1].items() if name == "base_c"}
    return widths | dict(demo or {}) | (RECIPES[asked.recipe] if asked.recipe != "tutorial" else {})


def model_arguments(args: argparse.Namespace) -> dict[str, str | int]:
    """The arguments of `src.create_model` that the flags ask for."""
    widths = {"base_c": args.base_c} if "base_c" in ARCHITECTURES[args.arch][1] else {}
    return {"arch": args.arch, "num_classes": args.num_classes + 1} | widths


def open_datasets(args: argparse.Namespace) -> tuple[DriveDataset, DriveDataset]:
    """The photographs to train and to validate on; settles `args.val_split` where it was left open."""
    if args.val_split is None:
        args.val_split = 0
        if not has_test_labels(args.data_path):
            args.val_split = min(VAL_SPLIT_WITHOUT_TEST_LABELS, count_training_photographs(args.data_path) - 1)
            if not args.val_split:
                raise DatasetError(
                    f"--data-path {args.data_path}: a single training photograph, and no labels in test/1st_manual; "
                    "nothing is left to validate on"
                )
            if is_main_process():
                print(
                    f"{find_drive(args.data_path) / 'test' / '1st_manual'} holds no labels (the official download has "
                    f"none): validating on the last {args.val_split} training photographs, which are not trained on "
                    "(--val-split N chooses how many)"
                )
    train_data, val_data = (
        DriveDataset(
            args.data_path,
            train,
            get_transform(train, args.mean, args.std, args.base_size, args.crop_size, args.augmentation),
            val_split=args.val_split,
            prepare=photograph_preparation(vars(args)),
        )
        for train in (True, False)
    )
    return train_data, val_data


def fit(
    model: nn.Module, train_loader: DataLoader, val_loader: DataLoader, device: torch.device, args: argparse.Namespace
) -> float:
    """Train for the epochs that are left, by the flags of `add_training_flags`; return the best Dice.

    The main process writes the results files into the working directory, and into `args.output_dir` the newest state
    and the best epoch's (or every epoch's, without `args.save_best`).

    Raises:
        NonFiniteLossError: the loss or the weights became NaN or infinite; the state before that epoch is kept.
        UsageError, CheckpointError, BackboneWeightsError: `args.resume`, `args.start_epoch` or
            `args.backbone_weights` cannot be used.
        OutputError: a file cannot be written.
    """
    raw_model = model.module if isinstance(model, DistributedDataParallel) else model
    if args.compile:
        model = torch.compile(model)  # checkpoints and evaluation are of raw_model
    on_main_process(make_output_folder, ".", "the working directory (for the results files)")
    state = TrainingState(
        raw_model,
        device,
        len(train_loader),
        args,
        selected_on=val_loader.dataset.describe(),
        fov_diameter=_median_diameter(train_loader.dataset.dataset),
    )
    _resume_or_pretrain(state, val_loader, device, args)
    saver, tensorboard = _Saver(), None
    on_main_process(state.results.write, state.results.rows)
    if is_main_process() and args.tensorboard:
        tensorboard = TensorBoardLog(args.output_dir, first_epoch=state.epoch)

    try:
        while state.epoch < args.epochs:
            row, confusion_matrix = _run_epoch(state, model, train_loader, val_loader, device)
            improved = state.finish_epoch(row)
            if is_main_process():
                print(f"{confusion_matrix}\ndice coefficient: {row['dice']:.3f}", flush=True)
                if tensorboard is not None:
                    tensorboard.write(row)
            on_main_process(saver.save, state, improved)
            state.saved_in = str(Path(args.output_dir, LAST_MODEL))
        on_main_process(saver.wait)
    except KeyboardInterrupt:
        saver.wait()
        if is_main_process():
            print(f"interrupted in epoch {state.epoch}; {_where_to_resume(state)}")
        raise SystemExit(130) from None
    except NonFiniteLossError as error:
        saver.wait()
        raise NonFiniteLossError(f"{error}; {_where_to_resume(state)}") from error
    return state.best_dice


def _run_epoch(
    state: TrainingState, model: nn.Module, train_loader: DataLoader, val_loader: DataLoader, device: torch.device
) -> tuple[Row, ConfusionMatrix]:
    """Train for one epoch and evaluate; `model` is `state.model`, or what wraps it for training."""
    args, num_classes = state.args, state.args.num_classes + 1
    started = time.time()
    train_loader.sampler.set_epoch(state.epoch)
    mean_loss, lr = train_one_epoch(
        model,
        state.optimizer,
        train_loader,
        device,
        state.epoch,
        num_classes,
        state.lr_scheduler,
        print_freq=args.print_freq,
        scaler=state.scaler,
        amp_dtype=amp_dtype(args),
        vessel_weight=args.vessel_weight,
        foreground_dice=args.dice_loss == "foreground",
        averaged=state.averaged,
    )
    broadcast_buffers(state.model)
    if state.averaged is not None:
        broadcast_buffers(state.averaged.module)
    _require_finite_weights(state.model, state.epoch)
    confusion_matrix, dice = _validate(state, val_loader, device)
    return _results_row(state.epoch, mean_loss, lr, dice, confusion_matrix, time.time() - started), confusion_matrix


def _validate(state: TrainingState, val_loader: DataLoader, device: torch.device) -> tuple[ConfusionMatrix, float]:
    num_classes, dtype = state.args.num_classes + 1, amp_dtype(state.args)
    return evaluate(state.evaluated_model, val_loader, device, num_classes, amp_dtype=dtype, per_photograph=True)


def _resume_or_pretrain(
    state: TrainingState, val_loader: DataLoader, device: torch.device, args: argparse.Namespace
) -> None:
    if checkpoint := load_to_resume(args):
        state.restore(checkpoint)
        if state.epoch >= args.epochs and is_main_process():
            print(f"nothing left to train: {state.epoch} epochs are done; raise --epochs {args.epochs} for more")
        if state.best_dice is None:
            # The tutorial's files do not say how good they are, nor does a Dice on other photographs; and a worse
            # epoch must not replace a better one.
            state.best_dice = _validate(state, val_loader, device)[1]
    elif state.epoch >= args.epochs:
        raise UsageError(f"--start-epoch {args.start_epoch}: leaves nothing of --epochs {args.epochs}; lower it")
    elif args.backbone_weights:
        _pretrain_backbone(state.model, args)


def _median_diameter(train_data: DriveDataset) -> float:
    """Pixels across the fields of view of the training photographs: what predict.py scales other photographs to."""
    return statistics.median(field_of_view_diameter(label != OUTSIDE) for label in train_data.labels)


def _pretrain_backbone(model: nn.Module, args: argparse.Namespace) -> None:
    if not isinstance(model, BackboneUNet):
        raise UsageError(f"--backbone-weights: {args.arch} has no backbone; use --arch mobilenet_v3 or --arch vgg16")
    if args.backbone_weights == "imagenet":
        model.download_backbone()
    else:
        load_backbone_weights(model, args.backbone_weights)


def _require_finite_weights(model: nn.Module, epoch: int) -> None:
    # Put together on the device: reading each of a hundred answers would be a hundred waits for a GPU.
    if not torch.stack([value.isfinite().all() for value in model.state_dict().values()]).all():
        raise NonFiniteLossError(f"the weights became NaN or infinite at the end of epoch {epoch}; lower --lr")


def _where_to_resume(state: TrainingState) -> str:
    if state.saved_in is None:
        return "no epoch was saved yet"
    return f"the last whole state is in {state.saved_in}: --resume {state.saved_in}"


def _results_row(
    epoch: int, mean_loss: float, lr: float, dice: float, confusion_matrix: ConfusionMatrix, seconds: float
) -> Row:
    accuracy, recall, iou = confusion_matrix.compute()
    return {
        "epoch": epoch,
        "train_loss": mean_loss,
        "lr": lr,
        "dice": dice,
        "global_accuracy": accuracy.item(),
        "recall": recall.tolist(),
        "iou": iou.tolist(),
        "mean_iou": iou.mean().item(),
        "seconds": seconds,
    }


class _Saver:
    """Writes the files of an epoch while the next one trains: on a GPU they would take longer than the epoch itself."""

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(max_workers=1)
        self._pending: Future | None = None

    def save(self, state: TrainingState, improved: bool) -> None:
        self.wait()
        self._pending = self._thread.submit(_write, state.checkpoint(), improved, state.args, state.results)

    def wait(self) -> None:
        """Return when all is written.

        Raises:
            OutputError: a file could not be written.
        """
        if self._pending is not None:
            self._pending.result()


def _write(checkpoint: Checkpoint, improved: bool, args: argparse.Namespace, results: ResultsFiles) -> None:
    folder = Path(args.output_dir)
    if not args.save_best:
        save_checkpoint(checkpoint, folder / f"model_{checkpoint['epoch']}.pth")
    elif improved:
        save_checkpoint(checkpoint, folder / BEST_MODEL)
    save_checkpoint(checkpoint, folder / LAST_MODEL)
    results.write(checkpoint["history"])
