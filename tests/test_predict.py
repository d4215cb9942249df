import csv
import errno
import os
import re
import shutil
import stat
import subprocess
import sys
import time
import unicodedata
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw

import predict
from my_dataset import DRIVE_MEAN, DRIVE_STD, DriveDataset
from src import create_model, segmenter
from src.field_of_view import find_field_of_view
from src.inference import for_inference
from src.photograph import PhotographError, read_photograph
from src.roi_mask import choose_field_of_view, roi_mask_path
from src.segment import normalise, prepare_at_scale, segment
from src.segmenter import PRETRAINED
from tests.conftest import on_posix, refusal
from tests.pictures import disc
from tests.test_checkpoint import RunsCode, save_as_the_tutorial
from tests.test_photograph import make_broken
from train_utils import command_line, load_model, prediction_table, save_checkpoint
from train_utils.command_line import run_script
from train_utils.data_loading import evaluation_loader
from train_utils.files import sha256_of, write_csv
from train_utils.in_order import MOST_HELD
from train_utils.lock import FolderLock
from train_utils.prediction_files import lock_path, mask_names
from train_utils.prediction_table import PredictionTable, escaped, whole_path
from train_utils.synthetic_drive import synthetic_photograph
from transforms import get_transform

PROJECT = Path(predict.__file__).parent
CPU = torch.device("cpu")
MEAN, STD = [0.6, 0.3, 0.2], [0.2, 0.1, 0.05]  # not DRIVE's, so that the checkpoint's must have been used


def make_model(**model_args):
    """A model whose predictions vary over a photograph, as a trained one's do."""
    torch.manual_seed(1)
    model = create_model(**{"base_c": 4, **model_args})
    photograph, _, inside = synthetic_photograph(80, 72, np.random.default_rng(7))
    image = normalise(photograph, MEAN, STD)[None]
    with torch.no_grad():
        for _ in range(30):
            model(image)  # for the statistics of the normalisation layers
        logits = model.eval()(image)["out"][0, :, inside]  # [C, pixels]
        model.out_conv[0].bias -= logits.mean(dim=1)
    return model


def save(path, model, **more):
    content = {"model": model.state_dict(), "model_args": model.model_args, "mean": MEAN, "std": STD}
    save_checkpoint(content | {"fov_diameter": 68.0} | more, path)
    return path


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """Weights of a model for photographs with a field of view of 68 pixels, as those of `shared_drive` have."""
    return save(tmp_path_factory.mktemp("weights") / "best_model.pth", make_model())


@pytest.fixture
def photographs(tmp_path, shared_drive):
    """A folder of four photographs without masks."""
    folder = tmp_path / "photographs"
    folder.mkdir()
    for path in (shared_drive / "DRIVE" / "test" / "images").iterdir():
        Image.open(path).save(folder / f"{path.stem.removesuffix('_test')}.png")
    return folder


def run(*flags):
    predict.main(predict.parse_args(["--device", "cpu", *map(str, flags)]))


def fails(capsys, *flags):
    return refusal(capsys, predict, "--device", "cpu", *flags)


def pixels(path):
    return np.array(Image.open(path))


def table(folder):
    with open(folder / "predictions.csv", newline="") as file:
        return list(csv.DictReader(file))


def files(folder):
    return sorted(path.name for path in folder.iterdir())


# ---- as the tutorial


def test_without_flags_as_the_tutorial(working_directory, weights, shared_drive, capsys):
    shutil.copytree(shared_drive / "DRIVE", "DRIVE")
    shutil.copytree(weights.parent, "save_weights")
    predict.main(predict.parse_args([]))
    assert files(working_directory) == ["DRIVE", "save_weights", "test_result.png"]
    with Image.open("test_result.png") as mask:
        assert (mask.format, mask.mode, mask.size) == ("PNG", "L", (80, 72))
        values = set(np.unique(mask))
    assert values == {0, 255}
    official = pixels("DRIVE/test/mask/01_test_mask.gif") > 0
    vessels = pixels("test_result.png") > 0
    assert not vessels[~official].any()
    output = capsys.readouterr().out
    assert "inference time: " in output
    assert f"vessels are {vessels.sum() / official.sum():.1%} of the field of view" in output


@pytest.mark.parametrize("roi_mask", [None, "auto"])
def test_the_prediction_is_that_of_evaluate(tmp_path, weights, shared_drive, roi_mask):
    dataset = DriveDataset(shared_drive, False, get_transform(False, MEAN, STD))
    model = for_inference(load_model(weights, CPU)[0])  # as evaluate runs it
    flags = ["--roi-mask", roi_mask] if roi_mask else []
    run("--weights", weights, "--image", *dataset.img_list, "--output", tmp_path / "out", *flags)
    for path, (image, label) in zip(dataset.img_list, evaluation_loader(dataset, 0, pin_memory=False), strict=True):
        with torch.inference_mode():
            expected = model(image)["out"].argmax(1)[0] == 1
        inside = label[0] != 255
        assert 0.05 < expected[inside].float().mean() < 0.95
        mask = pixels(tmp_path / "out" / f"{path.stem}_vessels.png")
        if roi_mask == "auto":
            inside &= torch.from_numpy(find_field_of_view(read_photograph(path)))
        else:
            assert (mask[~inside.numpy()] == 0).all()
        np.testing.assert_array_equal(mask[inside], expected[inside].numpy() * 255)


def test_one_forward_pass(tmp_path, weights, shared_drive, monkeypatch):
    calls = []
    model, checkpoint = load_model(weights, CPU)
    model.register_forward_hook(lambda *_: calls.append(1))
    monkeypatch.setattr(predict, "load_model", lambda *_: (model, checkpoint))
    image = shared_drive / "DRIVE" / "test" / "images" / "02_test.tif"
    run("--weights", weights, "--image", image, "--output", tmp_path / "a.png")
    assert len(calls) == 1
    run("--weights", weights, "--image", image, "--output", tmp_path / "a.png", "--tta")
    assert len(calls) == 5


def test_weights_of_the_tutorial(tmp_path, shared_drive):
    # They say neither how large the model is nor how photographs were normalised nor how large those were.
    path = save_as_the_tutorial(tmp_path / "model.pth", make_model())
    image = shared_drive / "DRIVE" / "test" / "images" / "01_test.tif"
    run("--weights", path, "--image", image, "--output", tmp_path / "mask.png", "--scale", "1")
    official = pixels(shared_drive / "DRIVE" / "test" / "mask" / "01_test_mask.gif") > 0
    expected = segment(make_model(), read_photograph(image), DRIVE_MEAN, DRIVE_STD)[0].numpy() > 0.5
    np.testing.assert_array_equal(pixels(tmp_path / "mask.png") > 0, expected & official)
    assert load_model(path, CPU)[1]["fov_diameter"] == 540


def test_as_a_command(tmp_path, weights, photographs):
    (photographs / "04.png").write_bytes(b"no picture")
    command = [sys.executable, PROJECT / "predict.py", "--weights", weights, "--image", "photographs/*.png"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 1
    first, second = done.stderr.splitlines()
    assert first == "predict.py: error: 1 of 4 photographs failed:"
    assert second.startswith(f"  {Path('photographs/04.png')}: not an image")
    assert files(tmp_path / "predictions") == ["01_vessels.png", "02_vessels.png", "03_vessels.png", "predictions.csv"]


# ---- many photographs


def test_a_folder(tmp_path, weights, photographs, capsys):
    Image.new("RGB", (40, 30), (180, 90, 40)).save(photographs / "5.JPG")
    run("--weights", weights, "--image", photographs, "--output", tmp_path / "deep" / "out")
    out = tmp_path / "deep" / "out"
    stems = ["01", "02", "03", "04", "5"]
    assert files(out) == [*(f"{stem}_vessels.png" for stem in stems), "predictions.csv"]
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("[")]
    assert [line[:6] for line in lines] == [f"[{number}/5] " for number in range(1, 6)]
    rows = table(out)
    names = "file mask width height field_of_view_diameter scale vessel_share reliability warning seconds error"
    assert list(rows[0]) == [*names.split(), "photograph_digest", "settings_digest"]
    assert [row["file"] for row in rows] == [path.as_posix() for path in sorted(photographs.iterdir())]
    for row, path in zip(rows[:4], sorted(photographs.iterdir()), strict=False):
        field_of_view = find_field_of_view(read_photograph(path))
        vessels = pixels(out / f"{path.stem}_vessels.png") > 0
        assert (row["width"], row["height"], row["scale"]) == ("80", "72", "1")
        assert float(row["field_of_view_diameter"]) == pytest.approx(68, abs=3)
        assert float(row["vessel_share"]) == pytest.approx(vessels.sum() / field_of_view.sum(), abs=1e-4)
        assert float(row["seconds"]) > 0
    assert (rows[4]["field_of_view_diameter"], rows[4]["scale"]) == ("40", "1.7")


