import pytest
import torch

from train_utils import MetricLogger, SmoothedValue, logger


def test_smoothed_value():
    value = SmoothedValue(window_size=2, fmt="{value:.1f} {median:.1f} {avg:.1f} {max:.1f} {global_avg:.1f}")
    for number in (9.0, torch.tensor(2.0), torch.tensor(4.0)):
        value.update(number)
    assert str(value) == "4.0 2.0 3.0 4.0 5.0"
    assert (value.count, value.global_avg) == (3, pytest.approx(5))
    value.update(1.0, n=3)
    assert value.global_avg == pytest.approx(3)


def test_log_every(capsys):
    logger = MetricLogger(delimiter="  ")
    for item in logger.log_every([1, 2, 3, 4, 5], 2, "Test:"):
        logger.update(loss=item)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("  ")[1] for line in lines[:-1]] == ["[0/5]", "[2/5]", "[4/5]"]
    assert "loss: 5.0000 (3.0000)" in lines[2] and lines[-1].startswith("Test: Total time: 0:00:0")


class OnGpu(SmoothedValue):
    """A series whose values lie on a device other than the CPU."""

    def __init__(self):
        super().__init__()
        self.total = torch.zeros((), device="meta")

    def __str__(self):
        return "x"


@pytest.mark.parametrize("meter, printed", [(SmoothedValue(fmt="x"), list(range(10))), (OnGpu(), [3, 7, 9])])
def test_lines_that_a_gpu_must_be_waited_for_are_a_second_apart(monkeypatch, capsys, meter, printed):
    now = 0.0
    monkeypatch.setattr(logger.time, "time", lambda: now)
    metric_logger = MetricLogger()
    metric_logger.add_meter("loss", meter)
    for _ in metric_logger.log_every(range(10), 1, "Epoch:"):
        now += 0.25
    lines = [line for line in capsys.readouterr().out.splitlines() if "loss: x" in line]
    assert [int(line.split("[")[1].split("/")[0]) for line in lines] == printed
