"""The output folder of a training: it belongs to one run, and `run.json` tells of that run."""

import argparse
import contextlib
import datetime
import hashlib
import json
import os
import platform
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import PIL
import torch
import torchvision

from src.dataset_files import LabelledPhotograph
from src.weights import Checkpoint, CheckpointError, load_checkpoint

from .checkpoint import BEST_MODEL, LAST_MODEL
from .command_line import UsageError
from .distributed_utils import on_main_process
from .files import remove, replace_whole, require_no_input, sha256_of
from .lock import FolderLock
from .settings import roots

PROJECT = Path(__file__).parents[1]
RUN, LOCK = "run.json", "run.lock"
SCORES = ("scores.json", "scores.csv", "scores.png", "curves.png")
WRITTEN = (BEST_MODEL, LAST_MODEL, RUN, *SCORES)


@contextlib.contextmanager
def own_output_folder(args: argparse.Namespace, overwrite: bool) -> Iterator[None]:
    """Keep every other run out of `args.output_dir`; the main process holds it, and all processes stop together.

    Args:
        args: the flags; those of files to start from are never overwritten.
        overwrite: whether the run may replace the weights of another one.

    Raises:
        UsageError: another run holds the folder, or left its weights there and `args.resume` is not given or names an
            epoch before its best.
        CheckpointError: the file that `args.resume` names in the folder cannot be read.
        OutputError: a file to start from lies where the run would write.
    """
    lock = FolderLock(Path(args.output_dir, LOCK), "--output-dir")
    on_main_process(lock.take)
    try:
        on_main_process(_require_nothing_lost, args, overwrite)
        yield
    finally:
        lock.release()


def _require_nothing_lost(args: argparse.Namespace, overwrite: bool) -> None:
    folder = Path(args.output_dir)
    written = [folder / name for name in WRITTEN]
    epochs = [] if args.save_best and not args.overwrite else _each_epoch(folder)
    written += epochs
    require_no_input(written, files_to_start_from(args), f"--output-dir {folder}")
    found = [name for name in (BEST_MODEL, LAST_MODEL, *(path.name for path in epochs[:1])) if (folder / name).exists()]
    if found and not (_goes_on(args) or overwrite):
        raise UsageError(
            f"--output-dir {folder}: holds {' and '.join(found)} of an earlier run; --resume auto goes on with it, "
            "--overwrite replaces it, and another --output-dir keeps it"
        )
    if _goes_on(args) and args.resume != "auto" and not overwrite:
        _require_no_better_epoch(Path(args.resume), folder)


def _require_no_better_epoch(resumed: Path, folder: Path) -> None:
    """Refuse to go on from an earlier epoch in its own folder, where a later one was better and would be replaced."""
    first, keys = load_checkpoint(resumed), ("epoch", "best_dice")
    for name in (LAST_MODEL, BEST_MODEL):
        try:
            later = load_checkpoint(folder / name)
        except CheckpointError:  # nothing there to lose
            continue
        if all(None not in (first.get(key), later.get(key)) and first[key] < later[key] for key in keys):
            raise UsageError(
                f"--resume {resumed}: going on after its epoch {first['epoch']} would replace what --output-dir "
                f"{folder} holds of later ones (up to epoch {later['epoch']}, with a better Dice); give another "
                "--output-dir, or --overwrite"
            )


def _of_later_epochs(folder: Path, first_epoch: int) -> list[Path]:
    """The weights in a folder that are of an epoch from `first_epoch` on."""
    later = [path for path in _each_epoch(folder) if int(path.stem.removeprefix("model_")) >= first_epoch]
    for path in (folder / BEST_MODEL, folder / LAST_MODEL):
        with contextlib.suppress(CheckpointError):
            if load_checkpoint(path).get("epoch", -1) >= first_epoch:
                later.append(path)
    return later


def _each_epoch(folder: Path) -> list[Path]:
    """The files that a run without --save-best leaves of every epoch."""
    return sorted(path for path in folder.glob("model_*.pth") if path.stem.removeprefix("model_").isdecimal())


