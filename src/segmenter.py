"""A photograph -> its vessels, by a model and what its file of weights tells of the preparation."""

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Integral
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from .colours import prepare
from .errors import DatasetError
from .field_of_view import field_of_view_diameter, find_field_of_view, is_rectangle, shows_two_discs
from .freed_memory import give_back_freed_memory
from .inference import for_inference
from .photograph import LARGE, read_photograph, to_rgb
from .reliability import agreement_of_views, expected_dice
from .roi_mask import whole_retina
from .segment import (
    ONE_SIZE,
    Votes,
    match_scale,
    narrowed,
    prepare_at_scale,
    probabilities_in_parts,
    resize_probabilities,
    segment,
    widening,
)
from .weights import Checkpoint, load_model, normalization_of

# Pixels; a photograph of more than LARGE takes so much memory itself that little is left for the network.
TILE_OF_LARGE = 448

# Shares of a field of view that a photograph without a border is tried as. Measured by `tests/close_up_study.py` with
# the weights in `pretrained`, on squares cut out of every fourth photograph of ARIA: mean Dice at the scale of the
# whole, at the chosen one, at the true one; and what the choice gains, with its standard error:
#     0.3 of the diameter     0.547    0.629    0.603    +0.081, 0.062
#     0.45                    0.662    0.666    0.694    +0.005, 0.005
#     0.65                    0.706    0.717    0.714    +0.011, 0.011
SHARES = (1.0, 0.7, 0.5, 0.35, 0.25)
CLEARLY = 0.01  # by which the agreement at another scale must be higher

PRETRAINED = Path(__file__).parents[1] / "pretrained" / "unet_fundus.pth"


@dataclass(frozen=True)
class Segmentation:
    """A photograph of H x W pixels and its vessels."""

    photograph: np.ndarray  # uint8 [H, W, 3]
    field_of_view: np.ndarray  # bool [H, W]
    diameter: float  # of the field of view, pixels
    scale: float  # that the photograph was resized by for the model
    # Float64 [C - 1, h, w] at that scale, or at the largest that they are a mean of; of all classes but the background.
    working_probabilities: Tensor
    widened: float  # by how much their log-odds are too high for the photograph itself, see `src.segment.widening`
    labels: np.ndarray  # uint8 [H, W]; 0 is the background and everything outside the field of view
    reliability: float | None  # the Dice that is expected, 0 to 1; None without flips, or of more than two classes

    @property
    def probabilities(self) -> Tensor:
        """Those of all classes except the background, float64 [C - 1, H, W]."""
        return narrowed(resize_probabilities(self.working_probabilities[None], self.labels.shape)[0], self.widened)

    @property
    def vessels(self) -> np.ndarray:
        """Where a vessel is, bool [H, W]; outside the field of view nowhere."""
        return self.labels > 0

    @property
    def vessel_share(self) -> float:
        """The share of the field of view that is vessel."""
        return np.count_nonzero(self.labels) / np.count_nonzero(self.field_of_view)

    @property
    def probability(self) -> np.ndarray:
        """The probability of a vessel of any class, float32 [H, W]; outside the field of view 0."""
        return (self.probabilities.sum(dim=0).numpy() * self.field_of_view).astype(np.float32)


