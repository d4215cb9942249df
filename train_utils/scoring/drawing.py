"""The parts that all pictures of scores share: colours, fonts and files."""

from pathlib import Path

from PIL import Image, ImageFont

from ..files import replace_whole

Colour = tuple[int, int, int]

INK, FAINT, GRID = (25, 25, 25), (105, 105, 105), (225, 225, 225)


def font(size: float) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size)  # part of Pillow, so that pictures look the same everywhere


def write_png(picture: Image.Image, path: str | Path) -> None:
    """Write a picture whole or not at all.

    Raises:
        train_utils.files.OutputError: it cannot be written.
    """
    with replace_whole(path) as file:
        picture.save(file, format="PNG")
