"""Three hundred hostile inputs: photographs, ROI masks, data sets, weights and flags, made from a seed.

Each is given to a script as a user would. It must end within a minute and in 4 GB, with its work whole and exit
status 0, or with a line that begins with the script's name and status 1 or 2, and nothing half-written. What an input
is made of follows from the number of its test, so that a failure can be repeated.
"""

import contextlib
import copy
import csv
import io
import json
import os
import pickle
import struct
import time
import zipfile
import zlib
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import compute_mean_std
import predict
import train
from tests.conftest import SMALL_RUN
from tests.processes import start_script
from tests.test_altered_weights import content as content  # a fixture
from tests.test_altered_weights import put
from tests.test_predict import make_model, save
from train_utils import load_checkpoint
from train_utils.prediction_table import escaped
from train_utils.synthetic_drive import synthetic_photograph

pytestmark = pytest.mark.slow

SECONDS = 60  # of the processor, that an input may take
HANGS = 600  # seconds after which a process hangs, however busy the machine is
MEMORY = 4 * 2**30  # bytes
ADDRESS_SPACE = 16 * 2**30  # bytes, so that a fault takes its own process and not the machine


# ---- to run a script


def run(script, flags, folder, allowed=(0, 1), inputs=1):
    """Run a script in a folder; check how it ends, and return its exit status and what it says of errors."""
    started = time.monotonic()
    process = start_script(script, flags, folder, ADDRESS_SPACE)
    process.join(HANGS)
    hangs = process.is_alive()
    process.kill()
    process.join()
    told = (folder / "stderr.txt").read_text() if (folder / "stderr.txt").exists() else ""
    case = f"{script}.py {' '.join(map(str, flags))[:2000]}\n{told[-3000:]}"
    assert not hangs, f"after {time.monotonic() - started:.0f} s it still runs: {case}"
    assert "Traceback" not in told and (folder / "ended.json").exists(), case
    ended = json.loads((folder / "ended.json").read_text())
    assert ended["seconds"] < SECONDS * max(1, inputs / 10), f"{ended['seconds']:.0f} s: {case}"
    assert ended["peak"] < MEMORY, f"{ended['peak'] / 2**30:.1f} GiB: {case}"
    assert ended["status"] in allowed, f"status {ended['status']}: {case}"
    if ended["status"] in (1, 2):
        assert f"{script}.py: error: " in told and len(told) < 10_000 + 300 * inputs, case
        assert inputs > 1 or len(told.splitlines()) == 1, case
    left = [path for path in folder.rglob("*") if path.name.endswith((".partial", ".lock"))]
    assert not left, f"{left}: {case}"
    return ended["status"], told


def check_training(folder, status):
    """After status 0 the weights are there, else none."""
    weights = list(folder.rglob("*.pth"))
    assert ("last_model.pth" in [path.name for path in weights]) == bool(weights) == (status == 0), weights
    for path in weights:
        assert load_checkpoint(path)["epoch"] == 0


# ---- hostile pictures


def _encoded(image, suffix, **options):
    buffer = io.BytesIO()
    image.save(buffer, format=Image.registered_extensions()[suffix], **options)
    return buffer.getvalue()


