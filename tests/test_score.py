"""The scripts' scores: train.py --test-only, train_multi_GPU.py --test-only, and the end of a training run."""

import csv
import dataclasses
import json
import os
import shutil
import statistics
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import train
import train_multi_GPU
from my_dataset import DriveDataset
from src import create_model, segment
from src.errors import UserError
from src.masks import read_binary_mask
from tests.conftest import SMALL_RUN, refusal
from tests.processes import in_processes
from train_utils import evaluate, load_checkpoint, save_checkpoint
from train_utils.command_line import UsageError
from train_utils.data_loading import evaluation_loader
from train_utils.scoring import Measurement, best_threshold, measure
from train_utils.scoring.contact_sheet import SheetRow
from train_utils.scoring.counts import PixelCounts, ProbabilityHistogram, vessel_log_odds
from train_utils.scoring.measure import measure_masks
from transforms import get_transform

MEAN, STD = (0.6, 0.4, 0.3), (0.2, 0.1, 0.1)
CPU = torch.device("cpu")
TEST_NAMES = ["01_test", "02_test", "03_test", "04_test"]


class GreenModel(torch.nn.Module):
    """Dark in the green channel means vessel: far from good, but not trivial, and different in every photograph."""

    model_args = {"num_classes": 2}

    def forward(self, image):
        log_odds = -2 * image[:, 1] - 0.5
        return {"out": torch.stack([torch.zeros_like(log_odds), log_odds], dim=1)}


@pytest.fixture(scope="module")
def weights(shared_drive, tmp_path_factory):
    """Weights, as train.py stores them, of a random network that calls some pixels vessels and others not."""
    torch.manual_seed(3)
    model = create_model(base_c=4).eval()
    image, _ = DriveDataset(shared_drive, True, get_transform(False, MEAN, STD))[0]
    with torch.no_grad():
        log_odds = vessel_log_odds(model(image.unsqueeze(0))["out"])
        scale = 2 / log_odds.std()
        model.out_conv[0].weight *= scale
        model.out_conv[0].bias *= scale
        model.out_conv[0].bias[0] += scale * log_odds.mean() + 1
    path = tmp_path_factory.mktemp("weights") / "model.pth"
    content = {"model": model.state_dict(), "model_args": model.model_args, "mean": list(MEAN), "std": list(STD)}
    save_checkpoint(content | {"fov_diameter": 69.0, "epoch": 7, "note": {"kept": [1, 2]}}, path)
    return path


def score(script, data, *flags):
    script.main(
        script.parse_args(["--data-path", str(data), "--output-dir", ".", "--device", "cpu", "--overwrite", *flags])
    )


def test_only(data, weights, *flags):
    score(train, data, "--test-only", "--resume", str(weights), *flags)
    return json.loads(Path("scores.json").read_text())


test_only.__test__ = False


def fails(capsys, *flags):
    return refusal(capsys, train, "--output-dir", ".", "--test-only", *flags)


def csv_rows(path="scores.csv"):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def predictions(weights, data):
    """Vessels, truth and field of view, bool [H, W], of each test photograph, by the plainest way."""
    checkpoint = load_checkpoint(weights)
    model = create_model(**checkpoint["model_args"]).eval()
    model.load_state_dict(checkpoint["model"])
    dataset = DriveDataset(data, False, get_transform(False, checkpoint["mean"], checkpoint["std"]))
    for index in range(len(dataset)):
        with torch.no_grad():
            probability = torch.softmax(model(dataset[index][0].unsqueeze(0))["out"].double(), 1)[0, 1]
        files = dataset.files[index]
        yield probability.numpy(), read_binary_mask(files.label), read_binary_mask(files.roi_mask)


def test_all_numbers_against_scikit_learn(shared_drive, weights, working_directory):
    metrics = pytest.importorskip("sklearn.metrics")
    report = test_only(shared_drive, weights, "--threshold", "0.4")
    photographs = list(predictions(weights, shared_drive))
    for region in ("field_of_view", "full_frame"):
        truths, scores = [], []
        for probability, truth, inside in photographs:
            keep = inside if region == "field_of_view" else np.ones_like(inside)
            truths.append(truth[keep])
            scores.append(np.where(inside, probability, 0)[keep])
        truth, rated = np.concatenate(truths), np.concatenate(scores)
        found, predicted = report[region]["model"], rated > 0.4
        assert 0.02 < predicted.mean() < 0.98  # or the test says little
        assert found["pooled"] == pytest.approx(
            {
                "accuracy": metrics.accuracy_score(truth, predicted),
                "sensitivity": metrics.recall_score(truth, predicted),
                "specificity": metrics.recall_score(truth, predicted, pos_label=0),
                "precision": metrics.precision_score(truth, predicted),
                "dice": metrics.f1_score(truth, predicted),
                "iou": metrics.jaccard_score(truth, predicted),
                "mcc": metrics.matthews_corrcoef(truth, predicted),
                "roc_auc": metrics.roc_auc_score(truth, rated),
                "average_precision": metrics.average_precision_score(truth, rated),
            },
            abs=1e-4,
        )
        pairs = list(zip(truths, scores, strict=True))
        for name, function in (("dice", metrics.f1_score), ("iou", metrics.jaccard_score)):
            values = [function(t, s > 0.4) for t, s in pairs]
            expected = {"mean": np.mean(values), "std": np.std(values, ddof=1)}
            assert found["per_photograph"][name] == pytest.approx(expected, abs=1e-6)


