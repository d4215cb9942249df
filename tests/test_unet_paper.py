import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import train
from src import OverlapTileUNet, UNetPaper, create_model
from tests.conftest import SMALL_RUN
from train_utils import criterion, load_model

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def model():
    """With weights that make the logits vary as those of a trained model."""
    torch.manual_seed(0)
    model = create_model("unet_paper", base_c=4).eval()
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight)
    return model


# The figure of the paper: channels and side after every convolution, pooling and up-convolution.
STAGES = [
    *[(64, 570), (64, 568), (64, 284), (128, 282), (128, 280), (128, 140), (256, 138), (256, 136), (256, 68)],
    *[(512, 66), (512, 64), (512, 32), (1024, 30), (1024, 28), (512, 56), (512, 54), (512, 52), (256, 104)],
    *[(256, 102), (256, 100), (128, 200), (128, 198), (128, 196), (64, 392), (64, 390), (64, 388), (2, 388)],
]


def test_every_stage_of_the_papers_figure():
    stages = []
    with torch.device("meta"):  # shapes alone
        model = UNetPaper(1, 2)
        for module in model.modules():
            if isinstance(module, nn.Conv2d | nn.MaxPool2d | nn.ConvTranspose2d):
                module.register_forward_hook(lambda module, inputs, output: stages.append(tuple(output.shape)))
        logits = model(torch.empty(1, 1, 572, 572))["out"]
    assert stages == [(1, channels, side, side) for channels, side in STAGES]
    assert logits.shape == (1, 2, 388, 388)


def test_parameter_count():
    # 3x3 convolutions with scale and shift, 2x2 convolutions with biases, and the 1x1 convolution at last.
    count, into = 0, 1
    for width in (64, 128, 256, 512, 1024):
        count += 9 * into * width + 2 * width + 9 * width * width + 2 * width
        into = width
    for width in (512, 256, 128, 64):
        count += 4 * 2 * width * width + width + 9 * 2 * width * width + 2 * width + 9 * width * width + 2 * width
    count += 64 * 2 + 2
    with torch.device("meta"):
        model = UNetPaper()
    assert sum(parameter.numel() for parameter in model.parameters()) == count


def test_names_and_shapes_are_those_of_the_plain_unet():
    plain = create_model("unet", base_c=4, bilinear=False).state_dict()
    ours = create_model("unet_paper", base_c=4).state_dict()
    assert {name: value.shape for name, value in ours.items()} == {name: value.shape for name, value in plain.items()}


@pytest.mark.parametrize(
    "size, named", [((572, 571), "571 .*: 572"), ((573, 572), "573 .*: 588"), ((10, 188), ": 188")]
)
def test_sizes_that_do_not_fit_are_refused(size, named):
    with torch.device("meta"), pytest.raises(ValueError, match=named):
        UNetPaper(1, 2, base_c=1)(torch.empty(1, 1, *size))


def test_logits_do_not_see_beyond_their_margin():
    torch.manual_seed(0)
    model = UNetPaper(1, 2, base_c=4).eval().double()
    image = torch.rand(1, 1, 204, 188, dtype=torch.float64, requires_grad=True)
    logits = model(image)["out"]
    assert logits.shape == (1, 2, 20, 4)
    logits[0, 0, 0].sum().backward()
    seen = image.grad[0, 0].abs().sum(1).nonzero()
    # The first row of logits is the picture's row 92: it sees about as far up as down.
    assert seen.min() < 16 and 92 + 76 < seen.max() <= 92 + 100


def test_whole_picture_is_the_mirrored_one_through_the_plain_network(model):
    image = torch.rand(2, 3, 130, 117)
    padded = F.pad(image, [92, 107, 92, 110], mode="reflect")  # to 316 x 332, which fit
    with torch.inference_mode():
        expected = UNetPaper.forward(model, padded)["out"][..., :130, :117]
        assert torch.allclose(model(image)["out"], expected, atol=1e-4)


@pytest.mark.parametrize("largest", [16, 50, 100, 129])
def test_tiles_join_without_a_seam(model, monkeypatch, largest):
    image = torch.rand(1, 3, 130, 117)
    with torch.inference_mode():
        whole = model(image)["out"]
        sizes = []
        handle = model.in_conv.register_forward_pre_hook(lambda module, inputs: sizes.append(inputs[0].shape[-2:]))
        monkeypatch.setattr(model, "LARGEST_TILE", largest, raising=False)
        tiled = model(image)["out"]
        handle.remove()
    assert len(sizes) == -(-130 // largest) * -(-117 // largest) > 1
    assert max(max(size) for size in sizes) <= largest + 15 + 188
    assert whole.std() > 0.1 and torch.allclose(tiled, whole, atol=1e-4)


@pytest.mark.parametrize("size", [(1, 1), (2, 40), (72, 80), (93, 301)])
@pytest.mark.parametrize("training", [True, False])
def test_any_size(model, size, training):
    model = copy.deepcopy(model).train(training)
    assert model(torch.rand(2, 3, *size))["out"].shape == (2, 2, *size)


def test_loss_takes_the_centre_of_the_label():
    torch.manual_seed(0)
    model = UNetPaper(1, 2, base_c=2)
    outputs = model(torch.rand(2, 1, 204, 220))  # logits of 20 x 36
    label = torch.randint(0, 2, (2, 204, 220))
    expected = criterion(outputs, label[:, 92:112, 92:128], torch.tensor([1.0, 2.0]), ignore_index=255)
    assert criterion(outputs, label, torch.tensor([1.0, 2.0]), ignore_index=255) == expected
    surrounded = torch.full_like(label, 255)
    surrounded[:, 92:112, 92:128] = label[:, 92:112, 92:128]
    assert criterion(outputs, surrounded, torch.tensor([1.0, 2.0]), ignore_index=255) == expected


def test_create_model(model):
    assert type(model) is OverlapTileUNet
    assert model.model_args == {"arch": "unet_paper", "in_channels": 3, "num_classes": 2, "base_c": 4}


def test_training_defaults_to_the_papers_width():
    assert train.parse_args(["--arch", "unet_paper"]).base_c == 64
    assert train.parse_args(["--arch", "unet_paper", "--base-c", "8"]).base_c == 8
    assert train.parse_args(["--arch", "vgg16"]).base_c == 32  # which it does not use


def run(data, *flags):
    train.main(train.parse_args(["--data-path", str(data), "--arch", "unet_paper", *SMALL_RUN, *flags]))


def test_trains_and_loads_without_flags(shared_drive, working_directory):
    run(shared_drive, "--epochs", "1")
    model, checkpoint = load_model("save_weights/last_model.pth", CPU)
    assert type(model) is OverlapTileUNet and checkpoint["model_args"]["base_c"] == 4
    assert 0 <= checkpoint["best_dice"] <= 1
