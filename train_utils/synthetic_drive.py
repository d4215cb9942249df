"""A synthetic DRIVE: fundus photographs drawn from a seed, with exact labels, for the demo and the tests.

A photograph is a round field of view with an optic disc, a macula, uneven light, a branching tree of vessels and a few
lesions. Light, macula and lesions make any threshold of the green channel a poor segmentation. The vessels stand out
from the noise, so that a small U-Net learns them within a minute or two.

Lengths in the code are in "units": pixels of the real DRIVE, whose field of view is 540 pixels wide. Other picture
sizes scale the same retina, but no vessel is thinner than a pixel.
"""

import heapq
import itertools
import math
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

SUPERSAMPLING = 4  # sub-pixels along each side of a pixel while vessels are drawn
SMALLEST_DRAWN = 32


def _per_channel(red: float, green: float, blue: float) -> np.ndarray:
    return np.array([red, green, blue], np.float32)[:, None, None]  # [3, 1, 1], for images [3, H, W]


# Red, green, blue in [0, 1]. VESSEL_CONTRAST is the share of light lost in the middle of the widest vein.
FUNDUS_COLOUR = _per_channel(0.84, 0.457, 0.268)
DISC_GLOW = _per_channel(0.22, 0.33, 0.20)
MACULA_CONTRAST = _per_channel(0.20, 0.34, 0.26)
VESSEL_CONTRAST = _per_channel(0.19, 0.44, 0.28)
LESION_CONTRAST = _per_channel(0.20, 0.42, 0.28)
SPOT_GLOW = _per_channel(0.18, 0.20, 0.10)
SENSOR_NOISE = _per_channel(0.016, 0.018, 0.020)


@dataclass(frozen=True)
class Retina:
    """The layout of one photograph. Points are (x, y) in pixels. A pixel reaches from its index to index + 1."""

    width: int
    height: int
    unit: float  # pixels in one pixel of the real DRIVE
    centre: np.ndarray
    radius: float  # of the field of view, pixels
    disc: np.ndarray
    macula: np.ndarray
    temporal: float  # +1 where the macula lies right of the disc, -1 where left

    def distance(self, point: np.ndarray) -> np.ndarray:
        """Distance in pixels of every pixel centre from a point, float32 [H, W]."""
        x = np.arange(self.width, dtype=np.float32) + np.float32(0.5 - point[0])
        y = np.arange(self.height, dtype=np.float32) + np.float32(0.5 - point[1])
        return np.hypot(x[None, :], y[:, None])


@dataclass(frozen=True)
class Sprout:
    """The start of a vessel before it grows. Angles are in radians: 0 is temporal, positive is downwards."""

    start: np.ndarray  # (x, y), pixels
    heading: float
    towards: float  # the final heading
    turn: float  # length over which the heading changes, units
    width: float  # units
    vein: bool
    free: float  # length over which it may touch vessels of its kind, as it starts at one, units


@dataclass(frozen=True)
class Vessel:
    """A grown vessel: its centre line [n, 2] and width [n] in pixels, and its darkness [n] in [0, 1]."""

    line: np.ndarray
    width: np.ndarray
    strength: np.ndarray


def write_synthetic_drive(
    root: str | Path, training: int = 20, test: int = 20, width: int = 565, height: int = 584, seed: int = 0
) -> Path:
    """Write `root/DRIVE` with synthetic photographs under the official names, and return `root`.

    Args:
        root: folder for the folder `DRIVE`; made if missing.
        training, test: number of photographs of each part, numbered from 21 and from 01.
        width, height: size of the photographs in pixels, at least 32 each.
        seed: a photograph depends only on the seed, its part, its number and its size.

    Raises:
        FileExistsError: `root/DRIVE` exists.
        ValueError: a picture smaller than 32 x 32.
    """
    root = Path(root)
    target = root / "DRIVE"
    if target.exists():
        raise FileExistsError(f"{target} exists already: remove it or name another folder for the synthetic DRIVE")
    _check_size(width, height)
    root.mkdir(parents=True, exist_ok=True)
    # The name DRIVE appears only when everything is written. An interrupted call leaves at most a hidden folder.
    with tempfile.TemporaryDirectory(dir=root, prefix=".synthetic_drive_") as scratch:
        unfinished = Path(scratch) / "DRIVE"
        for part, (name, first, count) in enumerate((("training", 21, training), ("test", 1, test))):
            for folder in ("images", "1st_manual", "mask", *(["2nd_manual"] if name == "test" else [])):
                (unfinished / name / folder).mkdir(parents=True)
            for number in range(first, first + count):
                rng = np.random.default_rng([seed, part, number])
                _write_photograph(unfinished / name, name, number, width, height, rng)
        unfinished.rename(target)
    return root


