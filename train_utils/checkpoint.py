"""Files of weights: writing them, the names of a run's, and the files of backbones. `src.weights` reads them."""

import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from src import BackboneUNet, BackboneWeightsError
from src.weights import Checkpoint, CheckpointError, is_state_dict, load_checkpoint, read_file

from .distributed_utils import is_main_process
from .files import replace_whole

LAST_MODEL, BEST_MODEL = "last_model.pth", "best_model.pth"


def save_checkpoint(checkpoint: Mapping[str, Any], path: str | Path) -> None:
    """Write a checkpoint whole or not at all.

    Raises:
        train_utils.files.OutputError: the file cannot be written; an earlier file is intact.
    """
    buffer = io.BytesIO()
    torch.save(dict(checkpoint), buffer)
    with replace_whole(path) as file:
        file.write(buffer.getbuffer())


def load_backbone_weights(model: BackboneUNet, path: str | Path) -> None:
    """Load torchvision's ImageNet weights from a file into the backbone of a model.

    Raises:
        CheckpointError: the file is missing, or holds no weights, or those of another network.
    """
    state_dict = read_file(Path(path))
    if not is_state_dict(state_dict):
        raise CheckpointError(f"{path}: holds no weights of torchvision's; get {model.imagenet_weights.url}")
    try:
        model.load_backbone(state_dict)
    except BackboneWeightsError as error:
        raise CheckpointError(f"{path}: {error}") from error


def add_to_checkpoint(path: str | Path, **values: Any) -> None:
    """Add plain values to a file of weights; everything else in it stays unchanged.

    Raises:
        CheckpointError: as `load_checkpoint`.
        train_utils.files.OutputError: the file cannot be written.
    """
    checkpoint = load_checkpoint(path)
    del checkpoint["path"]
    save_checkpoint(checkpoint | values, path)


def warn_of_unknown_training(checkpoint: Checkpoint) -> None:
    """Say that a part of the training photographs may be known to weights that do not tell theirs.

    Earlier versions held out as many as their flags say; the tutorial trained on all of DRIVE's.
    """
    if is_main_process() and "trained_on" not in checkpoint and "val_split" not in checkpoint["args"]:
        print(
            f"warning: {checkpoint['path']} does not tell which photographs it was trained on; the tutorial's weights "
            "know all of DRIVE's training part, and would score too high on what is held out of it"
        )
