import re

import numpy as np
import pytest
from PIL import Image

from train_utils import synthetic_drive
from train_utils.synthetic_drive import second_observer, synthetic_photograph, write_synthetic_drive


def dice(first, second):
    return 2 * (first & second).sum() / (first.sum() + second.sum())


def contents(root):
    return {path.relative_to(root).as_posix(): path.read_bytes() for path in root.rglob("*") if path.is_file()}


def marked(path):
    with Image.open(path) as picture:
        return np.array(picture) > 0


def grown(mask, times):
    """The mask with `times` more pixels on every side (4 neighbours)."""
    for _ in range(times):
        padded = np.pad(mask, 1)
        mask = mask | padded[2:, 1:-1] | padded[:-2, 1:-1] | padded[1:-1, 2:] | padded[1:-1, :-2]
    return mask


@pytest.fixture(scope="module")
def full_size():
    return [synthetic_photograph(565, 584, np.random.default_rng([7, number])) for number in range(4)]


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    return write_synthetic_drive(tmp_path_factory.mktemp("tree"), training=3, test=2, width=96, height=80, seed=5)


# ---- on disk


def test_layout_and_names_are_the_official_ones(tree):
    assert sorted(contents(tree)) == [
        "DRIVE/test/1st_manual/01_manual1.gif",
        "DRIVE/test/1st_manual/02_manual1.gif",
        "DRIVE/test/2nd_manual/01_manual2.gif",
        "DRIVE/test/2nd_manual/02_manual2.gif",
        "DRIVE/test/images/01_test.tif",
        "DRIVE/test/images/02_test.tif",
        "DRIVE/test/mask/01_test_mask.gif",
        "DRIVE/test/mask/02_test_mask.gif",
        "DRIVE/training/1st_manual/21_manual1.gif",
        "DRIVE/training/1st_manual/22_manual1.gif",
        "DRIVE/training/1st_manual/23_manual1.gif",
        "DRIVE/training/images/21_training.tif",
        "DRIVE/training/images/22_training.tif",
        "DRIVE/training/images/23_training.tif",
        "DRIVE/training/mask/21_training_mask.gif",
        "DRIVE/training/mask/22_training_mask.gif",
        "DRIVE/training/mask/23_training_mask.gif",
    ]
    assert [path.name for path in tree.iterdir()] == ["DRIVE"]  # nothing temporary is left


def test_files_hold_rgb_and_masks_of_0_and_255_without_conversion(tree):
    for path in tree.rglob("*.*"):
        with Image.open(path) as picture:
            assert picture.size == (96, 80), path
            if path.suffix == ".tif":
                assert (picture.format, picture.mode) == ("TIFF", "RGB"), path
            else:
                assert (picture.format, picture.mode) == ("GIF", "L"), path
                assert np.unique(np.array(picture)).tolist() == [0, 255], path


def test_files_of_one_number_belong_together(tree):
    """Labels lie inside their own mask, the second observer marks the same vessels, and the parts differ."""
    test = tree / "DRIVE" / "test"
    first, second, mask = (
        marked(test / name)
        for name in ("1st_manual/01_manual1.gif", "2nd_manual/01_manual2.gif", "mask/01_test_mask.gif")
    )
    other = marked(test / "1st_manual/02_manual1.gif")
    assert not (first & ~mask).any() and not (second & ~mask).any()
    assert dice(first, second) > dice(first, other) + 0.2


def test_the_default_is_twenty_photographs_of_each_part(tmp_path):
    drive = write_synthetic_drive(str(tmp_path / "new" / "folder"), width=32, height=32) / "DRIVE"
    for part, first in (("training", 21), ("test", 1)):
        names = sorted(path.name for path in (drive / part / "images").iterdir())
        assert names == [f"{number:02d}_{part}.tif" for number in range(first, first + 20)]


# ---- seeds


def test_same_seed_gives_the_same_bytes_and_more_photographs_keep_the_first_ones(tree, tmp_path):
    more = contents(write_synthetic_drive(tmp_path, training=4, test=5, width=96, height=80, seed=5))
    few = contents(tree)
    assert len(more) > len(few)
    assert {name: more[name] for name in few} == few