def test_files_folders_and_patterns_together(tmp_path, weights, photographs, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run("--weights", weights, "--image", "photographs/04.png", "photographs/0[12].png")
    assert files(tmp_path / "predictions") == [f"0{n}_vessels.png" for n in (1, 2, 4)] + ["predictions.csv"]
    assert [row["file"] for row in table(tmp_path / "predictions")][0] == (photographs / "04.png").as_posix()


def test_one_photograph_into_a_folder(tmp_path, weights, photographs):
    run("--weights", weights, "--image", photographs / "01.png", "--output", tmp_path / "out.d")
    assert files(tmp_path / "out.d") == ["01_vessels.png", "predictions.csv"]


def test_broken_photographs_do_not_stop_the_others(tmp_path, weights, photographs, capsys):
    broken = [name for name in make_broken(photographs) if (photographs / name).is_file()]
    out = tmp_path / "out"
    (out).mkdir()
    with pytest.raises(SystemExit) as stopped:
        run_script(
            predict.main,
            predict.parse_args(
                ["--device", "cpu", "--weights", str(weights), "--image", str(photographs), "--output", str(out)]
            ),
        )
    assert stopped.value.code == 1
    assert files(out) == [*(f"0{number}_vessels.png" for number in (1, 2, 3, 4)), "predictions.csv"]
    rows = {Path(row["file"]).name: row for row in table(out)}
    assert sorted(name for name, row in rows.items() if row["error"]) == sorted(broken)
    assert len(rows) == len(broken) + 4 and all(rows[name]["width"] == "" for name in broken)
    output = capsys.readouterr()
    first, *failures = output.err.splitlines()
    assert first.endswith(f"{len(broken)} of {len(broken) + 4} photographs failed:")
    assert [Path(line.split(": ")[0].strip()).name for line in failures] == sorted(broken)
    assert output.out.count("] failed: ") == len(broken)


def test_equal_stems_get_names_of_their_own(tmp_path, weights, photographs):
    for folder, name, source in (("left", "a.png", "01"), ("right", "a.png", "02"), ("right", "A.tif", "03")):
        (tmp_path / folder).mkdir(exist_ok=True)
        Image.open(photographs / f"{source}.png").save(tmp_path / folder / name)
    flags = ("--weights", weights, "--output", tmp_path / "out")
    run(*flags, "--image", tmp_path / "left", tmp_path / "right", photographs / "04.png")
    names = ["04_vessels.png", "A_tif_vessels.png", "left_a_png_vessels.png", "right_a_png_vessels.png"]
    assert files(tmp_path / "out") == sorted([*names, "predictions.csv"])
    run(*flags[:2], "--image", photographs / "02.png", "--output", tmp_path / "alone.png")
    assert (tmp_path / "alone.png").read_bytes() == (tmp_path / "out" / "right_a_png_vessels.png").read_bytes()


def test_equal_stems_in_folders_of_equal_names(tmp_path, weights, photographs, capsys):
    for number, folder in enumerate(("one/left", "two/left"), start=1):
        (tmp_path / "in" / folder).mkdir(parents=True)
        Image.open(photographs / f"0{number}.png").save(tmp_path / "in" / folder / "a.png")
    flags = ("--weights", weights, "--output", tmp_path / "out")
    run(*flags, "--image", tmp_path / "in/one/left", tmp_path / "in/two/left/a.png")
    names = ["one_left_a_png_vessels.png", "two_left_a_png_vessels.png"]
    assert files(tmp_path / "out") == [names[0], "predictions.csv", names[1]]
    run(*flags[:2], "--image", photographs / "02.png", "--output", tmp_path / "alone.png")
    assert (tmp_path / "alone.png").read_bytes() == (tmp_path / "out" / names[1]).read_bytes()


@on_posix
def test_names_that_are_the_same_to_some_file_systems(tmp_path, weights, photographs):
    shutil.copy(photographs / "01.png", photographs / "a.png")
    shutil.copy(photographs / "02.png", photographs / "A.png")
    run("--weights", weights, "--output", tmp_path / "out", "--image", photographs / "a.png", photographs / "A.png")
    named = {Path(row["file"]).name: row["mask"] for row in table(tmp_path / "out")}
    assert set(named) == {"a.png", "A.png"} and len({mask.lower() for mask in named.values()}) == 2


def test_recursive(tmp_path, weights, photographs, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    names = ["a/left/1.png", "a/2.png", "b/left/1.png", "b/.thumbnails/1.png"]
    for number, name in enumerate(names, start=1):
        (photographs / name).parent.mkdir(parents=True, exist_ok=True)
        Image.open(photographs / f"0{number}.png").save(photographs / name)
    (photographs / "b" / "link").symlink_to(photographs)  # a circle
    flags = ("--weights", weights, "--image", photographs / "a", photographs / "b", "--report", "--overlay")
    assert f"{photographs / 'b'}: no photographs there" in fails(capsys, *flags)
    for where in ((), ("--output", "photographs/b/left/masks"), ("--output", "photographs/b/left/masks")):
        run(*flags, "--recursive", *where)
        out = tmp_path / (where[1] if where else "predictions")
        assert [row["file"] for row in table(out)] == [f"{photographs.as_posix()}/{names[n]}" for n in (1, 0, 2)]
        masks = ["2_vessels.png", "a_left_1_png_vessels.png", "b_left_1_png_vessels.png"]
        assert [name for name in files(out) if name.endswith("vessels.png")] == masks
    output = capsys.readouterr().out
    left, right = photographs / "a/left/1.png", photographs / "b/left/1.png"
    for line in ("2.png: vessels", f"{left}: vessels", f"{right}: segmented"):
        assert f"] {line}" in output  # as two have one name
    overlay = photographs / "b/left/masks/2_overlay.png"
    left_out = f"12 pictures that this program wrote ({overlay}, ...)"  # 6 are thumbnails
    assert [line for line in output.splitlines() if "left out" in line] == [
        f"--image: left out {left_out}; name them as files to take them for photographs"
    ]


def test_pictures_of_an_earlier_run_are_no_photographs(working_directory, weights, photographs, capsys):
    Image.open(photographs / "01.png").save("a.png")
    flags = ("--weights", weights, "--overlay", "--save-prob", "--image")
    written = ["a.png", "test_result.png", "test_result_overlay.png", "test_result_probability.png"]
    for images in ([Path()], [Path()], ["*.png"]):
        run(*flags, *images)
        assert files(working_directory) == written
    for output, left_out in (("b.png", 3), ("b.png", 6), ("a_vessels.png", 3), ("a_vessels.png", 6)):
        capsys.readouterr()
        run(*flags, ".", "--output", output)
        assert f"left out {left_out} pictures that this program wrote (" in capsys.readouterr().out
        if left_out == 6:
            for name in ("b.png", "b_overlay.png", "b_probability.png"):  # only the flag tells that b.png is one
                Path(name).unlink(missing_ok=True)
    run(*flags, "a.png", "test_result.png")  # as files they are photographs
    assert len(table(working_directory / "predictions")) == 2


def test_photographs_are_never_taken_for_pictures_of_this_program(working_directory, weights, photographs, capsys):
    for name in ("a.png", "test_result.png", "c_vessels.png"):
        Image.open(photographs / "01.png").convert("L" if name == "test_result.png" else "RGB").save(name)
    before = {name: Path(name).read_bytes() for name in files(working_directory)}
    assert "is one file" in fails(capsys, "--weights", weights, "--image", ".", "--output", "a.png")
    run("--weights", weights, "--image", ".")
    assert len(table(working_directory / "predictions")) == 3
    message = "would overwrite a picture that is no mask"
    assert message in fails(capsys, "--weights", weights, "--image", "a.png")
    assert message in fails(capsys, "--weights", weights, "--image", "a.png", "--output", "c_vessels.png")
    assert {name: Path(name).read_bytes() for name in before} == before


@on_posix
def test_long_names(tmp_path, weights, photographs):
    stems = ["a" * 245 + end for end in "12"] + ["\u00e9" * 120 + end for end in "12"]
    for stem in stems:
        Image.open(photographs / "01.png").save(photographs / f"{stem}.png")
    run("--weights", weights, "--image", photographs, "--output", tmp_path / "out", "--report", "--save-prob")
    assert len([name for name in files(tmp_path / "out") if name.endswith("_vessels.png")]) == 8
    assert {row["file"] for row in table(tmp_path / "out")} >= {str(photographs / f"{stem}.png") for stem in stems}


def test_interrupted_runs_keep_the_table_of_what_is_done(tmp_path, weights, photographs, monkeypatch, capsys):
    def stop_at_the_third(path, *args):
        if path.name == "03.png":
            raise KeyboardInterrupt
        return whole(path, *args)

    whole = predict.predict
    monkeypatch.setattr(predict, "predict", stop_at_the_third)
    with pytest.raises(KeyboardInterrupt):
        run("--weights", weights, "--image", photographs, "--output", tmp_path / "out")
    done = [row["mask"][:2] for row in table(tmp_path / "out")]
    assert done in (["01", "02"], ["01", "02", "04"])  # the fourth was begun beside the third, or not yet
    last = f"stopped after {len(done)} of 4 photographs; the same command goes on from here\n"
    assert capsys.readouterr().out.endswith(last)
    monkeypatch.setattr(predict, "predict", whole)
    run("--weights", weights, "--image", photographs, "--output", tmp_path / "out")
    assert [": segmented before" in line for line in lines_of(capsys)] == [True, True, False, "04" in done]
    assert sorted(row["mask"][:2] for row in table(tmp_path / "out")) == ["01", "02", "03", "04"]


def test_ctrl_c_ends_with_130(weights, photographs, monkeypatch, tmp_path):
    def stop(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(predict, "predict", stop)
    flags = ["--weights", str(weights), "--image", str(photographs), "--output", str(tmp_path / "out")]
    with pytest.raises(SystemExit) as stopped:
        run_script(predict.main, predict.parse_args(flags))
    assert stopped.value.code == 130


# ---- the table, and runs that go on


@pytest.fixture
def segmented(tmp_path, weights, photographs, capsys):
    """The flags of a run over four photographs, which has ended; and the folder of its masks."""
    flags = ("--weights", weights, "--image", photographs, "--output", tmp_path / "out")
    run(*flags)
    capsys.readouterr()
    return flags, tmp_path / "out"


def lines_of(capsys):
    return [line for line in capsys.readouterr().out.splitlines() if line.startswith("[")]


def kept(capsys, *flags):
    """Run again; return of which photographs the masks were kept."""
    run(*flags)
    return [number for number, line in enumerate(lines_of(capsys), start=1) if ": segmented before" in line]


def test_a_second_run_keeps_what_is_there(segmented, capsys):
    flags, out = segmented
    before = {path: path.read_bytes() for path in out.iterdir()}
    times = {path: path.stat().st_mtime_ns for path in out.glob("*.png")}
    assert kept(capsys, *flags) == [1, 2, 3, 4]
    assert before == {path: path.read_bytes() for path in out.iterdir()}
    assert times == {path: path.stat().st_mtime_ns for path in out.glob("*.png")}
    assert kept(capsys, *flags, "--overwrite") == []
    assert times != {path: path.stat().st_mtime_ns for path in out.glob("*.png")}


@pytest.mark.parametrize(
    "changed", [("--threshold", "0.7"), ("--overlay",), ("--roi-mask", "none"), ("--scale", "1.5"), ("--tta",)]
)
def test_a_second_run_with_other_flags_begins_anew(segmented, capsys, changed):
    flags, out = segmented
    run(*flags, *changed)
    lines = lines_of(capsys)
    assert len(lines) == 4 and not any("segmented before" in line for line in lines)
    other = changed != ("--overlay",)  # of the same mask
    assert all(("(in place of the one with other weights or flags)" in line) == other for line in lines)
    assert kept(capsys, *flags, *changed) == [1, 2, 3, 4]
    assert len(table(out)) == 4


def test_pictures_that_no_table_tells_of_stay(tmp_path, weights, photographs, capsys):
    """They may be labels, drawn by hand: `--output` may name their folder by mistake."""
    labels = tmp_path / "labels"
    labels.mkdir()
    label = labels / "03_vessels.png"
    Image.new("L", (80, 72), 255).save(label)
    before = label.read_bytes()
    flags = "--weights", weights, "--image", photographs, "--output", labels
    message = fails(capsys, *flags)
    assert f"--output {labels}: 03_vessels.png is there, and no predictions.csv" in message and "--overwrite" in message
    assert label.read_bytes() == before and files(labels) == ["03_vessels.png"]
    run(*flags, "--overwrite")
    assert label.read_bytes() != before


@pytest.mark.parametrize("changed", [("--recursive",), ("--device", "cuda"), ("--report",)])
def test_flags_that_no_mask_depends_on(segmented, capsys, changed):
    flags, _ = segmented
    if torch.cuda.is_available() and "cuda" in changed:
        pytest.skip("there cuda is another device than the CPU")
    run(*flags, *changed)
    assert not any("in place of" in line for line in lines_of(capsys))


def test_pictures_of_a_mask_that_stays_stay(segmented, capsys):
    flags, out = segmented
    run(*flags, "--save-prob")
    run(*flags, "--overlay")
    assert not any("in place of" in line for line in lines_of(capsys))
    assert len(files(out)) == 4 * 3 + 1


def test_a_photograph_may_have_the_name_of_a_mask(tmp_path, weights, photographs, capsys):
    for name, source in (("x.png", "01.png"), ("x_vessels.png", "02.png")):
        (photographs / source).rename(photographs / name)
    flags = ("--weights", weights, "--output", tmp_path / "out")
    images = ("--image", photographs / "x.png", photographs / "x_vessels.png")
    run(*flags, *images)
    assert [row["mask"] for row in table(tmp_path / "out")] == ["x_vessels.png", "x_vessels_vessels.png"]
    (photographs / "x_vessels.png").write_bytes(b"no picture")
    assert "x_vessels.png: not an image" in fails_of_many(capsys, *flags, *images)
    assert "not an image" in fails_of_many(capsys, *flags, *images)


def test_a_second_run_in_the_same_folder_is_refused(tmp_path, weights, photographs):
    command = [sys.executable, PROJECT / "predict.py", "--device", "cpu", "--weights", weights]
    command += ["--image", photographs, "--output", tmp_path / "out"]
    with PredictionTable(None) as nothing:
        assert nothing.former(Path("a_vessels.png")) is None
    (tmp_path / "out").mkdir()
    with PredictionTable(tmp_path / "out" / "predictions.csv"):
        second = subprocess.run(command, capture_output=True, text=True)
        assert second.returncode == 1 and "another run is writing there (process " in second.stderr
        assert second.stderr.count("\n") == 1
    run("--weights", weights, "--image", photographs, "--output", tmp_path / "out")
    assert len(table(tmp_path / "out")) == 4 and not list((tmp_path / "out").glob("*.lock"))


def test_a_second_run_that_writes_the_same_mask_is_refused(tmp_path, weights, photographs):
    flags = ("--weights", weights, "--image", photographs / "01.png", "--output")
    with FolderLock(lock_path(tmp_path / "a.png"), "--output"):
        command = [sys.executable, PROJECT / "predict.py", "--device", "cpu", *flags, tmp_path / "a.png"]
        second = subprocess.run(command, capture_output=True, text=True)
        assert second.returncode == 1 and "another run is writing there (process " in second.stderr
        run(*flags, tmp_path / "b.png")  # of another name
    run(*flags, tmp_path / "a.png")
    assert {"a.png", "b.png"} < set(files(tmp_path)) and not list(tmp_path.glob(".*.lock"))


def test_no_mask_of_other_flags_is_taken_for_one_of_before(segmented, capsys, monkeypatch):
    """A run that ends between a new mask and its row."""
    flags, out = segmented
    before = {path.name: path.read_bytes() for path in out.glob("*.png")}

    def stop(*args):
        raise RuntimeError("killed")

    with monkeypatch.context() as patch:
        patch.setattr(predict, "facts", stop)
        with pytest.raises(RuntimeError):
            run(*flags, "--threshold", "0.001")
    assert (out / "01_vessels.png").read_bytes() != before["01_vessels.png"]
    run(*flags)
    assert before == {path.name: path.read_bytes() for path in out.glob("*.png")}
    capsys.readouterr()
    assert kept(capsys, *flags) == [1, 2, 3, 4]


def test_a_photograph_keeps_its_mask_when_others_of_its_name_come(segmented, capsys, photographs):
    flags, out = segmented
    (photographs / "more").mkdir()
    shutil.copy(photographs / "02.png", photographs / "more" / "01.png")
    Image.open(photographs / "03.png").save(photographs / "01.tif")
    assert kept(capsys, *flags, "--recursive") == [1, 3, 4, 5]
    names = {Path(row["file"]).relative_to(photographs).as_posix(): row["mask"] for row in table(out)}
    assert names == {
        "01.png": "01_vessels.png",
        "01.tif": "01_tif_vessels.png",
        "02.png": "02_vessels.png",
        "03.png": "03_vessels.png",
        "04.png": "04_vessels.png",
        "more/01.png": "more_01_png_vessels.png",
    }
    assert kept(capsys, *flags, "--recursive") == [1, 2, 3, 4, 5, 6]


def test_a_photograph_keeps_its_mask_after_it_failed(segmented, capsys, photographs):
    flags, out = segmented
    (photographs / "more").mkdir()
    shutil.copy(photographs / "02.png", photographs / "more" / "01.png")
    run(*flags, "--recursive")
    whole = (photographs / "more" / "01.png").read_bytes()
    (photographs / "more" / "01.png").write_bytes(b"no picture")
    assert "not an image" in fails_of_many(capsys, *flags, "--recursive")
    (photographs / "more" / "01.png").write_bytes(whole)
    run(*flags[:2], "--image", photographs / "more" / "01.png", "--output", out)
    masks = [row["mask"] for row in table(out) if row["file"].endswith("more/01.png")]
    assert masks == ["more_01_png_vessels.png"]


def test_no_two_photographs_get_the_same_mask():
    photographs = [Path("a/1.png"), Path("a/1_png.tif"), Path("a/2.png")]
    known = {whole_path(photographs[0]): "1_png_vessels.png", whole_path(Path("b/2.png")): "2_vessels.png"}
    first, second, third = mask_names(photographs, known)
    assert first == "1_png_vessels.png" and re.fullmatch("1_png_[0-9a-f]{16}_vessels.png", second)
    assert third == "2_vessels.png"  # b/2.png is not among them


def test_the_page_of_other_masks_is_removed_where_the_table_is_gone(segmented, capsys):
    flags, out = segmented
    run(*flags, "--report")
    (out / "predictions.csv").unlink()
    run(*flags, "--overwrite", "--threshold", "0.001")
    assert not (out / "predictions.html").exists()


def test_a_damaged_table_is_one_line(segmented, capsys):
    flags, out = segmented
    path = out / "predictions.csv"
    path.write_text(path.read_text().splitlines(keepends=True)[0] + '"' + "a" * 200_000 + "\n")
    assert "predictions.csv there is damaged" in fails(capsys, *flags)


def test_whoever_reads_the_lines_may_end(tmp_path, weights, photographs):
    command = [sys.executable, "-u", PROJECT / "predict.py", "--device", "cpu", "--weights", weights]
    command += ["--image", photographs, "--output", tmp_path / "out"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    process.stdout.readline()
    process.stdout.close()
    assert process.stderr.read() == "" and process.wait() == 141


def test_on_windows_a_closed_pipe_is_an_invalid_argument(monkeypatch):
    def main(args):
        raise OSError(errno.EINVAL, "Invalid argument")

    monkeypatch.setattr(command_line, "NOT_READ", (errno.EPIPE, errno.EINVAL))
    with pytest.raises(OSError, match="Invalid argument"):  # where the lines are read, it is another error
        run_script(main, None)
    reader, writer = os.pipe()
    os.close(reader)
    with open(writer, "w") as closed, pytest.raises(SystemExit) as stopped:
        monkeypatch.setattr(sys, "stdout", closed)
        run_script(main, None)
    assert stopped.value.code == 141


def test_pictures_of_a_mask_that_was_replaced_go(segmented, capsys):
    flags, out = segmented
    run(*flags, "--overlay", "--save-prob", "--report")
    assert len(files(out)) == 4 * 3 + 3 and len(files(out / "predictions_thumbnails")) == 8
    capsys.readouterr()
    assert kept(capsys, *flags) == [1, 2, 3, 4] and len(files(out)) == 4 * 3 + 3
    run(*flags, "--threshold", "0.7", "--save-prob")
    assert f"{out / 'predictions.html'}: removed, as it showed other masks" in capsys.readouterr().out
    assert files(out) == sorted(
        [f"0{number}_{kind}.png" for number in (1, 2, 3, 4) for kind in ("vessels", "probability")]
        + ["predictions.csv", "predictions_thumbnails"]
    )
    assert files(out / "predictions_thumbnails") == []


def test_what_changed_is_segmented_anew(segmented, capsys, photographs, weights):
    flags, out = segmented
    Image.open(photographs / "01.png").rotate(90).save(photographs / "02.png")  # another photograph of the same name
    (out / "03_vessels.png").unlink()
    assert kept(capsys, *flags) == [1, 4]
    assert kept(capsys, *flags) == [1, 2, 3, 4]
    checkpoint = torch.load(weights, weights_only=False)
    other = weights.with_name("other.pth")
    torch.save(checkpoint | {"epoch": 99}, other)
    assert kept(capsys, "--weights", other, *flags[2:]) == []


def test_a_changed_roi_mask_is_seen(segmented, capsys, tmp_path):
    flags, _ = segmented
    mask = tmp_path / "mask.png"
    Image.new("L", (80, 72), 255).save(mask)
    assert kept(capsys, *flags, "--roi-mask", mask) == []
    assert kept(capsys, *flags, "--roi-mask", mask) == [1, 2, 3, 4]
    half = Image.new("L", (80, 72), 255)
    half.paste(0, (0, 0, 40, 72))
    half.save(mask)
    assert kept(capsys, *flags, "--roi-mask", mask) == []


def test_failures_are_tried_again(segmented, capsys, photographs):
    flags, out = segmented
    whole = (photographs / "04.png").read_bytes()
    (photographs / "04.png").write_bytes(b"no picture")
    assert f"{photographs / '04.png'}: not an image" in fails_of_many(capsys, *flags)
    row = table(out)[-1]
    assert (row["mask"], row["width"]) == ("", "") and "not an image" in row["error"]
    assert len(table(out)) == 5  # with that of the mask, which is still there
    (photographs / "04.png").write_bytes(whole)
    assert kept(capsys, *flags) == [1, 2, 3, 4]
    assert not (out / "04_overlay.png").exists()


def fails_of_many(capsys, *flags):
    with pytest.raises(SystemExit):
        run_script(predict.main, predict.parse_args(["--device", "cpu", *map(str, flags)]))
    return capsys.readouterr().err


def test_the_mask_of_another_photograph_stays(segmented, capsys, photographs, tmp_path):
    flags, out = segmented
    (tmp_path / "others").mkdir()
    Image.open(photographs / "01.png").rotate(90).save(tmp_path / "others" / "02.png")
    other = (*flags[:2], "--image", tmp_path / "others", "--output", out)
    before = (out / "02_vessels.png").read_bytes()
    assert f"02_vessels.png is the mask of {(photographs / '02.png').as_posix()}" in fails(capsys, *other)
    assert "02_vessels.png is the mask of" in fails(capsys, *other)  # and so it stays
    assert (out / "02_vessels.png").read_bytes() == before
    assert kept(capsys, *flags) == [1, 2, 3, 4]
    run(*other, "--overwrite")
    assert (out / "02_vessels.png").read_bytes() != before
    assert [row["file"] for row in table(out) if row["mask"] == "02_vessels.png"] == [
        (tmp_path / "others/02.png").as_posix()
    ]
    capsys.readouterr()
    # The same photograph from another folder is the same.
    shutil.copy(photographs / "03.png", tmp_path / "others")
    assert kept(capsys, *flags[:2], "--image", tmp_path / "others/03.png", "--output", out) == [1]


def test_the_mask_of_another_photograph_of_the_same_relative_name_stays(
    tmp_path, weights, photographs, capsys, monkeypatch
):
    for patient, photograph in (("anna", "01.png"), ("berta", "02.png")):
        (tmp_path / patient).mkdir()
        (photographs / photograph).rename(tmp_path / patient / "left.png")
    flags = ("--weights", weights, "--image", "left.png", "--output", tmp_path / "out")
    monkeypatch.chdir(tmp_path / "anna")
    run(*flags)
    before = (tmp_path / "out" / "left_vessels.png").read_bytes()
    monkeypatch.chdir(tmp_path / "berta")
    assert f"left_vessels.png is the mask of {tmp_path.as_posix()}/anna/left.png" in fails(capsys, *flags)
    assert (tmp_path / "out" / "left_vessels.png").read_bytes() == before
    # Named in another way it is the same photograph still, though its content changes; where it was moved to is told.
    shutil.copy("left.png", "../anna/left.png")
    run(*flags[:3], "../anna/left.png", *flags[4:])
    assert (tmp_path / "out" / "left_vessels.png").read_bytes() != before
    os.rename("../anna", "../anne")
    capsys.readouterr()
    assert kept(capsys, *flags[:3], "../anne/left.png", *flags[4:]) == [1]
    found = {row["file"]: row["mask"] for row in table(tmp_path / "out")}
    here = tmp_path.as_posix()
    assert found == {f"{here}/anne/left.png": "left_vessels.png", f"{here}/berta/left.png": ""}


def test_the_mask_beside_a_bare_name(shared_drive, monkeypatch):
    test = shared_drive / "DRIVE" / "test"
    for place, name in (
        (test, "images/01_test.tif"),
        (test / "images", "01_test.tif"),
        (test / "mask", "../images/01_test.tif"),
    ):
        monkeypatch.chdir(place)
        assert os.path.samefile(roi_mask_path(Path(name), None), test / "mask" / "01_test_mask.gif")


def test_a_killed_run_goes_on(segmented, capsys):
    flags, out = segmented
    path = out / "predictions.csv"
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(lines[:3]) + lines[3][:20])
    assert kept(capsys, *flags) == [1, 2]
    assert sorted(path.read_text().splitlines()[1:3]) == sorted(line.strip() for line in lines[1:3])
    assert len(table(out)) == 4


def test_pictures_that_no_row_tells_of_stay(segmented, photographs):
    """They may be somebody's own."""
    flags, out = segmented
    (photographs / "01.png").rename(photographs / "new.png")
    (out / "new_overlay.png").write_bytes(b"somebody's")
    run(*flags)
    assert (out / "new_overlay.png").read_bytes() == b"somebody's"


def test_a_photograph_in_the_place_of_a_thumbnail_is_no_output(segmented, photographs, capsys):
    flags, out = segmented
    thumbnail = out / "predictions_thumbnails" / "01_plain.jpg"
    thumbnail.parent.mkdir()
    shutil.copy(photographs / "02.png", thumbnail)
    assert "would overwrite the input" in fails(capsys, *flags[:4], thumbnail, *flags[4:], "--threshold", "0.7")
    assert thumbnail.exists()


def test_a_table_of_relative_paths_goes_on(tmp_path, weights, photographs, monkeypatch, capsys):
    """As earlier versions wrote it."""
    monkeypatch.chdir(tmp_path)
    flags = ("--weights", weights, "--image", "photographs", "--output", "out")
    whole = (photographs / "04.png").read_bytes()
    (photographs / "04.png").write_bytes(b"no picture")
    fails_of_many(capsys, *flags)
    path = tmp_path / "out" / "predictions.csv"
    path.write_text(path.read_text().replace(f"{tmp_path.as_posix()}/", ""))
    assert {row["file"] for row in table(tmp_path / "out")} == {f"photographs/0{number}.png" for number in range(1, 5)}
    (photographs / "04.png").write_bytes(whole)
    Image.open(photographs / "01.png").rotate(90).save(photographs / "02.png")
    assert kept(capsys, *flags) == [1, 3]
    assert [row["file"] for row in table(tmp_path / "out")] == [
        f"{photographs.as_posix()}/0{number}.png" for number in (1, 2, 3, 4)
    ]


def test_rows_are_there_as_soon_as_their_masks(tmp_path, weights, photographs, monkeypatch):
    """Two photographs are worked on at once, and few wait behind the first one."""
    for path in list(photographs.iterdir()):
        for number in range(2):
            shutil.copy(path, path.with_stem(f"{path.stem}_{number}"))
    seen, whole = [], predict.predict

    def look(path, *args):
        seen.append(len(table(tmp_path / "out")))
        return whole(path, *args)

    monkeypatch.setattr(predict, "predict", look)
    run("--weights", weights, "--image", photographs, "--output", tmp_path / "out")
    assert len(seen) == 12
    assert all(rows >= number - 2 - MOST_HELD for number, rows in enumerate(seen, start=1))


@pytest.mark.slow
@pytest.mark.parametrize("kills", [50])
def test_random_kills_lose_nothing(tmp_path, weights, kills):
    photographs, out = tmp_path / "photographs", tmp_path / "out"
    photographs.mkdir()
    for number in range(30):
        picture = synthetic_photograph(120, 110, np.random.default_rng(number))[0]
        Image.fromarray(picture).save(photographs / f"{number:02d}.png")
    run("--weights", weights, "--image", photographs, "--output", tmp_path / "whole")
    names = [f"{number:02d}_vessels.png" for number in range(30)]
    command = [sys.executable, PROJECT / "predict.py", "--device", "cpu", "--weights", weights]
    command += ["--image", photographs, "--output", out]
    moments, seen = np.random.default_rng(0), 0
    for _ in range(kills):
        process = subprocess.Popen([*command, "--overwrite"], stdout=subprocess.PIPE, text=True)
        for _ in range(moments.integers(2, 20)):  # lines until the network works, and some photographs
            process.stdout.readline()
        time.sleep(moments.uniform(0, 0.05))
        process.kill()
        process.communicate()
        text = (out / "predictions.csv").read_text() if (out / "predictions.csv").exists() else ""
        rows = list(csv.DictReader(text[: text.rfind("\n") + 1].splitlines()))
        seen += len(rows)
        for row in rows:
            assert (out / row["mask"]).read_bytes() == (tmp_path / "whole" / row["mask"]).read_bytes()
    assert seen > kills
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    assert files(out) == sorted([*names, "predictions.csv"])
    assert sorted(row["mask"] for row in table(out)) == names
    assert all((out / name).read_bytes() == (tmp_path / "whole" / name).read_bytes() for name in names)


@pytest.mark.parametrize("content", ["patient,diagnosis\n1,none\n", "\n", "file,other\n"])
def test_a_table_of_something_else_stays(tmp_path, weights, photographs, capsys, content):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "predictions.csv").write_text(content)
    message = fails(capsys, "--weights", weights, "--image", photographs, "--output", tmp_path / "out")
    assert "predictions.csv there is not of predict.py; choose another folder" in message
    assert (tmp_path / "out" / "predictions.csv").read_text() == content


def test_a_table_of_an_earlier_version_begins_anew(segmented, capsys):
    flags, out = segmented
    rows = table(out)
    names = ["file", "width", "height", "field_of_view_diameter", "scale", "vessel_share", "seconds"]
    write_csv(out / "predictions.csv", names, [{name: row[name] for name in names} for row in rows])
    assert kept(capsys, *flags) == []
    assert len(table(out)) == 4


@pytest.mark.parametrize(
    "name",
    [
        "plain.png",
        pytest.param("a\\xff.png", marks=on_posix),
        "line\nbreak.png",
        "caf\u00e9.png",
        pytest.param("odd\udcff.png", marks=on_posix),
    ],
)
def test_names_in_the_table_can_be_read_back(name):
    text = escaped(Path(name))
    assert text.isprintable() and text.encode().decode() == text
    back = re.sub(
        rb"\\(\\|x[0-9a-f]{2}|U[0-9a-f]{8})",
        lambda found: (
            b"\\"
            if found[1] == b"\\"
            else bytes([int(found[1][1:], 16)])
            if found[1].startswith(b"x")
            else chr(int(found[1][1:], 16)).encode()
        ),
        text.encode(),
    )
    assert back == os.fsencode(name)


# ---- odd files and names


def add_odd_files(folder):
    """What is no photograph, by name, with what is to be said of it."""
    os.mkfifo(folder / "fifo.png")
    (folder / "loop.png").symlink_to("loop.png")
    (folder / "broken.png").symlink_to("missing.png")
    Image.new("RGB", (40, 30)).save(folder / "postscript.jpg", format="EPS")
    return {
        "fifo.png": "is a FIFO, a socket or a device, not a file",
        "loop.png": "cannot be read (Too many levels of symbolic links)",
        "broken.png": "a link to a file that is not there",
        "postscript.jpg": "not an image of a known format",
    }


@on_posix
@pytest.mark.parametrize("named", ["folder", "pattern", "files"])
def test_odd_files_are_failures_of_their_own(tmp_path, weights, photographs, capsys, named):
    odd = add_odd_files(photographs)
    images = {"folder": [photographs], "pattern": [photographs / "*"], "files": sorted(photographs.iterdir())}[named]
    flags = ["--device", "cpu", "--weights", weights, "--output", tmp_path / "out", "--image", *images]
    with pytest.raises(SystemExit) as stopped:
        run_script(predict.main, predict.parse_args(list(map(str, flags))))
    assert stopped.value.code == 1
    assert [Path(row["file"]).name for row in table(tmp_path / "out") if row["error"]] == sorted(odd)
    first, *lines = capsys.readouterr().err.splitlines()
    assert "4 of 8 photographs failed" in first and len(lines) == 4
    assert all(any(f"{photographs / name}: {reason}" in line for line in lines) for name, reason in odd.items())


@on_posix
def test_odd_files_alone_are_refused(weights, photographs, capsys):
    odd = add_odd_files(photographs)
    for name, reason in odd.items():
        assert f"{name}: {reason}" in fails(capsys, "--weights", weights, "--image", photographs / name)
    flags = ("--weights", weights, "--image", photographs / "01.png")
    for name in ("fifo.png", "postscript.jpg"):
        assert f"{name}: {odd[name]}" in fails(capsys, *flags, "--roi-mask", photographs / name)
    for name in ("loop.png", "broken.png"):
        assert f"{name}: no such file or folder" in fails(capsys, *flags, "--roi-mask", photographs / name)
    long = "a" * 300 + ".png"
    assert f"{long}: no such file" in fails(capsys, "--weights", weights, "--image", long)
    assert f"--roi-mask {long}: no such file" in fails(capsys, *flags, "--roi-mask", long)
    assert f"--output {long[:-4]}: cannot be written" in fails(capsys, *flags, "--output", long[:-4])
    assert f"{long}: cannot be written" in fails(capsys, *flags, "--output", long)
    loop = photographs / "loop.png"
    assert f"--output {loop}: cannot be written" in fails(capsys, *flags, "--output", loop / "a.png")


@on_posix
def test_names_of_several_lines(tmp_path, weights, photographs, capsys):
    (photographs / "01.png").rename(photographs / "a\n\x1bb.png")
    flags = ("--weights", weights, "--image", photographs, "--output", tmp_path / "out")
    for told in ("vessels", "segmented before"):
        run(*flags)
        assert rf"] a\n\x1bb.png: {told}" in capsys.readouterr().out
    run(*flags[:2], "--image", photographs / "a\n\x1bb.png", "--output", tmp_path / "a.png")
    assert r"a\n\x1bb.png: 80 x 72" in capsys.readouterr().out


@on_posix
@pytest.mark.parametrize("locale", [{"PYTHONIOENCODING": "utf-8"}, {"PYTHONIOENCODING": "ascii"}, {"LC_ALL": "C"}])
def test_names_that_the_terminal_cannot_show(tmp_path, weights, photographs, locale):
    for name, source in ((b"\xff.png", "01"), ("\u00e9.png".encode(), "02"), (b"\xfe.png", None)):
        path = photographs / os.fsdecode(name)
        Image.open(photographs / f"{source}.png").save(path) if source else path.write_bytes(b"no picture")
    command = [sys.executable, PROJECT / "predict.py", "--weights", weights, "--image", photographs, "--report"]
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("LC_", "LANG", "PYTHON"))}
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, env=environment | locale)
    assert b"Traceback" not in done.stderr and done.returncode == 1
    assert rb"\udcfe.png: not an image" in done.stderr
    assert rb"] \udcff.png: vessels" in done.stdout
    ascii = "ascii" in locale.values()
    assert (rb"] \xe9.png: vessels" if ascii else "] \u00e9.png: vessels".encode()) in done.stdout
    assert os.fsdecode(b"\xff_vessels.png") in files(tmp_path / "predictions")


