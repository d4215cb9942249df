"""The output files of predict.py: their names, the pictures, and what is told of each photograph."""

import argparse
import functools
import hashlib
import os
import zlib
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, PngImagePlugin

from src import Segmentation
from src.dataset_files import comparable
from src.freed_memory import give_back_freed_memory
from src.photograph import (
    IMAGE_SUFFIXES,
    LARGE,
    ROWS_AT_ONCE,
    UNREAD_SUFFIXES,
    PhotographError,
    images_in,
    list_photographs,
    load_image,
)
from src.segment import probabilities_in_parts

from .command_line import UsageError, first_of
from .files import remove, require_no_input, write_picture
from .prediction_report import REPORT, THUMBNAILS, thumbnail_paths, write_thumbnail
from .prediction_table import TABLE, masks_in, tells_of, whole_path

RESULT, FOLDER = "test_result.png", "predictions"  # the defaults of --output, for one photograph and for several
KINDS = ("vessels", "overlay", "probability")  # at the end of a picture's name
LONGEST_NAME = 220  # bytes; file systems allow 255, with "_probability.png" and the name of the temporary file
AUTHOR = "U-Net for retinal vessels"  # named in every picture, so that no other is replaced
COMPRESSION = 3  # of PNG: an overlay takes a third of the time of Pillow's 6, and is 11 % larger
OPACITY = 0.6  # of the vessels in an overlay
# The colours of the classes, again and again; cyan does not occur in a retina.
COLOURS = np.array([(0, 255, 255), (255, 255, 0), (255, 0, 255), (0, 255, 0)])


@dataclass(frozen=True)
class Prediction(Segmentation):
    """The segmentation of a photograph's file."""

    path: Path
    inference_seconds: float
    warnings: Sequence[str]  # reasons for doubt


def find_photographs(args: argparse.Namespace) -> list[Path]:
    """The photographs of --image; of folders and patterns without the pictures that this program wrote there.

    Raises:
        PhotographError: a name stands for no photographs, or a folder cannot be listed.
    """
    outputs = {os.path.realpath(output) for output in ([args.output] if args.output else [RESULT, FOLDER])}
    stems = functools.cache(lambda folder: {file.stem for file in images_in(folder)})
    left_out = []

    def is_output(file: Path) -> bool:
        stem, _, kind = file.stem.rpartition("_")
        if is_own(file):
            written = True
        elif kind in KINDS and file.suffix == ".png":  # of an earlier version, which did not name its author
            folder = file.parent
            written = os.path.realpath(folder) in outputs or (folder / TABLE).exists() or stem in stems(folder)
        elif file.name == RESULT or os.path.realpath(file) in outputs:
            written = _is_mask(file) is True
        else:
            written = file.parent.name == THUMBNAILS
        if written:
            left_out.append(file)
        return written

    try:
        return list_photographs(args.image, args.recursive, is_output)
    finally:
        if left_out:
            print(
                f"--image: left out {len(left_out)} pictures that this program wrote ({first_of(left_out)}); name "
                "them as files to take them for photographs"
            )
        folders = [Path(name) for name in args.image if os.path.isdir(name)]
        unread = [file for folder in folders for file in images_in(folder, args.recursive, UNREAD_SUFFIXES)]
        if unread:
            print(
                f"warning: --image: passed over {len(unread)} pictures of kinds that are not read "
                f"({first_of(unread)}); save them as PNG or TIFF"
            )


def is_own(path: Path, kind: str = "") -> bool:
    """Whether a file is a picture, of one of KINDS or any, that `write_pictures` wrote (thumbnails do not tell)."""
    if not os.path.isfile(path):  # a pipe would wait for what is written to it
        return False
    try:
        with open(path, "rb") as file:
            return f"Software\0{AUTHOR}: {kind}".encode() in file.read(256)
    except OSError:
        return False


def _is_mask(path: Path) -> bool | None:
    """Whether a picture is a mask as this program writes it: numbers of classes, or white; None if it is no picture."""
    try:
        image = load_image(path)
    except PhotographError:
        return None
    return image.mode == "L" and not any(image.histogram()[16:255])


