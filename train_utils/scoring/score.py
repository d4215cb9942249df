"""Weights, or masks of any program, -> their scores: what is scored, which threshold holds, what is written."""

import argparse
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from my_dataset import DriveDataset
from src import Segmenter
from src.dataset_files import (
    LabelledPhotograph,
    Split,
    describe,
    find_parts,
    match_masks,
    photographs_to_score,
    require_different,
    training_photographs,
)
from src.errors import DatasetError
from src.segment import ONE_SIZE
from src.weights import Checkpoint, CheckpointError, build_model, load_checkpoint, normalization_of
from transforms import get_transform

from ..checkpoint import BEST_MODEL, LAST_MODEL, add_to_checkpoint, warn_of_unknown_training
from ..command_line import UsageError, first_of
from ..data_loading import reading, require_classes, tell_of_missing_roi_masks, warn_of_labels
from ..distributed_utils import is_main_process, on_main_process
from ..files import OutputError, sha256_of, write_picture
from ..memory import explain_out_of_memory
from ..normalization import settle_normalization
from ..settings import fold, require_two_classes_for_threshold, require_use_of_scales, roots
from .curves import curves
from .measure import Measurement, best_threshold, measure, measure_masks
from .report import Origin, Threshold, format_report, make_report, write_scores


def score(device: torch.device, args: argparse.Namespace) -> None:
    """Score the weights of `args.resume`, or the masks in `args.masks`, as `--test-only` asks for.

    Raises:
        UsageError: neither or both are given.
        As `score_weights` and `score_masks`.
    """
    if args.resume and args.masks:
        raise UsageError(
            f"--masks {args.masks}: scores masks in place of the weights of --resume; leave out one of them"
        )
    if args.masks and args.threshold != 0.5:
        raise UsageError(f"--threshold {args.threshold}: masks have none; leave it out")
    if args.train_on_all:
        raise UsageError("--train-on-all: does nothing with --test-only; leave it out")
    if args.fold and args.val_split:
        raise UsageError(f"--val-split {args.val_split}: does nothing with --test-only; leave it out")
    if args.masks:
        on_main_process(_keep_scores_of_a_run, args)
        score_masks(args.masks, args)
    elif args.resume:
        path = on_main_process(_best_in, Path(args.output_dir)) if args.resume == "auto" else args.resume
        on_main_process(_keep_scores_of_a_run, args, Path(path))
        score_weights(path, device, args)
    else:
        raise UsageError("--test-only: says nothing of the weights; name them with --resume FILE")


def _keep_scores_of_a_run(args: argparse.Namespace, weights: Path | None = None) -> None:
    """Raise where the scores of a run would be replaced by those of masks, or of weights that lie elsewhere."""
    folder = Path(args.output_dir)
    of_a_run = any((folder / name).exists() for name in (BEST_MODEL, LAST_MODEL)) and (folder / "scores.json").exists()
    own = weights is not None and os.path.realpath(weights.parent) == os.path.realpath(folder)
    if of_a_run and not own and not args.overwrite:
        raise UsageError(
            f"--output-dir {folder}: holds a run with its scores.json, which would be replaced; give another "
            "--output-dir, or --overwrite"
        )


def _best_in(folder: Path) -> Path:
    for name in (BEST_MODEL, LAST_MODEL):
        if (folder / name).exists():
            return folder / name
    raise UsageError(
        f"--resume auto: looked for {BEST_MODEL} and {LAST_MODEL} in --output-dir {folder}; name the file of weights"
    )


