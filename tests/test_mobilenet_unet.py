from urllib.error import URLError

import pytest
import torch
from torchvision.models import MobileNet_V3_Large_Weights, WeightsEnum, mobilenet_v3_large

import train
from src import BackboneWeightsError, MobileV3Unet, create_model, model_args_from_state_dict
from tests.conftest import SMALL_RUN
from tests.test_unet import double_conv
from train_utils import load_model
from train_utils.command_line import run_script

CPU = torch.device("cpu")
UPWARDS = {"up1": (272, 136, 112), "up2": (152, 76, 40), "up3": (64, 32, 24), "up4": (40, 20, 16)}  # in, mid, out


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return create_model("mobilenet_v3").eval()


@pytest.fixture(scope="module")
def imagenet():
    """Stands for torchvision's file: the classification network's weights, from another seed than the model's."""
    torch.manual_seed(1)
    return mobilenet_v3_large().state_dict()


def test_parameter_count_and_order(model):
    assert sum(parameter.numel() for parameter in model.parameters()) == 3_454_146
    blocks = list(dict.fromkeys(name.split(".")[0] for name in model.state_dict()))
    assert blocks == ["backbone", "up1", "up2", "up3", "up4", "conv"]


def test_state_dict_keys_and_shapes(model, imagenet):
    features = {
        name.removeprefix("features."): value for name, value in imagenet.items() if name.startswith("features")
    }
    expected = {
        f"backbone.{name}": tuple(value.shape) for name, value in features.items() if int(name.split(".")[0]) <= 15
    }
    for name, widths in UPWARDS.items():
        expected |= double_conv(f"{name}.conv", *widths)
    expected |= {"conv.0.weight": (2, 16, 1, 1), "conv.0.bias": (2,)}
    assert {name: tuple(value.shape) for name, value in model.state_dict().items()} == expected


def test_stages(model):
    stages, inputs = [], []
    handles = [
        getattr(model, f"up{level}").register_forward_pre_hook(lambda module, given: inputs.append(given))
        for level in range(1, 5)
    ]
    handles += [
        model.backbone[index].register_forward_hook(lambda module, given, output: stages.append(output))
        for index in (1, 3, 6, 12, 15)
    ]
    logits = []
    handles.append(model.conv.register_forward_hook(lambda module, given, output: logits.append(output)))
    out = model(torch.rand(1, 3, 96, 64))["out"]
    for handle in handles:
        handle.remove()
    assert [tuple(stage.shape[1:]) for stage in stages] == [
        *[(16, 48, 32), (24, 24, 16), (40, 12, 8), (112, 6, 4), (160, 3, 2)]
    ]
    assert inputs[0][0] is stages[4]
    assert all(skip is stage for (_, skip), stage in zip(inputs, reversed(stages[:4]), strict=True))
    expected = torch.nn.functional.interpolate(logits[0], size=(96, 64), mode="bilinear", align_corners=False)
    assert logits[0].shape == (1, 2, 48, 32) and torch.equal(out, expected)


@pytest.mark.parametrize("size", [(1, 1), (16, 16), (33, 50), (65, 47)])
def test_logits_have_the_size_of_the_input(model, size):
    assert model(torch.rand(1, 3, *size))["out"].shape == (1, 2, *size)


def test_read_off_a_file_of_the_tutorial(model, tmp_path):
    assert (
        model.model_args == {"arch": "mobilenet_v3", "num_classes": 2} == model_args_from_state_dict(model.state_dict())
    )
    assert model_args_from_state_dict(MobileV3Unet(5).state_dict())["num_classes"] == 5
    torch.save({"model": model.state_dict()}, tmp_path / "tutorial.pth")
    loaded, _ = load_model(tmp_path / "tutorial.pth", CPU)
    image = torch.rand(1, 3, 40, 50)
    assert type(loaded) is MobileV3Unet and torch.equal(loaded(image)["out"], model(image)["out"])


def offers(monkeypatch, imagenet):
    """Let torchvision find the weights in its cache; return what was asked for."""
    asked = []
    monkeypatch.setattr(WeightsEnum, "get_state_dict", lambda self, *args, **kwargs: asked.append(self) or imagenet)
    return asked


