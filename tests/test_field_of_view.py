"""The field of view of photographs: what surrounds it, what cuts it off, and pictures without any."""

import time
import warnings

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageFont, ImageOps

from my_dataset import read_binary_mask
from src.field_of_view import (
    _edges_outside,
    _find_edges,
    _log,
    field_of_view_diameter,
    find_field_of_view,
    shows_two_discs,
)
from src.photograph import read_photograph
from tests.pictures import disc, framed, overlap
from train_utils.synthetic_drive import synthetic_photograph


def test_diameter():
    assert field_of_view_diameter(disc(120, 130, 100)) == 100
    assert field_of_view_diameter(disc(60, 130, 100)) == 100  # cut off at the top and bottom
    assert field_of_view_diameter(disc(130, 60, 100)) == 100
    specks = disc(400, 400, 300)
    specks[2, 3] = specks[390:392, 390] = True
    assert abs(field_of_view_diameter(specks) - 300) <= 2
    assert field_of_view_diameter(np.zeros((20, 20), bool)) == 0
    for height in (255, 256, 510, 600):  # counts of more than 255
        assert field_of_view_diameter(np.ones((height, 700), bool)) == 700


def test_the_edges_outside_an_ellipse(synthetic):
    """By looking at every cell of four pixels; the search itself works with the ends of its rows."""
    edges = _find_edges(_log(Image.fromarray(synthetic[0][0])))
    rng = np.random.default_rng(0)
    ellipses = np.stack([rng.uniform(-50, 400, 50), rng.uniform(-50, 400, 50), *rng.uniform(20, 300, (2, 50))], axis=1)
    height, width = (side // 4 for side in edges.size.shape)
    strength = np.clip(edges.size / edges.threshold - 1, 0, 1)[: 4 * height, : 4 * width]
    rows, columns = np.mgrid[:height, :width] * 4 + 2
    expected = []
    for x, y, a, b in ellipses:
        outside = ((columns - x) / (a + 5)) ** 2 + ((rows - y) / (b + 5)) ** 2 > 1
        expected.append((strength * outside.repeat(4, axis=0).repeat(4, axis=1)).sum() / b)
    assert np.ptp(expected) > 10
    assert _edges_outside(ellipses, edges) == pytest.approx(expected, rel=1e-4)


def test_the_search_keeps_to_its_thread(synthetic):
    """A second thread of numpy's, spinning all the while, would take a core from the networks beside it."""

    def of_others():
        return time.process_time() - time.thread_time()

    before, own = of_others(), time.thread_time()
    for photograph, _, _ in synthetic:
        find_field_of_view(photograph)
    assert of_others() - before < 0.3 * (time.thread_time() - own)


@pytest.mark.parametrize("size", [(565, 584), (200, 180), (64, 64), (1600, 1200)])
def test_synthetic_photographs(size):
    photograph, _, truth = synthetic_photograph(*size, np.random.default_rng(3))
    found = find_field_of_view(photograph)
    assert found.dtype == bool and found.shape == truth.shape
    assert overlap(found, truth) > (0.985 if min(size) > 100 else 0.96)
    assert field_of_view_diameter(found) == pytest.approx(field_of_view_diameter(truth), rel=0.02, abs=2)


@pytest.mark.parametrize(
    "colour", [(0, 0, 0), (12, 10, 8), (255, 255, 255), (128, 128, 128), (0, 0, 160), (30, 90, 40), (250, 240, 225)]
)
def test_borders_of_any_colour(synthetic, colour):
    for photograph, _, truth in synthetic:
        assert overlap(find_field_of_view(framed(photograph, truth, colour)), truth) > 0.985


@pytest.mark.parametrize("background", [0, 255])
def test_text_in_the_corners(synthetic, background):
    for photograph, _, truth in synthetic:
        image = Image.fromarray(framed(photograph, truth, (background,) * 3))
        draw = ImageDraw.Draw(image)
        font = ImageFont.load_default(size=14)
        draw.text((2, 1), "OD 2019-03", fill=255 - background, font=font)
        draw.text((285, 322), "No. 4711", fill=(255, 255, 0) if background == 0 else (90, 0, 0), font=font)
        draw.rectangle([0, 318, 40, 339], fill=(0, 120, 255))
        found = find_field_of_view(np.array(image))
        assert overlap(found, truth) > 0.98
        assert not found[:16, :40].any()


@pytest.mark.parametrize("cut", [30, 70, 110])
def test_discs_that_the_frame_cuts_off(synthetic, cut):
    for photograph, _, truth in synthetic:
        for rows, columns in (
            (slice(cut, -cut), slice(None)),
            (slice(cut, None), slice(None)),
            (slice(None), slice(cut, -cut)),
        ):
            found = find_field_of_view(photograph[rows, columns])
            assert overlap(found, truth[rows, columns]) > 0.98
        found = find_field_of_view(photograph[cut:-cut])
        assert field_of_view_diameter(found) == pytest.approx(field_of_view_diameter(truth), rel=0.02)


def test_discs_that_bars_cut_off(synthetic):
    for photograph, _, truth in synthetic:
        barred, wanted = photograph.copy(), truth.copy()
        barred[:60], barred[-40:], wanted[:60], wanted[-40:] = 0, 0, False, False
        assert overlap(find_field_of_view(barred), wanted) > 0.98


def test_small_disc_in_a_wide_frame(synthetic):
    for photograph, _, truth in synthetic:
        wide, wanted = (
            np.pad(array, [(40, 80), (400, 90)] + [(0, 0)] * (array.ndim - 2)) for array in (photograph, truth)
        )
        assert overlap(find_field_of_view(wide), wanted) > 0.98


def test_dim_blurred_and_compressed_photographs(synthetic, tmp_path):
    for photograph, _, truth in synthetic:
        assert overlap(find_field_of_view((photograph * 0.25).astype(np.uint8)), truth) > 0.98
        small = Image.fromarray(photograph).resize((120, 113), Image.Resampling.BILINEAR)
        assert overlap(find_field_of_view(np.array(small.resize((360, 340)))), truth) > 0.97
        Image.fromarray(photograph).save(tmp_path / "compressed.jpg", quality=40)
        assert overlap(find_field_of_view(read_photograph(tmp_path / "compressed.jpg")), truth) > 0.98


def test_photographs_that_fill_the_frame(synthetic):
    rng = np.random.default_rng(0)
    for photograph, _, _ in synthetic:
        for _ in range(20):
            side = int(rng.integers(40, 220))
            top, left = 170 - side // 2 + rng.integers(-8, 9), 180 - side // 2 + rng.integers(-8, 9)
            assert find_field_of_view(photograph[top : top + side, left : left + side]).all()


@pytest.mark.parametrize("value", [0, 77, 255])
def test_a_picture_of_one_colour_is_taken_whole(value):
    assert find_field_of_view(np.full((80, 90, 3), value, np.uint8)).all()


def test_noise_is_taken_whole():
    noise = np.random.default_rng(0).integers(0, 256, (80, 90, 3), dtype=np.uint8)
    assert find_field_of_view(noise).all()


def test_real_photographs(real_drive):
    paths = sorted((real_drive / "DRIVE").glob("*/images/*.tif"))
    assert paths
    for path in paths:
        official = read_binary_mask(path.parents[1] / "mask" / f"{path.stem}_mask.gif")
        photograph = read_photograph(path)
        found = find_field_of_view(photograph)
        assert overlap(found, official) >= 0.985, path
        assert field_of_view_diameter(official) == pytest.approx(540, abs=5)
        assert field_of_view_diameter(found) == pytest.approx(field_of_view_diameter(official), abs=10), path
        assert find_field_of_view(photograph[180:400, 180:400]).all(), path
        mirrored = np.array(ImageOps.mirror(Image.fromarray(photograph)))
        assert overlap(find_field_of_view(mirrored), official[:, ::-1]) >= 0.985, path


@pytest.mark.parametrize("size", [*((side, side) for side in range(1, 17)), (1, 50), (33, 4000), (3000, 40), (31, 500)])
def test_small_and_narrow_pictures_of_anything(size):
    rng = np.random.default_rng(0)
    pictures = [rng.integers(0, 256, (*size, 3), dtype=np.uint8), np.full((*size, 3), 90, np.uint8)]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for picture in pictures:
            found = find_field_of_view(picture)
            assert found.dtype == bool and found.shape == size and found.any()
            assert found.all() or min(size) > 16
            assert 1 <= field_of_view_diameter(found) <= max(size)


def test_the_same_photograph_has_the_same_field_of_view(synthetic):
    state = np.random.get_state()[1].copy()
    first, second = (find_field_of_view(synthetic[0][0].copy()) for _ in range(2))
    np.testing.assert_array_equal(first, second)
    np.testing.assert_array_equal(np.random.get_state()[1], state)


def test_green_surroundings_between_black_bars(synthetic):
    for photograph, _, truth in synthetic:
        barred, wanted = framed(photograph, truth, (6, 38, 10)), truth.copy()
        for rows in (slice(0, 14), slice(-9, None)):
            barred[rows], wanted[rows] = 2, False
        assert overlap(find_field_of_view(barred), wanted) > 0.98


def test_light_scattered_into_the_surroundings(synthetic):
    y, x = np.indices((340, 360))
    for photograph, _, truth in synthetic:
        glow = 70 * np.exp(-np.maximum(np.hypot(y - 170, x - 180) - 150, 0) / 25) * (x / 360)
        glowing = np.where(truth[..., None], photograph, (glow[..., None] * (0.4, 1, 0.6)).astype(np.uint8))
        assert overlap(find_field_of_view(glowing), truth) > 0.98


def test_surroundings_brighter_than_a_dark_side_of_the_retina(synthetic):
    for photograph, _, truth in synthetic:
        dim = photograph * np.linspace(0.15, 1, 360)[None, :, None]
        assert overlap(find_field_of_view(framed(dim, truth, (95, 95, 95)).astype(np.uint8)), truth) > 0.98


def test_noisy_photographs(synthetic):
    for photograph, _, truth in synthetic:
        noise = np.random.default_rng(1).normal(0, 10, photograph.shape)
        assert overlap(find_field_of_view((photograph + noise).clip(0, 255).astype(np.uint8)), truth) > 0.98


@pytest.mark.parametrize("width", [300, 335, 390, 450])
def test_pixels_that_are_not_square(synthetic, width):
    for photograph, _, truth in synthetic:
        squeezed = np.array(Image.fromarray(photograph).resize((width, 340)))
        wanted = np.array(Image.fromarray(truth).resize((width, 340)))
        assert overlap(find_field_of_view(squeezed), wanted) > 0.975


def test_sizes_agree(synthetic):
    """A photograph ten times as large is searched on a smaller picture."""
    photograph, _, truth = synthetic[0]
    large = np.array(Image.fromarray(photograph).resize((3600, 3400), Image.Resampling.BICUBIC))
    assert overlap(find_field_of_view(large), truth.repeat(10, 0).repeat(10, 1)) > 0.98


@pytest.mark.parametrize("gap", [0, 4, 10, 30, 60])
@pytest.mark.parametrize("cropped", [False, True])
def test_two_photographs_in_one_picture(synthetic, gap, cropped):
    """The line between them is neither a bar nor the field of view."""
    parts = [photograph[90:260, 90:260] if cropped else photograph for photograph, _, _ in synthetic]
    for first, second in zip(parts, parts[1:], strict=False):
        for axis, size in ((1, (len(first), gap, 3)), (0, (gap, first.shape[1], 3))):
            for level in (0, 255):
                picture = np.concatenate([first, np.full(size, level, np.uint8), second], axis=axis)
                assert np.mean(find_field_of_view(picture)) > 0.2


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("size", [(1, 1), (1, 2), (2, 1), (1, 2000), (2000, 1), (2, 3)])
def test_pictures_too_small_for_two_discs(size):
    picture = np.full((*size, 3), 90, np.uint8)
    assert not shows_two_discs(picture, find_field_of_view(picture))


def test_a_step_in_the_middle():
    noise = np.random.default_rng(0).integers(0, 8, (600, 800, 3), dtype=np.uint8)
    for picture in (noise + np.uint8(60), (noise + np.uint8(60)).transpose(1, 0, 2).copy()):
        for side in (slice(400, None), slice(401, None), slice(399, None)):
            stepped = picture.copy()
            (stepped if len(picture) == 800 else stepped.transpose(1, 0, 2))[side] += 120
            assert find_field_of_view(stepped).mean() > 0.4
