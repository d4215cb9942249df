"""The architectures by their names, and the construction of a model from arguments."""

from collections.abc import Mapping

from torch import Tensor, nn

from .mobilenet_unet import MobileV3Unet
from .unet import UNet
from .unet_paper import OverlapTileUNet
from .vgg_unet import VGG16UNet

# The class of each architecture and its default arguments. `num_classes` includes the background.
ARCHITECTURES = {
    "unet": (UNet, {"in_channels": 3, "num_classes": 2, "base_c": 32, "bilinear": True}),
    "unet_paper": (OverlapTileUNet, {"in_channels": 3, "num_classes": 2, "base_c": 64}),
    "mobilenet_v3": (MobileV3Unet, {"num_classes": 2}),
    "vgg16": (VGG16UNet, {"num_classes": 2}),
}


def create_model(arch: str = "unet", **model_args: int | bool) -> nn.Module:
    """Build a model [N, C, H, W] -> {"out": [N, num_classes, H, W]}.

    The arguments stay with the model as `model_args`. A checkpoint stores them to build the model again.

    Args:
        arch: a key of ARCHITECTURES. Files without it hold a plain U-Net.
        model_args: arguments of the architecture. ARCHITECTURES has the defaults.

    Raises:
        ValueError: there is no such architecture.
        TypeError: the architecture has no such argument.
    """
    if arch not in ARCHITECTURES:
        raise ValueError(f"no architecture {arch!r}; there are {', '.join(ARCHITECTURES)}")
    architecture, defaults = ARCHITECTURES[arch]
    model = architecture(**(defaults | model_args))
    model.model_args = {"arch": arch} | defaults | model_args
    return model


def model_args_from_state_dict(state_dict: Mapping[str, Tensor]) -> dict[str, str | int | bool]:
    """Find the arguments of `create_model` from a model's parameters.

    The tutorial's files store no arguments. They follow from the names and shapes of the first and last convolution.

    Raises:
        KeyError, ValueError, IndexError: the parameters are not those of one of these models.
    """
    for arch, first in (("mobilenet_v3", "backbone.0.0.weight"), ("vgg16", "backbone.0.weight")):
        if first in state_dict:
            return {"arch": arch, "num_classes": state_dict["conv.0.weight"].shape[0]}
    # The paper's U-Net has the same names and shapes as the plain one with transposed convolutions. Only stored
    # arguments tell them apart.
    base_c, in_channels = state_dict["in_conv.0.weight"].shape[:2]
    return {
        "arch": "unet",
        "in_channels": in_channels,
        "num_classes": state_dict["out_conv.0.weight"].shape[0],
        "base_c": base_c,
        "bilinear": "up1.up.weight" not in state_dict,
    }
