"""Paired transforms of an image and its label, and the presets for training and evaluation.

Every transform takes and returns `(image, target)`: PIL images, or `tv_tensors.Image` [C, H, W] with
`tv_tensors.Mask` [H, W]. All randomness comes from torch's global generator.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as F

IGNORE_INDEX = 255  # label of the pixels that count neither in the loss nor in the scores


def _pad_if_smaller(image: Any, target: Any, size: int) -> tuple[Any, Any]:
    height, width = F.get_size(image)
    padding = [0, 0, max(size - width, 0), max(size - height, 0)]  # left, top, right, bottom
    if any(padding):
        image, target = F.pad(image, padding, fill=0), F.pad(target, padding, fill=IGNORE_INDEX)
    return image, target


def _resize_label(target: Any, size: list[int]) -> Any:
    if isinstance(target, tv_tensors.Mask):
        # The kernel for masks rounds positions down, which shifts a label by up to a pixel against its image;
        # "nearest-exact" samples at the pixel centres, as Pillow does.
        resized = F.resize(target.as_subclass(Tensor).unsqueeze(0), size, InterpolationMode.NEAREST_EXACT)
        return tv_tensors.wrap(resized.squeeze(0), like=target)
    return F.resize(target, size, InterpolationMode.NEAREST)


class Compose:
    """Apply transforms one after the other."""

    def __init__(self, transforms: Sequence[Callable]) -> None:
        self.transforms = transforms

    def __call__(self, image: Any, target: Any) -> tuple[Any, Any]:
        for transform in self.transforms:
            image, target = transform(image, target)
        return image, target


class RandomResize:
    """Resize the shorter side to a whole number of pixels drawn from [min_size, max_size]."""

    def __init__(self, min_size: int, max_size: int | None = None) -> None:
        self.min_size = min_size
        self.max_size = min_size if max_size is None else max_size

    def __call__(self, image: Any, target: Any) -> tuple[Any, Any]:
        size = [int(torch.randint(self.min_size, self.max_size + 1, ()))]
        return F.resize(image, size, InterpolationMode.BILINEAR), _resize_label(target, size)


class RandomHorizontalFlip:
    """Mirror left to right with probability `p`."""

    def __init__(self, p: float) -> None:
        self.p = p

    def __call__(self, image: Any, target: Any) -> tuple[Any, Any]:
        if torch.rand(()) < self.p:
            image, target = F.horizontal_flip(image), F.horizontal_flip(target)
        return image, target


class RandomVerticalFlip:
    """Mirror top to bottom with probability `p`."""

    def __init__(self, p: float) -> None:
        self.p = p

    def __call__(self, image: Any, target: Any) -> tuple[Any, Any]:
        if torch.rand(()) < self.p:
            image, target = F.vertical_flip(image), F.vertical_flip(target)
        return image, target


class RandomCrop:
    """Cut out a square of `size` pixels at random; smaller pictures are padded at the right and bottom first."""

    def __init__(self, size: int) -> None:
        self.size = size

    def __call__(self, image: Any, target: Any) -> tuple[Any, Any]:
        image, target = _pad_if_smaller(image, target, self.size)
        height, width = F.get_size(image)
        top = int(torch.randint(0, height - self.size + 1, ()))
        left = int(torch.randint(0, width - self.size + 1, ()))
        return (
            F.crop(image, top, left, self.size, self.size),
            F.crop(target, top, left, self.size, self.size),
        )


class CenterCrop:
    """Cut the central square of `size` pixels; smaller pictures are padded at the right and bottom first."""

    def __init__(self, size: int) -> None:
        self.size = size

    def __call__(self, image: Any, target: Any) -> tuple[Any, Any]:
        image, target = _pad_if_smaller(image, target, self.size)
        return F.center_crop(image, [self.size, self.size]), F.center_crop(target, [self.size, self.size])


class ToTensor:
    """Image to float32 [C, H, W] in [0, 1], label to int64 [H, W]."""

    def __call__(self, image: Any, target: Any) -> tuple[Tensor, Tensor]:
        image = F.to_dtype(F.to_image(image), torch.float32, scale=True).as_subclass(Tensor)
        if isinstance(target, Image.Image):
            target = torch.from_numpy(np.array(target))
        return image, target.as_subclass(Tensor).to(torch.int64)


class Normalize:
    """Subtract `mean` and divide by `std`, channel by channel."""

    def __init__(self, mean: Sequence[float], std: Sequence[float]) -> None:
        self.mean = list(mean)
        self.std = list(std)

    def __call__(self, image: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        return F.normalize(image, self.mean, self.std), target


class SegmentationPresetTrain:
    """The tutorial's augmentation: shorter side 0.5 to 1.2 times `base_size`, both flips, a square crop."""

    def __init__(
        self,
        base_size: int = 565,
        crop_size: int = 480,
        hflip_prob: float = 0.5,
        vflip_prob: float = 0.5,
        *,
        mean: Sequence[float],
        std: Sequence[float],
    ) -> None:
        self.transforms = Compose(
            [
                RandomResize(int(0.5 * base_size), int(1.2 * base_size)),
                RandomHorizontalFlip(hflip_prob),
                RandomVerticalFlip(vflip_prob),
                RandomCrop(crop_size),
                ToTensor(),
                Normalize(mean, std),
            ]
        )

    def __call__(self, image: Any, target: Any) -> tuple[Tensor, Tensor]:
        return self.transforms(image, target)


class SegmentationPresetEval:
    """The whole picture at its own size, as a normalised tensor."""

    def __init__(self, *, mean: Sequence[float], std: Sequence[float]) -> None:
        self.transforms = Compose([ToTensor(), Normalize(mean, std)])

    def __call__(self, image: Any, target: Any) -> tuple[Tensor, Tensor]:
        return self.transforms(image, target)


def get_transform(
    train: bool, mean: Sequence[float], std: Sequence[float], base_size: int = 565, crop_size: int = 480
) -> SegmentationPresetTrain | SegmentationPresetEval:
    """The training preset where `train`, else the evaluation preset."""
    if train:
        return SegmentationPresetTrain(base_size, crop_size, mean=mean, std=std)
    return SegmentationPresetEval(mean=mean, std=std)
