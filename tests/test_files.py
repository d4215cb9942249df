import ntpath
import os
import subprocess
import sys
from pathlib import PureWindowsPath
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from src.devices import to_device
from tests.processes import PROJECT
from train_utils import files, prediction_table
from train_utils.files import OutputError, make_output_folder, replace_whole, require_no_input, write_picture


@pytest.fixture
def busy(monkeypatch):
    """`os.replace` refuses so many times, as on Windows while another program reads the file."""

    def refuse(times, windows):
        calls, replace = [], os.replace

        def replaces(*paths):
            calls.append(paths)
            if len(calls) <= times:
                raise PermissionError(13, "used by another process")
            replace(*paths)

        monkeypatch.setattr(files.os, "replace", replaces)
        monkeypatch.setattr(files, "WINDOWS", windows)
        monkeypatch.setattr(files, "SECONDS_IN_USE", 0.5)
        return calls

    return refuse


def write(path, content):
    with replace_whole(path) as file:
        file.write(content)


def test_a_file_that_another_program_reads_on_windows(tmp_path, busy):
    path = tmp_path / "last_model.pth"
    write(path, b"before")
    calls = busy(3, windows=True)
    write(path, b"after")
    assert path.read_bytes() == b"after" and len(calls) == 4


@pytest.mark.parametrize("windows", [True, False])
def test_a_file_that_stays_in_use(tmp_path, busy, windows):
    path = tmp_path / "results.csv"
    write(path, b"before")
    calls = busy(1000, windows)
    with pytest.raises(OutputError, match=r"results\.csv: cannot be written \(used by another process\)"):
        write(path, b"after")
    assert path.read_bytes() == b"before" and os.listdir(tmp_path) == ["results.csv"]
    assert (len(calls) > 2) == windows


def test_a_folder_is_tried_without_a_trace(tmp_path):
    assert os.listdir(make_output_folder(tmp_path / "new", "--output")) == []


def test_drives_that_number_no_files(tmp_path, monkeypatch):
    first, second = tmp_path / "a", tmp_path / "b"
    first.touch(), second.touch()
    monkeypatch.setattr(files.os, "stat", lambda path: SimpleNamespace(st_dev=7, st_ino=0))
    require_no_input([first], [second], "--output")
    with pytest.raises(OutputError, match="would overwrite the input"):
        require_no_input([first], [first], "--output")


def test_whole_paths_in_a_table_keep_their_slashes(tmp_path, monkeypatch):
    """On Windows, normalising them turns these."""
    row = dict.fromkeys(prediction_table.COLUMNS, "") | {"file": "C:/photographs/left/a.png", "mask": "a.png"}
    with prediction_table.PredictionTable(tmp_path / "predictions.csv") as rows:
        rows.add(row)
    monkeypatch.setattr(prediction_table, "os", SimpleNamespace(path=ntpath))
    monkeypatch.setattr(prediction_table, "Path", PureWindowsPath)
    monkeypatch.setattr(prediction_table, "escaped", lambda path: "D:/elsewhere")
    monkeypatch.setattr(PureWindowsPath, "cwd", lambda: None, raising=False)
    (read,) = prediction_table._read(tmp_path / "predictions.csv")
    assert read["file"] == row["file"]


@pytest.mark.parametrize("format", ["PNG", "JPEG"])
def test_a_picture_on_a_full_disk(tmp_path, format):
    """A thumbnail is of JPEG, which Pillow writes by other means."""
    resource = pytest.importorskip("resource")
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (99, 99, 3), np.uint8))
    write_picture(tmp_path / "whole", picture, format)
    assert np.array(Image.open(tmp_path / "whole")).shape == (99, 99, 3)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (5000, limits[1]))
    try:
        with pytest.raises(OutputError, match="half: cannot be written"):
            write_picture(tmp_path / "half", picture, format)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert os.listdir(tmp_path) == ["whole"]


def test_an_old_python_is_refused_in_one_line():
    code = "import sys; sys.version_info, sys.version = (3, 9, 18), '3.9.18 (main)'; import src.threads"
    done = subprocess.run([sys.executable, "-c", code], cwd=PROJECT, capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr == "error: needs Python 3.10 or newer; this is 3.9.18\n"


@pytest.mark.parametrize(("device", "non_blocking"), [("cuda", True), ("mps", False)])
def test_copies_to_a_device(device, non_blocking):
    tensor = SimpleNamespace(to=lambda device, non_blocking: (str(device), non_blocking))
    assert to_device(tensor, device) == to_device(tensor, torch.device(device)) == (device, non_blocking)
