"""Scores of segmentations, accumulated over batches and summed over processes.

No update waits for the device: boolean indexing and `bincount` would, masked arithmetic and `scatter_add_` do not.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from .dice_coefficient_loss import build_target, multiclass_dice_coeff
from .distributed_utils import sum_over_processes


def format_scores(global_accuracy: float, recall: Sequence[float], iou: Sequence[float]) -> str:
    """The tutorial's four lines: shares of 1, written in percent with one decimal."""

    def percent(values: Sequence[float]) -> list[str]:
        return [f"{100 * value:.1f}" for value in values]

    return (
        f"global correct: {100 * global_accuracy:.1f}\n"
        f"average row correct: {percent(recall)}\n"
        f"IoU: {percent(iou)}\n"
        f"mean IoU: {100 * sum(iou) / len(iou):.1f}"
    )


class ConfusionMatrix:
    """Counts of pixels in `mat`, int64 [num_classes, num_classes]: rows are the truth, columns the prediction."""

    def __init__(self, num_classes: int) -> None:
        self.num_classes = num_classes
        self.reset()

    def reset(self) -> None:
        self.mat = torch.zeros((self.num_classes, self.num_classes), dtype=torch.int64)

    def update(self, target: Tensor, prediction: Tensor) -> None:
        """Count pixels.

        Args:
            target: true classes [pixels], int64; pixels with another value than 0 .. num_classes - 1 are left out.
            prediction: predicted classes [pixels], int64.
        """
        n = self.num_classes
        inside = (target >= 0) & (target < n)
        # Pixels that are left out go to a cell of their own, past the end of the matrix.
        cells = torch.where(inside, n * target + prediction, n * n)
        counts = torch.zeros(n * n + 1, dtype=torch.int64, device=target.device)
        counts.scatter_add_(0, cells, torch.ones_like(cells))
        self.mat = self.mat.to(target.device) + counts[:-1].view(n, n)

    def compute(self) -> tuple[Tensor, Tensor, Tensor]:
        """Global accuracy (scalar), recall [num_classes] and IoU [num_classes], float64 in [0, 1].

        NaN stands for a quotient without pixels: the recall of a class that never occurs in the truth, the IoU of one
        that occurs neither in the truth nor in the prediction.
        """
        mat = self.mat.cpu().double()
        correct = mat.diagonal()
        accuracy = correct.sum() / mat.sum()
        recall = correct / mat.sum(1)
        iou = correct / (mat.sum(1) + mat.sum(0) - correct)
        return accuracy, recall, iou

    def reduce_from_all_processes(self) -> None:
        self.mat = sum_over_processes(self.mat)

    def __str__(self) -> str:
        accuracy, recall, iou = self.compute()
        return format_scores(accuracy.item(), recall.tolist(), iou.tolist())


class DiceCoefficient:
    """Mean over batches of the Dice of the argmax prediction, averaged over the classes other than background."""

    def __init__(self, num_classes: int = 2, ignore_index: int = -100) -> None:
        self.num_classes = num_classes
        self.ignore_index = ignore_index
        self.reset()

    def reset(self) -> None:
        self.cumulative_dice = torch.zeros(())
        self.count = torch.zeros((), dtype=torch.int64)

    def update(self, logits: Tensor, target: Tensor) -> None:
        """Add one batch: logits [N, num_classes, H, W], labels [N, H, W] int64."""
        prediction = build_target(logits.argmax(dim=1), self.num_classes)  # one-hot [N, num_classes, H, W]
        truth = build_target(target, self.num_classes, self.ignore_index)
        dice = multiclass_dice_coeff(prediction[:, 1:], truth[:, 1:], ignore_index=self.ignore_index)
        self.cumulative_dice = self.cumulative_dice.to(dice.device) + dice
        self.count += 1

    @property
    def value(self) -> Tensor:
        """The mean so far, a scalar; 0 before the first batch."""
        return self.cumulative_dice / self.count.clamp(min=1).to(self.cumulative_dice.device)

    def reduce_from_all_processes(self) -> None:
        self.cumulative_dice = sum_over_processes(self.cumulative_dice)
        self.count = sum_over_processes(self.count)
