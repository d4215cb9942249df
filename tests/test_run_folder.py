"""One folder, one run: nothing is replaced unasked, two runs never share it, and it tells how it came about."""

import hashlib
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import train
import train_multi_GPU
from src.errors import UserError
from tests.conftest import SMALL_RUN, on_posix, refusal
from tests.processes import PROJECT, clean_environment, in_processes
from tests.test_resume import interrupt_in
from tests.test_train import evaluations
from tests.test_train_multi_GPU import assert_same_state
from train_utils import load_checkpoint, lock, run_folder
from train_utils.command_line import UsageError, run_script

WEIGHTS = Path("save_weights")
ONE = [*SMALL_RUN, "--epochs", "1"]


def run(data, *flags, script=train):
    script.main(script.parse_args(["--data-path", str(data), *ONE, *map(str, flags)]))


def weights_in(folder):
    return {path.name: path.read_bytes() for path in folder.glob("*.pth")}


@pytest.mark.parametrize("script, folder", [(train, "save_weights"), (train_multi_GPU, "multi_train")])
def test_a_second_start_is_refused_with_the_ways_out(shared_drive, working_directory, capsys, script, folder):
    run(shared_drive, script=script)
    before = weights_in(Path(folder))
    error = refusal(capsys, script, "--data-path", shared_drive, *ONE, "--seed", 1)
    assert f"{folder}: holds best_model.pth and last_model.pth of an earlier run" in error
    assert all(way in error for way in ("--resume auto", "--overwrite", "another --output-dir"))
    assert weights_in(Path(folder)) == before and not Path(folder, "run.lock").exists()
    run(shared_drive, "--test-only", "--resume", Path(folder, "best_model.pth"), script=script)
    run(shared_drive, "--resume", "auto", script=script)
    assert weights_in(Path(folder)) == before
    run(shared_drive, "--overwrite", "--seed", "1", script=script)
    assert weights_in(Path(folder)) != before


def test_overwrite_replaces_a_run_by_one_that_goes_on_from_elsewhere(shared_drive, working_directory, monkeypatch):
    """As if the folder had been empty."""
    run(shared_drive, "--output-dir", "first")
    run(shared_drive, "--base-c", 2, "--seed", 7, "--output-dir", "second")
    replacing = ["--resume", "first/last_model.pth", "--epochs", 2, "--output-dir", "second", "--overwrite"]
    with monkeypatch.context() as context:
        interrupt_in(1, context)
        with pytest.raises(SystemExit):
            run(shared_drive, *replacing)
    assert weights_in(Path("second")) == {} and not Path("second", "scores.json").exists()
    starts = json.loads(Path("second", "run.json").read_text())
    assert [start["flags"]["output_dir"] for start in (*starts["earlier"], starts)] == ["first", "second"]
    before = weights_in(Path("first"))
    run(shared_drive, *replacing)
    run(shared_drive, "--resume", "first/last_model.pth", "--epochs", 2, "--output-dir", "third")
    assert_same_state(*(load_checkpoint(Path(folder, "last_model.pth")) for folder in ("second", "third")))
    assert weights_in(Path("first")) == before
    # One that goes on in its own folder loses nothing.
    run(shared_drive, "--resume", "auto", "--epochs", 3, "--output-dir", "second", "--overwrite")
    assert load_checkpoint(Path("second", "last_model.pth"))["epoch"] == 2
    starts = json.loads(Path("second", "run.json").read_text())
    assert len(starts["earlier"]) == 2


def test_a_kill_in_the_first_epoch_leaves_nothing_of_the_replaced_run(shared_drive, working_directory):
    run(shared_drive, "--no-save-best")
    Path(WEIGHTS, "model_mine.pth").write_bytes(b"of no run")
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit):
        interrupt_in(0, patch)
        run(shared_drive, "--overwrite", "--seed", 1)
    assert list(weights_in(WEIGHTS)) == ["model_mine.pth"]


