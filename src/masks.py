"""A black-and-white picture of any kind -> a mask."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from PIL import Image, UnidentifiedImageError

from .errors import DatasetError


@contextmanager
def _opened(path: Path) -> Iterator[Image.Image]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # whatever Pillow warns of is either raised in the end, or harmless
            with Image.open(path) as image:
                yield image
    except UnidentifiedImageError as error:
        raise DatasetError(f"{path}: not an image, or a damaged one; replace it from the DRIVE archive") from error
    # Pillow reports damaged files by whatever its decoders run into.
    except (OSError, SyntaxError, ValueError, EOFError, IndexError) as error:
        raise DatasetError(f"{path}: cannot be read ({error}); replace it from the DRIVE archive") from error


def photograph_size(path: Path) -> tuple[int, int]:
    """Width and height in pixels of an image file, which is not decoded.

    Raises:
        DatasetError: it cannot be read.
    """
    with _opened(path) as image:
        return image.size


def open_image(path: Path, mode: str) -> np.ndarray:
    """Decode an image file in one of Pillow's modes, [H, W, ...].

    Raises:
        DatasetError: it cannot be read.
    """
    with _opened(path) as image:
        return np.array(image.convert(mode))


def read_binary_mask(path: Path) -> np.ndarray:
    """Decode a black-and-white picture of any kind (0/1, 0/255, RGB, palette) as bool [H, W], True = white.

    Raises:
        DatasetError: it holds other values than 0 and 255, or 0 and 1.
    """
    mask = open_image(path, "L")
    values = np.unique(mask)
    white = 1 if values.max() == 1 else 255
    if not np.isin(values, (0, white)).all():
        found = ", ".join(map(str, values[:6])) + (", ..." if len(values) > 6 else "")
        raise DatasetError(
            f"{path}: a mask must hold 0 and 255 (or 0 and 1) alone, but holds the values {found}; "
            "save it again in black and white, without loss or smoothing"
        )
    return mask == white
