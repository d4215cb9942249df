import csv

import numpy as np
import pytest
import torch
from PIL import Image, ImageFilter

from src.field_of_view import find_field_of_view, shows_two_discs
from src.photograph import read_photograph
from src.reliability import (
    agreement_of_views,
    brightness,
    edge_density,
    expected_dice,
    reasons_for_doubt,
    sharpness,
)
from src.segment import FLIPS, Votes, segment
from tests.pictures import disc
from tests.test_predict import MEAN, STD, make_model, run, save
from train_utils.synthetic_drive import synthetic_photograph


@pytest.fixture(scope="module")
def retina():
    """A sharp, bright photograph with its vessels and its field of view."""
    return synthetic_photograph(400, 420, np.random.default_rng(3))


def halves(mask):
    """Masks of four flips that agree on the left half of the picture alone."""
    left = np.arange(mask.shape[1]) < mask.shape[1] // 2
    return np.stack([mask & (left | (np.arange(mask.shape[1]) % 4 == flip)) for flip in range(4)])


# ---- the parts of the reliability


def test_agreement_is_the_dice_over_pairs(retina):
    _, vessels, inside = retina
    masks = halves(vessels)
    both = sum(2 * (masks[i] & masks[j] & inside).sum() for i in range(4) for j in range(i))
    alone = sum((masks[i] & inside).sum() + (masks[j] & inside).sum() for i in range(4) for j in range(i))
    votes = torch.from_numpy(masks.sum(axis=0)).float()
    assert agreement_of_views(Votes(votes, 4), inside) == pytest.approx(both / alone)
    assert 0.5 < both / alone < 0.95
    assert agreement_of_views(Votes(4 * torch.from_numpy(vessels).float(), 4), inside) == pytest.approx(1)
    one_vote = torch.from_numpy(vessels).float()  # each pixel in one of the flips
    assert agreement_of_views(Votes(one_vote, 4), inside) == 0
    assert agreement_of_views(Votes(torch.zeros(vessels.shape), 4), inside) == 0


def test_agreement_is_taken_inside_the_field_of_view(retina):
    _, vessels, inside = retina
    votes = torch.from_numpy(np.where(inside, 4 * vessels, 1)).float()
    assert agreement_of_views(Votes(votes, 4), inside) == pytest.approx(1)
    assert agreement_of_views(Votes(votes, 4), np.ones_like(inside)) < 0.8
    # The votes are those of the resized photograph.
    assert agreement_of_views(Votes(votes[::2, ::2], 4), inside) == pytest.approx(1, abs=0.02)


def test_the_density_of_edges_is_free_of_the_resolution(retina):
    _, vessels, inside = retina
    density = edge_density(vessels, inside)
    twice = [mask.repeat(2, axis=0).repeat(2, axis=1) for mask in (vessels, inside)]
    assert edge_density(*twice) == pytest.approx(density, rel=0.01)
    # A single square: four sides.
    square = np.zeros((100, 100), bool)
    square[40:60, 40:60] = True
    assert edge_density(square, np.ones_like(square)) == pytest.approx(80 * 100 / 100**2)
    assert 1 < edge_density(square, np.ones_like(square)) * 2 < density


def test_reliability_falls_with_agreement_and_vessels(retina):
    _, vessels, inside = retina
    doubtful = torch.from_numpy(halves(vessels).sum(axis=0)).float()
    values = [
        expected_dice(vessels, inside, Votes(torch.from_numpy(4.0 * vessels), 4)),
        expected_dice(vessels, inside, Votes(doubtful, 4)),
        expected_dice(np.zeros_like(vessels), inside, Votes(doubtful, 4)),
        expected_dice(np.zeros_like(vessels), inside, Votes(torch.zeros(vessels.shape), 4)),
    ]
    assert values == sorted(values, reverse=True)
    assert 0.7 < values[0] <= 1 and values[0] - values[1] > 0.1 and values[1] > values[2] and values[3] == 0


# ---- the votes of the flips


@pytest.mark.parametrize("options", [{}, {"tile": 96, "batch_size": 3}])
def test_segment_counts_the_votes(options):
    model = make_model()
    photograph, _, _ = synthetic_photograph(200, 180, np.random.default_rng(0))
    votes = Votes()
    mean = segment(model, photograph, MEAN, STD, flips=True, votes=votes, **options)
    assert torch.equal(mean, segment(model, photograph, MEAN, STD, flips=True, **options))
    expected = torch.zeros(180, 200)
    for flip in FLIPS:
        axes = [axis + 2 for axis in flip]  # of [H, W] in place of the last two of [C, H, W]
        turned = np.ascontiguousarray(np.flip(photograph, axes))
        tile = {"tile": 96} if options else {}
        expected += (segment(model, turned, MEAN, STD, **tile)[0].flip(flip) > 0.5).float()
    # Where tiles overlap, their votes are blended, not their probabilities.
    assert ((votes.count - expected).abs() < 0.01).float().mean() > (0.8 if options else 0.9999)
    assert 0.5 < votes.count.mean() < 3.5 and votes.count.max() <= 4 + 1e-4


