"""Data sets that are not DRIVE: other names and formats, several of them, folds, masks of other programs."""

import csv
import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from torchvision.transforms.v2.functional import get_size, resize, to_image

import compute_mean_std
import predict
import train
import train_multi_GPU
from my_dataset import OUTSIDE, DriveDataset, working_diameter
from src import load_pretrained
from src.dataset_files import pair
from src.errors import DatasetError
from src.segmenter import PRETRAINED
from tests.conftest import SMALL_RUN, on_posix, refusal
from tests.pictures import disc
from tests.processes import in_processes
from train_utils import fit, load_checkpoint, save_checkpoint
from train_utils.checkpoint import add_to_checkpoint
from train_utils.data_loading import TrainingSampler, open_datasets
from train_utils.files import OutputError, sha256_of
from train_utils.scoring import compare
from train_utils.settings import settle
from train_utils.synthetic_drive import write_synthetic_drive


def run(*flags):
    train.main(train.parse_args([*SMALL_RUN, "--output-dir", "out", "--overwrite", *map(str, flags)]))
    return load_checkpoint("out/last_model.pth")


def scores():
    return json.loads(Path("out/scores.json").read_text())


def fails(capsys, *flags):
    return refusal(capsys, train, *SMALL_RUN, *flags)


def plain(source, root, masks=True, enlarge=1):
    """DRIVE's training photographs in the plain layout, with other names and formats, enlarged by a whole number."""
    for folder in ("images", "labels", *(["masks"] if masks else [])):
        (root / folder).mkdir(parents=True)
    for item in pair("training", source / "DRIVE" / "training"):
        name = f"{item.number}_eye"
        for path, target in (
            (item.photograph, root / "images" / f"{name}.PNG"),
            (item.label, root / "labels" / f"{name}_vessels.bmp"),
            (item.roi_mask, root / "masks" / f"{name}.tif"),
        ):
            if target.parent.is_dir():
                with Image.open(path) as image:
                    image = image.convert("L" if path != item.photograph else "RGB")
                    image.resize((image.width * enlarge, image.height * enlarge), Image.Resampling.NEAREST).save(target)
    return root


@pytest.fixture(scope="module")
def own(shared_drive, tmp_path_factory):
    return plain(shared_drive, tmp_path_factory.mktemp("own") / "eyes")


@pytest.fixture(scope="module")
def large(shared_drive, tmp_path_factory):
    """Photographs of three times the size."""
    return plain(shared_drive, tmp_path_factory.mktemp("large") / "large", enlarge=3)


def test_the_plain_layout_gives_the_same_items(shared_drive, own):
    drive, plainly = DriveDataset(shared_drive, True, val_split=1), DriveDataset(own, True, val_split=1)
    for (image, label), (other_image, other_label) in zip(drive, plainly, strict=True):
        assert np.array_equal(image, other_image) and np.array_equal(label, other_label)


def test_a_run_on_the_plain_layout(own, working_directory, capsys):
    checkpoint = run("--data-path", own, "--epochs", 1)
    output = capsys.readouterr().out
    assert f"{own} has no test photographs: validating on the last 1 training photographs" in output
    assert "on 1 held-out training photographs (26_eye to 26_eye)" in output
    assert checkpoint["selected_on"] == "held-out training (26)" and checkpoint["args"]["val_split"] == 1
    assert scores()["photographs"] == ["26_eye"] and scores()["scored_on"] == "held-out training"
    # Without training, all that was not trained on is scored, and so is any other folder.
    Path("out/scores.json").unlink()
    run("--data-path", own, "--test-only", "--resume", "out/best_model.pth")
    assert scores()["photographs"] == ["26_eye"]


def test_roi_masks_are_optional(shared_drive, tmp_path, working_directory, capsys):
    own = plain(shared_drive, tmp_path / "own", masks=False)
    data = DriveDataset(own, True, val_split=1)
    for (_, label), (_, expected) in zip(data, DriveDataset(shared_drive, True, val_split=1), strict=True):
        inside, truth = (np.array(part) != OUTSIDE for part in (label, expected))
        assert np.count_nonzero(inside & truth) / np.count_nonzero(inside | truth) > 0.95
    run("--data-path", own, "--epochs", 1)
    assert "6 of 6 photographs have no ROI mask (" in capsys.readouterr().out


def test_any_labelled_folder_is_scored(shared_drive, large, working_directory, capsys):
    run("--data-path", shared_drive, "--epochs", 1)
    capsys.readouterr()
    run("--data-path", large, "--test-only", "--resume", "out/best_model.pth", "--output-dir", "other")
    assert "on 6 labelled photographs (21_eye to 26_eye)" in capsys.readouterr().out
    report = json.loads(Path("other/scores.json").read_text())
    assert report["scored_on"] == "labelled" and len(report["each_photograph"]) == 6


def test_what_was_trained_on_is_never_scored(own, working_directory, capsys):
    run("--data-path", own, "--epochs", 1)
    shutil.rmtree("part", ignore_errors=True)
    shutil.copytree(own, "part")
    for path in Path("part").rglob("26_eye*"):
        path.unlink()
    message = fails(capsys, "--data-path", "part", "--test-only", "--resume", "out/best_model.pth")
    assert "these weights were trained on all 5 labelled photographs" in message


def test_photographs_are_brought_to_the_working_diameter(shared_drive, large):
    plain_data, data = DriveDataset(shared_drive, True, val_split=1), DriveDataset(large, True, val_split=1)
    assert working_diameter(data.files) == pytest.approx(3 * working_diameter(plain_data.files), abs=1)
    assert data.images[0].shape == (216, 240, 3)
    small = DriveDataset(large, True, val_split=1, fov_diameter=working_diameter(plain_data.files))
    for index, (image, label) in enumerate(small):
        assert image.size == label.size == (80, 72)
        difference = np.abs(np.array(image, float) - plain_data.images[index]).mean()
        assert difference < 3
        assert np.mean(np.array(label) != plain_data.labels[index]) < 0.01
    # To validate on, the image is resized and the label is not.
    validated = DriveDataset(large, False, val_split=1, fov_diameter=working_diameter(plain_data.files))
    assert validated.images[0].shape == (72, 80, 3) and validated.labels[0].shape == (216, 240)
    # Within 5 percent nothing is resized.
    near = DriveDataset(shared_drive, True, fov_diameter=1.04 * working_diameter(plain_data.files))
    assert near.images[0].shape == (72, 80, 3)


