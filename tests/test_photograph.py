import struct
import warnings
import zlib

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageFont, ImageOps

from my_dataset import read_binary_mask
from src.photograph import (
    PhotographError,
    blacken_bright_surroundings,
    channel_statistics,
    field_of_view_diameter,
    find_field_of_view,
    list_photographs,
    match_colours,
    read_photograph,
)
from train_utils.synthetic_drive import synthetic_photograph


def picture(height=24, width=40, seed=0):
    """A smooth colour picture with a bright upper left corner, uint8 [H, W, 3]."""
    coarse = np.random.default_rng(seed).integers(40, 200, (3, 4, 3), dtype=np.uint8)
    coarse[0, 0] = 250
    return np.array(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC))


def disc(height, width, diameter, centre=None):
    y, x = np.indices((height, width)) + 0.5
    centre_y, centre_x = centre or (height / 2, width / 2)
    return (y - centre_y) ** 2 + (x - centre_x) ** 2 <= (diameter / 2) ** 2


def overlap(a, b):
    """Intersection over union."""
    return (a & b).sum() / (a | b).sum()


# ---- reading


@pytest.mark.parametrize("suffix", ["tif", "png", "bmp", "ppm", "TIF", "PNG", "webp"])
def test_lossless_formats_are_read_exactly(tmp_path, suffix):
    path = tmp_path / f"photograph.{suffix}"
    Image.fromarray(picture()).save(path, **({"lossless": True} if suffix == "webp" else {}))
    np.testing.assert_array_equal(read_photograph(path), picture())


@pytest.mark.parametrize(("suffix", "tolerance"), [("jpg", 6), ("JPEG", 6), ("gif", 12)])
def test_lossy_formats_are_read_nearly(tmp_path, suffix, tolerance):
    path = tmp_path / f"photograph.{suffix}"
    Image.fromarray(picture()).save(path, **({} if suffix == "gif" else {"quality": 95, "subsampling": 0}))
    read = read_photograph(path)
    assert read.dtype == np.uint8 and read.shape == (24, 40, 3)
    assert np.abs(read.astype(int) - picture()).mean() < tolerance


def test_modes(tmp_path):
    image = Image.fromarray(picture())
    grey = np.array(image.convert("L"))
    expected = {
        "L": (image.convert("L"), grey[..., None].repeat(3, axis=2), 0),
        "LA": (image.convert("LA"), grey[..., None].repeat(3, axis=2), 0),
        "RGBA": (image.convert("RGBA"), picture(), 0),
        "P": (image.quantize(256), picture(), 12),
        "CMYK": (image.convert("CMYK"), picture(), 2),
        "1": (image.convert("1"), np.array(image.convert("1").convert("RGB")), 0),
    }
    for mode, (saved, wanted, tolerance) in expected.items():
        path = tmp_path / f"{mode}.{'tif' if mode == 'CMYK' else 'png'}"
        saved.save(path)
        with Image.open(path) as image_on_disk:
            assert image_on_disk.mode == mode
        read = read_photograph(path)
        assert read.dtype == np.uint8 and read.shape == (24, 40, 3), mode
        assert np.abs(read.astype(int) - wanted).mean() <= tolerance, mode


@pytest.mark.parametrize("suffix", ["png", "tif"])
@pytest.mark.parametrize("bits", [8, 10, 12, 16])
def test_16_bit_greys_of_any_depth(tmp_path, suffix, bits):
    grey = np.array(Image.fromarray(picture()).convert("L"))
    grey[0, 0] = 255
    stored = np.rint(grey * ((2**bits - 1) / 255)).astype(np.uint16)
    Image.fromarray(stored).save(tmp_path / f"deep.{suffix}")
    read = read_photograph(tmp_path / f"deep.{suffix}")
    np.testing.assert_array_equal(read, grey[..., None].repeat(3, axis=2))


