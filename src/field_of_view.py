"""A photograph of the retina -> its field of view: the part of the frame that the round mask of the camera leaves open.

The mask is taken for a disc, or an ellipse of little eccentricity, that the frame or bars may cut off along straight
lines. Its rim is a step in brightness or colour all along the ellipse. The search works on logarithms of the levels, so
that the rim of a dark retina counts as much as that of a bright one:

1. Bars are cut off: rows and columns where the picture steps along the whole length of the frame.
2. Ellipses through triples of edge points are scored on a small picture (RANSAC: Fischler and Bolles 1981).
3. The best one is fitted to the steps found along its normals, with outliers weighted down (Tukey's biweight).
4. It counts if the colours differ across it, and if they hardly change along its outer side.
5. The disc may be cut off along straight lines: rows and columns that step along the whole chord.

An ellipse is an array [4]: the centre x, y and the half-axes a, b along x and y. Pixel i reaches from i to i + 1.
"""

import math
from dataclasses import dataclass

import numpy as np
from PIL import Image

DRIVE_FOV_DIAMETER = 540.0  # pixels across the field of view of DRIVE's photographs, from 536 to 541

# Sizes of the pictures that are searched.
SMALLEST_SIDE = 32  # pixels; smaller photographs are taken whole
FINE_SIDE = 1000  # pixels of the longer side, for the fit: a rim is found to a thousandth of the photograph
COARSE_SIDE = 320  # pixels of the longer side, for the search: a rim is still sharp, and vessels fade
DARK_LEVEL = 24  # levels of 255: differences far below count linearly, as the noise of black surroundings should

# The search. Limits are in logarithms of levels, lengths in radii.
LEAST_EDGE = 0.05  # gradient of an edge, per pixel; chosen by trial, not swept
EDGES_PER_LINE = 3  # taken from either end of a row or column: the rim is seldom behind more (bars, text, a glow)
TRIPLES = 12000  # of edge points; if one point in ten lies on the rim, twelve triples do
ALIGNMENT = 0.93  # least cosine between the gradient of an edge point and the normal of its ellipse
COARSE_ANGLES = 96
LEAST_SUPPORT = 0.45  # share of an arc that must be edge for the arc to count in favour
COST_OUTSIDE = 0.15  # of an edge pixel outside, in pixels of arc: three pixels across, a missed rim costs half its arc
LEAST_SCORE = 0.2  # of a circle; disc_hemo_h0156, of which two corners show, has 0.21, ARIA 0.7 and more
LEAST_STRETCHED_SCORE = 0.8  # of another ellipse; in close-ups of synthetic photographs it reached 0.61
STRETCHED_GAIN = 1.3  # by which another ellipse must surpass the circle
ASPECTS = (0.75, 0.82, 0.9, 1.1, 1.22, 1.33)  # of ellipses tried where no good circle is found: 4:3 made square
GOOD_SHARE, GOOD_SCORE = 0.75, 1.2  # of a circle that is taken at once

# The fit.
FIT_ANGLES = 360
FIT_REACHES = 0.06, 0.03, 0.015  # radii to look for the rim on either side, one pass each
FIT_WINDOW = 4  # samples on either side of a step, of 1/400 radius or half a pixel each
FIT_SPREAD = 0.004  # radii; a rim farther from the fit is an outlier (tabs, text, a dark retina)
FIT_RIDGE = 0.5, 0.5, 0.1, 10.0  # weights against moving, growing and stretching on the word of few rim points

# The rim. Of 465 true ones (DRIVE, HRF, ARIA, 39 other cameras, imitations), the contrast was 0.28 and more. In all but
# two it was 4.1 times the change along the outside and more. Of 105 ellipses in close-ups, five pass both limits, four
# of them with too low a score.
RING = 0.012, 0.03  # radii from the rim between which the colours on either side are taken
LEAST_CONTRAST = 0.25
CLEAR_CONTRAST = 3.8
SMALLEST_CHANGE = 0.02  # added to the change along the outside: that of surroundings without any noise

