import json
import os
import re
import shutil
import subprocess
import time
import tracemalloc
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote_to_bytes

import numpy as np
import pytest
from PIL import Image

import predict
from src.errors import DatasetError
from tests.conftest import on_posix
from tests.test_predict import fails, files, make_model, run, save, table
from train_utils.files import OutputError
from train_utils.prediction_report import THUMBNAILS, thumbnail_paths, write_report, write_thumbnail
from train_utils.prediction_table import FACTS
from train_utils.synthetic_drive import synthetic_photograph

COLUMNS = ("width", "vessel_share")
ENTITIES = "&lt;b&gt;.jpg"
HOSTILE = ["</script><script>alert(1)</script>.jpg", "\"' onerror=alert(1) x=.jpg", ENTITIES, "a b#?%41.jpg"]
NOT_UTF8 = b"odd\xe2\xff<i>.jpg".decode(errors="surrogateescape")


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    return save(tmp_path_factory.mktemp("weights") / "best_model.pth", make_model())


@pytest.fixture
def photographs(tmp_path):
    """A folder of three photographs, the second of them broken."""
    folder = tmp_path / "photographs"
    folder.mkdir()
    for seed, name in enumerate(("a.png", "b.png", "c.jpg")):
        Image.fromarray(synthetic_photograph(80, 72, np.random.default_rng(seed))[0]).save(folder / name)
    (folder / "b.png").write_bytes(b"no picture")
    return folder


class Page(HTMLParser):
    """The tags of a page, and of each photograph: whether it failed, its texts by tag, its pictures and links."""

    def __init__(self, path):
        super().__init__()
        self.text = Path(path).read_bytes().decode()
        self.tags, self.cards, self.stack = set(), [], []
        self.feed(self.text)

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self.tags.add(tag)
        self.stack.append(tag)
        if tag == "article":
            self.cards.append({"failed": attributes.get("class") == "failed", "images": [], "links": []})
        if tag in ("img", "a"):
            kind, name = ("images", "data-src") if tag == "img" else ("links", "href")
            self.cards[-1][kind].append(unquote_to_bytes(attributes[name]))
        if tag == "img":
            assert attributes["alt"] and attributes["loading"] == "lazy"
            self.cards[-1]["alt"] = attributes["alt"]

    def handle_endtag(self, tag):
        while self.stack and self.stack.pop() != tag:
            pass

    def handle_data(self, text):
        if "article" in self.stack:
            for tag in {"h2", "p", "dt", "dd"} & set(self.stack):
                self.cards[-1][tag] = self.cards[-1].get(tag, "") + text

    @property
    def names(self):
        return [card["h2"] for card in self.cards]


def write(folder, names, failures=None, columns=COLUMNS, **values):
    """Write a page of rows with these values of one column; of a photograph called `name` the mask is `name`.png."""
    paths = [Path(name) for name in names]
    rows = [{"file": path, "width": 80, "vessel_share": "0.1"} for path in paths]
    for column, entries in values.items():
        for row, value in zip(rows, entries, strict=True):
            row[column] = value
    failures = {Path(name): message for name, message in (failures or {}).items()}
    masks = {path: folder / f"{path.name}.png" for path in (*paths, *failures)}
    write_report(folder / "predictions.html", columns, rows, failures, masks)
    return folder / "predictions.html"


# ---- by predict.py