def test_16_bit_colours(tmp_path):
    # Pillow reads such files but does not write them.
    deep = np.random.default_rng(0).integers(0, 65536, (5, 7, 3), dtype=np.uint16)

    def chunk(kind, content):
        checked = kind + content
        return struct.pack(">I", len(content)) + checked + struct.pack(">I", zlib.crc32(checked))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 7, 5, 16, 2, 0, 0, 0))
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in deep)
    content = b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    (tmp_path / "deep.png").write_bytes(content)
    np.testing.assert_allclose(read_photograph(tmp_path / "deep.png"), deep / 257, atol=1)


@pytest.mark.parametrize("white", [1, 255, 65535])
def test_floating_point_greys(tmp_path, white):
    grey = np.array(Image.fromarray(picture()).convert("L"))
    grey[0, 0] = 255
    stored = (grey * (white / 255)).astype(np.float32)
    stored[-1, -1] = np.nan
    Image.fromarray(stored).save(tmp_path / "float.tif")
    read = read_photograph(tmp_path / "float.tif")[..., 1]
    assert read[-1, -1] == 0
    np.testing.assert_array_equal(read.ravel()[:-1], grey.ravel()[:-1])


def test_transparent_parts_become_black(tmp_path):
    rgba = np.dstack([picture(), np.full((24, 40), 255, np.uint8)])
    rgba[:, :10, 3] = 0
    Image.fromarray(rgba).save(tmp_path / "cut_out.png")
    read = read_photograph(tmp_path / "cut_out.png")
    assert (read[:, :10] == 0).all()
    np.testing.assert_array_equal(read[:, 10:], picture()[:, 10:])


@pytest.mark.parametrize("suffix", ["png", "tif", "jpg", "webp"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation(tmp_path, orientation, suffix):
    # How a camera held in that way stores the scene.
    undo = {2: "FLIP_LEFT_RIGHT", 3: "ROTATE_180", 4: "FLIP_TOP_BOTTOM", 5: "TRANSPOSE", 6: "ROTATE_90"}
    undo |= {7: "TRANSVERSE", 8: "ROTATE_270"}
    shown = Image.fromarray(picture())
    stored = shown.transpose(Image.Transpose[undo[orientation]]) if orientation > 1 else shown
    exif = Image.Exif()
    exif[0x0112] = orientation
    lossless = {"jpg": {"quality": 95, "subsampling": 0}, "webp": {"lossless": True}}.get(suffix, {})
    stored.save(tmp_path / f"turned.{suffix}", exif=exif, **lossless)
    read = read_photograph(tmp_path / f"turned.{suffix}")
    assert read.shape == (24, 40, 3)
    assert np.abs(read.astype(int) - picture()).mean() < (6 if suffix == "jpg" else 1e-9)


@pytest.mark.parametrize("size", [(1, 1), (1, 50), (50, 1), (16, 16)])
def test_tiny_pictures(tmp_path, size):
    Image.fromarray(picture(*size)).save(tmp_path / "tiny.png")
    photograph = read_photograph(tmp_path / "tiny.png")
    assert photograph.shape == (*size, 3)
    field_of_view = find_field_of_view(photograph)
    assert field_of_view.all() and field_of_view.shape == size
    assert field_of_view_diameter(field_of_view) == max(size)


def test_huge_pictures(tmp_path, monkeypatch):
    path = tmp_path / "huge.png"
    Image.fromarray(picture(100, 100)).save(path)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 6000)  # Pillow warns from here on, and refuses twice as many
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert read_photograph(path).shape == (100, 100, 3)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 4000)
    with pytest.raises(PhotographError, match=r"huge.png: has more than .* megapixels"):
        read_photograph(path)


