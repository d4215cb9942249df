"""A trained model as an ONNX file, for programs without PyTorch. Needs the packages onnx and onnxscript."""

import contextlib
import importlib.util
import io
import json
import os
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from src.errors import UserError
from src.weights import Checkpoint, load_model

from .files import make_output_folder, replace_whole, require_no_input

NEEDED = ("onnx", "onnxscript")
# Of the checkpoint, where it has them: all that predictions depend on besides the network.
METADATA = (
    *("model_args", "mean", "std", "normalization", "fov_diameter", "trained_scale", "close_ups"),
    *("tta", "tta_scales", "threshold", "licence", "provenance"),
)


class ExportError(UserError):
    """A model cannot be exported; the message says what to do."""


class _Logits(nn.Module):
    """A model that returns its logits without the dict."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, image: Tensor) -> Tensor:
        return self.model(image)["out"]


def export_onnx(weights: str | Path, path: str | Path, settle: Callable[[Checkpoint], None]) -> None:
    """Write a model as ONNX: `image` float32 [batch, C, height, width] -> `logits` [batch, num_classes, height, width].

    Batch size, height and width (from 32 pixels) are free. The image must be normalised. The metadata of the file hold
    METADATA as JSON, `mean` and `std` of the channels in [0, 1]. What else makes the masks of predict.py: README.

    Args:
        weights: the file of weights.
        path: the file to write; an earlier one is replaced if its name ends in ".onnx".
        settle: may change the checkpoint's `mean`, `std` and `normalization`.

    Raises:
        ExportError: a package is missing or too old, or the name is that of another file.
        CheckpointError: the weights cannot be used.
        train_utils.files.OutputError: the file cannot be written, or is that of the weights.
    """
    path = Path(path)
    require_no_input([path], [weights], "--export")
    if path.is_dir() or (path.suffix.lower() != ".onnx" and os.path.lexists(path)):
        raise ExportError(f"--export {path}: is there, and no .onnx file; choose another name, such as model.onnx")
    make_output_folder(path.parent, "--export")
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        raise ExportError(f"--export: needs what is not installed here; pip install {' '.join(missing)}")
    model, checkpoint = load_model(weights, torch.device("cpu"))
    settle(checkpoint)
    # Different odd sides, because the exporter could treat equal sides as one variable.
    image = torch.zeros(2, checkpoint["model_args"].get("in_channels", 3), 99, 85)
    free = torch.export.Dim.DYNAMIC
    # The exporter prints each of its steps and warns about its own deprecated parts.
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        try:
            program = torch.onnx.export(
                _Logits(model),
                (image,),
                input_names=["image"],
                output_names=["logits"],
                dynamic_shapes={"image": {0: free, 2: free, 3: free}},
                dynamo=True,
            )
        except torch.onnx.OnnxExporterError as error:
            raise ExportError(
                f"--export: PyTorch {torch.__version__} cannot write this model as ONNX with the onnxscript that is "
                "installed; update both (PyTorch 2.6 cannot translate the padding of the U-Net)"
            ) from error
    for name in METADATA:
        if name in checkpoint:
            program.model.metadata_props[name] = json.dumps(checkpoint[name])
    with replace_whole(path) as file:
        file.write(program.model_proto.SerializeToString())
