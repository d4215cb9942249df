from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import train
from tests.conftest import SMALL_RUN
from train_utils import fit, load_checkpoint, saver, train_one_epoch
from train_utils.files import OutputError
from train_utils.saver import Saver


@pytest.fixture
def written(monkeypatch):
    """The files that were written, as (name, epoch)."""
    files = []
    monkeypatch.setattr(saver, "save_checkpoint", lambda state, path: files.append((path.name, state["epoch"])))
    return files


def run_of(tmp_path, device, save_best=True):
    """A saver for a run of six epochs, and their numbers, in which the run then is."""
    epochs = []
    state = SimpleNamespace(
        device=torch.device(device),
        args=SimpleNamespace(save_best=save_best, output_dir=tmp_path),
        results=SimpleNamespace(write=lambda rows: None),
        checkpoint=lambda: {"epoch": epochs[-1], "history": []},
    )
    return Saver(state), (epochs.append(epoch) or epoch for epoch in range(6))


@pytest.mark.parametrize("device, save_best", [("cpu", True), ("cuda", False)])
def test_each_epoch_is_written(tmp_path, written, monkeypatch, device, save_best):
    monkeypatch.setattr(saver, "REST", 1e9)
    run, epochs = run_of(tmp_path, device, save_best)
    for _ in epochs:
        run.save(improved=False)
    run.wait()
    assert [epoch for name, epoch in written if name == "last_model.pth"] == list(range(6))


def test_epochs_that_are_shorter_than_their_writing(tmp_path, written, monkeypatch):
    """On a GPU the newest and the best are written; the others are passed over."""
    monkeypatch.setattr(saver, "REST", 1e9)
    run, epochs = run_of(tmp_path, "cuda")
    for epoch in epochs:
        run.save(improved=epoch in (0, 2, 3))
    assert {epoch for _, epoch in written} <= {0}
    run.wait()
    assert written == [("best_model.pth", 0), ("last_model.pth", 0), ("best_model.pth", 3), ("last_model.pth", 5)]


def test_after_the_rest_the_next_epoch_is_written(tmp_path, written, monkeypatch):
    monkeypatch.setattr(saver, "REST", 0.0)
    run, epochs = run_of(tmp_path, "cuda")
    for _ in epochs:
        run.save(improved=False)
        run._writing.result()
    assert [epoch for _, epoch in written] == list(range(6))


def test_a_full_disk_is_told_in_the_next_epoch(tmp_path, monkeypatch):
    def full(state, path):
        raise OutputError(f"{path}: cannot be written")

    monkeypatch.setattr(saver, "save_checkpoint", full)
    run, epochs = run_of(tmp_path, "cuda")
    next(epochs)
    run.save(improved=True)
    with pytest.raises(OutputError):
        run._writing.result()
    next(epochs)
    with pytest.raises(OutputError):
        run.save(improved=False)


@pytest.mark.parametrize("error", [RuntimeError("a loading process was killed"), OutputError("no room for an event")])
def test_an_error_loses_no_epoch(shared_drive, working_directory, monkeypatch, error):
    """Nothing that the saver kept during its rest."""

    def fails_in_epoch_3(model, optimizer, loader, device, epoch, *args, **options):
        if epoch == 3:
            raise error
        return train_one_epoch(model, optimizer, loader, device, epoch, *args, **options)

    def resting_saver(state):
        own = Saver(state)
        own._may_rest = True  # as on a GPU
        return own

    monkeypatch.setattr(saver, "REST", 1e9)
    monkeypatch.setattr(fit, "Saver", resting_saver)
    monkeypatch.setattr(fit, "train_one_epoch", fails_in_epoch_3)
    with pytest.raises(type(error), match=str(error)):
        train.main(train.parse_args(["--data-path", str(shared_drive), *SMALL_RUN, "--epochs", "5"]))
    assert load_checkpoint("save_weights/last_model.pth")["epoch"] == 2
    (rows,) = Path().glob("results*.csv")
    assert len(rows.read_text().splitlines()) == 4
