"""U-Net on VGG-16 with batch normalisation.

Source of the backbone: K. Simonyan, A. Zisserman, "Very Deep Convolutional Networks for Large-Scale Image
Recognition", ICLR 2015, as torchvision builds it.
"""

from torch import Tensor, nn

from .backbone_unet import BackboneUNet


class VGG16UNet(BackboneUNet):
    """Stages at 1, 1/2, 1/4, 1/8 and 1/16 of the resolution.

    Args:
        num_classes: classes of the output, background included.
        pretrain_backbone: start from weights learned on ImageNet, which are downloaded.

    Raises:
        BackboneWeightsError: they cannot be downloaded.
    """

    IMAGENET = "VGG16_BN_Weights.IMAGENET1K_V1"

    def __init__(self, num_classes: int, pretrain_backbone: bool = False) -> None:
        from torchvision.models.vgg import cfgs, make_layers

        # Not `vgg16_bn().features`: that would also initialise 124 million weights of the classifier.
        features = make_layers(cfgs["D"], batch_norm=True)
        for layer in features:
            if isinstance(layer, nn.Conv2d):
                nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")  # as torchvision does
                nn.init.zeros_(layer.bias)
        super().__init__(features, {5: 64, 12: 128, 22: 256, 32: 512, 42: 512}, num_classes)
        if pretrain_backbone:
            self.download_backbone()

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """Map an image [N, 3, H, W] (H, W >= 16) to {"out": logits [N, num_classes, H, W]}."""
        return {"out": self.logits(x)}