def score_weights(path: str | Path, device: torch.device, args: argparse.Namespace) -> None:
    """Score a file of weights: print the table and write the files into `args.output_dir`.

    With `args.fold`, the photographs of that fold are scored. Without, those of each data set's test part, where it has
    labels; else all photographs of the data set that the weights were not trained on. With `args.threshold` "auto" the
    threshold is chosen on the photographs that were held out, or on those that were trained on where none were held
    out, and stored in the file of weights.

    Raises:
        DatasetError: photographs or labels are missing, or nothing is left to score.
        CheckpointError: the weights cannot be used.
        OutOfMemoryError: memory is short.
        train_utils.files.OutputError: a file cannot be written.
    """
    # The main process alone reads the file: the other machines of a run may not see it.
    sha256, checkpoint = on_main_process(_load_without_training_state, path)
    if (channels := checkpoint["model_args"].get("in_channels", 3)) != 3:
        raise CheckpointError(f"{path}: a model of {channels} input channels; photographs have 3: give other weights")
    preparation = _preparation(checkpoint)
    if args.test_only:
        settle_normalization(args, checkpoint)
        checkpoint["fov_diameter"] = args.fov_diameter or checkpoint["fov_diameter"]
    prepared_as_stored = preparation == _preparation(checkpoint)
    files = _files_to_score(args, checkpoint)
    require_use_of_scales(args, checkpoint)
    how = _how_to_measure(checkpoint, args.tta, args.tta_scales)
    seen_as_stored = how == _how_to_measure(checkpoint)
    smaller = "use --device cpu" if device.type != "cpu" else "name fewer or smaller photographs by --data-path"
    with explain_out_of_memory(smaller):
        model = build_model(checkpoint, device)
        as_stored = prepared_as_stored and seen_as_stored
        threshold, to_store = _settle_threshold(model, checkpoint, device, args, how, files, as_stored)
        photographs = _open(files, model, checkpoint, how)
        if args.test_only:
            _tell_of_labels(photographs)
        _report_faults(photographs)
        measurement = measure(model, photographs, device, threshold.value, **how)
    if to_store and prepared_as_stored:
        sha256 = on_main_process(_store_threshold, path, sha256, {"threshold": threshold.value} | to_store)
    elif to_store and is_main_process():
        print(f"--threshold auto: not stored in {path}, whose photographs are prepared in another way")
    _report(measurement, Origin.of(checkpoint, threshold, how["tta"], how["scales"], sha256), args)


def score_masks(folder: str | Path, args: argparse.Namespace) -> None:
    """Score masks of any program, one of each photograph, by the same table: white is a vessel.

    Raises:
        DatasetError: masks, photographs or labels are missing or cannot be used.
        train_utils.files.OutputError: a file cannot be written.
    """
    files = _files_to_score(args)
    masks = match_masks([item.photograph for item in files], folder)
    photographs = DriveDataset.of(files, num_classes=args.num_classes)
    _tell_of_labels(photographs)
    if not any(photographs.vessel_shares()):
        raise DatasetError(
            f"--data-path {' '.join(roots(args))}: no label there has a vessel, by --num-classes {args.num_classes}; "
            "correct the labels, or the number of classes"
        )
    _report_faults(photographs)
    _report(measure_masks(masks, photographs, args.num_classes), Origin(f"masks in {folder}"), args)


def check_what_is_scored(
    trained_on: Sequence[LabelledPhotograph],
    validated_on: Sequence[LabelledPhotograph],
    args: argparse.Namespace,
    checkpoint: Checkpoint | None,
) -> None:
    """Read, before a training, what is scored at its end; a fault of a second observer's file is only printed.

    Args:
        trained_on, validated_on: the photographs of the training.
        args: the settled flags.
        checkpoint: that training goes on from, or whose weights it starts from.

    Raises:
        DatasetError: a file cannot be used, or nothing is left to score.
    """
    _require_other_folder([*trained_on, *validated_on], args)
    if args.train_on_all:
        return
    digests, digests_before = [item.digest for item in trained_on], (checkpoint or {}).get("trained_on", [])
    if not {item.digest for item in validated_on} & set(digests_before):  # else TrainingState refuses them
        digests += digests_before
    files = _files_to_score(args, {"trained_on": digests})
    photographs = DriveDataset.of(files, num_classes=args.num_classes)
    if args.num_classes == 1:  # of more classes, the scores say themselves what is undefined
        require_classes(photographs, args.num_classes, to_learn=False)
    _report_faults(photographs)


