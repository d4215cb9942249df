"""The U-Net of the paper, with unpadded convolutions, and its overlap-tile strategy.

Source: O. Ronneberger, P. Fischer, T. Brox, "U-Net: Convolutional Networks for Biomedical Image Segmentation",
MICCAI 2015. In place of the paper's drop-out it has batch normalisation after each 3x3 convolution, as the plain U-Net
here: so both train by the same recipe, and one can tell what the padding does. Without it the recipe's learning rate
does too little: the loss after 140 steps (12 channels, 2 crops of 144 pixels each) was 0.97 with drop-out, 0.88 with
neither, and 0.59 with batch normalisation.
"""

import math

import torch
from torch import Tensor, nn

from .unet import OutConv

# The four poolings meet even numbers alone where the input has 16 m + 12 pixels a side; the logits have 184 fewer.
STRIDE = 16
SMALLEST = 188  # input; 4 pixels of logits
BORDER = 92  # pixels of the input beyond the logits, at each side


class UnpaddedDoubleConv(nn.Sequential):
    """Twice: 3x3 convolution without padding, batch normalisation, ReLU. [N, in, H, W] -> [N, out, H - 4, W - 4]."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__(
            nn.Conv2d(in_channels, out_channels, kernel_size=3, bias=False),
            nn.BatchNorm2d(out_channels),
            nn.ReLU(inplace=True),
            nn.Conv2d(out_channels, out_channels, kernel_size=3, bias=False),
            nn.BatchNorm2d(out_channels),
            nn.ReLU(inplace=True),
        )


class UnpaddedDown(nn.Sequential):
    """Halve the resolution, then convolve. [N, in, H, W] -> [N, out, H / 2 - 4, W / 2 - 4]."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__(nn.MaxPool2d(2, stride=2), UnpaddedDoubleConv(in_channels, out_channels))


class UnpaddedUp(nn.Module):
    """Double the resolution of `x1`, join it with the centre of the skip connection `x2`, then convolve."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.up = nn.ConvTranspose2d(in_channels, in_channels // 2, kernel_size=2, stride=2)
        self.conv = UnpaddedDoubleConv(in_channels, out_channels)

    def forward(self, x1: Tensor, x2: Tensor) -> Tensor:
        x1 = self.up(x1)
        height, width = x1.shape[-2:]
        top, left = (x2.shape[-2] - height) // 2, (x2.shape[-1] - width) // 2
        centre = x2[..., top : top + height, left : left + width]
        return self.conv(torch.cat([centre, x1], dim=1))


class UNetPaper(nn.Module):
    """Four levels down, four up; widths base_c x (1, 2, 4, 8, 16). The logits are those of the input's centre.

    Args:
        in_channels: channels of the input image.
        num_classes: classes of the output, background included.
        base_c: channels at full resolution.
    """

    def __init__(self, in_channels: int = 1, num_classes: int = 2, base_c: int = 64) -> None:
        super().__init__()
        self.in_conv = UnpaddedDoubleConv(in_channels, base_c)
        self.down1 = UnpaddedDown(base_c, base_c * 2)
        self.down2 = UnpaddedDown(base_c * 2, base_c * 4)
        self.down3 = UnpaddedDown(base_c * 4, base_c * 8)
        self.down4 = UnpaddedDown(base_c * 8, base_c * 16)
        self.up1 = UnpaddedUp(base_c * 16, base_c * 8)
        self.up2 = UnpaddedUp(base_c * 8, base_c * 4)
        self.up3 = UnpaddedUp(base_c * 4, base_c * 2)
        self.up4 = UnpaddedUp(base_c * 2, base_c)
        self.out_conv = OutConv(base_c, num_classes)

    def unpadded(self, x: Tensor) -> Tensor:
        """Map an image [N, in_channels, H, W], where H and W fit, to logits [N, num_classes, H - 184, W - 184]."""
        x1 = self.in_conv(x)
        x2 = self.down1(x1)
        x3 = self.down2(x2)
        x4 = self.down3(x3)
        x = self.down4(x4)  # [N, 16 * base_c, H / 16 - 7.75, W / 16 - 7.75]
        x = self.up1(x, x4)
        x = self.up2(x, x3)
        x = self.up3(x, x2)
        x = self.up4(x, x1)
        return self.out_conv(x)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """Map an image [N, in_channels, H, W] to {"out": logits [N, num_classes, H - 184, W - 184]}.

        Raises:
            ValueError: a pooling would meet an odd number; the next size that fits is named.
        """
        for side in x.shape[-2:]:
            fitting = SMALLEST + max(-(-(side - SMALLEST) // STRIDE), 0) * STRIDE
            if side != fitting:
                raise ValueError(
                    f"a side of {side} pixels does not fit the unpadded U-Net; the next that does: {fitting}"
                )
        return {"out": self.unpadded(x)}


class OverlapTileUNet(UNetPaper):
    """The same network (and the same weights) for whole pictures of any size, in training as in prediction.

    The picture is continued by mirroring beyond its border, and cut into tiles that overlap as far as the network looks
    beyond its logits; so the tiles join without a seam. In training, too: then every pixel of the label counts. With
    the logits of the centre alone, a ring of 92 pixels around each crop, and the rim of the photograph always, would
    never be learned.
    """

    LARGEST_TILE = 708  # pixels a side, of logits; so that a photograph of DRIVE is one tile

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """Map an image [N, in_channels, H, W] of any size to {"out": logits [N, num_classes, H, W]}."""
        height, width = x.shape[-2:]
        # A graph for any size cannot depend on the number of tiles: there, one takes all.
        whole = torch.compiler.is_compiling()
        rows, columns = (1 if whole else math.ceil(side / self.LARGEST_TILE) for side in (height, width))
        # Steps of a multiple of 16 let the poolings meet the same pixels as in the whole picture.
        down, right = _steps(height, rows), _steps(width, columns)
        x = _mirror(_mirror(x, -2, rows * down + SMALLEST), -1, columns * right + SMALLEST)
        if rows == columns == 1:
            return {"out": self.unpadded(x)[..., :height, :width]}

        def logits(row: int, column: int) -> Tensor:
            tile = x[..., row * down :, column * right :][..., : down + SMALLEST, : right + SMALLEST]
            return self.unpadded(tile)[..., :down, :right]

        strips = [torch.cat([logits(row, column) for column in range(columns)], dim=-1) for row in range(rows)]
        return {"out": torch.cat(strips, dim=-2)[..., :height, :width]}


def _steps(length: int, tiles: int) -> int:
    # Not as the negative of a floor: ONNX rounds quotients of negative numbers another way than Python.
    return (length + STRIDE * tiles - 1) // (STRIDE * tiles) * STRIDE


def _mirror(x: Tensor, dim: int, length: int) -> Tensor:
    """Continue a picture of any size by mirroring, without repeating its border: BORDER before it, `length` in all."""
    last = x.shape[dim] - 1
    position = torch.arange(-BORDER, length - BORDER, device=x.device)
    period = torch.full_like(position, max(2 * last, 1))  # a tensor, since ONNX has no remainder by a free number
    position = position % period
    return x.index_select(dim, torch.minimum(position, period - position))
