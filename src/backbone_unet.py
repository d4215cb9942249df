"""A U-Net whose contracting path is a classification network, optionally with ImageNet weights.

torchvision is imported where such a network is built: it takes seconds, which no other model needs.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from .errors import UserError
from .unet import OutConv, Up

if TYPE_CHECKING:
    from torchvision.models import WeightsEnum


class BackboneWeightsError(UserError):
    """The weights of a backbone cannot be downloaded or are of another network; the message says what to do."""


class BackboneUNet(nn.Module):
    """A backbone, and four bilinear upsampling levels that are connected to its stages.

    Attributes:
        IMAGENET: torchvision's name of the weights for the network of `features`.

    Args:
        features: the feature layers of a torchvision classification network. Those after the last tap are dropped.
        taps: the indices of the layers whose outputs are the stages, with their channels. Each stage has half the
            resolution of the one before.
        num_classes: classes of the output, background included.
    """

    IMAGENET: str

    def __init__(self, features: nn.Sequential, taps: Mapping[int, int], num_classes: int) -> None:
        super().__init__()
        self.taps = tuple(taps)
        first, second, third, fourth, fifth = taps.values()
        self.backbone = features[: self.taps[-1] + 1]
        self.up1 = Up(fifth + fourth, fourth)
        self.up2 = Up(fourth + third, third)
        self.up3 = Up(third + second, second)
        self.up4 = Up(second + first, first)
        self.conv = OutConv(first, num_classes)

    @property
    def imagenet_weights(self) -> "WeightsEnum":
        """The weights that IMAGENET names."""
        from torchvision.models import get_weight

        return get_weight(self.IMAGENET)

    def logits(self, x: Tensor) -> Tensor:
        """Map an image [N, 3, H, W] to logits [N, num_classes, h, w] of the first stage's resolution."""
        stages = []
        for index, layer in enumerate(self.backbone):
            x = layer(x)
            if index in self.taps:
                stages.append(x)
        x1, x2, x3, x4, x5 = stages
        x = self.up1(x5, x4)
        x = self.up2(x, x3)
        x = self.up3(x, x2)
        x = self.up4(x, x1)
        return self.conv(x)

    def load_backbone(self, state_dict: Mapping[str, Tensor]) -> None:
        """Load the feature layers from the weights of torchvision's whole classification network.

        Raises:
            BackboneWeightsError: they are the weights of another network.
        """
        own = tuple(f"features.{index}." for index in range(len(self.backbone)))
        features = {name.removeprefix("features."): value for name, value in state_dict.items() if name.startswith(own)}
        try:
            self.backbone.load_state_dict(features)
        except RuntimeError as error:
            raise BackboneWeightsError(
                f"not torchvision's weights of {type(self.imagenet_weights).__name__.removesuffix('_Weights')}; "
                f"get {self.imagenet_weights.url}"
            ) from error

    def download_backbone(self) -> None:
        """Load the ImageNet weights from torch's cache, or download them.

        Raises:
            BackboneWeightsError: they cannot be downloaded.
        """
        try:
            state_dict = self.imagenet_weights.get_state_dict(progress=True, check_hash=True)
        # No network, a full disk or a damaged download.
        except (OSError, RuntimeError) as error:
            raise BackboneWeightsError(
                f"the ImageNet weights cannot be downloaded ({error}); get {self.imagenet_weights.url} elsewhere, and "
                f"give the file with --backbone-weights or put it into {torch.hub.get_dir()}/checkpoints"
            ) from error
        self.load_backbone(state_dict)
