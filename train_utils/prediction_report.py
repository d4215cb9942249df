"""The page predictions.html of predict.py: each photograph with its vessels, to look through in a browser.

The thumbnails lie in a folder beside the page. Embedded, those of 2000 photographs would make it one of 100 MB.
"""

import math
import os
from collections.abc import Iterator, Mapping, Sequence
from html import escape
from pathlib import Path
from string import Template
from typing import Any
from urllib.parse import quote

from PIL import Image

from .files import replace_whole, write_picture

REPORT = "predictions.html"
THUMBNAILS = "predictions_thumbnails"
LONGER_SIDE = 480  # of a thumbnail, pixels


def thumbnail_paths(mask: Path) -> tuple[Path, Path]:
    """Where the thumbnails of the photograph and of its overlay lie, by the path of its mask."""
    folder, name = mask.parent / THUMBNAILS, mask.stem.removesuffix("_vessels")
    return folder / f"{name}_plain.jpg", folder / f"{name}_overlay.jpg"


def write_thumbnail(path: Path, picture: Image.Image) -> None:
    """Shrink a picture, RGB, in place, and write it.

    Raises:
        OutputError: it cannot be written.
    """
    picture.thumbnail((LONGER_SIDE, LONGER_SIDE))
    write_picture(path, picture, "JPEG", quality=80)


def write_report(
    path: Path,
    columns: Sequence[str],
    rows: Sequence[Mapping[str, Any]],
    failures: Mapping[Path, str],
    masks: Mapping[Path, Path],
) -> None:
    """Write the page, whole or not at all: the failures first, then the rows with a warning, then the others.

    Of either the least reliable ones come first.

    Args:
        path: the page; the masks and the folder of thumbnails lie beside it.
        columns: of the table, to show.
        rows: of the table; "file", which is always shown, is the path of the photograph.
        failures: the photographs that could not be segmented, each with its error.
        masks: all photographs, each with its mask.

    Raises:
        OutputError: it cannot be written.
    """
    with replace_whole(path) as file:
        # A file name need not be UTF-8; a page has to be.
        file.writelines(part.encode(errors="backslashreplace") for part in _page(columns, rows, failures, masks))


def _page(
    columns: Sequence[str],
    rows: Sequence[Mapping[str, Any]],
    failures: Mapping[Path, str],
    masks: Mapping[Path, Path],
) -> Iterator[str]:
    summary = f"{len(rows)} of {len(masks)} photographs segmented, {len(failures)} failed"
    if missing := len(masks) - len(rows) - len(failures):
        summary += f", {missing} not reached before the run was stopped"
    buttons = "".join(f"<button data-sort>{_title(column)}</button>\n" for column in ("file", *columns))
    yield HEAD.substitute(summary=summary, buttons=buttons)
    for photograph, message in failures.items():
        yield f'<article class="failed">\n{_heading(photograph)}\n<p>{escape(message)}</p>\n</article>\n'
    for row in sorted(rows, key=_doubt):
        mask, name = masks[row["file"]], escape(row["file"].name)
        plain, overlay = (f"{THUMBNAILS}/{_link(path)}" for path in thumbnail_paths(mask))
        facts = "".join(
            f"<div><dt>{_title(column)}</dt><dd>{escape(str(row[column]))}</dd></div>\n" for column in columns
        )
        yield (
            f'<article>\n<button class="pair">'
            f'<img data-src="{plain}" alt="photograph {name}" loading="lazy">'
            f'<img data-src="{overlay}" alt="{name} with its vessels drawn in" loading="lazy"></button>\n'
            f'{_heading(row["file"])}\n<dl>\n{facts}</dl>\n<a href="{_link(mask)}">mask</a>\n</article>\n'
        )
    yield TAIL


def _title(column: str) -> str:
    return escape(column.replace("_", " "))


def _heading(photograph: Path) -> str:
    folder, name = os.path.split(photograph)
    return f"<h2><small>{escape(os.path.join(folder, ''))}</small>{escape(name)}</h2>"


def _link(path: Path) -> str:
    return quote(os.fsencode(path.name), safe="")


def _doubt(row: Mapping[str, Any]) -> tuple[bool, float]:
    """What to sort by, ascending: warnings first; a row whose reliability is no number is trusted least."""
    try:
        reliability = float(row.get("reliability", ""))
    except (TypeError, ValueError):
        reliability = math.nan
    return not row.get("warning"), -math.inf if math.isnan(reliability) else reliability