def test_another_seed_number_or_part_gives_another_photograph(tree, tmp_path):
    few, other = contents(tree), contents(write_synthetic_drive(tmp_path, 3, 2, 96, 80, seed=6))
    assert few.keys() == other.keys()
    assert all(few[name] != other[name] for name in few if "manual" in name or name.endswith(".tif"))
    photographs = [content for name, content in few.items() if name.endswith(".tif")]
    assert len(set(photographs)) == 5


# ---- what cannot be done


def test_refuses_an_existing_drive_folder_and_leaves_it_alone(tmp_path):
    (tmp_path / "DRIVE").mkdir()
    with pytest.raises(FileExistsError, match=re.escape(str(tmp_path / "DRIVE"))) as error:
        write_synthetic_drive(tmp_path, 1, 1, 32, 32)
    assert "\n" not in str(error.value)
    assert [path.name for path in tmp_path.rglob("*")] == ["DRIVE"]


@pytest.mark.parametrize("interruption", [KeyboardInterrupt, OSError])
def test_an_interrupted_call_leaves_no_drive_folder_and_can_be_repeated(tmp_path, monkeypatch, interruption):
    observers = []

    def interrupted(*arguments):
        observers.append(arguments)
        if len(observers) == 2:
            raise interruption
        return second_observer(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(synthetic_drive, "second_observer", interrupted)
        with pytest.raises(interruption):
            write_synthetic_drive(tmp_path, 1, 3, 32, 32)
    assert not (tmp_path / "DRIVE").exists()
    write_synthetic_drive(tmp_path, 1, 3, 32, 32)
    assert len(list((tmp_path / "DRIVE/test/images").iterdir())) == 3


@pytest.mark.parametrize(("width", "height"), [(31, 64), (64, 31)])
def test_too_small_a_picture_is_refused_before_anything_is_written(tmp_path, width, height):
    with pytest.raises(ValueError, match=f"{width} x {height}"):
        write_synthetic_drive(tmp_path / "new", 1, 1, width, height)
    assert not (tmp_path / "new").exists()


# ---- the photographs


@pytest.mark.parametrize(("width", "height"), [(32, 32), (33, 47), (64, 64), (96, 80), (51, 150), (161, 75)])
def test_any_size_from_32_on(width, height):
    for number in range(3):
        rng = np.random.default_rng(number)
        image, vessels, field_of_view = synthetic_photograph(width, height, rng)
        assert (image.shape, image.dtype) == ((height, width, 3), np.uint8)
        assert vessels.shape == field_of_view.shape == (height, width)
        assert vessels.dtype == field_of_view.dtype == bool
        assert not (vessels & ~field_of_view).any()
        assert 0.08 < vessels[field_of_view].mean() < 0.18
        seen = second_observer(vessels, field_of_view, rng)
        assert (seen.shape, seen.dtype) == ((height, width), bool)
        assert not (seen & ~field_of_view).any()
        assert 0.55 < dice(seen, vessels) < 0.95


def test_field_of_view_is_a_whole_disc_on_black(full_size):
    centres = []
    for image, _, field_of_view in full_size:
        rows, columns = np.nonzero(field_of_view)
        extent = [rows.max() - rows.min() + 1, columns.max() - columns.min() + 1]
        assert all(538 <= side <= 541 for side in extent)  # not cut off at a border of the picture
        assert field_of_view.sum() == pytest.approx(np.pi * 270**2, rel=0.002)
        centres.append((rows.mean(), columns.mean()))
        assert image[~grown(field_of_view, 3)].max() == 0
        assert image[field_of_view].mean(axis=1).min() > 10
    assert len(set(centres)) == 4


def test_colours_are_those_of_drive(full_size):
    """Means and standard deviations over the field of view, near the constants of the real DRIVE (spec A3)."""
    pixels = [image[field_of_view] / 255 for image, _, field_of_view in full_size]
    means = np.array([photograph.mean(axis=0) for photograph in pixels])
    deviations = np.array([photograph.std(axis=0) for photograph in pixels])
    np.testing.assert_allclose(means.mean(axis=0), (0.709, 0.381, 0.224), atol=0.1)
    np.testing.assert_allclose(deviations.mean(axis=0), (0.127, 0.079, 0.043), rtol=0.35)
    assert means.std(axis=0).min() > 0.005  # photographs differ


def test_vessel_share_and_widths(full_size):
    for _, vessels, field_of_view in full_size:
        assert 0.09 < vessels[field_of_view].mean() < 0.15
        # A pixel outlives n erosions only where the vessel is wider than 2 n: some are 5 px and more, none is 11 px,
        # but where several vessels lie side by side; and much of the tree is thinner than 3 px.
        inner = [vessels & ~grown(~vessels, times) for times in (1, 2, 5)]
        assert inner[0].sum() < 0.6 * vessels.sum()
        assert inner[1].sum() > 100
        assert inner[2].sum() < 0.005 * vessels.sum()


def test_vessels_are_darker_than_their_surroundings_most_in_green(full_size):
    for image, vessels, field_of_view in full_size:
        inside = ~grown(~field_of_view, 4)
        around = grown(vessels, 4) & ~grown(vessels, 1) & inside
        contrast = 1 - image[vessels & inside].mean(axis=0) / image[around].mean(axis=0)
        assert contrast.min() > 0.04
        assert contrast[1] > 0.12
        assert contrast.argmax() == 1


def test_labels_lie_exactly_on_the_vessels(full_size):
    """No displacement of the label by a pixel makes it fit the dark lines as well, and its border is dark."""
    for image, vessels, field_of_view in full_size:
        green = image[..., 1].astype(float)
        inside = ~grown(~field_of_view, 4)
        darkness = {
            (down, right): -green[np.roll(vessels, (down, right), (0, 1)) & inside].mean()
            for down in (-1, 0, 1)
            for right in (-1, 0, 1)
        }
        assert max(darkness, key=darkness.get) == (0, 0)
        border = vessels & grown(~vessels, 1) & inside
        beyond = grown(vessels, 2) & ~grown(vessels, 1) & inside
        assert green[border].mean() < 0.92 * green[beyond].mean()


def test_no_threshold_of_the_green_channel_reaches_dice_06(full_size):
    curves = []
    for image, vessels, field_of_view in full_size:
        green, truth = image[..., 1][field_of_view], vessels[field_of_view]
        curves.append([dice(green < threshold, truth) for threshold in range(257)])
    curves = np.array(curves)  # [photographs, thresholds]
    assert curves.max(axis=1).max() < 0.6  # the best threshold of every single photograph
    assert curves.mean(axis=0).max() < 0.6  # one threshold for all
    assert curves.max() > 0.25  # it is the light that spoils it, not a lack of contrast


def test_the_light_taken_out_thresholding_works_far_better(full_size):
    """The difficulty is uneven light, not noise: against the mean of the surroundings vessels do stand out."""
    for image, vessels, field_of_view in full_size:
        green, weight = (image[..., 1] * field_of_view).astype(float), field_of_view.astype(float)
        around = box_mean(green, 12) / np.maximum(box_mean(weight, 12), 1e-9)
        ratio = (green / np.maximum(around, 1e-9))[field_of_view]
        truth = vessels[field_of_view]
        assert max(dice(ratio < threshold, truth) for threshold in np.arange(0.7, 1.0, 0.01)) > 0.6


def box_mean(values, reach):
    size = 2 * reach + 1
    sums = np.pad(np.pad(values, reach).cumsum(0).cumsum(1), ((1, 0), (1, 0)))
    return (sums[size:, size:] - sums[:-size, size:] - sums[size:, :-size] + sums[:-size, :-size]) / size**2


# ---- the second observer


def test_second_observer_agrees_as_people_do_and_misses_thin_vessels(full_size):
    for number, (_, vessels, field_of_view) in enumerate(full_size):
        seen = second_observer(vessels, field_of_view, np.random.default_rng(number))
        assert 0.75 < dice(seen, vessels) < 0.9
        assert not (seen & ~field_of_view).any()
        assert (seen & ~vessels).any()
        thick = vessels & ~grown(~vessels, 2)
        found_thick, found_all = seen[thick].mean(), seen[vessels].mean()
        assert found_thick > 0.98 > 0.95 > found_all


def test_second_observer_is_a_function_of_the_generator(full_size):
    _, vessels, field_of_view = full_size[0]
    first, again, other = (second_observer(vessels, field_of_view, np.random.default_rng(seed)) for seed in (1, 1, 2))
    assert (first == again).all()
    assert (first != other).any()
