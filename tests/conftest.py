"""Small synthetic data for all tests; real photographs where DRIVE_ROOT names the folder that contains DRIVE."""

import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from train_utils.command_line import run_script
from train_utils.scoring import contact_sheet
from train_utils.scoring.contact_sheet import PANEL
from train_utils.synthetic_drive import synthetic_photograph, write_synthetic_drive

SMALL_RUN = ["--device", "cpu", "--base-c", "4", "--base-size", "80", "--crop-size", "48", "--lr", "0.05"]

on_posix = pytest.mark.skipif(os.name == "nt", reason="of names, pipes, signals or limits that Windows does not have")

# Sums depend on the number of threads in the last bits, and the processes that tests start have one.
torch.set_num_threads(1)


def refusal(capsys, script, *flags, status=1):
    """Run a script with flags that cannot work; return what it says, which must be one line."""
    with pytest.raises(SystemExit) as stopped:
        run_script(script.main, script.parse_args([*map(str, flags)]))
    assert stopped.value.code == status
    (line,) = capsys.readouterr().err.splitlines()
    return line


@pytest.fixture(autouse=True)
def small_contact_sheets(monkeypatch: pytest.MonkeyPatch) -> None:
    """Hundreds of runs draw one, which takes a tenth of a second; see `full_contact_sheets`."""
    monkeypatch.setattr(contact_sheet, "PANEL", PANEL // 4)


@pytest.fixture
def full_contact_sheets(monkeypatch: pytest.MonkeyPatch, small_contact_sheets: None) -> None:
    """As large as users have them."""
    monkeypatch.setattr(contact_sheet, "PANEL", PANEL)


@pytest.fixture(scope="session")
def shared_drive(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that contains a small DRIVE: 6 training and 4 test photographs of 80 x 72 pixels. Do not change it."""
    return write_synthetic_drive(tmp_path_factory.mktemp("data"), training=6, test=4, width=80, height=72)


@pytest.fixture(scope="session")
def synthetic() -> list[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Photographs of 360 x 340 pixels, each with its vessels and its field of view. Do not change them."""
    return [synthetic_photograph(360, 340, np.random.default_rng(seed)) for seed in range(4)]


@pytest.fixture
def drive(shared_drive: Path, tmp_path: Path) -> Path:
    """A copy of it for one test, to break at will."""
    shutil.copytree(shared_drive / "DRIVE", tmp_path / "data" / "DRIVE")
    return tmp_path / "data"


def pytest_configure() -> None:
    root = os.environ.get("DRIVE_ROOT")
    if root and not Path(root, "DRIVE").is_dir():
        raise pytest.UsageError(f"DRIVE_ROOT={root}: no folder DRIVE in it; name the folder that contains it, or none")


@pytest.fixture
def real_drive() -> Path:
    if not os.environ.get("DRIVE_ROOT"):  # unset, or set to nothing
        pytest.skip("DRIVE_ROOT does not name the folder that contains the real DRIVE")
    return Path(os.environ["DRIVE_ROOT"])


@pytest.fixture
def working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working directory, since the scripts write where they are started."""
    folder = tmp_path / "work"
    folder.mkdir()
    monkeypatch.chdir(folder)
    return folder
