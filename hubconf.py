"""Entry points of `torch.hub`: `torch.hub.load(FOLDER_OR_REPOSITORY, "unet_fundus", source="local")`."""

import sys
from typing import Any

dependencies = ["torch", "torchvision", "numpy", "PIL"]


def unet_fundus(pretrained: bool = True, device: str = "cpu") -> Any:
    """The U-Net with the weights of `pretrained`, as a `src.Segmenter`: call it with a photograph.

    The package `src` of this project is imported beside any `src` of the caller's, which stays as it is. For this
    reason the segmenter cannot be pickled; `torch.save` its `model.state_dict()`.

    Raises:
        ValueError: `pretrained` is not true: an untrained model segments nothing. `src.create_model` makes one.
    """
    if not pretrained:
        raise ValueError("unet_fundus: comes with its weights alone; make an untrained model by src.create_model")
    return _import_src().load_pretrained(device=device)


def _import_src() -> Any:
    def take_out() -> dict[str, Any]:
        return {name: sys.modules.pop(name) for name in list(sys.modules) if name.split(".")[0] == "src"}

    theirs = take_out()
    try:
        import src  # torch.hub puts this folder first while it loads an entry point

        return src
    finally:
        take_out()
        sys.modules.update(theirs)
