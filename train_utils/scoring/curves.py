"""The curves of a training run, drawn with Pillow."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from PIL import Image, ImageDraw

from .drawing import FAINT, GRID, INK, Colour, font

CURVE = (0, 114, 178)
CURVES_WIDTH, CURVE_HEIGHT = 1000, 260
MARGIN_LEFT, MARGIN_RIGHT, MARGIN_TOP, MARGIN_BOTTOM = 90, 30, 44, 22
SMOOTHING = 2  # drawn larger by this factor and reduced, because Pillow does not smooth lines


def curves(history: Sequence[Mapping[str, Any]], evaluated_on: str) -> Image.Image:
    """Loss, learning rate and Dice over the epochs, one above the other; the best Dice is marked.

    Args:
        history: rows of the results files with a Dice, at least one.
        evaluated_on: the photographs of the Dice, in words.
    """
    charts = (("training loss", "train_loss"), ("learning rate", "lr"), (f"Dice on {evaluated_on}", "dice"))
    height = len(charts) * CURVE_HEIGHT + 30
    picture = Image.new("RGB", (SMOOTHING * CURVES_WIDTH, SMOOTHING * height), "white")
    draw = ImageDraw.Draw(picture)
    for index, (title, name) in enumerate(charts):
        values = [row[name] for row in history]
        best = values.index(max(values)) if name == "dice" else None
        _draw_chart(draw, index * CURVE_HEIGHT, title, [row["epoch"] for row in history], values, best)
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


Axis = tuple[list[float], Callable[[float], float]]  # ticks, and the map from values to pixels


def _step(low: float, high: float) -> float:
    """A round step that gives about five ticks between two values."""
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
    """An axis that begins and ends at a tick."""
    if high - low <= 1e-9 * max(abs(low), abs(high)):
        low, high = low - 0.5 * (abs(low) or 1), high + 0.5 * (abs(high) or 1)
    step = _step(low, high)
    # Values that differ from a tick only by rounding belong to it.
    lowest, highest = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [step * i for i in range(lowest, highest + 1)], _linear(step * lowest, step * highest, start, end)


def _line(draw: ImageDraw.ImageDraw, points: Sequence[tuple[float, float]], colour: Colour, width: int) -> None:
    draw.line([(SMOOTHING * x, SMOOTHING * y) for x, y in points], fill=colour, width=SMOOTHING * width, joint="curve")


def _dot(draw: ImageDraw.ImageDraw, point: tuple[float, float]) -> None:
    (x, y), radius = point, 4
    box = [x - radius, y - radius, x + radius, y + radius]
    draw.ellipse([SMOOTHING * coordinate for coordinate in box], fill=CURVE)


def _text(
    draw: ImageDraw.ImageDraw, x: float, y: float, text: str, colour: Colour = FAINT, size: float = 14, *, anchor: str
) -> None:
    draw.text((SMOOTHING * x, SMOOTHING * y), text, colour, font(SMOOTHING * size), anchor=anchor)