def test_the_label_outside_the_field_of_view_counts_in_the_full_frame_alone(drive, weights, working_directory):
    before = test_only(drive, weights)
    manual = drive / "DRIVE" / "test" / "1st_manual" / "02_manual1.gif"
    vessels = read_binary_mask(manual)
    outside = ~read_binary_mask(drive / "DRIVE" / "test" / "mask" / "02_test_mask.gif")
    assert not (vessels & outside).any()
    row, column = np.argwhere(outside)[0]
    vessels[row, column] = True
    Image.fromarray(np.where(vessels, 255, 0).astype(np.uint8)).save(manual)
    after = test_only(drive, weights)
    assert after["field_of_view"]["model"] == before["field_of_view"]["model"]
    pooled = [report["full_frame"]["model"]["pooled"] for report in (before, after)]
    assert pooled[1]["sensitivity"] < pooled[0]["sensitivity"] and pooled[1]["precision"] == pooled[0]["precision"]


def test_table_and_files(shared_drive, weights, working_directory, capsys, full_contact_sheets):
    report = test_only(shared_drive, weights, "--val-split", "2")  # the test photographs whatever it says
    output = capsys.readouterr().out
    assert report["photographs"] == TEST_NAMES and report["scored_on"] == "test" and report["epoch"] == 7
    assert f"scores of {weights} (epoch 7) on 4 test photographs (01_test to 04_test)" in output
    assert "selected on: not recorded in the weights" in output
    assert "threshold: 0.5 (--threshold)" in output
    pooled = report["field_of_view"]["model"]["pooled"]
    (line, *_) = [line for line in output.splitlines() if line.startswith("model ")]
    assert line.split()[1:] == [f"{value:.4f}" for value in pooled.values()]
    assert "Full frame" in output and "clDice" in output

    rows = csv_rows()
    assert [row["photograph"] for row in rows] == TEST_NAMES
    for name in ("dice", "sensitivity", "specificity", "iou", "cl_dice"):
        values = [float(row[name]) for row in rows]
        expected = {"mean": statistics.fmean(values), "std": statistics.stdev(values)}
        assert report["field_of_view"]["model"]["per_photograph"][name] == pytest.approx(expected)
    with Image.open("scores.png") as sheet:
        assert sheet.height > 4 * 500
    assert not list(Path().glob(".*"))


def test_no_table_is_wider_than_the_terminal(shared_drive, weights, working_directory, monkeypatch, capsys):
    monkeypatch.setattr(type(sys.stdout), "isatty", lambda stream: True)
    monkeypatch.setattr(shutil, "get_terminal_size", lambda: os.terminal_size((80, 24)))
    report = test_only(shared_drive, weights)
    lines = capsys.readouterr().out.splitlines()
    start = lines.index("Inside the field of view, over all pixels:") + 1
    names, values = zip(*(line.rsplit(maxsplit=2)[:2] for line in lines[start + 1 : start + 10]), strict=True)
    assert lines[start].split() == ["model", "second", "observer"]
    assert names[0] == "accuracy" and names[-1] == "avg. precision"
    assert list(values) == [f"{value:.4f}" for value in report["field_of_view"]["model"]["pooled"].values()]


def test_the_tutorials_lines_as_evaluate_gives_them(shared_drive, weights, working_directory, capsys):
    report = test_only(shared_drive, weights, "--threshold", "0.9")  # the lines are of the argmax all the same
    output = capsys.readouterr().out
    checkpoint = load_checkpoint(weights)
    model = create_model(**checkpoint["model_args"])
    model.load_state_dict(checkpoint["model"])
    dataset = DriveDataset(shared_drive, False, get_transform(False, MEAN, STD))
    confusion_matrix, dice = evaluate(model, evaluation_loader(dataset, 0, pin_memory=False), CPU, 2)
    assert output.endswith(f"\n{confusion_matrix}\ndice coefficient: {dice:.3f}\n")
    assert report["tutorial"]["dice"] == pytest.approx(dice)
    assert report["tutorial"]["mean_iou"] == pytest.approx(confusion_matrix.compute()[2].mean().item())


def test_dice_at_half_is_the_tutorials(shared_drive, weights, working_directory):
    report = test_only(shared_drive, weights)
    mean = report["field_of_view"]["model"]["per_photograph"]["dice"]["mean"]
    assert mean == pytest.approx(report["tutorial"]["dice"], abs=1e-6)