def test_photographs_are_kept_in_two_sizes(shared_drive, large):
    small = working_diameter(DriveDataset(shared_drive, True, val_split=1).files)

    class Sizes:
        def of_two_sizes(self, working, detail):
            return working, detail

    data = DriveDataset(large, True, Sizes(), val_split=1, fov_diameter=small, detail=1.5)
    for kept in (data, data.by_root()[next(iter(data.by_root()))], data.to(torch.device("cpu"))):
        (size, image, label), (detail_size, detail_image, detail_label) = kept[0]
        assert size == 1 and detail_size == pytest.approx(1.5, rel=0.01)
        assert get_size(image) == get_size(label) == [72, 80]
        assert get_size(detail_image) == get_size(detail_label) == [108, 120]
        image, detail_image = (to_image(picture).float() for picture in (image, detail_image))
        assert (resize(detail_image, [72, 80]) - image).abs().mean() < 3  # both show the same
    # A photograph that has less itself is kept as it is.
    data = DriveDataset(shared_drive, True, Sizes(), val_split=1, fov_diameter=2 * small, detail=1.5)
    (size, image, _), (detail_size, detail_image, detail_label) = data[0]
    assert size == 1 and image.size == (160, 144) and detail_size == pytest.approx(0.5, rel=0.01)
    assert detail_image.size == detail_label.size == (80, 72)
    assert np.array_equal(np.array(detail_image), DriveDataset(shared_drive, True, val_split=1).images[0])
    assert DriveDataset(shared_drive, True, val_split=1).details == []


def test_scores_and_predictions_agree_at_another_scale(large, working_directory, capsys):
    import predict

    threshold = ["--threshold", "0.15"]  # after so few steps nothing has a probability above 0.5
    run(
        "--data-path", large, "--epochs", 2, "--steps-per-epoch", 15, "--fov-diameter", 46, *threshold
    )  # a first shrinking by 2
    weights = ["--weights", "out/best_model.pth", "--image", str(large / "images"), "--roi-mask", str(large / "masks")]
    predict.main(predict.parse_args([*weights, "--output", "masks", *threshold]))
    ours = scores()["each_photograph"][0]
    assert load_checkpoint("out/best_model.pth")["trained_scale"] == pytest.approx(46 / 207, abs=0.01)
    # The same photographs by their masks alone, among all of the folder.
    run("--data-path", large, "--test-only", "--masks", "masks", "--output-dir", "by_masks")
    report = json.loads(Path("by_masks/scores.json").read_text())
    theirs = next(row for row in report["each_photograph"] if row["photograph"] == ours["photograph"])
    assert len(report["each_photograph"]) == 6 and report["threshold"] is None
    assert theirs == ours and 0 < ours["dice"] < 1
    assert report["field_of_view"]["model"]["pooled"]["roc_auc"] is None
    assert "scores of masks in masks on 6 labelled photographs" in capsys.readouterr().out


@pytest.mark.parametrize("sizes", [["1"], ["0.7", "1", "1.4"]])
def test_scores_and_predictions_agree_on_a_camera_of_more_pixels(sizes, shared_drive, large, working_directory):
    """Photographs of three times the diameter are seen at sqrt(3 / 1.5) times a third of their size."""
    import predict

    threshold = ["--threshold", "0.15"]
    run(
        "--data-path", shared_drive, "--epochs", 2, "--steps-per-epoch", 15, "--tta", "--tta-scales", *sizes, *threshold
    )
    weights = ["--weights", "out/best_model.pth", "--image", str(large / "images"), "--roi-mask", str(large / "masks")]
    predict.main(predict.parse_args([*weights, "--output", "masks", *threshold]))
    with open("masks/predictions.csv") as file:
        scales = [float(row["scale"]) for row in csv.DictReader(file)]
    assert scales == pytest.approx([math.sqrt(3 / 1.5) / 3] * 6, rel=0.02)
    run("--data-path", large, "--test-only", "--resume", "out/best_model.pth", "--output-dir", "a", *threshold)
    run("--data-path", large, "--test-only", "--masks", "masks", "--output-dir", "b")
    ours, theirs = (json.loads(Path(folder, "scores.json").read_text())["each_photograph"] for folder in ("a", "b"))
    assert len(ours) == 6 and any(0 < row["dice"] < 1 for row in ours)
    for row, of_mask in zip(ours, theirs, strict=True):
        assert row["dice"] == pytest.approx(of_mask["dice"], abs=1e-3)


def test_wrong_masks(own, working_directory, capsys):
    Path("masks").mkdir()
    data = ["--data-path", own, "--test-only"]
    assert "21_eye.PNG: its mask" in fails(capsys, *data, "--masks", "masks")
    for number in range(21, 27):
        Image.new("L", (80, 71)).save(f"masks/{number}_eye.png")
    message = fails(capsys, *data, "--masks", "masks")
    assert "21_eye.png: is 80 x 71 pixels, but its photograph" in message
    assert "--masks masks: scores masks" in fails(capsys, *data, "--masks", "masks", "--resume", "a.pth")


def test_several_data_sets(shared_drive, large, working_directory, capsys):
    checkpoint = run("--data-path", shared_drive, large, "--epochs", 1, "-b", 2)
    output = capsys.readouterr().out
    assert "dice coefficient by data set: DRIVE 0." in output and ", large 0." in output
    assert "DRIVE (4 test)" in output and "large (1 held-out training)" in output
    assert checkpoint["args"]["data_path"] == [str(shared_drive), str(large)]
    assert checkpoint["fov_diameter"] == pytest.approx(69, abs=1)  # the lower of the two
    report = scores()
    assert {name: part["photographs"] for name, part in report["data_sets"].items()} == {"DRIVE": 4, "large": 1}
    assert [row["data_set"] for row in report["each_photograph"]] == ["DRIVE"] * 4 + ["large"]
    dices = [row["dice"] for row in report["each_photograph"]]
    assert report["tutorial"]["dice"] == pytest.approx(sum(dices) / 5, abs=1e-5)
    assert checkpoint["history"][0]["dice"] == pytest.approx(sum(dices) / 5, abs=1e-5)


