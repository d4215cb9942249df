import numpy as np
import pytest
from PIL import Image

from src.errors import DatasetError
from src.masks import read_binary_mask, read_classes

VESSELS = np.zeros((40, 50), bool)
VESSELS[10:20, 5:45] = True


def save(array, path, mode=None):
    image = Image.fromarray(array)
    (image.convert(mode) if mode else image).save(path)
    return path


def palette(path, dark, light):
    """A GIF with two levels in its palette, as the official second observer's files."""
    image = Image.fromarray(VESSELS.astype(np.uint8), "P")
    image.putpalette([dark] * 3 + [light] * 3)
    image.save(path)
    return path


@pytest.mark.parametrize("dark, light", [(0, 255), (3, 253), (64, 192), (0, 244), (40, 250)])
def test_two_levels(tmp_path, dark, light):
    grey = np.where(VESSELS, light, dark).astype(np.uint8)
    for path in (save(grey, tmp_path / "grey.png"), palette(tmp_path / "palette.gif", dark, light)):
        assert np.array_equal(read_binary_mask(path), VESSELS)


def test_kinds_of_files(tmp_path):
    white = VESSELS * np.uint8(255)
    transparent = np.dstack([np.full((40, 50, 3), 255, np.uint8), white])  # white vessels on nothing
    opaque = np.dstack([white, white, white, np.full((40, 50), 255, np.uint8)])
    for number, path in enumerate(
        (
            save(white, tmp_path / "l.png"),
            save(white, tmp_path / "1.png", "1"),
            save(white, tmp_path / "rgb.bmp", "RGB"),
            save(white, tmp_path / "rgb.ppm", "RGB"),
            save(white, tmp_path / "p.gif", "P"),
            save(opaque, tmp_path / "rgba.png"),
            save(transparent, tmp_path / "transparent.png"),
            save(VESSELS.astype(np.uint8), tmp_path / "01.png"),
            save(VESSELS.astype(np.uint16) * 65535, tmp_path / "16.png"),
            save(VESSELS.astype(np.uint16) * 65535, tmp_path / "16.tif"),
        )
    ):
        assert np.array_equal(read_binary_mask(path), VESSELS), number


def test_white_may_be_1_or_255(tmp_path):
    """As in the items of `DriveDataset`: 255 is what does not count."""
    levels = VESSELS.astype(np.uint8)
    levels[:, :5] = 255
    path = save(levels, tmp_path / "label.png")
    for read in (read_binary_mask, lambda path: read_classes(path, 1)):
        with pytest.raises(DatasetError, match="label.png: holds the values 0, 1, 255, where 1 may be white and 255 "):
            read(path)
    assert np.array_equal(read_classes(path, 2), levels)
    of_classes = levels * (1 + (np.arange(levels.shape[1]) % 2 * (levels < 255))).astype(np.uint8)
    assert set(np.unique(of_classes)) == {0, 1, 2, 255}
    path = save(of_classes, tmp_path / "classes.png")
    with pytest.raises(
        DatasetError, match="values 0, 1, 2, 255, where those up to 2 may .* train with --num-classes 2"
    ):
        read_classes(path, 1)
    assert np.array_equal(read_binary_mask(path), of_classes == 255)  # an ROI mask has no classes
    assert np.array_equal(read_classes(path, 2), of_classes)
    stray = np.where(VESSELS, 255, 0).astype(np.uint8)
    stray[:2, :5] = 1
    assert np.array_equal(read_binary_mask(save(stray, tmp_path / "stray.png")), VESSELS)
    assert np.array_equal(read_binary_mask(save(np.maximum(stray, 1), tmp_path / "dark.png")), VESSELS)


def test_smear_of_jpeg(tmp_path):
    wide = np.pad(np.kron(VESSELS, np.ones((9, 9), bool)), ((3, 0), (5, 0)))  # edges within the blocks of 8 x 8
    path = tmp_path / "label.jpg"
    Image.fromarray(wide * np.uint8(255)).save(path, quality=75)
    assert len(np.unique(np.array(Image.open(path)))) > 10
    assert np.array_equal(read_binary_mask(path), wide)


def test_black_or_white_alone(tmp_path):
    assert not read_binary_mask(save(np.zeros((4, 5), np.uint8), tmp_path / "a.png")).any()
    assert read_binary_mask(save(np.ones((4, 5), np.uint8), tmp_path / "b.png")).all()
    assert read_binary_mask(save(np.full((4, 5), 255, np.uint8), tmp_path / "c.png")).all()


@pytest.mark.parametrize(
    "values", [(0, 1, 2), (0, 128, 255), (38,), (0, 100), (0, 64), (65, 255), (0, 191), tuple(range(0, 256, 51))]
)
def test_what_is_not_black_and_white(tmp_path, values):
    path = save(np.resize(np.array(values, np.uint8), (40, 50)), tmp_path / "label.png")
    named = ", ".join(map(str, values))
    with pytest.raises(DatasetError, match=f"label.png: a mask must be black and white, .* holds the values {named};"):
        read_binary_mask(path)


