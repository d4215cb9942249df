"""Files of weights: reading and checking. No other module reads them.

A checkpoint is a dict of tensors and plain values with the tutorial's keys (`model`, `optimizer`, `lr_scheduler`,
`epoch`, `args`, with AMP `scaler`) and this project's: `model_args` (of `src.create_model`), `mean` and `std` (how the
photographs were normalised), `normalization` (unless it is "dataset", each was first brought to that mean and std, see
`src.colours.prepare`), `fov_diameter` (the working diameter: pixels across the field of view that every photograph is
brought to), `trained_scale` (what the training photographs were resized by for that), `close_ups` (whether most of them
show no border of the field of view), `trained_on` and `validated_on` (digests of the photographs' files),
`trained_labels` and `validated_labels` (of their labels), `best_dice`, `history` (the rows of the results files) and
`results` (their name), `selected_on` (the photographs that the best epoch was chosen on), `compared_from` (the first
epoch whose Dice is on those), `tta` (whether to take the mean over views) and `tta_scales` (of these views, see
`src.segment.views`). Some keys are optional: `training_model` (the weights to continue from) and `averaged_steps`, if
`model` is an average, `threshold` (the probability above which a pixel is a vessel) and `threshold_held_out` (whether
it was chosen on held-out photographs), and in files that were written again or published `normalization_assumed` (see
`load_checkpoint`), `licence` and `provenance`.
`src.checkpoint_values` has a rule for each value.
"""

import argparse
import errno
import os
import re
import stat
import struct
import warnings
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from torch import Tensor, nn

from .checkpoint_values import ARGS_RULES, MODEL_ARGS_RULES, RULES, find_fault, in_short
from .colours import DRIVE_MEAN, DRIVE_STD, Normalization
from .errors import UserError
from .field_of_view import DRIVE_FOV_DIAMETER
from .models import ARCHITECTURES, create_model, model_args_from_state_dict

Checkpoint = dict[str, Any]

# The errors of torch and its pickle reader on truncated, altered or foreign files.
_DAMAGE = (
    AssertionError,
    AttributeError,
    EOFError,
    IndexError,
    KeyError,
    MemoryError,
    OverflowError,
    RuntimeError,
    TypeError,
    ValueError,
    struct.error,
)


class CheckpointError(UserError):
    """A file of weights is missing, damaged, not safe to read, or of another model; the message names it."""


def read_file(path: Path) -> Any:
    """The content of a file that torch.save wrote; its code is never executed.

    Raises:
        CheckpointError: it is missing or damaged, or wants to run code.
    """
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):
            found = path / "best_model.pth"
            advice = f"give {found}" if found.is_file() else "give one that train.py wrote"
            raise CheckpointError(f"{path}: is no file (a folder, a FIFO or a device); {advice}")
        _require_checksums(path)
        # The tutorial's files hold `args` as a pickled Namespace, which is plain data. No other class is allowed.
        with torch.serialization.safe_globals([argparse.Namespace]), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of a foreign pickle protocol
            return torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise CheckpointError(
            f"{path}: no such file of weights; train first, or give pretrained/unet_fundus.pth or another"
        ) from error
    except UnpicklingError as error:
        if forbidden := re.search(r"GLOBAL ([\w.]+)", str(error)):
            raise CheckpointError(
                f"{path}: refused, since the file wants to run code ({forbidden[1]}); nothing of it was executed. "
                "Give a file that holds tensors and plain values alone"
            ) from error
        raise CheckpointError(f"{path}: not a file of weights; give one that train.py wrote") from error
    except (*_DAMAGE, zipfile.BadZipFile, OSError) as error:
        # EINVAL is of a place before the beginning, where a part of the file is missing.
        if isinstance(error, OSError) and error.errno != errno.EINVAL:
            raise CheckpointError(f"{path}: cannot be read ({error.strerror or error})") from error
        raise CheckpointError(f"{path}: not a whole file of weights; give one that train.py wrote") from error


def _require_checksums(path: Path) -> None:
    """Refuse a file of which bytes were altered on the way: torch.load does not look at the sums in it."""
    if not zipfile.is_zipfile(path):  # older files are none
        return
    try:
        with zipfile.ZipFile(path) as archive:
            altered = archive.testzip()
    except OSError as error:
        if error.errno != errno.EINVAL:  # of a place before the beginning, where a part is missing
            raise
        altered = True
    except (zlib.error, *_DAMAGE):
        altered = True
    if altered:
        raise zipfile.BadZipFile(str(path))


