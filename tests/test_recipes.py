import csv
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import predict
import train
import train_multi_GPU
from my_dataset import DRIVE_MEAN, DRIVE_STD, DriveDataset
from src import UNet
from src.colours import prepare
from src.segment import segment
from src.weights import normalization_of
from tests.conftest import SMALL_RUN
from train_utils import load_checkpoint, load_model
from train_utils.command_line import run_script
from train_utils.data_loading import reading, training_loader
from train_utils.recipes import RECIPES
from train_utils.scoring import measure
from train_utils.training_state import MovingAverage
from transforms import get_transform

CPU = torch.device("cpu")


def run(data, *flags):
    train.main(train.parse_args(["--data-path", str(data), *SMALL_RUN, *map(str, flags)]))


def losses():
    (table,) = Path().glob("results*.csv")
    with open(table, newline="") as file:
        return [float(row["train_loss"]) for row in csv.DictReader(file)]


@pytest.mark.parametrize("script", [train, train_multi_GPU])
def test_the_tutorials_recipe_is_the_default(script):
    tutorial = {
        "base_c": 32,
        "augmentation": "tutorial",
        "normalization": "dataset",
        "crop_size": 480,
        "batch_size": 4,
        "epochs": 200,
        "steps_per_epoch": None,
        "optimizer": "sgd",
        "lr": 0.01,
        "momentum": 0.9,
        "weight_decay": 1e-4,
        "schedule": "poly",
        "vessel_weight": 2.0,
        "dice_loss": "all",
        "ema_decay": 0.0,
        "tta": None,
        "threshold": 0.5,
        "print_freq": 1,
    }
    for argv in ([], ["--recipe", "tutorial"]):
        args = vars(script.parse_args(argv))
        assert {name: args[name] for name in tutorial} == tutorial


@pytest.mark.parametrize("script", [train, train_multi_GPU])
@pytest.mark.parametrize("recipe", ["quick", "best"])
def test_a_recipe_is_defaults_and_the_command_line_wins(script, recipe):
    args = vars(script.parse_args(["--recipe", recipe]))
    assert {name: args[name] for name in RECIPES[recipe]} == RECIPES[recipe]
    assert RECIPES[recipe].keys() == RECIPES["tutorial"].keys()
    chosen = script.parse_args(["--lr", "0.5", "--recipe", recipe, "--no-tta", "--base-c", "7", "--epochs", "3"])
    assert (chosen.lr, chosen.tta, chosen.base_c, chosen.epochs) == (0.5, False, 7, 3)
    assert chosen.optimizer == RECIPES[recipe]["optimizer"]


def test_recipes_among_other_sets_of_defaults():
    assert train.parse_args(["--demo", "--recipe", "quick"]).lr == RECIPES["quick"]["lr"]
    assert train.parse_args(["--demo", "--recipe", "quick"]).data_path == "./demo"
    assert train.parse_args(["--demo"]).lr == train.DEMO_DEFAULTS["lr"]
    assert train.parse_args(["--arch", "unet_paper"]).base_c == 64
    assert train.parse_args(["--arch", "unet_paper", "--recipe", "best"]).base_c == RECIPES["best"]["base_c"]


@pytest.mark.parametrize(("flag", "value"), [("--ema-decay", "1"), ("--ema-decay", "-0.1"), ("--recipe", "worst")])
def test_wrong_values(flag, value, capsys):
    with pytest.raises(SystemExit):
        train.parse_args([flag, value])
    error = capsys.readouterr().err
    assert flag in error and value in error and error.count("\n") == 1