@pytest.mark.parametrize("mode", ["RGB", "P"])
def test_coloured_vessels(tmp_path, mode):
    """Of a label of arteries and veins, the blue ones are darker than black may be."""
    picture = np.zeros((60, 80, 3), np.uint8)
    picture[10:20] = (255, 255, 0)
    Image.fromarray(picture).convert(mode).save(tmp_path / "yellow.png")
    assert np.array_equal(read_binary_mask(tmp_path / "yellow.png"), picture[..., 0] > 0)
    picture[10:20], picture[40:42, :10] = 255, (0, 0, 255)
    Image.fromarray(picture).convert(mode).save(tmp_path / "veins.png")
    with pytest.raises(DatasetError, match=r"veins\.png: holds bright colours, as labels of arteries and veins do"):
        read_binary_mask(tmp_path / "veins.png")


def test_a_hundredth_may_lie_in_between(tmp_path):
    grey = np.where(VESSELS, 255, 0).astype(np.uint8)
    grey.flat[:20] = 100  # of 2000
    assert np.array_equal(read_binary_mask(save(grey, tmp_path / "a.png")), VESSELS)
    grey.flat[20] = 100
    with pytest.raises(DatasetError, match="0, 100, 255"):
        read_binary_mask(save(grey, tmp_path / "b.png"))


def test_classes(tmp_path):
    classes = np.zeros((40, 50), np.uint8)
    classes[5:15], classes[20:30] = 1, 2
    grey = save(classes, tmp_path / "grey.png")
    image = Image.fromarray(classes, "P")
    image.putpalette([0, 0, 0, 255, 0, 0, 0, 0, 255])  # black, red, blue
    image.save(tmp_path / "palette.png")
    for path in (grey, tmp_path / "palette.png"):
        assert np.array_equal(read_classes(path, 2), classes)
    with pytest.raises(DatasetError, match="grey.png: a mask must be black and white, .* holds the values 0, 1, 2;"):
        read_classes(grey, 1)
    binary = save(VESSELS * np.uint8(254), tmp_path / "binary.png")
    with pytest.raises(DatasetError, match="binary.png: holds the values 0, 254, but --num-classes 2 allows 0"):
        read_classes(binary, 2)
    classes[0] = 255
    assert read_classes(save(classes, tmp_path / "unknown.png"), 2)[0, 0] == 255


def test_classes_of_a_gif(tmp_path):
    """Pillow leaves colours that do not occur out of its palette, and numbers the others anew."""
    veins = VESSELS * np.uint8(2)
    for classes in (veins, np.where(VESSELS, 2, np.uint8(255)), np.maximum(veins, 1)):
        path = save(classes, tmp_path / "grey.gif")
        with Image.open(path) as image:
            assert np.array(image).max() == 1
        assert np.array_equal(read_classes(path, 2), classes)
    coloured = Image.fromarray(veins, "P")
    coloured.putpalette([0, 0, 0, 255, 0, 0, 0, 0, 255])
    coloured.save(tmp_path / "veins.gif")
    with pytest.raises(DatasetError, match=r"veins\.gif: holds colours, and in a GIF .*; save the label as a PNG"):
        read_classes(tmp_path / "veins.gif", 2)


@pytest.mark.parametrize(
    "kind, unknown, suffix",
    [
        (np.uint16, 65535, "png"),
        (np.uint16, 65535, "tif"),
        (np.uint16, 255, "png"),
        (np.int32, -1, "tif"),
        (np.float32, -1, "tif"),
        (np.float32, np.nan, "tif"),
    ],
)
def test_numbers_of_more_than_8_bits(tmp_path, kind, unknown, suffix):
    numbers = VESSELS.astype(kind)
    numbers[:5] = unknown
    path = save(numbers, tmp_path / f"label.{suffix}")
    with pytest.raises(DatasetError, match="holds the values 0, 1, 255, where 1 may be white and 255 unknown"):
        read_classes(path, 1)
    numbers[15:20] *= 2
    classes = np.where(numbers == numbers.clip(0, 2), numbers, 255)
    assert np.array_equal(read_classes(save(numbers, path), 2), classes)
    assert np.array_equal(read_binary_mask(save(VESSELS.astype(kind), path)), VESSELS)
    numbers[:5] = 20  # of no class
    with pytest.raises(DatasetError, match="holds the values 0, 1, 2, 20, but --num-classes 2"):
        read_classes(save(numbers, path), 2)


def test_black_and_white_of_more_than_8_bits(tmp_path):
    """With one number beside what may be unknown, they are as they were: an ROI mask may be NaN outside."""
    for dark, light in ((0, 1), (0, 255), (0, 4095), (0, 65535), (1, 65535)):
        path = save(np.where(VESSELS, light, dark).astype(np.uint16), tmp_path / "mask.png")
        assert np.array_equal(read_binary_mask(path), VESSELS)
    path = save(np.where(VESSELS, 1, np.nan).astype(np.float32), tmp_path / "mask.tif")
    assert np.array_equal(read_binary_mask(path), VESSELS)


@pytest.mark.parametrize("unknown", [-1, np.nan])
def test_numbers_in_a_mask_are_not_taken_for_black_and_white(tmp_path, unknown):
    """Only in labels to train on are -1 and NaN unknown; as white they would invert an ROI mask."""
    mask = np.full((20, 20), unknown, np.float32)
    mask[:18], mask[:9], mask[0] = 1, 2, 0
    Image.fromarray(mask).save(tmp_path / "mask.tif")
    with pytest.raises(DatasetError, match="mask must be black and white"):
        read_binary_mask(tmp_path / "mask.tif")
