"""Pictures of results, drawn with Pillow: the contact sheet of segmentations and the curves of a training run."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont, ImageOps

from .files import replace_whole
from .logger import Row

Colour = tuple[int, int, int]

# Hits are muted and errors bright. Orange and sky blue are M. Okabe and K. Ito's, made brighter: people with any of the
# three kinds of colour blindness tell them apart, from each other and from the grey.
HIT, FALSE_ALARM, MISS = (128, 128, 128), (255, 159, 0), (86, 180, 255)
BACKGROUND, OUTSIDE = (0, 0, 0), (38, 38, 46)
VESSEL = (255, 255, 255)
CURVE = (0, 114, 178)
INK, FAINT, GRID = (25, 25, 25), (105, 105, 105), (225, 225, 225)

SHEET_ROWS = 20  # DRIVE's test set; of more photographs the sheet shows the worst
PANEL = 584  # side of the square that a photograph is fitted into, pixels; DRIVE's keep their own size
GAP = 8
CAPTION = 230  # width of the text at the left, pixels
TITLES = ("photograph", "truth", "prediction", "errors")


@dataclass(frozen=True)
class SheetRow:
    """A photograph's row of the contact sheet; `strip` is its panels side by side."""

    name: str
    dice: float
    strip: Image.Image

    def order(self) -> tuple[float, str]:
        """The worst first."""
        return self.dice, self.name


def error_map(truth: np.ndarray, prediction: np.ndarray, inside: np.ndarray) -> np.ndarray:
    """Hits, false alarms and misses in their colours, uint8 [H, W, 3]; all arguments are bool [H, W]."""
    colours = np.array([BACKGROUND, FALSE_ALARM, MISS, HIT], np.uint8)
    return _dim_outside(colours[2 * truth + prediction], inside)


def _dim_outside(picture: np.ndarray, inside: np.ndarray) -> np.ndarray:
    return np.where(inside[..., None], picture, np.array(OUTSIDE, np.uint8))


