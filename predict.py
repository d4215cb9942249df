"""Segment the vessels of retinal photographs with trained weights."""

import src.threads  # noqa: F401  # before torch is imported

# isort: split

import argparse
import functools
import math
import os
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import closing, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import torch

from src import Segmenter
from src.errors import DatasetError
from src.photograph import LARGE, PhotographError, image_size, page_and_pages, read_photograph, require_file
from src.places import Places
from src.reliability import reasons_for_doubt
from src.roi_mask import choose_field_of_view, require_roi_mask, roi_mask_path
from src.segmenter import PRETRAINED
from src.weights import Checkpoint, load_model
from train_utils.command_line import (
    Parser,
    UsageError,
    add_switch,
    at_least,
    probability_or_auto,
    run_script,
    select_device,
)
from train_utils.export import export_onnx
from train_utils.files import make_output_folder, remove
from train_utils.in_order import in_order
from train_utils.lock import FolderLock
from train_utils.memory import memory_for
from train_utils.mixed_precision import add_amp_flags, amp_dtype, settle_amp
from train_utils.normalization import add_normalization_flags, settle_normalization
from train_utils.prediction_files import (
    Prediction,
    brief_line,
    facts,
    find_photographs,
    is_own,
    lock_path,
    picture_paths,
    plan_outputs,
    progress_line,
    remove_other_pictures,
    require_no_others,
    shown,
    write_pictures,
)
from train_utils.prediction_report import REPORT, THUMBNAILS, write_report
from train_utils.prediction_table import (
    COLUMNS,
    DIGESTS,
    FACTS,
    PredictionTable,
    Row,
    digest_of,
    escaped,
    printable,
    whole_path,
)

TRAINED = Path("save_weights", "best_model.pth")
AT_ONCE = 2  # photographs that are worked on at once

_PLACES = Places(AT_ONCE)


@dataclass(frozen=True)
class Outcome:
    """What became of a photograph."""

    path: Path
    row: Row  # of the table
    line: str  # to print
    error: str = ""  # why there is no mask
    kept: bool = False  # the mask is of an earlier run
    replaced: bool = False  # the mask is in place of another one


def main(args: argparse.Namespace) -> None:
    device = select_device(args.device)
    print(f"using {device} device.")
    args.device = device.type  # without a GPU, cuda means the CPU, and the masks are the same
    settle_amp(args, device)
    args.weights = choose_weights(args.weights)
    print(f"weights: {args.weights}")
    if args.export:
        export_onnx(args.weights, args.export, functools.partial(settle_normalization, args))
        print(f"{args.export}: the model of {args.weights} as ONNX")
        return
    photographs = find_photographs(args)
    table, masks = plan_outputs(photographs, args)
    require_roi_mask(args.roi_mask, photographs)
    model, checkpoint = load_model(args.weights, device)
    settle_by_checkpoint(args, checkpoint)
    segmenter = Segmenter(model, checkpoint, amp_dtype(args))
    folder = make_output_folder(masks[0].parent, "--output")
    if args.report:
        make_output_folder(folder / THUMBNAILS, "--report")

    # A folder of masks is held by its table.
    held = FolderLock(lock_path(masks[0]), "--output") if table is None else nullcontext()
    with held, PredictionTable(table) as rows:
        outcomes = segment_all(photographs, masks, rows, segmenter, args)
    failures = [shown(outcome.error) for outcome in outcomes if outcome.error]
    if len(photographs) > 1:
        warned = sum(bool(outcome.row["warning"]) for outcome in outcomes)
        print(
            f"{len(photographs) - len(failures)} of {len(photographs)} photographs segmented, {warned} with a warning, "
            f"{len(failures)} failed; the files are in {folder}"
        )
    if failures:
        raise PhotographError(
            "\n  ".join([f"{len(failures)} of {len(photographs)} photographs failed:", *failures])
            if len(photographs) > 1
            else failures[0]
        )


