"""Any image file -> an RGB photograph and its field of view: the part of the frame that shows the retina."""

import glob
import math
import os
import warnings
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageFilter, ImageOps, UnidentifiedImageError
from torchvision.transforms.v2 import functional as F

IMAGE_SUFFIXES = frozenset((".tif", ".tiff", ".png", ".jpg", ".jpeg", ".gif", ".bmp", ".ppm", ".pgm", ".webp"))

# How the field of view is looked for; the lengths are shares of the picture's.
SEARCH_SIDE = 1024  # pixels of the longer side while searching: a border is found to a thousandth of the picture
SMALLEST_SIDE = 32  # pixels; smaller pictures are taken whole
CORNER = 0.02  # side of the squares in the corners that tell the colour of the border
SAME_COLOUR = 16  # levels of 255 by which the corners of one border may differ
DARK = 40  # levels; surroundings up to this pass for black
LEAST_CONTRAST = 10  # levels; what differs less from the border is border
RAYS = 720
RAY_STEP = 0.5  # pixels
EDGE = 0.02  # of the largest radius: the contrast must jump within this of the edge, on either side

LIGHT_SIGMA = 1 / 18  # of the field of view's diameter: of the Gaussian whose mean is the light of a place


class PhotographError(ValueError):
    """An image file cannot be used as a photograph; the message names it, what was found and what to do."""


def read_photograph(path: str | Path) -> np.ndarray:
    """Decode an image file of any format and mode that Pillow knows as RGB, uint8 [H, W, 3], the way up it is shown.

    16-bit and floating-point greys are brought to 8 bits; transparent parts become black, as outside the field of view.

    Raises:
        PhotographError: no such file, no image, a damaged one, or one of more than about 180 megapixels.
    """
    try:
        with warnings.catch_warnings():
            # Pillow warns of odd metadata, and from 90 megapixels on; it refuses from 180.
            warnings.simplefilter("ignore")
            with Image.open(path) as image:
                return np.array(_to_rgb(ImageOps.exif_transpose(image)))
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


def _to_rgb(image: Image.Image) -> Image.Image:
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
        found = [file for match in matches for file in (_images_in(match) if match.is_dir() else [match])]
        if not found:
            endings = ", ".join(sorted(IMAGE_SUFFIXES))
            raise PhotographError(f"{name}: no photographs there; looked for files that end in {endings}")
        photographs |= {os.path.abspath(file): file for file in found}
    return list(photographs.values())


def _images_in(folder: Path) -> list[Path]:
    # Archives made on a Mac hold "._name" companions.
    return sorted(
        file
        for file in folder.iterdir()
        if file.suffix.lower() in IMAGE_SUFFIXES and not file.name.startswith(".") and file.is_file()
    )


def field_of_view_diameter(field_of_view: np.ndarray) -> float:
    """The diameter in pixels of a field of view, bool [H, W]: the longer side of the box around it, 0 if it is empty.

    A disc that the frame cuts off at the top and bottom keeps its width, so this is its true diameter. Rows and columns
    with less than a hundredth of the fullest one do not count: specks beside the disc must not make it larger.
    """
    sides = []
    for axis in (0, 1):
        counts = np.count_nonzero(field_of_view, axis=axis)
        reached = np.flatnonzero(counts > counts.max() / 100)
        sides.append(reached[-1] - reached[0] + 1 if len(reached) else 0)
    return float(max(sides))


def find_field_of_view(photograph: np.ndarray) -> np.ndarray:
    """Find the field of view of a photograph, uint8 [H, W, 3], as bool [H, W].

    The border around it may have any one colour and hold text. The field of view may be cut off by the frame or by
    bars, but is taken to be convex. Where no border is found, it is the whole frame.
    """
    height, width = photograph.shape[:2]
    whole = np.ones((height, width), bool)
    if min(height, width) < SMALLEST_SIDE:
        return whole
    shrink = max(1.0, max(height, width) / SEARCH_SIDE)
    size = max(1, round(width / shrink)), max(1, round(height / shrink))
    small = np.array(Image.fromarray(photograph).resize(size, Image.Resampling.BOX)) if shrink > 1 else photograph
    outline = _find_outline(small)
    if outline is None:
        return whole
    x, y = ((np.arange(length) + 0.5) / length * side for length, side in zip((width, height), size, strict=True))
    top, bottom = (np.interp(x, *chain.T, left=np.nan, right=np.nan) for chain in outline)  # [W]
    return (y[:, None] >= top) & (y[:, None] <= bottom)