def test_model_arguments_come_from_the_weights(shared_drive, weights, working_directory):
    report = test_only(shared_drive, weights, "--base-c", "64", "--num-classes", "5")
    assert report == test_only(shared_drive, weights)


def test_second_observer(drive, weights, working_directory, capsys):
    folder = drive / "DRIVE" / "test"
    report = test_only(drive, weights)
    total, dices = PixelCounts(), []
    for path in sorted((folder / "2nd_manual").glob("*.gif")):
        number = path.name[:2]
        inside = read_binary_mask(folder / "mask" / f"{number}_test_mask.gif")
        truth = read_binary_mask(folder / "1st_manual" / f"{number}_manual1.gif")[inside]
        counts = PixelCounts.of(torch.from_numpy(read_binary_mask(path)[inside]), torch.from_numpy(truth))
        total, dices = total + counts, [*dices, counts.dice]
    second = report["field_of_view"]["second_observer"]
    assert second["photographs"] == 4
    assert second["per_photograph"]["dice"]["mean"] == pytest.approx(statistics.fmean(dices))
    for name in ("accuracy", "sensitivity", "specificity", "dice"):
        assert second["pooled"][name] == pytest.approx(getattr(total, name))
    assert second["pooled"]["roc_auc"] is None
    assert [float(row["second_observer_dice"]) for row in csv_rows()] == pytest.approx(dices)
    assert sum(line.startswith("second observer ") for line in capsys.readouterr().out.splitlines()) == 4

    (folder / "2nd_manual" / "02_manual2.gif").unlink()
    assert test_only(drive, weights)["field_of_view"]["second_observer"]["photographs"] == 3
    assert csv_rows()[1]["second_observer_dice"] == "" and csv_rows()[2]["second_observer_dice"] != ""
    assert "second observer (3 photographs)" in capsys.readouterr().out

    Image.new("L", (9, 9)).save(folder / "2nd_manual" / "02_manual2.gif")
    assert test_only(drive, weights)["field_of_view"]["second_observer"]["photographs"] == 3
    assert "02_manual2.gif: is 9 x 9 pixels, but its photograph" in capsys.readouterr().out

    shutil.rmtree(folder / "2nd_manual")
    assert test_only(drive, weights)["field_of_view"]["second_observer"] is None
    assert not any("second" in name for name in csv_rows()[0])
    assert "second observer" not in capsys.readouterr().out


def test_a_second_observer_who_copies_is_perfect(drive, weights, working_directory):
    folder = drive / "DRIVE" / "test"
    for path in (folder / "1st_manual").glob("*.gif"):
        shutil.copy(path, folder / "2nd_manual" / path.name.replace("manual1", "manual2"))
    second = test_only(drive, weights)["field_of_view"]["second_observer"]
    assert second["pooled"]["dice"] == second["pooled"]["mcc"] == 1
    assert all(value == {"mean": 1, "std": 0} for value in second["per_photograph"].values())


def test_photographs_without_vessels(drive, weights, working_directory):
    manual = drive / "DRIVE" / "test" / "1st_manual" / "01_manual1.gif"
    Image.new("L", (80, 72)).save(manual)
    report = test_only(drive, weights)
    row, *others = csv_rows()
    assert row["sensitivity"] == "" and float(row["dice"]) == 0 and float(row["cl_dice"]) == 0
    sensitivity = report["field_of_view"]["model"]["per_photograph"]["sensitivity"]
    assert sensitivity["mean"] == pytest.approx(statistics.fmean(float(other["sensitivity"]) for other in others))

    for number in ("02", "03", "04"):
        shutil.copy(manual, manual.with_name(f"{number}_manual1.gif"))
    pooled = test_only(drive, weights)["field_of_view"]["model"]["pooled"]
    assert pooled["sensitivity"] is pooled["roc_auc"] is pooled["average_precision"] is None
    assert pooled["specificity"] == pooled["accuracy"] > 0


def test_missing_test_labels(drive, weights, working_directory, capsys):
    shutil.rmtree(drive / "DRIVE" / "test" / "1st_manual")
    report = test_only(drive, weights)
    assert report["photographs"] == ["26_training"] and report["scored_on"] == "labelled"
    shutil.rmtree(drive / "DRIVE" / "training")
    message = fails(capsys, "--data-path", str(drive), "--resume", str(weights))
    assert "01_test.tif: its label" in message and "01_manual1.gif is missing" in message


def test_missing_weights(shared_drive, working_directory, capsys):
    assert "name them with --resume FILE" in fails(capsys, "--data-path", str(shared_drive))
    assert "gone.pth: no such file" in fails(capsys, "--data-path", str(shared_drive), "--resume", "gone.pth")


