"""The U-Net of the paper, with unpadded convolutions, and its overlap-tile strategy.

Source: O. Ronneberger, P. Fischer, T. Brox, "U-Net: Convolutional Networks for Biomedical Image Segmentation",
MICCAI 2015. Batch normalisation after each 3x3 convolution replaces the paper's drop-out, as in the plain U-Net. Both
then train by the same recipe, which shows the effect of the padding alone. Without batch normalisation the recipe's
learning rate is too low: the loss after 140 steps (12 channels, 2 crops of 144 pixels each) was 0.97 with drop-out,
0.88 with neither, and 0.59 with batch normalisation.
"""

import math

import torch
from torch import Tensor, nn

from .unet import DoubleConv, Down, OutConv, logits_of

# All four poolings get even sizes if a side of the input has 16 m + 12 pixels. The logits have 184 pixels fewer.
STRIDE = 16
SMALLEST = 188  # input; 4 pixels of logits
BORDER = 92  # pixels of the input beyond the logits, at each side


class UnpaddedUp(nn.Module):
    """Double the resolution of `x1`, join it with the centre of the skip connection `x2`, then convolve."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.up = nn.ConvTranspose2d(in_channels, in_channels // 2, kernel_size=2, stride=2)
        self.conv = DoubleConv(in_channels, out_channels, padding=0)

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
        self.in_conv = DoubleConv(in_channels, base_c, padding=0)
        self.down1 = Down(base_c, base_c * 2, padding=0)
        self.down2 = Down(base_c * 2, base_c * 4, padding=0)
        self.down3 = Down(base_c * 4, base_c * 8, padding=0)
        self.down4 = Down(base_c * 8, base_c * 16, padding=0)
        self.up1 = UnpaddedUp(base_c * 16, base_c * 8)
        self.up2 = UnpaddedUp(base_c * 8, base_c * 4)
        self.up3 = UnpaddedUp(base_c * 4, base_c * 2)
        self.up4 = UnpaddedUp(base_c * 2, base_c)
        self.out_conv = OutConv(base_c, num_classes)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """Map an image [N, in_channels, H, W] to {"out": logits [N, num_classes, H - 184, W - 184]}.

        Raises:
            ValueError: a pooling would get an odd size; the message names the next size that fits.
        """
        for side in x.shape[-2:]:
            fitting = SMALLEST + max(-(-(side - SMALLEST) // STRIDE), 0) * STRIDE
            if side != fitting:
                raise ValueError(
                    f"a side of {side} pixels does not fit the unpadded U-Net; the next that does: {fitting}"
                )
        return {"out": logits_of(self, x)}


class OverlapTileUNet(UNetPaper):
    """The same network (and the same weights) for whole pictures of any size, in training and in prediction.

    The picture is mirrored beyond its border and cut into overlapping tiles. The overlap is as wide as the network's
    border without logits, so the tiles join without a seam. Training does the same, so that every pixel of the label
    counts. With the centre's logits alone, a ring of 92 pixels around each crop would not count, and the rim of the
    photograph would never be learned.
    """

    LARGEST_TILE = 708  # pixels per side, of logits; a photograph of DRIVE is one tile

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """Map an image [N, in_channels, H, W] of any size to {"out": logits [N, num_classes, H, W]}."""
        height, width = x.shape[-2:]
        # A compiled graph for any size cannot depend on the number of tiles, so it has a single tile.
        whole = torch.compiler.is_compiling()
        rows, columns = (1 if whole else math.ceil(side / self.LARGEST_TILE) for side in (height, width))
        # With steps of a multiple of 16 the poolings group the same pixels as in the whole picture.
        down, right = _steps(height, rows), _steps(width, columns)
        x = _mirror(_mirror(x, -2, rows * down + SMALLEST), -1, columns * right + SMALLEST)
        if rows == columns == 1:
            return {"out": logits_of(self, x)[..., :height, :width]}

        def logits(row: int, column: int) -> Tensor:
            tile = x[..., row * down :, column * right :][..., : down + SMALLEST, : right + SMALLEST]
            return logits_of(self, tile)[..., :down, :right]

        strips = [torch.cat([logits(row, column) for column in range(columns)], dim=-1) for row in range(rows)]
        return {"out": torch.cat(strips, dim=-2)[..., :height, :width]}


def _steps(length: int, tiles: int) -> int:
    # Not `-(-length // ...)`: ONNX and Python round quotients of negative numbers differently.
    return (length + STRIDE * tiles - 1) // (STRIDE * tiles) * STRIDE


def _mirror(x: Tensor, dim: int, length: int) -> Tensor:
    """Extend a picture by reflection to `length` pixels in all, of which BORDER pixels are before it."""
    last = x.shape[dim] - 1
    position = torch.arange(-BORDER, length - BORDER, device=x.device)
    period = torch.full_like(position, max(2 * last, 1))  # a tensor: ONNX has no remainder by a dynamic scalar
    position = position % period
    return x.index_select(dim, torch.minimum(position, period - position))
