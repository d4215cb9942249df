"""Scores of segmentations, accumulated over batches and summed over processes.

Updates use masked arithmetic and `scatter_add_`, because boolean indexing and `bincount` wait for the device.
"""

import math
from collections.abc import Sequence
from dataclasses import astuple, dataclass

import torch
from torch import Tensor

from src.devices import to_device

from ..dice_coefficient_loss import build_target, multiclass_dice_coeff
from ..distributed_utils import sum_over_processes


def format_scores(global_accuracy: float, recall: Sequence[float], iou: Sequence[float]) -> str:
    """The tutorial's four lines, in percent with one decimal, from values in [0, 1]."""

    def percent(values: Sequence[float]) -> list[str]:
        return [f"{100 * value:.1f}" for value in values]

    return (
        f"global correct: {100 * global_accuracy:.1f}\n"
        f"average row correct: {percent(recall)}\n"
        f"IoU: {percent(iou)}\n"
        f"mean IoU: {100 * sum(iou) / len(iou):.1f}"
    )


def most_probable(logits: Tensor) -> Tensor:
    """The class of each pixel: logits [N, C, H, W] -> int64 [N, H, W]. Of equal ones, the first."""
    if logits.shape[1] == 2:  # ten times as fast as argmax, on the CPU
        return (logits[:, 1] > logits[:, 0]).long()
    return logits.argmax(dim=1)


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
            target: true classes [pixels], int64. Values outside 0 .. num_classes - 1 are not counted.
            prediction: predicted classes [pixels], int64.
        """
        n = self.num_classes
        inside = (target >= 0) & (target < n)
        # Pixels that do not count go to an extra cell behind the matrix.
        cells = torch.where(inside, n * target + prediction, n * n)
        counts = torch.zeros(n * n + 1, dtype=torch.int64, device=target.device)
        counts.scatter_add_(0, cells, torch.ones_like(cells))
        self.mat = to_device(self.mat, target.device) + counts[:-1].view(n, n)

    def compute(self) -> tuple[Tensor, Tensor, Tensor]:
        """Global accuracy (scalar), recall [num_classes] and IoU [num_classes], float64 in [0, 1].

        The recall of a class is NaN if the truth lacks it. The IoU is NaN if truth and prediction both lack it.
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

    def update(self, logits: Tensor, target: Tensor, weight: int = 1) -> None:
        """Add a batch: logits [N, num_classes, H, W], labels [N, H, W] int64. It counts as `weight` batches."""
        prediction = build_target(most_probable(logits), self.num_classes)  # one-hot [N, num_classes, H, W]
        truth = build_target(target, self.num_classes, self.ignore_index)
        dice = multiclass_dice_coeff(prediction[:, 1:], truth[:, 1:], ignore_index=self.ignore_index)
        self.cumulative_dice = to_device(self.cumulative_dice, dice.device) + dice * weight
        self.count += weight

    @property
    def value(self) -> Tensor:
        """The mean so far, a scalar; 0 before the first batch."""
        return self.cumulative_dice / self.count.clamp(min=1).to(self.cumulative_dice.device)

    def reduce_from_all_processes(self) -> None:
        self.cumulative_dice = sum_over_processes(self.cumulative_dice)
        self.count = sum_over_processes(self.count)


@dataclass(frozen=True)
class PixelCounts:
    """Pixel counts of a binary segmentation against the truth; counts of several pictures can be added.

    A score whose quotient is 0 / 0 is NaN ("undefined"): sensitivity without a vessel in the truth, specificity without
    background, precision without a predicted vessel, accuracy and MCC without a pixel. Two exceptions: Dice and IoU are
    1 where neither truth nor prediction holds a vessel (as in `dice_coeff`), and MCC is 0 where truth or prediction
    holds one class alone (as in scikit-learn).
    """

    true_positives: int = 0
    false_positives: int = 0
    false_negatives: int = 0
    true_negatives: int = 0

    @classmethod
    def of(cls, prediction: Tensor, truth: Tensor) -> "PixelCounts":
        """Compare predicted vessels (bool, any shape) with labels of that shape; only the labels 0 and 1 count."""
        vessel, background = truth == 1, truth == 0
        counts = [prediction & vessel, prediction & background, ~prediction & vessel, ~prediction & background]
        return cls(*torch.stack([count.sum() for count in counts]).tolist())

    def __add__(self, other: "PixelCounts") -> "PixelCounts":
        return PixelCounts(*(sum(both) for both in zip(astuple(self), astuple(other), strict=True)))

    @property
    def accuracy(self) -> float:
        """Share of the pixels that are classified correctly."""
        right = self.true_positives + self.true_negatives
        return _quotient(right, right + self.false_positives + self.false_negatives)

    @property
    def sensitivity(self) -> float:
        """Share of the true vessels that is found; also called recall."""
        return _quotient(self.true_positives, self.true_positives + self.false_negatives)

    @property
    def specificity(self) -> float:
        """Share of the true background that is predicted as background."""
        return _quotient(self.true_negatives, self.true_negatives + self.false_positives)

    @property
    def precision(self) -> float:
        """Share of the predicted vessels that is true."""
        return _quotient(self.true_positives, self.true_positives + self.false_positives)

    @property
    def dice(self) -> float:
        """2 TP / (2 TP + FP + FN), which is also F1."""
        errors = self.false_positives + self.false_negatives
        return _quotient(2 * self.true_positives, 2 * self.true_positives + errors, undefined=1.0)

    @property
    def iou(self) -> float:
        """TP / (TP + FP + FN), the Jaccard index of the vessels."""
        errors = self.false_positives + self.false_negatives
        return _quotient(self.true_positives, self.true_positives + errors, undefined=1.0)

    @property
    def mcc(self) -> float:
        """Matthews correlation coefficient, in [-1, 1] (B. W. Matthews, Biochim. Biophys. Acta 405, 1975)."""
        tp, fp, fn, tn = self.true_positives, self.false_positives, self.false_negatives, self.true_negatives
        if tp + fp + fn + tn == 0:
            return math.nan
        return _quotient(tp * tn - fp * fn, math.sqrt((tp + fp) * (tp + fn) * (tn + fp) * (tn + fn)), undefined=0.0)


