"""A photograph in, its vessels out: from Python, through torch.hub, and with the weights that come with the project."""

import hashlib
import json
import pickle
import re
import shutil
import sys
import types
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import predict
import train
from my_dataset import DriveDataset
from src import Segmenter, load_pretrained
from src.errors import DatasetError
from src.segment import narrowed
from src.segmenter import PRETRAINED
from src.weights import CheckpointError, load_checkpoint
from tests.conftest import SMALL_RUN
from tests.test_predict import make_model, save
from train_utils import publish, settings
from train_utils.checkpoint import add_to_checkpoint
from train_utils.synthetic_drive import synthetic_photograph

PROJECT = Path(__file__).parents[1]
CARD = PRETRAINED.parent / "README.md"


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    return save(tmp_path_factory.mktemp("weights") / "weights.pth", make_model(), tta=True)


@pytest.fixture
def photograph(tmp_path):
    path = tmp_path / "photograph.png"
    Image.fromarray(synthetic_photograph(90, 80, np.random.default_rng(3))[0]).save(path)
    return path


def test_a_segmenter_gives_what_predict_writes(tmp_path, weights, photograph):
    segmentation = load_pretrained(weights)(photograph)
    flags = "--weights", str(weights), "--image", str(photograph), "--output", str(tmp_path / "out"), "--save-prob"
    predict.main(predict.parse_args([*flags, "--device", "cpu"]))
    mask, probability = (
        np.array(Image.open(tmp_path / "out" / f"photograph_{kind}.png")) for kind in ("vessels", "probability")
    )
    assert 0 < segmentation.vessels.mean() < 0.9
    np.testing.assert_array_equal(segmentation.vessels, mask == 255)
    np.testing.assert_allclose(segmentation.probability, probability / 65535, atol=1e-5)


def test_files_images_and_arrays_are_the_same(weights, photograph):
    segmenter = load_pretrained(weights)
    of_file = segmenter(str(photograph))
    with Image.open(photograph) as image:
        for same in (image, np.array(image), np.array(image)[::-1].copy()[::-1], photograph):
            assert torch.equal(segmenter(same).probabilities, of_file.probabilities)


def test_the_field_of_view_can_be_given(weights, photograph):
    segmenter = load_pretrained(weights)
    left = np.zeros((80, 90), bool)
    left[:, :45] = True
    found = segmenter(photograph)
    half = segmenter(photograph, left & found.field_of_view, retina=found.field_of_view)
    assert not half.vessels[:, 45:].any()
    np.testing.assert_array_equal(half.vessels[:, :45], found.vessels[:, :45])
    assert torch.equal(half.probabilities, found.probabilities)


@pytest.mark.parametrize("mask", [np.uint8(255), np.int64(1), np.float32(1)])
def test_masks_of_numbers(weights, photograph, mask):
    segmenter = load_pretrained(weights)
    inside = np.zeros((80, 90), bool)
    inside[10:60, 20:70] = True
    if isinstance(mask, np.float32):
        with pytest.raises(DatasetError, match=r"field_of_view: an array of float32, \[80, 90\]; give bool \[80, 90\]"):
            segmenter(photograph, inside * mask)
        return
    expected, found = segmenter(photograph, inside), segmenter(photograph, inside * mask)
    assert expected.vessels.any() and np.array_equal(found.labels, expected.labels)
    assert np.array_equal(found.probability, expected.probability)
    assert np.array_equal(
        segmenter(photograph, inside, inside * mask).labels, segmenter(photograph, inside, inside).labels
    )
    with pytest.raises(DatasetError, match=r"retina: an array of bool, \[80, 9\]"):
        segmenter(photograph, inside, inside[:, :9])
    with pytest.raises(DatasetError, match="field_of_view: is false everywhere"):
        segmenter(photograph, inside & False)


def test_arrays_that_are_no_rgb_photographs(weights, photograph):
    segmenter = load_pretrained(weights)
    image = np.array(Image.open(photograph))
    grey = np.array(Image.open(photograph).convert("L"))
    assert np.array_equal(segmenter(grey).photograph, np.repeat(grey[..., None], 3, axis=2))
    opaque = np.dstack([image, np.full_like(grey, 255)])
    assert np.array_equal(segmenter(opaque).labels, segmenter(image).labels)
    for other in (image / 255, image.astype(np.uint16), image[..., :2], image[None], grey > 9, image[:0]):
        with pytest.raises(DatasetError, match=r"is no photograph; give uint8 \[H, W, 3\]"):
            segmenter(other)


