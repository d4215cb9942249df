"""An image file of any kind -> an RGB photograph."""

import glob
import os
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from .errors import DatasetError

IMAGE_SUFFIXES = frozenset((".tif", ".tiff", ".png", ".jpg", ".jpeg", ".gif", ".bmp", ".ppm", ".pgm", ".webp"))


class PhotographError(DatasetError):
    """An image file cannot be used as a photograph; the message names it, what was found and what to do."""


@contextmanager
def open_image(path: str | Path) -> Iterator[Image.Image]:
    """Open an image file of any format and mode that Pillow knows, the way up it is shown.

    Raises:
        PhotographError: no such file, no image, a damaged one, or one of more than about 180 megapixels.
    """
    try:
        with warnings.catch_warnings():
            # Pillow warns of odd metadata, and from 90 megapixels on; it refuses from 180.
            warnings.simplefilter("ignore")
            with Image.open(path) as image:
                yield ImageOps.exif_transpose(image)
    except FileNotFoundError as error:
        raise PhotographError(f"{path}: no such file; give the path of a photograph") from error
    except UnidentifiedImageError as error:
        raise PhotographError(f"{path}: not an image; give a photograph (tif, png, jpg, ...)") from error
    except Image.DecompressionBombError as error:
        raise PhotographError(f"{path}: has more than 180 megapixels; shrink it first") from error
    # Pillow reports damaged files by whatever its decoders run into.
    except (OSError, SyntaxError, ValueError, EOFError, IndexError, TypeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise PhotographError(f"{path}: cannot be read ({reason}); copy the file anew from its source") from error


def read_photograph(path: str | Path) -> np.ndarray:
    """Decode an image file as RGB, uint8 [H, W, 3], the way up it is shown.

    16-bit and floating-point greys are brought to 8 bits; transparent parts become black, as outside the field of view.

    Raises:
        PhotographError: as `open_image`.
    """
    with open_image(path) as image:
        return np.array(to_rgb(image))


def image_size(path: str | Path) -> tuple[int, int]:
    """Width and height in pixels of an image file, which is not decoded for it (unless it is stored turned).

    Raises:
        PhotographError: as `open_image`.
    """
    with open_image(path) as image:
        return image.size


def to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith(("I", "F")):
        return Image.fromarray(_to_8_bit(np.array(image))).convert("RGB")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "black"), image).convert("RGB")
    return image.convert("RGB")


def _to_8_bit(grey: np.ndarray) -> np.ndarray:
    """Greys of any depth as uint8. Files do not tell how many of the bits are used; the brightest pixel does."""
    grey = np.nan_to_num(grey.astype(np.float64), posinf=0, neginf=0)
    depths = (1, 255) if grey.max() <= 255 and (grey % 1).any() else (255, 1023, 4095, 16383, 65535)
    white = next((depth for depth in depths if grey.max() <= depth), grey.max())
    return np.rint(grey.clip(min=0) * (255 / white)).astype(np.uint8)


def list_photographs(names: Iterable[str | Path]) -> list[Path]:
    """The photographs that files, folders and glob patterns name, each once; those of a folder or pattern sorted.

    A file may have any name; of a folder only its visible files with the ending of an image count.

    Raises:
        PhotographError: a name stands for no file at all.
    """
    photographs: dict[str, Path] = {}
    for name in names:
        path = Path(name)
        matches = [path] if path.exists() else [Path(match) for match in sorted(glob.glob(str(name), recursive=True))]
        if not matches:
            raise PhotographError(f"{name}: no such file or folder, and no file matches it as a pattern")
        found = [file for match in matches for file in (images_in(match) if match.is_dir() else [match])]
        if not found:
            endings = ", ".join(sorted(IMAGE_SUFFIXES))
            raise PhotographError(f"{name}: no photographs there; looked for files that end in {endings}")
        photographs |= {os.path.abspath(file): file for file in found}
    return list(photographs.values())


def images_in(folder: Path) -> list[Path]:
    """The image files of a folder, sorted by name; none where there is no such folder."""
    if not folder.is_dir():
        return []
    # The order of a directory differs between machines. Archives made on a Mac hold "._name" companions.
    return sorted(
        file
        for file in folder.iterdir()
        if file.suffix.lower() in IMAGE_SUFFIXES and not file.name.startswith(".") and file.is_file()
    )