def test_every_data_set_is_drawn_equally_often():
    groups = ["a"] * 3 + ["b"] * 17
    counts = np.zeros(20, int)
    for epoch in range(10):
        sampler = TrainingSampler(groups, seed=0, samples=12)
        sampler.set_epoch(epoch)
        drawn = list(sampler)
        assert len(drawn) == len(sampler) == 12 and len({seed for _, seed in drawn}) == 12
        assert sum(index < 3 for index, _ in drawn) == 6
        counts += np.bincount([index for index, _ in drawn], minlength=20)
    assert counts[:3].tolist() == [20, 20, 20]
    assert len(TrainingSampler(groups, seed=0)) == 20


def test_one_data_set_is_drawn_as_before():
    """One permutation after the other, as torch's generator gives them."""
    from train_utils.data_loading import derive_seed

    sampler = TrainingSampler([None] * 5, seed=3, samples=12)
    sampler.set_epoch(2)
    generator = torch.Generator().manual_seed(derive_seed(3, 2))
    expected = [index for _ in range(3) for index in torch.randperm(5, generator=generator).tolist()]
    assert [index for index, _ in sampler] == expected[:12]


def test_folds(own, working_directory, capsys):
    held_out = []
    for number in (1, 2, 3):
        checkpoint = run("--data-path", own, "--epochs", 1, "--fold", f"{number}/3")
        report = scores()
        assert report["scored_on"] == "held-out training" and report["fold"] == f"{number}/3" and report["seed"] == 0
        assert len(checkpoint["trained_on"]) == 4 and len(checkpoint["validated_on"]) == 2
        held_out += report["photographs"]
    assert sorted(held_out) == [f"{number}_eye" for number in range(21, 27)]
    line = fails(capsys, "--data-path", own, "--test-only", "--resume", "out/best_model.pth", "--fold", "1/3")
    assert "--fold 1/3: these weights were trained on all 2 photographs of that fold" in line
    assert "--fold 1/3: holds photographs out" in fails(capsys, "--data-path", own, "--fold", "1/3", "--val-split", 2)
    for wrong in ("0/3", "4/3", "1/1", "1", "a/b", "1/3/5"):
        with pytest.raises(SystemExit):
            train.parse_args(["--fold", wrong])
        assert f"--fold: must be K/N, the K-th of N folds, such as 1/5, found '{wrong}'" in capsys.readouterr().err


def test_a_fold_of_drive_is_scored_and_not_the_test_photographs(shared_drive, working_directory):
    run("--data-path", shared_drive, "--epochs", 1, "--fold", "2/3")
    assert scores()["scored_on"] == "held-out training" and len(scores()["photographs"]) == 2


def test_the_threshold_is_chosen_on_what_was_held_out(own, working_directory, capsys):
    run("--data-path", own, "--epochs", 1, "--fold", "1/3", "--threshold", "auto")
    report = scores()
    assert report["threshold"]["source"].startswith("auto: best Dice on held-out training (")
    assert load_checkpoint("out/best_model.pth")["threshold"] == report["threshold"]["value"]
    other = ["--data-path", "other", "--test-only", "--resume", "out/best_model.pth", "--threshold", "auto"]
    shutil.copytree(own, "other")
    for path in Path("other/images").iterdir():
        with Image.open(path) as image:
            image = image.convert("L").convert("RGB")
        image.save(path)
    run(*other)  # photographs of others: by the threshold that is stored
    stored = {"value": report["threshold"]["value"], "source": "auto: as the weights store it"}
    assert scores()["threshold"] == stored
    for flags in (["--tta"], ["--fov-diameter", 60]):
        run(*other, *flags)
        assert scores()["threshold"]["source"].endswith("which was chosen with other views or another preparation")
    Path("parted").mkdir()
    shutil.copytree("other", "parted/test")
    run("--data-path", "parted", *other[2:])  # there are no training photographs to choose it on
    assert scores()["threshold"] == stored
    content = load_checkpoint("out/best_model.pth")
    del content["threshold"], content["path"]
    save_checkpoint(content, "out/best_model.pth")
    assert "--threshold auto: --data-path other holds no photograph" in fails(capsys, *other)


def second_observers(drive, dark=3, light=253):
    """Second observers' files of the official kind: a palette with two greys."""
    folder = drive / "DRIVE" / "test" / "2nd_manual"
    for path in sorted(folder.iterdir()):
        with Image.open(path) as image:
            levels = (np.array(image.convert("L")) > 127).astype(np.uint8)
        image = Image.fromarray(levels, "P")
        image.putpalette([dark] * 3 + [light] * 3)
        image.save(path)
    return sorted(folder.iterdir())


def test_the_official_second_observer(drive, working_directory, capsys):
    run("--data-path", drive, "--epochs", 1)
    expected = scores()["field_of_view"]["second_observer"]
    second_observers(drive)
    run("--data-path", drive, "--test-only", "--resume", "out/best_model.pth")
    assert scores()["field_of_view"]["second_observer"] == expected and expected["photographs"] == 4
    assert "\nsecond observer  0." in capsys.readouterr().out


def test_a_faulty_second_observer_is_left_out(drive, working_directory, capsys):
    files = second_observers(drive)
    files[0].write_bytes(b"broken")
    Image.new("L", (5, 5)).save(files[1])
    run("--data-path", drive, "--epochs", 1)
    before, _, after = capsys.readouterr().out.partition("Epoch: [0]")
    for file in files[:2]:
        line = next(line for line in before.splitlines() if str(file) in line)
        assert line.startswith("warning: left out of the second observer's scores: ")
    assert "second observer (2 photographs)" in after
    assert scores()["field_of_view"]["second_observer"]["photographs"] == 2


@pytest.mark.parametrize("broken", ["1st_manual/02_manual1.gif", "images/03_test.tif", "mask/04_test_mask.gif"])
def test_what_is_scored_in_the_end_is_checked_at_the_start(drive, working_directory, capsys, broken):
    (drive / "DRIVE" / "test" / broken).write_bytes(b"broken")
    flags = ["--data-path", drive, "--epochs", 1, "--val-split", 2]
    assert f"{Path(broken).name}: not an image" in fails(capsys, *flags)
    assert not list(Path().glob("results*")) and not Path("save_weights/last_model.pth").exists()


