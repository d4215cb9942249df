"""Entry points of `torch.hub`: `torch.hub.load(FOLDER, "unet_fundus", source="local")`."""

import importlib.util
import sys
import uuid
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent

dependencies = ["torch", "torchvision", "numpy", "PIL"]


def unet_fundus(pretrained: bool = True, device: str = "cpu") -> Any:
    """The U-Net with the weights of `pretrained`, as a `src.Segmenter`: call it with a photograph.

    The package `src` of this project is imported by another name, so that any `src` of the caller's stays as it is. For
    this reason no other process can unpickle the segmenter; `torch.save` its `model.state_dict()`.

    Raises:
        ValueError: `pretrained` is not true: an untrained model segments nothing. `src.create_model` makes one.
    """
    if not pretrained:
        raise ValueError("unet_fundus: comes with its weights alone; make an untrained model by src.create_model")
    return _import_src().load_pretrained(device=device)


def _import_src() -> Any:
    # A name of its own for each call, so that several threads may load at once.
    spec = importlib.util.spec_from_file_location(f"unet_fundus_{uuid.uuid4().hex}", FOLDER / "src" / "__init__.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module