def make_broken(folder):
    """One file for each way of being broken, by name."""
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(folder / "whole.tif")
    Image.open(folder / "whole.tif").save(folder / "whole.jpg")
    Image.open(folder / "whole.tif").save(folder / "whole.png")
    broken = {"text.png": b"no picture", "empty.tif": b""}
    for suffix in ("tif", "jpg", "png"):
        content = (folder / f"whole.{suffix}").read_bytes()
        broken |= {f"half.{suffix}": content[: len(content) // 2], f"head.{suffix}": content[:20]}
        (folder / f"whole.{suffix}").unlink()
    for name, content in broken.items():
        (folder / name).write_bytes(content)
    (folder / "folder.png").mkdir()
    return [*broken, "folder.png", "missing.png"]


def test_broken_files_are_named(tmp_path):
    for name in make_broken(tmp_path):
        with pytest.raises(PhotographError) as caught:
            read_photograph(tmp_path / name)
        message = str(caught.value)
        assert message.startswith(f"{tmp_path / name}: ") and "\n" not in message


# ---- finding files


def test_list_photographs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("b.PNG", "a.tif", "._a.tif", "notes.txt", "odd.name", "c[1].jpg", "deep/d.bmp"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "folder.png").mkdir()

    def names(*patterns):
        return [str(path) for path in list_photographs(patterns)]

    assert names(".") == ["a.tif", "b.PNG", "c[1].jpg"]
    assert names("deep", "a.tif") == ["deep/d.bmp", "a.tif"]
    assert names("*.tif") == ["a.tif"]
    assert names("**/*.bmp") == ["deep/d.bmp"]
    assert names("c[1].jpg") == ["c[1].jpg"]  # a name that exists is no pattern
    assert names("odd.name") == ["odd.name"]  # nor does a file that is named need an ending
    assert names("a.tif", tmp_path / "a.tif", "*.tif") == ["a.tif"]
    for wrong, found in (("missing.tif", "no such file"), ("*.gif", "no such file"), ("folder.png", "no photographs")):
        with pytest.raises(PhotographError, match=found) as caught:
            names(wrong)
        assert str(caught.value).startswith(wrong)


# ---- the field of view


def test_diameter():
    assert field_of_view_diameter(disc(120, 130, 100)) == 100
    assert field_of_view_diameter(disc(60, 130, 100)) == 100  # cut off at the top and bottom
    assert field_of_view_diameter(disc(130, 60, 100)) == 100
    specks = disc(400, 400, 300)
    specks[2, 3] = specks[390:392, 390] = True
    assert abs(field_of_view_diameter(specks) - 300) <= 2
    assert field_of_view_diameter(np.zeros((20, 20), bool)) == 0


@pytest.mark.parametrize("size", [(565, 584), (200, 180), (64, 64), (1600, 1200)])
def test_synthetic_photographs(size):
    photograph, _, truth = synthetic_photograph(*size, np.random.default_rng(3))
    found = find_field_of_view(photograph)
    assert found.dtype == bool and found.shape == truth.shape
    assert overlap(found, truth) > (0.985 if min(size) > 100 else 0.96)
    assert field_of_view_diameter(found) == pytest.approx(field_of_view_diameter(truth), rel=0.02, abs=2)


@pytest.fixture(scope="module")
def synthetic():
    return [synthetic_photograph(360, 340, np.random.default_rng(seed)) for seed in range(4)]


def framed(photograph, truth, colour, noise=2):
    """The photograph with another border."""
    around = np.random.default_rng(0).normal(colour, noise, photograph.shape).clip(0, 255).astype(np.uint8)
    return np.where(truth[..., None], photograph, around)


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


def test_bright_surroundings_become_black(synthetic):
    photograph, _, truth = synthetic[0]
    white = blacken_bright_surroundings(framed(photograph, truth, (255, 255, 255)), truth)
    assert (white[~truth] == 0).all()
    inner = disc(340, 360, 300)
    np.testing.assert_array_equal(white[inner], photograph[inner])
    dark = framed(photograph, truth, (8, 7, 7))
    np.testing.assert_array_equal(blacken_bright_surroundings(dark, truth), dark)
    for mask in (np.ones_like(truth), disc(340, 360, 100)):  # the whole frame, a part of the retina
        np.testing.assert_array_equal(blacken_bright_surroundings(photograph, mask), photograph)


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


def test_channel_statistics_against_numpys():
    rng = np.random.default_rng(0)
    photograph, inside = rng.integers(0, 256, (40, 30, 3)).astype(np.uint8), rng.random((40, 30)) < 0.6
    mean, std = channel_statistics(photograph, inside)
    assert np.allclose(mean, (photograph[inside] / 255).mean(axis=0)) and mean.shape == (3,)
    assert np.allclose(std, (photograph[inside] / 255).std(axis=0)) and std.shape == (3,)


def test_matched_colours_have_the_mean_and_deviation():
    rng = np.random.default_rng(0)
    photograph = rng.normal((90, 60, 30), (20, 12, 8), (60, 50, 3)).clip(0, 255).astype(np.uint8)
    inside = np.zeros((60, 50), bool)
    inside[5:50, 5:45] = True
    wanted = (0.6, 0.4, 0.2), (0.08, 0.06, 0.04)
    matched = match_colours(photograph, inside, *wanted)
    assert matched.dtype == np.uint8 and not matched[~inside].any()
    assert np.allclose(channel_statistics(matched, inside), wanted, atol=0.003)


@pytest.mark.parametrize("even_light", [False, True])
@pytest.mark.parametrize("size", [(20, 20), (1, 1), (2, 30)])
@pytest.mark.parametrize("level", [0, 77, 255])
def test_a_photograph_of_one_grey_has_colours_to_match_too(level, size, even_light):
    photograph, inside = np.full((*size, 3), level, np.uint8), np.ones(size, bool)
    matched = match_colours(photograph, inside, (0.6, 0.4, 0.2), (0.1, 0.1, 0.1), even_light=even_light)
    assert (matched == [153, 102, 51]).all()


def test_even_light():
    """A lamp at one side, and another size, change next to nothing; without evening out, the one side stays dark."""
    mean, std = (0.7, 0.4, 0.2), (0.12, 0.08, 0.04)
    photograph, _, inside = synthetic_photograph(320, 288, np.random.default_rng(3))
    lamp = np.linspace(0.4, 1.0, 320)[None, :, None]
    lit = np.rint(photograph * lamp).astype(np.uint8)

    def distance(even_light):
        pictures = [match_colours(p, inside, mean, std, even_light=even_light) for p in (photograph, lit)]
        assert all(np.allclose(channel_statistics(p, inside), (mean, std), atol=0.01) for p in pictures)
        return np.abs(pictures[0] / 255 - pictures[1] / 255)[inside].mean(axis=0) / std

    assert (distance(True) < 0.15).all() and (distance(False) > 0.5).all(), (distance(True), distance(False))
    large = match_colours(
        photograph.repeat(3, 0).repeat(3, 1), inside.repeat(3, 0).repeat(3, 1), mean, std, even_light=True
    )
    difference = large[1::3, 1::3] / 255 - match_colours(photograph, inside, mean, std, even_light=True) / 255
    assert np.abs(difference).max() < 0.02


def test_even_light_divides_by_the_mean_of_the_surroundings():
    """Against the definition, summed pixel by pixel."""
    rng = np.random.default_rng(1)
    photograph, inside = rng.integers(60, 200, (40, 36, 3)).astype(np.uint8), disc(40, 36, 36)
    inside[:, :9] = False
    sigma = field_of_view_diameter(inside) / 18
    y, x = np.nonzero(inside)
    weights = np.exp(-((y[:, None] - y) ** 2 + (x[:, None] - x) ** 2) / (2 * sigma**2))  # [pixels, pixels]
    values = photograph[inside] / (weights @ photograph[inside] / weights.sum(axis=1, keepdims=True))
    expected = 0.5 + 0.1 * (values - values.mean(axis=0)) / values.std(axis=0)
    matched = match_colours(photograph, inside, (0.5,) * 3, (0.1,) * 3, even_light=True)
    np.testing.assert_allclose(matched[inside] / 255, expected, atol=0.01)