def plan_outputs(photographs: Sequence[Path], args: argparse.Namespace) -> tuple[Path | None, list[Path]]:
    """The path of the table, if there is one, and the path of each photograph's mask.

    Raises:
        UsageError: --output does not fit the photographs, or a picture would be overwritten that this program did not
            write, or of which no table tells.
        OutputError: an input would be overwritten.
    """
    single = len(photographs) == 1
    output = Path(args.output or (RESULT if single and not args.report else FOLDER))
    is_file = output.suffix.lower() in IMAGE_SUFFIXES and not os.path.isdir(output)
    if is_file:
        _require_one_png(output, len(photographs), args)
    table = None if is_file else output / TABLE
    masks = [output] if is_file else [output / name for name in mask_names(photographs, masks_in(table))]

    inputs = (*photographs, args.weights, *_roi_masks(Path(args.roi_mask or "auto")))
    written = [path for mask in masks for path in _all_pictures(mask)]  # or removed
    written += [] if is_file else [table, output / REPORT]
    require_no_input(written, inputs, f"--output {output}")
    if is_file:
        _require_replaceable(output, args)
    else:
        _require_own_folder(output, photographs, masks, args)
    return table, masks


def _require_one_png(output: Path, photographs: int, args: argparse.Namespace) -> None:
    if photographs > 1:
        raise UsageError(f"--output {output}: is one file, but there are {photographs} photographs; name a folder")
    if output.suffix.lower() != ".png":
        raise UsageError(f"--output {output}: masks are written as PNG; name it {output.with_suffix('.png')}")
    if args.report:
        raise UsageError(f"--report: needs a folder, but --output {output} is one file; name a folder")


def _require_replaceable(output: Path, args: argparse.Namespace) -> None:
    """Check that the file of a single mask, and what is beside it, may be written."""
    if tells_of(output.parent / TABLE, output):
        raise UsageError(
            f"--output {output}: the {TABLE} beside it tells of the mask of this name; give its folder, "
            f"{output.parent}, or choose another name"
        )
    if _is_mask(output) is False:
        raise UsageError(f"--output {output}: would overwrite a picture that is no mask; choose another name")
    if not args.overwrite and not os.path.lexists(output):
        there = [path for path in picture_paths(output, args) if os.path.lexists(path)]
        _require_none(there, f"--output {output}", "no mask that tells of it")
    elif not args.overwrite and output.name != RESULT:  # which the tutorial's program wrote, too
        require_no_others([(output, False)], args)


def _require_own_folder(
    output: Path, photographs: Sequence[Path], masks: Sequence[Path], args: argparse.Namespace
) -> None:
    """Check that the folder of the masks holds none of the photographs, and no pictures of which no table tells."""
    folders = {os.path.realpath(folder) for folder in (output, *([output / THUMBNAILS] if args.report else []))}
    if any(os.path.realpath(path.parent) in folders for path in photographs):
        raise UsageError(
            f"--output {output}: holds the photographs themselves, and the next run would take the masks for "
            "photographs; choose another folder"
        )
    if not args.overwrite and not os.path.exists(output / TABLE):
        there = [path for mask in masks for path in picture_paths(mask, args) if os.path.lexists(path)]
        _require_none(there, f"--output {output}", f"no {TABLE} tells of it")


def _roi_masks(path: Path) -> list[Path]:
    try:
        return list(path.iterdir()) if os.path.isdir(path) else [path]
    except OSError as error:
        raise UsageError(f"--roi-mask {path}: cannot be read ({error.strerror}); change its permissions") from error


def require_no_others(masks: Iterable[tuple[Path, bool]], args: argparse.Namespace) -> None:
    """Check that no picture that is to be written replaces one that this program did not write.

    Args:
        masks: each with whether a table tells of it. Such a mask that another program changed is passed over, with the
            pictures beside it: whether it is kept or refused is found when its turn comes.

    Raises:
        UsageError: one would be replaced.
    """
    others = [
        path
        for mask, known in masks
        if not (known and os.path.lexists(mask) and not is_own(mask))
        for path in picture_paths(mask, args)
        if os.path.lexists(path) and not is_own(path) and path.parent.name != THUMBNAILS
    ]
    _require_none(others, f"--output {args.output or FOLDER}", "this program did not write it (or an earlier version)")


