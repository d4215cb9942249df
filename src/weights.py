"""Files of weights: reading and checking. No other module reads them.

A checkpoint is a dict of tensors and plain values with the tutorial's keys (`model`, `optimizer`, `lr_scheduler`,
`epoch`, `args`, with AMP `scaler`) and this project's: `model_args` (of `src.create_model`), `mean` and `std` (how the
photographs were normalised), `normalization` (unless it is "dataset", each was first brought to that mean and std, see
`src.colours.prepare`), `fov_diameter` (the working diameter: pixels across the field of view that every photograph is
brought to), `trained_scale` (what the training photographs were resized by for that), `trained_on` and
`validated_on` (digests of the photographs' files), `best_dice`, `history` (the rows of the results files),
`selected_on` (the photographs that the best epoch was chosen on), `tta` (whether to take the mean over flips). Two keys
are optional: `training_model` (the weights to continue from, if `model` is an average) and `threshold` (the probability
above which a pixel is a vessel, at the training photographs' scale).
"""

import argparse
import re
import struct
from collections.abc import Mapping
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from torch import Tensor, nn

from .colours import DRIVE_MEAN, DRIVE_STD, Normalization
from .errors import UserError
from .field_of_view import DRIVE_FOV_DIAMETER
from .models import create_model, model_args_from_state_dict

Checkpoint = dict[str, Any]

# The errors of torch and its pickle reader on truncated, altered or foreign files.
_DAMAGE = (
    AssertionError,
    AttributeError,
    EOFError,
    IndexError,
    KeyError,
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
        # The tutorial's files hold `args` as a pickled Namespace, which is plain data. No other class is allowed.
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise CheckpointError(f"{path}: no such file of weights; train first, or give the path of one") from error
    except UnpicklingError as error:
        if forbidden := re.search(r"GLOBAL ([\w.]+)", str(error)):
            raise CheckpointError(
                f"{path}: refused, since the file wants to run code ({forbidden[1]}); nothing of it was executed. "
                "Give a file that holds tensors and plain values alone"
            ) from error
        raise CheckpointError(f"{path}: not a file of weights; give one that train.py wrote") from error
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror or error})") from error
    except _DAMAGE as error:
        raise CheckpointError(f"{path}: not a whole file of weights; give one that train.py wrote") from error


def _without_prefixes(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Remove the prefixes that torch.compile and DistributedDataParallel put before the names."""
    return {re.sub(r"^(?:_orig_mod\.|module\.)+", "", name): value for name, value in state_dict.items()}


def load_checkpoint(path: str | Path) -> Checkpoint:
    """Read a checkpoint of this project or of the tutorial, or a bare state dict, onto the CPU.

    The result always has `model`, `model_args`, `mean`, `std`, `normalization`, `fov_diameter`, `args` (a dict) and
    `path`. Other keys are there only if they are in the file.

    Raises:
        CheckpointError: the file is missing, is no checkpoint of a U-Net, or holds pickled code (never executed).
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
    checkpoint.setdefault("mean", list(DRIVE_MEAN))
    checkpoint.setdefault("std", list(DRIVE_STD))
    checkpoint.setdefault("normalization", "dataset")
    args = checkpoint.get("args", {})
    checkpoint["args"] = vars(args) if isinstance(args, argparse.Namespace) else args
    checkpoint.setdefault("fov_diameter", DRIVE_FOV_DIAMETER)
    return checkpoint


def is_state_dict(value: Any) -> bool:
    """Whether this is a dict of tensors by their names."""
    if not isinstance(value, Mapping) or not value:
        return False
    return all(isinstance(name, str) and isinstance(item, Tensor) for name, item in value.items())


def load_weights(model: nn.Module, checkpoint: Checkpoint) -> None:
    """Load a checkpoint's weights into a model of the same shape.

    Raises:
        CheckpointError: the shapes differ, or there are NaN or infinite values.
    """
    expected, found, path = model.state_dict(), checkpoint["model"], checkpoint["path"]
    wrong = [name for name in expected if name not in found or found[name].shape != expected[name].shape]
    wrong += [name for name in found if name not in expected]
    if wrong:
        name = wrong[0]
        sides = [tuple(side[name].shape) if name in side else "nothing" for side in (expected, found)]
        raise CheckpointError(
            f"{path}: the weights of another model: at {name} this model has {sides[0]}, the file {sides[1]}"
            + (f" (and {len(wrong) - 1} more differ)" if len(wrong) > 1 else "")
            + "; give the flags that it was trained with, such as --recipe, --arch, --base-c and --num-classes"
        )
    if not all(value.isfinite().all() for value in found.values()):
        raise CheckpointError(f"{path}: the weights hold NaN or infinite values; train again with a lower --lr")
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
    try:
        model = create_model(**checkpoint["model_args"])
    except (ValueError, TypeError) as error:
        raise CheckpointError(f"{checkpoint['path']}: of a model that this version does not know ({error})") from error
    load_weights(model, checkpoint)
    return model.to(device).eval()
