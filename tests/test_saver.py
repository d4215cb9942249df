from types import SimpleNamespace

import pytest
import torch

from train_utils import saver
from train_utils.files import OutputError
from train_utils.saver import Saver


@pytest.fixture
def written(monkeypatch):
    """The files that were written, as (name, epoch)."""
    files = []
    monkeypatch.setattr(saver, "save_checkpoint", lambda state, path: files.append((path.name, state["epoch"])))
    return files


def states(tmp_path, device, save_best=True):
    """The states after the epochs 0 to 5 of a run."""
    args = SimpleNamespace(save_best=save_best, output_dir=tmp_path)
    results = SimpleNamespace(write=lambda rows: None)
    for epoch in range(6):
        checkpoint = {"epoch": epoch, "history": []}
        yield SimpleNamespace(
            device=torch.device(device), args=args, results=results, checkpoint=lambda state=checkpoint: state
        )


@pytest.mark.parametrize("device, save_best", [("cpu", True), ("cuda", False)])
def test_each_epoch_is_written(tmp_path, written, monkeypatch, device, save_best):
    monkeypatch.setattr(saver, "REST", 1e9)
    run = Saver()
    for state in states(tmp_path, device, save_best):
        run.save(state, improved=False)
    run.wait()
    assert [epoch for name, epoch in written if name == "last_model.pth"] == list(range(6))


def test_epochs_that_are_shorter_than_their_writing(tmp_path, written, monkeypatch):
    """On a GPU the newest and the best are written; the others are passed over."""
    monkeypatch.setattr(saver, "REST", 1e9)
    run = Saver()
    for epoch, state in enumerate(states(tmp_path, "cuda")):
        run.save(state, improved=epoch in (0, 2, 3))
    assert {epoch for _, epoch in written} <= {0}
    run.wait()
    assert written == [("best_model.pth", 0), ("last_model.pth", 0), ("best_model.pth", 3), ("last_model.pth", 5)]


def test_after_the_rest_the_next_epoch_is_written(tmp_path, written, monkeypatch):
    monkeypatch.setattr(saver, "REST", 0.0)
    run = Saver()
    for state in states(tmp_path, "cuda"):
        run.save(state, improved=False)
        run._finished()
    assert [epoch for _, epoch in written] == list(range(6))


def test_a_full_disk_is_told_in_the_next_epoch(tmp_path, monkeypatch):
    def full(state, path):
        raise OutputError(f"{path}: cannot be written")

    monkeypatch.setattr(saver, "save_checkpoint", full)
    run, (first, second, *_) = Saver(), states(tmp_path, "cuda")
    run.save(first, improved=True)
    with pytest.raises(OutputError):
        run._finished()
    with pytest.raises(OutputError):
        run.save(second, improved=False)