def test_every_photograph_is_on_the_page(tmp_path, weights, photographs):
    Image.fromarray(synthetic_photograph(960, 400, np.random.default_rng(0))[0]).save(photographs / "d.png")
    out = tmp_path / "out"
    with pytest.raises(DatasetError):
        run("--weights", weights, "--image", photographs, "--output", out, "--report")
    page = Page(out / "predictions.html")
    assert page.names == [str(photographs / name) for name in ("b.png", "a.png", "c.jpg", "d.png")]
    assert [card["failed"] for card in page.cards] == [True, False, False, False]
    assert page.cards[0]["p"].startswith(f"{photographs / 'b.png'}: not an image")
    assert "3 of 4 photographs segmented, 1 failed. <strong>Not a medical device.</strong>" in page.text
    rows = {row["file"]: row for row in table(out)}
    for card in page.cards[1:]:
        row = rows[Path(card["h2"]).as_posix()]
        assert card["dt"] == "".join(column.replace("_", " ") for column in FACTS)
        assert card["dd"] == "".join(row[column] for column in FACTS)
        assert card["links"] == [f"{Path(row['file']).stem}_vessels.png".encode()]
        scale = min(1, 480 / int(row["width"]))
        plain, overlay = (Image.open(out / os.fsdecode(image)) for image in card["images"])
        assert plain.format == "JPEG"
        assert plain.size == overlay.size == (int(row["width"]) * scale, int(row["height"]) * scale)
        assert np.abs(np.subtract(plain, overlay, dtype=float)).max() > 50
    assert files(out / THUMBNAILS) == [f"{stem}_{kind}.jpg" for stem in "acd" for kind in ("overlay", "plain")]


def test_without_the_flag_nothing_is_added(tmp_path, weights, photographs):
    run("--weights", weights, "--image", photographs / "a.png", "--output", tmp_path / "out")
    assert files(tmp_path / "out") == ["a_vessels.png", "predictions.csv"]


def test_one_photograph(working_directory, weights, photographs, capsys):
    run("--weights", weights, "--image", photographs / "a.png", "--report")
    assert Page("predictions/predictions.html").names == [str(photographs / "a.png")]
    fails(capsys, "--weights", weights, "--image", photographs / "b.png", "--report")
    (card,) = Page("predictions/predictions.html").cards
    assert card["failed"]
    message = fails(capsys, "--weights", weights, "--image", photographs / "a.png", "--report", "--output", "a.png")
    assert "--report: needs a folder, but --output a.png is one file" in message


def test_an_interrupted_run_keeps_the_page_of_what_is_done(tmp_path, weights, photographs, monkeypatch):
    def stop_at_the_third(path, *args):
        if path.name == "c.jpg":
            raise KeyboardInterrupt
        return whole(path, *args)

    whole = predict.predict
    monkeypatch.setattr(predict, "predict", stop_at_the_third)
    with pytest.raises(KeyboardInterrupt):
        run("--weights", weights, "--image", photographs, "--output", tmp_path / "out", "--report")
    page = Page(tmp_path / "out" / "predictions.html")
    assert page.names == [str(photographs / name) for name in ("b.png", "a.png")]
    assert "1 of 3 photographs segmented, 1 failed, 1 not reached" in page.text


def test_inputs_are_never_overwritten(tmp_path, weights, photographs, capsys):
    def message(*flags):
        return fails(capsys, *flags, "--output", out, "--report")

    out = tmp_path / "out"
    (out / THUMBNAILS).mkdir(parents=True)
    page, thumbnail = out / "predictions.html", out / THUMBNAILS / "a_plain.jpg"
    shutil.copy(weights, page)
    shutil.copy(photographs / "a.png", thumbnail)
    before = page.read_bytes(), thumbnail.read_bytes()
    image = ("--image", photographs / "a.png")
    assert f"would overwrite the input {page}" in message("--weights", page, *image)
    assert f"would overwrite the input {thumbnail}" in message("--weights", weights, *image, thumbnail)
    assert "holds the photographs themselves" in message("--weights", weights, "--image", thumbnail)
    assert before == (page.read_bytes(), thumbnail.read_bytes())


def test_places_that_cannot_be_written(tmp_path, weights, photographs, capsys):
    (tmp_path / THUMBNAILS).touch()
    message = fails(capsys, "--weights", weights, "--image", photographs, "--output", tmp_path, "--report")
    assert f"--report {tmp_path / THUMBNAILS}: cannot be written" in message


@on_posix
def test_names_that_are_not_utf8(tmp_path, weights, photographs):
    (photographs / "a.png").rename(photographs / NOT_UTF8)
    run("--weights", weights, "--image", photographs / NOT_UTF8, "--output", tmp_path / "out", "--report")
    (card,) = Page(tmp_path / "out" / "predictions.html").cards
    assert card["h2"] == f"{photographs}/odd\\udce2\\udcff<i>.jpg"
    for path in (*card["images"], *card["links"]):
        assert (tmp_path / "out" / os.fsdecode(path)).exists()
    assert rb"odd\xe2\xff<i>.jpg" in (tmp_path / "out" / "predictions.csv").read_bytes()


