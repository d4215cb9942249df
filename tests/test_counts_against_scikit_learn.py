import math

import numpy as np
import pytest
import torch

from train_utils.scoring.counts import PixelCounts, ProbabilityHistogram, vessel_log_odds

sklearn_metrics = pytest.importorskip("sklearn.metrics")

PIXELS = 60_000
generator = np.random.default_rng(0)
TRUTH = (generator.random(PIXELS) < 0.12).astype(np.int64)
NOISE = generator.normal(size=PIXELS)
# Log-odds of a pixel being a vessel, from networks of every temper.
LOG_ODDS = {
    "random": NOISE,
    "good": 4 * NOISE + 12 * TRUTH - 8,
    "saturated": np.clip(20 * NOISE + 60 * TRUTH - 40, -30, 30),
    "sure of almost all": np.where(generator.random(PIXELS) < 0.99, np.where(TRUTH == 1, 80.0, -80.0), NOISE),
    "hardly trained": 1e-6 * (NOISE + TRUTH),
    "wrong": -3 * TRUTH + NOISE,
    "perfect": np.where(TRUTH == 1, 3.0, -3.0),
    "a few values": np.round(NOISE + TRUTH),
    "constant": np.full(PIXELS, -0.3),
    "infinite": np.where(NOISE + 2 * TRUTH > 1, np.inf, -np.inf),
}


def histogram_of(log_odds, truth):
    histogram = ProbabilityHistogram()
    histogram.update(torch.from_numpy(log_odds.astype(np.float32)), torch.from_numpy(truth))
    return histogram


def finite(log_odds):
    return np.nan_to_num(log_odds.astype(np.float32), posinf=1e30, neginf=-1e30)


def loop_counts(prediction, truth):
    counts = [0, 0, 0, 0]
    for predicted, true in zip(prediction.tolist(), truth.tolist(), strict=True):
        if true in (0, 1):
            counts[{(1, 1): 0, (1, 0): 1, (0, 1): 2, (0, 0): 3}[int(predicted), true]] += 1
    return PixelCounts(*counts)


def test_counts_against_a_loop():
    truth = torch.from_numpy(generator.choice([0, 1, 255], size=(2, 30, 20)))
    prediction = torch.from_numpy(generator.random((2, 30, 20)) < 0.4)
    assert PixelCounts.of(prediction, truth) == loop_counts(prediction.flatten(), truth.flatten())
    assert PixelCounts.of(prediction, truth == 1) == loop_counts(prediction.flatten(), (truth == 1).flatten().int())


@pytest.mark.parametrize("name", ["random", "good", "wrong", "perfect", "constant", "saturated"])
def test_scores_of_counts_against_scikit_learn(name):
    prediction = LOG_ODDS[name] > 0
    counts = PixelCounts.of(torch.from_numpy(prediction), torch.from_numpy(TRUTH))
    expected = {
        "accuracy": sklearn_metrics.accuracy_score(TRUTH, prediction),
        "sensitivity": sklearn_metrics.recall_score(TRUTH, prediction),
        "specificity": sklearn_metrics.recall_score(TRUTH, prediction, pos_label=0),
        "precision": sklearn_metrics.precision_score(TRUTH, prediction, zero_division=np.nan),
        "dice": sklearn_metrics.f1_score(TRUTH, prediction),
        "iou": sklearn_metrics.jaccard_score(TRUTH, prediction),
        "mcc": sklearn_metrics.matthews_corrcoef(TRUTH, prediction),
    }
    found = {score: getattr(counts, score) for score in expected}
    assert found == pytest.approx(expected, abs=1e-12, nan_ok=True)


def scores(counts):
    return [getattr(counts, name) for name in ("sensitivity", "specificity", "precision", "dice", "iou", "mcc")]


def test_degenerate_counts():
    nan = math.nan
    assert scores(PixelCounts()) == pytest.approx([nan, nan, nan, 1, 1, nan], nan_ok=True)
    assert math.isnan(PixelCounts().accuracy)
    no_vessel_at_all = PixelCounts(true_negatives=9)
    assert scores(no_vessel_at_all) == pytest.approx([nan, 1, nan, 1, 1, 0], nan_ok=True)
    no_vessel_in_truth = PixelCounts(false_positives=3, true_negatives=6)
    assert scores(no_vessel_in_truth) == pytest.approx([nan, 6 / 9, 0, 0, 0, 0], nan_ok=True)
    none_predicted = PixelCounts(false_negatives=3, true_negatives=6)
    assert scores(none_predicted) == pytest.approx([0, 1, nan, 0, 0, 0], nan_ok=True)
    vessels_alone = PixelCounts(true_positives=3)
    assert scores(vessels_alone) == pytest.approx([1, nan, 1, 1, 1, 0], nan_ok=True)


def test_counts_add_up():
    parts = [(NOISE > 0.5, TRUTH), (NOISE > 1, 1 - TRUTH)]
    whole = tuple(np.concatenate(part) for part in zip(*parts, strict=True))
    counts = [PixelCounts.of(*map(torch.from_numpy, part)) for part in (*parts, whole)]
    assert counts[0] + counts[1] == counts[2]


