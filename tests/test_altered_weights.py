"""Files of weights that lie: each is refused in one line, before a model is built."""

import argparse
import copy
import math
import shutil

import pytest
import torch

import predict
import train
from src import ARCHITECTURES, create_model
from src.weights import CheckpointError
from tests.conftest import SMALL_RUN, refusal
from tests.test_checkpoint import save_as_the_tutorial
from train_utils import load_model

CPU = torch.device("cpu")
NAN, INF = math.nan, math.inf


def train_small(data, *flags):
    train.main(train.parse_args(["--data-path", str(data), *SMALL_RUN, *flags]))


@pytest.fixture(scope="module")
def content(shared_drive, tmp_path_factory):
    """What a run wrote. Do not change it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("run"))
        train_small(shared_drive, "--epochs", "1")
        return torch.load("save_weights/last_model.pth", weights_only=True)


def put(*keys_and_value):
    """An alteration: put a value at these keys."""
    *keys, last, value = keys_and_value

    def alter(content):
        for key in keys:
            content = content[key]
        content[last] = value

    return alter


def drop(*keys):
    """An alteration: take the value at these keys away."""
    *keys, last = keys

    def alter(content):
        for key in keys:
            content = content[key]
        del content[last]

    return alter


def bare(alter):
    """An alteration of the state dict of a tutorial's file, which stores no model_args."""

    def altered(content):
        del content["model_args"]
        alter(content)

    return altered


def tensors(**changes):
    """An alteration of a weight that keeps its shape."""

    def alter(content):
        content["model"] = content["model"] | {name.replace("__", "."): value for name, value in changes.items()}

    return alter