def conclude_training(device: torch.device, args: argparse.Namespace, best_dice: float) -> None:
    """After training: draw its curves, score the best weights, say where they are.

    Raises:
        As `score_weights`.
    """
    best = None
    if not args.train_on_all:
        best = on_main_process(_draw_curves_and_find_best, args, best_dice)
        if best is not None:
            score_weights(best, device, args)
    if is_main_process():
        one_view = (
            " of one view, as in every epoch (the scores are of the mean over views)" if args.tta and best else ""
        )
        outcome = "trained on all photographs" if args.train_on_all else f"best Dice {best_dice:.3f}{one_view}"
        print(f"{outcome}; {_where_the_weights_are(best, args)}")
        if round(best_dice, 3) == 0:
            print(
                "warning: a Dice of 0: the model finds no vessels. See that the labels are white where a vessel is "
                f"(not empty, not inverted), then try another --lr than {args.lr:g} or more --epochs than {args.epochs}"
            )


def _where_the_weights_are(best: Path | None, args: argparse.Namespace) -> str:
    folder = Path(args.output_dir)
    if args.train_on_all or not args.resume or (best is not None and best.parent == folder):
        return f"the weights are in {args.output_dir}"
    which = f"are still those of {args.resume}" if best else f"are of an epoch before {args.resume}"
    last = f"; those of the last epoch are in {args.output_dir}" if (folder / LAST_MODEL).exists() else ""
    return f"the best weights {which}{last}"


def _report(measurement: Measurement, origin: Origin, args: argparse.Namespace) -> None:
    on_main_process(_write_and_print, measurement, origin, Path(args.output_dir))


def _write_and_print(measurement: Measurement, origin: Origin, folder: Path) -> None:
    report = make_report(measurement, origin)
    write_scores(report, measurement, folder)
    print(f"scores.json, scores.csv and scores.png are in {folder}")
    print(format_report(report, measurement), flush=True)


def _tell_of_labels(photographs: DriveDataset) -> None:
    """Say what a training would say of these labels and ROI masks."""
    if is_main_process():
        warn_of_labels([photographs])
        tell_of_missing_roi_masks([photographs])


def _report_faults(photographs: DriveDataset) -> None:
    if is_main_process():
        for fault in photographs.faults:
            print(f"warning: left out of the second observer's scores: {fault}")


def _draw_curves_and_find_best(args: argparse.Namespace, best_dice: float) -> Path | None:
    last = Path(args.output_dir, LAST_MODEL)
    checkpoint = load_checkpoint(last) if last.exists() else {}
    first = checkpoint.get("compared_from", 0)
    history = [row for row in checkpoint.get("history", []) if "dice" in row and row["epoch"] >= first]
    if history:
        write_picture(Path(args.output_dir, "curves.png"), curves(history, checkpoint.get("selected_on", "validation")))
    return _best_weights(checkpoint, history, args, best_dice)


def _best_weights(
    last: Mapping[str, Any], history: Sequence[Mapping[str, Any]], args: argparse.Namespace, best_dice: float
) -> Path | None:
    """The file of the best weights: of this run, or the one that it went on from; None where it is neither.

    Args:
        last: the checkpoint of the last epoch, if any.
        history: its rows with a Dice on the photographs that are held out now.
    """
    best = Path(args.output_dir, BEST_MODEL)
    if best.exists():
        found = load_checkpoint(best)
        photographs, photographs_now = (sorted(one.get("validated_on", ())) for one in (found, last))
        if found.get("best_dice") == best_dice and photographs == photographs_now:
            return best
    best_row = max(history, key=lambda row: row["dice"], default=None)
    if best_row is not None and best_row["dice"] >= best_dice:
        # Without --save-best, earlier versions wrote this one alone.
        of_epoch = best.with_name(f"model_{best_row['epoch']}.pth")
        if of_epoch.exists() and load_checkpoint(of_epoch).get("epoch") == best_row["epoch"]:
            return of_epoch
        print(f"{best}: not written by this run")
    if args.resume and Path(args.resume).exists():
        # The tutorial's files have no history; their Dice was found when the run began.
        rows = load_checkpoint(args.resume).get("history")
        if not rows or rows[-1].get("dice", -1) >= best_dice:
            return Path(args.resume)
    if history:
        print("the best weights were not found, so nothing is scored")
    return None


