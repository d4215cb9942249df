"""A picture of labels -> a mask, or the class of each pixel."""

import functools
import math
from pathlib import Path

import numpy as np
from PIL import Image, ImageChops

from .errors import DatasetError
from .photograph import load_image, to_rgb

DARKEST_WHITE, LIGHTEST_BLACK = 192, 64  # levels of 255
LARGEST_NUMBER = 16  # of a class, where no pixel lies between it and 255
LARGEST_SMEAR = 0.01  # share of the pixels between them, as JPEG leaves beside edges
# Of 152 real photographs none looks like a mask, nor with a white strip or border added (by hand); darkened to 0.6
# besides, the darkest one does.
LEAST_WHITE = LEAST_BLACK = 0.02  # shares of the pixels of a label or a mask; labels have 0.04 of white and more
BLACK = 32  # level of 255, in all three channels
LARGEST_COLOURED = 0.0005  # share of pixels of a bright colour that is dark as a grey, as blue is


def read_binary_mask(path: str | Path) -> np.ndarray:
    """Decode a picture that is black and white to the eye as bool [H, W], True = white.

    It may be grey, in colours or with a palette, of 1, 8 or 16 bits, or hold 0 and 1. Its black may be lighter than 0
    (up to 64 of 255), its white darker than 255 (down to 192), and a hundredth of its pixels may lie in between.

    Raises:
        DatasetError: it cannot be read, or holds other values or colours such as blue, or 0, 1 and 255: in some data
            sets 1 is the vessels and 255 what is unknown.
    """
    return _read_binary(path, largest_number=1)


def _read_binary(path: str | Path, largest_number: int) -> np.ndarray:
    """As above; refused too where it holds, besides 0 and 255, the numbers of classes up to a largest one alone."""
    # Only of labels to train on are -1 and NaN unknown.
    image = to_rgb(_load_label(path) if largest_number > 1 else load_image(path))
    grey = np.array(image.convert("L"))
    if image.getcolors(2) is None and _coloured(image, grey):
        raise DatasetError(
            f"{path}: holds bright colours, as labels of arteries and veins do, some of which are dark as a grey; save "
            "it again in black and white (white: vessels, or of an ROI mask the field of view)"
        )
    if grey.max() <= 1:
        return grey == 1
    numbers = (grey > 0) & (grey <= largest_number)
    others = ((grey > largest_number) & (grey < 255)).any()
    if grey.min() == 0 and grey.max() == 255 and not others and numbers.mean() > LARGEST_SMEAR:
        largest = int(grey[numbers].max())
        what = "1 may be white" if largest == 1 else f"those up to {largest} may be classes"
        instead = "" if largest == 1 else f", or train with --num-classes {largest}"
        raise DatasetError(
            f"{path}: holds the values {_list(np.unique(grey))}, where {what} and 255 unknown; save it again with 0 "
            f"and 255 alone{instead}"
        )
    between = (grey > LIGHTEST_BLACK) & (grey < DARKEST_WHITE)
    if grey.max() < DARKEST_WHITE or between.mean() > LARGEST_SMEAR:
        raise DatasetError(
            f"{path}: a mask must be black and white, such as 0 and 255, or 0 and 1, but holds the values "
            f"{_list(np.unique(grey))}; save it again in black and white, without loss or smoothing"
        )
    return grey > 127


def _load_label(path: str | Path) -> Image.Image:
    """A picture, with numbers of classes in 8 bits where they have more: 65535, -1 and NaN, for unknown, become 255.

    `to_rgb` would scale the numbers by the brightest value.
    """
    image = load_image(path)
    if image.mode.startswith(("I", "F")):
        values = np.array(image)
        unknown = ~np.isfinite(values) | np.isin(values, (-1, 255, 65535))
        numbers = np.unique(values[~unknown])
        if numbers.size > 1 and np.isin(numbers, range(LARGEST_NUMBER + 1)).all():  # else it is black and white
            return Image.fromarray(np.where(unknown, 255, values).astype(np.uint8))
    return image


def _coloured(image: Image.Image, grey: np.ndarray) -> bool:
    """Whether an RGB picture has bright pixels that are not white in its greys, uint8 [H, W]."""
    brightest, darkest = (
        np.asarray(functools.reduce(choose, image.split())) for choose in (ImageChops.lighter, ImageChops.darker)
    )
    coloured = (brightest >= DARKEST_WHITE) & (darkest <= LIGHTEST_BLACK) & (grey < DARKEST_WHITE)
    return bool(coloured.mean() > LARGEST_COLOURED)


def looks_like_mask(photograph: np.ndarray) -> bool:
    """Whether a photograph, uint8 [H, W, 3], is black and white to the eye, as a label or an ROI mask is."""
    step = math.ceil(max(photograph.shape) / 500)
    channels = np.moveaxis(photograph[::step, ::step], 2, 0).copy()  # side by side in memory, which is quick
    white, black = (channels.min(axis=0) >= DARKEST_WHITE).mean(), (channels.max(axis=0) <= BLACK).mean()
    return bool(white > LEAST_WHITE and black > LEAST_BLACK and 1 - white - black < LARGEST_SMEAR)


def read_classes(path: str | Path, num_classes: int) -> np.ndarray:
    """Decode a label as the class of each pixel, uint8 [H, W]: 0 is the background.

    Args:
        path: for one class a black-and-white picture, as `read_binary_mask` takes it, but not one with the numbers of
            more classes; for these, a picture whose greys or palette numbers are the classes, and 255 where nothing is
            known. A GIF must be grey: programs number its colours anew when they save it.
        num_classes: without the background.

    Raises:
        DatasetError: it cannot be read, or holds other values.
    """
    if num_classes == 1:
        return _read_binary(path, LARGEST_NUMBER).astype(np.uint8)
    image = _load_label(path)
    if image.format == "GIF":
        image = to_rgb(image)
        red, green, blue = image.split()
        if red != green or red != blue:
            raise DatasetError(
                f"{path}: holds colours, and in a GIF their numbers may differ from those of the classes; save the "
                "label as a PNG, with the classes as greys or palette numbers"
            )
    levels = np.array(image if image.mode == "P" else to_rgb(image).convert("L"))
    if ((levels > num_classes) & (levels != 255)).any():
        raise DatasetError(
            f"{path}: holds the values {_list(np.unique(levels))}, but --num-classes {num_classes} allows 0 "
            f"(background) to {num_classes}; change the flag or the label"
        )
    return levels


def _list(values: np.ndarray) -> str:
    return ", ".join(map(str, values[:6])) + (", ..." if len(values) > 6 else "")