@pytest.mark.parametrize("wrong", ["0", "1", "-0.5", "nan", "best"])
def test_wrong_thresholds(wrong, capsys):
    with pytest.raises(SystemExit) as stopped:
        train.parse_args(["--threshold", wrong])
    assert stopped.value.code == 2
    assert f"--threshold: must be a number between 0 and 1, or auto, found '{wrong}'" in capsys.readouterr().err


def training_dice(weights, data, threshold, val_split=0):
    """Dice over all pixels of the training photographs, or of the held-out ones."""
    checkpoint = load_checkpoint(weights)
    model = create_model(**checkpoint["model_args"]).eval()
    model.load_state_dict(checkpoint["model"])
    dataset = DriveDataset(data, not val_split, get_transform(False, MEAN, STD), val_split=val_split)
    total = PixelCounts()
    with torch.no_grad():
        for image, label in dataset:
            probability = model(image.unsqueeze(0))["out"].softmax(1)[0, 1]
            total += PixelCounts.of(probability > threshold, label)
    return total.dice


@pytest.mark.parametrize("val_split", [0, 2])
def test_threshold_auto(val_split, drive, weights, working_directory, capsys):
    content = load_checkpoint(weights)
    content["args"] = {"val_split": val_split}
    save_checkpoint(content, "my.pth")
    report = test_only(drive, "my.pth", "--threshold", "auto")
    value, source = report["threshold"]["value"], report["threshold"]["source"]
    assert value != 0.5
    part = "held-out training (25, 26)" if val_split else "training"
    assert source == f"auto: best Dice on {part} photographs"
    assert f"threshold: {value:.4g} ({source})" in capsys.readouterr().out
    chosen = training_dice("my.pth", drive, value, val_split)
    others = [training_dice("my.pth", drive, other, val_split) for other in np.linspace(0.02, 0.98, 25)]
    assert chosen >= max(others) - 1e-4 and chosen > min(others)

    stored = load_checkpoint("my.pth")
    assert type(stored["threshold"]) is float and stored["threshold"] == value
    assert stored["tta"] is False
    assert stored["note"] == {"kept": [1, 2]} and stored["epoch"] == 7 and stored["args"] == {"val_split": val_split}
    assert all(torch.equal(stored["model"][name], content["model"][name]) for name in content["model"])

    # Other labels of the test photographs change the scores, but not the threshold.
    for path in (drive / "DRIVE" / "test" / "1st_manual").glob("*.gif"):
        Image.fromarray(np.where(read_binary_mask(path), 0, 255).astype(np.uint8)).save(path)
    again = test_only(drive, "my.pth", "--threshold", "auto")
    assert again["threshold"] == report["threshold"] and again["field_of_view"] != report["field_of_view"]


def test_how_photographs_are_normalised_and_resized_may_be_given(shared_drive, weights, working_directory, capsys):
    stored = load_checkpoint(weights)
    save_checkpoint({"model": stored["model"]}, "bare.pth")
    test_only(shared_drive, "bare.pth")
    assert "bare.pth does not tell how photographs were normalised" in capsys.readouterr().out
    given = ["--mean", *map(str, MEAN), "--std", *map(str, STD), "--fov-diameter", "69"]
    report = test_only(shared_drive, "bare.pth", *given)
    assert "does not tell" not in capsys.readouterr().out
    assert report["each_photograph"] == test_only(shared_drive, weights)["each_photograph"]
    assert (
        report["each_photograph"] != test_only(shared_drive, weights, "--mean", "0.5", "0.5", "0.5")["each_photograph"]
    )
    assert report["each_photograph"] != test_only(shared_drive, weights, "--fov-diameter", "50")["each_photograph"]
    assert load_checkpoint(weights)["mean"] == list(MEAN)


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--train-on-all"], "--train-on-all: does nothing with --test-only"),
        (["--fold", "1/2", "--val-split", "1"], "--val-split 1: does nothing with --test-only"),
        (["--masks", "masks", "--threshold", "0.4"], "--threshold 0.4: masks have none"),
    ],
)
def test_flags_that_contradict_test_only(shared_drive, working_directory, weights, flags, message):
    resume = [] if "--masks" in flags else ["--resume", str(weights)]
    with pytest.raises(UsageError, match=message):
        score(train, shared_drive, "--test-only", *resume, *flags)


def test_the_threshold_is_chosen_without_the_test_folder(drive):
    folder = drive / "DRIVE" / "test"
    transform = get_transform(False, MEAN, STD)
    expected = best_threshold(GreenModel(), DriveDataset(drive, True, transform), CPU)
    for path in folder.rglob("*.*"):
        path.write_bytes(b"broken")
    assert best_threshold(GreenModel(), DriveDataset(drive, True, transform), CPU) == expected
    shutil.rmtree(folder)
    held_out = DriveDataset(drive, False, transform, val_split=2)
    assert best_threshold(GreenModel(), held_out, CPU) != expected


