import numpy as np
import pytest
import torch

from train_utils.scoring.counts import ConfusionMatrix, DiceCoefficient


def test_confusion_matrix_counts_rows_as_truth_and_leaves_others_out():
    matrix = ConfusionMatrix(3)
    matrix.update(torch.tensor([0, 0, 1, 2, 255, -1]), torch.tensor([0, 1, 1, 0, 2, 2]))
    matrix.update(torch.tensor([2, 3]), torch.tensor([2, 0]))
    assert matrix.mat.tolist() == [[1, 1, 0], [0, 1, 0], [1, 0, 1]]
    accuracy, recall, iou = matrix.compute()
    assert accuracy.item() == pytest.approx(3 / 5)
    assert recall.tolist() == pytest.approx([1 / 2, 1, 1 / 2])
    assert iou.tolist() == pytest.approx([1 / 3, 1 / 2, 1 / 2])


def test_confusion_matrix_against_a_loop():
    rng = np.random.default_rng(0)
    target, prediction = rng.integers(0, 5, 500), rng.integers(0, 4, 500)
    expected = np.zeros((4, 4), int)
    for truth, predicted in zip(target, prediction, strict=True):
        if truth < 4:
            expected[truth, predicted] += 1
    matrix = ConfusionMatrix(4)
    matrix.update(torch.from_numpy(target), torch.from_numpy(prediction))
    assert matrix.mat.tolist() == expected.tolist()


def test_confusion_matrix_text():
    matrix = ConfusionMatrix(2)
    # 9721 of 10000 background and 163 of 200 vessel pixels are right.
    matrix.mat = torch.tensor([[9721, 279], [37, 163]])
    assert str(matrix) == (
        "global correct: 96.9\naverage row correct: ['97.2', '81.5']\nIoU: ['96.9', '34.0']\nmean IoU: 65.4"
    )


def test_reset():
    matrix = ConfusionMatrix(2)
    matrix.update(torch.tensor([0, 1]), torch.tensor([1, 1]))
    matrix.reset()
    assert not matrix.mat.any()
    dice = DiceCoefficient(2)
    dice.update(torch.rand(1, 2, 4, 4), torch.ones(1, 4, 4, dtype=torch.int64))
    dice.reset()
    assert dice.value.item() == 0


def logits_of(prediction, classes=2):
    return torch.nn.functional.one_hot(torch.tensor(prediction), classes).permute(0, 3, 1, 2).float()


def test_dice_is_the_mean_over_batches_of_the_foreground():
    dice = DiceCoefficient(2, ignore_index=255)
    # hits 1, false alarms 1, misses 1: 2 / 4; the ignored pixel would have been a false alarm.
    dice.update(logits_of([[[1, 1], [0, 1]]]), torch.tensor([[[1, 0], [1, 255]]]))
    assert dice.value.item() == pytest.approx(0.5)
    dice.update(logits_of([[[1, 1], [1, 0]]]), torch.tensor([[[1, 1], [1, 0]]]))
    assert dice.value.item() == pytest.approx(0.75)
    dice.update(logits_of([[[0, 0], [0, 0]]]), torch.tensor([[[0, 0], [255, 0]]]))  # nothing there, nothing found
    assert dice.value.item() == pytest.approx((0.5 + 1 + 1) / 3)


def test_dice_of_three_classes_leaves_the_background_out():
    dice = DiceCoefficient(3)
    dice.update(logits_of([[[0, 1], [2, 2]]], 3), torch.tensor([[[0, 1], [1, 2]]]))
    assert dice.value.item() == pytest.approx((2 / 3 + 2 / 3) / 2)
