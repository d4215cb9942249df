"""Passes over labelled photographs that measure a model: one for its scores, one for its best threshold. No file I/O.

Every photograph is measured in one process, and only a few numbers of it are kept.
"""

import bisect
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from my_dataset import BACKGROUND, OUTSIDE, DriveDataset, require_size
from src.dataset_files import root_names
from src.errors import DatasetError
from src.inference import for_inference
from src.masks import read_binary_mask, read_classes
from src.segment import (
    ONE_SIZE,
    at_size,
    in_float64,
    logits_in_tiles,
    logits_of_size,
    on_device_of,
    resize_probabilities,
    views,
    widening,
)

from ..data_loading import evaluation_loader
from ..distributed_utils import gather_objects, get_rank, get_world_size
from ..logger import MetricLogger
from .centre_lines import cl_dice
from .contact_sheet import SHEET_ROWS, SheetRow, sheet_row
from .counts import (
    ConfusionMatrix,
    DiceCoefficient,
    PixelCounts,
    ProbabilityHistogram,
    most_probable,
    vessel_log_odds,
)


@dataclass(frozen=True)
class Agreement:
    """How one observer's vessels in one photograph agree with the first observer's."""

    field_of_view: PixelCounts
    # Outside the field of view all is predicted as background; the truth is the label's, where that is known.
    full_frame: PixelCounts
    cl_dice: float  # inside the field of view


@dataclass(frozen=True)
class PhotographScore:
    """One photograph as the model segments it, and the second observer where there is one."""

    name: str
    data_set: str
    part: str  # of the data set: "training", "test" or "all"
    digest: str  # of the photograph's file
    label_digest: str  # of its label and ROI mask
    model: Agreement
    second_observer: Agreement | None


class Measurement:
    """What is measured on the photographs of this process; after `reduce_from_all_processes`, of all of them."""

    def __init__(self, num_classes: int) -> None:
        self.photographs: list[PhotographScore] = []
        self.worst: list[SheetRow] = []  # by Dice, the worst first
        self.field_of_view = ProbabilityHistogram()
        self.full_frame = ProbabilityHistogram()
        # As the tutorial scores: the most probable class, whatever the threshold.
        self.confusion_matrix = ConfusionMatrix(num_classes)
        self.dice = DiceCoefficient(num_classes, ignore_index=OUTSIDE)

    def add(self, score: PhotographScore, row: SheetRow) -> None:
        self.photographs.append(score)
        # Pictures of the worst alone are kept, so that memory does not grow with the number of photographs.
        bisect.insort(self.worst, row, key=SheetRow.order)
        del self.worst[SHEET_ROWS:]

    def reduce_from_all_processes(self) -> None:
        for part in (self.field_of_view, self.full_frame, self.confusion_matrix, self.dice):
            part.reduce_from_all_processes()
        everyone = gather_objects((self.photographs, self.worst))
        scores = (score for scores, _ in everyone for score in scores)
        self.photographs = sorted(scores, key=lambda score: (score.data_set, score.name))
        self.worst = sorted((row for _, rows in everyone for row in rows), key=SheetRow.order)[:SHEET_ROWS]


def _predictions(
    model: nn.Module,
    dataset: DriveDataset,
    device: torch.device,
    header: str,
    tta: bool,
    scales: Sequence[float],
) -> Iterator[tuple[int, Tensor, Tensor]]:
    """Index, logits [1, C, H, W] and label [1, H, W] of each photograph of this process.

    With `tta` the logits are those of the mean probabilities over the views.
    """
    fast_model = for_inference(model)
    loader = evaluation_loader(dataset, workers=0, pin_memory=False)
    batches = MetricLogger(delimiter="  ").log_every(loader, 100, header)
    for index, (image, label) in zip(loader.sampler, batches, strict=True):
        image = image.to(device)
        logits = _mean_over_views(fast_model, image, scales) if tta else logits_in_tiles(fast_model, image)
        yield index, logits_of_size(logits, label.shape[-2:]), label.to(device)


def _mean_over_views(model: nn.Module, image: Tensor, scales: Sequence[float]) -> Tensor:
    probabilities = []
    for share, flip in views(scales):
        logits = logits_in_tiles(model, at_size(image, share).flip(flip))
        found = in_float64(logits).softmax(dim=1).flip(flip)
        probabilities.append(resize_probabilities(found, image.shape[-2:]))
    return on_device_of(image, torch.stack(probabilities).mean(dim=0).log())