def test_a_better_later_epoch_is_not_replaced_unasked(shared_drive, working_directory, monkeypatch, capsys):
    evaluations(monkeypatch, 0.5, 0.8, 0.6, *[0.7] * 4)
    run(shared_drive, "--no-save-best", "--epochs", 3)
    before, resumed = weights_in(WEIGHTS), WEIGHTS / "model_0.pth"
    again = ["--data-path", shared_drive, *ONE, "--epochs", 4, "--resume"]
    error = refusal(capsys, train, *again, resumed, "--output-dir", "./save_weights")
    assert f"{resumed}: going on after its epoch 0 would replace what --output-dir save_weights" in error
    assert "up to epoch 2, with a better Dice); give another --output-dir, or --overwrite" in error
    assert weights_in(WEIGHTS) == before
    run(shared_drive, "--epochs", 2, "--resume", resumed, "--output-dir", "other")
    run(shared_drive, "--epochs", 3, "--resume", WEIGHTS / "best_model.pth")  # epoch 1, which it keeps
    assert weights_in(WEIGHTS)["best_model.pth"] == before["best_model.pth"]
    run(shared_drive, "--epochs", 2, "--resume", resumed, "--overwrite")
    assert load_checkpoint(WEIGHTS / "best_model.pth")["best_dice"] == 0.7
    assert weights_in(WEIGHTS)["model_0.pth"] == before["model_0.pth"]
    Path(WEIGHTS, "last_model.pth").write_bytes(b"damaged")  # but the best is there
    assert "up to epoch 1, with a better Dice)" in refusal(capsys, train, *again, resumed, "--output-dir", WEIGHTS)
    Path(WEIGHTS, "best_model.pth").write_bytes(b"damaged")
    run(shared_drive, "--epochs", 2, "--resume", resumed)


def test_what_overwrite_goes_on_without_is_gone(shared_drive, working_directory, monkeypatch):
    """A run from an earlier epoch on leaves no weights of the later ones that it gave up, though they were better."""
    evaluations(monkeypatch, 0.5, 0.8, 0.6, *[0.4] * 3)
    run(shared_drive, "--no-save-best", "--epochs", 3)
    before = weights_in(WEIGHTS)
    run(shared_drive, "--epochs", 2, "--resume", WEIGHTS / "model_0.pth", "--overwrite")
    after = weights_in(WEIGHTS)
    assert set(after) == {"model_0.pth", "last_model.pth"} and after["model_0.pth"] == before["model_0.pth"]
    assert load_checkpoint(WEIGHTS / "last_model.pth")["epoch"] == 1


def test_a_refused_run_is_not_recorded(shared_drive, working_directory):
    run(shared_drive)
    before = Path("save_weights", "run.json").read_bytes()
    with pytest.raises(UserError, match="--optimizer"):
        run(shared_drive, "--resume", "auto", "--optimizer", "adamw")
    assert Path("save_weights", "run.json").read_bytes() == before


@pytest.mark.parametrize("name", ["best_model.pth", "last_model.pth"])
def test_weights_that_no_run_can_go_on_from_stay(shared_drive, working_directory, name):
    run(shared_drive)
    Path("save_weights").rename("first")
    WEIGHTS.mkdir()
    Path(WEIGHTS, name).write_bytes(b"of an earlier run")
    with pytest.raises(UserError, match="none that a run can go on from"):
        run(shared_drive, "--resume", "auto")
    with pytest.raises(UsageError, match=f"holds {name} of an earlier run"):
        run(shared_drive, "--resume", "first/last_model.pth", "--epochs", "2")
    assert Path(WEIGHTS, name).read_bytes() == b"of an earlier run"


def test_every_epoch_of_an_earlier_run_stays(shared_drive, working_directory):
    WEIGHTS.mkdir()
    Path(WEIGHTS, "model_0.pth").write_bytes(b"of an earlier run")
    with pytest.raises(UsageError, match="holds model_0.pth of an earlier run"):
        run(shared_drive, "--save-best", "False")


@pytest.mark.parametrize("name", ["best_model.pth", "last_model.pth"])
def test_one_file_of_weights_is_enough(shared_drive, working_directory, name):
    WEIGHTS.mkdir()
    Path(WEIGHTS, name).write_bytes(b"of another run")
    with pytest.raises(UsageError, match=f"holds {name} of an earlier run"):
        run(shared_drive)


def test_a_run_that_finished_no_epoch_left_nothing(shared_drive, working_directory, monkeypatch):
    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr("train_utils.train_and_eval.criterion", interrupted)
        run(shared_drive)
    assert [path.name for path in WEIGHTS.iterdir()] == ["run.json"]
    run(shared_drive)