def is_pretrained(model, imagenet):
    backbone = model.backbone.state_dict()
    return all(torch.equal(value, imagenet[f"features.{name}"]) for name, value in backbone.items())


def test_pretrained_backbone_comes_from_torchvision(monkeypatch, imagenet):
    asked = offers(monkeypatch, imagenet)
    model = MobileV3Unet(2, pretrain_backbone=True)
    assert asked == [MobileNet_V3_Large_Weights.IMAGENET1K_V1] and is_pretrained(model, imagenet)
    assert not is_pretrained(MobileV3Unet(2), imagenet) and len(asked) == 1


@pytest.mark.parametrize("error", [URLError("no route to host"), RuntimeError("invalid hash value")])
def test_impossible_download_says_where_the_file_is(monkeypatch, error):
    def fail(*args, **kwargs):
        raise error

    monkeypatch.setattr(WeightsEnum, "get_state_dict", fail)
    with pytest.raises(BackboneWeightsError) as raised:
        MobileV3Unet(2, pretrain_backbone=True)
    message = str(raised.value)
    assert "no route to host" in message or "invalid hash value" in message
    assert "https://download.pytorch.org/models/mobilenet_v3_large-8738ca79.pth" in message
    assert "--backbone-weights" in message and "checkpoints" in message


def arguments(data, *flags):
    return train.parse_args(["--data-path", str(data), *SMALL_RUN, "--epochs", "1", *flags])


@pytest.mark.parametrize("source", ["imagenet", "file"])
def test_training_starts_from_the_backbone_weights(
    shared_drive, working_directory, monkeypatch, imagenet, tmp_path, source
):
    """And a resumed run needs them no more."""
    if source == "file":
        torch.save(imagenet, tmp_path / "mobilenet.pth")
        source = str(tmp_path / "mobilenet.pth")
    else:
        offers(monkeypatch, imagenet)
    # With a rate of 0 the weights stay, and only the running statistics of BatchNorm move.
    flags = ("--arch", "mobilenet_v3", "--lr", "0", "--backbone-weights")
    train.main(arguments(shared_drive, *flags, source))
    model, checkpoint = load_model("save_weights/last_model.pth", CPU)
    assert type(model) is MobileV3Unet and checkpoint["model_args"] == {"arch": "mobilenet_v3", "num_classes": 2}
    assert torch.equal(model.backbone[3].block[0][0].weight, imagenet["features.3.block.0.0.weight"])
    train.main(arguments(shared_drive, *flags, "gone.pth", "--resume", "auto", "--epochs", "2"))


def test_wrong_backbone_weights(shared_drive, working_directory, capsys):
    torch.save({"features.0.0.weight": torch.zeros(3)}, "other.pth")
    torch.save([1, 2], "list.pth")
    for arch, source, message in (
        ("mobilenet_v3", "gone.pth", "gone.pth: no such file"),
        ("mobilenet_v3", "other.pth", "other.pth: not torchvision's weights of MobileNet_V3_Large; get https://"),
        ("mobilenet_v3", "list.pth", "list.pth: holds no weights"),
        ("unet", "other.pth", "--backbone-weights: unet has no backbone; use --arch mobilenet_v3 or --arch vgg16"),
    ):
        with pytest.raises(SystemExit) as stopped:
            run_script(train.main, arguments(shared_drive, "--arch", arch, "--backbone-weights", source))
        lines = capsys.readouterr().err.splitlines()
        assert stopped.value.code == 1 and len(lines) == 1 and message in lines[0]


def test_another_architecture_than_the_weights(shared_drive, working_directory, capsys, model):
    optimizer = {"state": {}, "param_groups": []}
    torch.save({"model": model.state_dict(), "optimizer": optimizer, "epoch": 0}, "mobilenet.pth")
    with pytest.raises(SystemExit):
        run_script(train.main, arguments(shared_drive, "--resume", "mobilenet.pth"))
    assert "--arch" in capsys.readouterr().err