def sheet_row(
    name: str, dice: float, photograph: np.ndarray, truth: np.ndarray, prediction: np.ndarray, inside: np.ndarray
) -> SheetRow:
    """Fit a photograph, uint8 [H, W, 3], its masks, bool [H, W], and their error map into panels side by side."""
    masks = [np.where(mask[..., None], np.uint8(VESSEL), np.uint8(BACKGROUND)) for mask in (truth, prediction)]
    pictures = [photograph, *(_dim_outside(mask, inside) for mask in masks), error_map(truth, prediction, inside)]
    strip = Image.new("RGB", (len(pictures) * PANEL + (len(pictures) - 1) * GAP, PANEL), "white")
    for column, picture in enumerate(pictures):
        # A box filter neither rings nor blurs: thin vessels stay crisp.
        panel = ImageOps.contain(Image.fromarray(picture), (PANEL, PANEL), Image.Resampling.BOX)
        left = column * (PANEL + GAP) + (PANEL - panel.width) // 2
        strip.paste(panel, (left, (PANEL - panel.height) // 2))
    return SheetRow(name, dice, strip)


def contact_sheet(rows: Sequence[SheetRow], photographs: int, heading: str) -> Image.Image:
    """Join rows, in their order, under a heading and a legend.

    Args:
        rows: at least one.
        photographs: how many were scored; the sheet says so where it shows fewer.
        heading: a line of text.
    """
    width = 2 * GAP + CAPTION + rows[0].strip.width
    top = 140
    sheet = Image.new("RGB", (width, top + len(rows) * (PANEL + GAP)), "white")
    draw = ImageDraw.Draw(sheet)
    draw.text((GAP, GAP), heading, INK, _font(28))
    count = f"{photographs} photographs" if photographs == len(rows) else f"{len(rows)} of {photographs} photographs"
    draw.text((GAP, 52), f"{count}, the worst first; Dice inside the field of view", FAINT, _font(24))
    _draw_legend(draw, width)
    for column, title in enumerate(TITLES):
        middle = GAP + CAPTION + column * (PANEL + GAP) + PANEL // 2
        draw.text((middle, top - 8), title, INK, _font(26), anchor="ms")
    for index, row in enumerate(rows):
        y = top + index * (PANEL + GAP)
        sheet.paste(row.strip, (GAP + CAPTION, y))
        draw.text((GAP, y + PANEL // 2 - 36), _fitted(row.name, CAPTION - GAP), INK, _font(26))
        draw.text((GAP, y + PANEL // 2 + 4), f"Dice {row.dice:.3f}", INK, _font(32))
    return sheet


def _fitted(text: str, width: int) -> str:
    """The text, cut short where it is wider than so many pixels."""
    if _font(26).getlength(text) <= width:
        return text
    while text and _font(26).getlength(f"{text}...") > width:
        text = text[:-1]
    return f"{text}..."


def _draw_legend(draw: ImageDraw.ImageDraw, width: int) -> None:
    x = width - GAP
    for colour, label in ((MISS, "missed"), (FALSE_ALARM, "false alarm"), (HIT, "hit")):
        x -= int(_font(24).getlength(label))
        draw.text((x, 52), label, INK, _font(24))
        draw.rectangle([x - 32, 56, x - 10, 78], fill=colour, outline=INK)
        x -= 60


def _font(size: float) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size)  # Pillow carries it, so that pictures look the same everywhere


CURVES_WIDTH, CURVE_HEIGHT = 1000, 260
MARGIN_LEFT, MARGIN_RIGHT, MARGIN_TOP, MARGIN_BOTTOM = 90, 30, 44, 22
SMOOTHING = 2  # drawn this much larger and reduced, since Pillow draws jagged lines


def curves(history: Sequence[Row], evaluated_on: str) -> Image.Image:
    """Loss, learning rate and Dice over the epochs, one above the other; the best Dice is marked.

    Args:
        history: the rows of the results files, at least one.
        evaluated_on: the photographs of the Dice, in words.
    """
    charts = (("training loss", "train_loss"), ("learning rate", "lr"), (f"Dice on {evaluated_on}", "dice"))
    height = len(charts) * CURVE_HEIGHT + 30
    picture = Image.new("RGB", (SMOOTHING * CURVES_WIDTH, SMOOTHING * height), "white")
    draw = ImageDraw.Draw(picture)
    epochs = [row["epoch"] for row in history]
    for index, (title, name) in enumerate(charts):
        values = [row[name] for row in history]
        best = values.index(max(values)) if name == "dice" else None
        _draw_chart(draw, index * CURVE_HEIGHT, title, epochs, values, best)
    _text(draw, CURVES_WIDTH / 2, height - 24, "epoch", anchor="ma")
    return picture.reduce(SMOOTHING)


def _draw_chart(
    draw: ImageDraw.ImageDraw,
    top: float,
    title: str,
    epochs: Sequence[float],
    values: Sequence[float],
    best: int | None,
) -> None:
    """Draw one curve with its axes into the band that starts at `top`; `best` is the index of a point to mark."""
    x_ticks, x = _epoch_axis(min(epochs), max(epochs), MARGIN_LEFT, CURVES_WIDTH - MARGIN_RIGHT)
    bottom = top + CURVE_HEIGHT - MARGIN_BOTTOM
    y_ticks, y = _value_axis(min(values), max(values), bottom, top + MARGIN_TOP)
    for tick in y_ticks:
        _line(draw, [(MARGIN_LEFT, y(tick)), (CURVES_WIDTH - MARGIN_RIGHT, y(tick))], GRID, 1)
        _text(draw, MARGIN_LEFT - 8, y(tick), f"{tick:.6g}", anchor="rm")
    for tick in x_ticks:
        _line(draw, [(x(tick), top + MARGIN_TOP), (x(tick), bottom)], GRID, 1)
        _text(draw, x(tick), bottom + 4, f"{tick:.6g}", anchor="ma")
    _text(draw, MARGIN_LEFT, top + MARGIN_TOP - 8, title, INK, 17, anchor="ls")
    points = [(x(epoch), y(value)) for epoch, value in zip(epochs, values, strict=True)]
    _line(draw, points, CURVE, 2)
    if len(points) == 1:
        _dot(draw, points[0])  # a line of one point cannot be seen
    note = f"{values[-1]:.4g} at the end"
    if best is not None:
        _dot(draw, points[best])
        note = f"best {values[best]:.3f} in epoch {epochs[best]}, {values[-1]:.3f} at the end"
    _text(draw, CURVES_WIDTH - MARGIN_RIGHT, top + MARGIN_TOP - 8, note, FAINT, 15, anchor="rs")


Axis = tuple[list[float], Callable[[float], float]]  # ticks, and the way from values to pixels


def _step(low: float, high: float) -> float:
    """A round distance of ticks that makes about five of them between two values."""
    power = 10 ** math.floor(math.log10((high - low) / 4))
    return power * next(factor for factor in (1, 2, 5, 10) if (high - low) / (factor * power) <= 6)


def _linear(low: float, high: float, start: float, end: float) -> Callable[[float], float]:
    return lambda value: start + (value - low) / (high - low) * (end - start)


def _epoch_axis(first: int, last: int, start: float, end: float) -> Axis:
    if first == last:
        first, last = first - 1, last + 1
    step = max(int(_step(first, last)), 1)
    return list(range(math.ceil(first / step) * step, last + 1, step)), _linear(first, last, start, end)


def _value_axis(low: float, high: float, start: float, end: float) -> Axis:
    """An axis that reaches from a tick to a tick."""
    if high - low <= 1e-9 * max(abs(low), abs(high)):
        low, high = low - 0.5 * (abs(low) or 1), high + 0.5 * (abs(high) or 1)
    step = _step(low, high)
    # Values that differ from a tick by rounding alone lie on it.
    lowest, highest = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [step * i for i in range(lowest, highest + 1)], _linear(step * lowest, step * highest, start, end)


def _line(draw: ImageDraw.ImageDraw, points: Sequence[tuple[float, float]], colour: Colour, width: int) -> None:
    draw.line([(SMOOTHING * x, SMOOTHING * y) for x, y in points], fill=colour, width=SMOOTHING * width, joint="curve")


def _dot(draw: ImageDraw.ImageDraw, point: tuple[float, float]) -> None:
    draw.circle([SMOOTHING * coordinate for coordinate in point], 4 * SMOOTHING, fill=CURVE)


def _text(
    draw: ImageDraw.ImageDraw, x: float, y: float, text: str, colour: Colour = FAINT, size: float = 14, *, anchor: str
) -> None:
    draw.text((SMOOTHING * x, SMOOTHING * y), text, colour, _font(SMOOTHING * size), anchor=anchor)


def write_png(picture: Image.Image, path: str | Path) -> None:
    """Write a picture whole or not at all.

    Raises:
        train_utils.files.OutputError: it cannot be written.
    """
    with replace_whole(path) as file:
        picture.save(file, format="PNG")