def test_a_name_that_begins_with_a_dash(working_directory, weights, photographs, capsys):
    Image.open(photographs / "01.png").save("-dash.png")
    run("--weights", weights, "--image=-dash.png", "--output", "a.png")
    run("--weights", weights, "--image", "./-dash.png", "--output", "b.png")
    assert Path("a.png").read_bytes() == Path("b.png").read_bytes()
    with pytest.raises(SystemExit):
        predict.parse_args(["--image", "-dash.png"])
    assert "give a value that begins with a dash as --flag=-value" in capsys.readouterr().err


# ---- the field of view


def test_roi_masks(tmp_path, weights, photographs, shared_drive):
    image = photographs / "01.png"
    masks = tmp_path / "masks"
    masks.mkdir()
    left = np.zeros((72, 80), np.uint8)
    left[:, :30] = 255
    Image.fromarray(left).save(masks / "01_mask.tif")
    Image.fromarray(255 - left).save(masks / "02.png")

    def vessels(roi_mask, image=image):
        run(
            "--weights", weights, "--image", image, "--output", tmp_path / "a.png", "--scale", 1, "--roi-mask", roi_mask
        )
        return pixels(tmp_path / "a.png") > 0

    everywhere = vessels("none")
    np.testing.assert_array_equal(vessels("auto"), everywhere & find_field_of_view(read_photograph(image)))
    np.testing.assert_array_equal(vessels(masks), everywhere & (left > 0))
    np.testing.assert_array_equal(vessels(masks / "02.png"), everywhere & (left == 0))
    second = photographs / "02.png"
    np.testing.assert_array_equal(vessels(masks, second), vessels("none", second) & (left == 0))
    # Of DRIVE, the mask beside the images is taken unasked.
    official = shared_drive / "DRIVE" / "test"
    run("--weights", weights, "--image", official / "images" / "01_test.tif", "--output", tmp_path / "b.png")
    inside = pixels(official / "mask" / "01_test_mask.gif") > 0
    np.testing.assert_array_equal(pixels(tmp_path / "b.png") > 0, everywhere & inside)