def _require_none(there: Sequence[Path], flag: str, reason: str) -> None:
    if there:
        raise UsageError(
            f"{flag}: {there[0].name} is there, and {reason}; choose another name, or let --overwrite replace what is "
            f"there ({len(there)} picture{'s' if len(there) > 1 else ''})"
        )


def mask_names(photographs: Sequence[Path], known: Mapping[str, str]) -> list[str]:
    """The name of each photograph's mask: what it is known by, else a new one that none of these has.

    So a photograph keeps its mask when others of its name come along.

    Args:
        known: names of masks by the `whole_path` of their photographs.
    """
    names = [known.get(whole_path(path)) for path in photographs]
    taken = {comparable(name) for name in names if name}
    for index, (path, stem) in enumerate(zip(photographs, output_names(photographs), strict=True)):
        if not names[index]:
            if comparable(f"{stem}_vessels.png") in taken:
                stem = _fitting(f"{stem}_{_digest(whole_path(path).encode())}")
            names[index] = f"{stem}_vessels.png"
    return names


def output_names(photographs: Sequence[Path]) -> list[str]:
    """The stem of each photograph; if two are the same, with the ending; if still the same, with its folders.

    So many folders are added as it takes. If two are `comparable` still, a digest of the path is added. A name
    that is too long for a file is cut, and a digest added.
    """
    absolute = [Path(os.path.abspath(path)) for path in photographs]
    parts = [(*path.parts[1:-1], path.name.replace(".", "_")) for path in absolute]
    names = [path.stem for path in photographs]

    def shared() -> set[str]:
        # Some file systems ignore case, and how accents are composed.
        return {name for name, count in Counter(map(comparable, names)).items() if count > 1}

    for length in range(1, max(map(len, parts)) + 1):
        if not (clashes := shared()):
            break
        names = [
            "_".join(part[-length:]) if comparable(name) in clashes else name
            for name, part in zip(names, parts, strict=True)
        ]
    clashes = shared()
    names = [
        f"{name}_{_digest(os.fsencode(path))}" if comparable(name) in clashes else name
        for name, path in zip(names, absolute, strict=True)
    ]
    return [_fitting(name) for name in names]


def _fitting(name: str) -> str:
    content = os.fsencode(name)
    if len(content) <= LONGEST_NAME:
        return name
    return content[: LONGEST_NAME - 17].decode(errors="ignore") + f"_{_digest(content)}"


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:16]


def lock_path(mask: Path) -> Path:
    """The file that a run holds while it writes a single mask: hidden, of a name that is never too long."""
    return mask.with_name(f".{_digest(os.fsencode(mask.name))}.lock")


def beside(mask: Path, kind: str) -> Path:
    return mask.with_name(f"{mask.stem.removesuffix('_vessels')}_{kind}.png")


def picture_paths(mask: Path, args: argparse.Namespace) -> list[Path]:
    """The files that `write_pictures` writes."""
    kinds = {"probability": args.save_prob, "overlay": args.overlay}
    thumbnails = thumbnail_paths(mask) if args.report else ()
    return [mask, *(beside(mask, kind) for kind, asked in kinds.items() if asked), *thumbnails]


def _all_pictures(mask: Path) -> list[Path]:
    """The files that `write_pictures` may write."""
    return [mask, *(beside(mask, kind) for kind in KINDS if kind != "vessels"), *thumbnail_paths(mask)]


def remove_other_pictures(mask: Path, args: argparse.Namespace) -> None:
    """Remove the pictures of a mask that `write_pictures` wrote, and will not now: they would show an earlier one.

    Raises:
        OutputError: one cannot be removed.
    """
    for path in set(_all_pictures(mask)) - set(picture_paths(mask, args)):
        kind = path.stem.rpartition("_")[2]
        if path.parent.name == THUMBNAILS or is_own(path, kind):
            remove(path)


