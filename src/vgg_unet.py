"""U-Net on VGG-16 with batch normalisation.

Source of the backbone: K. Simonyan, A. Zisserman, "Very Deep Convolutional Networks for Large-Scale Image
Recognition", ICLR 2015, as torchvision builds it.
"""

from torch import Tensor
from torchvision.models import VGG16_BN_Weights, vgg16_bn

from .backbone_unet import BackboneUNet


class VGG16UNet(BackboneUNet):
    """Stages at 1, 1/2, 1/4, 1/8 and 1/16 of the resolution.

    Args:
        num_classes: classes of the output, background included.
        pretrain_backbone: start from weights learned on ImageNet, which are downloaded.

    Raises:
        BackboneWeightsError: they cannot be downloaded.
    """

    imagenet_weights = VGG16_BN_Weights.IMAGENET1K_V1

    def __init__(self, num_classes: int, pretrain_backbone: bool = False) -> None:
        super().__init__(vgg16_bn().features, {5: 64, 12: 128, 22: 256, 32: 512, 42: 512}, num_classes)
        if pretrain_backbone:
            self.download_backbone()

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """Map an image [N, 3, H, W] (H, W >= 16) to {"out": logits [N, num_classes, H, W]}."""
        return {"out": self.logits(x)}
