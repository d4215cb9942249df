"""The colours of a photograph as a model expects them."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageFilter
from torch import Tensor

from .field_of_view import field_of_view_diameter

# Channel mean and standard deviation inside the field of view, over DRIVE's 20 training photographs, in [0, 1].
DRIVE_MEAN = (0.709, 0.381, 0.224)
DRIVE_STD = (0.127, 0.079, 0.043)

NORMALIZATIONS = ("dataset", "photograph", "local")  # the kinds, see `Normalization`

DARK = 40  # levels of 255; surroundings up to this count as black
ONE_COLOUR = 16  # levels by which three quarters of the surroundings may differ from their median
LIGHT_SIGMA = 1 / 18  # standard deviation of the Gaussian for local means, as a share of the diameter


@dataclass(frozen=True)
class Normalization:
    """How photographs are normalised for a model.

    Attributes:
        kind: "dataset": only subtract `mean` and divide by `std`. "photograph": before that, match the colours of each
            photograph to `mean` and `std`. "local": before both, even out its light.
        mean, std: channel means and standard deviations of the training set, in [0, 1].
    """

    kind: str
    mean: Sequence[float]
    std: Sequence[float]


def blacken_bright_surroundings(photograph: np.ndarray, field_of_view: np.ndarray) -> np.ndarray:
    """Make the surroundings of a field of view, bool [H, W], black if they have one bright colour.

    Training photographs have black surroundings, and a model misses vessels next to white ones. Dark surroundings stay
    unchanged. So does the retina around a mask that covers only a part of it.

    Returns:
        the photograph, uint8 [H, W, 3].
    """
    surroundings = photograph[~field_of_view]  # [pixels, 3]
    if len(surroundings) == 0:
        return photograph
    colour = np.median(surroundings, axis=0)
    if colour.max() <= DARK or np.percentile(np.abs(surroundings - colour).max(axis=1), 75) > ONE_COLOUR:
        return photograph
    # At the rim the two colours mix. A larger photograph has more such pixels.
    rim = 1 + round(field_of_view_diameter(field_of_view) / 500)
    inner = Image.fromarray(field_of_view.astype(np.uint8)).filter(ImageFilter.MinFilter(2 * rim + 1))
    return np.where(np.array(inner)[:, :, None] > 0, photograph, 0).astype(np.uint8)


def channel_statistics(photograph: np.ndarray, field_of_view: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Channel means and standard deviations, float64 [3] each in [0, 1], inside a field of view, bool [H, W]."""
    # From the histogram of the 256 levels: float64 values of all pixels of a large photograph would take gigabytes.
    levels = np.arange(256) / 255
    inside = photograph[field_of_view]  # [pixels, 3]
    shares = [np.bincount(inside[:, channel], minlength=256) / len(inside) for channel in range(3)]
    mean = np.array([share @ levels for share in shares])
    variance = [share @ (levels - centre) ** 2 for share, centre in zip(shares, mean, strict=True)]
    return mean, np.sqrt(variance)


def match_colours(
    photograph: np.ndarray,
    field_of_view: np.ndarray,
    mean: Sequence[float],
    std: Sequence[float],
    *,
    even_light: bool = False,
) -> np.ndarray:
    """Shift and scale a photograph's channels to `mean` and `std` (in [0, 1]) inside its field of view.

    This makes photographs of different cameras look alike. Values beyond the 8-bit range are clipped. With `even_light`
    every pixel is first divided by the mean of its surroundings, so that vessels in dark and bright areas look alike.

    Returns:
        the photograph, uint8 [H, W, 3]; black outside the field of view.
    """
    matched = np.zeros_like(photograph)
    light_of_channels = _local_means(photograph, field_of_view) if even_light else None
    for channel in range(3):
        grey = photograph[..., channel]
        values = grey[field_of_view] / np.float32(255)  # [pixels]
        if light_of_channels is not None:
            light = _resize(light_of_channels[channel], grey.shape)[0, 0].numpy()[field_of_view]
            values /= np.maximum(light, 1 / 255, out=light)
            del light
        # The lower limit keeps a channel of constant value constant.
        scale = std[channel] / max(float(values.std()), 1 / 255)
        # In place, since every copy of a large photograph counts.
        values -= values.mean()
        values *= scale
        values += mean[channel]
        values *= 255
        matched[..., channel][field_of_view] = np.rint(values, out=values).clip(0, 255, out=values)
    return matched


def _local_means(photograph: np.ndarray, field_of_view: np.ndarray) -> Tensor:
    """The mean around each pixel, weighted by a Gaussian, of a photograph's channels: float32 [3, h, w] in [0, 1].

    Args:
        photograph: uint8 [H, W, 3]; h x w pixels are enough for the means.
        field_of_view: the pixels that count, bool [H, W].
    """
    sigma = LIGHT_SIGMA * field_of_view_diameter(field_of_view)  # pixels
    shrink = max(1.0, sigma / 4)
    size = [max(1, round(side / shrink)) for side in field_of_view.shape]
    # Where a mask comes from a picture of one bit, its true pixels are not the number 1 in memory.
    parts = (np.where(field_of_view, levels, np.uint8(0)) for levels in (*np.moveaxis(photograph, 2, 0), np.uint8(255)))
    small = torch.cat([_resize(to_float(torch.from_numpy(part)), size) for part in parts])  # [4, 1, h, w]
    radius = math.ceil(3 * sigma / shrink)
    gaussian = (-0.5 * (torch.arange(-radius, radius + 1) / (sigma / shrink)) ** 2).softmax(dim=0)
    sums = F.conv2d(small, torch.outer(gaussian, gaussian)[None, None], padding=radius)[:, 0]
    return sums[:3] / sums[3].clamp_min(1e-3)


def to_float(levels: Tensor) -> Tensor:
    """Levels, uint8 of any shape, as float32 in [0, 1], exactly as `to_dtype` of torchvision gives them."""
    return levels.to(torch.float32).mul_(1 / 255)


def _resize(grey: Tensor, size: Sequence[int]) -> Tensor:
    """A picture [h, w], resized: [1, 1, H, W]."""
    return F.interpolate(grey[None, None], tuple(size), mode="bilinear", antialias=True)


def prepare(photograph: np.ndarray, field_of_view: np.ndarray, normalization: Normalization) -> np.ndarray:
    """Give a photograph, uint8 [H, W, 3], the surroundings and the colours that a model expects.

    Args:
        photograph: from `read_photograph`.
        field_of_view: the pixels that show the retina, bool [H, W].
        normalization: of the model.
    """
    if normalization.kind == "dataset" or not field_of_view.any():
        return blacken_bright_surroundings(photograph, field_of_view)
    even_light = normalization.kind == "local"
    return match_colours(photograph, field_of_view, normalization.mean, normalization.std, even_light=even_light)


class ChannelNormalization:
    """Subtract `mean` and divide by `std`, channel by channel: images [..., C, H, W] in [0, 1], on any device."""

    def __init__(self, mean: Sequence[float], std: Sequence[float]) -> None:
        self.mean, self.std = list(mean), list(std)
        self._constants: dict[torch.device, tuple[Tensor, Tensor]] = {}

    def __call__(self, image: Tensor) -> Tensor:
        # Kept on the device: torchvision's function copies them at each call, and each copy makes a GPU wait.
        if image.device not in self._constants:
            mean, std = (torch.tensor(values, device=image.device).view(-1, 1, 1) for values in (self.mean, self.std))
            self._constants[image.device] = mean, std
        mean, std = self._constants[image.device]
        return (image - mean) / std
