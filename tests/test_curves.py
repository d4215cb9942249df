import numpy as np
import pytest

from train_utils.scoring import curves as drawn
from train_utils.scoring.curves import curves


def history(epochs):
    return [
        {
            "epoch": epoch,
            "train_loss": 1 / (1 + epoch),
            "lr": 0.01 - 0.001 * epoch,
            "dice": 0.8 - 0.01 * (epoch - 4) ** 2,
        }
        for epoch in epochs
    ]


@pytest.mark.parametrize("epochs", [range(8), range(3, 5), range(1)])
def test_curves(epochs):
    picture = curves(history(epochs), "test")
    assert picture.size == (drawn.CURVES_WIDTH, 3 * drawn.CURVE_HEIGHT + 30)
    blue = (np.array(picture) == drawn.CURVE).all(2)
    for chart in range(3):
        assert blue[chart * drawn.CURVE_HEIGHT : (chart + 1) * drawn.CURVE_HEIGHT].any()


def test_curves_mark_the_best_epoch():
    blue = (np.array(curves(history(range(9)), "test")) == drawn.CURVE).all(2)[2 * drawn.CURVE_HEIGHT :]
    rows, columns = np.nonzero(blue)
    left, right = drawn.MARGIN_LEFT, drawn.CURVES_WIDTH - drawn.MARGIN_RIGHT
    dot = [np.count_nonzero(columns == left + int((right - left) * epoch / 8)) for epoch in (1, 4, 7)]
    assert dot[1] > dot[0] and dot[1] > dot[2]


@pytest.mark.parametrize(
    "low, high", [(0, 0), (0.8, 0.8), (0, 0.01), (-1, 1), (0.123, 17.2), (1e-9, 2e-9), (0.81, 0.812)]
)
def test_axes_reach_over_the_values(low, high):
    ticks, place = drawn._value_axis(low, high, 100, 0)
    assert 3 <= len(ticks) <= 9
    assert ticks[0] <= low + 1e-6 * abs(low) and high - 1e-6 * abs(high) <= ticks[-1]
    assert place(ticks[0]) == pytest.approx(100) and place(ticks[-1]) == pytest.approx(0, abs=1e-6)