def multi_class(drive):
    """Three classes: the vessels of the left half are 1, those of the right half 2."""
    for path in (drive / "DRIVE").glob("*/1st_manual/*.gif"):
        with Image.open(path) as image:
            label = (np.array(image.convert("L")) > 127).astype(np.uint8)
        label[:, label.shape[1] // 2 :] *= 2
        Image.fromarray(label).save(path)
    return drive


def test_several_classes(drive, working_directory, capsys):
    multi_class(drive)
    checkpoint = run("--data-path", drive, "--epochs", 1, "--num-classes", 2)
    assert checkpoint["model_args"]["num_classes"] == 3
    assert len(scores()["tutorial"]["iou"]) == 3
    assert "holds the values 0, 1, 2;" in fails(capsys, "--data-path", drive, "--epochs", 1)
    message = fails(capsys, "--data-path", drive, "--epochs", 1, "--num-classes", 3)
    assert "--num-classes 3: class 3 occurs in no label of" in message
    whole = run("--data-path", drive, "--epochs", 1, "--num-classes", 2, "--train-on-all")
    assert len(whole["trained_on"]) == 10


def test_an_absent_class(drive, working_directory, capsys):
    for path in (drive / "DRIVE" / "test" / "1st_manual").iterdir():
        Image.new("L", (80, 72)).save(path)
    assert "--num-classes 1: class 1 occurs in no label of" in fails(capsys, "--data-path", drive, "--epochs", 1)


def test_hostile_photographs_are_read_by_one_decoder(shared_drive, tmp_path):
    """16-bit greys, EXIF orientation, alpha and white surroundings: the same tensor to train on and to predict."""
    from src.colours import Normalization, prepare
    from src.photograph import read_photograph
    from train_utils.data_loading import reading

    source = pair("training", shared_drive / "DRIVE" / "training")[0]
    with Image.open(source.photograph) as image:
        photograph = np.array(image.convert("RGB"))
    with Image.open(source.roi_mask) as image:
        inside = np.array(image.convert("L")) > 127
    with Image.open(source.label) as image:
        label = image.convert("L")
    for folder in ("images", "labels"):
        (tmp_path / folder).mkdir()
    grey = photograph[..., 1].astype(np.uint16) * 200
    Image.fromarray(grey).save(tmp_path / "images" / "grey.png")
    Image.fromarray(grey).save(tmp_path / "images" / "grey16.tif")
    Image.fromarray(np.dstack([photograph, inside * np.uint8(255)])).save(tmp_path / "images" / "alpha.png")
    white = np.where(inside[..., None], photograph, np.uint8(255))
    Image.fromarray(white).save(tmp_path / "images" / "white.png")
    exif = Image.Exif()
    exif[0x0112] = 3  # upside down
    Image.fromarray(photograph[::-1, ::-1].copy()).save(tmp_path / "images" / "turned.png", exif=exif)
    for path in (tmp_path / "images").iterdir():
        label.save(tmp_path / "labels" / f"{path.stem}.png")
    for kind in ("dataset", "photograph", "local"):
        normalization = Normalization(kind, (0.5, 0.4, 0.3), (0.2, 0.1, 0.1))
        data = DriveDataset.of(pair("all", tmp_path), **reading(normalization, None, 1))
        for item, image, label_array in zip(data.files, data.images, data.labels, strict=True):
            again = prepare(read_photograph(item.photograph), label_array != OUTSIDE, normalization)
            assert np.array_equal(image, again)
            if item.photograph.stem == "turned" and kind == "dataset":
                assert np.array_equal(image, photograph)
            if item.photograph.stem == "white" and kind == "dataset":
                assert image[0, 0].tolist() == [0, 0, 0]


def test_compute_mean_std_prints_the_sizes(large, capsys):
    compute_mean_std.main(compute_mean_std.get_parser().parse_args(["--data-path", str(large)]))
    output = capsys.readouterr().out
    assert "working diameter: 207 pixels" in output and "working diameter: 216 pixels" in output


def test_compute_mean_std_of_several_data_sets(shared_drive, large, capsys):
    """The shorter side is that at the working diameter, so that it can be given as --base-size."""
    compute_mean_std.main(compute_mean_std.get_parser().parse_args(["--data-path", str(shared_drive), str(large)]))
    output = capsys.readouterr().out
    assert "working diameter: 69 pixels across" in output and "at the working diameter: 72 pixels" in output


def test_compute_mean_std_needs_no_black_and_white_labels(drive, capsys):
    compute_mean_std.main(compute_mean_std.get_parser().parse_args(["--data-path", str(multi_class(drive))]))
    assert "to train with these: --mean" in capsys.readouterr().out


def test_a_small_set_of_another_size_than_drives(tmp_path, working_directory):
    """The weights know the working diameter: that of the photographs that they were trained on."""
    root = write_synthetic_drive(tmp_path / "twice", training=3, test=1, width=160, height=144)
    checkpoint = run("--data-path", root, "--epochs", 1)
    assert checkpoint["fov_diameter"] == working_diameter(pair("training", root / "DRIVE" / "training"))
    assert checkpoint["args"]["fov_diameter"] == checkpoint["fov_diameter"] == pytest.approx(144 * 540 / 565, abs=1.5)


def test_scores_and_predictions_shift_the_threshold_alike(shared_drive, large, working_directory):
    """Of photographs that are shrunk more than those of the training."""
    import predict

    run("--data-path", shared_drive, "--epochs", 2, "--steps-per-epoch", 15)
    checkpoint = load_checkpoint("out/best_model.pth")
    assert checkpoint["trained_scale"] == 1
    shares = {}
    for trained_scale in (1.0, None):  # None: weights of an earlier version
        weights = {name: value for name, value in checkpoint.items() if name not in ("path", "trained_scale")}
        save_checkpoint(weights | ({"trained_scale": trained_scale} if trained_scale else {}), "my.pth")
        flags = ["--threshold", "0.2"]
        run("--data-path", large, "--test-only", "--resume", "my.pth", "--output-dir", "scored", *flags)
        image = ["--image", str(large / "images"), "--roi-mask", str(large / "masks")]
        predict.main(predict.parse_args(["--weights", "my.pth", *image, "--output", "masks", *flags]))
        run("--data-path", large, "--test-only", "--masks", "masks", "--output-dir", "by_masks")
        ours, theirs = (json.loads(Path(name, "scores.json").read_text()) for name in ("scored", "by_masks"))
        assert ours["each_photograph"] == theirs["each_photograph"]
        with open("masks/predictions.csv", newline="") as file:
            shares[trained_scale] = [float(row["vessel_share"]) for row in csv.DictReader(file)]
    assert all(shifted < plain for shifted, plain in zip(shares[1.0], shares[None], strict=True))


@pytest.mark.parametrize("world_size", [1, 2])
def test_masks_are_scored_once_each_in_any_number_of_processes(own, tmp_path, monkeypatch, world_size):
    folder = tmp_path / str(world_size)
    shutil.copytree(own / "labels", folder / "masks")
    flags = ["--data-path", str(own), "--test-only", "--masks", "masks", "--output-dir", ".", "--device", "cpu"]
    if world_size == 1:
        monkeypatch.chdir(folder)
        train_multi_GPU.main(train_multi_GPU.parse_args(flags))
    else:
        in_processes(score_masks, world_size, folder, [*flags, "--dist-url", f"file://{folder}/meet"])
    report = json.loads((folder / "scores.json").read_text())
    assert report["photographs"] == [f"{number}_eye" for number in range(21, 27)]
    assert report["field_of_view"]["model"]["pooled"]["dice"] == report["tutorial"]["dice"] == 1


def score_masks(flags):
    train_multi_GPU.main(train_multi_GPU.parse_args(flags))


def test_masks_of_a_training_part_alone(drive, working_directory):
    shutil.rmtree(drive / "DRIVE" / "test")
    masks = drive / "DRIVE" / "training" / "1st_manual"
    train.main(
        train.parse_args(["--data-path", str(drive), "--test-only", "--masks", str(masks), "--output-dir", "out"])
    )
    assert len(scores()["photographs"]) == 6


def test_weights_that_know_all_that_is_to_be_scored(shared_drive, own, working_directory, tmp_path, capsys):
    run("--data-path", own, "--epochs", 1, "--train-on-all")
    drive = tmp_path / "mixed"
    shutil.copytree(shared_drive / "DRIVE" / "training", drive / "training")
    shutil.copytree(own, drive / "test")
    flags = ["--data-path", drive, "--init-weights", "out/last_model.pth", "--val-split", 1, "--output-dir", "tuned"]
    assert "these weights were trained on all" in fails(capsys, *flags)
    assert not list(Path("tuned").glob("*.pth"))  # before the first epoch


def test_folders_that_cannot_be_looked_into(own, working_directory, monkeypatch, capsys):
    def refuse(path):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "is_dir", refuse)
    assert f"--data-path {own}: cannot be read (Permission denied)" in fails(capsys, "--data-path", own)