# ---- the page alone


def test_failures_and_then_the_least_reliable_come_first(tmp_path):
    failures = {"x": "x: broken", "a": "a: broken"}
    reliability = ["0.9", "0.20", "nan", "0.9", "1e-3", None]
    columns = (*COLUMNS, "reliability")
    assert Page(write(tmp_path, "fedcb1", failures, columns, reliability=reliability)).names == list("xad1befc")
    assert Page(write(tmp_path, "fedc")).names == list("fedc")
    warnings = ["", "blurred", "", "too dark"]
    page = Page(write(tmp_path, "fedc", {}, (*columns, "warning"), reliability=reliability[:4], warning=warnings))
    assert page.names == list("ecdf")


@on_posix
def test_no_name_can_do_harm(tmp_path):
    names = [*HOSTILE, NOT_UTF8]
    plain = Page(write(tmp_path, ["a", "b"], {"c": "c: broken"}))
    page = Page(write(tmp_path, names, {f"{name}x": f"{name}: is </p><b>broken" for name in names}))
    assert page.tags == plain.tags
    readable = [name.encode(errors="backslashreplace").decode() for name in names]
    assert page.names == [f"{name}x" for name in readable] + readable
    assert [card["p"] for card in page.cards[: len(names)]] == [f"{name}: is </p><b>broken" for name in readable]
    for card, name in zip(page.cards[len(names) :], readable, strict=True):
        assert card["alt"] == f"{Path(name).name} with its vessels drawn in"
    for card, name in zip(page.cards[len(names) :], names, strict=True):
        assert card["links"] == [os.fsencode(Path(name).name) + b".png"]
    assert page.text.count("<script>") == page.text.count("</script>") == 1


def test_nothing_comes_from_elsewhere(tmp_path):
    page = Page(write(tmp_path, ["/somewhere/a", "javascript:alert(1)"]))
    assert not re.search(r"http|url\(|@import|src=\"/|href=\"/|data:|fetch|\bimport\b", page.text)
    assert page.tags.isdisjoint({"link", "iframe", "object", "base", "form"})
    for card in page.cards:
        assert [os.path.dirname(path) for path in card["images"] + card["links"]] == [THUMBNAILS.encode()] * 2 + [b""]
    assert 'href="javascript%3Aalert%281%29.png"' in page.text


def test_two_thousand_photographs(tmp_path):
    names = [f"/a/rather/long/path/of/a/folder/photograph_{number:05}.jpg" for number in range(2000)]
    failures = {f"{name}x": "cannot be read" for name in names[:100]}
    started = time.perf_counter()
    tracemalloc.start()
    page = write(tmp_path, names, failures)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert time.perf_counter() - started < 10
    assert page.stat().st_size < 2000 * 2000
    assert peak < 8 * 2**20
    assert len(Page(page).cards) == 2100


def test_the_page_is_written_whole_or_not_at_all(tmp_path):
    page = write(tmp_path, ["a"])
    before = page.read_bytes()
    with pytest.raises(KeyError):
        write(tmp_path, ["a", "b"], columns=(*COLUMNS, "unknown"))
    assert page.read_bytes() == before and files(tmp_path) == ["predictions.html"]
    with pytest.raises(OutputError):
        write(tmp_path / "missing", ["a"])


@pytest.mark.parametrize("size", [(1, 1), (1, 3000), (3000, 1), (481, 480)])
def test_thumbnails_of_any_size(tmp_path, size):
    (tmp_path / THUMBNAILS).mkdir()
    for path in thumbnail_paths(tmp_path / "a_vessels.png"):
        write_thumbnail(path, Image.new("RGB", size, (90, 90, 90)))
        width, height = Image.open(path).size
        assert (width, height) == (1, 1) if size == (1, 1) else max(width, height) == 480


# ---- in a browser

