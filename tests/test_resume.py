"""A run that is stopped and resumed, however it was stopped, ends as if it had never been."""

import hashlib
import itertools
import json
import random
import re
import shutil
import signal
import sys
import time
from pathlib import Path

import pytest
import torch

import train
from tests.conftest import SMALL_RUN
from tests.processes import start_script
from tests.test_train_multi_GPU import assert_same_state
from train_utils import fit, load_checkpoint, save_checkpoint, saver
from train_utils.command_line import UsageError, run_script
from train_utils.synthetic_drive import write_synthetic_drive

LAST = Path("save_weights/last_model.pth")


def run(data, *flags):
    data = map(str, data if isinstance(data, tuple) else (data,))
    train.main(train.parse_args(["--data-path", *data, *SMALL_RUN, *map(str, flags)]))


def interrupt_in(epoch, monkeypatch):
    """Press Ctrl-C in the middle of an epoch."""
    original = fit.train_one_epoch

    def interrupted(*args, **kwargs):
        result = original(*args, **kwargs)
        if args[4] == epoch:
            raise KeyboardInterrupt
        return result

    monkeypatch.setattr(fit, "train_one_epoch", interrupted)


@pytest.fixture(scope="module")
def undisturbed(shared_drive, tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("undisturbed"))
        run(shared_drive, "--epochs", 6)
        return load_checkpoint(LAST)


@pytest.mark.parametrize("workers", [0, 2])
def test_interrupted_and_resumed(shared_drive, undisturbed, working_directory, workers):
    # What was raised is not kept: its frames would hold the loading processes, which a later test would wait for.
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit, match="^130$"):
        interrupt_in(3, patch)
        run(shared_drive, "--epochs", 6, "-j", workers)
    assert load_checkpoint(LAST)["epoch"] == 2
    run(shared_drive, "--epochs", 6, "-j", workers, "--resume", "auto")
    assert_same_state(undisturbed, load_checkpoint(LAST))
    (table,) = Path().glob("results*.csv")
    assert [line.split(",")[0] for line in table.read_text().splitlines()] == ["epoch", *"012345"]


def test_runs_that_go_on_from_one_file_have_results_of_their_own(shared_drive, working_directory):
    run(shared_drive, "--epochs", 1)
    for epochs, folder in ((2, "a"), (3, "b")):
        run(shared_drive, "--epochs", epochs, "--resume", LAST, "--output-dir", folder)
    assert sorted(len(table.read_text().splitlines()) for table in Path().glob("results*.csv")) == [2, 3, 4]
    stems = {load_checkpoint(Path(folder, "last_model.pth"))["results"] for folder in ("save_weights", "a", "b")}
    assert len(stems) == 3
    run(shared_drive, "--epochs", 4, "--resume", "a/last_model.pth", "--output-dir", "./a/../a")
    assert len(Path(f"{load_checkpoint('a/last_model.pth')['results']}.csv").read_text().splitlines()) == 5
    assert len([*Path().glob("results*.csv")]) == 3


@pytest.mark.parametrize("optimizer", ["muon", pytest.param("adamw", marks=pytest.mark.slow)])
def test_a_recipe_interrupted_and_resumed(shared_drive, tmp_path, monkeypatch, optimizer):
    """Its optimizer, one cycle, averaged weights and a number of steps an epoch come back as they were."""
    flags = [
        "--recipe",
        "quick",
        "--optimizer",
        optimizer,
        "--lr",
        0.003,
        "--epochs",
        4,
        "--steps-per-epoch",
        3,
        "-b",
        2,
    ]
    for name in ("undisturbed", "interrupted"):
        (tmp_path / name).mkdir()
        monkeypatch.chdir(tmp_path / name)
        if name == "interrupted":
            with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit):
                interrupt_in(2, patch)
                run(shared_drive, *flags)
        run(shared_drive, *flags, "--resume", "auto")
    assert_same_state(*(load_checkpoint(tmp_path / name / LAST) for name in ("undisturbed", "interrupted")))


def test_resume_auto_starts_afresh_where_there_is_nothing(shared_drive, undisturbed, working_directory, capsys):
    Path("save_weights").mkdir()
    Path("save_weights", "latest.pth").symlink_to("removed.pth")
    run(shared_drive, "--epochs", 6, "--resume", "auto")
    assert "nothing to resume in save_weights, starting afresh" in capsys.readouterr().out
    assert_same_state(undisturbed, load_checkpoint(LAST))


