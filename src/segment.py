"""Segmentation of a photograph of any size by a model, with scaling, tiles and flips."""

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from .colours import ChannelNormalization, to_float
from .field_of_view import shrunk
from .photograph import LARGE, ROWS_AT_ONCE
from .places import Places

SMALLEST_INPUT = 16  # pixels; the least side of the U-Net's input
GRID = 32  # pixels; in tiles that begin at multiples of this, poolings group the same pixels as in the whole picture
SAME_SCALE = 0.05
LARGEST_SCALE = 4.0
# A photograph that would be shrunk by more than this, compared with the training photographs, is shrunk by the
# geometric mean of both: its fine vessels would be lost. Measured with models of DRIVE (any-camera, seeds 0 and 2):
# seen at 1.4 times the working size, HRF gains 0.009 of Dice if it is first brought to 1400 pixels across, and at
# twice the size 0.03 and more if it keeps its 3300. ARIA, of 741 (1.37 times DRIVE's), loses 0.015 at 1.4 times.
MORE_DETAIL = 1.5
LARGEST_RESIZED = 180_000_000  # pixels, as of the largest file that is read; more would have the process ended

# How fast the log-odds at which a vessel ends grow with the logarithm of the shrinking. Labels that were drawn in few
# pixels are wide for them, so a photograph that is shrunk to these pixels gets vessels that are too wide. Measured
# with the same models: the best log-odds for HRF are 1.1 to 1.5, whether it has 940, 1400 or 3300 pixels across, and
# for ARIA 0 to 0.25. This gives 0.5, 0.7, 1.2 and 0.35: more would suit HRF, and ARIA loses 0.001 to 0.002 by it.
WIDENING = 1.1

# Memory of a forward pass, measured on the U-Net: at most 43 bytes per pixel and channel at full resolution.
BYTES_PER_PIXEL_AND_CHANNEL = 43
LARGEST_WHOLE = 2 * 1024**3  # bytes; pictures that need more are cut into tiles
LARGEST_TILES = 1024**3  # bytes that a batch of tiles may need, besides the picture and its probabilities
SMALLEST_TILE = 128

FLIPS = ((), (-1,), (-2,), (-2, -1))
ONE_SIZE = (1.0,)  # the working size alone

# A network has the processor to itself, while other threads read, prepare and write photographs. Two that keep to half
# of its threads each run at once: then none waits for the other, and on two cores a folder takes a tenth less.
_THREADS, _NETWORKS = torch.get_num_threads(), Places(2)

Flip = tuple[int, ...]  # dimensions of [C, H, W] to mirror
FlippedTile = tuple[int, int, Flip]  # row and column of a tile, and its flip
Crop = Callable[[slice, slice], Tensor]  # rows and columns of an image -> the normalised part


@dataclass
class Votes:
    """How many of the views of a photograph show a vessel in each of its pixels; `segment` counts them.

    Attributes:
        count: float32 [h, w] of the resized photograph, on the CPU; None before.
        views: how many there are.
        of_sizes: whether they differ in size, and not by flips alone.
    """

    count: Tensor | None = None
    views: int = 0
    of_sizes: bool = False