def _load_without_training_state(path: str | Path) -> tuple[str, Checkpoint]:
    """The SHA-256 of a file of weights, and what it holds."""
    training_state = ("optimizer", "lr_scheduler", "history", "training_model")
    while True:  # until no training has replaced the file meanwhile
        before = sha256_of(path) if os.path.isfile(path) else ""
        checkpoint = load_checkpoint(path)
        if sha256_of(path) == before:
            return before, {name: value for name, value in checkpoint.items() if name not in training_state}


def _store_threshold(path: str | Path, sha256: str, values: Mapping[str, Any]) -> str:
    """Add a threshold to the file of weights that it was chosen for; return the SHA-256 of what is scored."""
    try:
        if sha256_of(path) == sha256:
            add_to_checkpoint(path, **values)
            return sha256_of(path)
        print(f"warning: the threshold is not stored: {path} was replaced meanwhile; score a copy of it")
    except (OutputError, CheckpointError, OSError) as error:
        print(f"warning: the threshold is not stored: {error}")
    return sha256


def _preparation(checkpoint: Checkpoint) -> tuple[Any, ...]:
    """What predictions with these weights prepare photographs by."""
    return tuple(checkpoint.get(name) for name in ("mean", "std", "normalization", "fov_diameter"))


def _how_to_measure(
    checkpoint: Checkpoint, tta: bool | None = None, scales: Sequence[float] | None = None
) -> dict[str, Any]:
    """The keywords of `measure`: by these flags, else as the checkpoint says."""
    tta = checkpoint.get("tta", False) if tta is None else tta
    scales = (scales or checkpoint.get("tta_scales", ONE_SIZE)) if tta else ONE_SIZE
    return {"tta": tta, "scales": list(scales), "trained_scale": checkpoint.get("trained_scale")}


def _open(
    files: Sequence[LabelledPhotograph], model: nn.Module, checkpoint: Checkpoint, how: Mapping[str, Any]
) -> DriveDataset:
    """Photographs as the model of a checkpoint is to see them, in the largest of the sizes."""
    num_classes = checkpoint["model_args"]["num_classes"] - 1
    transform = get_transform(False, checkpoint["mean"], checkpoint["std"])
    as_trained = reading(normalization_of(checkpoint), checkpoint["fov_diameter"], num_classes)
    scale_of = Segmenter(model, checkpoint).working_scale
    return DriveDataset.of(files, transform, scale_of=scale_of, zoom=max(how["scales"]), **as_trained)


def _files_to_score(args: argparse.Namespace, checkpoint: Checkpoint | None = None) -> list[LabelledPhotograph]:
    """The photographs to score: without a checkpoint all (or those that `args.val_split` holds out of the training
    part), with one those that its weights were not trained on.
    """
    files = []
    for root in roots(args):
        if fold(args):
            files += Split(fold=fold(args)).divide(root)[1]
            continue
        photographs = photographs_to_score(root)
        if checkpoint is not None and "trained_on" not in checkpoint and photographs[0].part == "training":
            # The run did not record its photographs. It was an earlier version's, or the tutorial's, on DRIVE.
            photographs = Split(checkpoint["args"].get("val_split") or None).divide(root)[1]
        if checkpoint is None and args.val_split and photographs[0].part != "test":  # of masks, as of a run's weights
            photographs = Split(args.val_split).divide(root)[1]
        files += photographs
    require_different(files)
    if checkpoint is not None and any(item.part == "training" for item in files):
        warn_of_unknown_training(checkpoint)
    trained_on = set(checkpoint.get("trained_on", ())) if checkpoint else set()
    left = [item for item in files if item.digest not in trained_on]
    trained_too = [item.photograph for item in files if item.part == "test" and item.digest in trained_on]
    if trained_too and left and is_main_process():
        print(
            f"warning: {len(trained_too)} of the test photographs are not scored, as the weights were trained on them "
            f"({first_of(trained_too)})"
        )
    if not left and args.fold:
        raise DatasetError(
            f"--fold {args.fold}: these weights were trained on all {len(files)} photographs of that fold, so nothing "
            "can be scored; give the fold of their own run"
        )
    if not left:
        raise DatasetError(
            f"--data-path {' '.join(roots(args))}: these weights were trained on all {len(files)} labelled photographs "
            "there, so nothing can be scored; give others, or labels of the test photographs"
        )
    _require_other_folder(left, args)
    return left