def test_wrong_roi_masks(tmp_path, weights, photographs, capsys):
    masks = tmp_path / "masks"
    masks.mkdir()
    for name, picture in {
        "small.png": np.full((70, 80), 255, np.uint8),
        "black.png": np.zeros((72, 80), np.uint8),
        "grey.png": np.full((72, 80), 99, np.uint8),
        "02.png": np.full((72, 80), 255, np.uint8),
        "02_mask.png": np.full((72, 80), 255, np.uint8),
    }.items():
        Image.fromarray(picture).save(masks / name)
    (masks / "text.png").write_bytes(b"no picture")

    def message(roi_mask, image="01.png"):
        return fails(capsys, "--weights", weights, "--image", photographs / image, "--roi-mask", roi_mask)

    assert "small.png: is 80 x 70 pixels" in message(masks / "small.png")
    assert "black.png: is black everywhere" in message(masks / "black.png")
    assert "grey.png" in message(masks / "grey.png") and "99" in message(masks / "grey.png")
    assert "text.png: not an image" in message(masks / "text.png")
    assert "needs one 01.* or 01_mask.*" in message(masks)
    assert "both" in message(masks, "02.png")
    assert f"--roi-mask {masks / 'missing.png'}: no such file" in message(masks / "missing.png")


def test_names_of_roi_masks_may_be_composed_in_another_way(tmp_path):
    composed, decomposed = (unicodedata.normalize(form, "Müller") for form in ("NFC", "NFD"))
    (tmp_path / f"{composed}_mask.png").touch()
    assert roi_mask_path(Path(f"{decomposed}.jpg"), str(tmp_path)).stem == f"{composed}_mask"