def test_weights_to_start_from_are_for_the_first_start_alone(shared_drive, working_directory, capsys):
    """The same command, started again and again, as a scheduler does."""
    run(shared_drive, "--epochs", 1, "--output-dir", "first", "--seed", 1)
    command = ["--init-weights", "first/last_model.pth", "--train-on-all"]
    run(shared_drive, "--epochs", 2, *command, "--output-dir", "whole")
    capsys.readouterr()
    said = f"--init-weights first/last_model.pth: not read again, as the run goes on from {LAST}\n"
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit):
        interrupt_in(1, patch)
        run(shared_drive, "--epochs", 2, *command, "--resume", "auto")
    assert said not in capsys.readouterr().out
    run(shared_drive, "--epochs", 2, *command, "--resume", "auto")
    assert said in capsys.readouterr().out
    assert_same_state(load_checkpoint("whole/last_model.pth"), load_checkpoint(LAST))
    record = json.loads(LAST.with_name("run.json").read_text())
    assert record["started_from"] == {} and list(record["earlier"][0]["started_from"]) == ["first/last_model.pth"]


def test_training_on_all_does_not_replace_the_best_of_a_validated_run(shared_drive, working_directory):
    run(shared_drive, "--epochs", 1)
    best = LAST.with_name("best_model.pth")
    before = best.read_bytes()
    with pytest.raises(
        UsageError, match=r"--train-on-all: the run of save_weights.last_model.pth holds photographs out"
    ):
        run(shared_drive, "--epochs", 2, "--resume", "auto", "--train-on-all")
    assert best.read_bytes() == before


def test_training_on_all_goes_on_from_weights_of_the_tutorial(shared_drive, working_directory, capsys):
    """Their file tells of no Dice."""
    run(shared_drive, "--epochs", 1)
    checkpoint = torch.load(LAST, weights_only=False)
    for name in ("best_dice", "validated_on", "trained_on", "history", "selected_on"):
        del checkpoint[name]
    torch.save(checkpoint, "tutorial.pth")
    run(shared_drive, "--epochs", 2, "--resume", "tutorial.pth", "--train-on-all", "--output-dir", "all")
    assert "trained on all photographs; the weights are in all" in capsys.readouterr().out


def test_resume_auto_passes_damaged_files_over(shared_drive, working_directory, capsys):
    run(shared_drive, "--epochs", 2, "--save-best", "False")
    LAST.write_bytes(LAST.read_bytes()[:1000])
    run(shared_drive, "--epochs", 3, "--resume", "auto")
    output = capsys.readouterr().out
    earlier = LAST.with_name("model_1.pth")
    assert f"passed over: {LAST}" in output and f"resuming from {earlier}, after epoch 1" in output


def test_other_epochs_and_batch_size(shared_drive, working_directory, capsys):
    run(shared_drive, "--epochs", 4)
    run(shared_drive, "--epochs", 8, "-b", 2, "--resume", LAST)
    output = capsys.readouterr().out
    assert "changed since the checkpoint: batch_size 4 -> 2, epochs 4 -> 8" in output
    checkpoint = load_checkpoint(LAST)
    steps = 3  # 6 photographs, 2 a batch
    assert checkpoint["lr_scheduler"]["last_epoch"] == 8 * steps
    # The rates after epochs 4 .. 7 follow the new schedule: 1 epoch of warm-up, then 7 of decay.
    expected = [0.05 * (1 - (epoch * steps - steps) / (7 * steps)) ** 0.9 for epoch in (5, 6, 7, 8)]
    assert [row["lr"] for row in checkpoint["history"][4:]] == pytest.approx(expected)


def test_other_photographs_to_validate_on(shared_drive, working_directory):
    run(shared_drive, "--epochs", 1, "--val-split", 2)
    best = load_checkpoint(LAST) | {"best_dice": 0.99}  # on what was held out
    del best["path"]
    save_checkpoint(best, LAST)
    run(shared_drive, "--epochs", 2, "--resume", "auto")
    checkpoint = load_checkpoint(LAST)
    assert checkpoint["selected_on"] == "test" and checkpoint["best_dice"] < 0.99


@pytest.mark.parametrize("epochs", [2, 3])
def test_the_best_epoch_is_chosen_anew_on_other_photographs(
    shared_drive, working_directory, capsys, monkeypatch, epochs
):
    """From the one that the run goes on from; the scores are those of the best weights."""
    best, scores, drawn = LAST.with_name("best_model.pth"), LAST.with_name("scores.json"), []
    scoring = sys.modules["train_utils.scoring.score"]  # its package has a function of this name
    curves = scoring.curves

    def remember(history, evaluated_on):
        drawn[:] = [row["epoch"] for row in history]
        return curves(history, evaluated_on)

    monkeypatch.setattr(scoring, "curves", remember)
    run(shared_drive, "--epochs", 1, "--val-split", 2)
    stored = torch.load(LAST, weights_only=True)
    stored["history"][0]["dice"] = 0.99
    torch.save(stored, LAST)
    capsys.readouterr()
    run(shared_drive, "--epochs", epochs, "--val-split", 1, "--resume", "auto")
    output = capsys.readouterr().out
    assert "held out, or their labels; the best epoch is chosen anew, from epoch 0 on\n" in output
    assert "not written by this run" not in output and "the weights are in ./save_weights" in output
    for _ in range(2):
        dice = load_checkpoint(best)["best_dice"]
        assert dice == load_checkpoint(LAST)["best_dice"] < 0.99
        report = json.loads(scores.read_text())
        assert report["sha256"] == hashlib.sha256(best.read_bytes()).hexdigest()
        run(shared_drive, "--epochs", epochs + 1, "--val-split", 1, "--resume", "auto")
        assert drawn == list(range(1, epochs + 1))  # the Dice of epoch 0 was on others
    assert "chosen anew" not in capsys.readouterr().out


