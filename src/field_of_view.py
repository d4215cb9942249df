"""A photograph -> its field of view: the part of the frame that shows the retina."""

from collections.abc import Iterable

import numpy as np
from PIL import Image

# Lengths are shares of the picture's.
SEARCH_SIDE = 1024  # pixels of the longer side during the search: a border is found to a thousandth of the picture
SMALLEST_SEARCHED = 32  # pixels; smaller pictures are taken whole
CORNER = 0.02  # side of the squares in the corners that tell the colour of the border
SAME_COLOUR = 16  # levels of 255 by which the corners of one border may differ
LEAST_CONTRAST = 10  # levels; what differs less from the border is border
RAYS = 720
RAY_STEP = 0.5  # pixels
EDGE = 0.02  # of the largest radius: the contrast must jump within this of the edge, on either side


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
    if min(height, width) < SMALLEST_SEARCHED:
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
