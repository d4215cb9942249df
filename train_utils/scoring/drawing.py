"""The parts that all pictures of scores share: colours and fonts."""

from PIL import ImageFont

Colour = tuple[int, int, int]

INK, FAINT, GRID = (25, 25, 25), (105, 105, 105), (225, 225, 225)


def font(size: float) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size)  # part of Pillow, so that pictures look the same everywhere
