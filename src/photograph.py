"""An image file of any kind -> an RGB photograph."""

import glob
import os
import stat
import threading
import warnings
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from PIL import ExifTags, Image, ImageOps, TiffImagePlugin, UnidentifiedImageError

from .errors import DatasetError
from .freed_memory import give_back_freed_memory

# Pillow's name of each format that is read, with the endings of its files. Pillow knows more, and hands some of them
# to other programs.
FORMATS = {
    "TIFF": (".tif", ".tiff"),
    "PNG": (".png",),
    "JPEG": (".jpg", ".jpeg", ".jpe", ".jfif"),
    "GIF": (".gif",),
    "BMP": (".bmp",),
    "PPM": (".ppm", ".pgm"),
    "WEBP": (".webp",),
}
IMAGE_SUFFIXES = frozenset(suffix for suffixes in FORMATS.values() for suffix in suffixes)
# Photographs of phones and hospitals that are not read.
UNREAD_SUFFIXES = frozenset(
    (".heic", ".heif", ".avif", ".dcm", ".dicom", ".jp2", ".j2k", ".dng", ".nef", ".cr2", ".arw")
)

ROWS_AT_ONCE = 256
LARGE = 40_000_000  # pixels; of photographs of more, what is not drawn is found at a smaller size, to save memory


class PhotographError(DatasetError):
    """An image file cannot be used as a photograph; the message names it, what was found and what to do."""


def load_image(path: str | Path) -> Image.Image:
    """Decode an image file of any of FORMATS and any mode, the way up it is shown; of a TIFF its largest page.

    Raises:
        PhotographError: no such file, no image, a damaged one, one of more than about 180 megapixels, or a TIFF that
            Pillow would read wrongly.
    """
    with _open(path) as image:
        image.load()
        ImageOps.exif_transpose(image, in_place=True)  # a copy of a large photograph would take gigabytes
        return image


def read_photograph(path: str | Path) -> np.ndarray:
    """Decode an image file as RGB, uint8 [H, W, 3], the way up it is shown.

    16-bit and floating-point greys are brought to 8 bits; transparent parts become black, as outside the field of view.

    Raises:
        PhotographError: as `load_image`.
    """
    image = to_rgb(load_image(path))
    photograph = np.empty((image.height, image.width, 3), np.uint8)
    # In parts: at once, Pillow makes two more copies.
    for top in range(0, image.height, ROWS_AT_ONCE):
        bottom = min(top + ROWS_AT_ONCE, image.height)
        photograph[top:bottom] = np.asarray(image.crop((0, top, image.width, bottom)))
    if image.width * image.height > LARGE:
        del image  # as large as the photograph
        give_back_freed_memory()
    return photograph


def image_size(path: str | Path) -> tuple[int, int]:
    """Width and height in pixels that an image file says it has, as it is stored: its EXIF orientation may swap them.

    Raises:
        PhotographError: as `load_image`, except that damage within the picture is not found.
    """
    with _open(path) as image:
        return image.size


def is_turned(path: str | Path) -> bool:
    """Whether an image file is shown another way up than it is stored, by its EXIF orientation.

    Raises:
        PhotographError: as `load_image`, except that damage within the picture is not found.
    """
    with _open(path) as image:
        return image.getexif().get(ExifTags.Base.Orientation, 1) in range(2, 9)


def page_and_pages(path: str | Path) -> tuple[int, int, bool]:
    """The number, from 1, of the page of an image file that is read, how many it has, and whether more are damaged.

    Of all but TIFF (1, 1, False).

    Raises:
        PhotographError: as `load_image`.
    """
    with _open(path) as image:
        pages, damaged = _pages(path) if image.format == "TIFF" else ([1], False)
        return image.tell() + 1, len(pages), damaged