def _quotient(numerator: float, denominator: float, undefined: float = math.nan) -> float:
    return numerator / denominator if denominator else undefined


def vessel_log_odds(logits: Tensor) -> Tensor:
    """log(p / (1 - p)) of the probability p of any class but 0 under softmax: logits [N, C, H, W] -> float32 [N, H, W].

    p itself rounds to 1 above a log-odds of 17; the log-odds still rank confident pixels. With two classes it is
    positive exactly where the argmax is 1.
    """
    logits = logits.float()
    return logits[:, 1:].logsumexp(dim=1) - logits[:, 0]


class ProbabilityHistogram:
    """Histograms of the vessel probability in the true background (row 0) and the true vessels (row 1).

    ROC-AUC, average precision and the best threshold follow from them. They take 16 MiB for any number of photographs,
    and can be added over processes.

    A bin is the bit pattern of the float32 log-odds without its last 12 bits: each sign and power of two has 2048 equal
    bins. So the resolution is relative: values share a bin, and count as ties, only if they differ by less than 0.05 %.
    (If all log-odds lie within a few thousandths of one value, the ranking is coarse.) `counts` is int64 [2, BINS].
    """

    DROPPED_BITS = 12
    BINS = 2 ** (32 - DROPPED_BITS)

    def __init__(self) -> None:
        self.counts = torch.zeros((2, self.BINS), dtype=torch.int64)

    def update(self, log_odds: Tensor, truth: Tensor) -> None:
        """Count pixels.

        Args:
            log_odds: of the vessel probability, float32 of any shape; minus infinity for a probability of 0.
            truth: labels of that shape; only 0 and 1 count.
        """
        log_odds, truth = log_odds.flatten().float(), truth.flatten()
        self.counts = self.counts.to(truth.device)
        counted = (truth == 0) | (truth == 1)
        cells = torch.where(counted, truth, 0) * self.BINS + self._bins(log_odds)
        self.counts.view(-1).scatter_add_(0, cells, counted.long())

    @classmethod
    def _bins(cls, log_odds: Tensor) -> Tensor:
        # Read as integers, positive floats are in ascending order and negative ones in descending order. The sign is
        # flipped so that a bin contains its upper edge, not its lower one: "above 0.5" is then a whole number of bins.
        pattern = (0.0 - log_odds).view(torch.int32)  # 0.0 - x, because -x would give two different zeros
        ordered = torch.where(pattern < 0, pattern ^ 0x7FFFFFFF, pattern)
        return cls.BINS // 2 - 1 - (ordered >> cls.DROPPED_BITS).long()

    @classmethod
    def _upper_edge(cls, index: int) -> float:
        """The largest log-odds in a bin."""
        ordered = torch.tensor((cls.BINS // 2 - 1 - index) << cls.DROPPED_BITS, dtype=torch.int32)
        return -torch.where(ordered < 0, ordered ^ 0x7FFFFFFF, ordered).view(torch.float32).item()

    def reduce_from_all_processes(self) -> None:
        self.counts = sum_over_processes(self.counts)

    def _from_the_top(self) -> tuple[Tensor, Tensor]:
        """Counts of background and vessels at or above each bin, from the highest bin down, float64 [BINS] each."""
        background, vessels = self.counts.cpu().flip(1).cumsum(1).double()
        return background, vessels

    def roc_auc(self) -> float:
        """Area under the ROC curve: the chance that a vessel pixel ranks above a background pixel; ties count half.

        NaN if the truth contains only one class.
        """
        background, vessels = self._from_the_top()
        area = torch.trapezoid(vessels, background).item() + (vessels[0] * background[0]).item() / 2
        return _quotient(area, (vessels[-1] * background[-1]).item())

    def average_precision(self) -> float:
        """The mean of the precision over the steps in recall, as scikit-learn defines it; NaN without a vessel."""
        background, vessels = self._from_the_top()
        precision = vessels / (vessels + background).clamp(min=1)
        found = self.counts[1].cpu().flip(0).double()
        return _quotient((found * precision).sum().item(), vessels[-1].item())

    def best_threshold(self) -> float:
        """The threshold in [0.001, 0.999] that gives the best Dice over all pixels.

        Of equally good thresholds it is the one nearest to 0.5; without any vessel it is 0.5.
        """
        background, vessels = self._from_the_top()
        # Everything above bin b is predicted as a vessel. Nothing is above the highest bin.
        predicted = (background + vessels).flip(0).roll(-1)
        hits = vessels.flip(0).roll(-1)
        predicted[-1] = hits[-1] = 0
        dice = 2 * hits / (predicted + vessels[-1]).clamp(min=1)
        lowest, highest = (self._bins(torch.tensor(math.log(p / (1 - p)))).item() for p in (0.001, 0.999))
        candidates = torch.arange(lowest, highest)
        dice = dice[candidates]
        best = candidates[dice == dice.max()]
        nearest = best[(best - self._bins(torch.tensor(0.0))).abs().argmin()]
        return 1 / (1 + math.exp(-self._upper_edge(int(nearest))))