def test_the_demo_may_be_started_again(shared_drive, working_directory):
    shutil.copytree(shared_drive / "DRIVE", "demo/DRIVE")
    flags = ["--demo", *ONE]
    for _ in range(2):
        train.main(train.parse_args(flags))
    train.main(train.parse_args([*flags, "--output-dir", "mine"]))
    with pytest.raises(UsageError, match="mine: holds"):
        train.main(train.parse_args([*flags, "--output-dir", "mine"]))


# ---- two at once


def start(data, *flags):
    """Start a long run; return it when it trains."""
    command = [sys.executable, PROJECT / "train.py", "--data-path", data, *SMALL_RUN, "--epochs", "100000", *flags]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    heed = lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)  # noqa: E731
    process = subprocess.Popen(command, env=clean_environment(), preexec_fn=heed, **pipes)
    for line in process.stdout:
        if line.startswith("Epoch: [1]"):
            return process
    raise AssertionError(process.stderr.read())


@on_posix
@pytest.mark.parametrize("signal_name", ["SIGINT", pytest.param("SIGTERM", marks=pytest.mark.slow), "SIGKILL"])
def test_a_second_run_waits_for_the_end_of_the_first(shared_drive, working_directory, signal_name):
    end = signal.Signals[signal_name]
    first = start(shared_drive, "-j", "2")  # its loading processes may outlive it
    try:
        for flag in (["--overwrite"], ["--resume", "auto"]):
            with pytest.raises(UsageError, match=rf"another run is writing there \(process {first.pid} on \S+\)"):
                run(shared_drive, *flag)
        assert Path(WEIGHTS, "run.lock").exists()
        first.send_signal(end)
        first.communicate(timeout=60)
    finally:
        first.kill()
    assert Path(WEIGHTS, "run.lock").exists() == (end != signal.SIGINT)
    run(shared_drive, "--resume", "auto")
    assert not Path(WEIGHTS, "run.lock").exists()


def test_an_error_leaves_no_lock(shared_drive, working_directory, monkeypatch):
    def broken(*args, **kwargs):
        raise ZeroDivisionError

    monkeypatch.setattr(train, "fit", broken)
    with pytest.raises(ZeroDivisionError):
        run(shared_drive)
    assert not Path(WEIGHTS, "run.lock").exists()


@on_posix
def test_a_lock_that_its_owner_removed_is_taken_anew(working_directory, monkeypatch):
    """The owner ends between the opening and the locking of its file."""
    path, whole, calls = Path("run.lock"), lock._lock, []

    def late(file):
        if not calls:
            path.unlink()
        calls.append(file)
        whole(file)

    monkeypatch.setattr(lock, "_lock", late)
    mine = lock.FolderLock(path, "--output-dir")
    mine.take()
    assert len(calls) == 2 and os.path.samestat(os.fstat(mine.file.fileno()), path.stat())
    mine.release()
    assert not path.exists()


def test_a_file_system_without_locks(working_directory, monkeypatch, capsys):
    def unable(file):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(lock, "_lock", unable)
    mine = lock.FolderLock(Path("run.lock"), "--output-dir")
    mine.take()
    mine.release()
    assert "run.lock: cannot be locked (Operation not supported); see that no other run" in capsys.readouterr().out


def second_start(meeting_point, data):
    flags = ["--data-path", str(data), *ONE, "-j", "0", "-b", "1", "--dist-url", meeting_point]
    run_script(train_multi_GPU.main, train_multi_GPU.parse_args(flags))


def test_all_processes_stop_together(shared_drive, tmp_path):
    (tmp_path / "multi_train").mkdir()
    (tmp_path / "multi_train" / "best_model.pth").touch()
    printed = in_processes(second_start, 2, tmp_path, f"file://{tmp_path}/meet", shared_drive)
    assert "multi_train: holds best_model.pth of an earlier run" in printed[0]
    assert "Traceback" not in "".join(printed)
    assert not (tmp_path / "multi_train" / "run.lock").exists()


# ---- run.json and scores.json


