import pytest
import torch
from torchvision.models import VGG16_BN_Weights, WeightsEnum

import train
from src import VGG16UNet, create_model, model_args_from_state_dict
from tests.conftest import SMALL_RUN
from tests.test_unet import batch_norm, double_conv
from train_utils import load_model

CPU = torch.device("cpu")
UPWARDS = {"up1": (1024, 512, 512), "up2": (768, 384, 256), "up3": (384, 192, 128), "up4": (192, 96, 64)}

# Convolutions of VGG-16 by their place in `features`; each is followed by its BatchNorm.
CONVOLUTIONS = {
    0: (3, 64),
    3: (64, 64),
    7: (64, 128),
    10: (128, 128),
    14: (128, 256),
    17: (256, 256),
    20: (256, 256),
    24: (256, 512),
    27: (512, 512),
    30: (512, 512),
    34: (512, 512),
    37: (512, 512),
    40: (512, 512),
}


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return create_model("vgg16").eval()


def test_parameter_count_and_order(model):
    assert sum(parameter.numel() for parameter in model.parameters()) == 26_450_306
    blocks = list(dict.fromkeys(name.split(".")[0] for name in model.state_dict()))
    assert blocks == ["backbone", "up1", "up2", "up3", "up4", "conv"]
    assert len(model.backbone) == 43


def test_state_dict_keys_and_shapes(model):
    expected = {"conv.0.weight": (2, 64, 1, 1), "conv.0.bias": (2,)}
    for index, (into, out) in CONVOLUTIONS.items():
        expected |= {f"backbone.{index}.weight": (out, into, 3, 3), f"backbone.{index}.bias": (out,)}
        expected |= {f"backbone.{index + 1}.{name}": shape for name, shape in batch_norm(out).items()}
    for name, widths in UPWARDS.items():
        expected |= double_conv(f"{name}.conv", *widths)
    assert {name: tuple(value.shape) for name, value in model.state_dict().items()} == expected


def test_backbone_starts_as_torchvisions(model):
    for index, (_, out) in CONVOLUTIONS.items():
        weight, bias = model.backbone[index].weight, model.backbone[index].bias
        assert weight.std().item() == pytest.approx((2 / (9 * out)) ** 0.5, rel=0.1) and not bias.any()


def test_stages(model):
    inputs, handles = [], []
    for level in range(1, 5):
        up = getattr(model, f"up{level}")
        handles.append(up.register_forward_pre_hook(lambda module, given: inputs.append([*given])))
    model(torch.rand(1, 3, 48, 33))
    for handle in handles:
        handle.remove()
    assert [tuple(skip.shape[1:]) for _, skip in inputs] == [(512, 6, 4), (256, 12, 8), (128, 24, 16), (64, 48, 33)]
    assert inputs[0][0].shape[1:] == (512, 3, 2)
    assert all(skip.min() == 0 for _, skip in inputs)  # the taps are behind the ReLU, before the pooling


@pytest.mark.parametrize("size", [(16, 16), (17, 31), (33, 50)])
def test_logits_have_the_size_of_the_input(model, size):
    assert model(torch.rand(1, 3, *size))["out"].shape == (1, 2, *size)


def test_read_off_a_state_dict(model):
    assert model.model_args == {"arch": "vgg16", "num_classes": 2} == model_args_from_state_dict(model.state_dict())


def test_pretrained_backbone_comes_from_torchvision(model, monkeypatch):
    """Out of a file of 2018, which does not count the batches."""
    backbone = {f"features.{name}": value + 1 for name, value in model.backbone.state_dict().items()}
    imagenet = {name: value for name, value in backbone.items() if not name.endswith("num_batches_tracked")}
    asked = []
    monkeypatch.setattr(WeightsEnum, "get_state_dict", lambda self, *args, **kwargs: asked.append(self) or imagenet)
    pretrained = VGG16UNet(2, pretrain_backbone=True)
    assert asked == [VGG16_BN_Weights.IMAGENET1K_V1]
    assert all(torch.equal(pretrained.backbone.state_dict()[name[9:]], value) for name, value in imagenet.items())


def test_trains_and_loads_without_flags(shared_drive, working_directory):
    train.main(train.parse_args(["--data-path", str(shared_drive), *SMALL_RUN, "--arch", "vgg16", "--epochs", "1"]))
    model, checkpoint = load_model("save_weights/best_model.pth", CPU)
    assert type(model) is VGG16UNet and checkpoint["model_args"] == {"arch": "vgg16", "num_classes": 2}
