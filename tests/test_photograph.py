import os
import struct
import threading
import warnings
import zlib
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from PIL import Image
from PIL.PngImagePlugin import PngImageFile

from src.field_of_view import field_of_view_diameter, find_field_of_view
from src.masks import read_binary_mask, read_classes
from src.photograph import (
    FORMATS,
    PhotographError,
    list_photographs,
    load_image,
    page_and_pages,
    read_photograph,
)
from tests.conftest import on_posix


def picture(height=24, width=40, seed=0):
    """A smooth colour picture with a bright upper left corner, uint8 [H, W, 3]."""
    coarse = np.random.default_rng(seed).integers(40, 200, (3, 4, 3), dtype=np.uint8)
    coarse[0, 0] = 250
    return np.array(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC))


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
    monkeypatch.setattr("src.photograph.ROWS_AT_ONCE", 50)  # Pillow 10 warns of large parts too
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert read_photograph(path).shape == (100, 100, 3)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 4000)
    with pytest.raises(PhotographError, match=r"huge.png: has more than .* megapixels"):
        read_photograph(path)


def test_two_threads_read_at_once_without_warnings(tmp_path, monkeypatch):
    """None waits for the other, and the filters of warnings are as before."""
    path = tmp_path / "huge.png"
    Image.fromarray(picture(100, 100)).save(path)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 6000)
    both, load = threading.Barrier(2), Image.Image.load

    def wait_and_load(image):
        both.wait(timeout=10)
        return load(image)

    monkeypatch.setattr(PngImageFile, "load", wait_and_load)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        before = list(warnings.filters)
        with ThreadPoolExecutor(2) as threads:
            assert [image.size for image in threads.map(load_image, [path, path])] == [(100, 100)] * 2
        assert warnings.filters == before


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


@pytest.mark.parametrize("format", ["EPS", "ICO", "TGA", "PCX"])
def test_formats_that_are_not_promised_are_not_opened(tmp_path, format):
    # PostScript is a program, which Pillow has Ghostscript run.
    path = tmp_path / "x.jpg"
    Image.fromarray(picture(32, 32)).save(path, format=format)
    for read in (read_photograph, read_binary_mask, lambda path: read_classes(path, 2), page_and_pages):
        with pytest.raises(PhotographError, match="x.jpg: not an image of a known format, or damaged; give tif, png, "):
            read(path)


@pytest.mark.parametrize("format", FORMATS)
def test_a_format_needs_not_its_own_ending(tmp_path, format):
    Image.fromarray(picture()).save(tmp_path / "x.jpg", format=format)
    assert read_photograph(tmp_path / "x.jpg").shape == (24, 40, 3)


@pytest.mark.parametrize(
    "error", [struct.error("unpack"), KeyError(42), RuntimeError(), MemoryError(), ZeroDivisionError()]
)
def test_whatever_a_decoder_raises_is_the_fault_of_the_file(tmp_path, monkeypatch, error):
    def fail(image):
        raise error

    path = tmp_path / "a.png"
    Image.fromarray(picture()).save(path)
    monkeypatch.setattr("PIL.PngImagePlugin.PngImageFile.load", fail)
    with pytest.raises(PhotographError, match="a.png: (cannot be read|does not fit into memory)"):
        read_photograph(path)


def save_pages(path, *pages):
    first, *others = map(Image.fromarray, pages)
    first.save(path, save_all=True, append_images=others)