def test_resuming_on_other_photographs(shared_drive, own, working_directory, capsys):
    run("--data-path", own, "--epochs", 1, "--fold", "1/3")
    again = ["--data-path", own, "--epochs", 2, "--output-dir", "out", "--resume", "auto"]
    assert f"{Path('out/last_model.pth')}: was trained on 2 of the 2 photographs" in fails(
        capsys, *again, "--fold", "2/3"
    )
    capsys.readouterr()
    run(*again, "--fold", "1/3")
    assert len(load_checkpoint("out/last_model.pth")["trained_on"]) == 4
    # Other photographs of the same description: the best Dice so far says nothing of them.
    evaluations = []
    original = fit.evaluate
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fit, "evaluate", lambda *args, **kwargs: evaluations.append(1) or original(*args, **kwargs))
        run("--data-path", shared_drive, "--epochs", 1, "--output-dir", "test_part")
        assert len(evaluations) == 1
        other = write_synthetic_drive("other", training=2, test=2, width=80, height=72)
        flags = ["--epochs", 2, "--output-dir", "test_part", "--resume", "auto"]
        run("--data-path", shared_drive, other, *flags)
    assert len(evaluations) == 1 + 2 + 2  # of each data set: the checkpoint itself, and the epoch after it
    trained_on = load_checkpoint("test_part/last_model.pth")["trained_on"]
    assert len(trained_on) == 8


@pytest.mark.parametrize("flags", [[], ["--val-split", "2"]])
def test_an_absent_class_in_what_is_scored(drive, working_directory, capsys, flags):
    multi_class(drive)
    for path in (drive / "DRIVE" / "test" / "1st_manual").iterdir():
        with Image.open(path) as image:
            Image.fromarray(np.array(image) % 2).save(path)
    run("--data-path", drive, "--epochs", 1, "--num-classes", 2, *flags)
    # With --val-split, those that are validated have it.
    assert ("warning: class 2 occurs in no label of" in capsys.readouterr().out) == (not flags)
    assert len(scores()["tutorial"]["iou"]) == 3


def test_no_photograph_counts_twice(shared_drive, own, working_directory, capsys):
    twice = ["--data-path", shared_drive, shared_drive / "DRIVE", "--epochs", 1]
    assert "21_training.tif is named twice" in fails(capsys, *twice)
    assert "is named twice" in fails(capsys, "--data-path", own, own, "--test-only", "--masks", own / "labels")
    with pytest.raises(DatasetError, match="is named twice"):
        compute_mean_std.main(compute_mean_std.get_parser().parse_args(["--data-path", str(own), str(own)]))
    shutil.copytree(own, "copy")
    for path in Path("copy").rglob("2[1-5]_eye*"):
        path.unlink()
    for path in Path("copy").rglob("26_eye*"):
        path.rename(path.with_name(path.name.replace("26", "99")))
    shutil.copytree(own, "parted/training")
    shutil.copytree("copy", "parted/test")
    assert "99_eye.PNG: is the same photograph as" in fails(capsys, "--data-path", "parted", "--epochs", 1)


def test_the_output_does_not_lie_among_the_data(own, working_directory, capsys):
    """What is drawn there would be taken for a photograph."""
    shutil.copytree(own, "eyes")
    before = sorted(Path("eyes").rglob("*"))
    for folder in ("images", "labels", "masks"):
        for flags in (("--epochs", 1), ("--test-only", "--masks", own / "labels"), ("--epochs", 1, "--train-on-all")):
            message = fails(capsys, "--data-path", "eyes", "--output-dir", f"eyes/{folder}", *flags)
            assert f"--output-dir eyes/{folder}: holds " in message
    assert sorted(Path("eyes").rglob("*")) == before