def test_roi_masks_of_dr_hagis(tmp_path):
    """By the name that training knows too; another one of the photograph comes first."""
    (tmp_path / "1_mask_orig.png").touch()
    assert roi_mask_path(Path("1.jpg"), str(tmp_path)).name == "1_mask_orig.png"
    (tmp_path / "1_mask.png").touch()
    assert roi_mask_path(Path("1.jpg"), str(tmp_path)).name == "1_mask.png"


def test_a_mask_of_a_part_of_the_retina_does_not_change_its_size(tmp_path, photographs):
    image = photographs / "01.png"
    photograph = read_photograph(image)
    found = find_field_of_view(photograph)
    for diameter, retina_is_found in ((24, True), (66, False)):
        mask = disc(72, 80, diameter)
        path = tmp_path / f"{diameter}.png"
        Image.fromarray(mask).save(path)
        field_of_view, retina = choose_field_of_view(image, photograph, str(path))
        np.testing.assert_array_equal(field_of_view, mask)
        np.testing.assert_array_equal(retina, found | mask if retina_is_found else mask)
    assert found.sum() > 2 * disc(72, 80, 24).sum()


# ---- scale, and the other flags


def test_scale(tmp_path, weights, photographs, monkeypatch):
    scales = []

    def remember(photograph, field_of_view, scale, prepare):
        scales.append(scale)
        return prepare_at_scale(photograph, field_of_view, scale, prepare)

    monkeypatch.setattr(segmenter, "prepare_at_scale", remember)
    large = tmp_path / "large.png"
    photograph, _, _ = synthetic_photograph(320, 288, np.random.default_rng(0))
    Image.fromarray(photograph).save(large)
    for flags in ([large], [large, "--scale", "1"], [large, "--scale", "0.6"], [photographs / "01.png"]):
        run("--weights", weights, "--output", tmp_path / "a.png", "--image", *flags)
    assert scales == [pytest.approx(0.25, rel=0.03), 1, 0.6, 1]
    run("--weights", weights, "--output", tmp_path / "a.png", "--image", large, "--roi-mask", "none")
    assert scales[-1] == scales[0]  # the vessels are as wide without a mask
    assert Image.open(tmp_path / "a.png").size == (320, 288)


def test_bright_surroundings_do_not_matter(tmp_path, weights, photographs):
    photograph = read_photograph(photographs / "01.png")
    inside = disc(72, 80, 70)
    Image.fromarray(np.where(inside[..., None], photograph, 255).astype(np.uint8)).save(tmp_path / "white.png")
    run("--weights", weights, "--image", tmp_path / "white.png", "--output", tmp_path / "w.png")
    run("--weights", weights, "--image", photographs / "01.png", "--output", tmp_path / "b.png")
    inner = disc(72, 80, 40)
    same = pixels(tmp_path / "w.png")[inner] == pixels(tmp_path / "b.png")[inner]
    assert same.mean() > 0.9