class Segmenter:
    """A model, ready to be called with photographs: `Segmenter(model, checkpoint)("photograph.jpg").vessels`.

    Args:
        model: in eval mode, on the device that is to be used.
        checkpoint: that `src.weights.load_model` gives with the model.
        amp_dtype: the lower precision of automatic mixed precision; None: float32 throughout.
    """

    def __init__(self, model: nn.Module, checkpoint: Checkpoint, amp_dtype: torch.dtype | None = None) -> None:
        self.model = for_inference(model, amp=amp_dtype is not None)
        self.checkpoint = checkpoint
        self.amp_dtype = amp_dtype

    def __call__(
        self,
        photograph: str | Path | Image.Image | np.ndarray,
        field_of_view: np.ndarray | None = None,
        retina: np.ndarray | None = None,
        *,
        threshold: float = 0.5,
        scale: float | None = None,
        flips: bool | None = None,
        tile: int | None = None,
        batch_size: int = 1,
    ) -> Segmentation:
        """Segment a photograph at the model's working scale; what comes back has the photograph's own size.

        Args:
            photograph: a file, a PIL image (as it is stored, not turned by its EXIF orientation), or uint8 [H, W, 3];
                grey [H, W] and [H, W, 4] too.
            field_of_view: where vessels count, bool [H, W] (or numbers, not 0); None: where the retina is.
            retina: what scale and colours follow from, as that; None: the field of view if that is given and not small
                in its frame (`src.roi_mask.whole_retina`), else what is found in the photograph.
            threshold: probability above which a pixel is a vessel.
            scale: factor to resize the photograph by; None: see `working_scale`.
            flips: average over the views that the weights name, or over the four flips (where they name none, or sizes
                although there is a `scale`). None: as the weights say.
            tile, batch_size: as `src.segment.segment`; the default is tiles too where the photograph is very large.

        Raises:
            DatasetError: the file cannot be read, or an array or a number is not as above.
        """
        if not 0 <= _as_float(threshold) <= 1:
            raise DatasetError(f"threshold {threshold}: is no probability; give one from 0 to 1")
        if scale is not None and not 0 < _as_float(scale) < math.inf:
            raise DatasetError(f"scale {scale}: is no factor; give a number above 0, or None for the model's own")
        threshold, scale = float(threshold), scale if scale is None else float(scale)
        for name, number in (("tile", 1 if tile is None else tile), ("batch_size", batch_size)):
            if not isinstance(number, Integral) or number < 1:
                raise DatasetError(f"{name} {number}: is no whole number of at least 1")
        image = _as_array(photograph)
        if field_of_view is not None:
            field_of_view = _as_mask("field_of_view", field_of_view, image)
        if retina is not None:
            retina = _as_mask("retina", retina, image)
        else:
            retina = find_field_of_view(image) if field_of_view is None else whole_retina(field_of_view, image)
        if field_of_view is None:
            field_of_view = retina
        diameter = field_of_view_diameter(retina)
        flips = self.checkpoint.get("tta", False) if flips is None else flips
        scales = self.checkpoint.get("tta_scales", ONE_SIZE) if flips else ONE_SIZE
        if scale is None:
            scale = self.working_scale(image, retina, tile=tile, batch_size=batch_size)
        elif set(scales) != {1}:
            scales = ONE_SIZE
        two_classes = self.checkpoint["model_args"]["num_classes"] == 2
        votes = Votes() if flips and two_classes else None
        working_probabilities = self._segment(
            image, retina, scale, scales=scales, tile=tile, flips=flips, batch_size=batch_size, votes=votes
        )
        widened = widening(scale, self.checkpoint.get("trained_scale")) if two_classes else 0.0
        labels = np.empty(image.shape[:2], np.uint8)
        for rows, probabilities in probabilities_in_parts(working_probabilities, labels.shape, widened):
            labels[rows] = classify(probabilities, threshold)
        labels[~field_of_view] = 0
        reliability = expected_dice(labels > 0, field_of_view, votes) if votes else None
        return Segmentation(image, field_of_view, diameter, scale, working_probabilities, widened, labels, reliability)

    def working_scale(
        self, photograph: np.ndarray, retina: np.ndarray, *, tile: int | None = None, batch_size: int = 1
    ) -> float:
        """What a photograph, uint8 [H, W, 3], is resized by for the model, so that its vessels are as wide as it knows.

        That follows from the diameter of the retina, bool [H, W]. Where this has no round border the photograph may be
        a close-up, and shows an unknown share of a field of view. Then five SHARES are tried, and the one is taken at
        which the four flips agree best on the vessels, if they agree CLEARLY better than at the whole. Those are twenty
        forward passes, which take as long as eight of the whole. It is not done for models that were trained on such
        photographs, or have more than two classes.

        Args:
            tile, batch_size: as `src.segment.segment`.
        """
        diameter, trained_scale = field_of_view_diameter(retina), self.checkpoint.get("trained_scale")
        whole, *others = (
            match_scale(diameter / share, self.checkpoint["fov_diameter"], trained_scale) for share in SHARES
        )
        cannot_be_chosen = self.checkpoint.get("close_ups", False) or self.checkpoint["model_args"]["num_classes"] > 2
        if cannot_be_chosen or not is_rectangle(retina) or shows_two_discs(photograph, retina):
            return whole

        def agreement(scale: float) -> float:
            votes = Votes()
            self._segment(photograph, retina, scale, flips=True, tile=tile, batch_size=batch_size, votes=votes)
            return agreement_of_views(votes, retina)

        agreements = {scale: agreement(scale) for scale in dict.fromkeys((whole, *others))}  # some may be equal
        best = max(agreements, key=agreements.__getitem__)
        return best if agreements[best] > agreements[whole] + CLEARLY else whole

    def _segment(
        self,
        photograph: np.ndarray,
        retina: np.ndarray,
        scale: float,
        *,
        scales: Sequence[float] = ONE_SIZE,
        tile: int | None = None,
        **options: Any,
    ) -> Tensor:
        """As `src.segment.segment`, of a photograph in its own size; its memory is given back if that is large."""
        large = photograph.shape[0] * photograph.shape[1] > LARGE
        probabilities = segment(
            self.model,
            prepare_at_scale(
                photograph,
                retina,
                scale * max(scales),
                functools.partial(prepare, normalization=normalization_of(self.checkpoint)),
            ),
            self.checkpoint["mean"],
            self.checkpoint["std"],
            scales=scales,
            tile=TILE_OF_LARGE if large and tile is None else tile,
            amp_dtype=self.amp_dtype,
            **options,
        )
        if large:
            give_back_freed_memory()
        return probabilities


