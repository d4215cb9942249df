import pytest
import torch

from src import UNet, create_model, model_args_from_state_dict


def batch_norm(channels):
    return {
        "weight": (channels,),
        "bias": (channels,),
        "running_mean": (channels,),
        "running_var": (channels,),
        "num_batches_tracked": (),
    }


def double_conv(prefix, into, mid, out):
    shapes = {f"{prefix}.0.weight": (mid, into, 3, 3), f"{prefix}.3.weight": (out, mid, 3, 3)}
    shapes |= {f"{prefix}.1.{name}": shape for name, shape in batch_norm(mid).items()}
    return shapes | {f"{prefix}.4.{name}": shape for name, shape in batch_norm(out).items()}


# (in, mid, out) of each double convolution, written out by hand for base_c = 32.
BILINEAR = {
    "in_conv": (3, 32, 32),
    "down1.1": (32, 64, 64),
    "down2.1": (64, 128, 128),
    "down3.1": (128, 256, 256),
    "down4.1": (256, 256, 256),
    "up1.conv": (512, 256, 128),
    "up2.conv": (256, 128, 64),
    "up3.conv": (128, 64, 32),
    "up4.conv": (64, 32, 32),
}
TRANSPOSED = {
    "in_conv": (3, 32, 32),
    "down1.1": (32, 64, 64),
    "down2.1": (64, 128, 128),
    "down3.1": (128, 256, 256),
    "down4.1": (256, 512, 512),
    "up1.conv": (512, 256, 256),
    "up2.conv": (256, 128, 128),
    "up3.conv": (128, 64, 64),
    "up4.conv": (64, 32, 32),
}
UPSAMPLING = {"up1": (512, 256), "up2": (256, 128), "up3": (128, 64), "up4": (64, 32)}


@pytest.mark.parametrize("bilinear", [True, False])
def test_state_dict_keys_and_shapes(bilinear):
    expected = {"out_conv.0.weight": (2, 32, 1, 1), "out_conv.0.bias": (2,)}
    for prefix, widths in (BILINEAR if bilinear else TRANSPOSED).items():
        expected |= double_conv(prefix, *widths)
    if not bilinear:
        for prefix, (into, out) in UPSAMPLING.items():
            expected |= {f"{prefix}.up.weight": (into, out, 2, 2), f"{prefix}.up.bias": (out,)}
    model = UNet(3, 2, bilinear=bilinear, base_c=32)
    assert {name: tuple(value.shape) for name, value in model.state_dict().items()} == expected


def test_parameter_count_and_order():
    model = UNet(3, 2, base_c=32)
    assert sum(parameter.numel() for parameter in model.parameters()) == 4_318_434
    blocks = list(dict.fromkeys(name.split(".")[0] for name, _ in model.named_parameters()))
    assert blocks == ["in_conv", "down1", "down2", "down3", "down4", "up1", "up2", "up3", "up4", "out_conv"]


def test_defaults_are_the_tutorials():
    model = UNet()
    assert model_args_from_state_dict(model.state_dict()) == {
        "arch": "unet",
        "in_channels": 1,
        "num_classes": 2,
        "base_c": 64,
        "bilinear": True,
    }


@pytest.mark.parametrize("bilinear", [True, False])
@pytest.mark.parametrize("size", [(16, 16), (17, 31), (33, 50), (64, 47)])
def test_logits_have_the_size_of_the_input(size, bilinear):
    model = UNet(3, 5, bilinear=bilinear, base_c=4).eval()
    assert model(torch.rand(2, 3, *size))["out"].shape == (2, 5, *size)


def test_up_pads_left_and_top_by_the_floor_half_and_puts_the_skip_first():
    up = UNet(3, 2, base_c=2).up4
    seen = []
    up.conv.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    up(torch.ones(1, 2, 3, 3), torch.full((1, 2, 9, 7), 5.0))
    joined = seen[0][0]  # [4, 9, 7]
    assert (joined[:2] == 5).all()
    padded = torch.zeros(9, 7)
    padded[1:7, 0:6] = 1  # 3 rows too few: 1 above, 2 below; 1 column too few: 0 left, 1 right
    assert torch.equal(joined[2], padded) and torch.equal(joined[3], padded)


def test_up_reaches_from_corner_to_corner():
    up = UNet(3, 2, base_c=2).up4
    seen = []
    up.conv.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    ramp = torch.tensor([0.0, 1.0, 2.0]).expand(1, 2, 3, 3)
    up(ramp, torch.zeros(1, 2, 6, 6))
    assert torch.allclose(seen[0][0, 2], torch.linspace(0, 2, 6).expand(6, 6))  # align_corners=True


def test_arguments_stay_as_attributes():
    model = UNet(in_channels=4, num_classes=5, bilinear=False, base_c=2)
    assert (model.in_channels, model.num_classes, model.bilinear) == (4, 5, False)


def test_create_model_and_back():
    for model_args in (
        {"arch": "unet", "in_channels": 3, "num_classes": 2, "base_c": 8, "bilinear": True},
        {"arch": "unet", "in_channels": 1, "num_classes": 4, "base_c": 4, "bilinear": False},
    ):
        model = create_model(**model_args)
        assert model.model_args == model_args == model_args_from_state_dict(model.state_dict())


def test_arguments_without_an_architecture_are_those_of_the_plain_unet():
    model = create_model(in_channels=1, base_c=4)
    assert type(model) is UNet and model.model_args["arch"] == "unet" and model.model_args["bilinear"] is True
    with pytest.raises(ValueError, match="no architecture 'segnet'; there are unet, unet_paper, mobilenet_v3, vgg16"):
        create_model(arch="segnet")