def test_probability_overlay_and_threshold(tmp_path, weights, photographs):
    image = photographs / "01.png"
    flags = ("--weights", weights, "--image", image, "--roi-mask", "none")
    run(*flags, "--output", tmp_path / "out", "--save-prob", "--overlay")
    assert files(tmp_path / "out") == ["01_overlay.png", "01_probability.png", "01_vessels.png", "predictions.csv"]
    with Image.open(tmp_path / "out" / "01_probability.png") as stored:
        assert stored.mode in ("I", "I;16") and stored.size == (80, 72)  # "I" by an older Pillow
        probability = np.array(stored) / 65535
    expected = segment(load_model(weights, CPU)[0], read_photograph(image), MEAN, STD)[0].numpy()
    np.testing.assert_allclose(probability, expected, atol=1e-5)

    mask = pixels(tmp_path / "out" / "01_vessels.png") > 0
    overlay, photograph = pixels(tmp_path / "out" / "01_overlay.png"), read_photograph(image)
    np.testing.assert_array_equal(overlay[~mask], photograph[~mask])
    assert (overlay[mask] != photograph[mask]).any(axis=1).all()

    run(*flags, "--output", tmp_path / "a.png", "--threshold", "0.8", "--save-prob", "--overlay")
    np.testing.assert_array_equal(pixels(tmp_path / "a.png") > 0, expected > 0.8)
    assert (tmp_path / "a_probability.png").exists() and (tmp_path / "a_overlay.png").exists()


def test_the_probability_is_nothing_outside_the_field_of_view(tmp_path, weights, photographs):
    run("--weights", weights, "--image", photographs / "01.png", "--output", tmp_path / "a.png", "--save-prob")
    outside = ~find_field_of_view(read_photograph(photographs / "01.png"))
    assert (pixels(tmp_path / "a_probability.png")[outside] == 0).all() and outside.any()


def test_threshold_auto(tmp_path, weights, photographs, capsys):
    stored = save(tmp_path / "stored.pth", make_model(), threshold=0.37)
    flags = ("--image", photographs / "01.png", "--output")
    run("--weights", stored, *flags, tmp_path / "auto.png", "--threshold", "auto")
    assert f"threshold 0.37 (from {stored})" in capsys.readouterr().out
    run("--weights", weights, *flags, tmp_path / "given.png", "--threshold", "0.37")
    assert (tmp_path / "auto.png").read_bytes() == (tmp_path / "given.png").read_bytes()
    run("--weights", weights, *flags, tmp_path / "none.png", "--threshold", "auto")
    assert f"threshold 0.5 (none is stored in {weights})" in capsys.readouterr().out


def test_tiles_flips_and_batches_reach_the_model(tmp_path, weights):
    image = tmp_path / "large.png"
    Image.fromarray(synthetic_photograph(200, 180, np.random.default_rng(0))[0]).save(image)
    options = ("--tile", 96, "--tta", "--batch-size", 3, "--scale", 1, "--roi-mask", "none", "--save-prob")
    run("--weights", weights, "--image", image, "--output", tmp_path / "a.png", *options)
    model, _ = load_model(weights, CPU)
    expected = segment(model, read_photograph(image), MEAN, STD, tile=96, flips=True, batch_size=3)[0].numpy()
    np.testing.assert_allclose(pixels(tmp_path / "a_probability.png") / 65535, expected, atol=1e-5)


def test_amp_is_bfloat16_on_a_cpu(tmp_path, weights, photographs, capsys):
    for name, *flags in (("plain",), ("amp", "--amp"), ("bfloat16", "--amp", "--amp-dtype", "bfloat16")):
        output = ("--output", tmp_path / f"{name}.png", "--save-prob")
        run("--weights", weights, "--image", photographs / "01.png", *output, *flags)
    assert capsys.readouterr().out.count("--amp: bfloat16 on cpu; it pays only where") == 2
    plain, amp, bfloat16 = (
        pixels(tmp_path / f"{name}_probability.png") / 65535 for name in ("plain", "amp", "bfloat16")
    )
    assert np.array_equal(amp, bfloat16) and not np.array_equal(amp, plain)
    np.testing.assert_allclose(amp, plain, atol=0.05)


def test_more_than_two_classes_give_labels(tmp_path, photographs, capsys):
    model = make_model(num_classes=4)
    weights = save(tmp_path / "arteries.pth", model)
    flags = ("--weights", weights, "--image", photographs / "01.png", "--roi-mask", "none")
    run(*flags, "--output", tmp_path / "a.png", "--overlay", "--save-prob")
    with torch.inference_mode():
        image, _ = get_transform(False, MEAN, STD)(Image.open(photographs / "01.png"), Image.new("L", (80, 72)))
        logits = model.eval()(image[None])["out"][0]
    labels = logits.argmax(0).numpy()
    assert len(np.unique(labels)) > 2
    np.testing.assert_array_equal(pixels(tmp_path / "a.png"), labels)
    expected = 1 - logits.double().softmax(0)[0].numpy()
    np.testing.assert_allclose(pixels(tmp_path / "a_probability.png") / 65535, expected, atol=1e-5)
    assert pixels(tmp_path / "a_overlay.png").shape == (72, 80, 3)
    assert "--threshold" in fails(capsys, *flags, "--output", tmp_path / "b.png", "--threshold", "0.4")


@pytest.mark.parametrize("size", [(1, 1), (1, 300), (300, 1), (16, 16)])
def test_tiny_photographs(tmp_path, weights, size):
    Image.new("RGB", size, (180, 90, 40)).save(tmp_path / "tiny.png")
    run("--weights", weights, "--image", tmp_path / "tiny.png", "--output", tmp_path / "a.png", "--overlay")
    assert Image.open(tmp_path / "a.png").size == size


def test_the_displayed_size_of_a_turned_photograph(tmp_path, weights, photographs):
    exif = Image.Exif()
    exif[0x0112] = 6
    stored = Image.open(photographs / "01.png").transpose(Image.Transpose.ROTATE_90)
    stored.save(tmp_path / "turned.png", exif=exif)
    for name, image in (("a.png", tmp_path / "turned.png"), ("b.png", photographs / "01.png")):
        run("--weights", weights, "--image", image, "--output", tmp_path / name)
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()