def test_the_threshold_is_stored_with_the_flips_it_was_chosen_with(shared_drive, weights, working_directory):
    shutil.copy(weights, "my.pth")
    report = test_only(shared_drive, "my.pth", "--threshold", "auto", "--tta")
    stored = load_checkpoint("my.pth")
    assert report["tta"] is stored["tta"] is True and stored["threshold"] == report["threshold"]["value"]
    again = test_only(shared_drive, "my.pth")  # the flips are those of the file now
    assert again["tta"] is True


def test_a_threshold_of_other_preparation_is_not_stored(shared_drive, weights, working_directory, capsys):
    shutil.copy(weights, "my.pth")
    before = Path("my.pth").read_bytes()
    for flags in (("--fov-diameter", "50"), ("--normalization", "photograph"), ("--mean", "0.5", "0.4", "0.2")):
        report = test_only(shared_drive, "my.pth", "--threshold", "auto", *flags)
        assert report["threshold"]["source"].startswith("auto: ") and Path("my.pth").read_bytes() == before
        assert "--threshold auto: not stored in my.pth" in capsys.readouterr().out
    test_only(shared_drive, "my.pth", "--threshold", "auto", "--fov-diameter", "69")  # as the file says
    assert "threshold" in load_checkpoint("my.pth")


def test_scores_are_of_the_sizes_that_are_asked_for(shared_drive, weights, working_directory):
    shutil.copy(weights, "my.pth")
    flips = test_only(shared_drive, "my.pth", "--tta")
    sizes = test_only(shared_drive, "my.pth", "--tta", "--tta-scales", "0.7", "1", "1.4")
    assert flips["tta_scales"] == [1] and sizes["tta_scales"] == [0.7, 1, 1.4]
    assert flips["field_of_view"]["model"] != sizes["field_of_view"]["model"]
    test_only(shared_drive, "my.pth", "--threshold", "auto", "--tta", "--tta-scales", "0.7", "1", "1.4")
    assert load_checkpoint("my.pth")["tta_scales"] == [0.7, 1, 1.4]  # stored with the threshold
    assert test_only(shared_drive, "my.pth")["tta_scales"] == [0.7, 1, 1.4]
    assert test_only(shared_drive, "my.pth", "--no-tta", "--threshold", "auto")["tta_scales"] == [1]
    stored = load_checkpoint("my.pth")  # where there is no mean, its sizes stay as they are
    assert stored["tta"] is False and stored["tta_scales"] == [0.7, 1, 1.4]


def test_the_views_are_named(shared_drive, weights, working_directory, capsys):
    for flags, views in (
        ([], ""),
        (["--tta"], ", mean over the four flips"),
        (["--tta", "--tta-scales", "1", "1"], ", mean over 2 flips"),
        (["--tta", "--tta-scales", "0.7", "1"], ", mean over the sizes 0.7, 1"),
    ):
        test_only(shared_drive, weights, *flags)
        (line,) = (line for line in capsys.readouterr().out.splitlines() if "threshold" in line)
        assert line.endswith(views) and ("mean over" in line) == bool(views)


def test_sizes_without_a_mean_over_views_are_refused(shared_drive, weights, working_directory):
    with pytest.raises(UsageError, match=r"--tta-scales 0.7 1.0: does nothing without --tta; add --tta"):
        test_only(shared_drive, weights, "--tta-scales", "0.7", "1")


def test_the_weights_of_the_output_folder(shared_drive, weights, working_directory):
    with pytest.raises(UsageError, match="looked for best_model.pth and last_model.pth in --output-dir .;"):
        test_only(shared_drive, "auto")
    named = test_only(shared_drive, weights)
    for name in ("last_model.pth", "best_model.pth"):
        shutil.copy(weights, name)
        assert test_only(shared_drive, "auto")["field_of_view"] == named["field_of_view"]


def test_the_scores_of_a_run_are_not_replaced_by_others(shared_drive, weights, working_directory, capsys):
    shutil.copy(weights, "best_model.pth")
    data = ("--data-path", str(shared_drive))
    train.main(train.parse_args([*data, "--output-dir", ".", "--test-only", "--resume", "auto", "--device", "cpu"]))
    before = Path("scores.json").read_bytes()
    for other in (("--resume", str(weights)), ("--masks", "nowhere")):
        line = fails(capsys, *data, *other)
        assert "--output-dir .: holds a run with its scores.json, which would be replaced; give another" in line
    assert Path("scores.json").read_bytes() == before
    test_only(shared_drive, weights)  # with --overwrite


def test_a_threshold_is_not_stored_unless_chosen(shared_drive, weights, working_directory):
    shutil.copy(weights, "my.pth")
    test_only(shared_drive, "my.pth", "--threshold", "0.3")
    assert "threshold" not in load_checkpoint("my.pth")


def small_run(data, *flags):
    score(train, data, *SMALL_RUN, "--epochs", "2", *flags)