def test_changed_labels_are_seen(own, working_directory, capsys):
    """A Dice by other labels is another Dice."""
    for name in ("first", "second"):
        shutil.copytree(own, f"{name}/eyes")
    for path in Path("second/eyes/labels").glob("26*"):
        Image.open(path).rotate(180).save(path)
    for path in Path("second/eyes/images").glob("25*"):
        path.write_bytes(path.read_bytes() + bytes(1))
    run("--data-path", "first/eyes", "--epochs", 1)
    stored = torch.load("out/last_model.pth", weights_only=True)
    torch.save(stored | {"best_dice": 0.99}, "out/last_model.pth")
    capsys.readouterr()
    last = run("--data-path", "second/eyes", "--epochs", 2, "--resume", "auto")
    output = capsys.readouterr().out
    assert "changed since the checkpoint: 1 of the training photographs are new\n" in output
    assert "or their labels; the best epoch is chosen anew" in output and last["best_dice"] < 0.99
    now, before = (record["data"] for record in records(Path("out")))
    assert now["digest"] != before["digest"] and now["trained_on"] == before["trained_on"]


def records(folder):
    """What `run.json` tells of the last start, and of the one before."""
    record = json.loads((folder / "run.json").read_text())
    return record, record["earlier"][-1]


def test_training_on_all(shared_drive, working_directory, capsys):
    flags = "--data-path", shared_drive, "--train-on-all"
    last = run(*flags, "--epochs", 2)
    assert len(last["trained_on"]) == 6 + 4 and last["validated_on"] == [] and last["selected_on"] == "none"
    best = load_checkpoint("out/best_model.pth")  # the last epoch's
    assert all(torch.equal(value, best["model"][name]) for name, value in last["model"].items())
    assert best["epoch"] == 1 and [sorted(row) for row in best["history"]] == 2 * [
        ["epoch", "lr", "seconds", "train_loss"]
    ]
    assert not Path("out/scores.json").exists()
    assert "trained on all photographs" in capsys.readouterr().out
    assert run(*flags, "--epochs", 3, "--resume", "out/last_model.pth")["epoch"] == 2
    assert "nothing can be scored" in fails(
        capsys, "--data-path", shared_drive, "--test-only", "--resume", "out/best_model.pth"
    )
    assert "--val-split 2" in fails(capsys, *flags, "--val-split", 2)
    assert "--fold 1/2" in fails(capsys, *flags, "--fold", "1/2")
    assert "--threshold auto" in fails(capsys, *flags, "--threshold", "auto")


def test_ambiguous_second_observers_are_left_out(drive, working_directory, capsys):
    second = drive / "DRIVE" / "test" / "2nd_manual"
    shutil.copy(second / "01_manual2.gif", second / "01_manual2.png")
    run("--data-path", drive, "--epochs", 1)
    output = capsys.readouterr().out
    assert "warning: left out of the second observer's scores: " in output and "is ambiguous" in output
    assert scores()["field_of_view"]["second_observer"]["photographs"] == 3


def test_flags_that_do_not_go_together(shared_drive, own, working_directory, capsys):
    assert "--masks nowhere: does nothing without --test-only" in fails(
        capsys, "--data-path", shared_drive, "--masks", "nowhere"
    )
    assert "--masks nowhere: no such folder" in fails(
        capsys, "--data-path", shared_drive, "--masks", "nowhere", "--test-only"
    )
    assert "the demo takes one folder" in fails(capsys, "--demo", "--data-path", shared_drive, own)


def test_a_run_of_an_earlier_version_goes_on_as_it_was(shared_drive, working_directory, capsys):
    run("--data-path", shared_drive, "--epochs", 1)
    checkpoint = load_checkpoint("out/last_model.pth")
    for name in ("path", "trained_on", "validated_on", "trained_scale"):
        del checkpoint[name]
    for name in ("fov_diameter", "fold", "sampling", "masks"):
        del checkpoint["args"][name]
    save_checkpoint(checkpoint, "out/last_model.pth")
    capsys.readouterr()
    resumed = run("--data-path", shared_drive, "--epochs", 1, "--resume", "auto")
    assert "changed since the checkpoint" not in capsys.readouterr().out
    assert resumed["epoch"] == 0


def test_compare_takes_what_the_scripts_write(shared_drive, working_directory, capsys):
    run("--data-path", shared_drive, "--epochs", 1)
    run("--data-path", shared_drive, "--test-only", "--resume", "out/best_model.pth", "--output-dir", "alone")
    capsys.readouterr()
    compare.main(compare.get_parser().parse_args(["out/scores.json", "--against", "alone/scores.json"]))
    title, dice, *_ = capsys.readouterr().out.splitlines()
    assert title.startswith("1 files, 4 photographs, 4 scores") and "paired difference +0.0000" in dice


# ---- labels that can hardly be right


def test_empty_and_inverted_labels_are_said(shared_drive, working_directory, capsys):
    for name, changes in (
        ("good", {}),
        ("odd", {0: np.zeros_like, 2: np.invert, 5: np.invert}),
        ("one", {1: np.zeros_like}),
    ):
        plain(shared_drive, Path(name))
        for number, change in changes.items():
            path = sorted(Path(name, "labels").iterdir())[number]
            Image.fromarray(change(np.array(Image.open(path)))).save(path)
    run("--data-path", "odd", "good", "one", "--epochs", 1, "--val-split", 1)
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("warning: of")]
    half = "have vessels in more than half of the field of view, as if black and white were exchanged"
    assert lines == [
        f"warning: of the 6 labels of odd, 1 have no vessels, and 2 {half} "
        f"({Path('odd/labels/23_eye_vessels.bmp')}, ...)",
        f"warning: of the 6 labels of one, 1 have no vessels, and 0 {half} ({Path('one/labels/22_eye_vessels.bmp')})",
    ]