def normalise(photograph: np.ndarray, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """Normalise a photograph, uint8 [H, W, 3], exactly as in training and evaluation: float32 [3, H, W]."""
    image = torch.from_numpy(photograph).permute(2, 0, 1).contiguous()
    return ChannelNormalization(mean, std)(to_float(image))


def match_scale(diameter: float, trained_diameter: float, trained_scale: float | None = None) -> float:
    """The scale at which a model is to see a photograph: its vessels are as wide as in the training photographs.

    A photograph of far more pixels than these had is seen larger, because its fine vessels would be lost: MORE_DETAIL.

    Args:
        diameter: of the photograph's field of view, pixels.
        trained_diameter: that of the training photographs.
        trained_scale: that these were resized by; None: unknown, and no photograph is seen larger.
    """
    scale = min(trained_diameter / diameter, LARGEST_SCALE) if diameter else 1.0  # more would add no detail
    if trained_scale is not None:
        scale *= math.sqrt(max(trained_scale / scale / MORE_DETAIL, 1.0))
    # Resampling blurs thin vessels, so small differences are ignored. Photographs of one camera differ by 1 or 2 %, and
    # a model that was trained at 0.5 to 1.2 times the size tolerates 5 %.
    return 1.0 if abs(scale - 1) <= SAME_SCALE else scale


def widening(scale: float, trained_scale: float | None) -> float:
    """What to subtract from the log-odds of a vessel, so that the vessels are as wide as in the photograph.

    Args:
        scale: that the photograph is resized by for the model.
        trained_scale: that the model's training photographs were resized by; None: unknown.

    Returns:
        0 where the photograph is shrunk no more than those.
    """
    if trained_scale is None or abs(scale / trained_scale - 1) <= SAME_SCALE:
        return 0.0
    return WIDENING * max(math.log(trained_scale / scale), 0.0)


def prepare_at_scale(
    photograph: np.ndarray,
    field_of_view: np.ndarray,
    scale: float,
    prepare: Callable[[np.ndarray, np.ndarray], np.ndarray] | None,
) -> np.ndarray:
    """A photograph, uint8 [H, W, 3], prepared for a model and resized by a factor: uint8 [scale * H, scale * W, 3].

    It is prepared in the smaller of the two sizes, because preparing a large photograph takes long.

    Args:
        field_of_view: bool [H, W].
        prepare: `src.colours.prepare` for a normalization; None: the photograph stays as it is.

    Raises:
        MemoryError: it would have more than LARGEST_RESIZED pixels.
    """
    size = _resized(photograph.shape[:2], scale)
    if scale < 1:
        photograph, field_of_view = _resize(photograph, size), nearest(field_of_view, size)
    if prepare is not None:
        photograph = prepare(photograph, field_of_view)
    return _resize(photograph, size) if scale > 1 else photograph


def _resized(size: Sequence[int], scale: float) -> tuple[int, int]:
    """(H, W) of a photograph after resizing."""
    height, width = size
    if (pixels := width * scale * height * scale) > LARGEST_RESIZED:
        raise MemoryError(f"{pixels / 1e6:.3g} megapixels at scale {scale:g}")
    return max(1, round(height * scale)), max(1, round(width * scale))


def _resize(photograph: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """A photograph, uint8 [H, W, 3], in another size (h, w); one far larger is first shrunk by a whole number."""
    height, width = photograph.shape[:2]
    factor = max(1, math.floor(0.64 * height / size[0]))  # to half as large again as what is wanted, or a little more
    box = (0, 0, width / factor, height / factor)
    # As the training preset resizes.
    return np.array(Image.fromarray(shrunk(photograph, factor)).resize(size[::-1], Image.Resampling.BILINEAR, box))


def nearest(mask: np.ndarray, size: Sequence[int]) -> np.ndarray:
    """A mask, bool [H, W], in another size (h, w)."""
    levels = Image.fromarray(mask.view(np.uint8))  # from a picture of one bit, true would not be 1 in memory
    return np.array(levels.resize((size[1], size[0]), Image.Resampling.NEAREST)) > 0


def resize_probabilities(probabilities: Tensor, size: Sequence[int]) -> Tensor:
    """Probabilities [N, C, h, w] of a resized photograph, at each pixel of the photograph itself: [N, C, H, W]."""
    if probabilities.shape[-2:] == tuple(size):
        return probabilities
    return F.interpolate(probabilities, tuple(size), mode="bilinear", antialias=True)


def narrowed(probabilities: Tensor, widened: float) -> Tensor:
    """Probabilities of vessels whose log-odds are lower by what `widening` gives."""
    if not widened:
        return probabilities
    # With one tensor besides, because every copy of a large photograph counts.
    either = (1 - probabilities).mul_(math.exp(widened)).add_(probabilities)
    return torch.div(probabilities, either, out=either)


def probabilities_in_parts(
    probabilities: Tensor, size: Sequence[int], widened: float = 0.0
) -> Iterator[tuple[slice, Tensor]]:
    """Probabilities [C, h, w] from `segment`, at each pixel of the photograph itself, whose size is (H, W).

    Those of a photograph of more than LARGE pixels come in parts, because all together they take gigabytes; unless it
    was enlarged for the model.

    Args:
        widened: see `narrowed`.

    Yields:
        rows of the photograph, and their probabilities, float64 [C, rows, W].
    """
    (h, _), (height, width) = probabilities.shape[-2:], size
    if height * width <= LARGE or h > height:
        yield slice(0, height), narrowed(resize_probabilities(probabilities[None], size)[0], widened)
        return
    for top in range(0, height, ROWS_AT_ONCE):
        rows = slice(top, min(top + ROWS_AT_ONCE, height))
        y = ((torch.arange(rows.start, rows.stop).double() + 0.5) * (h / height) - 0.5).clamp(0, h - 1)
        above, below = y.floor().long(), y.ceil().long()
        part = torch.lerp(probabilities[:, above], probabilities[:, below], (y - above)[:, None])  # [C, rows, w]
        yield rows, narrowed(resize_probabilities(part[None], (len(y), width))[0], widened)


def logits_of_size(logits: Tensor, size: Sequence[int]) -> Tensor:
    """Logits [N, C, h, w] of resized photographs for each pixel of the photographs themselves, [N, C, H, W].

    The probabilities are resized, as those of `segment` are, and their logarithms returned.
    """
    if logits.shape[-2:] == tuple(size):
        return logits
    return on_device_of(logits, resize_probabilities(in_float64(logits).softmax(dim=1), size).log())


def in_float64(logits: Tensor) -> Tensor:
    """In float64; where a device has none (MPS), on the CPU."""
    return (logits.cpu() if logits.device.type == "mps" else logits).double()


def on_device_of(logits: Tensor, values: Tensor) -> Tensor:
    """`values` of `in_float64(logits)`; where these went to the CPU, as float32 on the device of the logits."""
    return values if values.device == logits.device else values.float().to(logits.device)


def logits_in_tiles(model: nn.Module, images: Tensor, amp_dtype: torch.dtype | None = None) -> Tensor:
    """Logits [N, C, h, w] of normalised images [N, 3, h, w], which are cut into tiles where `segment` would do so.

    Of blended tiles there are only probabilities; their logarithms are returned, as float32.
    """
    height, width = images.shape[-2:]
    tile = _tile_for_memory(model, height, width, flips=1, batch_size=1)
    if tile >= max(height, width):
        return _logits(model, images, amp_dtype)

    def probabilities(image: Tensor) -> Tensor:
        return _blend(
            model, lambda rows, columns: image[:, rows, columns], (height, width), tile, FLIPS[:1], 1, amp_dtype
        )

    others = torch.stack([probabilities(image) for image in images])  # of the classes other than the background
    background = (1 - others.sum(dim=1, keepdim=True)).clamp(min=0)
    return torch.cat([background, others], dim=1).log().float().to(images.device)


def views(scales: Sequence[float]) -> list[tuple[float, Flip]]:
    """What predictions with test-time augmentation are averaged over.

    Args:
        scales: multiples of the model's working size. The model sees each once, mirrored in another way; if there is
            only one, in the four flips. (1, 1): in two flips.

    Returns:
        each size that the model sees, as a share of the largest, with its flip.
    """
    if len(scales) == 1:
        return [(1.0, flip) for flip in FLIPS]
    return [(scale / max(scales), FLIPS[turn % len(FLIPS)]) for turn, scale in enumerate(scales)]


def at_size(image: Tensor, share: float) -> Tensor:
    """Normalised images [N, C, H, W], resized to a share of their size."""
    if share == 1:
        return image
    size = [max(1, round(side * share)) for side in image.shape[-2:]]
    on_host = image.cpu() if image.device.type == "mps" else image  # which has no such kernel in every version
    return F.interpolate(on_host, size, mode="bilinear", antialias=True).to(image.device)


@torch.inference_mode()
def segment(
    model: nn.Module,
    photograph: np.ndarray,
    mean: Sequence[float],
    std: Sequence[float],
    *,
    tile: int | None = None,
    flips: bool = False,
    scales: Sequence[float] = ONE_SIZE,
    batch_size: int = 1,
    amp_dtype: torch.dtype | None = None,
    votes: Votes | None = None,
) -> Tensor:
    """The probabilities of all classes except the background, at each pixel of a photograph at the working scale.

    Args:
        model: in eval mode; [N, 3, H, W] -> {"out": logits [N, C, H, W]}.
        photograph: RGB, uint8 [H, W, 3].
        mean, std: the normalisation of the model's training photographs.
        tile: side in pixels of overlapping tiles; None: use tiles only where memory requires it.
        flips: average over the four flips of the picture, which takes four times as long; or over the `views` of
            several `scales`. The photograph has the largest of these sizes.
        batch_size: number of tiles or flips in one forward pass.
        amp_dtype: the lower precision of automatic mixed precision; None: float32 throughout.
        votes: where to count the views that show a vessel; None: nowhere.

    Returns:
        float64 [C - 1, H, W] on the CPU; for two classes, the vessels alone.
    """
    assert not model.training, "call model.eval() first"
    size, shown = photograph.shape[:2], views(scales) if flips else [(1.0, ())]

    def blend(crop: Crop, size: Sequence[int], turns: Sequence[Flip], votes: Votes | None = None) -> Tensor:
        side = _tile_for_memory(model, *size, len(turns), batch_size) if tile is None else tile
        return _blend(model, crop, size, side, turns, batch_size, amp_dtype, votes)

    halves = next(model.parameters()).device.type == "cpu" and 2 * torch.get_num_threads() <= _THREADS
    with _NETWORKS.taken(1 if halves else 2):
        if all(share == 1 for share, _ in shown):
            return blend(lambda *part: normalise(photograph[part], mean, std), size, [flip for _, flip in shown], votes)
        image = normalise(photograph, mean, std)[None]
        mean_of_views, count = 0, torch.zeros(size)
        for share, flip in shown:
            view = at_size(image, share)[0]
            found = blend(lambda rows, columns, view=view: view[:, rows, columns], view.shape[1:], [flip])
            found = resize_probabilities(found[None], size)[0]
            mean_of_views = mean_of_views + found / len(shown)
            count += found.sum(dim=0) > 0.5
        if votes is not None:
            votes.count, votes.views, votes.of_sizes = count, len(shown), True
        return mean_of_views


def _tile_for_memory(model: nn.Module, height: int, width: int, flips: int, batch_size: int) -> int:
    # Of the first convolution.
    channels = next((weight.shape[0] for weight in model.parameters() if weight.ndim == 4), 1)
    pixel = BYTES_PER_PIXEL_AND_CHANNEL * channels
    if min(flips, batch_size) * height * width * pixel <= LARGEST_WHOLE:
        return max(height, width)
    return max(math.isqrt(LARGEST_TILES // (batch_size * pixel)) // GRID * GRID, SMALLEST_TILE)


def _blend(
    model: nn.Module,
    crop: Crop,
    size: Sequence[int],
    tile: int,
    turns: Sequence[Flip],
    batch_size: int,
    amp_dtype: torch.dtype | None,
    votes: Votes | None = None,
) -> Tensor:
    """Probabilities float64 [C - 1, H, W] of an image of `size` (H, W), whose normalised parts `crop` gives."""
    rows, columns = (_overlapping_spans(length, tile) for length in size)
    blended = None
    if votes is not None:
        votes.count, votes.views = torch.zeros(*size), len(turns)
    for batch in _batches(rows, columns, turns, batch_size):
        images = [crop(rows[row][0], columns[column][0]).flip(flip) for row, column, flip in batch]
        probabilities = _forward(model, torch.stack(images), amp_dtype)  # [N, C - 1, h, w]
        if blended is None:
            blended = probabilities.new_zeros(probabilities.shape[1], *size)
        for (row, column, flip), probability in zip(batch, probabilities, strict=True):
            (vertical, row_weight), (horizontal, column_weight) = rows[row], columns[column]
            probability = probability.flip(flip)
            blended[:, vertical, horizontal] += probability * row_weight[:, None] * column_weight
            if votes is not None:
                vote = (probability.sum(dim=0) > 0.5) * row_weight[:, None] * column_weight
                votes.count[vertical, horizontal] += vote
    return blended.div_(len(turns))


def _overlapping_spans(length: int, tile: int) -> list[tuple[slice, Tensor]]:
    """The tiles along one side of a picture, with their blending weights [span], which add up to 1 everywhere."""
    if length < tile + GRID:  # the last tile may be larger by up to GRID
        return [(slice(0, length), torch.ones(length, dtype=torch.float64))]
    overlap = tile // 4
    step = max((tile - overlap) // GRID, 1) * GRID
    last = (length - tile) // GRID * GRID
    count = math.ceil(last / step) + 1
    starts = [i * last // (count - 1) // GRID * GRID for i in range(count)]
    spans = [slice(start, start + tile) for start in starts[:-1]] + [slice(starts[-1], length)]
    shares = torch.zeros(count, length, dtype=torch.float64)
    for share, span in zip(shares, spans, strict=True):
        size = span.stop - span.start
        # A tile is least reliable at its rim: its weight rises from the rim inwards, over half of the overlap.
        distance = torch.minimum(torch.arange(1, size + 1), torch.arange(size, 0, -1))
        share[span] = (distance - overlap / 4).clamp(min=1e-3, max=overlap / 2)
    shares /= shares.sum(dim=0)
    return [(span, share[span]) for share, span in zip(shares, spans, strict=True)]


def _batches(rows: list, columns: list, turns: Sequence[Flip], batch_size: int) -> Iterator[list[FlippedTile]]:
    """All tiles in all flips; the tiles of a batch have the same shape."""

    def shape(tile: FlippedTile) -> tuple[int, int]:
        row, column, _ = tile
        return len(rows[row][1]), len(columns[column][1])

    tiles = sorted(itertools.product(range(len(rows)), range(len(columns)), turns), key=shape)
    for _, alike in itertools.groupby(tiles, key=shape):
        while batch := list(itertools.islice(alike, batch_size)):
            yield batch


def _forward(model: nn.Module, images: Tensor, amp_dtype: torch.dtype | None) -> Tensor:
    """Probabilities float64 [N, C - 1, H, W], on the CPU, of normalised images [N, 3, H, W]."""
    logits = _logits(model, images.to(next(model.parameters()).device), amp_dtype)
    # In float64, so that "above 0.5" is exactly the argmax: float32 rounds nearly equal logits to 0.5.
    return logits.cpu().double().softmax(dim=1)[:, 1:]


def _logits(model: nn.Module, images: Tensor, amp_dtype: torch.dtype | None) -> Tensor:
    """Logits [N, C, h, w] of normalised images [N, 3, h, w], which are padded where the model needs more pixels."""
    height, width = images.shape[-2:]
    padding = [0, max(SMALLEST_INPUT - width, 0), 0, max(SMALLEST_INPUT - height, 0)]
    with torch.autocast(images.device.type, dtype=amp_dtype, enabled=amp_dtype is not None):
        return model(F.pad(images, padding))["out"][..., :height, :width]