def _without_prefixes(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Remove the prefixes that torch.compile and DistributedDataParallel put before the names."""
    return {re.sub(r"^(?:_orig_mod\.|module\.)+", "", name): value for name, value in state_dict.items()}


def load_checkpoint(path: str | Path) -> Checkpoint:
    """Read a checkpoint of this project or of the tutorial, or a bare state dict, onto the CPU, and check it.

    The result always has `model`, `model_args`, `mean`, `std`, `normalization`, `normalization_assumed` (True if the
    file does not tell how its photographs were normalised), `fov_diameter`, `args` (a dict) and `path`. Other keys are
    there only if they are in the file.

    Raises:
        CheckpointError: the file is missing, is no checkpoint of a U-Net, holds a value that no run writes, or pickled
            code (never executed).
    """
    path = Path(path)
    content = read_file(path)
    if isinstance(content, Mapping) and "model" not in content and is_state_dict(content):
        content = {"model": content}
    if not (isinstance(content, Mapping) and is_state_dict(content.get("model"))):
        raise CheckpointError(f"{path}: holds no model weights (no key 'model'); give a file that train.py wrote")
    checkpoint = dict(content) | {"path": str(path)}
    checkpoint["model"] = _without_prefixes(checkpoint["model"])
    if "model_args" not in checkpoint:
        try:
            checkpoint["model_args"] = model_args_from_state_dict(checkpoint["model"])
        except (KeyError, ValueError, IndexError) as error:
            raise CheckpointError(
                f"{path}: holds the weights of another model ({error}); give a file that train.py wrote"
            ) from error
    told = "args" in checkpoint or {"mean", "std"} <= checkpoint.keys()
    checkpoint.setdefault("normalization_assumed", not told)
    args = checkpoint.get("args", {})
    checkpoint["args"] = vars(args) if isinstance(args, argparse.Namespace) else args
    checkpoint["model_args"] = _complete_model_args(path, checkpoint["model_args"])
    _require_plausible(path, checkpoint)
    checkpoint.setdefault("mean", list(DRIVE_MEAN))
    checkpoint.setdefault("std", list(DRIVE_STD))
    checkpoint.setdefault("normalization", "dataset")
    checkpoint.setdefault("fov_diameter", DRIVE_FOV_DIAMETER)
    return checkpoint


def _complete_model_args(path: Path, model_args: Any) -> dict[str, Any]:
    """The arguments of a file's model, with the defaults of those that the file does not name."""
    if not isinstance(model_args, Mapping):
        raise CheckpointError(_altered(path, f"model_args is {in_short(model_args)}, but must be a dict"))
    arch = model_args.get("arch", "unet")
    if not (isinstance(arch, str) and arch in ARCHITECTURES):
        raise CheckpointError(
            f"{path}: of a model that this version does not know (no architecture {in_short(arch)}; there are "
            f"{', '.join(ARCHITECTURES)}); give a file that train.py wrote"
        )
    defaults = {"arch": arch} | ARCHITECTURES[arch][1]
    known = defaults.keys() | {"pretrain_backbone"}  # which only says where the training began
    if unknown := [name for name in model_args if name not in known]:
        raise CheckpointError(
            f"{path}: of a model that this version does not know ({arch} has no argument {in_short(unknown[0])}); "
            "give a file that train.py wrote"
        )
    return defaults | {name: value for name, value in model_args.items() if name in defaults}


def _require_plausible(path: Path, checkpoint: Checkpoint) -> None:
    """Check every value, and the shapes of the weights against `model_args`, before memory goes into a model.

    Raises:
        CheckpointError: a value is none that a run writes, or the weights are not those of `model_args`.
    """
    model_args = checkpoint["model_args"]
    fault = (
        find_fault(model_args, MODEL_ARGS_RULES, "model_args: ")
        or find_fault(checkpoint, RULES)
        or find_fault(checkpoint["args"], ARGS_RULES, "args: ")
    )
    channels = model_args.get("in_channels", 3)
    for key in ("mean", "std"):
        # A photograph has 3 channels; a model of another number is refused where it is to see one.
        if not fault and len(checkpoint.get(key, range(3))) not in (3, channels):
            fault = f"{key} has {len(checkpoint[key])} values, but the model {channels} input channels"
    if "training_model" in checkpoint and not is_state_dict(checkpoint["training_model"]):
        fault = fault or "training_model is no dict of tensors"
    if fault:
        raise CheckpointError(_altered(path, fault))
    with torch.device("meta"):  # neither time nor memory
        expected = create_model(**model_args).state_dict()
    for state_dict in [checkpoint[key] for key in ("model", "training_model") if key in checkpoint]:
        _require_values(path, state_dict)
        if difference := _difference(expected, state_dict):
            raise CheckpointError(
                f"{path}: holds the weights of another model than it says ({difference}); give a file that train.py "
                "wrote"
            )
        for name, value in state_dict.items():
            if value.is_floating_point() != expected[name].is_floating_point():
                raise CheckpointError(_altered(path, f"{name} holds values of {value.dtype}"))


def _require_values(path: Path, state_dict: Mapping[str, Tensor]) -> None:
    """Refuse tensors that are not dense, or claim to be larger than what the file holds."""
    for name, value in state_dict.items():
        if value.is_nested or value.layout != torch.strided or value.device.type != "cpu":
            raise CheckpointError(_altered(path, f"{name} is no dense tensor"))
    storages = {value.untyped_storage().data_ptr(): value.untyped_storage().nbytes() for value in state_dict.values()}
    if sum(value.numel() * value.element_size() for value in state_dict.values()) > sum(storages.values()):
        raise CheckpointError(_altered(path, "its tensors have more values than the file holds"))


def _altered(path: Path, fault: str) -> str:
    return f"{path}: damaged or altered: {fault}; give a file that train.py wrote"


def _difference(expected: Mapping[str, Tensor], found: Mapping[str, Tensor]) -> str | None:
    """Where two models' weights differ in name or shape, in words; None: nowhere."""
    wrong = [name for name in expected if name not in found or found[name].shape != expected[name].shape]
    wrong += [name for name in found if name not in expected]
    if not wrong:
        return None
    name = wrong[0]
    sides = [tuple(side[name].shape) if name in side else "nothing" for side in (expected, found)]
    more = f" (and {len(wrong) - 1} more differ)" if len(wrong) > 1 else ""
    return f"at {in_short(name)[1:-1]} this model has {sides[0]}, the file {sides[1]}{more}"


def is_state_dict(value: Any) -> bool:
    """Whether this is a dict of tensors by their names."""
    if not isinstance(value, Mapping) or not value:
        return False
    return all(isinstance(name, str) and isinstance(item, Tensor) for name, item in value.items())


def load_weights(model: nn.Module, checkpoint: Checkpoint) -> None:
    """Load a checkpoint's weights into a model of the same shape.

    Raises:
        CheckpointError: the shapes differ, or there are NaN, infinite or impossible values.
    """
    expected, found, path = model.state_dict(), checkpoint["model"], checkpoint["path"]
    if difference := _difference(expected, found):
        raise CheckpointError(
            f"{path}: the weights of another model: {difference}; give the flags that it was trained with, such as "
            "--recipe, --arch, --base-c and --num-classes"
        )
    # In the model's own precision: a float64 may be finite where a float32 is not.
    if not all(value.to(expected[name].dtype).isfinite().all() for name, value in found.items()):
        raise CheckpointError(f"{path}: the weights hold NaN or infinite values; train again with a lower --lr")
    if any((value < 0).any() for name, value in found.items() if name.endswith("running_var")):
        raise CheckpointError(_altered(path, "the weights hold a negative variance"))
    model.load_state_dict(found)


def normalization_of(checkpoint: Checkpoint) -> Normalization:
    """How the photographs of a checkpoint's model were normalised."""
    return Normalization(checkpoint["normalization"], checkpoint["mean"], checkpoint["std"])


def load_model(path: str | Path, device: torch.device) -> tuple[nn.Module, Checkpoint]:
    """Build the model of a file, in eval mode on `device`; return it with the checkpoint.

    Raises:
        CheckpointError: as `load_checkpoint` and `load_weights`.
    """
    checkpoint = load_checkpoint(path)
    return build_model(checkpoint, device), checkpoint


def build_model(checkpoint: Checkpoint, device: torch.device) -> nn.Module:
    """Build the model of a checkpoint with its weights, in eval mode on `device`.

    Raises:
        CheckpointError: as `load_weights`.
    """
    model = create_model(**checkpoint["model_args"])
    load_weights(model, checkpoint)
    return model.to(device).eval()