def segment_all(
    photographs: Sequence[Path],
    masks: Sequence[Path],
    rows: PredictionTable,
    segmenter: Segmenter,
    args: argparse.Namespace,
) -> list[Outcome]:
    """Segment photographs, two at once, and tell of each in order; the report is written however it ends.

    Each has half of the threads. One alone has all of them, and then sums are rounded otherwise: of the probabilities
    of a photograph of 8 megapixels, as 16 bits, one in 40 thousand differs by 1.
    """
    settings = digest_of(Path(args.weights), describe_settings(args).encode())
    jobs = [(path, mask, rows.former(mask)) for path, mask in zip(photographs, masks, strict=True)]
    if rows.path is not None and not args.overwrite:
        require_no_others([(mask, former is not None) for _, mask, former in jobs], args)
    count = Counter(path.name for path in photographs)
    done: list[Outcome] = []
    started, new = time.perf_counter(), 0
    threads = torch.get_num_threads()

    def work(job: tuple[Path, Path, Row | None]) -> Outcome:
        path = job[0]
        name = shown(path.name if count[path.name] == 1 else path) if len(jobs) > 1 else None
        return work_on(*job, rows, segmenter, settings, args, threads, name)

    def tell_of_stop() -> None:
        print("stopping as soon as the photographs that were begun are done", flush=True)

    try:
        with closing(in_order(work, jobs, AT_ONCE, on_interrupt=tell_of_stop)) as outcomes:
            for outcome in outcomes:
                done.append(outcome)
                rows.add(outcome.row)
                new += not outcome.kept
                left = (time.perf_counter() - started) / max(new, 1) * (len(jobs) - len(done))
                time_left = f" ({timedelta(seconds=round(left))} left)" if new and left >= 1 else ""
                if len(jobs) > 1 or not outcome.error:
                    print(f"[{len(done)}/{len(jobs)}] {outcome.line}{time_left}", flush=True)
    except KeyboardInterrupt:
        print(f"stopped after {len(done)} of {len(jobs)} photographs; the same command goes on from here")
        raise
    finally:
        torch.set_num_threads(threads)  # of those that begin later
        page = masks[0].parent / REPORT
        if args.report:
            told = [one.row | {"file": one.path} for one in done if not one.error]
            failures = {one.path: one.error for one in done if one.error}
            write_report(page, FACTS, told, failures, dict(zip(photographs, masks, strict=True)))
        elif any(one.replaced for one in done) and page.exists():
            remove(page)
            print(f"{page}: removed, as it showed other masks; --report writes it anew")
    return done