@pytest.mark.parametrize("name", LOG_ODDS)
def test_areas_against_scikit_learn(name):
    histogram = histogram_of(LOG_ODDS[name], TRUTH)
    score = finite(LOG_ODDS[name])
    assert histogram.roc_auc() == pytest.approx(sklearn_metrics.roc_auc_score(TRUTH, score), abs=1e-4)
    expected = sklearn_metrics.average_precision_score(TRUTH, score)
    assert histogram.average_precision() == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("seed", range(10))
def test_areas_of_few_pixels(seed):
    random = np.random.default_rng(seed)
    truth = np.append(random.integers(0, 2, 12), [0, 1])
    log_odds = random.normal(size=14) * 10.0 ** random.integers(-3, 3)
    histogram = histogram_of(log_odds, truth)
    assert histogram.roc_auc() == pytest.approx(sklearn_metrics.roc_auc_score(truth, log_odds), abs=1e-12)
    expected = sklearn_metrics.average_precision_score(truth, log_odds)
    assert histogram.average_precision() == pytest.approx(expected, abs=1e-12)


def test_degenerate_areas():
    zeros, ones = np.zeros(5, np.int64), np.ones(5, np.int64)
    for truth in (zeros, ones, 255 * ones):
        assert math.isnan(histogram_of(NOISE[:5], truth).roc_auc())
    assert math.isnan(histogram_of(NOISE[:5], zeros).average_precision())
    assert math.isnan(histogram_of(NOISE[:5], 255 * ones).average_precision())
    assert histogram_of(NOISE[:5], ones).average_precision() == 1
    constant = histogram_of(LOG_ODDS["constant"], TRUTH)
    assert constant.roc_auc() == 0.5
    assert constant.average_precision() == pytest.approx(TRUTH.mean())


def test_ignored_pixels_change_nothing():
    truth = np.where(generator.random(PIXELS) < 0.3, 255, TRUTH)
    counted = truth != 255
    everything = histogram_of(LOG_ODDS["good"], truth)
    assert torch.equal(everything.counts, histogram_of(LOG_ODDS["good"][counted], truth[counted]).counts)
    assert everything.counts.sum() == counted.sum()


def test_bins_keep_the_order():
    values = np.concatenate([[-np.inf, np.inf], *(NOISE * 10.0**power for power in range(-8, 3))])
    values = np.unique(values.astype(np.float32))
    bins = ProbabilityHistogram._bins(torch.from_numpy(values)).numpy()
    assert (np.diff(bins) >= 0).all() and bins.min() >= 0 and bins.max() < ProbabilityHistogram.BINS
    same = np.flatnonzero(np.diff(bins) == 0)
    assert (np.abs(values[same + 1] - values[same]) <= 2.0**-11 * np.abs(values[same + 1])).all()
    below, zero, minus_zero, above = ProbabilityHistogram._bins(torch.tensor([-1e-38, 0.0, -0.0, 1e-38])).tolist()
    assert below <= zero == minus_zero < above


def loop_best_dice(log_odds, truth):
    """The best Dice over all thresholds: sort by probability, go down one pixel at a time."""
    best, hits = 0.0, 0
    order = np.argsort(-log_odds)
    for predicted, index in enumerate(order, start=1):
        hits += truth[index]
        if predicted == len(order) or log_odds[order[predicted]] < log_odds[index]:
            best = max(best, 2 * hits / (predicted + truth.sum()))
    return best


@pytest.mark.parametrize("name", ["random", "good", "hardly trained", "perfect", "a few values"])
def test_best_threshold_against_a_loop(name):
    log_odds = LOG_ODDS[name].astype(np.float32)
    threshold = histogram_of(log_odds, TRUTH).best_threshold()
    assert 0.001 <= threshold <= 0.999
    limit = math.log(threshold / (1 - threshold))
    counts = PixelCounts.of(torch.from_numpy(log_odds > limit), torch.from_numpy(TRUTH))
    assert counts.dice == pytest.approx(loop_best_dice(log_odds, TRUTH), abs=1e-4)


def test_best_threshold_where_all_are_equally_good():
    assert ProbabilityHistogram().best_threshold() == 0.5
    assert histogram_of(NOISE, np.zeros_like(TRUTH)).best_threshold() == 0.5
    assert histogram_of(LOG_ODDS["perfect"], TRUTH).best_threshold() == 0.5
    assert histogram_of(np.full(PIXELS, 0.2), TRUTH).best_threshold() == 0.5
    below = histogram_of(np.full(PIXELS, -0.2), TRUTH).best_threshold()  # all vessels beats none
    assert 0.449 < below < 1 / (1 + math.exp(0.2))


def test_log_odds_agree_with_softmax_and_argmax():
    for classes in (2, 3):
        logits = 3 * torch.from_numpy(generator.normal(size=(2, classes, 9, 8))).float()
        logits[0, :2, :3] = 1.0  # ties
        log_odds = vessel_log_odds(logits)
        expected = -torch.logit(torch.softmax(logits.double(), dim=1)[:, 0])
        torch.testing.assert_close(log_odds.double(), expected, atol=1e-5, rtol=1e-5)
    assert torch.equal(vessel_log_odds(logits[:, :2]) > 0, logits[:, :2].argmax(1) == 1)
    assert vessel_log_odds(torch.tensor([[[[-50.0]], [[50.0]]]])).item() == 100  # softmax gives 1 from 17 on