@pytest.mark.parametrize("threshold", [70, -0.1, float("nan"), "auto"])
def test_a_threshold_is_a_probability(weights, photograph, threshold):
    with pytest.raises(DatasetError, match="is no probability; give one from 0 to 1"):
        load_pretrained(weights)(photograph, threshold=threshold)


def test_numbers_are_checked(weights, photograph):
    segmenter = load_pretrained(weights)
    for scale in (0, -1.0, float("inf"), float("nan"), "auto"):
        with pytest.raises(DatasetError, match=f"scale {scale}: is no factor"):
            segmenter(photograph, scale=scale)
    for wrong in ({"batch_size": 0}, {"batch_size": None}, {"batch_size": 1.5}, {"tile": 0}, {"tile": -5}):
        with pytest.raises(DatasetError, match="is no whole number of at least 1"):
            segmenter(photograph, **wrong)
    found = segmenter(photograph, scale=np.array(0.5), threshold=torch.tensor(0.5), batch_size=np.int64(2), tile=64)
    assert found.scale == 0.5


def test_flips_are_those_of_the_weights(weights, photograph):
    segmenter = load_pretrained(weights)
    assert torch.equal(segmenter(photograph).probabilities, segmenter(photograph, flips=True).probabilities)
    assert not torch.equal(segmenter(photograph).probabilities, segmenter(photograph, flips=False).probabilities)


def test_sizes_are_those_of_the_weights(tmp_path, photograph):
    model = make_model()
    several = save(tmp_path / "several.pth", model, tta=True, tta_scales=[0.5, 1.0, 1.5])
    segmenter, of_one_size = load_pretrained(several), load_pretrained(save(tmp_path / "one.pth", model, tta=True))
    found, flipped = segmenter(photograph), of_one_size(photograph)
    assert found.scale == flipped.scale and found.reliability is not None
    # At the largest of the sizes.
    size = (1, round(80 * 1.5 * found.scale), round(90 * 1.5 * found.scale))
    assert found.working_probabilities.shape == size and flipped.working_probabilities.shape < size
    assert found.probabilities.shape == flipped.probabilities.shape == (1, 80, 90)
    assert not torch.equal(found.probabilities, flipped.probabilities)
    # Without the mean, and at a scale of one's own, the photograph is seen in one size.
    for options in ({"flips": False}, {"scale": 1.2}):
        assert torch.equal(
            segmenter(photograph, **options).probabilities, of_one_size(photograph, **options).probabilities
        )


def test_two_flips_are_those_at_a_scale_of_ones_own_too(tmp_path, photograph):
    model = make_model()
    segmenter = load_pretrained(save(tmp_path / "two.pth", model, tta=True, tta_scales=[1, 1]))
    of_four = load_pretrained(save(tmp_path / "four.pth", model, tta=True))
    mirrored = np.array(Image.open(photograph))[:, ::-1]
    one, other = (segmenter(image, scale=1.0, flips=False).probabilities for image in (photograph, mirrored))
    two = segmenter(photograph, scale=1.0).probabilities
    torch.testing.assert_close(two, (one + other.flip(-1)) / 2, atol=1e-6, rtol=0)
    assert not torch.allclose(two, of_four(photograph, scale=1.0).probabilities)
    found = segmenter(photograph)
    assert found.reliability is not None and not torch.equal(found.probabilities, of_four(photograph).probabilities)
    assert torch.equal(found.probabilities, segmenter(photograph, scale=found.scale).probabilities)


def test_a_mask_read_from_one_bit_counts_as_any_other(tmp_path, photograph):
    inside = np.zeros((80, 90), bool)
    inside[10:70, 12:80] = True
    of_one_bit = np.array(Image.fromarray(inside).convert("1").resize((90, 80)))  # true is 255 in memory
    assert of_one_bit.dtype == bool and np.array_equal(of_one_bit, inside)
    segmenter = load_pretrained(save(tmp_path / "local.pth", make_model(), normalization="local"))
    first, second = (segmenter(photograph, mask).probabilities for mask in (inside, of_one_bit))
    assert torch.equal(first, second)


