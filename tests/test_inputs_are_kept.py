"""No output is an input, whatever the flag and whatever the name that it goes by."""

import os
import re
import shutil
from pathlib import Path

import pytest
import torch

import predict
import train
from src import create_model
from tests.conftest import SMALL_RUN, refusal
from train_utils import publish
from train_utils.files import OutputError, require_no_input


@pytest.fixture
def weights(working_directory):
    """The relative path of a file of weights."""
    Path("weights").mkdir()
    torch.save(create_model(base_c=4).state_dict(), "weights/best_model.pth")
    return Path("weights/best_model.pth")


def other_names(path):
    """The same file by other names."""
    os.symlink(path.parent.resolve(), "link")
    os.symlink(path.resolve(), "link.pth")
    os.link(path, "hard.pth")
    return [
        path,
        path.resolve(),
        Path("weights/../weights", path.name),
        Path("link", path.name),
        "link.pth",
        "hard.pth",
    ]


def test_by_other_names(weights):
    for name in other_names(weights):
        with pytest.raises(
            OutputError, match=f"--flag: would overwrite the input {re.escape(str(name))}; choose another place"
        ):
            require_no_input(["new.pth", name], [weights], "--flag")
        with pytest.raises(OutputError):
            require_no_input([weights], [name], "--flag")
    shutil.copy(weights, "copy.pth")
    require_no_input(["copy.pth", "weights/new.pth"], [weights], "--flag")


def test_export_and_publish(weights, capsys):
    before = weights.read_bytes()
    for name in map(str, other_names(weights)):
        for script, flags in (
            (predict, ["--weights", str(weights), "--export", name, "--device", "cpu"]),
            (publish, [str(weights), name, "--licence", "free", "--provenance", "a test"]),
        ):
            assert f"would overwrite the input {name}; choose" in refusal(capsys, script, *flags)
    assert weights.read_bytes() == before


def test_the_table_of_predictions(working_directory, weights, shared_drive, capsys):
    image = str(next((shared_drive / "DRIVE" / "test" / "images").iterdir()))
    weights.rename("weights/predictions.csv")
    flags = ["--weights", "weights/predictions.csv", "--image", image, "--output", "weights", "--device", "cpu"]
    assert f"--output weights: would overwrite the input {Path('weights/predictions.csv')}" in refusal(
        capsys, predict, *flags
    )


@pytest.mark.parametrize("name", ["best_model.pth", "last_model.pth", "run.json", "model_0.pth"])
def test_weights_that_a_training_starts_from(weights, shared_drive, capsys, name):
    path = weights.rename(weights.with_name(name))
    before = path.read_bytes()
    data = ["--data-path", str(shared_drive), *SMALL_RUN, "--output-dir", "weights", "--epochs", "1", "--overwrite"]
    for flags in (["--init-weights"], ["--backbone-weights"], ["--no-save-best", "--init-weights"]):
        error = refusal(capsys, train, *data, *flags, path)
        assert f"--output-dir weights: would overwrite the input {path}" in error
    assert path.read_bytes() == before
