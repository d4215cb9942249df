import sys
import types
from pathlib import Path

import pytest

import train
from tests.conftest import SMALL_RUN, refusal
from train_utils.tensorboard_log import TensorBoardLog

ROW = {"epoch": 3, "dice": 0.5, "iou": [0.9, 0.4], "lr": 0.01}


def test_missing_package(shared_drive, working_directory, monkeypatch, capsys):
    flags = ["--data-path", str(shared_drive), *SMALL_RUN, "--epochs", "1", "--output-dir", "out"]
    train.main(train.parse_args(flags))
    before = {path: path.read_bytes() for path in Path("out").iterdir()}
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)  # importing it now fails
    line = refusal(capsys, train, *flags, "--tensorboard", "--overwrite")
    assert line.endswith("--tensorboard: the package tensorboard is missing; run: pip install tensorboard")
    assert {path: path.read_bytes() for path in Path("out").iterdir()} == before


def test_every_epoch_is_written(shared_drive, working_directory, monkeypatch):
    written = []

    class SummaryWriter:
        def __init__(self, folder, purge_step):
            written.append((folder, purge_step))

        def add_scalar(self, tag, value, step):
            written.append((tag, step))

        def flush(self):
            written.append("flush")

    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", types.SimpleNamespace(SummaryWriter=SummaryWriter))
    flags = ["--data-path", str(shared_drive), *SMALL_RUN, "--output-dir", "out", "--tensorboard"]
    train.main(train.parse_args([*flags, "--epochs", "2"]))
    assert written[0] == (str(Path("out/tensorboard")), 0) and written[-1] == "flush"
    for tag in ("train_loss", "lr", "dice", "iou_1"):
        assert [step for name, step in filter(lambda entry: entry[0] == tag, written)] == [0, 1]
    written.clear()
    train.main(train.parse_args([*flags, "--epochs", "3", "--resume", "auto"]))
    assert written[0] == (str(Path("out/tensorboard")), 2) and ("dice", 2) in written and ("dice", 1) not in written


def test_events_can_be_read_back(tmp_path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    TensorBoardLog(tmp_path, first_epoch=0).write(ROW)
    events = accumulator.EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert sorted(events.Tags()["scalars"]) == ["dice", "iou_0", "iou_1", "lr"]
    assert [(event.step, event.value) for event in events.Scalars("iou_1")] == [(3, pytest.approx(0.4))]