def work_on(
    path: Path,
    mask: Path,
    former: Row | None,
    rows: PredictionTable,
    segmenter: Segmenter,
    settings: str,
    args: argparse.Namespace,
    threads: int,
    name: str | None,
) -> Outcome:
    """Segment a photograph and write its pictures, unless an earlier run did just that.

    Args:
        path, mask: of the photograph and of its mask.
        former: the row of this mask in the table of earlier runs.
        rows: the table.
        settings: the digest of the weights and the flags.
        threads: of torch, for all photographs that are worked on at once.
        name: of the photograph among others. Then the line is for a terminal of 80 columns, with what to look at; the
            table has the rest. None: it is alone.
    """
    started = time.perf_counter()
    row = dict.fromkeys(COLUMNS, "") | {"file": whole_path(path)}
    try:
        row |= digests(path, settings, args)
        if former and not args.overwrite and stays(path, mask, former, row, args):
            line = f"{name}: segmented before" if name else f"{shown(path)}: segmented before -> {mask}"
            return Outcome(path, former | {"file": row["file"]}, line, kept=True)
        replaced = is_own(mask) if former is None else not same_digests(former, row)
        places = 1 if name and math.prod(image_size(path)) <= LARGE else AT_ONCE  # two of more may not fit into memory
        with _PLACES.taken(places):
            torch.set_num_threads(threads if threads % AT_ONCE else threads * places // AT_ONCE)  # of this thread
            prediction = predict(path, segmenter, args)
            if former and replaced:
                rows.give_up(former)
            with memory_for(path):
                write_pictures(prediction, mask, args)
        if replaced:
            remove_other_pictures(mask, args)  # of the mask before
        row |= facts(prediction, time.perf_counter() - started) | {"mask": escaped(Path(mask.name))}
        line = brief_line(prediction, name) if name else f"{progress_line(prediction)} -> {mask}"
        if former and former["settings_digest"] not in ("", row["settings_digest"]):
            line += " (in place of the one with other weights or flags)"
        return Outcome(path, row, line, replaced=replaced)
    except DatasetError as error:
        row["error"] = printable(str(error))
        return Outcome(path, row, f"failed: {shown(str(error))}", error=str(error))


def stays(path: Path, mask: Path, former: Row, row: Row, args: argparse.Namespace) -> bool:
    """Whether the mask of an earlier run stays, as the same is asked for again.

    Args:
        path, mask: of the photograph and of its mask.
        former: the row of this mask in the table of earlier runs.
        row: that of now, with its file and digests.

    Raises:
        PhotographError: what would be replaced is the mask of another photograph, or another program changed it.
    """
    if former["photograph_digest"] != row["photograph_digest"] and former["file"] != row["file"]:
        raise PhotographError(
            f"{path}: {mask} is the mask of {former['file']}; choose another --output, or give --overwrite"
        )
    own = is_own(mask)
    # The thumbnails of a mask that was corrected by hand would show another one.
    needed = [picture for picture in picture_paths(mask, args) if own or picture.parent.name != THUMBNAILS]
    if same_digests(former, row) and all(picture.exists() and picture.stat().st_size for picture in needed):
        return True
    if not own and os.path.lexists(mask):
        raise PhotographError(
            f"{path}: {mask} was changed since this program wrote it (or an earlier version did); choose another "
            "--output, or let --overwrite replace it"
        )
    return False


def same_digests(former: Row, row: Row) -> bool:
    return all(former[column] == row[column] for column in DIGESTS)


def digests(path: Path, settings: str, args: argparse.Namespace) -> Row:
    """The digests of a photograph and of what its mask depends on besides, by the names of their columns."""
    roi_mask = roi_mask_path(path, args.roi_mask)
    for file in [path, *([roi_mask] if roi_mask else [])]:
        require_file(file)
    try:
        parts = [settings.encode(), *([roi_mask] if roi_mask else [str(args.roi_mask).encode()])]
        return {"photograph_digest": digest_of(path), "settings_digest": digest_of(*parts)}
    except OSError as error:
        raise PhotographError(f"{error.filename or path}: cannot be read ({error.strerror or error})") from error


def describe_settings(args: argparse.Namespace) -> str:
    """The settled flags that a mask depends on, except the weights and the ROI mask."""
    others = {
        "weights",
        "image",
        "recursive",
        "roi_mask",
        "output",
        "save_prob",
        "overlay",
        "report",
        "overwrite",
        "export",
    }
    return repr(sorted((name, value) for name, value in vars(args).items() if name not in others))


def predict(path: Path, segmenter: Segmenter, args: argparse.Namespace) -> Prediction:
    """Read a photograph, find its field of view and segment it.

    Raises:
        DatasetError: the photograph or its ROI mask cannot be used, or does not fit into memory.
    """
    with memory_for(path):
        photograph = read_photograph(path)
        field_of_view, retina = choose_field_of_view(path, photograph, args.roi_mask)
        started = time.perf_counter()
        segmentation = segmenter(
            photograph,
            field_of_view,
            retina,
            threshold=args.threshold,
            scale=None if args.scale == "auto" else args.scale,
            flips=args.tta,
            tile=args.tile,
            batch_size=args.batch_size,
        )
        seconds = time.perf_counter() - started
        warnings = reasons_for_doubt(photograph, retina, segmentation.vessel_share, segmentation.reliability)
    page, pages, damaged = page_and_pages(path)
    if pages > 1:
        warnings.append(f"page {page} of {pages}, the largest")
    if damaged:
        warnings.append("more pages are damaged or unknown")
    return Prediction(**vars(segmentation), path=path, inference_seconds=seconds, warnings=warnings)


def choose_weights(weights: str | None) -> Path:
    """The file of --weights; without the flag that of one's own training, else the one of the project."""
    if weights is not None:
        return Path(weights)
    return PRETRAINED if PRETRAINED.exists() and not TRAINED.exists() else TRAINED


def settle_by_checkpoint(args: argparse.Namespace, checkpoint: Checkpoint) -> None:
    """Check the flags against the model; settle those that depend on the checkpoint.

    `--threshold auto` and a missing `--tta` are read from it; `--mean`, `--std` and `--normalization` override it.

    Raises:
        UsageError: the model is not for colour photographs, or a flag needs a model of two classes.
    """
    model_args = checkpoint["model_args"]
    channels, classes = model_args.get("in_channels", 3), model_args["num_classes"]
    if channels != 3:
        raise UsageError(f"--weights {args.weights}: a model of {channels} input channels; photographs have 3")
    if classes > 2 and args.threshold != 0.5:
        raise UsageError(f"--threshold: has no meaning for the {classes} classes of {args.weights}; leave it out")
    settle_normalization(args, checkpoint)
    if args.tta is None:
        args.tta = checkpoint.get("tta", False)
    if args.threshold == "auto":
        args.threshold = checkpoint.get("threshold", 0.5)
        origin = "from" if "threshold" in checkpoint else "none is stored in"
        print(f"threshold {args.threshold:g} ({origin} {args.weights})")


def scale_or_auto(text: str) -> float | str:
    return text if text == "auto" else at_least(0.01, float)(text)


def get_parser() -> argparse.ArgumentParser:
    parser = Parser(__doc__, "python predict.py --image my_photographs --output masks --overlay")
    group = parser.group("used most")
    group.add_argument(
        "--image",
        nargs="+",
        default=["./DRIVE/test/images/01_test.tif"],
        metavar="PATH",
        help="photographs: files, folders or glob patterns; one that begins with a dash as --image=-name",
    )
    group.add_argument(
        "--output",
        help="a PNG for one photograph (255 = vessel), or a folder for several "
        "(default: test_result.png for one, the folder predictions for several)",
    )
    group.add_argument(
        "--weights",
        help=f"weights that train.py or the tutorial wrote (default: ./{TRAINED}, or where there is none "
        f"{PRETRAINED.parent.name}/{PRETRAINED.name}, which come with the project)",
    )
    add_switch(group, "--overlay", default=False, help="also write the photograph with the vessels drawn in")
    add_switch(group, "--report", default=False, help="also write predictions.html, a page to look through them all")
    group = parser.group("input")
    add_switch(
        group, "--recursive", default=False, help="look into the folders of a folder too, except hidden and linked ones"
    )
    group.add_argument(
        "--roi-mask",
        metavar="PATH",
        help="mask of the field of view, white inside: a file, a folder (matched by stem), auto (find it in the "
        "photograph) or none (default: DRIVE's mask if it exists, else auto)",
    )
    group = parser.group("output")
    add_switch(group, "--save-prob", default=False, help="also write the vessel probability as a 16-bit PNG")
    add_switch(
        group,
        "--overwrite",
        default=False,
        help="segment every photograph anew (default: keep what predictions.csv records with the same photograph, "
        "weights and flags)",
    )
    group.add_argument(
        "--export", metavar="FILE", help="write the model as ONNX and predict nothing (needs onnx and onnxscript)"
    )
    group = parser.group("model")
    group.add_argument(
        "--threshold",
        default=0.5,
        type=probability_or_auto,
        help="vessel probability above which a pixel is a vessel; auto: the threshold stored in the weights",
    )
    group.add_argument(
        "--scale",
        default="auto",
        type=scale_or_auto,
        help="factor to resize the photograph by; auto: match the field of view of the model's training photographs; "
        "without a border, by how well the flips agree",
    )
    add_switch(
        group,
        "--tta",
        default=None,
        help="average over the four flips, in four times the time, or over the sizes that the weights name (default: "
        "as stored in the weights, else off)",
    )
    add_normalization_flags(group, None, None, origin="Default of the three: as stored in the weights")
    group = parser.group("speed")
    group.add_argument("--device", default="cuda", help="device; without a GPU, cuda means the CPU")
    group.add_argument(
        "--tile",
        type=at_least(64),
        metavar="N",
        help="side of overlapping tiles, pixels (default: tiles only where memory requires them)",
    )
    group.add_argument("--batch-size", default=1, type=at_least(1), help="number of tiles or flips in one forward pass")
    add_amp_flags(group)
    return parser


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    return get_parser().parse_args(argv)


if __name__ == "__main__":
    run_script(main, parse_args())
