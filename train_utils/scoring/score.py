"""Weights -> their scores on the test photographs: what is loaded, which threshold holds, what is written."""

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from my_dataset import DatasetError, DriveDataset, find_drive, has_test_labels
from transforms import get_transform

from ..checkpoint import (
    BEST_MODEL,
    LAST_MODEL,
    Checkpoint,
    add_to_checkpoint,
    build_model,
    load_checkpoint,
    normalization_of,
)
from ..command_line import UsageError
from ..data_loading import open_photographs
from ..distributed_utils import is_main_process, on_main_process
from .curves import curves
from .drawing import write_png
from .measure import best_threshold, measure
from .report import Threshold, format_report, make_report, write_report


def score_weights(path: str | Path, device: torch.device, args: argparse.Namespace) -> None:
    """Score a file of weights on the test photographs: print the table and write the files into `args.output_dir`.

    With `args.threshold` "auto" the threshold is chosen on the training photographs (those that were held out, if
    any), and stored in the file of weights.

    Raises:
        UsageError: `path` is empty.
        DatasetError: the test photographs or their labels are missing.
        CheckpointError: the weights cannot be used.
        train_utils.files.OutputError: a file cannot be written.
    """
    if not path:
        raise UsageError("--test-only: says nothing of the weights; name them with --resume FILE")
    if not has_test_labels(args.data_path):
        raise DatasetError(
            f"{_test_labels(args)}: no labels of the test photographs there (the official download has none), so "
            "nothing can be scored; put the NN_manual1.gif files there"
        )
    model, checkpoint = _load_in_all_processes(path, device)
    tta = _use_flips(checkpoint, args)
    threshold = _settle_threshold(model, checkpoint, device, args)
    test_photographs = _open(args.data_path, False, checkpoint)
    measurement = measure(model, test_photographs, device, threshold.value, tta=tta)
    if is_main_process():
        report = make_report(measurement, checkpoint, threshold, tta)
        write_report(report, measurement, Path(args.output_dir))
        print(format_report(report, measurement), flush=True)


def conclude_training(device: torch.device, args: argparse.Namespace) -> None:
    """After training: draw its curves, and score the best weights on the test photographs.

    Where these have no labels, the threshold is chosen and stored all the same, with `args.threshold` "auto".

    Raises:
        As `score_weights`.
    """
    best = on_main_process(_draw_curves_and_find_best, args)
    if best is None:
        return
    if has_test_labels(args.data_path):
        score_weights(best, device, args)
        return
    if is_main_process():
        print(f"{_test_labels(args)} holds no labels, so {best} is not scored on the test photographs")
    if args.threshold == "auto":
        threshold = _settle_threshold(*_load_in_all_processes(best, device), device, args)
        if is_main_process():
            print(f"threshold: {threshold.value:.4g} ({threshold.source}), stored in {best}")


def _draw_curves_and_find_best(args: argparse.Namespace) -> Path | None:
    last = Path(args.output_dir, LAST_MODEL)
    checkpoint = load_checkpoint(last) if last.exists() else {}
    if not (history := checkpoint.get("history")):
        return None
    write_png(curves(history, checkpoint.get("selected_on", "validation")), Path(args.output_dir, "curves.png"))
    return _best_weights(history, args)


def _best_weights(history: Sequence[Mapping[str, Any]], args: argparse.Namespace) -> Path | None:
    """The file of the best weights, or None where this run wrote none."""
    best_epoch = max(history, key=lambda row: row["dice"])["epoch"]
    best = Path(args.output_dir, BEST_MODEL if args.save_best else f"model_{best_epoch}.pth")
    if not best.exists():
        print(f"{best}: not written by this run, so nothing is scored")
        return None
    return best


def _test_labels(args: argparse.Namespace) -> Path:
    return find_drive(args.data_path) / "test" / "1st_manual"


def _load_in_all_processes(path: str | Path, device: torch.device) -> tuple[nn.Module, Checkpoint]:
    # The main process alone reads the file: the other machines of a run may not see it.
    checkpoint = on_main_process(_load_without_training_state, path)
    return build_model(checkpoint, device), checkpoint


def _load_without_training_state(path: str | Path) -> Checkpoint:
    training_state = ("optimizer", "lr_scheduler", "history", "training_model")
    return {name: value for name, value in load_checkpoint(path).items() if name not in training_state}


def _open(root: str, train: bool, checkpoint: Checkpoint, val_split: int = 0) -> DriveDataset:
    transform = get_transform(False, checkpoint["mean"], checkpoint["std"])
    return open_photographs(root, train, transform, normalization_of(checkpoint), val_split)


def _use_flips(checkpoint: Checkpoint, args: argparse.Namespace) -> bool:
    return checkpoint.get("tta", False) if args.tta is None else args.tta


def _settle_threshold(
    model: nn.Module, checkpoint: Checkpoint, device: torch.device, args: argparse.Namespace
) -> Threshold:
    """The threshold that the flag gives; or with "auto" the best one, which is then stored in the file of weights.

    It is chosen on the photographs that the weights' own run held out; where it held out none, on those it trained on.
    """
    if args.threshold != "auto":
        return Threshold(args.threshold, "--threshold")
    val_split = checkpoint["args"].get("val_split", args.val_split) or 0
    photographs = _open(args.data_path, not val_split, checkpoint, val_split)
    tta = _use_flips(checkpoint, args)
    value = best_threshold(model, photographs, device, tta=tta)
    if is_main_process():
        add_to_checkpoint(checkpoint["path"], threshold=value, tta=tta)  # the threshold holds with these flips alone
    return Threshold(value, f"auto: best Dice on {photographs.describe()} photographs")
