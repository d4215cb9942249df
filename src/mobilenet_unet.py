"""U-Net on MobileNetV3-Large, a fast model for small machines.

Source of the backbone: A. Howard et al., "Searching for MobileNetV3", ICCV 2019, as torchvision builds it.
"""

import torch.nn.functional as F
from torch import Tensor

from .backbone_unet import BackboneUNet


class MobileV3Unet(BackboneUNet):
    """Stages at 1/2, 1/4, 1/8, 1/16 and 1/32 of the resolution; the logits are resized from 1/2.

    Args:
        num_classes: classes of the output, background included.
        pretrain_backbone: start from weights learned on ImageNet, which are downloaded.

    Raises:
        BackboneWeightsError: they cannot be downloaded.
    """

    IMAGENET = "MobileNet_V3_Large_Weights.IMAGENET1K_V1"

    def __init__(self, num_classes: int, pretrain_backbone: bool = False) -> None:
        from torchvision.models import mobilenet_v3_large

        super().__init__(mobilenet_v3_large().features, {1: 16, 3: 24, 6: 40, 12: 112, 15: 160}, num_classes)
        if pretrain_backbone:
            self.download_backbone()

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """Map an image [N, 3, H, W] of any size to {"out": logits [N, num_classes, H, W]}."""
        logits = self.logits(x)  # [N, num_classes, ceil(H / 2), ceil(W / 2)]
        return {"out": F.interpolate(logits, size=x.shape[-2:], mode="bilinear", align_corners=False)}