FIRST = (4, 3, 3, 3)  # the shape of in_conv.0.weight
ALTERED = {
    "fov 0": put("fov_diameter", 0.0),
    "fov -5": put("fov_diameter", -5),
    "fov nan": put("fov_diameter", NAN),
    "fov inf": put("fov_diameter", INF),
    "fov 1e9": put("fov_diameter", 1e9),
    "fov text": put("fov_diameter", "540"),
    "fov none": put("fov_diameter", None),
    "fov tensor": put("fov_diameter", torch.tensor([540.0, 1.0])),
    "mean nan": put("mean", [NAN] * 3),
    "mean 1e30": put("mean", [1e30, 0.5, 0.5]),
    "mean of 2": put("mean", [0.5, 0.5]),
    "mean number": put("mean", 0.5),
    "mean text": put("mean", "abc"),
    "mean tensor": put("mean", torch.zeros(3)),
    "mean bools": put("mean", [True] * 3),
    "std 0": put("std", [0.1, 0.0, 0.1]),
    "std -1": put("std", [-1.0] * 3),
    "std inf": put("std", [INF] * 3),
    "std of 4": put("std", [0.1] * 4),
    "std dict": put("std", {0: 1}),
    "normalization unknown": put("normalization", "other"),
    "normalization none": put("normalization", None),
    "normalization list": put("normalization", ["local"]),
    "threshold 2": put("threshold", 2.0),
    "threshold 0": put("threshold", 0),
    "threshold 1": put("threshold", 1.0),
    "threshold nan": put("threshold", NAN),
    "threshold text": put("threshold", "auto"),
    "tta number": put("tta", 1),
    "tta text": put("tta", "False"),
    "trained_scale 0": put("trained_scale", 0.0),
    "trained_scale -1": put("trained_scale", -1.0),
    "trained_scale nan": put("trained_scale", NAN),
    "trained_scale list": put("trained_scale", [1.0]),
    "epoch text": put("epoch", "7"),
    "epoch -3": put("epoch", -3),
    "epoch 1.5": put("epoch", 1.5),
    "epoch huge": put("epoch", 10**400),
    "averaged_steps 0": put("averaged_steps", 0),
    "averaged_steps text": put("averaged_steps", "9"),
    "args list": put("args", [1]),
    "args none": put("args", None),
    "args tensor": put("args", "lr", torch.zeros(2)),
    "args number": put("args", 3, 4),
    "args optimizer": put("args", "optimizer", 3),
    "args base_size": put("args", "base_size", "many"),
    "args val_split": put("args", "val_split", -1),
    "args namespace": put("args", argparse.Namespace(val_split="x")),
    "best_dice text": put("best_dice", "0.8"),
    "best_dice nan": put("best_dice", NAN),
    "best_dice 80": put("best_dice", 80.0),
    "history dict": put("history", {}),
    "history numbers": put("history", [1, 2]),
    "history short row": put("history", [{"epoch": 0}]),
    "history dice alone": drop("history", 0, "recall"),
    "history text": put("history", 0, "train_loss", "low"),
    "history iou": put("history", 0, "iou", 0.5),
    "results path": put("results", "../../results"),
    "results number": put("results", 3),
    "trained_on text": put("trained_on", "abc"),
    "trained_on numbers": put("trained_on", [1]),
    "validated_on none": put("validated_on", None),
    "selected_on list": put("selected_on", []),
    "optimizer list": put("optimizer", []),
    "optimizer without state": drop("optimizer", "state"),
    "scaler text": put("scaler", "x"),
    "scaler scale": put("scaler", {"scale": -1.0}),
    "training_model list": put("training_model", [1]),
    "training_model of another": put("training_model", {"a": torch.zeros(1)}),
    "model_args list": put("model_args", [3, 2]),
    "model_args none": put("model_args", None),
    "arch unknown": put("model_args", "arch", "resnet"),
    "arch list": put("model_args", "arch", ["unet"]),
    "arch other": put("model_args", {"arch": "vgg16", "num_classes": 2}),
    "argument unknown": put("model_args", "depth", 5),
    "base_c 2000": put("model_args", "base_c", 2000),
    "base_c 1000": put("model_args", "base_c", 1000),
    "base_c 0": put("model_args", "base_c", 0),
    "base_c -4": put("model_args", "base_c", -4),
    "base_c 4.5": put("model_args", "base_c", 4.5),
    "base_c text": put("model_args", "base_c", "4"),
    "base_c missing": drop("model_args", "base_c"),
    "base_c huge": put("model_args", "base_c", 10**30),
    "num_classes 1": put("model_args", "num_classes", 1),
    "num_classes 3": put("model_args", "num_classes", 3),
    "num_classes 1e9": put("model_args", "num_classes", 10**9),
    "in_channels 4": put("model_args", "in_channels", 4),
    "bilinear 1": put("model_args", "bilinear", 1),
    "bilinear false": put("model_args", "bilinear", False),
    "weight missing": drop("model", "up1.conv.0.weight"),
    "weight too much": put("model", "more\nlines", torch.zeros(1)),
    "weight transposed": tensors(in_conv__0__weight=torch.zeros(3, 4, 3, 3)),
    "weight nan": tensors(in_conv__0__weight=torch.full(FIRST, NAN)),
    "weight beyond float32": tensors(in_conv__0__weight=torch.full(FIRST, 1e300, dtype=torch.float64)),
    "weight complex": tensors(in_conv__0__weight=torch.ones(FIRST, dtype=torch.complex64)),
    "weight whole numbers": tensors(in_conv__0__weight=torch.ones(FIRST, dtype=torch.int64)),
    "weight sparse": tensors(in_conv__0__weight=torch.ones(FIRST).to_sparse()),
    "weight on no device": tensors(in_conv__0__weight=torch.ones(FIRST, device="meta")),
    "weight of one value": tensors(in_conv__0__weight=torch.ones(1).expand(FIRST)),
    "variance negative": tensors(in_conv__1__running_var=torch.full((4,), -1.0)),
    "bare of another": bare(put("model", {"in_conv.0.weight": torch.zeros(2, 2), "out_conv.0.weight": torch.zeros(2)})),
    "bare without last": bare(drop("model", "out_conv.0.weight")),
    "bare huge": bare(tensors(in_conv__0__weight=torch.zeros(1).expand(10**5, 3, 3, 3))),
    "bare of no channel": bare(tensors(in_conv__0__weight=torch.zeros(0, 3, 3, 3))),
}


def altered(content, alter, path):
    content = copy.deepcopy(content)
    alter(content)
    torch.save(content, path)
    return path


@pytest.mark.parametrize("alteration", ALTERED)
def test_each_is_refused_in_one_line(content, tmp_path, alteration):
    path = altered(content, ALTERED[alteration], tmp_path / "lies.pth")
    with pytest.raises(CheckpointError) as refused:
        load_model(path, CPU)
    message = str(refused.value)
    assert message.startswith(f"{path}: ") and "\n" not in message and len(message) < len(str(path)) + 300


