"""Paired transforms of an image and its label, and the presets for training and evaluation.

Every transform takes and returns `(image, target)`: PIL images, or `tv_tensors.Image` [C, H, W] with
`tv_tensors.Mask` [H, W] on any device. All random numbers come from torch's global CPU generator. No transform reads a
pixel on the host, so that a GPU never waits, except for the JPEG traces of `OtherCamera`.
"""

import io
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import affine_grid, grid_sample, interpolate
from torchvision import tv_tensors
from torchvision.transforms import v2
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as F

from my_dataset import OUTSIDE
from src.colours import ChannelNormalization, to_float
from src.devices import to_device


def pad_if_smaller(img: Any, size: int, fill: int = 0) -> Any:
    """A picture, padded with `fill` at the right and bottom to at least `size` x `size` pixels."""
    height, width = F.get_size(img)
    padding = [0, 0, max(size - width, 0), max(size - height, 0)]  # left, top, right, bottom
    return F.pad(img, padding, fill=fill) if any(padding) else img


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


class RandomRescale:
    """Resize the shorter side to a whole number of pixels drawn from [smallest, largest] times what it is."""

    def __init__(self, smallest: float, largest: float) -> None:
        self.smallest, self.largest = smallest, largest

    def __call__(self, image: Any, target: Any) -> tuple[Any, Any]:
        shorter_side = min(F.get_size(image))
        return RandomResize(int(self.smallest * shorter_side), int(self.largest * shorter_side))(image, target)


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
    """Crop to a random square of `size` pixels. Smaller pictures are padded at the right and bottom first."""

    def __init__(self, size: int) -> None:
        self.size = size

    def __call__(self, image: Any, target: Any) -> tuple[Any, Any]:
        image, target = pad_if_smaller(image, self.size), pad_if_smaller(target, self.size, fill=OUTSIDE)
        height, width = F.get_size(image)
        top = int(torch.randint(0, height - self.size + 1, ()))
        left = int(torch.randint(0, width - self.size + 1, ()))
        return F.crop(image, top, left, self.size, self.size), F.crop(target, top, left, self.size, self.size)


class RandomAffineCrop:
    """Resize, rotate by any angle, mirror and crop to a square of `size` pixels, at random and in one resampling.

    The image is interpolated bilinearly, the label takes its nearest pixel. What lies beyond the frame is `fill` in the
    image and 255 in the label. The centre is drawn so that an upright square would lie within the frame.

    Args:
        size: side of the square, pixels.
        smallest, largest: what the shorter side is resized to, drawn evenly on a logarithmic scale: times `base_size`.
        base_size: pixels; None: the shorter side itself.
        bend: standard deviation of an elastic deformation, of the square's side; 0: none.
        fill: of the channels, in [0, 1].
        unresampled: share of the crops that hold the pixels of a picture of `base_size` as they are, turned by a
            multiple of 90 degrees; of those whose scale is drawn.
    """

    def __init__(
        self,
        size: int,
        smallest: float,
        largest: float,
        base_size: int | None = None,
        bend: float = 0.0,
        fill: Sequence[float] = (0.0, 0.0, 0.0),
        unresampled: float = 0.0,
    ) -> None:
        self.size = size
        self.smallest, self.largest, self.base_size = smallest, largest, base_size
        self.bend, self.unresampled = bend, unresampled
        self.fill = torch.tensor(fill).view(3, 1, 1)

    def __call__(self, image: Any, target: Any, scale: float | None = None) -> tuple[Tensor, Tensor]:
        """`scale`: what the shorter side is resized to, times itself; None: drawn."""
        height, width = F.get_size(image)
        zoom, angle, mirror, x, y = torch.rand(5).tolist()
        as_it_is = self.unresampled > 0 and float(torch.rand(())) < self.unresampled
        as_it_is &= scale is None and self.base_size in (None, min(height, width))
        if as_it_is:
            angle, shorter_side = math.floor(4 * angle) / 4, min(height, width)
        elif scale is None:
            shorter_side = self._between(zoom, self.base_size or min(height, width))
        else:
            shorter_side = scale * min(height, width)
        side = self.size / shorter_side * min(height, width)  # of the square in the original picture, pixels
        cosine, sine = side * math.cos(2 * math.pi * angle), side * math.sin(2 * math.pi * angle)
        # Under rotation by any angle, mirroring along either axis gives the same set of squares.
        flip = -1 if mirror < 0.5 else 1
        centre_x, centre_y = (
            (min(side, length) + (length - min(side, length)) * 2 * place) / 2
            for place, length in ((x, width), (y, height))
        )
        if as_it_is:  # its sides lie between pixels
            centre_x, centre_y = (round(centre - side / 2) + side / 2 for centre in (centre_x, centre_y))
        # Displacements at 6 x 6 points, smooth in between, pixels.
        points = self.bend * side * torch.randn(1, 6, 6, 2) if self.bend else None
        # All that follows is done on the part of the picture that the square may reach.
        reach = (abs(cosine) + abs(sine)) / 2 + 2 + (2 * float(points.abs().max()) if self.bend else 0)
        left, top = max(int(centre_x - reach), 0), max(int(centre_y - reach), 0)
        right, bottom = min(math.ceil(centre_x + reach), width), min(math.ceil(centre_y + reach), height)
        image, target = ToTensor()(*(F.crop(part, top, left, bottom - top, right - left) for part in (image, target)))
        width, height = right - left, bottom - top
        # Maps the square's coordinates to the part's; both range from -1 to 1.
        matrix = torch.tensor(
            [
                [flip * cosine / width, -sine / width, 2 * (centre_x - left) / width - 1],
                [flip * sine / height, cosine / height, 2 * (centre_y - top) / height - 1],
            ]
        )
        matrix = to_device(matrix, image.device)
        grid = affine_grid(matrix[None], [1, 1, self.size, self.size], align_corners=False)
        if self.bend:
            points = 2 * points / torch.tensor([width, height])
            field = _smooth(to_device(points.permute(0, 3, 1, 2), image.device), self.size)
            grid = grid + field.permute(0, 2, 3, 1)
        # Sampling gives 0 beyond the frame, so what the frame is to be filled with must be 0 meanwhile.
        fill = to_device(self.fill, image.device)
        image = grid_sample((image - fill)[None], grid, mode="bilinear", align_corners=False)[0] + fill
        shifted = target[None, None].float() - OUTSIDE
        target = grid_sample(shifted, grid, mode="nearest", align_corners=False)[0, 0] + OUTSIDE
        return image, target.to(torch.int64)

    def draw_scale(self) -> float:
        """What the shorter side is to be resized to, times `base_size`."""
        return self._between(float(torch.rand(())), 1.0)

    def _between(self, place: float, base_size: float) -> float:
        """From `smallest` at 0 to `largest` at 1, times `base_size`."""
        min_size, max_size = self.smallest * base_size, self.largest * base_size
        return min_size * (max_size / min_size) ** place


