"""U-Net for segmentation, with padded convolutions and batch normalisation.

Source of the shape: O. Ronneberger, P. Fischer, T. Brox, "U-Net: Convolutional Networks for Biomedical Image
Segmentation", MICCAI 2015. Unlike in the paper, the convolutions are padded, so the logits have the input's size.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class DoubleConv(nn.Sequential):
    """Twice: 3x3 convolution, batch normalisation, ReLU. [N, in, H, W] -> [N, out, H, W] (unpadded: H - 4, W - 4)."""

    def __init__(
        self, in_channels: int, out_channels: int, mid_channels: int | None = None, *, padding: int = 1
    ) -> None:
        mid_channels = out_channels if mid_channels is None else mid_channels
        super().__init__(
            nn.Conv2d(in_channels, mid_channels, kernel_size=3, padding=padding, bias=False),
            nn.BatchNorm2d(mid_channels),
            nn.ReLU(inplace=True),
            nn.Conv2d(mid_channels, out_channels, kernel_size=3, padding=padding, bias=False),
            nn.BatchNorm2d(out_channels),
            nn.ReLU(inplace=True),
        )


class Down(nn.Sequential):
    """Halve the resolution, then convolve. [N, in, H, W] -> [N, out, H // 2, W // 2] (unpadded: 4 less)."""

    def __init__(self, in_channels: int, out_channels: int, *, padding: int = 1) -> None:
        super().__init__(nn.MaxPool2d(2, stride=2), DoubleConv(in_channels, out_channels, padding=padding))


class Up(nn.Module):
    """Double the resolution of `x1`, join it with the skip connection `x2`, then convolve."""

    def __init__(self, in_channels: int, out_channels: int, bilinear: bool = True) -> None:
        super().__init__()
        if bilinear:
            self.up = nn.Upsample(scale_factor=2, mode="bilinear", align_corners=True)
            self.conv = DoubleConv(in_channels, out_channels, in_channels // 2)
        else:
            self.up = nn.ConvTranspose2d(in_channels, in_channels // 2, kernel_size=2, stride=2)
            self.conv = DoubleConv(in_channels, out_channels)

    def forward(self, x1: Tensor, x2: Tensor) -> Tensor:
        x1 = self.up(x1)
        # Pooling drops the last row of an odd side: zero-pad x1 to the size of x2. Strided convolutions round up
        # instead, so there x1 has one row more: a negative padding cuts it. ONNX and Python round quotients of negative
        # numbers differently, so only `rows + 1` and `columns + 1`, which are never negative, are halved.
        rows = x2.shape[-2] - x1.shape[-2]
        columns = x2.shape[-1] - x1.shape[-1]
        bottom, right = (rows + 1) // 2, (columns + 1) // 2
        x1 = F.pad(x1, [columns - right, right, rows - bottom, bottom])
        return self.conv(torch.cat([x2, x1], dim=1))


class OutConv(nn.Sequential):
    """1x1 convolution to the class logits."""

    def __init__(self, in_channels: int, num_classes: int) -> None:
        super().__init__(nn.Conv2d(in_channels, num_classes, kernel_size=1))


def logits_of(model: nn.Module, image: Tensor) -> Tensor:
    """Run the levels of a U-Net, four down and four up, on an image [N, in_channels, H, W]."""
    x1 = model.in_conv(image)  # [N, base_c, H, W]
    x2 = model.down1(x1)
    x3 = model.down2(x2)
    x4 = model.down3(x3)
    x = model.down4(x4)  # [N, 8 or 16 * base_c, H // 16, W // 16]
    x = model.up1(x, x4)
    x = model.up2(x, x3)
    x = model.up3(x, x2)
    x = model.up4(x, x1)
    return model.out_conv(x)


class UNet(nn.Module):
    """Four levels down, four up; widths base_c x (1, 2, 4, 8, 16).

    Args:
        in_channels: channels of the input image.
        num_classes: classes of the output, background included.
        bilinear: upsample bilinearly (half the channels at the bottom); else by transposed convolutions.
        base_c: channels at full resolution.
    """

    def __init__(self, in_channels: int = 1, num_classes: int = 2, bilinear: bool = True, base_c: int = 64) -> None:
        super().__init__()
        self.in_channels, self.num_classes, self.bilinear = in_channels, num_classes, bilinear
        factor = 2 if bilinear else 1
        # The order of these attributes decides what random weights each layer gets under a seed.
        self.in_conv = DoubleConv(in_channels, base_c)
        self.down1 = Down(base_c, base_c * 2)
        self.down2 = Down(base_c * 2, base_c * 4)
        self.down3 = Down(base_c * 4, base_c * 8)
        self.down4 = Down(base_c * 8, base_c * 16 // factor)
        self.up1 = Up(base_c * 16, base_c * 8 // factor, bilinear)
        self.up2 = Up(base_c * 8, base_c * 4 // factor, bilinear)
        self.up3 = Up(base_c * 4, base_c * 2 // factor, bilinear)
        self.up4 = Up(base_c * 2, base_c, bilinear)
        self.out_conv = OutConv(base_c, num_classes)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """Map an image [N, in_channels, H, W] (H, W >= 16) to {"out": logits [N, num_classes, H, W]}."""
        return {"out": logits_of(self, x)}