def write_pictures(prediction: Prediction, mask: Path, args: argparse.Namespace) -> None:
    """Write the mask, and before it, with --save-prob, --overlay and --report, the other pictures beside it.

    One after another, and each in parts, since every copy of a large photograph counts.

    Raises:
        OutputError: they cannot be written.
    """
    if args.report:
        photograph_thumbnail, overlay_thumbnail = thumbnail_paths(mask)
        write_thumbnail(photograph_thumbnail, Image.fromarray(prediction.photograph))
    if args.overlay or args.report:
        overlay = draw_overlay(prediction)
        if args.overlay:
            _write(beside(mask, "overlay"), overlay, "overlay", compress_level=COMPRESSION)
        if args.report:
            write_thumbnail(overlay_thumbnail, overlay)
        del overlay
    if prediction.labels.size > LARGE:
        give_back_freed_memory()
    if args.save_prob:
        _write(beside(mask, "probability"), draw_probability(prediction), "probability", compress_level=COMPRESSION)
    two_classes = len(prediction.working_probabilities) == 1
    # By runs of one value: a mask takes a tenth less time than by COMPRESSION, and its file is half as large.
    picture = Image.fromarray(prediction.labels * np.uint8(255) if two_classes else prediction.labels)
    _write(mask, picture, "vessels", compress_type=zlib.Z_RLE)


def _write(path: Path, picture: Image.Image, kind: str, **options: int) -> None:
    texts = PngImagePlugin.PngInfo()
    texts.add_text("Software", f"{AUTHOR}: {kind}")
    write_picture(path, picture, pnginfo=texts, **options)


def draw_overlay(prediction: Prediction) -> Image.Image:
    """The photograph with the vessels drawn in, one colour per class: RGB."""
    height, width = prediction.labels.shape
    overlay = Image.new("RGB", (width, height))
    for top in range(0, height, ROWS_AT_ONCE):
        rows = slice(top, top + ROWS_AT_ONCE)
        part, labels = prediction.photograph[rows].copy(), prediction.labels[rows]
        vessels = labels > 0
        colours = COLOURS[(labels[vessels] - 1) % len(COLOURS)]  # [pixels, 3]; the other pixels stay
        part[vessels] = (1 - OPACITY) * part[vessels] + OPACITY * colours
        overlay.paste(Image.fromarray(part), (0, top))
    return overlay


def draw_probability(prediction: Prediction) -> Image.Image:
    """The probability of a vessel of any class, times 65535: grey of 16 bits; outside the field of view 0."""
    levels = np.empty(prediction.labels.shape, np.uint16)
    for rows, probabilities in probabilities_in_parts(
        prediction.working_probabilities, levels.shape, prediction.widened
    ):
        vessels = probabilities.sum(dim=0).numpy() * prediction.field_of_view[rows]
        levels[rows] = np.rint(vessels.clip(0, 1) * 65535)
    return Image.fromarray(levels)


def facts(prediction: Prediction, seconds: float) -> dict[str, str]:
    """What the table tells of a prediction."""
    height, width = prediction.labels.shape
    return {
        "width": str(width),
        "height": str(height),
        "field_of_view_diameter": f"{prediction.diameter:g}",
        "scale": f"{prediction.scale:.4g}",
        "vessel_share": f"{prediction.vessel_share:.5f}",
        "reliability": "" if prediction.reliability is None else f"{prediction.reliability:.3f}",
        "warning": "; ".join(prediction.warnings),
        "seconds": f"{seconds:.3f}",
    }


def shown(name: str | Path) -> str:
    r"""A name in one line of a terminal: `\n` for a character that would move its cursor."""
    return "".join(repr(letter)[1:-1] if letter < " " or letter == "\x7f" else letter for letter in str(name))


def progress_line(prediction: Prediction) -> str:
    height, width = prediction.labels.shape
    return (
        f"{shown(prediction.path)}: {width} x {height}, field of view {prediction.diameter:g} px, scale "
        f"{prediction.scale:.3g}, vessels are {prediction.vessel_share:.1%} of the field of view"
        f"{_trust(prediction, f'inference time: {prediction.inference_seconds:.3f} s')}"
    )


def brief_line(prediction: Prediction, name: str) -> str:
    """What to know of one photograph of many, by its name among them."""
    seconds = f"{prediction.inference_seconds:.1f} s"
    return f"{name}: vessels {prediction.vessel_share:.1%}{_trust(prediction, seconds)}"


def _trust(prediction: Prediction, seconds: str) -> str:
    reliability = "" if prediction.reliability is None else f", reliability {prediction.reliability:.2f}"
    warning = f", WARNING: {', '.join(prediction.warnings)}" if prediction.warnings else ""
    return f"{reliability}, {seconds}{warning}"