@torch.inference_mode()
def measure(
    model: nn.Module,
    dataset: DriveDataset,
    device: torch.device,
    threshold: float | None,
    *,
    tta: bool = False,
    scales: Sequence[float] = ONE_SIZE,
    trained_scale: float | None = None,
) -> Measurement:
    """Score a model on every photograph of a dataset once, shared between the processes.

    Args:
        model: in eval mode on `device`; all classes but the background are vessels.
        dataset: with the evaluation transform.
        device: of the model.
        threshold: the probability above which a pixel is a vessel; of more than two classes, the most probable one
            counts.
        tta: take the mean over the views of each photograph.
        scales: of these views, see `src.segment.views`; the photographs have the largest.
        trained_scale: of the model, see `src.segment.widening`.
    """
    measurement = Measurement(model.model_args["num_classes"])
    two_classes = model.model_args["num_classes"] == 2
    names = root_names(dataset.files)
    for index, logits, label in _predictions(model, dataset, device, "Test:", tta, scales):
        measurement.confusion_matrix.update(label.flatten(), most_probable(logits).flatten())
        measurement.dice.update(logits, label)
        log_odds = vessel_log_odds(logits)[0]  # [H, W]
        if two_classes:
            log_odds = log_odds - widening(dataset.scales[index], trained_scale)
            prediction = log_odds > math.log(threshold / (1 - threshold))
        else:
            prediction = most_probable(logits)[0] != BACKGROUND
        inside = label[0] != OUTSIDE  # [H, W]
        truth = _vessels(torch.from_numpy(dataset.classes[index]).to(device))  # outside the field of view too
        measurement.field_of_view.update(log_odds, truth.masked_fill(~inside, OUTSIDE))
        measurement.full_frame.update(log_odds.masked_fill(~inside, -math.inf), truth)
        prediction &= inside
        _add(measurement, dataset, index, names, prediction, truth, inside)
    measurement.reduce_from_all_processes()
    return measurement


def measure_masks(masks: Sequence[Path], dataset: DriveDataset, num_classes: int = 1) -> Measurement:
    """Score files of predicted vessels, one for each photograph of a dataset, shared between the processes.

    With more `num_classes` (without the background) they may hold the numbers of these, too.

    Raises:
        DatasetError: a mask cannot be read, or has another size than its photograph.
    """
    measurement = Measurement(num_classes=2)
    names = root_names(dataset.files)
    for index in range(get_rank(), len(masks), get_world_size()):
        path = masks[index]
        vessels = _read_vessels(path, num_classes)
        require_size(path, vessels, dataset.img_list[index], dataset.labels[index].shape)
        predicted = torch.from_numpy(vessels)
        label = _vessels(torch.from_numpy(dataset.labels[index]))
        inside = label != OUTSIDE
        measurement.confusion_matrix.update(label.flatten(), predicted.long().flatten())
        measurement.dice.update(torch.stack([~predicted, predicted]).float()[None], label[None])
        truth = _vessels(torch.from_numpy(dataset.classes[index]))
        _add(measurement, dataset, index, names, predicted & inside, truth, inside)
    measurement.reduce_from_all_processes()
    return measurement


def _read_vessels(path: Path, num_classes: int) -> np.ndarray:
    try:
        return read_binary_mask(path)
    except DatasetError:
        if num_classes == 1:
            raise
        return read_classes(path, num_classes) > 0


def _vessels(classes: Tensor) -> Tensor:
    """Classes, uint8 [H, W], as int64: 1 for all but the background, OUTSIDE where nothing is known."""
    return torch.where(classes == OUTSIDE, OUTSIDE, classes != BACKGROUND)


def _add(
    measurement: Measurement,
    dataset: DriveDataset,
    index: int,
    names: Mapping[Path, str],
    prediction: Tensor,
    truth: Tensor,
    inside: Tensor,
) -> None:
    """Add what was predicted in one photograph, bool [H, W], to what is measured; `truth` is of `_vessels`."""
    item = dataset.files[index]
    second = dataset.second_observers[index]
    score = PhotographScore(
        item.photograph.stem,
        names[item.root],
        item.part,
        item.digest,
        item.label_digest,
        _compare(prediction, truth, inside),
        None if second is None else _compare(torch.from_numpy(second).to(inside.device) & inside, truth, inside),
    )
    masks = (mask.cpu().numpy() for mask in (truth == 1, prediction, inside))
    row = sheet_row(score.name, score.model.field_of_view.dice, dataset.images[index], *masks)
    measurement.add(score, row)


def _compare(prediction: Tensor, truth: Tensor, inside: Tensor) -> Agreement:
    """Compare vessels, bool [H, W], that are all inside the field of view, with the true ones, of `_vessels`."""
    return Agreement(
        field_of_view=PixelCounts.of(prediction, truth.masked_fill(~inside, OUTSIDE)),
        full_frame=PixelCounts.of(prediction, truth),
        cl_dice=cl_dice(prediction.cpu().numpy(), ((truth == 1) & inside).cpu().numpy()),
    )


@torch.inference_mode()
def best_threshold(
    model: nn.Module,
    dataset: DriveDataset,
    device: torch.device,
    *,
    tta: bool = False,
    scales: Sequence[float] = ONE_SIZE,
    trained_scale: float | None = None,
) -> float:
    """The probability above which to call a pixel a vessel for the best Dice over all pixels of a dataset."""
    histogram = ProbabilityHistogram()
    for index, logits, label in _predictions(model, dataset, device, "Threshold:", tta, scales):
        histogram.update(vessel_log_odds(logits) - widening(dataset.scales[index], trained_scale), label)
    histogram.reduce_from_all_processes()
    return histogram.best_threshold()
