"""A run that is stopped and resumed, however it was stopped, ends as if it had never been."""

import itertools
import json
import random
import resource
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

import train
from tests.conftest import SMALL_RUN
from tests.processes import PROJECT, clean_environment
from tests.test_train_multi_GPU import assert_same_state
from train_utils import fit, load_checkpoint, save_checkpoint, saver
from train_utils.command_line import run_script

LAST = Path("save_weights/last_model.pth")


def run(data, *flags):
    train.main(train.parse_args(["--data-path", str(data), *SMALL_RUN, *map(str, flags)]))


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
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as stopped:
        interrupt_in(3, patch)
        run(shared_drive, "--epochs", 6, "-j", workers)
    assert stopped.value.code == 130
    assert load_checkpoint(LAST)["epoch"] == 2
    run(shared_drive, "--epochs", 6, "-j", workers, "--resume", "auto")
    assert_same_state(undisturbed, load_checkpoint(LAST))
    (table,) = Path().glob("results*.csv")
    assert [line.split(",")[0] for line in table.read_text().splitlines()] == ["epoch", *"012345"]


def test_a_recipe_interrupted_and_resumed(shared_drive, tmp_path, monkeypatch):
    """AdamW, one cycle, averaged weights and a number of steps an epoch come back as they were."""
    flags = ["--recipe", "quick", "--lr", 0.003, "--epochs", 4, "--steps-per-epoch", 3, "-b", 2]
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
    run(shared_drive, "--epochs", 6, "--resume", "auto")
    assert "nothing to resume in save_weights, starting afresh" in capsys.readouterr().out
    assert_same_state(undisturbed, load_checkpoint(LAST))


def test_weights_to_start_from_are_for_the_first_start_alone(shared_drive, working_directory, capsys):
    """The same command, started again and again, as a scheduler does."""
    run(shared_drive, "--epochs", 1, "--output-dir", "first", "--seed", 1)
    command = ["--init-weights", "first/last_model.pth", "--train-on-all"]
    run(shared_drive, "--epochs", 2, *command, "--output-dir", "whole")
    capsys.readouterr()
    said = "--init-weights first/last_model.pth: not read again, as the run goes on from save_weights/last_model.pth\n"
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit):
        interrupt_in(1, patch)
        run(shared_drive, "--epochs", 2, *command, "--resume", "auto")
    assert said not in capsys.readouterr().out
    run(shared_drive, "--epochs", 2, *command, "--resume", "auto")
    assert said in capsys.readouterr().out
    assert_same_state(load_checkpoint("whole/last_model.pth"), load_checkpoint(LAST))
    record = json.loads(LAST.with_name("run.json").read_text())
    assert record["started_from"] == {} and list(record["earlier"][0]["started_from"]) == ["first/last_model.pth"]


def test_resume_auto_passes_damaged_files_over(shared_drive, working_directory, capsys):
    run(shared_drive, "--epochs", 2, "--save-best", "False")
    LAST.write_bytes(LAST.read_bytes()[:1000])
    run(shared_drive, "--epochs", 3, "--resume", "auto")
    output = capsys.readouterr().out
    assert f"passed over: {LAST}" in output and "resuming from save_weights/model_1.pth, after epoch 1" in output


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


def start_and_perhaps_kill(data, delay):
    """Start the command of a run; SIGKILL it `delay` seconds after its first step, where it is still there then."""
    command = [sys.executable, PROJECT / "train.py", "--data-path", data, *SMALL_RUN, "--epochs", "6"]
    command += ["--resume", "auto", "--device", "cpu", "--print-freq", "1"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, env=clean_environment(), text=True)
    watchdog = threading.Timer(120, process.kill)  # so that a hang of ours does not become one of the tests
    watchdog.start()
    for line in process.stdout:
        if line.startswith("Epoch:"):
            break
    watchdog.cancel()
    try:
        process.communicate(timeout=delay)
    except subprocess.TimeoutExpired:
        process.kill()
        process.communicate()
    return process.returncode


@pytest.mark.slow
@pytest.mark.parametrize("kills", [2, 20])
def test_killed_at_random_moments(shared_drive, undisturbed, tmp_path, monkeypatch, kills):
    rng = random.Random(kills)
    for run_number in itertools.count():
        folder = tmp_path / str(run_number)
        folder.mkdir()
        monkeypatch.chdir(folder)
        while returncode := start_and_perhaps_kill(shared_drive, rng.uniform(0, 0.6) if kills > 0 else 60):
            assert returncode == -signal.SIGKILL
            kills -= 1
            if LAST.exists():
                load_checkpoint(LAST)
        assert_same_state(undisturbed, load_checkpoint(LAST))
        (table,) = Path().glob("results*.csv")
        assert [line.split(",")[0] for line in table.read_text().splitlines()] == ["epoch", *"012345"]
        if kills <= 0:
            break