def blacken_bright_surroundings(photograph: np.ndarray, field_of_view: np.ndarray) -> np.ndarray:
    """A photograph, uint8 [H, W, 3], with black around its field of view, bool [H, W], if there was one bright colour.

    Training photographs are black there, and next to white a model misses vessels. Dark surroundings stay as they are,
    and so does the retina around a mask of a part of it.
    """
    surroundings = photograph[~field_of_view]  # [pixels, 3]
    if len(surroundings) == 0:
        return photograph
    colour = np.median(surroundings, axis=0)
    if colour.max() <= DARK or np.percentile(np.abs(surroundings - colour).max(axis=1), 75) > SAME_COLOUR:
        return photograph
    # At the rim the two mix, over more pixels in a larger photograph.
    rim = 1 + round(field_of_view_diameter(field_of_view) / 500)
    inner = Image.fromarray(field_of_view.astype(np.uint8)).filter(ImageFilter.MinFilter(2 * rim + 1))
    return np.where(np.array(inner)[:, :, None] > 0, photograph, 0).astype(np.uint8)


def channel_statistics(photograph: np.ndarray, field_of_view: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Channel means and standard deviations, float64 [3] each in [0, 1], inside a field of view, bool [H, W]."""
    # By the share of each of the 256 levels: eight bytes for every pixel of a large photograph would be gigabytes.
    levels = np.arange(256) / 255
    inside = photograph[field_of_view]  # [pixels, 3]
    shares = [np.bincount(inside[:, channel], minlength=256) / len(inside) for channel in range(3)]
    mean = np.array([share @ levels for share in shares])
    variance = [share @ (levels - centre) ** 2 for share, centre in zip(shares, mean, strict=True)]
    return mean, np.sqrt(variance)


def match_colours(
    photograph: np.ndarray,
    field_of_view: np.ndarray,
    mean: Sequence[float],
    std: Sequence[float],
    *,
    even_light: bool = False,
) -> np.ndarray:
    """A photograph, uint8 [H, W, 3], with the channel `mean` and `std` (in [0, 1]) inside its field of view.

    This makes photographs of any camera look alike: to normalise the result with `mean` and `std` is to normalise the
    photograph by its own, but for the values that leave the range of 8 bits. Outside the field of view it is black.
    With `even_light` every pixel is divided by the mean of its surroundings first, so that vessels in the dark and in
    the light look alike, too.
    """
    matched = np.zeros_like(photograph)
    for channel in range(3):
        grey = photograph[..., channel]
        values = grey[field_of_view] / np.float32(255)  # [pixels]
        if even_light:
            values /= np.maximum(_local_mean(grey, field_of_view)[field_of_view], 1 / 255)
        # Of a channel that is one grey all over, nothing is made.
        scale = std[channel] / max(float(values.std()), 1 / 255)
        levels = ((values - values.mean()) * scale + mean[channel]) * 255
        matched[..., channel][field_of_view] = np.rint(levels).clip(0, 255)
    return matched


def _local_mean(grey: np.ndarray, field_of_view: np.ndarray) -> np.ndarray:
    """The mean around each pixel of a grey picture, uint8 [H, W], weighted by a Gaussian: float32 [H, W] in [0, 1]."""
    sigma = LIGHT_SIGMA * field_of_view_diameter(field_of_view)  # pixels
    shrink = max(1.0, sigma / 4)
    height, width = grey.shape
    size = [max(1, round(height / shrink)), max(1, round(width / shrink))]
    parts = np.where(field_of_view, grey, np.uint8(0)), field_of_view.view(np.uint8) * np.uint8(255)
    parts = [F.resize(F.to_dtype(torch.from_numpy(part)[None], torch.float32, scale=True), size) for part in parts]
    radius = math.ceil(3 * sigma / shrink)
    padded = F.pad(torch.cat(parts), [radius] * 4)  # [2, small height, small width]
    total, weight = F.gaussian_blur(padded, 2 * radius + 1, sigma / shrink)[:, radius:-radius, radius:-radius]
    return F.resize((total / weight.clamp_min(1e-3))[None], [height, width])[0].numpy()


def prepare(photograph: np.ndarray, field_of_view: np.ndarray, checkpoint: Mapping[str, Any]) -> np.ndarray:
    """A photograph, uint8 [H, W, 3], as the model of a checkpoint is to see it: its surroundings and its colours.

    Args:
        photograph: as `read_photograph` gives it.
        field_of_view: where its retina is, bool [H, W].
        checkpoint: `mean`, `std` and `normalization` count: "dataset"; "photograph", which brings the photograph to
            this mean and std by its own; or "local", which evens out its light before that. Missing: "dataset".
    """
    normalization = checkpoint.get("normalization")
    if normalization in ("photograph", "local") and field_of_view.any():
        even_light = normalization == "local"
        return match_colours(photograph, field_of_view, checkpoint["mean"], checkpoint["std"], even_light=even_light)
    return blacken_bright_surroundings(photograph, field_of_view)


def _find_outline(photograph: np.ndarray) -> tuple[np.ndarray, np.ndarray] | None:
    """The upper and lower edge of the field of view, points (x, y) [n, 2] from left to right; None if there is none.

    Pixel i reaches from i to i + 1.
    """
    border = _border_colour(photograph)
    if border is None:
        return None
    contrast = np.abs(photograph - border).max(axis=2)  # [H, W]
    lit = contrast[contrast > LEAST_CONTRAST]
    if lit.size < 0.05 * contrast.size:
        return None
    typical = np.median(lit)
    foreground = contrast > max(LEAST_CONTRAST, 0.25 * typical)
    rows, columns = np.nonzero(foreground)
    centre = np.array([np.median(columns), np.median(rows)]) + 0.5
    farthest = np.hypot(*np.maximum(centre, foreground.shape[::-1] - centre))
    angles = np.arange(RAYS) * (2 * np.pi / RAYS)
    directions = np.stack([np.cos(angles), np.sin(angles)], axis=1)  # [R, 2]
    radii = np.arange(0, farthest, RAY_STEP)  # [S]
    points = np.floor(centre + radii[:, None] * directions[:, None]).astype(int)  # [R, S, 2]
    in_frame = ((points >= 0) & (points < (foreground.shape[1], foreground.shape[0]))).all(axis=2)  # [R, S]
    samples = points[..., 1].clip(0, foreground.shape[0] - 1), points[..., 0].clip(0, foreground.shape[1] - 1)

    # The border of a ray parts it best into foreground and background: dark spots inside and text outside are outvoted.
    votes = np.where(in_frame, np.where(foreground[samples], 1, -1), 0)
    reach = votes.cumsum(axis=1).argmax(axis=1)  # [R], index of the last sample inside
    frame = in_frame.sum(axis=1) - 1  # [R], index of the last sample in the frame
    margin = max(2, round(EDGE * reach.max()))
    free = reach < frame  # rays that meet the border before the frame
    if free.mean() < 0.02 or not _is_mask(contrast[samples][free], reach[free], frame[free], margin, typical):
        return None
    reach = np.where(free, reach, np.inf)
    reach = np.minimum(_running_median(reach), frame + 1)  # text or a tab at the rim is narrow
    return _convex_hull(centre + (reach[:, None] + 0.5) * RAY_STEP * directions)


def _border_colour(photograph: np.ndarray) -> np.ndarray | None:
    """The colour [3] that at least two corners of the picture are filled with, if there is one."""
    side = max(2, round(CORNER * min(photograph.shape[:2])))
    ends = slice(None, side), slice(-side, None)
    squares = [photograph[rows, columns].reshape(-1, 3) for rows in ends for columns in ends]
    colours = [np.median(square, axis=0) for square in squares]
    plain = [
        colour
        for colour, square in zip(colours, squares, strict=True)
        if np.percentile(np.abs(square - colour).max(axis=1), 80) <= SAME_COLOUR / 2
    ]
    groups = [[other for other in plain if np.abs(other - colour).max() <= SAME_COLOUR] for colour in plain]
    largest = max(groups, key=len, default=[])
    return np.median(largest, axis=0) if len(largest) >= 2 else None


def _is_mask(contrast: np.ndarray, reach: np.ndarray, frame: np.ndarray, margin: int, typical: float) -> bool:
    """Whether the contrast along rays [R, S] drops at once and to nothing beyond `reach`, as at a camera's mask.

    In a picture that the retina fills, plain dark corners may look like a border at first, but they fade gradually.
    The limits lie between the DRIVE photographs (0.64 and more; 0.05 and less) and cuttings of them (0.1 and more).
    """
    rays, steps = np.arange(len(reach)), np.arange(contrast.shape[1])
    jump = contrast[rays, (reach - margin).clip(min=0)] - contrast[rays, np.minimum(reach + margin, frame)]
    outside = contrast[(steps >= reach[:, None] + margin) & (steps <= frame[:, None])]
    return bool(outside.size and np.median(jump) > 0.45 * typical and np.median(outside) < 0.08 * typical)


def _running_median(values: np.ndarray, width: int = 9) -> np.ndarray:
    around = np.concatenate([values[-(width // 2) :], values, values[: width // 2]])
    return np.median(np.lib.stride_tricks.sliding_window_view(around, width), axis=1)


def _convex_hull(points: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The edges of least and of largest y of the convex hull, [n, 2] each (A. Andrew's monotone chain, 1979)."""

    def chain(ordered: Iterable[list[float]]) -> list[list[float]]:
        corners: list[list[float]] = []
        for x, y in ordered:
            while len(corners) > 1:
                (x0, y0), (x1, y1) = corners[-2:]
                if (x1 - x0) * (y - y0) > (y1 - y0) * (x - x0):
                    break
                corners.pop()
            corners.append([x, y])
        return corners

    ordered = sorted(points.tolist())
    return np.array(chain(ordered)), np.array(chain(reversed(ordered))[::-1])