@pytest.mark.parametrize("alteration", ["fov 0", "mean nan", "threshold 2", "normalization unknown", "base_c 2000"])
def test_the_scripts_refuse_them(content, shared_drive, working_directory, capsys, alteration):
    path = altered(content, ALTERED[alteration], "lies.pth")
    photograph = next((shared_drive / "DRIVE" / "test" / "images").iterdir())
    data = ["--data-path", shared_drive, *SMALL_RUN]
    for script, flags, status in (
        (predict, ["--weights", path, "--image", photograph, "--device", "cpu"], 1),
        (train, [*data, "--resume", path], 1),
        (train, [*data, "--test-only", "--resume", path], 1),
        (train, [*data, "--init-weights", path], 2),  # found while the flags are read
    ):
        assert "lies.pth: " in refusal(capsys, script, *flags, status=status)
    assert not list(working_directory.glob("*.png"))


def state(index, name, value):
    return put("optimizer", "state", index, name, value)


@pytest.mark.parametrize(
    "alter",
    [
        state(0, "momentum_buffer", torch.zeros(2)),
        state(0, "momentum_buffer", torch.full(FIRST, NAN)),
        state(0, "momentum_buffer", "none"),
        state(0, "step", torch.zeros(())),
        put("optimizer", "state", 10**6, {}),
        put("optimizer", "state", "first", {}),
        put("optimizer", "state", 0, []),
    ],
)
def test_a_state_of_the_optimizer_that_does_not_fit(content, shared_drive, working_directory, capsys, alter):
    path = altered(content, alter, "lies.pth")
    message = refusal(capsys, train, "--data-path", shared_drive, *SMALL_RUN, "--epochs", 2, "--resume", path)
    assert "lies.pth: 'optimizer' does not hold the state of --optimizer sgd" in message


def test_settings_of_the_optimizer_are_those_of_the_flags(content, shared_drive, working_directory):
    flags = ["--epochs", "2", "--resume"]
    final = []
    for alter in (lambda content: None, put("optimizer", "param_groups", 0, "maximize", True)):
        path = altered(content, alter, "lies.pth")
        train_small(shared_drive, *flags, str(path))
        final.append(torch.load("save_weights/last_model.pth", weights_only=True)["model"]["out_conv.0.weight"])
        shutil.rmtree("save_weights")
    assert torch.equal(*final)


def test_no_memory_goes_into_a_file_that_is_refused(content, tmp_path):
    resource = pytest.importorskip("resource")
    path = altered(content, put("model_args", "base_c", 1000), tmp_path / "lies.pth")
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    with open("/proc/self/statm") as file:
        used = int(file.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + 2**28, hard))
    try:
        with pytest.raises(CheckpointError, match="another model than it says"):
            load_model(path, CPU)
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_files_of_all_architectures_load(tmp_path, arch):
    model = create_model(arch, **({"base_c": 4} if "base_c" in ARCHITECTURES[arch][1] else {}))
    torch.save({"model": model.state_dict(), "model_args": model.model_args}, tmp_path / "a.pth")
    loaded, _ = load_model(tmp_path / "a.pth", CPU)
    assert all(torch.equal(value, loaded.state_dict()[name]) for name, value in model.state_dict().items())
    assert {value.device.type for value in loaded.state_dict().values()} == {"cpu"}


@pytest.mark.parametrize("extra", [{}, {"scaler": {}}, {"scaler": torch.amp.GradScaler("cpu").state_dict()}])
def test_files_of_the_tutorial_load(tmp_path, extra):
    namespace = argparse.Namespace(data_path="./", num_classes=1, lr=0.01, amp=bool(extra), resume="", save_best=True)
    model = create_model(base_c=4)
    path = save_as_the_tutorial(tmp_path / "best_model.pth", model.half(), args=namespace, **extra)
    assert load_model(path, CPU)[1]["args"]["data_path"] == "./"


def test_a_file_that_names_only_a_part_of_its_model(content, tmp_path):
    """The rest has the defaults that it would be built with."""
    path = altered(content, put("model_args", {"base_c": 4, "pretrain_backbone": True}), tmp_path / "a.pth")
    assert load_model(path, CPU)[1]["model_args"] == content["model_args"]


@pytest.mark.parametrize("share", [0.01, 0.1, 0.5, 0.99])
def test_a_part_of_a_file(content, tmp_path, share):
    path = tmp_path / "part.pth"
    torch.save(content, path)
    path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])
    with pytest.raises(
        CheckpointError, match=r"part\.pth: not a (whole )?file of weights; give one that train\.py wrote"
    ):
        load_model(path, CPU)