def _require_other_folder(files: Sequence[LabelledPhotograph], args: argparse.Namespace) -> None:
    """Raise where what is drawn would lie among the photographs or labels, and be taken for one of them.

    Raises:
        UsageError: it would.
    """
    folder = os.path.realpath(args.output_dir)
    for item in files:
        for file in item.files:
            if os.path.realpath(file.parent) == folder:
                raise UsageError(
                    f"--output-dir {args.output_dir}: holds {file.name} of the data; choose another folder"
                )


def _settle_threshold(
    model: nn.Module,
    checkpoint: Checkpoint,
    device: torch.device,
    args: argparse.Namespace,
    how: Mapping[str, Any],
    scored: Sequence[LabelledPhotograph],
    as_stored: bool,
) -> tuple[Threshold, dict[str, Any]]:
    """The threshold that the flag gives; or with "auto" the best one, and what is to be stored with it.

    That is whether it was chosen on photographs that the weights' own run held out, and the views that it holds with.
    Where the data has none of those, it is chosen on those that were trained on, but never in place of one of held-out
    photographs. Where those that it is chosen on are `scored` too, as without labels of test photographs, its origin
    says so. Where none of either are in the data, it is the one that the weights store; whether views and preparation
    are `as_stored` too, it says.
    """
    classes = model.model_args["num_classes"]
    require_two_classes_for_threshold(classes, args.threshold)
    if classes > 2:
        return Threshold(None, "the most probable class counts; every class but 0 is a vessel"), {}
    if args.threshold != "auto":
        return Threshold(args.threshold, "--threshold"), {}
    files, held_out = _files_for_threshold(checkpoint, args)
    if not files:
        other = "" if as_stored else ", which was chosen with other views or another preparation"
        return Threshold(checkpoint["threshold"], f"auto: as the weights store it{other}"), {}
    value = best_threshold(model, _open(files, model, checkpoint, how), device, **how)
    to_store = {"threshold_held_out": held_out, "tta": how["tta"]}
    to_store |= {"tta_scales": how["scales"]} if how["tta"] else {}
    origin = f"auto: best Dice on {describe(files) if held_out else 'training'} photographs"
    chosen_on = {item.digest for item in files}
    if same := sum(item.digest in chosen_on for item in scored):
        some = f"; {same} of the {len(scored)} that are scored are among them"
        origin += ", the ones that are scored" if same == len(scored) else some
        origin += ": these scores are a little too high"
    return Threshold(value, origin), to_store


def _files_for_threshold(checkpoint: Checkpoint, args: argparse.Namespace) -> tuple[list[LabelledPhotograph], bool]:
    """Training photographs to choose a threshold on, and whether they were held out; none: the weights store one.

    Raises:
        UsageError: there are none, and the weights store no threshold.
    """
    if "trained_on" in checkpoint:
        files = [
            item for root in roots(args) if set(find_parts(root)) != {"test"} for item in training_photographs(root)
        ]
        validated_on = set(checkpoint.get("validated_on", ()))
        if held_out := [item for item in files if item.digest in validated_on]:
            return held_out, True
        trained_on = [item for item in files if item.digest in checkpoint["trained_on"]]
        if trained_on and not checkpoint.get("threshold_held_out", False):
            return trained_on, False
        if "threshold" in checkpoint:
            return [], False
        raise UsageError(
            f"--threshold auto: --data-path {' '.join(roots(args))} holds no photograph that {checkpoint['path']} was "
            "trained on or that was held out, and these weights store none; give the data of that run, or a number"
        )
    val_split = checkpoint["args"].get("val_split", args.val_split) or 0
    training, validated = Split(val_split).divide(args.data_path, test_needed=False)
    return (validated, True) if val_split else (training, False)