def test_three_steps_of_the_tutorials_recipe(shared_drive, working_directory):
    """Against the tutorial's loop in plain words, on the same batches: its loss, optimizer and warm-up."""
    run(shared_drive, "--epochs", 3, "-b", 6, "--no-channels-last")
    transform = get_transform(True, DRIVE_MEAN, DRIVE_STD, base_size=80, crop_size=48)
    batches = training_loader(DriveDataset(shared_drive, True, transform), 6, 0, 0, drop_last=False, pin_memory=False)
    torch.manual_seed(0)
    model = UNet(3, 2, base_c=4)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-4)
    expected = []
    for step, factor in enumerate((0.001, 1.0, 0.5**0.9)):
        batches.sampler.set_epoch(step)
        ((image, target),) = batches
        logits = model(image)["out"]
        dice = []
        for probability, label in zip(logits.softmax(dim=1), target, strict=True):
            for number in (0, 1):
                p, t = probability[number][label != 255], (label[label != 255] == number).float()
                dice.append((2 * (p * t).sum() + 1e-6) / (p.sum() + t.sum() + 1e-6))
        weight = torch.tensor([1.0, 2.0])
        loss = F.cross_entropy(logits, target, weight, ignore_index=255) + 1 - torch.stack(dice).mean()
        expected.append(loss.item())
        optimizer.param_groups[0]["lr"] = 0.05 * factor
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses() == pytest.approx(expected, abs=1e-4)


@pytest.fixture(scope="module")
def quick_weights(shared_drive, tmp_path_factory):
    """The weights of a short run that takes all that the recipes may ask for."""
    folder = tmp_path_factory.mktemp("quick")
    flags = [
        "--recipe",
        "best",
        *SMALL_RUN,
        "--epochs",
        2,
        "--steps-per-epoch",
        40,
        "-b",
        2,
        "--lr",
        0.02,
        "--ema-decay",
        0.5,
    ]
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        train.main(train.parse_args(["--data-path", str(shared_drive), "--output-dir", ".", *map(str, flags)]))
    return folder / "best_model.pth"


def test_the_weights_say_how_to_use_them(quick_weights):
    checkpoint = load_checkpoint(quick_weights)
    assert (checkpoint["normalization"], checkpoint["tta"], checkpoint["tta_scales"]) == ("local", True, [1, 1])
    assert checkpoint["model"].keys() == checkpoint["training_model"].keys()
    assert not torch.equal(checkpoint["model"]["out_conv.0.weight"], checkpoint["training_model"]["out_conv.0.weight"])
    assert checkpoint["lr_scheduler"]["last_epoch"] == 40 * (checkpoint["epoch"] + 1)


@pytest.fixture
def steps(monkeypatch):
    """One of the weights after each step of the runs to come."""
    steps = []
    original = MovingAverage.update_parameters

    def update(self, model):
        steps.append(model.out_conv[0].weight.detach().clone())
        original(self, model)

    monkeypatch.setattr(MovingAverage, "update_parameters", update)
    return steps


def averaged_and_last():
    checkpoint = load_checkpoint("save_weights/last_model.pth")
    return checkpoint["model"]["out_conv.0.weight"], checkpoint["training_model"]["out_conv.0.weight"]


def test_the_average_is_that_of_the_steps(shared_drive, working_directory, steps):
    """Step k counts k times, until a step counts for 1 - decay of the average: with 0.6, from the fifth step on."""
    run(shared_drive, "--epochs", 2, "--steps-per-epoch", 3, "--ema-decay", 0.6)
    assert len(steps) == 6
    average = sum(k * step for k, step in enumerate(steps[:4], 1)) / 10
    average = 0.6 * (0.6 * average + 0.4 * steps[4]) + 0.4 * steps[5]
    averaged, last = averaged_and_last()
    assert torch.allclose(averaged, average, atol=1e-6)
    assert torch.equal(last, steps[-1])


def test_weights_to_start_from_count_as_a_whole_average(shared_drive, working_directory, steps):
    run(shared_drive, "--epochs", 1, "--steps-per-epoch", 2, "--output-dir", "first")
    start = load_checkpoint("first/last_model.pth")["model"]["out_conv.0.weight"]
    steps.clear()
    flags = ["--epochs", 1, "--steps-per-epoch", 2, "--ema-decay", 0.9]
    run(shared_drive, *flags, "--init-weights", "first/last_model.pth", "--train-on-all")
    averaged, _ = averaged_and_last()
    assert torch.allclose(averaged, 0.81 * start + 0.09 * steps[0] + 0.1 * steps[1], atol=1e-6)


