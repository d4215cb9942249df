import argparse
import os
import pickle

import pytest
import torch

from my_dataset import DRIVE_MEAN, DRIVE_STD
from src import create_model
from src.weights import CheckpointError
from tests.conftest import on_posix
from train_utils import load_checkpoint, load_model, save_checkpoint
from train_utils.files import OutputError, make_output_folder, replace_whole

CPU = torch.device("cpu")


def small_model(**kwargs):
    return create_model(**{"base_c": 4, **kwargs})


def save_as_the_tutorial(path, model, **more):
    """What the tutorial's train.py wrote: the flags as a pickled Namespace, nothing said of the model."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, weight_decay=1e-4)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    content = {
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "lr_scheduler": scheduler.state_dict(),
        "epoch": 7,
        "args": argparse.Namespace(lr=0.01, device="cuda", epochs=200, resume=""),
    }
    torch.save(content | more, path)
    return path


@pytest.mark.parametrize("bilinear", [True, False])
def test_files_of_the_tutorial(tmp_path, bilinear):
    model = small_model(num_classes=3, in_channels=1, bilinear=bilinear)
    path = save_as_the_tutorial(tmp_path / "model_7.pth", model)
    with pytest.raises(pickle.UnpicklingError):  # the fault that is mended here
        torch.load(path, weights_only=True)
    loaded, checkpoint = load_model(path, CPU)
    assert checkpoint["model_args"] == {
        "arch": "unet",
        "in_channels": 1,
        "num_classes": 3,
        "base_c": 4,
        "bilinear": bilinear,
    }
    assert (checkpoint["mean"], checkpoint["std"]) == (list(DRIVE_MEAN), list(DRIVE_STD))
    assert checkpoint["args"] == {"lr": 0.01, "device": "cuda", "epochs": 200, "resume": ""}
    assert checkpoint["epoch"] == 7 and not loaded.training
    for name, value in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value)


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module."])
def test_prefixes_of_wrappers(tmp_path, prefix):
    model = small_model()
    state = {prefix + name: value for name, value in model.state_dict().items()}
    torch.save({"model": state}, tmp_path / "wrapped.pth")
    loaded, _ = load_model(tmp_path / "wrapped.pth", CPU)
    assert torch.equal(loaded.out_conv[0].weight, model.out_conv[0].weight)


def test_bare_state_dict(tmp_path):
    torch.save(small_model().state_dict(), tmp_path / "bare.pth")
    assert load_checkpoint(tmp_path / "bare.pth")["model_args"]["base_c"] == 4


def test_round_trip_loads_where_only_data_is_allowed(tmp_path):
    save_checkpoint({"model": small_model().state_dict(), "args": {"lr": 0.01}}, tmp_path / "a.pth")
    assert torch.load(tmp_path / "a.pth", weights_only=True)["args"] == {"lr": 0.01}


class RunsCode:
    def __init__(self, command):
        self.command = command

    def __reduce__(self):
        return os.system, (self.command,)


@pytest.mark.parametrize("form", ["torch", "torch legacy", "pickle"])
def test_code_in_a_file_is_refused_and_not_run(tmp_path, form):
    path, trace = tmp_path / "evil.pth", tmp_path / "was_run"
    content = {"model": small_model().state_dict(), "args": RunsCode(f"touch {trace}")}
    if form == "pickle":
        path.write_bytes(pickle.dumps({"args": content["args"]}, protocol=2))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=form == "torch")
    with pytest.raises(CheckpointError, match=r"evil\.pth: refused, .*\.system\); nothing of it was executed"):
        load_checkpoint(path)
    assert not trace.exists()


def test_files_that_are_no_checkpoint(tmp_path):
    path = tmp_path / "weights.pth"
    save_checkpoint({"model": small_model().state_dict()}, path)
    whole = path.read_bytes()
    torch.save({"model": small_model().state_dict()}, path, _use_new_zipfile_serialization=False)
    legacy = path.read_bytes()
    contents = [legacy[: len(legacy) * share // 50] for share in range(1, 50)] + [
        b"",
        b"hello",
        b"<html>404</html>",
        os.urandom(5000),
        whole[: len(whole) // 2],
        whole[:-30],
        whole[50:],
    ]
    for content in contents:
        path.write_bytes(content)
        with pytest.raises(CheckpointError, match=r"weights\.pth: not a (whole )?file of weights"):
            load_checkpoint(path)
    for content in (
        [1, 2],
        {"epoch": 3},
        {"model": {}},
        {"model": {"a": 1}},
        {"model": {1: torch.zeros(1)}},
        torch.zeros(3),
    ):
        torch.save(content, path)
        with pytest.raises(CheckpointError, match=r"weights\.pth: holds no model weights"):
            load_checkpoint(path)


def test_missing_file_and_folder(tmp_path):
    with pytest.raises(CheckpointError, match=r"nothing\.pth: no such file"):
        load_checkpoint(tmp_path / "nothing.pth")
    with pytest.raises(CheckpointError, match="is no file"):
        load_checkpoint(tmp_path)


def test_weights_of_another_model(tmp_path):
    torch.save({"model": torch.nn.Linear(2, 2).state_dict()}, tmp_path / "linear.pth")
    with pytest.raises(CheckpointError, match=r"linear\.pth: .*another model"):
        load_checkpoint(tmp_path / "linear.pth")
    torch.save({"in_conv.0.weight": torch.zeros(3), "out_conv.0.weight": torch.zeros(())}, tmp_path / "flat.pth")
    with pytest.raises(CheckpointError, match=r"flat\.pth: .*another model"):
        load_checkpoint(tmp_path / "flat.pth")
    state = small_model().state_dict()
    state.pop("down2.1.0.weight")
    torch.save({"model": state}, tmp_path / "partial.pth")
    with pytest.raises(
        CheckpointError, match=r"partial\.pth: .*at down2\.1\.0\.weight .* \(16, 8, 3, 3\), the file noth"
    ):
        load_model(tmp_path / "partial.pth", CPU)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite(tmp_path, value):
    model = small_model()
    model.up1.conv[0].weight.data[0, 0, 0, 0] = value
    torch.save({"model": model.state_dict()}, tmp_path / "nan.pth")
    with pytest.raises(CheckpointError, match=r"nan\.pth: the weights hold NaN or infinite"):
        load_model(tmp_path / "nan.pth", CPU)


def test_a_failed_write_leaves_the_old_file(tmp_path):
    resource = pytest.importorskip("resource")
    path = tmp_path / "last_model.pth"
    save_checkpoint({"model": small_model().state_dict(), "epoch": 1}, path)
    before = path.read_bytes()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) // 2, hard))
    try:
        with pytest.raises(OutputError, match=r"last_model\.pth: cannot be written .*intact"):
            save_checkpoint({"model": small_model(base_c=8).state_dict(), "epoch": 2}, path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["last_model.pth"]


def test_an_interrupted_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"old")
    with pytest.raises(KeyboardInterrupt), replace_whole(path) as file:
        file.write(b"half of the n")
        raise KeyboardInterrupt
    assert path.read_bytes() == b"old" and os.listdir(tmp_path) == ["file"]


@on_posix
def test_a_device_is_not_replaced(tmp_path):
    os.mkfifo(tmp_path / "fifo")
    with pytest.raises(OutputError, match="fifo: cannot be written .it is a folder or a device.; choose another name"):
        save_checkpoint({}, tmp_path / "fifo")
    assert os.listdir(tmp_path) == ["fifo"] and not (tmp_path / "fifo").is_file()


def test_output_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(OutputError, match=r"--output-dir .*file.weights: cannot be written \(.+\); choose another"):
        make_output_folder(tmp_path / "file" / "weights", "--output-dir")
    assert make_output_folder(tmp_path / "new" / "folder", "--output-dir").is_dir()