def _smooth(points: Tensor, size: int) -> Tensor:
    """Values at few points [N, C, h, w], interpolated smoothly: [N, C, size, size]."""
    return interpolate(points, (size, size), mode="bicubic", align_corners=True)


LARGEST_BEND = 0.12  # of the levels by `_bent`; from 0.125 on their order would change


class OtherCamera:
    """Light, colours, sharpness and JPEG traces as another camera, or another eye, could have given them.

    Of the image alone. The strengths are in standard deviations of the channels: what remains of the differences
    between cameras after each photograph was normalised by its own statistics.

    Args:
        mean, std: of the channels, that the images were brought to.
    """

    def __init__(self, mean: Sequence[float], std: Sequence[float]) -> None:
        self.normalise = ChannelNormalization(mean, std)

    def __call__(self, image: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        device, size = image.device, image.shape[-1]

        def draw(*shape: int) -> Tensor:
            return to_device(torch.randn(shape), device)

        if float(torch.rand(())) < 0.3:
            image = _compressed(image, quality=int(20 + 70 * float(torch.rand(()))))
        image = self.normalise(image)  # [3, H, W]
        image = _bent(image, (0.06 * draw(3, 1, 1)).clamp(-LARGEST_BEND, LARGEST_BEND))
        mixing = torch.eye(3) + 0.15 * torch.randn(3, 3)  # of the channels
        image = (to_device(mixing, device) @ image.flatten(1)).view_as(image)
        contrast, light = 0.25 * draw(1, 1, 4, 4), 0.3 * draw(1, 1, 4, 4)
        image = image * (_smooth(contrast, size)[0] + 0.25 * draw(3, 1, 1)).exp() + _smooth(light, size)[0]
        image = image + 0.3 * draw(3, 1, 1)
        blurred, sharpened, noisy, sigma, amount, noise = torch.rand(6).tolist()
        if blurred < 0.3:
            image = F.gaussian_blur(image, 7, 0.3 + 1.2 * sigma)
        elif sharpened < 0.3:
            image = image + 2 * amount * (image - F.gaussian_blur(image, 5, 1.0))
        if noisy < 0.3:
            image = image + 0.5 * noise * draw(*image.shape)
        return image, target


def _bent(image: Tensor, bend: Tensor) -> Tensor:
    """Levels in standard deviations, as by another gamma: along a parabola that keeps -1 and 1, straight beyond 4."""
    return image + bend * (image.clamp(-4, 4) ** 2 - 1)


def _compressed(image: Tensor, quality: int) -> Tensor:
    """An image, float32 [3, H, W] in [0, 1], as a JPEG file of a quality from 1 to 95 gives it back."""
    file = io.BytesIO()
    F.to_pil_image(F.to_dtype(image.clamp(0, 1), torch.uint8, scale=True).cpu()).save(file, "JPEG", quality=quality)
    return to_float(F.pil_to_tensor(Image.open(file)).to(image.device))


class ColorJitter:
    """torchvision's ColorJitter, applied to the image only."""

    def __init__(self, **strengths: float) -> None:
        self.jitter = v2.ColorJitter(**strengths)

    def __call__(self, image: Any, target: Any) -> tuple[Any, Any]:
        return self.jitter(image), target


class CenterCrop:
    """Crop to the central square of `size` pixels. Smaller pictures are padded at the right and bottom first."""

    def __init__(self, size: int) -> None:
        self.size = size

    def __call__(self, image: Any, target: Any) -> tuple[Any, Any]:
        image, target = pad_if_smaller(image, self.size), pad_if_smaller(target, self.size, fill=OUTSIDE)
        return F.center_crop(image, [self.size, self.size]), F.center_crop(target, [self.size, self.size])


class ToTensor:
    """Image to float32 [C, H, W] in [0, 1], label to int64 [H, W]."""

    def __call__(self, image: Any, target: Any) -> tuple[Tensor, Tensor]:
        image = F.to_dtype(F.to_image(image), torch.float32, scale=True).as_subclass(Tensor)
        if not isinstance(target, Tensor):
            target = torch.from_numpy(np.array(target))
        return image, target.as_subclass(Tensor).to(torch.int64)


class Normalize:
    """Subtract `mean` and divide by `std` in each channel of the image."""

    def __init__(self, mean: Sequence[float], std: Sequence[float]) -> None:
        self.normalise = ChannelNormalization(mean, std)

    def __call__(self, image: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        return self.normalise(image), target


class SegmentationPresetTrain(Compose):
    """The tutorial's augmentation: shorter side 0.5 to 1.2 times `base_size` (None: times itself), flips, a crop."""

    def __init__(
        self,
        base_size: int | None = 565,
        crop_size: int = 480,
        hflip_prob: float = 0.5,
        vflip_prob: float = 0.5,
        *,
        mean: Sequence[float],
        std: Sequence[float],
    ) -> None:
        super().__init__(
            [
                RandomResize(int(0.5 * base_size), int(1.2 * base_size)) if base_size else RandomRescale(0.5, 1.2),
                RandomHorizontalFlip(hflip_prob),
                RandomVerticalFlip(vflip_prob),
                RandomCrop(crop_size),
                ToTensor(),
                Normalize(mean, std),
            ]
        )


class SegmentationPresetRotation(Compose):
    """Rotated and mirrored crops, the shorter side at 0.8 to 1.15 times `base_size`, with colour jitter.

    Shrinking destroys vessels of one or two pixels: a label resized by 0.6 and back has a Dice of 0.86 against itself.
    Resampling blurs, and predictions see photographs as they are: so do half of the crops (`RandomAffineCrop`).
    """

    def __init__(
        self, base_size: int | None = 565, crop_size: int = 256, *, mean: Sequence[float], std: Sequence[float]
    ) -> None:
        super().__init__(
            [
                RandomAffineCrop(crop_size, 0.8, 1.15, base_size, unresampled=0.5),
                ColorJitter(brightness=0.25, contrast=0.25, saturation=0.25),
                Normalize(mean, std),
            ]
        )


class SegmentationPresetAnyCamera(Compose):
    """Rotated and mirrored crops, with what differs between cameras: scale and shape, and see `OtherCamera`.

    The shorter side is 0.6 to 1.6 times `base_size`.
    """

    detail = 1.6  # a photograph is to be kept in this size too, for the largest crops

    def __init__(
        self, base_size: int | None = 565, crop_size: int = 256, *, mean: Sequence[float], std: Sequence[float]
    ) -> None:
        super().__init__(
            [RandomAffineCrop(crop_size, 0.6, self.detail, base_size, bend=0.01, fill=mean), OtherCamera(mean, std)]
        )

    def of_two_sizes(self, working: tuple[float, Any, Any], detail: tuple[float, Any, Any]) -> tuple[Tensor, Tensor]:
        """The crop of a photograph that is there in two sizes, by the one that has all the crop's details.

        Args:
            working, detail: size (times the size at the working diameter), image and target. `detail` is the larger
                one, unless the photograph itself has less pixels than `working`, which was enlarged.
        """
        crop, other_camera = self.transforms
        scale = crop.draw_scale()
        size, image, target = working if scale <= working[0] < detail[0] else detail
        return other_camera(*crop(image, target, scale / size))


class SegmentationPresetEval(Compose):
    """The whole picture at its own size, as a normalised tensor."""

    def __init__(self, *, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__([ToTensor(), Normalize(mean, std)])


AUGMENTATIONS = {
    "tutorial": SegmentationPresetTrain,
    "rotation": SegmentationPresetRotation,
    "any-camera": SegmentationPresetAnyCamera,
}


def get_transform(
    train: bool,
    mean: Sequence[float],
    std: Sequence[float],
    base_size: int | None = 565,
    crop_size: int = 480,
    augmentation: str = "tutorial",
) -> Callable:
    """The training preset that `augmentation` names where `train`, else the evaluation preset."""
    if train:
        return AUGMENTATIONS[augmentation](base_size, crop_size, mean=mean, std=std)
    return SegmentationPresetEval(mean=mean, std=std)
