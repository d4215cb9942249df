import contextlib
import os
import sys

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


def test_meters_are_attributes():
    metric_logger = MetricLogger()
    metric_logger.update(loss=2.0)
    assert metric_logger.loss.global_avg == 2.0 and SmoothedValue(fmt=None).fmt == metric_logger.loss.fmt
    with pytest.raises(AttributeError, match="no meter 'lr'"):
        metric_logger.lr  # noqa: B018


def test_nothing_is_kept_of_gradients():
    value = SmoothedValue()
    value.update(2 * torch.ones((), requires_grad=True))
    assert value.total.grad_fn is None and value.deque[0].grad_fn is None and value.global_avg == 2


def test_a_meter_needs_not_be_added(capsys):
    metric_logger = MetricLogger()
    metric_logger.meters["accuracy"].update(0.5, n=2)
    assert metric_logger.accuracy.count == 2
    for _ in metric_logger.log_every(range(2), 1):
        pass
    assert "None" not in capsys.readouterr().out


def test_log_every(capsys):
    logger = MetricLogger(delimiter="  ")
    for item in logger.log_every([1, 2, 3, 4, 5], 2, "Test:"):
        logger.update(loss=item)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("  ")[1] for line in lines[:-1]] == ["[0/5]", "[2/5]", "[4/5]"]
    assert "loss: 5.0000 (3.0000)" in lines[2] and lines[-1].startswith("Test: Total time: 0:00:0")


@pytest.fixture
def terminal(monkeypatch, capsys):
    monkeypatch.setattr(type(sys.stdout), "isatty", lambda stream: True)
    monkeypatch.setattr(logger.shutil, "get_terminal_size", lambda: os.terminal_size((40, 24)))


def test_in_a_terminal_a_loop_takes_one_line(terminal, capsys):
    metric_logger = MetricLogger(delimiter="  ", one_line=True)
    for item in metric_logger.log_every(range(5), 1, "Epoch: [3]"):
        metric_logger.update(loss=item)
    *shown, total, _ = capsys.readouterr().out.split("\n")
    assert len(shown) == 1 and "Total time" in total
    lines = shown[0].split("\r")[1:]
    assert [line[:19].rstrip() for line in lines] == [f"Epoch: [3]  [{number}/5]" for number in range(5)]
    assert {len(line) for line in lines} == {39}
    assert {line.rstrip().endswith("eta: 0:00:00") for line in lines} == {True}  # what does not fit is left out whole


def test_an_error_gets_a_line_of_its_own(terminal, capsys):
    metric_logger = MetricLogger(one_line=True)
    with contextlib.suppress(RuntimeError), contextlib.closing(metric_logger.log_every(range(5), 1)) as items:
        for item in items:
            metric_logger.update(loss=item)
            if item == 2:
                raise RuntimeError
    output = capsys.readouterr().out
    assert output.startswith("\r") and output.count("\n") == 1 and output.endswith("\n")


def test_elsewhere_every_line_stays(capsys):
    for _ in MetricLogger(one_line=True).log_every(range(3), 1, "Epoch: [3]"):
        pass
    output = capsys.readouterr().out
    assert len(output.splitlines()) == 4 and "\r" not in output


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
