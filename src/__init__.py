"""The models, and the one place that turns a model's arguments into a model."""

from collections.abc import Mapping

from torch import Tensor

from .unet import UNet

__all__ = ["UNet", "create_model", "model_args_from_state_dict"]


def create_model(in_channels: int = 3, num_classes: int = 2, base_c: int = 32, bilinear: bool = True) -> UNet:
    """Build a U-Net [N, in_channels, H, W] -> {"out": [N, num_classes, H, W]}; `num_classes` counts the background.

    The arguments stay with the model as `model_args`: a checkpoint holds them, so that it can be built again.
    """
    model_args = {"in_channels": in_channels, "num_classes": num_classes, "base_c": base_c, "bilinear": bilinear}
    model = UNet(**model_args)
    model.model_args = model_args
    return model


def model_args_from_state_dict(state_dict: Mapping[str, Tensor]) -> dict[str, int | bool]:
    """Read the arguments of `create_model` off a U-Net's parameters.

    Files of the tutorial carry no arguments; the shapes of the first and last convolution tell them.

    Raises:
        KeyError: the parameters are not those of a U-Net.
    """
    base_c, in_channels = state_dict["in_conv.0.weight"].shape[:2]
    return {
        "in_channels": in_channels,
        "num_classes": state_dict["out_conv.0.weight"].shape[0],
        "base_c": base_c,
        "bilinear": "up1.up.weight" not in state_dict,
    }