# ---- the warnings


def doubts(photograph, share=0.1, reliability=0.8):
    return reasons_for_doubt(photograph, find_field_of_view(photograph), share, reliability)


def test_a_good_photograph_gets_no_warning(retina):
    assert doubts(retina[0]) == []
    assert doubts(retina[0], reliability=None) == []


def test_reasons(retina):
    photograph, _, inside = retina
    assert doubts((photograph * 0.2).astype(np.uint8)) == ["too dark"]
    blurred = np.array(Image.fromarray(photograph).filter(ImageFilter.GaussianBlur(4)))
    assert doubts(blurred) == ["blurred"]
    assert doubts(photograph[120:300, 110:290]) == ["no border found"]
    assert doubts(photograph, share=0.01) == ["few vessels"]
    assert doubts(photograph, share=0.3) == ["unusual vessel share"]
    assert doubts(photograph, reliability=0.3) == ["low reliability"]


@pytest.mark.parametrize("quality", [None, 75])
def test_a_label_among_the_photographs(retina, tmp_path, quality):
    """By a name such as 01_1stHO.png it is one of the files of a folder."""
    photograph, vessels, field_of_view = retina
    for number, levels in enumerate((vessels, field_of_view)):
        label = tmp_path / (f"{number}.png" if quality is None else f"{number}.jpg")
        Image.fromarray(levels).save(label, **({} if quality is None else {"quality": quality}))
        assert "black and white like a label" in doubts(read_photograph(label))
    for share in (1, 0.5, 0.25):
        dark = (photograph * share).astype(np.uint8)
        dark[..., 1:] //= 3  # a red one
        dark[:30] = 255  # text, or a border
        assert "black and white like a label" not in doubts(dark)


@pytest.mark.parametrize("fault", [None, "blurred", "too dark", "of one colour"])
def test_a_large_photograph_has_the_reasons_of_a_small_one(retina, fault):
    """It is looked at in a smaller size."""
    photograph, _, inside = retina
    if fault == "blurred":
        photograph = np.array(Image.fromarray(photograph).filter(ImageFilter.GaussianBlur(4)))
    elif fault:
        photograph = photograph // 8 if fault == "too dark" else np.full_like(photograph, 120)
    large = np.array(Image.fromarray(photograph).resize((3600, 3400), Image.Resampling.BICUBIC))
    mask = np.array(Image.fromarray(inside).resize((3600, 3400)))
    small, large = (reasons_for_doubt(*seen, 0.1, 0.9) for seen in ((photograph, inside), (large, mask)))
    assert (fault is None or fault in small) and large == small


def test_two_discs_in_one_picture(synthetic):
    (first, _, inside), (second, _, _) = synthetic[:2]
    both = np.concatenate([first, second], axis=1)
    assert "two discs in one picture" in reasons_for_doubt(both, np.tile(inside, 2), 0.1, None)
    assert shows_two_discs(both, np.pad(inside, [(0, 0), (0, 360)]))  # one of them was found
    stacked = np.concatenate([first[50:-50], second[50:-50]])  # cut off where they meet, as many photographs are
    assert "two discs in one picture" in doubts(stacked)
    assert not shows_two_discs(first, inside)
    assert not shows_two_discs(first[60:-60], inside[60:-60])


@pytest.mark.slow
@pytest.mark.parametrize("around", [0, 255])
def test_two_discs_however_they_lie(synthetic, around):
    first, second = (np.where(inside[..., None], picture, np.uint8(around)) for picture, _, inside in synthetic[:2])
    small = np.array(Image.fromarray(second).resize((220, 208)))
    small = np.pad(small, [(66, 66), (0, 0), (0, 0)], constant_values=around)
    gap = np.full((340, 500, 3), around, np.uint8)
    pictures = {
        "side by side": np.concatenate([first, second], axis=1),
        "one above the other": np.concatenate([first, second]),
        "of two sizes": np.concatenate([first, small], axis=1),
        "apart": np.concatenate([first, gap, second], axis=1),
        "cut off": np.concatenate([first, second], axis=1)[:, 60:-60],
        "with a margin": np.pad(
            np.concatenate([first, second], axis=1), [(90, 90), (30, 30), (0, 0)], constant_values=around
        ),
    }
    for name, picture in pictures.items():
        assert "two discs in one picture" in doubts(picture), name
    alone = {
        "one": first,
        "cut off": first[60:-60],
        "at the side": np.concatenate([first, gap], axis=1),
        "in the middle": np.concatenate([gap, first, gap], axis=1),
        "without a rim": first[100:240, 60:300],
        "black": np.zeros((300, 700, 3), np.uint8),
    }
    for name, picture in alone.items():
        assert "two discs in one picture" not in doubts(picture), name