def test_inverted_roi_masks_are_said(shared_drive, working_directory, capsys):
    plain(shared_drive, Path("data"))
    for path in sorted(Path("data", "masks").iterdir())[:2]:
        Image.fromarray(np.invert(np.array(Image.open(path)))).save(path)
    run("--data-path", "data", "--epochs", 1)
    said = "warning: nearly all vessels of 2 labels lie outside the ROI mask, as if its black and white were exchanged"
    assert f"{said} ({Path('data/masks/21_eye.tif')}, ...)\n" in capsys.readouterr().out
    for path in Path("data", "masks").iterdir():  # of a part of the retina that has hardly a vessel
        vessels = np.array(Image.open(Path("data", "labels", f"{path.stem}_vessels.bmp"))) > 127
        y, x = np.argwhere(vessels)[0]
        mask = np.zeros(vessels.shape, np.uint8)
        mask[y : y + 4, x : x + 4] = 255
        assert vessels[mask > 0].sum() < 0.1 * vessels.sum()
        Image.fromarray(mask).save(path)
    run("--data-path", "data", "--epochs", 1)
    assert "outside the ROI mask" not in capsys.readouterr().out


def test_test_photographs_that_are_trained_on_are_said(drive, working_directory, capsys):
    test, training = drive / "DRIVE" / "test", drive / "DRIVE" / "training"
    for folder, ending in (("images", "_training.tif"), ("1st_manual", "_manual1.gif"), ("mask", "_training_mask.gif")):
        other = ending.replace("training", "test")
        shutil.copy(training / folder / f"21{ending}", test / folder / f"99{other}")
    run("--data-path", drive, "--epochs", 1, "--val-split", 1)
    output = capsys.readouterr().out
    assert "warning: 1 of the test photographs are not scored, as the weights were trained on them (" in output
    assert len(scores()["photographs"]) == 4


# ---- odd files and names


@pytest.mark.parametrize("folder", ["images", "labels", "masks"])
@pytest.mark.parametrize(
    "odd", [*(pytest.param(odd, marks=on_posix) for odd in ("fifo", "loop", "broken")), "postscript"]
)
def test_odd_files_of_a_data_set_are_one_line(working_directory, shared_drive, capsys, folder, odd):
    plain(shared_drive, Path("data"))
    path = sorted(Path("data", folder).iterdir())[1]
    path.unlink()
    if odd == "fifo":
        os.mkfifo(path)
    elif odd == "postscript":
        Image.new("L", (80, 72)).save(path, format="EPS")
    else:
        path.symlink_to(path.name if odd == "loop" else "missing.png")
    message = fails(capsys, "--data-path", "data", "--epochs", "1")
    reasons = {
        "fifo": "is a FIFO",
        "loop": "cannot be read (Too many",
        "broken": "a link",
        "postscript": "not an image",
    }
    assert f"{path}: {reasons[odd]}" in message


@on_posix
def test_names_that_are_not_utf_8(working_directory, shared_drive):
    plain(shared_drive, Path("data"))
    for folder in ("images", "labels", "masks"):
        for path in list(Path("data", folder).iterdir()):
            path.rename(path.with_name(os.fsdecode(b"\xff") + path.name.partition("_")[0] + path.suffix))
    flags = ["--data-path", "data", "--epochs", "1", "--fold", "1/3", *SMALL_RUN]
    command = [sys.executable, Path(train.__file__), *flags]
    done = subprocess.run(command, capture_output=True, env=os.environ | {"PYTHONIOENCODING": "utf-8"})
    assert done.returncode == 0, done.stderr
    assert b"held-out training (\\udcff" in done.stdout


@pytest.mark.parametrize("path", ["a" * 300, "loop/data"])
def test_paths_that_no_system_can_follow(working_directory, capsys, path):
    Path("loop").symlink_to("loop")
    assert path.partition("/")[0] in fails(capsys, "--data-path", path)


def test_validation_sees_photographs_of_far_more_pixels_as_the_scores_do(drive, working_directory):
    for path in (drive / "DRIVE" / "test").rglob("*.*"):
        with Image.open(path) as image:
            enlarged = image.resize((image.width * 3, image.height * 3), Image.Resampling.NEAREST)
        enlarged.save(path)
    args = train.parse_args(["--data-path", str(drive), "--device", "cpu", "--recipe", "quick"])
    settle(args, torch.device("cpu"))
    training, validated = open_datasets(args, torch.device("cpu"))
    assert training.scales == [1.0] * 6
    assert validated.scales == pytest.approx([(1 / 3 / 1.5) ** 0.5] * 4, rel=0.02)


def partial_masks(own, root):
    """Photographs whose ROI masks show a part of the retina alone."""
    shutil.copytree(own, root)
    for path in (root / "masks").iterdir():
        with Image.open(path) as image:
            Image.fromarray(disc(image.height, image.width, 40)).save(path)
    return root


def test_scale_and_colours_follow_from_the_whole_retina_everywhere(own, tmp_path, working_directory):
    """In training, scores and predictions, though vessels count inside the ROI masks alone."""
    parts = partial_masks(own, tmp_path / "parts")
    shutil.copytree(parts, tmp_path / "odd")
    odd = next((tmp_path / "odd" / "masks").iterdir())
    Image.fromarray(disc(40, 40, 10)).save(odd)
    with pytest.raises(DatasetError, match=rf"{odd.name}: is 40 x 40 pixels, but its photograph"):
        working_diameter(pair("all", tmp_path / "odd"))
    assert working_diameter(pair("all", parts)) == pytest.approx(working_diameter(pair("all", own)), abs=3)
    run("--data-path", parts, "--epochs", 2, "--normalization", "local", "--fov-diameter", 120, "--val-split", 1)
    photographs = DriveDataset.of(pair("all", parts), fov_diameter=120)
    assert photographs.scales == pytest.approx(DriveDataset.of(pair("all", own), fov_diameter=120).scales, abs=0.1)
    trained = ["--test-only", "--resume", "out/best_model.pth", "--fold", "1/2"]
    run("--data-path", parts, *trained)
    expected = scores()["field_of_view"]["model"]["pooled"]
    flags = [
        "--weights",
        "out/best_model.pth",
        "--device",
        "cpu",
        "--image",
        str(parts / "images"),
        "--output",
        "masks",
    ]
    predict.main(predict.parse_args([*flags, "--roi-mask", str(parts / "masks")]))
    run("--data-path", parts, "--test-only", "--masks", "masks", "--fold", "1/2")
    found = scores()["field_of_view"]["model"]["pooled"]
    assert found["dice"] == expected["dice"] and found["sensitivity"] == expected["sensitivity"]
    segmenter = load_pretrained("out/best_model.pth")
    mask = np.array(Image.open(next((parts / "masks").iterdir()))) > 0
    photograph = next((parts / "images").iterdir())
    assert segmenter(photograph, mask).scale == pytest.approx(segmenter(photograph).scale, abs=0.1)


