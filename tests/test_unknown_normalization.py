"""Weights whose file does not tell how photographs were normalised in training."""

import argparse

import numpy as np
import pytest
import torch

import predict
from src import Segmenter, create_model
from src.field_of_view import find_field_of_view
from tests.test_checkpoint import save_as_the_tutorial
from tests.test_export import with_an_exporter
from tests.test_predict import MEAN, STD, make_model, photographs, pixels, run  # noqa: F401
from train_utils import load_checkpoint, load_model, publish
from train_utils.checkpoint import add_to_checkpoint

SAID = "does not tell how photographs were normalised in training: DRIVE's mean and standard deviation are assumed"
TOLD = ["--mean", *MEAN, "--std", *STD]


@pytest.fixture
def bare(tmp_path):
    torch.save(make_model().state_dict(), tmp_path / "bare.pth")
    return tmp_path / "bare.pth"


def test_it_is_said_and_flags_tell_it(tmp_path, bare, photographs, capsys):  # noqa: F811
    path, masks = photographs / "01.png", {}
    for name, flags in {"assumed": [], "told": TOLD, "local": [*TOLD, "--normalization", "local"]}.items():
        run("--weights", bare, "--image", path, "--output", tmp_path / f"{name}.png", *flags)
        lines = [line for line in capsys.readouterr().out.splitlines() if SAID in line]
        assert len(lines) == (name == "assumed") and all(str(bare) in line for line in lines)
        masks[name] = pixels(tmp_path / f"{name}.png")
    model, checkpoint = load_model(bare, torch.device("cpu"))
    photograph = pixels(path)
    for name, normalization in (("told", "dataset"), ("local", "local")):
        changes = {"mean": MEAN, "std": STD, "normalization": normalization}
        expected = Segmenter(model, checkpoint | changes)(photograph, find_field_of_view(photograph))
        assert np.array_equal(masks[name] > 0, expected.vessels)
    assert not np.array_equal(masks["told"], masks["assumed"]) and not np.array_equal(masks["told"], masks["local"])


def test_it_is_not_forgotten_when_the_file_is_written_again(tmp_path, bare):
    add_to_checkpoint(bare, threshold=0.4)
    assert load_checkpoint(bare)["normalization_assumed"] is True
    published = tmp_path / "published.pth"
    publish.main(publish.parse_args([str(bare), str(published), "--licence", "free", "--provenance", "a test"]))
    assert load_checkpoint(published)["normalization_assumed"] is True


def test_nothing_is_said_where_the_file_tells(tmp_path, photographs, capsys):  # noqa: F811
    model = create_model(base_c=4)
    flags = argparse.Namespace(data_path="./", num_classes=1)
    torch.save({"model": model.state_dict(), "mean": MEAN, "std": STD}, tmp_path / "told.pth")
    for path in (save_as_the_tutorial(tmp_path / "tutorial.pth", model, args=flags), tmp_path / "told.pth"):
        run("--weights", path, "--image", photographs / "01.png", "--output", tmp_path / "a.png")
        assert SAID not in capsys.readouterr().out


@pytest.mark.parametrize("wrong", [["--mean", "0.5", "0.5"], ["--std", "0", "1", "1"], ["--normalization", "other"]])
def test_wrong_flags(capsys, wrong):
    with pytest.raises(SystemExit) as stopped:
        predict.parse_args(wrong)
    assert stopped.value.code == 2 and capsys.readouterr().err.count("\n") == 1


@pytest.mark.slow
@with_an_exporter
def test_an_onnx_file_holds_what_the_flags_tell(tmp_path, bare):
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxscript")
    run("--weights", bare, "--export", tmp_path / "model.onnx", *TOLD)
    metadata = {item.key: item.value for item in onnx.load(tmp_path / "model.onnx").metadata_props}
    assert metadata["mean"] == str(MEAN)