class _NoWarnings:
    """Without warnings as long as any thread is inside: `catch_warnings` changes the whole process."""

    def __init__(self) -> None:
        self._lock, self._inside, self._caught = threading.Lock(), 0, None

    def __enter__(self) -> None:
        with self._lock:
            if self._inside == 0:
                self._caught = warnings.catch_warnings()
                self._caught.__enter__()
                warnings.simplefilter("ignore")
            self._inside += 1

    def __exit__(self, *error: object) -> None:
        with self._lock:
            self._inside -= 1
            if self._inside == 0:
                self._caught.__exit__(*error)


_no_warnings = _NoWarnings()


@contextmanager
def _open(path: str | Path) -> Iterator[Image.Image]:
    """Open an image file, at its largest page; whatever goes wrong meanwhile is the file's fault."""
    require_file(path)
    try:
        # Pillow warns of odd metadata, and from 90 megapixels on; it refuses from 180.
        with _no_warnings, Image.open(path, formats=list(FORMATS)) as image:
            if image.format == "TIFF" and len(pages := _pages(path)[0]) > 1:
                image.seek(pages.index(max(pages)))
            if image.format == "TIFF" and _has_deep_planes(image):
                raise PhotographError(
                    f"{path}: has more than 8 bits a channel in separate planes, which Pillow reads wrongly; save it "
                    "with all channels in one plane, or as PNG"
                )
            if image.format == "TIFF" and image.mode.startswith(("I", "F")) and _stores_white_as_zero(image):
                raise PhotographError(
                    f"{path}: stores white as 0 in more than 8 bits, which Pillow reads as a negative; save it with "
                    "black as 0, or as PNG"
                )
            yield image
    except PhotographError:
        raise
    except UnidentifiedImageError as error:
        *first, last = (suffixes[0].removeprefix(".") for suffixes in FORMATS.values())
        known = f"{', '.join(first)} or {last}"
        raise PhotographError(
            f"{path}: not an image of a known format, or damaged; give {known}, or copy it anew from its source"
        ) from error
    except Image.DecompressionBombError as error:
        raise PhotographError(f"{path}: has more than 180 megapixels; shrink it first") from error
    except MemoryError as error:
        raise PhotographError(f"{path}: does not fit into memory; shrink it first") from error
    # Pillow reports damaged files by whatever its decoders run into.
    except Exception as error:
        reason = getattr(error, "strerror", None) or " ".join(str(error).split()) or type(error).__name__
        raise PhotographError(f"{path}: cannot be read ({reason}); copy the file anew from its source") from error


def _has_deep_planes(image: Image.Image) -> bool:
    """Whether a TIFF has a plane for each colour, not compressed, whose numbers Pillow takes for those of 8 bits."""
    tags = image.tag_v2
    in_planes = tags.get(TiffImagePlugin.PLANAR_CONFIGURATION) == 2 and any(tile[0] == "raw" for tile in image.tile)
    return in_planes and max(tags.get(TiffImagePlugin.BITSPERSAMPLE, (1,))) > 8


def _stores_white_as_zero(image: Image.Image) -> bool:
    return image.tag_v2.get(TiffImagePlugin.PHOTOMETRIC_INTERPRETATION) == 0


def _pages(path: str | Path) -> tuple[list[int], bool]:
    """The number of pixels of each page of a TIFF, up to the first one that is damaged; and whether one is."""
    pixels: list[int] = []
    # A file of its own: after a page that is damaged, Pillow cannot go back.
    with Image.open(path, formats=["TIFF"]) as image:
        try:
            while True:
                image.seek(len(pixels))
                pixels.append(image.width * image.height)
        except Image.DecompressionBombError:
            raise
        except EOFError:  # after the last page
            return pixels, False
        except Exception:  # of a damaged page, anything
            return pixels, True


def require_file(path: str | Path) -> None:
    """Raise unless a path is that of a file; to open a FIFO would wait forever.

    Raises:
        PhotographError: it is not.
    """
    try:
        mode = os.stat(path).st_mode
    except (FileNotFoundError, NotADirectoryError) as error:
        found = "a link to a file that is not there" if os.path.islink(path) else "no such file"
        raise PhotographError(f"{path}: {found}; give the path of a photograph") from error
    except OSError as error:
        raise PhotographError(f"{path}: cannot be read ({error.strerror}); give the path of a photograph") from error
    if not stat.S_ISREG(mode):
        found = "a folder" if stat.S_ISDIR(mode) else "a FIFO, a socket or a device"
        raise PhotographError(f"{path}: is {found}, not a file; give the path of a photograph")


