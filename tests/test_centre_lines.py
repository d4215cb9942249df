import time

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from train_utils.scoring.centre_lines import cl_dice, skeletonize


def components(mask, diagonal):
    """The number of connected components, by flooding."""
    left, count = set(zip(*np.nonzero(mask), strict=True)), 0
    while left:
        count += 1
        front = [left.pop()]
        while front:
            row, column = front.pop()
            for i in (-1, 0, 1):
                for j in (-1, 0, 1):
                    neighbour = (row + i, column + j)
                    if (diagonal or 0 in (i, j)) and neighbour in left:
                        left.remove(neighbour)
                        front.append(neighbour)
    return count


def blobs(seed, smoothing):
    noise = torch.randn(1, 1, 40, 50, generator=torch.Generator().manual_seed(seed))
    for _ in range(smoothing):
        noise = F.avg_pool2d(noise, 3, stride=1, padding=1)
    return (noise > 0)[0, 0].numpy()


@pytest.mark.parametrize("smoothing", [0, 1, 3])
@pytest.mark.parametrize("seed", range(8))
def test_thinning_keeps_components_and_holes(seed, smoothing):
    mask = blobs(seed, smoothing)
    line = skeletonize(mask)
    assert not (line & ~mask).any()
    assert components(line, diagonal=True) == components(mask, diagonal=True)
    holes = [components(np.pad(~picture, 1, constant_values=True), diagonal=False) for picture in (line, mask)]
    assert holes[0] == holes[1]
    assert (skeletonize(line) == line).all()


@pytest.mark.parametrize("seed", range(8))
def test_lines_are_one_pixel_wide(seed):
    line = skeletonize(blobs(seed, smoothing=3))  # of noise, crossings would leave a few squares
    assert not (line[1:, 1:] & line[:-1, 1:] & line[1:, :-1] & line[:-1, :-1]).any()


def test_a_bar_becomes_its_middle():
    bar = np.zeros((11, 40), bool)
    bar[3:8, 4:36] = True
    line = skeletonize(bar)
    rows, columns = np.nonzero(line)
    assert set(rows) == {5} and columns.max() - columns.min() >= 25


def test_small_blobs_stay():
    square = np.pad(np.ones((2, 2), bool), 2)
    assert skeletonize(square).sum() == 1
    for empty in (np.zeros((5, 6), bool), np.zeros((0, 6), bool)):
        assert skeletonize(empty).shape == empty.shape and not skeletonize(empty).any()


def test_cl_dice_by_hand():
    truth = np.zeros((9, 30), bool)
    truth[4, 2:28] = True  # a line of 26 pixels, its own skeleton
    assert cl_dice(truth, truth) == 1
    broken = truth.copy()
    broken[4, 10:20] = False  # 16 of 26 pixels of the line are found, all predicted ones are right
    assert cl_dice(broken, truth) == pytest.approx(2 * (16 / 26) / (16 / 26 + 1))
    assert cl_dice(truth, broken) == pytest.approx(cl_dice(broken, truth))
    beside = np.roll(truth, 1, axis=0)
    assert cl_dice(beside, truth) == 0
    thick = truth | np.roll(truth, 1, axis=0) | np.roll(truth, -1, axis=0)
    assert cl_dice(thick, truth) == 1  # thickness does not count


def test_cl_dice_without_vessels():
    empty, dot = np.zeros((5, 5), bool), np.eye(5, dtype=bool)
    assert cl_dice(empty, empty) == 1
    assert cl_dice(empty, dot) == cl_dice(dot, empty) == 0


def test_a_mask_that_is_full_takes_no_longer_than_its_area():
    """Weights after a few steps call everything a vessel: thinning by whole pictures would take minutes."""
    started = time.process_time()
    assert skeletonize(np.ones((1200, 1200), bool)).sum() < 1200
    assert time.process_time() - started < 6  # 0.8 s; by whole pictures 14 s, and minutes on 8 megapixels