def test_training_ends_with_scores_of_the_best_weights(shared_drive, working_directory, capsys):
    small_run(shared_drive)
    output = capsys.readouterr().out
    report = json.loads(Path("scores.json").read_text())
    assert report["selected_on"] == load_checkpoint("best_model.pth")["selected_on"] == "test"
    assert "selected on: test\n" in output and "scores of best_model.pth" in output
    history = load_checkpoint("last_model.pth")["history"]
    assert report["tutorial"]["dice"] == pytest.approx(max(row["dice"] for row in history), abs=1e-5)
    with Image.open("curves.png") as picture:
        assert picture.format == "PNG" and picture.width >= 800


def test_honest_selection(drive, working_directory, capsys):
    small_run(drive, "--val-split", "2", "--threshold", "auto")
    expected = "held-out training (25, 26)"
    assert f"selected on: {expected}\n" in capsys.readouterr().out
    report = json.loads(Path("scores.json").read_text())
    assert report["selected_on"] == load_checkpoint("best_model.pth")["selected_on"] == expected
    assert report["threshold"]["source"] == f"auto: best Dice on {expected} photographs"  # which are not scored
    assert load_checkpoint("best_model.pth")["threshold"] == report["threshold"]["value"]
    assert report["photographs"] == TEST_NAMES

    # The best epoch was chosen without a look at the test photographs.
    best, scores = load_checkpoint("best_model.pth"), report["tutorial"]
    shutil.rmtree(drive / "DRIVE" / "test")
    small_run(drive, "--val-split", "2")
    again = load_checkpoint("best_model.pth")
    assert again["epoch"] == best["epoch"] and again["best_dice"] == best["best_dice"] != pytest.approx(scores["dice"])
    assert all(torch.equal(again["model"][name], best["model"][name]) for name in best["model"])


def test_the_threshold_was_chosen_on_some_of_those_scored(drive, tmp_path, working_directory):
    """Of a folder without a test part, what was held out is scored too."""
    other = tmp_path / "other"
    (drive / "DRIVE" / "training" / "images").rename(drive / "DRIVE" / "training" / "photographs")
    for folder, source in (("images", "photographs"), ("labels", "1st_manual")):
        shutil.copytree(drive / "DRIVE" / "training" / source, other / folder)
    (drive / "DRIVE" / "training" / "photographs").rename(drive / "DRIVE" / "training" / "images")
    for path in [*(other / "images").iterdir()]:
        Image.open(path).rotate(180).save(path)
    for path in [*(other / "labels").iterdir()]:
        Image.open(path).convert("L").rotate(180).save(path.with_suffix(".png"))
        path.unlink()
    flags = ["--data-path", str(drive), str(other), *SMALL_RUN, "--epochs", "1", "--val-split", "1"]
    train.main(train.parse_args([*flags, "--output-dir", ".", "--device", "cpu", "--threshold", "auto"]))
    source = json.loads(Path("scores.json").read_text())["threshold"]["source"]
    assert source.endswith(
        " photographs; 1 of the 5 that are scored are among them: these scores are a little too high"
    )


def test_a_threshold_of_what_was_held_out_is_not_chosen_anew_on_the_training(drive, tmp_path, working_directory):
    """Where the data holds photographs of the training alone."""
    small_run(drive, "--val-split", "2", "--threshold", "auto")
    stored = load_checkpoint("best_model.pth")["threshold"]
    for number in (25, 26):
        (drive / "DRIVE" / "training" / "images" / f"{number}_training.tif").rename(tmp_path / f"{number}.tif")
    report = test_only(drive, "best_model.pth", "--threshold", "auto")
    assert report["threshold"] == {"value": stored, "source": "auto: as the weights store it"}
    assert load_checkpoint("best_model.pth")["threshold"] == stored
    # Where it was chosen on the training, as after a validation on the test photographs, it is again.
    small_run(drive, "--threshold", "auto")
    for flags in ([], ["--tta"]):
        report = test_only(drive, "best_model.pth", "--threshold", "auto", *flags)
        assert report["threshold"]["source"] == "auto: best Dice on training photographs"
        assert load_checkpoint("best_model.pth")["threshold_held_out"] is False


def test_training_without_test_labels(drive, working_directory, capsys):
    """As with the official download: what was held out is scored."""
    shutil.rmtree(drive / "DRIVE" / "test" / "1st_manual")
    small_run(drive)
    assert "on 1 held-out training photographs (26_training to 26_training)" in capsys.readouterr().out
    report = json.loads(Path("scores.json").read_text())
    assert report["selected_on"] == "held-out training (26)" and report["scored_on"] == "held-out training"
    assert "threshold" not in load_checkpoint("best_model.pth")

    small_run(drive, "--threshold", "auto")
    value = load_checkpoint("best_model.pth")["threshold"]
    line = f"threshold: {value:.4g} (auto: best Dice on held-out training (26) photographs, the ones that are scored: "
    assert f"{line}these scores are a little too high)" in capsys.readouterr().out