def to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith(("I", "F")):
        return Image.fromarray(_to_8_bit(np.array(image))).convert("RGB")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "black"), image).convert("RGB")
    return image if image.mode == "RGB" else image.convert("RGB")


def _to_8_bit(grey: np.ndarray) -> np.ndarray:
    """Greys of any depth as uint8. Files do not tell how many of the bits are used; the brightest pixel does."""
    grey = np.nan_to_num(grey.astype(np.float64), posinf=0, neginf=0)
    depths = (1, 255) if grey.max() <= 255 and (grey % 1).any() else (255, 1023, 4095, 16383, 65535)
    white = next((depth for depth in depths if grey.max() <= depth), grey.max())
    return np.rint(grey.clip(min=0) * (255 / white)).astype(np.uint8)


def list_photographs(
    names: Iterable[str | Path],
    recursive: bool = False,
    leave_out: Callable[[Path], bool] = lambda file: False,
) -> list[Path]:
    """The photographs that files, folders and glob patterns name, each once; those of a folder or pattern sorted.

    A file may have any name; of a folder only its visible files with the ending of an image count. Whether they can be
    read shows when they are.

    Args:
        names: of files, folders and patterns.
        recursive: look into the folders of a folder too; hidden ones and links to folders are passed over.
        leave_out: which files of a folder or pattern are no photographs.

    Raises:
        PhotographError: a name stands for no file at all, or a folder cannot be listed.
    """
    photographs: dict[str, Path] = {}
    for name in names:
        named = os.path.lexists(name)
        matches = [Path(name)] if named else [Path(match) for match in sorted(glob.glob(str(name), recursive=True))]
        if not matches:
            raise PhotographError(f"{name}: no such file or folder, and no file matches it as a pattern")
        if named and not os.path.isdir(name):
            found = matches
        else:
            files = (file for path in matches for file in (images_in(path, recursive) if path.is_dir() else [path]))
            found = [file for file in files if not leave_out(file)]
        if not found:
            endings = ", ".join(sorted(IMAGE_SUFFIXES))
            below = () if recursive else (file for path in matches for file in images_in(path, recursive=True))
            hint = (
                "; there are some in its folders: add --recursive" if any(not leave_out(file) for file in below) else ""
            )
            raise PhotographError(f"{name}: no photographs there; looked for files that end in {endings}{hint}")
        photographs |= {os.path.abspath(file): file for file in found}
    return list(photographs.values())


def images_in(folder: Path, recursive: bool = False, suffixes: Collection[str] = IMAGE_SUFFIXES) -> list[Path]:
    """The image files of a folder, sorted by name; none where there is no such folder.

    Links that lead nowhere count, so that a photograph that is missing is not overlooked.

    Args:
        folder: to list.
        recursive: as in `list_photographs`.
        suffixes: that image files have, in small letters.

    Raises:
        PhotographError: a folder cannot be listed.
    """
    images: list[Path] = []
    try:
        for place, folders, names in os.walk(folder, onerror=_raise) if os.path.isdir(folder) else ():
            # Archives made on a Mac hold "._name" companions.
            visible = [name for name in names if not name.startswith(".")]
            images += [Path(place, name) for name in visible if Path(name).suffix.lower() in suffixes]
            folders[:] = [name for name in folders if recursive and not name.startswith(".")]
    except OSError as error:
        raise PhotographError(f"{error.filename}: cannot be listed ({error.strerror}); give another folder") from error
    # The order of a directory differs between machines, and so does that of paths: Windows knows no capitals.
    return sorted(images, key=lambda path: path.parts)


def _raise(error: OSError) -> None:
    raise error
