import csv
from pathlib import Path

import pytest
import torch

from train_utils import MetricLogger, SmoothedValue, logger
from train_utils.logger import ResultsFiles, format_row


def row(epoch, **more):
    return {
        "epoch": epoch,
        "train_loss": 0.32144,
        "lr": 0.009955,
        "dice": 0.8126,
        "global_accuracy": 0.9522,
        "recall": [0.9718, 0.8149],
        "iou": [0.947, 0.686],
        "mean_iou": 0.8165,
        "seconds": 1.5,
    } | more


def test_row_as_the_tutorial_wrote_it():
    assert format_row(row(199)) == (
        "[epoch: 199]\ntrain_loss: 0.3214\nlr: 0.009955\ndice coefficient: 0.813\n"
        "global correct: 95.2\naverage row correct: ['97.2', '81.5']\nIoU: ['94.7', '68.6']\nmean IoU: 81.7\n\n"
    )


def test_files_of_a_run(working_directory):
    results = ResultsFiles()
    for epoch in range(3):
        results.rows.append(row(epoch))
        results.write(results.rows)
    text = Path(f"{results.stem}.txt").read_text()
    assert [line for line in text.splitlines() if "epoch" in line] == ["[epoch: 0]", "[epoch: 1]", "[epoch: 2]"]
    with open(f"{results.stem}.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [r["epoch"] for r in rows] == ["0", "1", "2"]
    assert list(rows[0]) == [
        *("epoch", "train_loss", "lr", "dice", "global_accuracy", "recall_0", "recall_1"),
        *("iou_0", "iou_1", "mean_iou", "seconds"),
    ]
    assert float(rows[0]["recall_1"]) == 0.8149
    assert len(list(working_directory.iterdir())) == 2


def write_run(epochs):
    results = ResultsFiles()
    results.rows = [row(epoch) for epoch in range(epochs)]
    results.write(results.rows)
    return results


def test_resumed_run_goes_on_in_its_files(working_directory):
    before = write_run(3)
    resumed = ResultsFiles()
    resumed.resume(before.stem, [*before.rows, row(3)])  # killed between the checkpoint and the results
    resumed.write(resumed.rows)
    assert resumed.stem == before.stem
    assert Path(f"{before.stem}.txt").read_text().count("[epoch: 3]") == 1


def test_rows_of_later_epochs_are_not_lost(working_directory):
    before = write_run(5)
    resumed = ResultsFiles()
    resumed.resume(before.stem, before.rows[:2])  # from an early checkpoint of a run that went on
    resumed.write(resumed.rows)
    assert resumed.stem != before.stem
    assert Path(f"{before.stem}.txt").read_text().count("[epoch") == 5


def test_nothing_is_written_without_a_row(working_directory):
    ResultsFiles().write([])
    assert not list(working_directory.iterdir())


def test_runs_of_the_same_second_have_files_of_their_own(working_directory):
    stems = {write_run(1).stem for _ in range(4)}
    assert len(stems) == 4 and len(list(working_directory.iterdir())) == 8


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