# Straight cuts.
BLOCK = 16  # pixels along a cut that are averaged, against noise
BAR_STEP = 0.15  # least step
BAR_NOISE = 3  # least step, in medians of the steps elsewhere
BAR_SHARE = 0.85  # of a chord that must step
LEAST_CHORD = 0.25  # of the longest chord: along shorter ones, the rim itself looks straight
LEAST_LEFT = 1 / 6  # of the frame that two cuts leave; what leaves less is the line between two pictures in one

# Two discs in one picture.
SPLIT_FRAME, SPLIT_DISC = 1.2, 1.45  # least sides' ratio of a frame without a rim, and of the box around an ellipse
LARGEST_SEAM = 0.85  # of a disc's height at the line between the two; their frames may have cut them off there


@dataclass(frozen=True)
class _Edges:
    """The edges of a small picture."""

    gradient_x: np.ndarray  # [h, w, 3]
    gradient_y: np.ndarray  # [h, w, 3]
    size: np.ndarray  # [h, w], of the gradient in the channel where it is largest
    threshold: float  # size from which on a pixel counts as an edge
    points: np.ndarray  # [n, 2], x and y of the edge points next to the frame
    normals: np.ndarray  # [n, 2], their gradients of length 1


def find_field_of_view(photograph: np.ndarray) -> np.ndarray:
    """Find the field of view of a photograph, uint8 [H, W, 3], as bool [H, W].

    The surroundings may have any colours, noise, scattered light and text in them; tabs at the rim are left out. The
    disc may be cut off by the frame or by bars on any side. Where no rim is found, it is the whole frame.
    """
    height, width = photograph.shape[:2]
    if min(height, width) < SMALLEST_SIDE:
        return np.ones((height, width), bool)
    shrink = math.ceil(max(height, width) / FINE_SIDE)
    image = _reduced(photograph, shrink)
    strips = _log(image.reduce((1, BLOCK))).transpose(1, 0, 2), _log(image.reduce((BLOCK, 1)))  # [w, h / BLOCK, 3], ...
    everything = np.array([image.width / 2, image.height / 2, np.inf, np.inf])
    box = _straight_cuts(strips, everything)
    rough = _search(image.crop(tuple(box)))
    if rough is not None:
        rough = _moved(rough, box[:2])
        cuts = _straight_cuts(strips, rough)
        inner = np.concatenate([np.maximum(box[:2], cuts[:2]), np.minimum(box[2:], cuts[2:])])
        picture = _log(image.crop(tuple(inner)))
        ellipse = _fitted(picture, _moved(rough, -inner[:2]))
        if _is_rim(picture, ellipse):
            return _drawn(_moved(ellipse, inner[:2]) * shrink, inner * shrink, height, width)
    return _drawn(everything, box * shrink, height, width)


def field_of_view_diameter(field_of_view: np.ndarray) -> float:
    """The diameter in pixels of a field of view, bool [H, W]: the longer side of the box around it, 0 if it is empty.

    A disc that the frame cuts off at the top and bottom keeps its width, so this is its true diameter. Rows and columns
    with less than a hundredth of the fullest one do not count: specks beside the disc must not make it larger.
    """
    # Along columns in uint8, which is five times as quick, and which 255 rows cannot exceed.
    parts = [field_of_view[top : top + 255].sum(axis=0, dtype=np.uint8) for top in range(0, len(field_of_view), 255)]
    sides = []
    for counts in (np.sum(parts, axis=0, dtype=np.uint32), field_of_view.sum(axis=1, dtype=np.uint32)):
        reached = np.flatnonzero(counts > counts.max() / 100)
        sides.append(reached[-1] - reached[0] + 1 if len(reached) else 0)
    return float(max(sides))


def is_rectangle(retina: np.ndarray) -> bool:
    """Whether a field of view fills the box around it: then no round border was found in the photograph."""
    rows, columns = np.count_nonzero(retina.any(axis=1)), np.count_nonzero(retina.any(axis=0))
    return bool(np.count_nonzero(retina) == rows * columns)