def test_the_probability_is_that_of_the_mask_where_vessels_are_narrowed(tmp_path, photograph):
    """The labels were drawn in larger pixels than those of the photograph, so vessels end at higher log-odds."""
    weights = save(tmp_path / "shrinking.pth", make_model(), fov_diameter=40, trained_scale=1.0)
    segmentation = load_pretrained(weights)(photograph, threshold=0.6)
    assert segmentation.scale < 0.8 and segmentation.widened > 0.2
    np.testing.assert_array_equal(segmentation.vessels, (segmentation.probability > 0.6) & segmentation.field_of_view)
    log_odds = segmentation.working_probabilities.logit() - segmentation.widened
    expected = narrowed(segmentation.working_probabilities, segmentation.widened)
    torch.testing.assert_close(expected, log_odds.sigmoid())
    flags = "--weights", str(weights), "--image", str(photograph), "--output", str(tmp_path / "out"), "--save-prob"
    predict.main(predict.parse_args([*flags, "--device", "cpu"]))
    mask, probability = (
        np.array(Image.open(tmp_path / "out" / f"photograph_{kind}.png")) for kind in ("vessels", "probability")
    )
    np.testing.assert_array_equal(mask == 255, probability > 32767)


def test_missing_weights_are_named(tmp_path):
    with pytest.raises(CheckpointError, match="nowhere.pth"):
        load_pretrained(tmp_path / "nowhere.pth")


# ---- which weights predict.py takes


def test_own_weights_come_first_then_those_of_the_project(working_directory, weights, photograph, capsys, monkeypatch):
    monkeypatch.setattr(predict, "PRETRAINED", weights)

    def used(*flags):
        predict.main(predict.parse_args(["--device", "cpu", "--image", str(photograph), *map(str, flags)]))
        return re.search(r"^weights: (.*)$", capsys.readouterr().out, re.MULTILINE)[1]

    assert used() == str(weights)
    own = Path("save_weights", "best_model.pth")
    own.parent.mkdir()
    own.write_bytes(weights.read_bytes())
    assert used() == str(own)
    assert used("--weights", weights) == str(weights)


def test_without_any_weights_those_of_a_training_are_missed(working_directory, tmp_path, monkeypatch):
    monkeypatch.setattr(predict, "PRETRAINED", tmp_path / "gone.pth")
    assert predict.choose_weights(None) == Path("save_weights", "best_model.pth")


# ---- torch.hub


def test_hub_leaves_the_callers_packages_alone(monkeypatch, photograph):
    own = types.ModuleType("src")
    monkeypatch.setitem(sys.modules, "src", own)
    before = {name for name in sys.modules if name.split(".")[0] == "src"}
    segmenter = torch.hub.load(str(PROJECT), "unet_fundus", source="local", trust_repo=True)
    assert sys.modules["src"] is own and {name for name in sys.modules if name.split(".")[0] == "src"} == before
    assert segmenter(photograph).vessels.shape == (80, 90)


def test_hub_loads_in_several_threads(photograph):
    def load(_):
        return torch.hub.load(str(PROJECT), "unet_fundus", source="local", trust_repo=True)

    with ThreadPoolExecutor(6) as threads:
        segmenters = list(threads.map(load, range(6)))
    assert len({segmenter(photograph).vessels.tobytes() for segmenter in segmenters}) == 1
    assert pickle.loads(pickle.dumps(segmenters[0](photograph))).vessels.shape == (80, 90)


def test_hub_refuses_an_untrained_model():
    with pytest.raises(ValueError, match="create_model"):
        torch.hub.load(str(PROJECT), "unet_fundus", source="local", trust_repo=True, pretrained=False)


# ---- the weights that come with the project


def test_the_files_are_those_of_the_model_card():
    card = CARD.read_text()
    for file in ("unet_fundus.pth", "example.jpg"):
        content = (PRETRAINED.parent / file).read_bytes()
        assert hashlib.sha256(content).hexdigest() in card
    assert PRETRAINED.stat().st_size <= 5_000_000
    assert (PRETRAINED.parent / "example.jpg").stat().st_size <= 350_000


def test_the_weights_hold_plain_values_and_no_run():
    checkpoint = load_checkpoint(PRETRAINED)
    assert "DRIVE" in checkpoint["provenance"] and "HRF" in checkpoint["provenance"] and checkpoint["licence"]
    assert not {"optimizer", "training_model", "history"} & checkpoint.keys()
    assert sum(value.numel() for value in checkpoint["model"].values()) < 1_300_000