@pytest.mark.parametrize("flags", [["--test-only", "--resume", PRETRAINED], ["--epochs", "1"]])
def test_a_label_among_the_photographs_is_refused(shared_drive, working_directory, capsys, flags):
    """As a second observer's, of a data set that has all its files in one folder."""
    plain(shared_drive, Path("data"), masks=False)
    label = next(Path("data/labels").iterdir())
    for folder in ("images", "labels"):
        Image.open(label).save(f"data/{folder}/22_eye_2ndHO.png")
    message = fails(capsys, "--data-path", "data", *flags)
    odd = Path("data/images/22_eye_2ndHO.png")
    assert f"{odd}: is black and white, as a label or a mask is; take it out of" in message


def test_test_only_tells_of_labels_and_roi_masks(own, tmp_path, working_directory, capsys):
    shutil.copytree(own, tmp_path / "own")
    label = next((tmp_path / "own" / "labels").iterdir())
    ImageOps.invert(Image.open(label).convert("L")).save(label)
    shutil.rmtree(tmp_path / "own" / "masks")
    run("--data-path", own, "--epochs", 1)
    (working_directory / "found").mkdir()
    for item in pair("all", own):
        shutil.copyfile(item.label, working_directory / "found" / f"{item.photograph.stem}.bmp")
    for flags in (["--resume", "out/best_model.pth", "--fold", "1/2"], ["--masks", "found"]):
        capsys.readouterr()
        run("--data-path", tmp_path / "own", "--test-only", *flags, "--output-dir", "scores")
        output = capsys.readouterr().out
        if "--masks" in flags:
            assert "labels of own, 0 have no vessels, and 1 have vessels in more than half" in output
        assert "photographs have no ROI mask" in output


def test_masks_of_those_that_a_run_held_out(own, working_directory):
    """Another program is scored on the photographs that a run with the same flag is scored on."""
    run("--data-path", own, "--epochs", 1, "--val-split", 2)
    held_out = scores()["photographs"]
    Path("found").mkdir()
    for item in pair("all", own):
        shutil.copyfile(item.label, Path("found", f"{item.photograph.stem}.bmp"))
    run("--data-path", own, "--test-only", "--masks", "found", "--val-split", 2)
    assert scores()["photographs"] == held_out and len(held_out) == 2


def test_weights_that_change_while_they_are_scored(own, working_directory, capsys, monkeypatch):
    """The scores name the file that was scored, and no threshold goes into another one."""
    run("--data-path", own, "--epochs", 1, "--val-split", 2)
    shutil.copyfile("out/best_model.pth", "mine.pth")
    before = sha256_of("mine.pth")
    scoring = sys.modules["train_utils.scoring.score"]
    measure = scoring.measure

    def replaced_meanwhile(*arguments, **keywords):
        shutil.copyfile("out/last_model.pth", "mine.pth")
        add_to_checkpoint("mine.pth", note="of another epoch")
        return measure(*arguments, **keywords)

    monkeypatch.setattr(scoring, "measure", replaced_meanwhile)
    run("--data-path", own, "--test-only", "--resume", "mine.pth", "--threshold", "auto")
    assert "the threshold is not stored: mine.pth was replaced meanwhile" in capsys.readouterr().out
    assert scores()["sha256"] == before and "threshold" not in load_checkpoint("mine.pth")

    monkeypatch.setattr(
        scoring, "measure", lambda *args, **kwargs: (Path("mine.pth").unlink(), measure(*args, **kwargs))[1]
    )
    run("--data-path", own, "--test-only", "--resume", "mine.pth", "--threshold", "auto")
    assert "the threshold is not stored: " in capsys.readouterr().out and scores()["threshold"]["value"] != 0.5

    # Replaced between reading it and its digest: it is read again.
    shutil.copyfile("out/best_model.pth", "mine.pth")
    load, loaded = scoring.load_checkpoint, []

    def replaced_at_once(path):
        checkpoint = load(path)
        if not loaded:
            add_to_checkpoint(path, note="of another epoch")
        loaded.append(checkpoint)
        return checkpoint

    monkeypatch.setattr(scoring, "load_checkpoint", replaced_at_once)
    sha256, checkpoint = scoring._load_without_training_state("mine.pth")
    assert sha256 == sha256_of("mine.pth") and checkpoint["note"] == "of another epoch" and len(loaded) == 2


def test_a_threshold_that_cannot_be_stored(own, working_directory, capsys, monkeypatch):
    run("--data-path", own, "--epochs", 1, "--val-split", 2)

    def refuse(path, **values):
        raise OutputError(f"{path}: cannot be written (Read-only file system)")

    monkeypatch.setattr(sys.modules["train_utils.scoring.score"], "add_to_checkpoint", refuse)
    Path("out/scores.json").unlink()
    run("--data-path", own, "--test-only", "--resume", "out/best_model.pth", "--threshold", "auto")
    assert "the threshold is not stored: out/best_model.pth: cannot be written" in capsys.readouterr().out
    assert scores()["threshold"]["source"].startswith("auto: best Dice")


def test_photographs_that_exif_turns(own, tmp_path, working_directory, capsys):
    """Their labels are taken as they are, and it is said so; where these do not fit, the message says why."""
    shutil.copytree(own, tmp_path / "own")
    first, second = sorted((tmp_path / "own" / "images").iterdir())[:2]
    exif = Image.Exif()
    exif[0x0112] = 3
    with Image.open(first) as image:
        image.load()
    image.save(first, exif=exif)
    run("--data-path", tmp_path / "own", "--epochs", 1)
    output = capsys.readouterr().out
    assert "the EXIF orientation turns 1 photographs and not their labels" in output and f"({first})" in output
    exif[0x0112] = 6
    with Image.open(second) as image:
        image.load()
    image.save(second, exif=exif)
    (tmp_path / "own" / "masks" / f"{second.stem}.tif").unlink()
    message = fails(capsys, "--data-path", tmp_path / "own", "--epochs", 1)
    assert "22_eye_vessels.bmp: is 80 x 72 pixels, but its photograph" in message
    assert "is 72 x 80 (turned by its EXIF orientation); they must match" in message