def test_weights_to_start_from_of_another_model(shared_drive, working_directory, capsys):
    """It is said before a photograph is read."""
    run(shared_drive, "--epochs", 1, "--steps-per-epoch", 1)
    weights = ["--init-weights", "save_weights/last_model.pth"]
    for flag, value, theirs in (("--base-c", "8", "4"), ("--num-classes", "2", "1"), ("--arch", "vgg16", "unet")):
        with pytest.raises(SystemExit) as stopped:
            train.parse_args([*weights, flag, value])
        said = f"argument {flag}: {value}, but the weights of --init-weights {weights[1]} have {theirs}; leave it out"
        assert stopped.value.code == 2 and said in capsys.readouterr().err
    assert train.parse_args([*weights, "--base-c", "4", "--recipe", "best"]).base_c == 4


def test_an_average_of_few_steps_is_of_use_at_once(shared_drive, working_directory):
    """An average that began with the random weights would find no vessel for an epoch."""
    flags = ["--recipe", "quick", "--ema-decay", 0.998, "--lr", 0.016]
    run(shared_drive, *flags, "--epochs", 1, "--steps-per-epoch", 60)
    assert load_checkpoint("save_weights/last_model.pth")["best_dice"] > 0.3


def test_predict_obeys_the_weights_and_agrees_with_the_scores(quick_weights, shared_drive, tmp_path):
    model, checkpoint = load_model(quick_weights, CPU)
    data = DriveDataset(
        shared_drive,
        False,
        get_transform(False, checkpoint["mean"], checkpoint["std"]),
        **reading(normalization_of(checkpoint), checkpoint["fov_diameter"], 1),
    )
    predict.main(
        predict.parse_args(
            ["--weights", str(quick_weights), "--output", str(tmp_path), "--image", *map(str, data.img_list)]
        )
    )
    measurement = measure(model, data, CPU, 0.5, tta=True, scales=checkpoint["tta_scales"])
    for score, path, label in zip(measurement.photographs, data.img_list, data.labels, strict=True):
        mask = np.array(Image.open(tmp_path / f"{path.stem}_vessels.png")) > 0
        counts = score.model.field_of_view
        assert np.count_nonzero(mask & (label == 1)) == counts.true_positives > 0
        assert np.count_nonzero(mask) == counts.true_positives + counts.false_positives


@pytest.mark.parametrize(
    ("normalization", "gain", "offset", "levels"),
    [("photograph", 0.5, 20, 3), ("local", 0.7, 0, 6)],  # levels: of rounding the second picture
)
def test_photographs_are_normalised_each_by_its_own(quick_weights, shared_drive, normalization, gain, offset, levels):
    """A photograph that another camera would have made darker gets the same vessels."""
    source = shared_drive / "DRIVE/test"
    photograph = np.array(Image.open(next(source.glob("images/*.tif"))))
    inside = np.array(Image.open(next(source.glob("mask/*.gif"))).convert("L")) > 0
    model, checkpoint = load_model(quick_weights, CPU)
    checkpoint["normalization"] = normalization
    pictures = photograph, np.rint(photograph * gain + offset).astype(np.uint8)
    matched = [prepare(picture, inside, normalization_of(checkpoint)) for picture in pictures]
    assert np.abs(matched[0].astype(int) - matched[1]).max() <= levels
    original, dark = (segment(model, picture, checkpoint["mean"], checkpoint["std"])[0] for picture in matched)
    assert (original - dark).abs().mean() < 0.01


def test_another_optimizer_cannot_go_on(shared_drive, working_directory, capsys):
    run(shared_drive, "--epochs", 1)
    with pytest.raises(SystemExit):
        flags = ["--data-path", str(shared_drive), *SMALL_RUN, "--epochs", "2", "--resume", "auto"]
        run_script(train.main, train.parse_args([*flags, "--optimizer", "adamw"]))
    assert "last_model.pth: of a run with --optimizer sgd, not adamw; give" in capsys.readouterr().err