def test_what_is_told_of_a_run(shared_drive, working_directory):
    run(shared_drive, "--seed", "3", "--val-split", "2")
    record = json.loads(Path(WEIGHTS, "run.json").read_text())
    assert (record["seed"], record["first_epoch"], record["earlier"]) == (3, 0, [])
    assert record["flags"]["fov_diameter"] > 60 and record["flags"]["crop_size"] == 48  # settled
    assert record["versions"]["torch"] == torch.__version__ and len(record["versions"]) == 5
    data = record["data"]
    assert (data["folders"], data["trained_on"], data["validated_on"]) == ([str(shared_drive)], 4, 2)
    assert data["digest"] == hashlib.sha256(json.dumps(digests(shared_drive)).encode()).hexdigest()
    assert record["command"] == [sys.executable, *sys.argv] and record["working_directory"] == os.getcwd()
    run(shared_drive, "--seed", "3", "--val-split", "2", "--epochs", "2", "--resume", "auto")
    resumed = json.loads(Path(WEIGHTS, "run.json").read_text())
    (earlier,) = resumed["earlier"]
    assert resumed["first_epoch"] == 1 and earlier == {name: record[name] for name in record if name != "earlier"}


def digests(data):
    """Of each photograph, with its label and its ROI mask."""

    def digest(path):
        return hashlib.sha256(path.read_bytes()).hexdigest()[:16]

    folder = data / "DRIVE" / "training"
    files = [sorted((folder / name).iterdir()) for name in ("images", "1st_manual", "mask")]
    every = [
        f"{digest(photograph)} {digest(label)}{digest(mask)}" for photograph, label, mask in zip(*files, strict=True)
    ]
    return [sorted(every[:-2]), sorted(every[-2:])]


@pytest.mark.slow
def test_a_run_is_repeated_from_its_file(shared_drive, working_directory):
    command = [sys.executable, PROJECT / "train.py", "--data-path", shared_drive, *ONE, "--seed", "5"]
    subprocess.run(command, env=clean_environment(), check=True, capture_output=True)
    record = json.loads(Path(WEIGHTS, "run.json").read_text())
    WEIGHTS.rename("first")
    again = shlex.join(record["command"])
    subprocess.run(again, shell=True, env=clean_environment(), check=True, capture_output=True)
    first, second = (
        torch.load(Path(folder, "last_model.pth"), weights_only=True)["model"] for folder in ("first", WEIGHTS)
    )
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_weights_that_it_started_from(shared_drive, working_directory):
    run(shared_drive)
    digest = hashlib.sha256(Path(WEIGHTS, "best_model.pth").read_bytes()).hexdigest()
    run(shared_drive, "--init-weights", "save_weights/best_model.pth", "--output-dir", "tuned")
    assert json.loads(Path("tuned/run.json").read_text())["started_from"] == {"save_weights/best_model.pth": digest}


def test_the_commit_of_the_code(tmp_path, monkeypatch):
    monkeypatch.setattr(run_folder, "PROJECT", tmp_path)
    assert run_folder.git_commit() is None
    git = ["git", "-C", tmp_path, "-c", "user.name=a", "-c", "user.email=a@b.c"]
    subprocess.run([*git, "init", "-q"], check=True)
    assert run_folder.git_commit() is None
    (tmp_path / "code.py").touch()
    subprocess.run([*git, "add", "."], check=True)
    subprocess.run([*git, "commit", "-q", "-m", "first"], check=True)
    subprocess.run([*git, "tag", "-a", "-m", "v1", "v1"], check=True)
    head = subprocess.run([*git, "rev-parse", "HEAD"], check=True, capture_output=True, text=True).stdout.strip()
    assert run_folder.git_commit() == head
    (tmp_path / "code.py").write_text("changed")
    assert run_folder.git_commit() == f"{head}-dirty"


def test_scores_name_their_origin(shared_drive, working_directory):
    run(shared_drive, "--seed", "3", "--threshold", "auto")
    scores = json.loads(Path(WEIGHTS, "scores.json").read_text())
    assert scores["seed"] == 3 and scores["flags"]["base_c"] == 4 and scores["flags"]["epochs"] == 1
    assert scores["sha256"] == hashlib.sha256(Path(WEIGHTS, "best_model.pth").read_bytes()).hexdigest()