@pytest.mark.parametrize("changed", ["photographs", "labels"])
def test_a_finished_run_keeps_its_files_when_what_is_held_out_changes(drive, working_directory, changed, capsys):
    run(drive, "--epochs", 1, "--val-split", 2)
    before = {path.name: path.read_bytes() for path in LAST.parent.iterdir()}
    split = 2
    if changed == "labels":
        first, second = sorted((drive / "DRIVE/training/1st_manual").iterdir())[-2:]
        shutil.copyfile(first, second)
    else:
        split = 1
    with pytest.raises(UsageError, match=r"last_model\.pth: its 1 epochs are done, .* raise --epochs"):
        run(drive, "--epochs", 1, "--val-split", split, "--resume", "auto")
    assert {path.name: path.read_bytes() for path in LAST.parent.iterdir()} == before
    assert "chosen anew" not in capsys.readouterr().out
    run(drive, "--epochs", 2, "--val-split", split, "--resume", "auto")


def test_changed_labels_of_the_training_are_told(drive, working_directory, capsys):
    run(drive, "--epochs", 1)
    labels = sorted((drive / "DRIVE/training/1st_manual").iterdir())
    run(drive, "--epochs", 2, "--resume", "auto")
    assert "labels of the training" not in capsys.readouterr().out
    shutil.copyfile(labels[0], labels[1])
    run(drive, "--epochs", 3, "--resume", "auto")
    assert "changed since the checkpoint: labels of the training, or photographs were taken" in capsys.readouterr().out


def test_data_sets_in_another_order_keep_the_best(shared_drive, working_directory):
    """As a resumed run may name them."""
    other = write_synthetic_drive("other", training=2, test=1, width=80, height=72)
    run((shared_drive, other), "--epochs", 1)
    stored = torch.load(LAST, weights_only=True)
    torch.save(stored | {"best_dice": 0.99}, LAST)
    run((other, shared_drive), "--epochs", 2, "--resume", "auto")
    assert load_checkpoint(LAST)["best_dice"] == 0.99


def test_a_run_that_replaces_another_leaves_nothing_of_it_to_go_on_from(shared_drive, working_directory, capsys):
    run(shared_drive, "--epochs", 2)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit):
        interrupt_in(0, patch)
        run(shared_drive, "--epochs", 1, "--overwrite", "--seed", 1)
    capsys.readouterr()
    run(shared_drive, "--epochs", 1, "--resume", "auto", "--seed", 1)
    assert "nothing to resume in save_weights, starting afresh" in capsys.readouterr().out


def test_weights_to_start_from_may_be_gone_when_the_run_goes_on(shared_drive, working_directory):
    run(shared_drive, "--epochs", 1, "--output-dir", "first", "--base-c", 4)
    command = ["--init-weights", "first/last_model.pth", "--resume", "auto"]
    data = ["--data-path", str(shared_drive), "-b", "4", "--crop-size", "64", "--device", "cpu"]
    train.main(train.parse_args([*data, *command, "--epochs", "1"]))
    Path("first/last_model.pth").unlink()
    train.main(train.parse_args([*data, *command, "--epochs", "2"]))
    assert load_checkpoint(LAST)["epoch"] == 1 and load_checkpoint(LAST)["model_args"]["base_c"] == 4


def test_what_to_resume_is_of_this_run(shared_drive, working_directory, monkeypatch, capsys):
    run(shared_drive, "--epochs", 1)
    interrupt_in(0, monkeypatch)
    with pytest.raises(SystemExit):
        run(shared_drive, "--epochs", 1, "--seed", 1, "--overwrite")
    assert capsys.readouterr().out.splitlines()[-1] == "interrupted in epoch 0; no epoch was saved yet"


