"""Passes over labelled photographs that measure a model: one for its scores, one for its best threshold. No file I/O.

Every photograph is measured in one process, and only a few numbers of it are kept.
"""

import bisect
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from my_dataset import OUTSIDE, DatasetError, DriveDataset, read_binary_mask
from src.inference import for_inference
from src.segment import FLIPS

from ..data_loading import evaluation_loader
from ..distributed_utils import gather_objects
from ..logger import MetricLogger
from .centre_lines import cl_dice
from .contact_sheet import SHEET_ROWS, SheetRow, sheet_row
from .counts import ConfusionMatrix, DiceCoefficient, PixelCounts, ProbabilityHistogram, vessel_log_odds


@dataclass(frozen=True)
class Segmentation:
    """How one observer's vessels in one photograph agree with the first observer's."""

    field_of_view: PixelCounts
    full_frame: PixelCounts  # outside the field of view all is predicted as background; the truth is the label's
    cl_dice: float  # inside the field of view


@dataclass(frozen=True)
class PhotographScore:
    """One photograph as the model segments it, and the second observer where there is one."""

    name: str
    model: Segmentation
    second_observer: Segmentation | None


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
        self.photographs = sorted((score for scores, _ in everyone for score in scores), key=lambda score: score.name)
        self.worst = sorted((row for _, rows in everyone for row in rows), key=SheetRow.order)[:SHEET_ROWS]


def _predictions(
    model: nn.Module, dataset: DriveDataset, device: torch.device, header: str, tta: bool
) -> Iterator[tuple[int, Tensor, Tensor]]:
    """Index, logits [1, C, H, W] and label [1, H, W] of each photograph of this process.

    With `tta` the logits are those of the mean probabilities over the four flips.
    """
    quick_model = for_inference(model)
    loader = evaluation_loader(dataset, workers=0, pin_memory=False)
    batches = MetricLogger(delimiter="  ").log_every(loader, 100, header)
    for index, (image, label) in zip(loader.sampler, batches, strict=True):
        image = image.to(device)
        logits = _mean_over_flips(quick_model, image) if tta else quick_model(image)["out"]
        yield index, logits, label.to(device)


def _mean_over_flips(model: nn.Module, image: Tensor) -> Tensor:
    probabilities = [model(image.flip(flip))["out"].double().softmax(dim=1).flip(flip) for flip in FLIPS]
    return torch.stack(probabilities).mean(dim=0).log()


@torch.inference_mode()
def measure(
    model: nn.Module, dataset: DriveDataset, device: torch.device, threshold: float, *, tta: bool = False
) -> Measurement:
    """Score a model on every photograph of a dataset once, shared between the processes.

    Args:
        model: in eval mode on `device`; class 1 is the vessels.
        dataset: with the evaluation transform.
        device: of the model.
        threshold: the probability above which a pixel is a vessel.
        tta: take the mean over the four flips of each photograph.

    Raises:
        DatasetError: a second observer's label does not fit its photograph.
    """
    for index in range(len(dataset)):
        _second_observer(dataset, index)  # so that all processes meet the same error, and none waits for the others
    measurement = Measurement(model.model_args["num_classes"])
    for index, logits, label in _predictions(model, dataset, device, "Test:", tta):
        measurement.confusion_matrix.update(label.flatten(), logits.argmax(1).flatten())
        measurement.dice.update(logits, label)
        log_odds, label = vessel_log_odds(logits)[0], label[0]  # [H, W] both
        inside = label != OUTSIDE
        # The label file and not `label`, which hides what lies outside the field of view.
        truth = torch.from_numpy(read_binary_mask(dataset.manual[index])).to(device)  # [H, W]
        measurement.field_of_view.update(log_odds, label)
        measurement.full_frame.update(log_odds.masked_fill(~inside, -math.inf), truth.long())

        prediction = (log_odds > math.log(threshold / (1 - threshold))) & inside
        second = _second_observer(dataset, index)
        score = PhotographScore(
            dataset.img_list[index].stem,
            _compare(prediction, truth, inside),
            None if second is None else _compare(second.to(device) & inside, truth, inside),
        )
        row = sheet_row(
            score.name,
            score.model.field_of_view.dice,
            dataset.images[index],
            *(mask.cpu().numpy() for mask in (truth, prediction, inside)),
        )
        measurement.add(score, row)
    measurement.reduce_from_all_processes()
    return measurement


def _compare(prediction: Tensor, truth: Tensor, inside: Tensor) -> Segmentation:
    """Compare vessels, bool [H, W], that are all inside the field of view, with the true ones."""
    return Segmentation(
        field_of_view=PixelCounts.of(prediction, truth.long().masked_fill(~inside, OUTSIDE)),
        full_frame=PixelCounts.of(prediction, truth),
        cl_dice=cl_dice(prediction.cpu().numpy(), (truth & inside).cpu().numpy()),
    )


def _second_observer(dataset: DriveDataset, index: int) -> Tensor | None:
    """The second observer's vessels, bool [H, W], where there is a file of them."""
    manual: Path = dataset.manual[index]
    path = manual.parents[1] / "2nd_manual" / manual.name.replace("manual1", "manual2")
    if not path.is_file():
        return None
    vessels = read_binary_mask(path)
    size = dataset.labels[index].shape
    if vessels.shape != size:
        raise DatasetError(
            f"{path}: is {vessels.shape[1]} x {vessels.shape[0]} pixels, but its photograph "
            f"{dataset.img_list[index]} is {size[1]} x {size[0]}; they must match"
        )
    return torch.from_numpy(vessels)


@torch.inference_mode()
def best_threshold(model: nn.Module, dataset: DriveDataset, device: torch.device, *, tta: bool = False) -> float:
    """The probability above which to call a pixel a vessel for the best Dice over all pixels of a dataset."""
    histogram = ProbabilityHistogram()
    for _, logits, label in _predictions(model, dataset, device, "Threshold:", tta):
        histogram.update(vessel_log_odds(logits), label)
    histogram.reduce_from_all_processes()
    return histogram.best_threshold()