HEAD = Template("""<!DOCTYPE html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width">
<meta name="color-scheme" content="light dark">
<title>Predictions</title>
<style>
:root { color-scheme: light dark; --overlay: 1; font: 15px/1.4 system-ui, sans-serif }
body { margin: 0 }
header { position: sticky; top: 0; z-index: 1; padding: .6rem 1rem; background: Canvas; border-bottom: 1px solid #8888 }
h1 { font-size: 1.2rem; display: inline; margin-right: 1rem }
header p, nav { margin: .4rem 0 0; display: flex; flex-wrap: wrap; gap: .4rem; align-items: center }
button, input { font: inherit; cursor: pointer }
#slider { flex: 0 1 9rem; min-width: 4rem }
[aria-pressed=true] { font-weight: bold }
main { display: grid; grid-template-columns: repeat(auto-fill, minmax(17rem, 1fr)); gap: 1rem; padding: 1rem }
article { content-visibility: auto; contain-intrinsic-size: auto 17rem auto 30rem; padding: .6rem; min-width: 0;
  border: 1px solid #8888; border-radius: .4rem }
.failed { align-self: start; border: 2px solid #d33 }
h2 { font-size: 1rem; margin: .4rem 0 }
small { display: block; font-weight: normal }
small, dt { opacity: .75 }
h2, article p { overflow-wrap: anywhere }
img { object-fit: contain; background: #000 }
.pair { display: block; position: relative; width: 100%; aspect-ratio: 1; padding: 0; border: 0 }
.pair img { position: absolute; inset: 0; width: 100%; height: 100% }
.pair img + img { opacity: var(--overlay) }
dl { margin: .4rem 0 }
dl div { display: flex; justify-content: space-between; gap: 1rem }
dd { margin: 0; font-variant-numeric: tabular-nums; overflow-wrap: anywhere; text-align: right }
dialog { width: 96vw; max-width: none; max-height: 96vh; box-sizing: border-box; padding: 1rem }
dialog nav { margin: 0 0 .6rem }
dialog dl, dialog dl div { display: flex; flex-wrap: wrap; gap: .2rem 1.5rem }
dialog dl div { column-gap: .5rem }
dialog dd { text-align: left }
figure { margin: 0; display: flex; flex-wrap: wrap; gap: .6rem; align-items: start }
figure img { flex: 1 1 20rem; min-width: 0; max-height: 72vh }
@media (max-width: 40rem) {  /* One row of buttons, to be moved sideways: the header stays small. */
  nav { flex-wrap: nowrap; overflow-x: auto; white-space: nowrap }
  figure img { max-height: 42vh }
}
</style>
<header>
<h1>Predictions</h1> $summary. <strong>Not a medical device.</strong>
<p><button id="switch">overlay on / off (o or space)</button>
<input id="slider" type="range" min="0" max="100" value="100" aria-label="strength of the overlay"></p>
<nav aria-label="sort">sort by
<button data-sort="given" aria-pressed="true">what to check first</button>
$buttons</nav>
</header>
<main>
""")

TAIL = """</main>
<dialog aria-label="photograph and overlay">
<nav><button data-step="-1">&larr; previous</button> <button data-step="1" autofocus>next &rarr;</button>
<button data-step="0">close</button></nav>
<figure></figure>
<section></section>
</dialog>
<script>
"use strict";
const find = (selector, from = document) => from.querySelector(selector);
const all = (selector, from = document) => [...from.querySelectorAll(selector)];
const main = find("main"), dialog = find("dialog"), slider = find("#slider"), given = [...main.children];
let shown;

// Chromium ignores loading=lazy in a page that is opened as a file.
function load(card) { for (const image of all("img", card)) image.src = image.dataset.src; }
const near = new IntersectionObserver(entries => {
  for (const {target} of entries.filter(entry => entry.isIntersecting)) {
    near.unobserve(target);
    load(target);
  }
}, {rootMargin: "1000px"});
given.forEach(card => near.observe(card));

function fade() { document.documentElement.style.setProperty("--overlay", slider.value / 100); }
function toggle() { slider.value = slider.value > 0 ? 0 : 100; fade(); }
slider.addEventListener("input", fade);
find("#switch").addEventListener("click", toggle);
fade();  // A reload keeps the place of the slider.

function compare(a, b) {
  return a - b || (isNaN(a - b) ? a.localeCompare(b, undefined, {numeric: true}) : 0);
}
all("[data-sort]").forEach((button, number, buttons) => button.addEventListener("click", () => {
  const direction = button.dataset.direction === "1" ? -1 : 1;
  for (const other of buttons) {
    other.setAttribute("aria-pressed", other === button);
    other.dataset.direction = "";
    other.textContent = other.textContent.replace(/ [\\u2191\\u2193]$/, "");
  }
  let cards = given;
  if (button.dataset.sort !== "given") {
    button.dataset.direction = direction;
    button.textContent += direction > 0 ? " \\u2191" : " \\u2193";
    const values = new Map(given.map(card => [card, all("h2, dd", card)[number - 1]?.textContent ?? ""]));
    const failed = card => card.classList.contains("failed");
    cards = [...given].sort((a, b) => failed(b) - failed(a) || direction * compare(values.get(a), values.get(b)));
  }
  main.append(...cards);
  scrollTo(0, 0);
}));

function show(card) {
  if (!card) return;
  shown = card;
  load(card);
  find("figure").replaceChildren(...all("img", card).map(image => image.cloneNode()));
  find("section").replaceChildren(...all("h2, dl, a", card).map(part => part.cloneNode(true)));
  if (!dialog.open) dialog.showModal();
}
function step(by) {
  const pairs = all("article:not(.failed)");
  show(pairs[pairs.indexOf(shown) + by]);
}
main.addEventListener("click", event => {
  const pair = event.target.closest(".pair");
  if (pair) show(pair.parentElement);
});
dialog.addEventListener("click", event => {
  const by = event.target.dataset.step;
  if (by === "0" || event.target === dialog) dialog.close();
  else if (by) step(Number(by));
});
dialog.addEventListener("close", () => find(".pair", shown).focus());

addEventListener("keydown", event => {
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  if (dialog.open) {
    if (event.key === "ArrowLeft") step(-1);
    if (event.key === "ArrowRight") step(1);
  } else if (event.key === "o" || (event.key === " " && !event.target.closest("button, a"))) {
    event.preventDefault();  // Space would scroll the page; on a button it presses the button.
    toggle();
  }
});
</script>
</html>
"""
