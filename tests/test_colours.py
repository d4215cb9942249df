import numpy as np
import pytest

from src.colours import blacken_bright_surroundings, channel_statistics, match_colours
from src.field_of_view import field_of_view_diameter
from tests.pictures import disc, framed
from train_utils.synthetic_drive import synthetic_photograph


def test_bright_surroundings_become_black(synthetic):
    photograph, _, truth = synthetic[0]
    white = blacken_bright_surroundings(framed(photograph, truth, (255, 255, 255)), truth)
    assert (white[~truth] == 0).all()
    inner = disc(340, 360, 300)
    np.testing.assert_array_equal(white[inner], photograph[inner])
    dark = framed(photograph, truth, (8, 7, 7))
    np.testing.assert_array_equal(blacken_bright_surroundings(dark, truth), dark)
    for mask in (np.ones_like(truth), disc(340, 360, 100)):  # the whole frame, a part of the retina
        np.testing.assert_array_equal(blacken_bright_surroundings(photograph, mask), photograph)


def test_channel_statistics_against_numpys():
    rng = np.random.default_rng(0)
    photograph, inside = rng.integers(0, 256, (40, 30, 3)).astype(np.uint8), rng.random((40, 30)) < 0.6
    mean, std = channel_statistics(photograph, inside)
    assert np.allclose(mean, (photograph[inside] / 255).mean(axis=0)) and mean.shape == (3,)
    assert np.allclose(std, (photograph[inside] / 255).std(axis=0)) and std.shape == (3,)


def test_matched_colours_have_the_mean_and_deviation():
    rng = np.random.default_rng(0)
    photograph = rng.normal((90, 60, 30), (20, 12, 8), (60, 50, 3)).clip(0, 255).astype(np.uint8)
    inside = np.zeros((60, 50), bool)
    inside[5:50, 5:45] = True
    wanted = (0.6, 0.4, 0.2), (0.08, 0.06, 0.04)
    matched = match_colours(photograph, inside, *wanted)
    assert matched.dtype == np.uint8 and not matched[~inside].any()
    assert np.allclose(channel_statistics(matched, inside), wanted, atol=0.003)


@pytest.mark.parametrize("even_light", [False, True])
@pytest.mark.parametrize("size", [(20, 20), (1, 1), (2, 30)])
@pytest.mark.parametrize("level", [0, 77, 255])
def test_a_photograph_of_one_grey_has_colours_to_match_too(level, size, even_light):
    photograph, inside = np.full((*size, 3), level, np.uint8), np.ones(size, bool)
    matched = match_colours(photograph, inside, (0.6, 0.4, 0.2), (0.1, 0.1, 0.1), even_light=even_light)
    assert (matched == [153, 102, 51]).all()


def test_even_light():
    """A lamp at one side, and another size, change next to nothing; without evening out, the one side stays dark."""
    mean, std = (0.7, 0.4, 0.2), (0.12, 0.08, 0.04)
    photograph, _, inside = synthetic_photograph(320, 288, np.random.default_rng(3))
    lamp = np.linspace(0.4, 1.0, 320)[None, :, None]
    lit = np.rint(photograph * lamp).astype(np.uint8)

    def distance(even_light):
        pictures = [match_colours(p, inside, mean, std, even_light=even_light) for p in (photograph, lit)]
        assert all(np.allclose(channel_statistics(p, inside), (mean, std), atol=0.01) for p in pictures)
        return np.abs(pictures[0] / 255 - pictures[1] / 255)[inside].mean(axis=0) / std

    assert (distance(True) < 0.15).all() and (distance(False) > 0.5).all(), (distance(True), distance(False))
    large = match_colours(
        photograph.repeat(3, 0).repeat(3, 1), inside.repeat(3, 0).repeat(3, 1), mean, std, even_light=True
    )
    difference = large[1::3, 1::3] / 255 - match_colours(photograph, inside, mean, std, even_light=True) / 255
    assert np.abs(difference).max() < 0.02


def test_even_light_divides_by_the_mean_of_the_surroundings():
    """Against the definition, summed pixel by pixel."""
    rng = np.random.default_rng(1)
    photograph, inside = rng.integers(60, 200, (40, 36, 3)).astype(np.uint8), disc(40, 36, 36)
    inside[:, :9] = False
    sigma = field_of_view_diameter(inside) / 18
    y, x = np.nonzero(inside)
    weights = np.exp(-((y[:, None] - y) ** 2 + (x[:, None] - x) ** 2) / (2 * sigma**2))  # [pixels, pixels]
    values = photograph[inside] / (weights @ photograph[inside] / weights.sum(axis=1, keepdims=True))
    expected = 0.5 + 0.1 * (values - values.mean(axis=0)) / values.std(axis=0)
    matched = match_colours(photograph, inside, (0.5,) * 3, (0.1,) * 3, even_light=True)
    np.testing.assert_allclose(matched[inside] / 255, expected, atol=0.01)