def huge_photograph(path, height=5200):
    photograph = Image.new("RGB", (height * 3 // 2, height))
    disc = (height // 4, 100, height // 4 + height - 201, height - 101)
    ImageDraw.Draw(photograph).ellipse(disc, fill=(180, 90, 40))
    photograph.save(path, compress_level=1)
    return path


def test_forty_megapixels(tmp_path, weights):
    huge = huge_photograph(tmp_path / "huge.png")
    run("--weights", weights, "--image", huge, "--output", tmp_path / "out")
    (row,) = table(tmp_path / "out")
    assert (row["width"], row["height"]) == ("7800", "5200")
    assert float(row["scale"]) == pytest.approx(68 / 5000, rel=0.01)
    assert Image.open(tmp_path / "out" / "huge_vessels.png").size == (7800, 5200)


@pytest.mark.slow
def test_forty_megapixels_by_tile(tmp_path, weights):
    resource = pytest.importorskip("resource")
    huge = huge_photograph(tmp_path / "huge.png")
    command = [sys.executable, PROJECT / "predict.py", "--weights", weights, "--device", "cpu", "--scale", "1"]
    subprocess.run([*command, "--image", huge, "--output", tmp_path / "out"], check=True)
    assert Image.open(tmp_path / "out" / "huge_vessels.png").size == (7800, 5200)
    assert resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss < 4 * 2**20  # KiB


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="counts KiB, and memory is given back by glibc")
def test_memory_of_a_hundred_megapixels(tmp_path):
    """At most 1.5 GB above the decoded photograph."""
    huge = huge_photograph(tmp_path / "huge.png", height=8400)
    command = [sys.executable, PROJECT / "predict.py", "--weights", PRETRAINED, "--device", "cpu", "--image", huge]
    process = subprocess.Popen([*command, "--output", tmp_path / "out.png", "--overlay", "--save-prob"])
    _, status, used = os.wait4(process.pid, 0)
    process.returncode = status
    assert status == 0
    assert used.ru_maxrss * 1024 < 1.5e9 + 3 * 8400 * 12600


# ---- what cannot work


def test_wrong_weights(tmp_path, photographs, capsys):
    def message(path):
        return fails(capsys, "--weights", path, "--image", photographs / "01.png", "--output", tmp_path / "a.png")

    assert "missing.pth: no such file" in message(tmp_path / "missing.pth")
    (tmp_path / "text.pth").write_text("hello")
    assert "text.pth: not a" in message(tmp_path / "text.pth")
    torch.save({"model": torch.nn.Linear(2, 3).state_dict()}, tmp_path / "linear.pth")
    assert "linear.pth: holds the weights of another model" in message(tmp_path / "linear.pth")
    broken = make_model()
    broken.in_conv[0].weight.data[0, 0, 0, 0] = float("nan")
    assert "nan.pth: the weights hold NaN" in message(save(tmp_path / "nan.pth", broken))
    grey = create_model(base_c=4, in_channels=1)
    assert "grey.pth: a model of 1 input channels" in message(save(tmp_path / "grey.pth", grey))
    code = RunsCode(f"touch {tmp_path / 'executed'}")
    torch.save({"model": make_model().state_dict(), "args": code}, tmp_path / "code.pth")
    assert "code.pth: refused" in message(tmp_path / "code.pth")
    assert not (tmp_path / "executed").exists() and not (tmp_path / "a.png").exists()


def test_wrong_photographs(tmp_path, weights, photographs, capsys):
    for name in make_broken(photographs):
        message = fails(capsys, "--weights", weights, "--image", photographs / name, "--output", tmp_path / "a.png")
        assert str(photographs / name) in message
    empty = tmp_path / "empty"
    empty.mkdir()
    assert f"{empty}: no photographs there" in fails(capsys, "--weights", weights, "--image", empty)
    assert "*.gif: no such file" in fails(capsys, "--weights", weights, "--image", photographs / "*.gif")
    assert not (tmp_path / "a.png").exists()


def test_places_that_cannot_be_written(tmp_path, weights, photographs, capsys):
    (tmp_path / "file").touch()
    for image, output in ((photographs / "01.png", "file/a.png"), (photographs, "file"), (photographs, "file/out")):
        message = fails(capsys, "--weights", weights, "--image", image, "--output", tmp_path / output)
        assert str(tmp_path / "file") in message and "--output" in message
    (tmp_path / "folder.png").mkdir()
    run("--weights", weights, "--image", photographs / "01.png", "--output", tmp_path / "folder.png")
    assert files(tmp_path / "folder.png") == ["01_vessels.png", "predictions.csv"]


def test_a_full_disk_leaves_nothing_half_written(tmp_path, weights, photographs, monkeypatch, capsys):
    (tmp_path / "a.png").write_bytes(b"before")

    def full(self, file, **options):
        file.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", full)
    flags = "--weights", weights, "--image", photographs / "01.png", "--output", tmp_path / "a.png", "--overwrite"
    message = fails(capsys, *flags)
    assert "a.png: cannot be written (No space left on device)" in message
    assert (tmp_path / "a.png").read_bytes() == b"before"
    assert files(tmp_path) == ["a.png", "photographs"]


def test_outputs_that_do_not_fit(tmp_path, weights, photographs, capsys):
    def message(image, output):
        return fails(capsys, "--weights", weights, "--image", image, "--output", output)

    assert "is one file, but there are 4 photographs" in message(photographs, tmp_path / "a.png")
    assert "written as PNG" in message(photographs / "01.png", tmp_path / "a.jpg")


def test_inputs_are_never_overwritten(tmp_path, weights, photographs, capsys, monkeypatch):
    monkeypatch.chdir(photographs)
    before = {path.name: path.read_bytes() for path in photographs.iterdir()}
    Image.new("L", (80, 72), 255).save(tmp_path / "roi.png")
    mask = (tmp_path / "roi.png").read_bytes()

    def message(*flags):
        return fails(capsys, "--weights", weights, "--image", *flags)

    assert "would overwrite the input" in message("01.png", "--output", "./01.png")
    assert "would overwrite the input" in message("01.png", "--roi-mask", "../roi.png", "--output", "../roi.png")
    assert "would overwrite the input" in message("01.png", "--roi-mask", "..", "--output", "../roi.png")
    assert "holds the photographs themselves" in message(".", "--output", ".")
    assert "holds the photographs themselves" in message("01.png", "--output", photographs)
    Image.open("01.png").save("x_overlay.png")
    before["x_overlay.png"] = Path("x_overlay.png").read_bytes()
    assert "would overwrite the input" in message("x_overlay.png", "--output", "x.png")
    assert {path.name: path.read_bytes() for path in photographs.iterdir()} == before
    assert (tmp_path / "roi.png").read_bytes() == mask


def test_another_picture_beside_one_mask_stays(tmp_path, weights, photographs, capsys):
    theirs = tmp_path / "left_overlay.png"
    Image.new("RGB", (4, 4)).save(theirs)
    before = theirs.read_bytes()
    flags = "--weights", weights, "--image", photographs / "01.png", "--output", tmp_path / "left.png", "--overlay"
    message = fails(capsys, *flags)
    assert "left_overlay.png is there, and no mask that tells of it" in message and theirs.read_bytes() == before
    run(*flags, "--overwrite")
    assert theirs.read_bytes() != before
    run(*flags)  # it is ours now


@pytest.mark.parametrize("name", ["mine.png", "mine_overlay.png", "mine_probability.png"])
def test_what_others_drew_is_not_replaced(tmp_path, weights, photographs, capsys, name):
    """A mask drawn by hand looks like one of this program's."""
    theirs = Path(tmp_path, name)
    Image.new("L", (80, 72), 255).save(theirs)
    before = theirs.read_bytes()
    flags = ("--weights", weights, "--image", photographs / "01.png", "--save-prob", "--overlay", "--output")
    reason = "this program did not write it" if name == "mine.png" else "no mask that tells of it"
    assert f"{name} is there, and {reason}" in fails(capsys, *flags, tmp_path / "mine.png")
    assert theirs.read_bytes() == before
    run(*flags, tmp_path / "mine.png", "--overwrite")
    run(*flags, tmp_path / "mine.png", "--threshold", "0.4")
    # In a folder with a table, too.
    run(*flags, tmp_path / "out")
    label = tmp_path / "out" / "02_vessels.png"
    Image.new("L", (80, 72), 255).save(label)
    folder = *flags[:2], "--image", photographs, "--output", tmp_path / "out"
    assert "02_vessels.png is there, and this program did not write it" in fails(capsys, *folder)
    assert np.array(Image.open(label)).min() == 255
    # A run that was stopped at once leaves a table without rows.
    rows = (tmp_path / "out" / "predictions.csv").read_text().splitlines()
    (tmp_path / "out" / "predictions.csv").write_text(f"{rows[0]}\n")
    assert "02_vessels.png is there, and this program did not write it" in fails(capsys, *folder)
    run(*folder, "--overwrite")


def test_another_picture_beside_a_mask_in_a_folder_stays(tmp_path, weights, photographs, capsys):
    flags = ("--weights", weights, "--image", photographs / "01.png", "--output", tmp_path / "out")
    run(*flags, "--report")
    theirs = tmp_path / "out" / "01_overlay.png"
    Image.new("RGB", (4, 4)).save(theirs)
    before = theirs.read_bytes()
    assert "01_overlay.png is there, and this program did not write it" in fails(capsys, *flags, "--overlay")
    run(*flags, "--threshold", "0.4")
    assert theirs.read_bytes() == before
    run(*flags, "--overlay", "--overwrite")
    assert theirs.read_bytes() != before


def test_a_mask_corrected_by_hand_stays(tmp_path, weights, photographs, capsys):
    flags = ("--weights", weights, "--image", photographs, "--output", tmp_path / "out")
    run(*flags)
    corrected = tmp_path / "out" / "02_vessels.png"
    Image.new("L", (80, 72), 255).save(corrected)
    before = corrected.read_bytes()
    lines_of(capsys)
    assert kept(capsys, *flags) == [1, 2, 3, 4]
    for others in (["--threshold", "0.4"], ["--overlay"]):
        message = fails_of_many(capsys, *flags, *others)
        assert f"02.png: {corrected} was changed since this program wrote it" in message
        assert corrected.read_bytes() == before
        assert 2 in kept(capsys, *flags)
    run(*flags, "--overwrite")
    assert corrected.read_bytes() != before
    # The page shows no thumbnail of it.
    corrected.write_bytes(before)
    lines_of(capsys)
    assert kept(capsys, *flags, "--report") == [2]
    assert corrected.read_bytes() == before


def test_an_overlay_of_others_stays_without_its_mask(tmp_path, weights, photographs, capsys):
    flags = ("--weights", weights, "--image", photographs, "--output", tmp_path / "out", "--overlay")
    run(*flags)
    (tmp_path / "out" / "02_vessels.png").unlink()
    Image.new("RGB", (80, 72)).save(tmp_path / "out" / "02_overlay.png")
    assert "02_overlay.png is there, and this program did not write it" in fails(capsys, *flags)


def test_tables_that_a_spreadsheet_saved(tmp_path, weights, photographs, capsys):
    flags = ("--weights", weights, "--image", photographs, "--output", tmp_path / "out")
    run(*flags)
    path = tmp_path / "out" / "predictions.csv"
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    lines_of(capsys)
    assert kept(capsys, *flags) == [1, 2, 3, 4]
    # Without the last column, nothing is known of a mask that was corrected.
    corrected = tmp_path / "out" / "02_vessels.png"
    Image.new("L", (80, 72), 255).save(corrected)
    before = corrected.read_bytes()
    path.write_text("".join(f"{line.rpartition(',')[0]}\n" for line in path.read_text().splitlines()))
    message = fails_of_many(capsys, *flags, "--threshold", "0.4")
    assert "02_vessels.png was changed since this program wrote it" in message and corrected.read_bytes() == before
    # And what is not in this command stays.
    run(*flags[:2], "--image", photographs / "03.png", *flags[4:])
    masks = {row["mask"] for row in table(tmp_path / "out")}
    assert masks >= {f"0{number}_vessels.png" for number in range(1, 5)}


def test_an_empty_file_is_no_picture(tmp_path, weights, photographs, capsys):
    """As a full disk or a power failure may leave it."""
    flags = ("--weights", weights, "--image", photographs, "--output", tmp_path / "out", "--report")
    run(*flags)
    thumbnail = tmp_path / "out" / "predictions_thumbnails" / "02_plain.jpg"
    thumbnail.write_bytes(b"")
    lines_of(capsys)
    assert kept(capsys, *flags) == [1, 3, 4] and thumbnail.stat().st_size > 0
    (tmp_path / "out" / "03_vessels.png").write_bytes(b"")
    assert "03_vessels.png was changed since this program wrote it" in fails_of_many(capsys, *flags)


def test_a_table_without_the_end_of_its_last_line(tmp_path, weights, photographs):
    flags = ("--weights", weights, "--output", tmp_path / "out", "--image")
    run(*flags, photographs)
    rows, path = table(tmp_path / "out"), tmp_path / "out" / "predictions.csv"
    whole = path.read_text()
    for text, left in ((whole.rstrip(), 4), (whole.rstrip()[:-1], 3), (whole[: whole.rindex(",")], 3)):
        path.write_text(text)
        run(*flags, photographs / "01.png")
        assert sorted(row["mask"] for row in table(tmp_path / "out")) == [row["mask"] for row in rows][:left]


def test_folders_of_earlier_versions(tmp_path, weights, photographs, capsys):
    """Their pictures do not tell who wrote them; their table does."""
    flags = ("--weights", weights, "--image", photographs / "01.png", "--output", tmp_path / "out")
    run(*flags, "--overlay")
    for path in (tmp_path / "out").glob("*.png"):
        Image.open(path).save(path)  # without texts
    (before,) = table(tmp_path / "out")
    run(*flags)
    assert table(tmp_path / "out") == [before]
    assert "(or an earlier version did)" in fails(capsys, *flags, "--threshold", "0.4")
    run(*flags, "--threshold", "0.4", "--overwrite")
    assert files(tmp_path / "out") == ["01_overlay.png", "01_vessels.png", "predictions.csv"]
    # Of a still earlier one, whose table had less columns.
    lines = (tmp_path / "out" / "predictions.csv").read_text().splitlines()
    (tmp_path / "out" / "predictions.csv").write_text("".join(f"{line.rpartition(',')[0]}\n" for line in lines))
    run(*flags)
    assert len(table(tmp_path / "out")) == 1


def test_one_roi_mask_is_not_for_two_photographs(tmp_path, weights, photographs, capsys):
    for folder, name in (("A", "01.png"), ("B", "02.png")):
        (tmp_path / "deep" / folder).mkdir(parents=True)
        Image.open(photographs / name).save(tmp_path / "deep" / folder / "1.png")
    (tmp_path / "roi").mkdir()
    Image.new("L", (80, 72), 255).save(tmp_path / "roi" / "1_mask.png")
    flags = ("--weights", weights, "--roi-mask", tmp_path / "roi", "--output", tmp_path / "out", "--image")
    message = fails(capsys, *flags, tmp_path / "deep", "--recursive")
    first, second = (tmp_path / "deep" / folder / "1.png" for folder in "AB")
    assert f"{first} and {second} would have one mask" in message
    run(*flags, tmp_path / "deep" / "A")
    (tmp_path / "roi" / "1_mask.png").rename(tmp_path / "roi" / "2.txt")
    assert f"--roi-mask {tmp_path / 'roi'}: needs one 1.* or 1_mask.*" in fails(capsys, *flags, tmp_path / "deep" / "B")


def test_what_a_folder_holds_besides(tmp_path, weights, photographs, capsys):
    """Pictures that are not read are told of; other files are not."""
    flags = ("--weights", weights, "--output", tmp_path / "out", "--image")
    Image.open(photographs / "01.png").convert("RGB").save(photographs / "phone.jfif", format="JPEG")
    for name in ("a.HEIC", "b.dcm", "notes.txt"):
        (photographs / name).write_bytes(b"")
    run(*flags, photographs)
    told = [line for line in capsys.readouterr().out.splitlines() if line.startswith("warning:")]
    assert told == [
        f"warning: --image: passed over 2 pictures of kinds that are not read ({photographs / 'a.HEIC'}, ...); "
        "save them as PNG or TIFF"
    ]
    assert "phone.jfif" in {Path(row["file"]).name for row in table(tmp_path / "out")}
    (tmp_path / "above").mkdir()
    photographs.rename(tmp_path / "above" / "below")
    message = fails(capsys, *flags, tmp_path / "above")
    assert "no photographs there" in message and "there are some in its folders: add --recursive" in message
    run(*flags, tmp_path / "above", "--recursive", "--report")
    assert "no photographs there" in (message := fails(capsys, *flags, tmp_path / "out"))
    assert "--recursive" not in message  # thumbnails


def test_pictures_beside_one_mask_are_of_that_mask(tmp_path, weights, photographs, capsys):
    """In a folder with a table, too."""
    flags = ("--weights", weights, "--image", photographs / "01.png", "--output", tmp_path / "r.png")
    run(*flags, "--overlay", "--save-prob")
    assert files(tmp_path) == ["photographs", "r.png", "r_overlay.png", "r_probability.png"]
    run(*flags, "--threshold", "0.3", "--save-prob")
    assert files(tmp_path) == ["photographs", "r.png", "r_probability.png"]
    Image.new("L", (80, 72)).save(tmp_path / "r_overlay.png")  # somebody's own
    run(*flags)
    assert files(tmp_path) == ["photographs", "r.png", "r_overlay.png"]
    # A name of a folder's own mask: what is beside is of that.
    run(*flags[:4], "--output", tmp_path / "out", "--overlay")
    before = {path: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    other = (*flags[:2], "--image", photographs / "02.png", "--output", tmp_path / "out" / "01_vessels.png")
    beside = (*other[:-1], tmp_path / "out" / "01.png")
    for command in (other, (*other, "--overwrite"), beside, (*beside, "--overlay")):
        assert "the predictions.csv beside it tells of the mask of this name" in fails(capsys, *command)
    assert before == {path: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    # A name that the table does not know is as anywhere else.
    run(*flags[:4], "--output", tmp_path / "out" / "new.png", "--overlay")
    run(*flags[:4], "--output", tmp_path / "out" / "new.png")
    assert files(tmp_path / "out") == ["01_overlay.png", "01_vessels.png", "new.png", "predictions.csv"]


def test_the_file_that_cannot_be_read_is_named(tmp_path, weights, photographs, capsys, monkeypatch):
    masks = tmp_path / "masks"
    masks.mkdir()
    roi_mask = masks / "01.png"
    Image.new("L", (80, 72), 255).save(roi_mask)
    flags = "--weights", weights, "--image", photographs / "01.png", "--output", tmp_path / "out.png", "--roi-mask"

    def refuse(path):
        raise PermissionError(13, "Permission denied", str(path))

    with monkeypatch.context() as patch:
        patch.setattr(prediction_table, "sha256_of", lambda path: refuse(path) if path == roi_mask else sha256_of(path))
        assert f"{roi_mask}: cannot be read (Permission denied)" in fails(capsys, *flags, roi_mask)
    monkeypatch.setattr(Path, "iterdir", refuse)
    assert f"--roi-mask {masks}: cannot be read (Permission denied)" in fails(capsys, *flags, masks)


def test_a_folder_of_photographs_that_is_read_only(tmp_path, weights, photographs):
    photographs.chmod(stat.S_IRUSR | stat.S_IXUSR)
    before = {path: path.stat().st_mtime_ns for path in (photographs, *photographs.iterdir())}
    try:
        run("--weights", weights, "--image", photographs, "--output", tmp_path / "out", "--overlay", "--save-prob")
    finally:
        photographs.chmod(stat.S_IRWXU)
    assert {path: path.stat().st_mtime_ns for path in (photographs, *photographs.iterdir())} == before


@pytest.mark.parametrize(
    "flags",
    [
        "--scale 0",
        "--scale big",
        "--threshold 1",
        "--threshold x",
        "--tile 10",
        "--batch-size 0",
        "--amp maybe",
        "--gpu",
    ],
)
def test_wrong_flags(flags, capsys):
    with pytest.raises(SystemExit) as stopped:
        predict.parse_args(flags.split())
    assert stopped.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert flags.split()[0] in line


CPU_MESSAGE = "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: you tried "


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (
            torch.OutOfMemoryError("CUDA out of memory. Tried to allocate ..."),
            ": try a smaller --scale, or --tile 512 --batch-size 1",
        ),
        (
            RuntimeError(CPU_MESSAGE + "to allocate 4 bytes. Error code 12\nmore"),
            " (no 4 bytes more): try a smaller --scale",
        ),
        (MemoryError(), ": try a smaller --scale"),
    ],
)
@pytest.mark.parametrize("place", ["src.segmenter.segment", "train_utils.prediction_files.draw_overlay"])
def test_too_little_memory_is_a_failure_of_the_photograph(
    tmp_path, weights, photographs, monkeypatch, capsys, error, message, place
):
    def full(*args, **options):
        raise error

    flags = ("--weights", weights, "--overlay", "--output", tmp_path / "out", "--image")
    with monkeypatch.context() as patch:
        patch.setattr(place, full)
        line = fails(capsys, *flags, photographs / "01.png")
        assert f": error: {photographs / '01.png'}: out of memory{message}" in line
        assert not list((tmp_path / "out").glob("*.png"))  # a mask is there only with all that was asked for
    turns = iter([full, segment, segment, segment])
    monkeypatch.setattr(segmenter, "segment", lambda *args, **options: next(turns)(*args, **options))
    with pytest.raises(PhotographError, match="1 of 4 photographs failed"):
        run(*flags, photographs)
    assert sum(not row["error"] for row in table(tmp_path / "out")) == 3


def test_other_errors_keep_their_traceback(weights, photographs, monkeypatch):
    def broken(*args, **options):
        raise RuntimeError("a fault of the program")

    monkeypatch.setattr(segmenter, "segment", broken)
    with pytest.raises(RuntimeError, match="a fault of the program"):
        run("--weights", weights, "--image", photographs)


@pytest.mark.parametrize("scale", ["300", "1e9", "1e308"])
def test_a_scale_that_makes_too_many_pixels(weights, photographs, capsys, scale):
    message = fails(capsys, "--weights", weights, "--image", photographs / "01.png", "--scale", scale)
    assert f"01.png: out of memory ({'518 megapixels at' if scale == '300' else ''}" in message
    assert f"scale {float(scale):g}): try a smaller --scale" in message


def test_the_page_of_a_tiff_is_said(tmp_path, weights, photographs, capsys):
    Image.open(photographs / "01.png").convert("RGB").save(tmp_path / "one.tif")
    Image.new("RGB", (20, 18)).save(tmp_path / "a.tif", save_all=True, append_images=[Image.open(tmp_path / "one.tif")])
    for name in ("a", "one"):
        run("--weights", weights, "--image", tmp_path / f"{name}.tif", "--output", tmp_path / name)
    (paged,), (single,) = table(tmp_path / "a"), table(tmp_path / "one")
    assert paged["warning"].split("; ") == [*single["warning"].split("; "), "page 2 of 2, the largest"]
    assert capsys.readouterr().out.count(", page 2 of 2, the largest -> ") == 1
    assert np.array_equal(pixels(tmp_path / "a" / "a_vessels.png"), pixels(tmp_path / "one" / "one_vessels.png"))


# ---- real photographs


def test_real_photographs_keep_their_scale(tmp_path, real_drive):
    weights = save_as_the_tutorial(tmp_path / "model.pth", make_model())
    images = sorted((real_drive / "DRIVE").glob("*/images/*.tif"))
    for roi_mask in ([], ["--roi-mask", "auto"]):
        run("--weights", weights, "--image", *images, "--output", tmp_path / "out", *roi_mask)
        assert {row["scale"] for row in table(tmp_path / "out")} == {"1"}


@pytest.mark.parametrize(("large", "at_once"), [(80 * 72 - 1, 1), (80 * 72, 2)])
def test_a_large_photograph_is_worked_on_alone(tmp_path, weights, photographs, monkeypatch, large, at_once):
    """Two of them side by side could need more memory than there is."""
    active, most = [], []
    segmented = predict.predict

    def watched(*args):
        active.append(None)
        time.sleep(0.1)  # so that another one may begin
        most.append(len(active))
        try:
            return segmented(*args)
        finally:
            active.pop()

    monkeypatch.setattr(predict, "LARGE", large)
    monkeypatch.setattr(predict, "predict", watched)
    run("--weights", weights, "--image", photographs, "--output", tmp_path / "masks")
    assert max(most) == at_once and len(most) == len(list(photographs.glob("*.png")))


@pytest.mark.parametrize(
    ("threads", "each", "large"),
    [(1, 1, 80 * 72), (2, 1, 80 * 72), (3, 3, 80 * 72), (4, 2, 80 * 72), (4, 4, 80 * 72 - 1)],
)
def test_the_photographs_of_a_folder_share_the_threads(
    tmp_path, weights, photographs, monkeypatch, threads, each, large
):
    """A large one is worked on alone, and so it has them all."""
    seen, segmented, before = [], predict.predict, torch.get_num_threads()

    def watched(*args):
        seen.append(torch.get_num_threads())
        return segmented(*args)

    monkeypatch.setattr(predict, "predict", watched)
    monkeypatch.setattr(predict, "LARGE", large)
    torch.set_num_threads(threads)
    try:
        run("--weights", weights, "--image", photographs, "--output", tmp_path / "masks")
        run("--weights", weights, "--image", photographs / "01.png", "--output", tmp_path / "one.png")
        assert seen == [each] * (len(seen) - 1) + [threads]  # one alone has them all
        assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
    assert np.array_equal(pixels(tmp_path / "one.png"), pixels(tmp_path / "masks" / "01_vessels.png"))