def test_the_best_of_all_epochs_is_scored(shared_drive, working_directory):
    small_run(shared_drive, "--save-best", "False")
    history = load_checkpoint("last_model.pth")["history"]
    best = max(history, key=lambda row: row["dice"])["epoch"]
    report = json.loads(Path("scores.json").read_text())
    assert report["weights"] == "best_model.pth" and report["epoch"] == best


def test_the_best_of_a_run_that_an_earlier_version_began(shared_drive, working_directory):
    """It kept every epoch, and no `best_model.pth`."""
    small_run(shared_drive, "--save-best", "False")
    Path("best_model.pth").unlink()
    history = load_checkpoint("last_model.pth")["history"]
    best = max(history, key=lambda row: row["dice"])
    small_run(shared_drive, "--save-best", "False", "--resume", "auto")  # nothing is left to train
    assert json.loads(Path("scores.json").read_text())["weights"] == f"model_{best['epoch']}.pth"


def score_as_script(*flags):
    train_multi_GPU.main(train_multi_GPU.parse_args(flags))


def test_processes_agree(drive, weights, tmp_path, monkeypatch, full_contact_sheets):
    for kind in ("images", "1st_manual", "mask", "2nd_manual"):
        for number in ("03", "04"):
            next((drive / "DRIVE" / "test" / kind).glob(f"{number}*")).unlink()  # the third process gets none
    results = []
    for world_size in (1, 3):
        folder = tmp_path / str(world_size)
        folder.mkdir()
        shutil.copy(weights, folder / "my.pth")
        flags = ["--test-only", "--resume", "my.pth", "--output-dir", ".", "--data-path", str(drive)]
        flags += ["--device", "cpu", "--threshold", "auto", "--dist-url", f"file://{folder}/meet"]
        if world_size == 1:
            monkeypatch.chdir(folder)
            score_as_script(*flags)
        else:
            outputs = in_processes(score_as_script, world_size, folder, *flags)
            assert "\nscores of my.pth" in outputs[0] and not any(outputs[1:])
        report = json.loads((folder / "scores.json").read_text())
        sheet = np.array(Image.open(folder / "scores.png"))[140:]
        results.append(
            (report, csv_rows(folder / "scores.csv"), sheet, load_checkpoint(folder / "my.pth")["threshold"])
        )
    report, rows, sheet, threshold = results[0]
    assert report["photographs"] == TEST_NAMES[:2] and report["threshold"]["value"] == threshold
    for other_report, other_rows, other_sheet, other_threshold in results[1:]:
        assert flat(other_report) == pytest.approx(flat(report), abs=1e-6)
        assert [flat(row) for row in other_rows] == [pytest.approx(flat(row), abs=1e-6) for row in rows]
        assert (other_sheet == sheet).all()
        assert other_threshold == pytest.approx(threshold, abs=1e-6)


def flat(value, name=""):
    """All numbers in nested dicts and lists, by their path."""
    if isinstance(value, dict | list):
        items = value.items() if isinstance(value, dict) else enumerate(value)
        return {path: number for key, item in items for path, number in flat(item, f"{name}/{key}").items()}
    try:
        return {name: float(value)}
    except (TypeError, ValueError):
        return {}


def test_the_script_for_many_processes_scores_too(shared_drive, weights, working_directory, capsys):
    expected = test_only(shared_drive, weights)
    tables = [capsys.readouterr().out.split("\nscores of")[1]]
    Path("scores.json").unlink()
    score(train_multi_GPU, shared_drive, "--test-only", "--resume", str(weights))
    tables.append(capsys.readouterr().out.split("\nscores of")[1])
    assert json.loads(Path("scores.json").read_text()) == expected
    assert tables[0] == tables[1]


def test_memory_does_not_grow_with_the_photographs():
    measurement = Measurement(num_classes=2)
    for number in range(100):
        measurement.add(None, SheetRow(f"{number:03d}", (number * 37 % 100) / 100, Image.new("RGB", (4, 4))))
    assert [row.dice for row in measurement.worst] == [number / 100 for number in range(20)]
    assert measurement.field_of_view.counts.numel() == 2 * ProbabilityHistogram.BINS


def test_each_photograph_is_measured_once(shared_drive):
    dataset = DriveDataset(shared_drive, False, get_transform(False, MEAN, STD))
    measurement = measure(GreenModel(), dataset, CPU, 0.5)
    assert [score.name for score in measurement.photographs] == TEST_NAMES
    inside = sum((label != 255).sum() for label in dataset.labels)
    assert measurement.field_of_view.counts.sum() == measurement.confusion_matrix.mat.sum() == inside
    assert measurement.full_frame.counts.sum() == 4 * 80 * 72
    dices = [row.dice for row in measurement.worst]
    assert dices == sorted(dices) and len(set(dices)) == 4