def _png(width, height, bits, colour_type, rows):
    """A PNG that says what it likes of itself."""

    def chunk(kind, body):
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", width, height, bits, colour_type, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def _damaged(content, rng):
    """A file cut off, with flipped bytes, or with a part that is zero, missing or there twice."""
    content, size = bytearray(content), len(content)
    kind = rng.integers(6)
    at = int(rng.integers(size))
    end = min(size, at + int(rng.integers(1, max(2, size // 4))))
    if kind == 0:
        return bytes(content[:at])
    if kind in (1, 2):  # anywhere, or in the header
        for place in rng.integers(size if kind == 1 else min(size, 120), size=rng.integers(1, 20)):
            content[place] ^= 1 << int(rng.integers(8))
    elif kind == 3:
        content[at:end] = bytes(end - at)
    elif kind == 4:
        del content[at:end]
    else:
        content[at:at] = content[at:end]
    return bytes(content)


SUFFIXES = (".png", ".jpg", ".tif", ".gif", ".bmp", ".ppm", ".webp")
SIZES = ((1, 1), (1, 400), (400, 1), (2, 3), (15, 15), (16, 16), (33, 31), (3000, 2), (2, 3000), (64, 900))
MODES = ("1", "L", "LA", "P", "RGBA", "CMYK", "YCbCr", "I;16", "I", "F")


def hostile_picture(number, image):
    """A file (ending, content) made of a picture; every kind comes in turn."""
    rng = np.random.default_rng(number)
    suffix = SUFFIXES[number // 8 % len(SUFFIXES)]
    kind = number % 8
    if kind <= 2:
        return suffix, _damaged(_encoded(image, suffix), rng)
    if kind == 3:  # the ending of another format
        return suffix, _encoded(image, str(rng.choice(SUFFIXES)))
    if kind == 4:
        mode = MODES[number // 8 % len(MODES)]
        if mode in ("I;16", "I", "F"):
            levels = np.array(image.convert("L")).astype({"I;16": np.uint16, "I": np.int32, "F": np.float32}[mode])
            levels = levels * int(rng.choice([1, 200, -1])) if mode != "I;16" else levels * 257
            if mode == "F":
                levels[::7, ::5] = rng.choice([np.nan, np.inf, -np.inf, 1e38])
            return ".tif", _encoded(Image.fromarray(levels), ".tif")
        mode_suffix = ".tif" if mode in ("CMYK", "YCbCr") else ".png"
        return mode_suffix, _encoded(image.convert("RGB").convert(mode), mode_suffix)
    if kind == 5:
        return suffix, _encoded(image.resize(SIZES[number // 8 % len(SIZES)]), suffix)
    if kind == 6:
        frames = [image.rotate(angle) for angle in (90, 180)] + [image.resize((20, 30))]
        exif = b"Exif\0\0" + bytes(rng.integers(256, size=200, dtype=np.uint8))
        orientation = Image.Exif()
        orientation[0x0112] = int(rng.choice([0, 3, 6, 8, 9, 999, 65535]))
        return [
            (".gif", _encoded(image, ".gif", save_all=True, append_images=frames[:2], duration=10)),
            (".webp", _encoded(image, ".webp", save_all=True, append_images=frames[:1])),
            (".tif", _encoded(image, ".tif", save_all=True, append_images=frames)),
            (".jpg", _encoded(image, ".jpg", exif=exif)),
            (".jpg", _encoded(image, ".jpg", exif=orientation)),
            (".jpg", _encoded(image, ".jpg", icc_profile=bytes(rng.integers(256, size=300, dtype=np.uint8)))),
        ][number // 8 % 6]
    return [
        (suffix, b""),
        (suffix, bytes(rng.integers(256, size=3000, dtype=np.uint8))),
        (suffix, b"<html>not found</html>\n"),
        (suffix, _encoded(image, ".png") + bytes(5000)),
        (".png", _png(12000, 12000, 8, 2, bytes(1000))),
        (".png", _png(2**31 - 1, 2**31 - 1, 8, 2, bytes(1000))),
        (".png", _png(0, 40, 8, 2, bytes(1000))),
        (".png", _png(80, 72, 3, 9, bytes(1000))),
        (".png", _png(9000, 9000, 1, 0, bytes(9000 * 1126))),  # large and well packed
        (".ppm", b"P6 99999 99999 255\n" + bytes(1000)),
        (".ppm", b"P6 80 72 70000\n" + bytes(80 * 72 * 6)),
        (".ppm", b"P6 # " + b"a" * 5000),
        (".gif", b"GIF89a" + struct.pack("<HH", 65535, 65535) + bytes(100)),
        (".bmp", _encoded(image, ".bmp")[:18] + struct.pack("<ii", -(2**31), 2**31 - 1) + bytes(200)),
    ][number // 8 % 14]


@pytest.fixture(scope="module")
def picture():
    return Image.fromarray(synthetic_photograph(80, 72, np.random.default_rng(0))[0])


@pytest.fixture(scope="module")
def label():
    return Image.fromarray(synthetic_photograph(80, 72, np.random.default_rng(0))[1] * np.uint8(255))


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    return save(tmp_path_factory.mktemp("weights") / "model.pth", make_model())


# ---- photographs and ROI masks


@pytest.mark.parametrize(
    ("part", "flags"), [(0, ["--overlay"]), (1, ["--report"]), (2, ["--tta", "--save-prob"]), (3, ["--scale", "1"])]
)
def test_photographs(tmp_path, weights, picture, part, flags):
    """A hundred in four folders: each has its row, with a mask or an error."""
    photographs, out = tmp_path / "photographs", tmp_path / "out"
    photographs.mkdir()
    for number in range(part * 25, part * 25 + 25):
        suffix, content = hostile_picture(number, picture)
        Path(photographs, f"{number:03d}{suffix}").write_bytes(content)
    command = ["--device", "cpu", "--weights", weights, "--image", photographs, "--output", out, *flags]
    status, told = run("predict", command, tmp_path, inputs=25)
    with open(out / "predictions.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert sorted(row["file"] for row in rows) == sorted(escaped(path) for path in photographs.iterdir())
    failed = [row for row in rows if row["error"]]
    assert status == (1 if failed else 0) and len(rows) == 25 > len(failed)
    assert all(row["error"] in told for row in failed)
    for row in rows:
        assert bool(row["mask"]) != bool(row["error"])
        if row["mask"]:
            mask = np.array(Image.open(out / row["mask"]))
            assert mask.shape == (int(row["height"]), int(row["width"])) and set(np.unique(mask)) <= {0, 255}
    assert {path.name for path in out.glob("*_vessels.png")} == {row["mask"] for row in rows} - {""}


@pytest.mark.parametrize("number", range(100, 120))
def test_roi_masks(tmp_path, weights, picture, number):
    inside = picture.convert("L").point(lambda level: 255 * (level > 20)).convert("RGB")
    suffix, content = hostile_picture(number, inside)
    picture.save(tmp_path / "photograph.png")
    (tmp_path / f"mask{suffix}").write_bytes(content)
    flags = ["--device", "cpu", "--weights", weights, "--image", "photograph.png", "--roi-mask", f"mask{suffix}"]
    status, _ = run("predict", flags, tmp_path)
    assert (tmp_path / "test_result.png").exists() == (status == 0)


# ---- data sets


def make_data(folder, picture, label):
    for kind in ("images", "labels", "masks"):
        (folder / kind).mkdir(parents=True)
    for number in range(4):
        picture.rotate(90 * number, expand=True).save(folder / "images" / f"{number}.png")
        label.rotate(90 * number, expand=True).save(folder / "labels" / f"{number}.png")
        inside = picture.convert("L").point(lambda level: 255 * (level > 20)).rotate(90 * number, expand=True)
        inside.save(folder / "masks" / f"{number}.png")


def _fifo(path):
    path.unlink()
    os.mkfifo(path)


def _link(to):
    def change(path):
        path.unlink()
        path.symlink_to(to or path.name)

    return change


def _picture(change):
    return lambda path: change(Image.open(path)).save(path)


def _folder(path):
    path.unlink()
    path.mkdir()


REFUSED, EITHER = (1,), (0, 1)
ODD_FILES = {  # what happens to one file, and the exit statuses where it is a photograph, a label, an ROI mask
    "missing": (Path.unlink, EITHER, REFUSED, EITHER),
    "a FIFO": (_fifo, REFUSED, REFUSED, REFUSED),
    "a link in a loop": (_link(None), REFUSED, REFUSED, REFUSED),
    "a link to nothing": (_link("nothing.png"), REFUSED, REFUSED, REFUSED),
    "a link to a device": (_link("/dev/zero"), REFUSED, REFUSED, REFUSED),
    "a folder": (_folder, EITHER, REFUSED, EITHER),
    "of another size": (_picture(lambda image: image.resize((31, 33))), REFUSED, REFUSED, REFUSED),
    "all black": (_picture(lambda image: image.point(lambda level: 0)), EITHER, EITHER, REFUSED),
    "all white": (_picture(lambda image: image.point(lambda level: 255)), EITHER, EITHER, EITHER),
    "of many levels": (_picture(lambda image: image.convert("L").rotate(30)), EITHER, EITHER, EITHER),
    "twice": (lambda path: path.with_suffix(".jpg").write_bytes(path.read_bytes()), REFUSED, REFUSED, REFUSED),
}
KINDS = ("images", "labels", "masks")
DATA_CASES = [(name, kind) for name in ODD_FILES for kind in KINDS]
SPOILT_FOLDERS = {
    "images is a file": lambda data: (data / "images").rename(data / "old") and (data / "images").write_bytes(b""),
    "labels is a link in a loop": lambda data: (
        (data / "labels").rename(data / "old") and (data / "labels").symlink_to("labels")
    ),
    "no images": lambda data: [path.unlink() for path in (data / "images").iterdir()],
    "one photograph": lambda data: [path.unlink() for path in sorted((data / "images").iterdir())[1:]],
}


@pytest.mark.parametrize("number", range(60))
def test_data_sets(tmp_path, picture, label, number):
    data, allowed = tmp_path / "data", EITHER
    make_data(data, picture, label)
    if number < len(DATA_CASES):
        name, kind = DATA_CASES[number]
        change, *statuses = ODD_FILES[name]
        change(data / kind / "1.png")
        allowed = statuses[KINDS.index(kind)]
    elif number < len(DATA_CASES) + len(SPOILT_FOLDERS):
        list(SPOILT_FOLDERS.values())[number - len(DATA_CASES)](data)
        allowed = REFUSED
    else:
        kind = KINDS[number % 3]
        suffix, content = hostile_picture(number + 200, picture if kind == "images" else label)
        (data / kind / "1.png").unlink()
        (data / kind / f"1{suffix}").write_bytes(content)
    status, _ = run("train", ["--data-path", "data", *SMALL_RUN, "--epochs", 1, "-j", 0], tmp_path, allowed)
    check_training(tmp_path, status)
    # Labels do not matter to it.
    run("compute_mean_std", ["--data-path", "data"], tmp_path, allowed if status == 0 else EITHER)


# ---- weights


def _every_place(content, keys=()):
    """The keys of every value in nested dicts and lists."""
    yield keys
    if isinstance(content, dict | list):
        pairs = content.items() if isinstance(content, dict) else enumerate(content)
        for key, value in pairs:
            yield from _every_place(value, (*keys, key))


class _RunsCode:
    def __reduce__(self):
        return os.mkdir, ("owned",)


HOSTILE_VALUES = (
    *(None, True, -1, 0, 10**30, 1.5, float("nan"), float("inf"), "", "x", "\n", b"x", 1j, [], {}, [[]], {"a": {}}),
    *(
        torch.zeros(0),
        torch.tensor(float("nan")),
        torch.zeros(2, 3, dtype=torch.complex64),
        torch.ones(1).expand(10**9),
    ),
)


def _hostile_weights(number, content, path):
    """Write a file of weights; return the exit statuses that it allows."""
    rng = np.random.default_rng(number)
    kind = number % 4
    content = copy.deepcopy(content)
    torch.save(content, path)
    if kind == 0:
        path.write_bytes(_damaged(path.read_bytes(), rng))
    elif kind in (1, 2):  # among the few values that tell of the rest, or anywhere
        places = [
            keys for keys in _every_place(content) if keys and (kind == 2 or keys[0] not in ("model", "optimizer"))
        ]
        put(*places[int(rng.integers(len(places)))], HOSTILE_VALUES[int(rng.integers(len(HOSTILE_VALUES)))])(content)
        torch.save(content, path)
    else:
        return _hostile_file(number // 4, content, path)
    return 0, 1, 2


def _hostile_file(number, content, path):
    buffer = io.BytesIO()
    which = number % 9
    if which == 0:  # a byte of a tensor
        altered = bytearray(path.read_bytes())
        altered[altered.find(content["model"]["in_conv.0.weight"].numpy().tobytes()) + 3] ^= 64
        path.write_bytes(altered)
    elif which == 1:
        torch.save(content | {"more": _RunsCode()}, path)
    elif which == 2:
        path.write_bytes(pickle.dumps(_RunsCode()))
    elif which == 3:
        np.savez(buffer, **{name: value.numpy() for name, value in content["model"].items()})
        path.write_bytes(buffer.getvalue())
    elif which == 4:
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr("model/data.pkl", bytes(300 * 2**20))
    elif which == 5:
        path.write_bytes([b"", b"hello\n", bytes(100_000), b"\x80\x02" + b"(" * 100_000][number // 9 % 4])
    elif which == 6:
        torch.save([content], path)
    elif which == 7:
        path.unlink()
        os.mkfifo(path)
    else:
        path.unlink()
        path.mkdir()
    return 1, 2


@pytest.mark.parametrize("number", range(60))
def test_weights(tmp_path, content, shared_drive, picture, number):
    path = tmp_path / "hostile.pth"
    allowed = _hostile_weights(number, content, path)
    data = ["--data-path", shared_drive, *SMALL_RUN, "--output-dir", "out", "-j", 0]
    picture.save(tmp_path / "photograph.png")
    which = number // 4 % 4
    if which == 0:
        flags = ["--device", "cpu", "--weights", path, "--image", "photograph.png"]
        status, _ = run("predict", flags, tmp_path, allowed)
        assert (tmp_path / "test_result.png").exists() == (status == 0)
    elif which == 1:
        status, _ = run("train", [*data, "--epochs", 2, "--resume", path], tmp_path, allowed)
        assert (tmp_path / "out" / "last_model.pth").exists() == (status == 0)
    elif which == 2:
        status, _ = run("train", [*data, "--epochs", 1, "--init-weights", path, "--train-on-all"], tmp_path, allowed)
        check_training(tmp_path / "out", status)
    else:
        status, _ = run("train", [*data, "--test-only", "--resume", path], tmp_path, allowed)
        assert (tmp_path / "out" / "scores.json").exists() == (status == 0)
    assert not (tmp_path / "owned").exists()


# ---- flags

HOSTILE_WORDS = (
    *("", " ", "nan", "inf", "-inf", "-1", "0", "1e400", "1e-400", "0x10", "1_0", "\uff11\uff12", "9" * 40, "abc"),
    *("\u00e9\u202e", "\udcff", "a" * 5000, "..", ".", "/proc", "/dev/null", "/dev/zero", "/proc/self/mem"),
    *("*", "[", "{}", "--", "-", "True", "None", "auto", "fifo", "loop", "text.txt", "fifo/x", "text.txt/x"),
)
LARGE = (
    *(("train", flag, 10**6, (2,)) for flag in ("--crop-size", "--base-size", "--base-c")),
    ("train", "--val-split", 10**6, (1,)),
    *(("train", flag, 2**62, (1, 2)) for flag in ("--crop-size", "--base-size", "--base-c", "--start-epoch")),
    *(("train", flag, 2**62, (0,)) for flag in ("--batch-size", "--print-freq")),
    ("train", "--num-classes", 10**9, (1, 2)),
    ("train", "--num-classes", 300, (1, 2)),
    ("train", "--seed", 2**63, (0, 2)),
    ("train", "--fold", f"1/{10**9}", (1,)),
    ("train", "--lr", 1e30, (1,)),
    *(("train", flag, 1e308, (2,)) for flag in ("--lr", "--weight-decay")),
    ("train", "--fov-diameter", 19999, (0, 1)),
    ("predict", "--tile", 2**62, (0,)),
    ("predict", "--batch-size", 2**62, (0,)),
    ("predict", "--scale", 1e6, (1,)),
    ("predict", "--scale", 1e300, (1,)),
    ("predict", "--scale", 0.01, (0,)),
)
# Where a large number is a wish that takes long, not a mistake.
LONG = ("--epochs", "--steps-per-epoch", "--workers", "--compile", "--help", "--demo")


def _random_flag(number):
    rng = np.random.default_rng(number)
    script = ("train", "predict", "train", "predict", "compute_mean_std")[number % 5]
    parser = {"train": train, "predict": predict, "compute_mean_std": compute_mean_std}[script].get_parser()
    actions = [action for action in parser._actions if not set(action.option_strings) & set(LONG)]
    action = actions[int(rng.integers(len(actions)))]
    word = HOSTILE_WORDS[int(rng.integers(len(HOSTILE_WORDS)))]
    form = int(rng.integers(3))
    flag = str(rng.choice(action.option_strings))
    return script, [flag, word] if form else [f"{flag}={word}"], (0, 1, 2)


@pytest.mark.parametrize("number", range(60))
def test_flags(tmp_path, weights, shared_drive, picture, number):
    folder = tmp_path / "a" / "b"
    folder.mkdir(parents=True)
    picture.save(folder / "photograph.png")
    os.mkfifo(folder / "fifo")
    (folder / "loop").symlink_to("loop")
    (folder / "text.txt").write_text("hello\n")
    if number < len(LARGE):
        script, flag, value, allowed = LARGE[number]
        more = [flag, value]
    else:
        script, more, allowed = _random_flag(number)
    usual = {
        "train": ["--data-path", shared_drive, *SMALL_RUN, "--epochs", 1, "-j", 0],
        "predict": ["--device", "cpu", "--weights", weights, "--image", "photograph.png"],
        "compute_mean_std": ["--data-path", shared_drive],
    }[script]
    status, told = run(script, [*usual, *more], folder, allowed)
    if script == "train" and "--test-only" not in more:
        check_training(tmp_path, status)
    if script == "predict" and status and "photographs failed" not in told:
        assert not list(tmp_path.rglob("*_vessels.png")) and not (folder / "test_result.png").exists()


def test_the_numbers_are_right():
    """There are flags besides the large ones, and the seed brings every kind of picture, with different contents."""
    assert len(LARGE) < 30
    image = Image.new("RGB", (80, 72), (200, 90, 40))
    files = [hostile_picture(number, image) for number in range(100)]
    assert Counter(suffix for suffix, _ in files).keys() == set(SUFFIXES) and len(set(files)) > 60
    with contextlib.suppress(OSError), Image.open(io.BytesIO(files[3][1])) as opened:
        assert opened.size == (80, 72)