@pytest.mark.parametrize("colour", [(0, 0, 0), (255, 255, 255), (120, 120, 120), (200, 90, 40)])
def test_a_photograph_of_one_colour(retina, colour):
    _, _, inside = retina
    whole = np.broadcast_to(np.uint8(colour), (*inside.shape, 3))
    assert {"of one colour", "no border found"} <= set(doubts(whole, share=0))
    in_black = np.where(inside[..., None], whole, 0).astype(np.uint8)
    noise = np.random.default_rng(0).integers(-1, 2, in_black.shape)
    for photograph in (in_black, (in_black + noise).clip(0, 255).astype(np.uint8)):
        assert "of one colour" in reasons_for_doubt(photograph, inside, 0.1, None)


def test_a_dark_photograph_is_not_of_one_colour(retina):
    photograph, _, inside = retina
    for share in (1, 0.2, 0.05):
        assert "of one colour" not in reasons_for_doubt((photograph * share).astype(np.uint8), inside, 0.1, None)


def test_brightness_and_sharpness_are_those_of_the_retina(retina):
    photograph, _, inside = retina
    white = np.where(inside[..., None], photograph, 255).astype(np.uint8)
    assert brightness(white, inside) == brightness(photograph, inside) == photograph[inside][:, 0].mean()
    inner = disc(*inside.shape, 300)
    noisy = np.where(inside[..., None], photograph, np.random.default_rng(0).integers(0, 255, photograph.shape))
    assert sharpness(noisy.astype(np.uint8), inner) == pytest.approx(sharpness(photograph, inner))
    for nothing in (np.zeros_like(inside), disc(*inside.shape, 5)):
        assert np.isfinite(sharpness(photograph, nothing)) and np.isfinite(brightness(photograph, nothing))


# ---- predict.py


@pytest.mark.parametrize("flags", [[], ["--tta"]])
def test_the_table_and_the_printed_line(tmp_path, capsys, flags):
    weights = save(tmp_path / "model.pth", make_model())
    folder = tmp_path / "photographs"
    folder.mkdir()
    photograph, _, _ = synthetic_photograph(400, 420, np.random.default_rng(3))
    Image.fromarray(photograph).save(folder / "1.png")
    Image.fromarray((photograph * 0.2).astype(np.uint8)).save(folder / "2.png")
    Image.fromarray(np.concatenate([photograph, photograph[:, ::-1]], axis=1)).save(folder / "3.png")
    run("--weights", weights, "--image", folder, "--output", tmp_path / "out", *flags)
    with open(tmp_path / "out" / "predictions.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    output = capsys.readouterr().out
    warned = sum(row["warning"] != "" for row in rows)
    last = f"3 of 3 photographs segmented, {warned} with a warning, 0 failed; the files are in {tmp_path / 'out'}\n"
    assert output.endswith(last)
    lines = [line for line in output.splitlines() if line.startswith("[")]
    for row, line in zip(rows, lines, strict=True):
        assert len(line.split(", WARNING")[0]) < 60
        assert (row["reliability"] != "") == (": reliability " in line or ", reliability " in line) == bool(flags)
        assert not flags or 0 <= float(row["reliability"]) <= 1
        assert (row["warning"] != "") == ("WARNING: " in line)
        assert all(reason in line for reason in row["warning"].split("; "))
    assert "too dark" in rows[1]["warning"] and "too dark" not in rows[0]["warning"]
    assert ["two discs in one picture" in row["warning"] for row in rows] == [False, False, True]


def test_more_than_two_classes_have_warnings_alone(tmp_path):
    weights = save(tmp_path / "model.pth", make_model(num_classes=4))
    dark = synthetic_photograph(80, 72, np.random.default_rng(3))[0] * 0.2
    Image.fromarray(dark.astype(np.uint8)).save(tmp_path / "1.png")
    run("--weights", weights, "--image", tmp_path / "1.png", "--output", tmp_path / "out", "--tta")
    with open(tmp_path / "out" / "predictions.csv", newline="") as file:
        (row,) = csv.DictReader(file)
    assert row["reliability"] == "" and "too dark" in row["warning"] and "low reliability" not in row["warning"]