def _goes_on(args: argparse.Namespace) -> bool:
    """Whether the run of the folder is resumed, and not one of another folder."""
    folder = Path(args.output_dir).resolve()
    return args.resume == "auto" or bool(args.resume and Path(args.resume).resolve().parent == folder)


def files_to_start_from(args: argparse.Namespace) -> list[str]:
    """The files of weights that a new run starts from."""
    return [path for path in (args.init_weights, args.backbone_weights) if path and path != "imagenet"]


def record_run(
    args: argparse.Namespace,
    device: torch.device,
    trained_on: Sequence[LabelledPhotograph],
    validated_on: Sequence[LabelledPhotograph],
    checkpoint: Checkpoint | None,
) -> None:
    """Write `run.json`, from which the run can be repeated; the main process does.

    A resumed run lists the earlier starts under "earlier", as far as they are recorded in the folder that it was in.

    Raises:
        OutputError: the file cannot be written, or is a photograph's.
    """
    on_main_process(_record_run, args, str(device), trained_on, validated_on, checkpoint and checkpoint["epoch"] + 1)


def _record_run(
    args: argparse.Namespace,
    device: str,
    trained_on: Sequence[LabelledPhotograph],
    validated_on: Sequence[LabelledPhotograph],
    first_epoch: int | None,
) -> None:
    path = Path(args.output_dir, RUN)
    files = [file for item in (*trained_on, *validated_on) for file in item.files]
    require_no_input([path.with_name(name) for name in WRITTEN], files, f"--output-dir {args.output_dir}")
    before = path if _goes_on(args) else Path(args.resume).parent / RUN
    record = {
        "started": datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
        "command": [sys.executable, *sys.argv],
        "working_directory": os.getcwd(),
        "first_epoch": args.start_epoch if first_epoch is None else first_epoch,
        "seed": args.seed,
        "device": device,
        "flags": vars(args),
        # A file that is missing is reported where it is read. A resumed start reads none.
        "started_from": {
            file: sha256_of(file) for file in files_to_start_from(args) if first_epoch is None and Path(file).is_file()
        },
        "data": {
            "folders": [str(Path(root).absolute()) for root in roots(args)],
            "trained_on": len(trained_on),
            "validated_on": len(validated_on),
            "digest": _digest_of_data(trained_on, validated_on),
        },
        "git_commit": git_commit(),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "torchvision": torchvision.__version__,
            "numpy": np.__version__,
            "pillow": PIL.__version__,
        },
        "earlier": [] if first_epoch is None else _earlier(before),
    }
    with replace_whole(path) as file:
        file.write((json.dumps(record, indent=2) + "\n").encode())
    if args.overwrite:
        # --train-on-all would leave the scores of the replaced run, and --resume auto, after a kill in the first epoch,
        # would go on with its weights.
        if first_epoch is not None and _goes_on(args):
            replaced = _of_later_epochs(path.parent, first_epoch)
        else:
            replaced = [
                *(path.with_name(name) for name in (*SCORES, BEST_MODEL, LAST_MODEL)),
                *_each_epoch(path.parent),
            ]
        for file in replaced:
            remove(file)


def _digest_of_data(*parts: Sequence[LabelledPhotograph]) -> str:
    """One SHA-256 over the digests of photographs and their labels, whatever their order in each part."""
    digests = [sorted(f"{item.digest} {item.label_digest}" for item in part) for part in parts]
    return hashlib.sha256(json.dumps(digests).encode()).hexdigest()


def _earlier(path: Path) -> list[Any]:
    """The starts of a run that its `run.json` records, oldest first; none where it cannot be read."""
    try:
        before = json.loads(path.read_bytes())
        return [*before.pop("earlier"), before]
    except (OSError, ValueError, AttributeError, KeyError, TypeError):
        return []


def git_commit() -> str | None:
    """The commit of this code, with "-dirty" where files were changed since; None where it is no clone."""
    if not (PROJECT / ".git").exists():
        return None
    command = ["git", "-C", str(PROJECT), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None