OPERATE = """
const names = () => all("article h2").map(heading => heading.textContent);
const press = (key, target = document.body) =>
  target.dispatchEvent(new KeyboardEvent("keydown", {key, bubbles: true, cancelable: true}));
const opacity = () => getComputedStyle(all(".pair img")[1]).opacity;
const sort = number => find(`[data-sort]:nth-of-type(${number})`).click();
const steps = {given: names()};
sort(2); steps.file = names();
sort(3); steps.width = names();
sort(3); steps.widthDown = names();
steps.pressed = all("[aria-pressed=true]").map(button => button.textContent);
sort(1); steps.givenAgain = names();
steps.opacity = [opacity()];
press("o"); steps.opacity.push(opacity());
press(" "); steps.opacity.push(opacity());
press(" ", find("#switch")); steps.opacity.push(opacity());
find("#switch").click(); steps.opacity.push(opacity());
slider.value = 30; slider.dispatchEvent(new Event("input")); steps.opacity.push(opacity());
const large = () => find("dialog h2").textContent;
find(".pair").click();
steps.large = [dialog.open, all("dialog img").length, large()];
press("ArrowRight"); steps.large.push(large());
press("ArrowLeft"); press("ArrowLeft"); steps.large.push(large());
find("[data-step='0']").click(); steps.large.push(dialog.open);
await new Promise(done => setTimeout(done, 2000));
steps.images = all("main img").map(image => image.naturalWidth);
"""


def in_browser(page, script):
    """What a script that runs at the end of the page has put into `steps`."""
    browser = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if browser is None:
        pytest.skip("there is no Chromium here")
    result = 'document.body.setAttribute("data-steps", encodeURIComponent(JSON.stringify(steps)));'
    page.write_text(f"{page.read_text()}<script>(async () => {{{script}{result}}})();</script>")
    command = [browser, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={page.parent / 'profile'}"]
    command += ["--virtual-time-budget=10000", "--dump-dom", page.as_uri()]
    done = subprocess.run(command, capture_output=True, timeout=120)
    steps = re.search(rb'data-steps="([^"]*)"', done.stdout)
    assert steps, done.stderr.decode()
    return json.loads(unquote_to_bytes(steps[1]))


@on_posix
@pytest.mark.browser
def test_sort_and_switch_in_a_browser(tmp_path):
    names = ["c", "b10", ENTITIES, NOT_UTF8, "b9"]
    page = write(tmp_path, names, {"z": "z: broken"}, width=[90, 1000, 200, 90, 1000])
    (tmp_path / THUMBNAILS).mkdir()
    for number, name in enumerate(names, start=1):
        for path in thumbnail_paths(tmp_path / f"{name}.png"):
            write_thumbnail(path, Image.new("RGB", (number, 20), (90, 90, 90)))
    steps = in_browser(page, OPERATE)

    odd = NOT_UTF8.encode(errors="backslashreplace").decode()
    given = ["z", "c", "b10", ENTITIES, odd, "b9"]
    assert steps["given"] == steps["givenAgain"] == given
    assert steps["file"] == ["z", ENTITIES, "b9", "b10", "c", odd]
    assert steps["width"] == ["z", "c", odd, ENTITIES, "b10", "b9"]
    assert steps["widthDown"] == ["z", "b10", "b9", ENTITIES, "c", odd]
    assert steps["pressed"] == ["width ↓"]
    assert steps["opacity"] == ["1", "0", "1", "1", "0", "0.3"]
    assert steps["large"] == [True, 2, "c", "b10", "c", False]
    assert steps["images"] == [1, 1, 2, 2, 3, 3, 4, 4, 5, 5]


@pytest.mark.browser
def test_only_what_is_near_is_loaded(tmp_path):
    page = write(tmp_path, [str(number) for number in range(1000)])
    script = """
        await new Promise(done => setTimeout(done, 2000));
        const steps = [all("main img[src]").length];
        find(".pair", given.at(-1)).click();
        steps.push(all("main img[src]").length, all("dialog img[src]").length);
    """
    near, with_the_last, large = in_browser(page, script)
    assert 0 < near < 200
    assert with_the_last == near + 2 and large == 2