def test_files_are_of_their_epoch_however_slow_the_disk(
    shared_drive, undisturbed, working_directory, monkeypatch, capsys
):
    def slow(checkpoint, path):
        time.sleep(0.3)
        save_checkpoint(checkpoint, path)

    monkeypatch.setattr(saver, "save_checkpoint", slow)
    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        interrupt_in(3, patch)
        run(shared_drive, "--epochs", 6, "--save-best", "False")
    assert f"interrupted in epoch 3; the last whole state is in {LAST}" in capsys.readouterr().out
    for epoch in range(3):
        checkpoint = load_checkpoint(LAST.with_name(f"model_{epoch}.pth"))
        assert checkpoint["epoch"] == epoch and len(checkpoint["history"]) == epoch + 1
        assert checkpoint["lr_scheduler"]["last_epoch"] == 2 * (epoch + 1)
    run(shared_drive, "--epochs", 6, "--save-best", "False", "--resume", "auto")
    assert_same_state(undisturbed, load_checkpoint(LAST))


def test_a_full_disk_keeps_the_state_before(shared_drive, working_directory, capsys):
    resource = pytest.importorskip("resource")
    run(shared_drive, "--epochs", 1)
    before = LAST.read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) // 2, limits[1]))
    try:
        with pytest.raises(SystemExit) as stopped:
            flags = ["--data-path", str(shared_drive), *SMALL_RUN, "--epochs", "2", "--resume", "auto"]
            run_script(train.main, train.parse_args(flags))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert stopped.value.code == 1
    message = capsys.readouterr().err
    assert message.count("\n") == 1 and "_model.pth: cannot be written (File too large)" in message
    assert LAST.read_bytes() == before


def start_and_perhaps_kill(data, folder, delay, from_first_step):
    """Start a run; SIGKILL it `delay` seconds after its start or first step. Return the last epoch that it began.

    None: it was at its end before.
    """
    flags = ["--data-path", data, *SMALL_RUN, "--crop-size", "64", "--batch-size", "6", "--epochs", EPOCHS, "-j", "0"]
    process = start_script("train", [*flags, "--resume", "auto", "--print-freq", "1"], folder)
    printed = folder / "stdout.txt"
    while from_first_step and process.is_alive() and not (printed.exists() and "Epoch: [" in printed.read_text()):
        time.sleep(0.005)
    process.join(delay)
    if process.is_alive():
        process.kill()
    process.join()
    assert not (folder / "stderr.txt").exists() or not (folder / "stderr.txt").read_text()
    if process.exitcode == 0:
        assert json.loads((folder / "ended.json").read_text())["status"] == 0
        return None
    assert process.exitcode == -signal.SIGKILL
    begun = re.findall(r"^Epoch: \[(\d+)\]", printed.read_text() if printed.exists() else "", re.MULTILINE)
    return int(begun[-1]) if begun else -1


EPOCHS = 60  # of the run that is killed, each of one step


@pytest.mark.slow
@pytest.mark.parametrize("kills", [200])
def test_killed_at_random_moments(shared_drive, tmp_path, kills):
    """After each kill the files of weights load, nothing older than the last whole epoch is lost, and in the end the
    weights are those of a run that was never killed."""
    rng, done, in_an_epoch, gone_on = random.Random(0), 0, 0, 0
    (tmp_path / "undisturbed").mkdir()
    assert start_and_perhaps_kill(shared_drive, tmp_path / "undisturbed", 3600, False) is None
    undisturbed = load_checkpoint(tmp_path / "undisturbed" / LAST)
    assert len(undisturbed["history"]) == EPOCHS
    for run_number in itertools.count():
        folder, before = tmp_path / str(run_number), -1
        folder.mkdir()
        while done < kills:
            # Every fifth kill falls into the start of the process or its end.
            delay, from_first_step = (rng.uniform(0, 3), False) if done % 5 == 0 else (rng.uniform(0, 1.5), True)
            begun = start_and_perhaps_kill(shared_drive, folder, delay, from_first_step)
            if begun is None:
                break
            done += 1
            in_an_epoch += begun >= 0
            for path in (folder / LAST, (folder / LAST).with_name("best_model.pth")):
                last = load_checkpoint(path)["epoch"] if path.exists() else -1
                # While an epoch is trained, the state of the one before is written.
                assert path.name != LAST.name or (last >= before and last >= begun - 2), (done, before, begun, last)
                before = last if path.name == LAST.name else before
            gone_on += before >= 0
        else:
            assert start_and_perhaps_kill(shared_drive, folder, 3600, False) is None
        assert_same_state(undisturbed, load_checkpoint(folder / LAST))
        (table,) = folder.glob("results*.csv")
        assert [line.split(",")[0] for line in table.read_text().splitlines()] == ["epoch", *map(str, range(EPOCHS))]
        if done >= kills:
            break
    print(f"{done} kills, {in_an_epoch} within epochs, {gone_on} with a state to go on from, {run_number + 1} runs")
    assert in_an_epoch > kills / 2