def shows_two_discs(photograph: np.ndarray, retina: np.ndarray) -> bool:
    """Whether a photograph, uint8 [H, W, 3], holds two discs side by side, or one above the other.

    Args:
        photograph: from `read_photograph`.
        retina: what was found in it, bool [H, W]: one of the discs, an ellipse around both, or the whole frame.
    """
    rows, columns = np.flatnonzero(retina.any(axis=1)), np.flatnonzero(retina.any(axis=0))
    if len(rows) == 0:
        return False
    shrink = math.ceil(max(retina.shape) / FINE_SIDE)
    picture = np.asarray(_reduced(photograph, shrink))
    top, bottom, left, right = (int(value) // shrink for value in (rows[0], rows[-1] + 1, columns[0], columns[-1] + 1))
    height, width = bottom - top, right - left
    no_rim = is_rectangle(retina)
    if max(height, width) > (SPLIT_FRAME if no_rim else SPLIT_DISC) * min(height, width):
        box = picture[top:bottom, left:right]
        return _splits_into_discs(box if width > height else box.transpose(1, 0, 2))
    if no_rim:
        return False
    beside = picture[:, :left], picture[:, right:], picture[:top], picture[bottom:]
    return any(min(part.shape[:2]) > min(height, width) / 2 and _holds_disc(part) for part in beside)


def _splits_into_discs(picture: np.ndarray) -> bool:
    """Whether a picture, uint8 [h, w, 3], holds one disc on either side of the column where they would meet.

    That is the most even column, or the middle one.
    """
    if picture.shape[0] == 0 or picture.shape[1] < 3:
        return False
    third = picture.shape[1] // 3
    levels = picture[:, third:-third].astype(np.float32)
    between = third + int(np.abs(levels - np.median(levels, axis=0)).mean(axis=(0, 2)).argmin())
    return any(
        _holds_disc(picture[:, :column]) and _holds_disc(picture[:, column:][:, ::-1])
        for column in (between, picture.shape[1] // 2)
    )


def _holds_disc(picture: np.ndarray) -> bool:
    """Whether a picture, uint8 [h, w, 3], holds a disc that is not the rest of one beyond its right side."""
    heights = np.count_nonzero(disc := find_field_of_view(picture), axis=0)
    return not disc.all() and heights[-1] < LARGEST_SEAM * heights.max()


def shrunk(photograph: np.ndarray, factor: int) -> np.ndarray:
    """A photograph, uint8 [H, W, 3], with the mean of `factor` x `factor` pixels in one; with 1 itself."""
    if factor == 1:
        return photograph
    height, width = (math.ceil(side / factor) for side in photograph.shape[:2])
    small = np.empty((height, width, 3), np.uint8)
    # In parts: Pillow copies what it is given, and fresh memory for a large photograph takes longer than the rest.
    rows = 64
    for top in range(0, height, rows):
        part = Image.fromarray(photograph[top * factor : (top + rows) * factor])
        small[top : top + rows] = np.asarray(part.reduce(factor))
    return small


def _reduced(photograph: np.ndarray, factor: int) -> Image.Image:
    return Image.fromarray(shrunk(photograph, factor))


def _log(image: Image.Image) -> np.ndarray:
    """Logarithms of the levels, float32 [h, w, 3]."""
    logarithms = np.log1p(np.arange(256, dtype=np.float32) / DARK_LEVEL)
    return logarithms.take(np.asarray(image), mode="clip")  # all levels are in range, and so numpy need not look


def _moved(ellipse: np.ndarray, offset: np.ndarray) -> np.ndarray:
    return ellipse + (*offset, 0, 0)


def _search(image: Image.Image) -> np.ndarray | None:
    """The ellipse with the best score: a circle, if that is good."""
    shrink = math.ceil(max(image.size) / COARSE_SIDE)
    edges = _find_edges(_log(image.reduce(shrink)))
    if len(edges.points) < 3:
        return None
    circle, score, share = _best_ellipse(edges, 1.0, TRIPLES)
    if share <= GOOD_SHARE or score <= GOOD_SCORE:
        circle, score, _ = _best_ellipse(edges, 1.0, 3 * TRIPLES)
        found = [_best_ellipse(edges, aspect, TRIPLES)[:2] for aspect in ASPECTS]
        stretched, stretched_score = max(found, key=lambda pair: pair[1])
        if stretched_score > max(LEAST_STRETCHED_SCORE, STRETCHED_GAIN * score):
            return stretched * shrink
    return circle * shrink if score > LEAST_SCORE else None


def _find_edges(picture: np.ndarray) -> _Edges:
    """Sobel's gradient of a picture [h, w, 3], and its maxima next to the frame."""
    padded = np.pad(picture, [(1, 1), (1, 1), (0, 0)], mode="edge")
    down = padded[:-2] + 2 * padded[1:-1] + padded[2:]  # [h, w + 2, 3]
    across = padded[:, :-2] + 2 * padded[:, 1:-1] + padded[:, 2:]  # [h + 2, w, 3]
    gradient_x, gradient_y = (down[:, 2:] - down[:, :-2]) / 4, (across[2:] - across[:-2]) / 4
    squares = gradient_x**2 + gradient_y**2
    channel = squares.argmax(axis=2)[..., None]
    size, x, y = (np.take_along_axis(of, channel, 2)[..., 0] for of in (squares, gradient_x, gradient_y))  # [h, w]
    size = np.sqrt(size)
    threshold = max(LEAST_EDGE, 2 * float(np.median(size)))
    around = np.pad(size, 1, mode="edge")
    peak_in_row = (size >= around[1:-1, :-2]) & (size > around[1:-1, 2:])
    peak_in_column = (size >= around[:-2, 1:-1]) & (size > around[2:, 1:-1])
    peak = np.where(np.abs(x) > np.abs(y), peak_in_row, peak_in_column) & (size > threshold)
    peak[[0, -1]] = peak[:, [0, -1]] = False
    first = np.zeros(peak.shape, np.int8)  # [h, w]
    for axis in (0, 1):
        rank = peak.cumsum(axis, dtype=np.int32)
        rank = np.minimum(rank, rank.max(axis, keepdims=True) + 1 - rank)
        first = np.maximum(first, EDGES_PER_LINE + 1 - rank)
    # The first edges count twice when triples are drawn: most often they are the rim.
    at = tuple(
        np.concatenate(ends)
        for ends in zip(*(np.nonzero(peak & (first > rank)) for rank in (0, EDGES_PER_LINE - 1)), strict=True)
    )
    points, normals = np.stack(at[::-1], axis=1) + 0.5, np.stack([x[at], y[at]], axis=1) / size[at][:, None]
    return _Edges(gradient_x, gradient_y, size, threshold, points, normals)


def _best_ellipse(edges: _Edges, aspect: float, triples: int) -> tuple[np.ndarray | None, float, float]:
    """The ellipse of a / b = `aspect` with the best score, this score, and the share of its arc that is edge."""
    ellipses = _through_triples(edges, aspect, triples)
    if len(ellipses) == 0:
        return None, -math.inf, 0.0
    supported, visible = _arcs(ellipses, edges)
    gain = supported - LEAST_SUPPORT * visible
    promising = np.argsort(-gain, kind="stable")[: triples // 20]
    scores = gain[promising] - COST_OUTSIDE * _edges_outside(ellipses[promising], edges)
    best = promising[scores.argmax()]
    return ellipses[best], float(scores.max()), float(supported[best] / max(visible[best], 1e-9))


def _through_triples(edges: _Edges, aspect: float, triples: int) -> np.ndarray:
    """Ellipses [n, 4] through three edge points whose gradients point along the normals."""
    height, width = edges.size.shape
    chosen = np.random.default_rng(0).integers(0, len(edges.points), (triples, 3))
    first, second, third = (edges.points / (aspect, 1))[chosen.T]  # [triples, 2] each
    u, v = second - first, third - first
    cross = u[:, 0] * v[:, 1] - u[:, 1] * v[:, 0]
    cross = np.where(cross == 0, 1e-9, cross)
    uu, vv = (u**2).sum(axis=1), (v**2).sum(axis=1)
    offset = np.stack([v[:, 1] * uu - u[:, 1] * vv, u[:, 0] * vv - v[:, 0] * uu], axis=1) / (2 * cross[:, None])
    radius, centre = np.hypot(*offset.T), (first + offset) * (aspect, 1)
    possible = (radius > 0.25 * min(height, width)) & (radius < 1.5 * max(height, width))
    possible &= ((centre > 0) & (centre < (width, height))).all(axis=1)
    chosen, radius, centre = chosen[possible], radius[possible], centre[possible]
    outward = (edges.points[chosen] - centre[:, None]) / (aspect**2, 1)  # [n, 3, 2]
    cosine = (outward * edges.normals[chosen]).sum(axis=2) / np.hypot(outward[..., 0], outward[..., 1])
    ellipses = np.stack([*centre.T, radius * aspect, radius], axis=1)
    return ellipses[(np.abs(cosine) > ALIGNMENT).all(axis=1)]


def _arcs(ellipses: np.ndarray, edges: _Edges) -> tuple[np.ndarray, np.ndarray]:
    """Of each of the ellipses [n, 4], the length of the arcs that are edges and that are in the frame, in half-axes."""
    height, width = edges.size.shape
    cos, sin = (values.astype(np.float32) for values in _cos_sin(COARSE_ANGLES))
    x0, y0, a, b = ellipses.T[..., None].astype(np.float32)  # [n, 1] each
    x, y = x0 + a * cos, y0 + b * sin  # [n, A]
    visible = (x > 1) & (x < width - 1) & (y > 1) & (y < height - 1)
    at = y.clip(0, height - 1).astype(np.intp), x.clip(0, width - 1).astype(np.intp)
    length = np.hypot(b * cos, a * sin)
    normal_x, normal_y = (b * cos / length)[..., None], (a * sin / length)[..., None]
    step = _largest(np.abs(edges.gradient_x[at] * normal_x + edges.gradient_y[at] * normal_y))
    arc = np.where(visible, length * (2 * np.pi / COARSE_ANGLES) / b, 0)
    support = np.minimum(step / (2 * edges.threshold), 1)
    return (support * arc).sum(axis=1), arc.sum(axis=1)


def _edges_outside(ellipses: np.ndarray, edges: _Edges) -> np.ndarray:
    """The number of edge pixels outside each of the ellipses [n, 4], in half-axes b."""
    height, width = (side // 4 for side in edges.size.shape)  # of cells of four pixels: quick, and exact enough
    edge = np.clip(edges.size / edges.threshold - 1, 0, 1)[: 4 * height, : 4 * width]
    cells = edge.reshape(height, 4, width, 4).sum(axis=(1, 3))
    sums = np.pad(cells.cumsum(axis=1, dtype=np.float64), [(0, 0), (1, 0)])  # [height, width + 1]
    x0, y0, a, b = ellipses.T[..., None]  # [n, 1] each
    share = 1 - ((np.arange(height) * 4 + 2 - y0) / (b + 5)) ** 2  # [n, height]
    half = np.sqrt(np.maximum(share, 0)) * (a + 5)
    left, right = (x0 - half - 2) / 4, (x0 + half - 2) / 4  # of the ellipse, in cells from the middle of the first
    first, end = (np.clip(column, 0, width).astype(np.intp) for column in (np.ceil(left), np.floor(right) + 1))
    rows = np.arange(height)
    inside = np.where(share >= 0, sums[rows, end] - sums[rows, first], 0).sum(axis=1)
    return ((cells.sum() - inside) / b[:, 0]).astype(np.float32)


def _fitted(picture: np.ndarray, ellipse: np.ndarray) -> np.ndarray:
    """The ellipse moved, grown and stretched to fit the rim in a picture [h, w, 3]."""
    cos, sin = _cos_sin(FIT_ANGLES)
    for reach in FIT_REACHES:
        a, b = ellipse[2:]
        radius = (a + b) / 2
        normals = np.stack([b * cos, a * sin], axis=1) / np.hypot(b * cos, a * sin)[:, None]  # [A, 2]
        rim, weight = _rim_along_normals(picture, ellipse, normals, reach * radius)
        along_x, along_y = normals[:, 0] * cos, normals[:, 1] * sin
        design = np.stack([*normals.T, along_x + along_y, along_x - along_y], axis=1)  # [A, 4]
        dx, dy, growth, stretch = _robust_fit(design, rim, weight, reach * radius, FIT_SPREAD * radius)
        ellipse = ellipse + (dx, dy, growth + stretch, growth - stretch)
    return ellipse


def _rim_along_normals(
    picture: np.ndarray, ellipse: np.ndarray, normals: np.ndarray, reach: float
) -> tuple[np.ndarray, np.ndarray]:
    """How far outside an ellipse the rim lies along its normals [A, 2], in pixels [A], and what weight this has [A]."""
    unit = max(0.5, ellipse[2:].mean() / 400)
    count = math.ceil(reach / unit)
    offsets = np.arange(-count - FIT_WINDOW, count + FIT_WINDOW + 1) * unit
    cos, sin = _cos_sin(FIT_ANGLES)
    x = (ellipse[0] + ellipse[2] * cos)[:, None] + offsets * normals[:, :1]
    y = (ellipse[1] + ellipse[3] * sin)[:, None] + offsets * normals[:, 1:]
    colours, in_frame = _sampled(picture, x, y)  # [A, S, 3], [A, S]
    sums = np.pad(colours.cumsum(axis=1), [(0, 0), (1, 0), (0, 0)])
    means = (sums[:, FIT_WINDOW:] - sums[:, :-FIT_WINDOW]) / FIT_WINDOW
    steps = np.abs(means[:, FIT_WINDOW + 1 :] - means[:, : -FIT_WINDOW - 1])  # [A, 2 count + 1, 3]
    size = steps.max(axis=1)  # [A, 3]
    # The channels step at different radii, red most often farthest out, and there the retina ends.
    position = np.where(size >= size.max(axis=1, keepdims=True) / 2, steps.argmax(axis=1), 0).max(axis=1)
    usable = in_frame[:, FIT_WINDOW:].all(axis=1) & (position > 0) & (position < 2 * count)
    return (position - count) * unit, np.where(usable, np.minimum(size.max(axis=1) / (2 * LEAST_EDGE), 1) ** 2, 0)


def _robust_fit(
    design: np.ndarray, values: np.ndarray, weight: np.ndarray, spread: float, least_spread: float
) -> np.ndarray:
    """Least squares of `values` [A] on `design` [A, 4], reweighted with Tukey's biweight of an ever smaller spread."""
    solution = np.zeros(design.shape[1])
    for _ in range(12):
        residual = values - design @ solution
        trusted = design * (weight * np.maximum(1 - (residual / spread) ** 2, 0) ** 2)[:, None]
        solution = np.linalg.solve(trusted.T @ design + np.diag(FIT_RIDGE), trusted.T @ values)
        spread = max(least_spread, 0.8 * spread)
    return solution


def _is_rim(picture: np.ndarray, ellipse: np.ndarray) -> bool:
    """Whether the colours of a picture [h, w, 3] differ across an ellipse, and hardly change along its outer side.

    Vessels and the optic disc have edges along which an ellipse may run, but more retina with vessels lies behind.
    """
    cos, sin = _cos_sin(FIT_ANGLES)
    sides = []
    for sign in (-1, 1):
        scale = 1 + sign * np.linspace(max(RING[0], 1.5 / ellipse[2:].min()), max(RING[1], 6 / ellipse[2:].min()), 8)
        x, y = ellipse[0] + ellipse[2] * cos[:, None] * scale, ellipse[1] + ellipse[3] * sin[:, None] * scale
        colours, in_frame = _sampled(picture, x, y)
        sides.append(np.median(colours, axis=1))  # [A, 3]
    visible = in_frame.all(axis=1)
    inside, outside = sides
    neighbours = visible & np.roll(visible, 4)
    if not neighbours.any():
        return False
    contrast = np.median(np.abs(inside - outside).max(axis=1)[visible])
    change = np.percentile(np.abs(outside - np.roll(outside, 4, axis=0)).max(axis=1)[neighbours], 60)
    return bool(contrast > max(LEAST_CONTRAST, CLEAR_CONTRAST * (change + SMALLEST_CHANGE)))


def _straight_cuts(strips: tuple[np.ndarray, np.ndarray], ellipse: np.ndarray) -> np.ndarray:
    """The box (left, top, right, bottom) outside of which an ellipse is cut off, in pixels, whole numbers [4].

    Args:
        strips: the picture with its columns, and with its rows, averaged over BLOCK pixels: [w, h / BLOCK, 3] and
            [h, w / BLOCK, 3].
        ellipse: the disc; with infinite half-axes, it is the whole frame.
    """
    (left, right), (top, bottom) = _cuts(strips[0], *ellipse[[1, 0, 3, 2]]), _cuts(strips[1], *ellipse)
    return np.array([left, top, right, bottom])


def _cuts(strip: np.ndarray, x0: float, y0: float, a: float, b: float) -> tuple[int, int]:
    """The first and the end of the rows of a strip [h, blocks, 3] that hold a part of the ellipse."""
    height, blocks = strip.shape[:2]
    step = np.zeros((height, blocks), np.float32)  # between the two rows before and the two from this one on
    step[2:-1] = _largest(np.abs(strip[2:-1] + strip[3:] - strip[:-3] - strip[1:-2])) / 2
    chord = (
        np.abs((np.arange(blocks) + 0.5) * BLOCK - x0) < (0.96 * _half_chords(height, y0, a, b) - BLOCK / 2)[:, None]
    )
    length = chord.sum(axis=1)
    clear = chord & (step > max(BAR_STEP, BAR_NOISE * float(np.median(step))))
    found = (clear.sum(axis=1) > BAR_SHARE * length) & (length >= max(4, LEAST_CHORD * length.max()))
    total = (step * chord).sum(axis=1)
    rows, middle = np.flatnonzero(found), np.clip(y0, 0.2 * height, 0.8 * height)
    # A step shows in the rows around it, too; it is where it is largest.
    first, last = rows[rows < middle][-1:], rows[rows >= middle][:1]
    near = [np.arange(max(0, row - 3), min(height, row + 4)) for row in (*first, *last)]
    largest = [int(rows[total[rows].argmax()]) for rows in near]
    begin, end = largest[0] if len(first) else 0, largest[-1] if len(last) else height
    return (begin, end) if end - begin > LEAST_LEFT * height else (0, height)


def _half_chords(height: int, y0: float, a: float, b: float) -> np.ndarray:
    """Half the width [height] of an ellipse in the middle of every row, 0 outside of it."""
    share = 1 - ((np.arange(height) + 0.5 - y0) / b) ** 2
    return np.sqrt(np.maximum(share, 0)) * a if math.isfinite(a) else np.full(height, np.inf)


def _drawn(ellipse: np.ndarray, box: np.ndarray, height: int, width: int) -> np.ndarray:
    """The pixels, bool [height, width], whose centres lie in an ellipse and in a box (left, top, right, bottom)."""
    half = _half_chords(height, *ellipse[1:])
    start = np.rint(np.maximum(ellipse[0] - half, box[0])).clip(0, width).astype(int)
    end = np.rint(np.minimum(ellipse[0] + half, box[2])).clip(0, width).astype(int)
    mask = np.zeros((height, width), bool)
    for y in range(max(0, box[1]), min(height, box[3])):
        mask[y, start[y] : end[y]] = True
    return mask


def _cos_sin(count: int) -> tuple[np.ndarray, np.ndarray]:
    """Cosines and sines [count] of equally spaced angles."""
    angles = np.arange(count) * (2 * np.pi / count)
    return np.cos(angles), np.sin(angles)


def _largest(values: np.ndarray) -> np.ndarray:
    """The largest of the three channels [..., 3]: numpy's own maximum along a short last axis is slow."""
    return np.maximum(np.maximum(values[..., 0], values[..., 1]), values[..., 2])


def _sampled(picture: np.ndarray, x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Colours of a picture [h, w, 3] at points [...], interpolated bilinearly: [..., 3]; and which are in the frame."""
    height, width = picture.shape[:2]
    in_frame = (x > 0.5) & (x < width - 0.5) & (y > 0.5) & (y < height - 0.5)
    x, y = (x - 0.5).clip(0, width - 1), (y - 0.5).clip(0, height - 1)
    left, top = x.astype(np.intp), y.astype(np.intp)
    right, bottom = np.minimum(left + 1, width - 1), np.minimum(top + 1, height - 1)
    across, down = ((value - np.floor(value))[..., None].astype(np.float32) for value in (x, y))
    top, bottom = top * width, bottom * width
    pixels = picture.reshape(-1, 3)  # numpy takes its rows in a third of the time
    upper = pixels.take(top + left, axis=0) * (1 - across) + pixels.take(top + right, axis=0) * across
    lower = pixels.take(bottom + left, axis=0) * (1 - across) + pixels.take(bottom + right, axis=0) * across
    return upper * (1 - down) + lower * down, in_frame