def test_a_model_of_one_input_channel(shared_drive, working_directory, capsys):
    model = create_model(base_c=4, in_channels=1)
    save_checkpoint({"model": model.state_dict(), "model_args": model.model_args}, "grey.pth")
    line = fails(capsys, "--data-path", str(shared_drive), "--resume", "grey.pth")
    assert line.endswith("grey.pth: a model of 1 input channels; photographs have 3: give other weights")


@pytest.mark.parametrize("tta", [False, True])
def test_large_photographs_are_scored_in_tiles(tta, shared_drive, monkeypatch):
    sides = []

    class Watched(GreenModel):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.zeros(1, 3, 1, 1))  # tells the device

        def forward(self, image):
            sides.append(max(image.shape[2:]))
            return super().forward(image)

    dataset = DriveDataset(shared_drive, False, get_transform(False, MEAN, STD))
    whole = measure(Watched(), dataset, CPU, 0.5, tta=tta)
    assert set(sides) == {80}
    for limit, value in (("LARGEST_WHOLE", 1), ("LARGEST_TILES", 1), ("SMALLEST_TILE", 32)):
        monkeypatch.setattr(segment, limit, value)
    tiled = measure(Watched(), dataset, CPU, 0.5, tta=tta)
    assert max(sides[-4:]) < 64
    for one, other in zip(whole.photographs, tiled.photographs, strict=True):
        assert one.model.field_of_view.dice == pytest.approx(other.model.field_of_view.dice, abs=1e-3)


class ThreeClasses(GreenModel):
    """Its vessels are of class 1 or, in every other column, of class 2."""

    model_args = {"num_classes": 3}

    def forward(self, image):
        background, vessel = super().forward(image)["out"].unbind(dim=1)
        odd = torch.arange(image.shape[-1]) % 2 == 1
        return {"out": torch.stack([background, vessel - 9 * odd, vessel - 9 * ~odd], dim=1)}


def test_of_more_classes_all_but_the_background_are_vessels(shared_drive):
    """As in the masks of predict.py; pixels of which nothing is known count nowhere."""
    dataset = DriveDataset(shared_drive, False, get_transform(False, MEAN, STD))
    expected = measure(GreenModel(), dataset, CPU, 0.5)
    for label, classes in zip(dataset.labels, dataset.classes, strict=True):
        further = (label == 1) & (np.arange(label.shape[1]) % 3 == 0)
        label[further] = classes[further] = 2
    measurement = measure(ThreeClasses(), dataset, CPU, 0.5)
    for score, binary in zip(measurement.photographs, expected.photographs, strict=True):
        assert score.model == binary.model
    assert measurement.field_of_view.roc_auc() == pytest.approx(expected.field_of_view.roc_auc(), abs=1e-3)
    for label, classes in zip(dataset.labels, dataset.classes, strict=True):
        label[:9], classes[:9] = 255, 255
    measurement = measure(ThreeClasses(), dataset, CPU, 0.5)
    counts = measurement.photographs[0].model.full_frame
    assert sum(dataclasses.astuple(counts)) == 63 * 80
    assert measurement.full_frame.counts.sum() == 4 * 63 * 80


def test_masks_are_scored_against_all_classes(shared_drive, tmp_path):
    dataset = DriveDataset(shared_drive, False, get_transform(False, MEAN, STD))
    masks = [tmp_path / f"{index}.png" for index in range(len(dataset))]
    for mask, classes in zip(masks, dataset.classes, strict=True):
        Image.fromarray((classes > 0) * np.uint8(255)).save(mask)
        classes[classes > 0] = dataset.labels[masks.index(mask)][classes > 0] = 2
    for number in (255, 2):  # white, or as predict.py writes several classes
        for mask in masks:
            Image.fromarray((np.array(Image.open(mask)) > 0) * np.uint8(number)).save(mask)
        measurement = measure_masks(masks, dataset, num_classes=2)
        assert all(score.model.field_of_view.dice == 1 for score in measurement.photographs)
    assert measurement.confusion_matrix.compute()[0] == 1 and measurement.dice.value == 1


def test_masks_against_labels_of_other_classes_are_refused(shared_drive, working_directory):
    """By their numbers, white is what is unknown."""
    with pytest.raises(UserError, match="no label there has a vessel, by --num-classes 2"):
        score(
            train,
            shared_drive,
            "--test-only",
            "--masks",
            str(shared_drive / "DRIVE/test/1st_manual"),
            "--num-classes=2",
        )


def test_real_photographs(real_drive, working_directory):
    """Their labels hold a few vessel pixels outside the field of view."""
    dataset = DriveDataset(real_drive, False, get_transform(False, MEAN, STD))
    measurement = measure(GreenModel(), dataset, CPU, 0.5)
    assert len(measurement.photographs) == len(dataset)
    for score in measurement.photographs:
        assert 0 < score.model.field_of_view.dice < 1 and 0 < score.model.cl_dice < 1
        assert score.model.full_frame.specificity > score.model.field_of_view.specificity
