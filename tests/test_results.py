import csv
from pathlib import Path

from train_utils.results import ResultsFiles, format_row


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