def load_pretrained(weights: str | Path = PRETRAINED, device: str | torch.device = "cpu") -> Segmenter:
    """The weights that come with the project, or those of any file, ready to be called with photographs.

    Raises:
        CheckpointError: the file cannot be used.
    """
    return Segmenter(*load_model(weights, torch.device(device)))


def classify(probabilities: Tensor, threshold: float) -> np.ndarray:
    """The class of each pixel, uint8 [H, W]: by the threshold for two classes, else the most probable one."""
    if len(probabilities) == 1:
        return (probabilities[0].numpy() > threshold).view(np.uint8)  # numpy compares in a third of torch's time
    background = 1 - probabilities.sum(dim=0, keepdim=True)
    return torch.cat([background, probabilities]).argmax(dim=0).to(torch.uint8).numpy()


def _as_float(number: Any) -> float:
    """A number of any kind; what is none becomes NaN."""
    try:
        return float(number)
    except (TypeError, ValueError):
        return math.nan


def _as_array(photograph: str | Path | Image.Image | np.ndarray) -> np.ndarray:
    if isinstance(photograph, str | Path):
        return read_photograph(Path(photograph))
    if not isinstance(photograph, Image.Image):
        # It may be the mirrored view of another, which torch does not read.
        array = np.ascontiguousarray(photograph)
        of_colours = array.ndim == 2 or (array.ndim == 3 and array.shape[2] in (3, 4))
        if array.dtype != np.uint8 or not of_colours or array.size == 0:
            raise DatasetError(
                f"an array of {array.dtype}, {_shape(array)}, is no photograph; give uint8 [H, W, 3] with "
                "levels from 0 to 255"
            )
        if array.ndim == 3 and array.shape[2] == 3:
            return array
        photograph = Image.fromarray(array)
    return np.array(to_rgb(photograph))


def _as_mask(name: str, mask: np.ndarray, photograph: np.ndarray) -> np.ndarray:
    """A mask of a photograph [H, W, 3] as bool [H, W]."""
    mask = np.asarray(mask)
    if mask.shape != photograph.shape[:2] or mask.dtype.kind not in "bui":
        raise DatasetError(
            f"{name}: an array of {mask.dtype}, {_shape(mask)}; give bool {_shape(photograph[..., 0])}, the size "
            "of the photograph"
        )
    if not mask.any():
        raise DatasetError(f"{name}: is false everywhere; it must be true where the retina is")
    return mask if mask.dtype == bool else mask != 0


def _shape(array: np.ndarray) -> str:
    return str(list(array.shape))