def write_planes(path, planes):
    """An uncompressed TIFF of channels [3 or 4, H, W], of RGB or CMYK, each in a plane of its own."""
    count, height, width = planes.shape
    bits, data = 8 * planes.itemsize, planes.astype(planes.dtype.newbyteorder("<")).tobytes()
    starts = [8 + channel * len(data) // count for channel in range(count)]
    lists, entries, values = 8 + len(data), [], b""
    for tag, kind, numbers in (
        *((256, 4, [width]), (257, 4, [height]), (258, 3, [bits] * count), (259, 3, [1])),
        *((262, 3, [2 if count == 3 else 5]), (273, 4, starts), (277, 3, [count]), (278, 4, [height])),
        *((279, 4, [len(data) // count] * count), (284, 3, [2])),
    ):
        value = struct.pack(f"<{len(numbers)}{'H' if kind == 3 else 'I'}", *numbers)
        if len(value) > 4:
            value, values = struct.pack("<I", lists + len(values)), values + value
        entries.append(struct.pack("<HHI4s", tag, kind, len(numbers), value))
    directory = struct.pack("<H", len(entries)) + b"".join(entries) + bytes(4)
    path.write_bytes(b"II*\0" + struct.pack("<I", lists + len(values)) + data + values + directory)


def test_a_tiff_of_one_plane_for_each_colour(tmp_path):
    planes = picture().transpose(2, 0, 1)
    write_planes(tmp_path / "8.tif", planes)
    assert np.array_equal(read_photograph(tmp_path / "8.tif"), picture())
    write_planes(tmp_path / "16.tif", planes.astype(np.uint16) * 257)
    write_planes(tmp_path / "cmyk16.tif", planes[[0, 1, 2, 0]].astype(np.uint16) * 257)
    for name in ("16.tif", "cmyk16.tif"):
        with pytest.raises(PhotographError, match=f"{name}: has more than 8 bits a channel in separate planes, which"):
            read_photograph(tmp_path / name)


def test_greys_whose_white_is_zero(tmp_path):
    grey = picture()[..., 0]
    Image.fromarray(grey).save(tmp_path / "8.tif", tiffinfo={262: 0})
    read_photograph(tmp_path / "8.tif")  # which Pillow reads rightly
    for name, levels in (("16.tif", grey.astype(np.uint16) * 257), ("float.tif", grey.astype(np.float32))):
        Image.fromarray(levels).save(tmp_path / name, tiffinfo={262: 0})
        with pytest.raises(PhotographError, match=f"{name}: stores white as 0 in more than 8 bits"):
            read_photograph(tmp_path / name)


def test_of_a_tiff_the_largest_page_is_read(tmp_path):
    thumbnail, page, same = picture(6, 6), picture(), picture(seed=1)
    path = tmp_path / "a.tif"
    for pages, used in (((thumbnail, page, same), 2), ((page, thumbnail), 1), ((same, page), 1), ((page,), 1)):
        save_pages(path, *pages)
        np.testing.assert_array_equal(read_photograph(path), pages[used - 1])
        assert page_and_pages(path) == (used, len(pages), False)
    mask = picture()[..., 0] > 120
    save_pages(path, mask[:6, :6], mask)
    np.testing.assert_array_equal(read_binary_mask(path), mask)
    Image.fromarray(page).save(tmp_path / "a.gif", save_all=True, append_images=[Image.fromarray(same)])
    assert page_and_pages(tmp_path / "a.gif") == (1, 1, False)


def test_pages_that_are_damaged_or_huge(tmp_path, monkeypatch):
    path = tmp_path / "a.tif"
    save_pages(path, picture(), picture(60, 60))
    content = path.read_bytes()
    first_page = struct.unpack("<I", content[4:8])[0]
    tags = struct.unpack("<H", content[first_page : first_page + 2])[0]
    link = first_page + 2 + 12 * tags  # where the place of the next page is stored
    # In a circle, which is the end; in the middle of nothing; behind the end.
    for wrong, damaged in ((first_page, False), (len(content) - 3, True), (2**31, True)):
        path.write_bytes(content[:link] + struct.pack("<I", wrong) + content[link + 4 :])
        np.testing.assert_array_equal(read_photograph(path), picture())
        assert page_and_pages(path) == (1, 1, damaged)
    path.write_bytes(content)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(PhotographError, match="megapixels"):
        read_photograph(path)


# ---- finding files


@on_posix
def test_what_is_no_file_is_refused_and_never_waited_for(tmp_path):
    os.mkfifo(tmp_path / "fifo.png")
    (tmp_path / "loop.png").symlink_to("loop.png")
    (tmp_path / "broken.png").symlink_to("missing.png")
    names = {
        tmp_path / "fifo.png": "is a FIFO, a socket or a device, not a file",
        tmp_path / "loop.png": "cannot be read",
        tmp_path / "broken.png": "a link to a file that is not there",
        tmp_path / ("a" * 300 + ".png"): "cannot be read",
        "/dev/zero": "is a FIFO, a socket or a device, not a file",
    }
    for name, reason in names.items():
        with pytest.raises(PhotographError) as caught:
            read_photograph(name)
        assert str(caught.value).startswith(f"{name}: {reason}")


def test_list_photographs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("b.PNG", "a.tif", "._a.tif", "notes.txt", "odd.name", "c[1].jpg", "deep/d.bmp"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "folder.png").mkdir()

    def names(*patterns):
        return [path.as_posix() for path in list_photographs(patterns)]

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