def dice(segmenter, photograph, truth, inside):
    vessels = segmenter(photograph, inside).vessels
    return 2 * (vessels & truth & inside).sum() / ((vessels & inside).sum() + (truth & inside).sum())


def test_the_weights_find_the_vessels_of_synthetic_photographs(synthetic):
    segmenter = load_pretrained()
    assert np.mean([dice(segmenter, *example) for example in synthetic[:2]]) > 0.6  # never trained on such


def test_the_weights_on_real_photographs(real_drive):
    data = DriveDataset(real_drive, train=False)
    segmenter = load_pretrained()
    scores = []
    for index, item in enumerate(data.files[:2]):
        label = data.labels[index]
        scores.append(dice(segmenter, item.photograph, label == 1, label != 255))
    assert np.mean(scores) > 0.75  # trained on these: a check of the file, no score of the model


def test_the_example_is_segmented(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    flags = "--image", str(PRETRAINED.parent / "example.jpg"), "--output", "out", "--overlay", "--device", "cpu"
    predict.main(predict.parse_args(["--weights", str(PRETRAINED), *flags]))
    mask = np.array(Image.open("out/example_vessels.png"))
    with Image.open(PRETRAINED.parent / "example.jpg") as photograph:
        assert mask.shape == photograph.size[::-1] == Image.open("out/example_overlay.png").size[::-1]
    assert 0.05 < (mask == 255).mean() < 0.2


# ---- close-ups


@pytest.fixture(scope="module")
def close_up():
    """A square around the optic disc in the example, 0.16 of its diameter, and its vessels as found in the whole."""
    whole = load_pretrained()(PRETRAINED.parent / "example.jpg")
    square = slice(450, 750), slice(1350, 1650)
    return whole.photograph[square].copy(), whole.vessels[square], whole.scale


def test_a_close_up_is_seen_at_the_scale_of_its_vessels(close_up):
    """The wide vessels, that are missed where it is taken for a whole field of view."""
    photograph, truth, known = close_up
    segmenter, inside = load_pretrained(), np.ones(truth.shape, bool)
    found = segmenter(photograph)
    assert found.field_of_view.all() and found.scale < 1.1 and known < 0.4
    as_whole = dice(lambda *given: segmenter(*given, scale=2.4), photograph, truth, inside)
    assert dice(lambda *given: found, photograph, truth, inside) > as_whole + 0.15
    # A border tells the scale; so does the flag.
    rows, columns = np.mgrid[:300, :300] - 149.5
    disc = rows**2 + columns**2 < 149**2
    assert segmenter.working_scale(photograph, disc) == pytest.approx(2.4, rel=0.01)
    assert segmenter.working_scale(photograph, np.zeros_like(disc)) == 1  # nothing to tell a scale by


@pytest.mark.parametrize("trained_on", ["close-ups", "three classes", "both"])
def test_some_models_see_a_close_up_as_a_whole(trained_on, tmp_path):
    """Those that know close-ups by their frame, and those whose views cannot be counted."""
    model = make_model() if trained_on == "close-ups" else make_model(num_classes=3)
    own = {"close_ups": True} if trained_on != "three classes" else {}
    segmenter = load_pretrained(save(tmp_path / "weights.pth", model, fov_diameter=45.0, **own))
    segmenter._segment = None  # nothing is tried
    assert segmenter.working_scale(np.zeros((80, 90, 3), np.uint8), np.ones((80, 90), bool)) == 0.5


def test_equal_scales_are_tried_once(tmp_path):
    """Of a tiny picture, or a mask of one pixel, all of them are the largest that there is."""
    segmenter = load_pretrained(save(tmp_path / "weights.pth", make_model(), fov_diameter=2000.0))
    tried = []

    def remember(photograph, retina, scale, *, votes, **options):
        tried.append(scale)
        votes.count, votes.views = torch.zeros(retina.shape), 4

    segmenter._segment = remember
    assert segmenter.working_scale(np.zeros((80, 90, 3), np.uint8), np.ones((80, 90), bool)) == 4
    assert tried == [4]


def test_training_tells_close_ups_from_whole_fields_of_view(shared_drive):
    assert not DriveDataset(shared_drive, train=True).are_close_ups()
    data = DriveDataset(shared_drive, train=True)
    assert len(data.without_border) == len(data) == 6
    data.without_border = [True] * 4 + [False] * 2
    assert data.are_close_ups()


def test_scores_and_predictions_see_a_close_up_alike(close_up, tmp_path, monkeypatch):
    photograph, truth, _ = close_up
    monkeypatch.chdir(tmp_path)
    for name, picture in (("images", photograph), ("labels", truth)):
        Path(name).mkdir()
        Image.fromarray(picture).save(f"{name}/01.png")
    weights = ["--resume", str(PRETRAINED)]
    train.main(train.parse_args(["--test-only", "--data-path", ".", "--output-dir", "scored", *weights]))
    predict.main(predict.parse_args(["--weights", str(PRETRAINED), "--image", "images", "--output", "masks"]))
    train.main(train.parse_args(["--test-only", "--data-path", ".", "--output-dir", "by_masks", "--masks", "masks"]))
    ours, theirs = (json.loads(Path(name, "scores.json").read_text()) for name in ("scored", "by_masks"))
    assert ours["each_photograph"] == theirs["each_photograph"]


# ---- to go on from weights


def test_fine_tuning_starts_from_the_weights(shared_drive, working_directory):
    def run(*flags):
        train.main(train.parse_args([*flags, "--data-path", str(shared_drive), "--output-dir", "out", "--overwrite"]))
        return load_checkpoint("out/last_model.pth")

    own = "--epochs 1 --fov-diameter 60 --normalization local --fold 1/2 --tta --tta-scales 1 1.4"
    first = run(*SMALL_RUN, *own.split())
    kept = {name: value.clone() for name, value in first["model"].items()}
    Path("out/last_model.pth").rename("first.pth")
    small = [flag for flag in SMALL_RUN if flag not in ("--base-c", "4")]
    tuned = run(*small, "--epochs", "1", "--lr", "0", "--init-weights", "first.pth", "--fold", "1/2")
    assert tuned["args"]["base_c"] == 4 and tuned["fov_diameter"] == 60 and tuned["normalization"] == "local"
    assert tuned["tta"] and tuned["tta_scales"] == [1, 1.4] and tuned["close_ups"] is False
    assert tuned["epoch"] == 0 and tuned["trained_on"] == first["trained_on"]
    parameters = [name for name in kept if "running" not in name and "num_batches" not in name]
    assert all(torch.equal(tuned["model"][name], kept[name]) for name in parameters)
    with pytest.raises(CheckpointError, match="was trained on"):
        run(*small, "--epochs", "1", "--init-weights", "first.pth", "--fold", "2/2")


@pytest.mark.parametrize(
    ("trained_scale", "diameter", "expected"),
    [(1.0, 560, 540), (1.0, 700, 540), (1.0, 3300, (540 * 3300 / 1.5) ** 0.5), (None, 3300, 540), (0.16, 3300, 540)],
)
def test_training_goes_on_at_the_size_at_which_the_weights_see_the_photographs(
    trained_scale, diameter, expected, tmp_path
):
    """One of far more pixels than they were trained on is seen larger, and so it is trained on."""
    own = {"trained_scale": trained_scale} if trained_scale else {}
    path = save(tmp_path / "weights.pth", make_model(), fov_diameter=540.0, **own)
    assert settings._diameter_to_go_on_at(load_checkpoint(path), diameter) == pytest.approx(expected)


def test_weights_to_start_from_are_checked_with_the_flags(tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:
        train.parse_args(["--init-weights", str(tmp_path / "none.pth")])
    assert stopped.value.code == 2
    message = capsys.readouterr().err
    assert message.count("\n") == 1 and "--init-weights" in message and "none.pth" in message


def test_publishing_keeps_the_model_and_drops_the_run(tmp_path, weights):
    target, kept = tmp_path / "small.pth", {"threshold": 0.4, "threshold_held_out": True}
    weights = shutil.copy(weights, tmp_path / "whole.pth")
    add_to_checkpoint(weights, **kept)
    publish.main(publish.parse_args([str(weights), str(target), "--licence", "free", "--provenance", "a test"]))
    small, whole = load_checkpoint(target), load_checkpoint(weights)
    assert small["licence"] == "free" and small["provenance"] == "a test" and small["tta"] is True
    assert kept.items() <= small.items()
    assert all(torch.equal(small["model"][name], value) for name, value in whole["model"].items())
    assert isinstance(load_pretrained(target), Segmenter)
