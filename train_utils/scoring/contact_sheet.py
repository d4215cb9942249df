"""The contact sheet: photographs, their vessels, what was predicted, and the errors, drawn with Pillow."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw, ImageOps

from .drawing import FAINT, INK, font

# Hits are grey and errors bright. Orange and sky blue are brighter versions of M. Okabe and K. Ito's colours. People
# with any of the three kinds of colour blindness can distinguish them from each other and from the grey.
HIT, FALSE_ALARM, MISS = (128, 128, 128), (255, 159, 0), (86, 180, 255)
BACKGROUND_COLOUR, OUTSIDE_COLOUR = (0, 0, 0), (38, 38, 46)
VESSEL_COLOUR = (255, 255, 255)

SHEET_ROWS = 20  # as many as DRIVE's test set has; of more photographs the sheet shows the worst
PANEL = 584  # side of the square that a photograph is fitted into, pixels; DRIVE's keep their own size
GAP = 8
CAPTION = 230  # width of the text at the left, pixels
TITLES = ("photograph", "truth", "prediction", "errors")


@dataclass(frozen=True)
class SheetRow:
    """A photograph's row of the contact sheet; `strip` shows its panels side by side."""

    name: str
    dice: float
    strip: Image.Image

    def order(self) -> tuple[float, str]:
        """The worst first."""
        return self.dice, self.name


def error_map(truth: np.ndarray, prediction: np.ndarray, inside: np.ndarray) -> np.ndarray:
    """Hits, false alarms and misses in their colours, uint8 [H, W, 3]; all arguments are bool [H, W]."""
    colours = np.array([BACKGROUND_COLOUR, FALSE_ALARM, MISS, HIT], np.uint8)
    return _dim_outside(colours[2 * truth + prediction], inside)


def _dim_outside(picture: np.ndarray, inside: np.ndarray) -> np.ndarray:
    return np.where(inside[..., None], picture, np.array(OUTSIDE_COLOUR, np.uint8))


def sheet_row(
    name: str, dice: float, photograph: np.ndarray, truth: np.ndarray, prediction: np.ndarray, inside: np.ndarray
) -> SheetRow:
    """Fit a photograph, uint8 [H, W, 3], its masks, bool [H, W], and their error map into panels side by side."""
    white, black = np.uint8(VESSEL_COLOUR), np.uint8(BACKGROUND_COLOUR)
    masks = [np.where(mask[..., None], white, black) for mask in (truth, prediction)]
    pictures = [photograph, *(_dim_outside(mask, inside) for mask in masks), error_map(truth, prediction, inside)]
    strip = Image.new("RGB", (len(pictures) * PANEL + (len(pictures) - 1) * GAP, PANEL), "white")
    for column, picture in enumerate(pictures):
        # A box filter keeps thin vessels sharp and does not ring.
        panel = ImageOps.contain(Image.fromarray(picture), (PANEL, PANEL), Image.Resampling.BOX)
        left = column * (PANEL + GAP) + (PANEL - panel.width) // 2
        strip.paste(panel, (left, (PANEL - panel.height) // 2))
    return SheetRow(name, dice, strip)


def contact_sheet(rows: Sequence[SheetRow], photographs: int, heading: str) -> Image.Image:
    """Join rows, in their order, under a heading and a legend.

    Args:
        rows: at least one.
        photographs: how many were scored; the sheet says so if it shows fewer.
        heading: a line of text.
    """
    width = 2 * GAP + CAPTION + rows[0].strip.width
    top = 140
    sheet = Image.new("RGB", (width, top + len(rows) * (PANEL + GAP)), "white")
    draw = ImageDraw.Draw(sheet)
    draw.text((GAP, GAP), heading, INK, font(28))
    count = f"{photographs} photographs" if photographs == len(rows) else f"{len(rows)} of {photographs} photographs"
    draw.text((GAP, 52), f"{count}, the worst first; Dice inside the field of view", FAINT, font(24))
    _draw_legend(draw, width)
    for column, title in enumerate(TITLES):
        middle = GAP + CAPTION + column * (PANEL + GAP) + PANEL // 2
        draw.text((middle, top - 8), title, INK, font(26), anchor="ms")
    for index, row in enumerate(rows):
        y = top + index * (PANEL + GAP)
        sheet.paste(row.strip, (GAP + CAPTION, y))
        draw.text((GAP, y + PANEL // 2 - 36), _fitted(row.name, CAPTION - GAP), INK, font(26))
        draw.text((GAP, y + PANEL // 2 + 4), f"Dice {row.dice:.3f}", INK, font(32))
    return sheet


def _fitted(text: str, width: int) -> str:
    """The text, shortened to at most `width` pixels."""
    if font(26).getlength(text) <= width:
        return text
    while text and font(26).getlength(f"{text}...") > width:
        text = text[:-1]
    return f"{text}..."


def _draw_legend(draw: ImageDraw.ImageDraw, width: int) -> None:
    x = width - GAP
    for colour, label in ((MISS, "missed"), (FALSE_ALARM, "false alarm"), (HIT, "hit")):
        x -= int(font(24).getlength(label))
        draw.text((x, 52), label, INK, font(24))
        draw.rectangle([x - 32, 56, x - 10, 78], fill=colour, outline=INK)
        x -= 60