def synthetic_photograph(
    width: int, height: int, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Draw one photograph: (image uint8 [H, W, 3] RGB, vessels bool [H, W], field of view bool [H, W])."""
    _check_size(width, height)
    retina = _lay_out(width, height, rng)
    from_centre = retina.distance(retina.centre)
    field_of_view = from_centre <= retina.radius
    coverage, opacity = _rasterise(_grow_tree(retina, rng), width, height)
    vessels = (coverage >= 0.5) & field_of_view

    image = _background(retina, from_centre, rng)
    image *= 1 - opacity * (VESSEL_CONTRAST * rng.uniform(0.85, 1.1))  # [3, H, W]
    image += rng.standard_normal(image.shape, dtype=np.float32) * SENSOR_NOISE
    image *= np.clip(retina.radius - from_centre + 0.5, 0, 1)
    levels = (np.clip(image, 0, 1) * 255 + 0.5).astype(np.uint8)
    photograph = Image.fromarray(np.ascontiguousarray(levels.transpose(1, 2, 0)))
    return np.array(photograph.filter(ImageFilter.BoxBlur(0.45))), vessels, field_of_view


def second_observer(vessels: np.ndarray, field_of_view: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """The vessels as another observer might mark them, bool [H, W]: some are missed, some borders off by a pixel."""
    height, width = vessels.shape
    cell = max(3.0, min(height, width) / 20)
    opened = _as_mask(vessels).filter(ImageFilter.MinFilter(3)).filter(ImageFilter.MaxFilter(3))
    thin = vessels & (np.array(opened) == 0)
    seen = vessels & ~(thin & (_smooth_field(height, width, cell, rng) > 0.7))
    # Some regions are shifted by a pixel, others are a pixel too wide.
    shift_x, shift_y = (np.trunc(_smooth_field(height, width, cell, rng) / 1.3).clip(-1, 1).astype(int) for _ in "xy")
    rows = (np.arange(height)[:, None] + shift_y).clip(0, height - 1)
    columns = (np.arange(width)[None, :] + shift_x).clip(0, width - 1)
    moved = seen[rows, columns]
    return np.where(_smooth_field(height, width, cell, rng) > 0, seen | moved, moved) & field_of_view


def _check_size(width: int, height: int) -> None:
    if min(width, height) < SMALLEST_DRAWN:
        raise ValueError(
            f"a synthetic photograph of {width} x {height} pixels is too small: each side needs {SMALLEST_DRAWN}"
        )


def _write_photograph(folder: Path, part: str, number: int, width: int, height: int, rng: np.random.Generator) -> None:
    image, vessels, field_of_view = synthetic_photograph(width, height, rng)
    Image.fromarray(image).save(folder / "images" / f"{number:02d}_{part}.tif", compression="tiff_lzw")
    masks = {f"1st_manual/{number:02d}_manual1.gif": vessels, f"mask/{number:02d}_{part}_mask.gif": field_of_view}
    if part == "test":
        masks[f"2nd_manual/{number:02d}_manual2.gif"] = second_observer(vessels, field_of_view, rng)
    for name, mask in masks.items():
        # With `optimize`, Pillow would reduce the palette to two values and store 0 and 1, not 0 and 255.
        _as_mask(mask).save(folder / name, optimize=False)


def _as_mask(mask: np.ndarray) -> Image.Image:
    return Image.fromarray(mask.astype(np.uint8) * 255)


def _smooth_field(height: int, width: int, cell: float, rng: np.random.Generator) -> np.ndarray:
    """Smooth noise with features about `cell` pixels wide, mean 0 and standard deviation 1, float32 [H, W]."""
    coarse_size = math.ceil(height / cell) + 1, math.ceil(width / cell) + 1
    coarse = Image.fromarray(rng.standard_normal(coarse_size, dtype=np.float32))
    field = np.array(coarse.resize((width, height), Image.Resampling.BICUBIC))
    return (field - field.mean()) / field.std()


def _lay_out(width: int, height: int, rng: np.random.Generator) -> Retina:
    radius = 270 / 565 * min(width, height)
    unit = radius / 270
    free = np.minimum(np.array([width, height]) / 2 - radius, 10 * unit)  # so that the field of view is never cut off
    centre = np.array([width, height]) / 2 + rng.uniform(-0.8, 0.8, 2) * free
    temporal = rng.choice([-1.0, 1.0])
    disc = centre + radius * np.array([-temporal * rng.uniform(0.62, 0.76), rng.uniform(-0.12, 0.08)])
    macula = disc + radius * np.array([temporal * rng.uniform(0.7, 0.8), rng.uniform(0.03, 0.14)])
    return Retina(width, height, unit, centre, radius, disc, macula, temporal)


# ---- the vessel tree


def _trunks(retina: Retina, rng: np.random.Generator) -> Iterator[Sprout]:
    """The vessels that start at the disc: in each half of the eye an arcade and a nasal pair, and three thin ones."""
    for half, vein in itertools.product((-1, 1), (True, False)):
        if vein:
            arcade, wide, nasal, narrow = rng.uniform((50, 6.2, 112, 3.6), (62, 7.0, 128, 4.8))
        else:
            arcade, wide, nasal, narrow = rng.uniform((66, 4.6, 136, 3.0), (80, 5.6, 155, 3.8))
        for heading, towards, turn, width in (
            (arcade, rng.uniform(-16, 4), rng.uniform(135, 175), wide),
            (nasal, nasal + rng.uniform(-45, 10), rng.uniform(100, 250), narrow),
        ):
            start = retina.disc + rng.uniform(-6, 6, 2) * retina.unit
            angles = half * math.radians(heading), half * math.radians(towards)
            yield Sprout(start, *angles, turn, width, vein, free=70)
    for heading in rng.uniform(-35, 35, 3):
        angles = math.radians(heading), math.radians(heading * 0.3)
        yield Sprout(retina.disc, *angles, 60, rng.uniform(1.6, 2.4), bool(rng.random() < 0.5), free=60)


def _grow_tree(retina: Retina, rng: np.random.Generator) -> list[Vessel]:
    """Grow vessels, the widest first, until they cover a random share of the field of view.

    As in an eye, a vein stops at other veins and an artery at other arteries. Veins and arteries may cross.
    """
    wanted = rng.uniform(0.115, 0.145) * math.pi * retina.radius**2
    cell = max(8 * retina.unit, 3.0)
    shape = math.ceil(retina.height / cell) + 1, math.ceil(retina.width / cell) + 1
    occupied = {True: np.zeros(shape, bool), False: np.zeros(shape, bool)}
    order = itertools.count()  # orders vessels of equal width, because sprouts do not compare
    waiting = [(-sprout.width, next(order), sprout) for sprout in _trunks(retina, rng)]
    heapq.heapify(waiting)
    tree: list[Vessel] = []
    covered = 0.0
    while waiting and covered < wanted:
        sprout = heapq.heappop(waiting)[2]
        line, width, heading = _centre_line(sprout, retina, rng)
        cells = tuple((line[:, ::-1] / cell).astype(int).clip(0, np.array(shape) - 1).T)
        length = _free_length(line, occupied[sprout.vein][cells], sprout, retina)
        shortest = max(14, 16 * sprout.width) * retina.unit  # a short wide vessel would look cut off
        if length * _step(retina) < shortest or length < 3:
            continue
        occupied[sprout.vein][cells[0][:length], cells[1][:length]] = True
        vessel = _vessel(line[:length], width[:length], sprout, retina)
        tree.append(vessel)
        covered += vessel.width.sum() * _step(retina)
        for child in _children(line, width, heading, length, sprout, retina, rng):
            heapq.heappush(waiting, (-child.width, next(order), child))
    return tree


def _step(retina: Retina) -> float:
    """Distance in pixels between two points of a centre line."""
    return max(3 * retina.unit, 1.0)


def _centre_line(sprout: Sprout, retina: Retina, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The path of a vessel that nothing stops: points [n, 2] in pixels, width [n] in units, heading [n]."""
    step = _step(retina)
    length = 62 * sprout.width**1.1 * rng.uniform(0.75, 1.3)
    along = np.arange(0, length, step / retina.unit)  # units
    heading = sprout.towards + (sprout.heading - sprout.towards) * np.exp(-along / sprout.turn)
    for wavelength, swing in ((rng.uniform(35, 60), 0.10), (rng.uniform(90, 160), 0.16)):
        phase = rng.uniform(0, 2 * math.pi)
        heading += swing * (np.sin(2 * math.pi * along / wavelength + phase) - math.sin(phase))
    direction = np.stack([retina.temporal * np.cos(heading), np.sin(heading)], axis=1)
    line = sprout.start + np.cumsum(direction, axis=0) * step
    width = np.maximum(sprout.width * (1 - 0.55 * along / length), 1.0)
    return line, width, heading


def _free_length(line: np.ndarray, occupied: np.ndarray, sprout: Sprout, retina: Retina) -> int:
    """Number of points before a vessel leaves the field of view, or reaches the fovea or a vessel of its kind."""
    occupied = occupied.copy()
    occupied[: math.ceil(sprout.free * retina.unit / _step(retina)) + 1] = False
    outside = np.hypot(*(line - retina.centre).T) > retina.radius
    fovea = np.hypot(*(line - retina.macula).T) < 0.1 * retina.radius
    stop = occupied | outside | fovea
    return int(stop.argmax()) if stop.any() else len(line)


def _vessel(line: np.ndarray, width: np.ndarray, sprout: Sprout, retina: Retina) -> Vessel:
    if np.hypot(*(line[-1] - retina.centre)) < 0.98 * retina.radius:  # it ends inside the field of view: taper it
        remaining = np.arange(len(line) - 1, -1, -1) * _step(retina) / retina.unit
        width = np.minimum(width, 1 + 0.1 * remaining)
    strength = 0.6 + 0.4 * np.clip((width - 1) / 4, 0, 1)  # thin vessels have less contrast
    return Vessel(line, np.maximum(width * retina.unit, 1.0), strength if sprout.vein else 0.8 * strength)


def _children(
    line: np.ndarray,
    width: np.ndarray,
    heading: np.ndarray,
    length: int,
    parent: Sprout,
    retina: Retina,
    rng: np.random.Generator,
) -> Iterator[Sprout]:
    """Side branches on alternating sides, and a fork at the end if nothing stopped the vessel."""
    step = _step(retina) / retina.unit  # units
    side = rng.choice([-1.0, 1.0])
    place = parent.free + rng.uniform(0, 25)
    while place < (length - 2) * step:
        at = int(place / step)
        leaves, later = side * rng.uniform(0.6, 1.2), side * rng.uniform(-0.1, 0.9)
        if width[at] > 1.05:
            thinner = max(width[at] * rng.uniform(0.4, 0.75), 1.0)
            angles = heading[at] + leaves, heading[at] + later
            yield Sprout(line[at], *angles, rng.uniform(40, 120), thinner, parent.vein, width[at] / 2 + 12)
        side = -side if rng.random() < 0.8 else side
        place += rng.uniform(16, 42)
    if length == len(line) and width[-1] > 1.05:
        for turn in rng.uniform(0.25, 0.6, 2) * (-1, 1):
            angles = heading[-1] + turn, heading[-1] + turn * rng.uniform(0, 1.5)
            yield Sprout(line[-1], *angles, 60, max(0.8 * width[-1], 1.0), parent.vein, width[-1] / 2 + 14)


def _rasterise(tree: list[Vessel], width: int, height: int) -> tuple[np.ndarray, np.ndarray]:
    """Draw the tree: the covered share of each pixel and its darkness, both float32 [H, W] in [0, 1]."""
    quads, widths, strengths = [], [], []
    for vessel in tree:
        ahead = np.gradient(vessel.line, axis=0)
        across = ahead[:, ::-1] * (-1, 1) / np.linalg.norm(ahead, axis=1, keepdims=True)
        # ImageDraw also fills the sub-pixels under the outline, so it draws one sub-pixel more than the width.
        across *= (vessel.width[:, None] - 1 / SUPERSAMPLING) / 2
        left, right = vessel.line + across, vessel.line - across
        quads.append(np.concatenate([left[:-1], left[1:], right[1:], right[:-1]], axis=1))  # [n - 1, 8]
        widths.append(vessel.width[:-1])
        strengths.append(vessel.strength[:-1])
    order = np.argsort(np.concatenate(widths), kind="stable")  # wide vessels cover the starts of their branches
    corners = (np.concatenate(quads)[order] * SUPERSAMPLING - 0.5).tolist()
    fills = np.rint(np.concatenate(strengths)[order] * 255).astype(int).tolist()
    canvas = Image.new("L", (width * SUPERSAMPLING, height * SUPERSAMPLING))
    draw = ImageDraw.Draw(canvas)
    for corner, fill in zip(corners, fills, strict=True):
        draw.polygon(corner, fill=fill)
    covered = canvas.point([0] + [255] * 255)
    coverage, opacity = (np.array(layer.reduce(SUPERSAMPLING), np.float32) / 255 for layer in (covered, canvas))
    return coverage, opacity


# ---- the background


def _background(retina: Retina, from_centre: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """The fundus without vessels, float32 [3, H, W], mostly within [0, 1]."""
    light = _light(retina, from_centre, rng)
    tint = np.exp(rng.normal(0, 0.09) + rng.normal(0, (0.04, 0.04, 0.08)))
    image = FUNDUS_COLOUR * _per_channel(*tint) * light
    macula = np.exp(-((retina.distance(retina.macula) / (rng.uniform(45, 70) * retina.unit)) ** 2))
    image *= 1 - macula * (MACULA_CONTRAST * rng.uniform(0.7, 1.1))
    image *= 1 - _spots(retina, int(rng.integers(8, 18)), 2, 7, rng) * LESION_CONTRAST
    image += _spots(retina, int(rng.integers(6, 20)), 1.5, 4, rng) * SPOT_GLOW
    from_disc = retina.distance(retina.disc) / retina.unit
    size = rng.uniform(34, 42)
    disc = (
        1
        / (1 + np.exp(np.minimum((from_disc - size) / 2.5, 50)))
        * (0.75 + 0.25 * np.exp(-((from_disc / (0.6 * size)) ** 2)))
    )
    image += disc * (DISC_GLOW * rng.uniform(0.8, 1.1))
    return image


def _light(retina: Retina, from_centre: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Brightness relative to the middle of a photograph, float32 [H, W]: illumination and pigment."""
    size = retina.height, retina.width
    hot_spot = retina.centre + rng.uniform(-0.4, 0.4, 2) * retina.radius
    light = 1 - rng.uniform(0.14, 0.24) * (retina.distance(hot_spot) / retina.radius) ** 2
    light *= 1 - rng.uniform(0.15, 0.35) * np.clip(from_centre / retina.radius, 0, 1) ** 12
    for cell, amplitude in ((180, 0.07), (45, 0.045), (14, 0.025)):
        light += amplitude * rng.uniform(0.7, 1.3) * _smooth_field(*size, max(cell * retina.unit, 1.0), rng)
    return np.clip(light, 0.2, None)


def _spots(retina: Retina, count: int, smallest: float, largest: float, rng: np.random.Generator) -> np.ndarray:
    """Soft, nearly round spots, strength in [0, 1], float32 [H, W]; radii in units."""
    layer = Image.new("L", (retina.width, retina.height))
    draw = ImageDraw.Draw(layer)
    for _ in range(count):
        angle, distance = rng.uniform(0, 2 * math.pi), retina.radius * math.sqrt(rng.random()) * 0.95
        middle = retina.centre + distance * np.array([math.cos(angle), math.sin(angle)])
        radii = rng.uniform(smallest, largest) * rng.uniform(0.7, 1.3, 2) * retina.unit
        draw.ellipse([*(middle - radii), *(middle + radii)], fill=int(rng.integers(110, 256)))
    return np.array(layer.filter(ImageFilter.GaussianBlur(retina.unit)), np.float32) / 255
