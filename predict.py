"""Segment the vessels of retinal photographs with trained weights."""

import argparse
import time
from collections.abc import Sequence
from pathlib import Path

from src import Segmenter
from src.errors import DatasetError
from src.photograph import PhotographError, page_and_pages, read_photograph
from src.reliability import reasons_for_doubt
from src.roi_mask import choose_field_of_view, require_roi_mask
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
from train_utils.files import make_output_folder, write_csv
from train_utils.flags import add_amp_flags
from train_utils.memory import memory_for
from train_utils.prediction_files import (
    COLUMNS,
    Prediction,
    find_photographs,
    plan_outputs,
    progress_line,
    table_row,
    write_pictures,
)
from train_utils.prediction_report import REPORT, THUMBNAILS, write_report
from train_utils.settings import amp_dtype, settle_amp

TRAINED = Path("save_weights", "best_model.pth")


def main(args: argparse.Namespace) -> None:
    device = select_device(args.device)
    print(f"using {device} device.")
    settle_amp(args, device)
    args.weights = choose_weights(args.weights)
    print(f"weights: {args.weights}")
    if args.export:
        export_onnx(args.weights, args.export)
        print(f"{args.export}: the model of {args.weights} as ONNX")
        return
    photographs = find_photographs(args)
    table, masks = plan_outputs(photographs, args)
    require_roi_mask(args.roi_mask)
    model, checkpoint = load_model(args.weights, device)
    settle_by_checkpoint(args, checkpoint)
    segmenter = Segmenter(model, checkpoint, amp_dtype(args))
    folder = make_output_folder(masks[0].parent, "--output")
    if args.report:
        make_output_folder(folder / THUMBNAILS, "--report")

    rows, failures = [], {}
    try:
        for number, (path, mask) in enumerate(zip(photographs, masks, strict=True), start=1):
            started = time.perf_counter()
            try:
                prediction = predict(path, segmenter, args)
                write_pictures(prediction, mask, args)
                rows.append(table_row(prediction, time.perf_counter() - started))
                outcome = f"{progress_line(prediction)} -> {mask}"
            except DatasetError as error:
                failures[path] = str(error)
                if len(photographs) == 1:
                    raise
                outcome = f"failed: {error}"
            print(f"[{number}/{len(photographs)}] {outcome}", flush=True)
    finally:
        if table:
            write_csv(table, COLUMNS, rows)
        if args.report:
            write_report(folder / REPORT, COLUMNS, rows, failures, dict(zip(photographs, masks, strict=True)))
    if failures:
        raise PhotographError(
            "\n  ".join([f"{len(failures)} of {len(photographs)} photographs failed:", *failures.values()])
        )


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
    page, pages = page_and_pages(path)
    if pages > 1:
        warnings.append(f"page {page} of {pages}, the largest")
    return Prediction(**vars(segmentation), path=path, inference_seconds=seconds, warnings=warnings)


def choose_weights(weights: str | None) -> Path:
    """The file of --weights; without the flag that of one's own training, else the one of the project."""
    if weights is not None:
        return Path(weights)
    return PRETRAINED if PRETRAINED.exists() and not TRAINED.exists() else TRAINED


def settle_by_checkpoint(args: argparse.Namespace, checkpoint: Checkpoint) -> None:
    """Check the flags against the model; read `--threshold auto` and a missing `--tta` from the checkpoint.

    Raises:
        UsageError: the model is not for colour photographs, or a flag needs a model of two classes.
    """
    model_args = checkpoint["model_args"]
    channels, classes = model_args.get("in_channels", 3), model_args["num_classes"]
    if channels != 3:
        raise UsageError(f"--weights {args.weights}: a model of {channels} input channels; photographs have 3")
    if classes > 2 and args.threshold != 0.5:
        raise UsageError(f"--threshold: has no meaning for the {classes} classes of {args.weights}; leave it out")
    if args.tta is None:
        args.tta = checkpoint.get("tta", False)
    if args.threshold == "auto":
        args.threshold = checkpoint.get("threshold", 0.5)
        origin = "from" if "threshold" in checkpoint else "none is stored in"
        print(f"threshold {args.threshold:g} ({origin} {args.weights})")


def scale_or_auto(text: str) -> float | str:
    return text if text == "auto" else at_least(0.01, float)(text)


def get_parser() -> argparse.ArgumentParser:
    parser = Parser(description=__doc__)
    add = parser.add_argument
    add(
        "--weights",
        help=f"weights that train.py or the tutorial wrote (default: ./{TRAINED}, or where there is none "
        f"{PRETRAINED.parent.name}/{PRETRAINED.name}, which come with the project)",
    )
    add(
        "--image",
        nargs="+",
        default=["./DRIVE/test/images/01_test.tif"],
        metavar="PATH",
        help="photographs: files, folders or glob patterns; one that begins with a dash as --image=-name",
    )
    add_switch(parser, "--recursive", default=False, help="look into the folders of a folder too, except hidden ones")
    add(
        "--roi-mask",
        metavar="PATH",
        help="mask of the field of view, white inside: a file, a folder (matched by stem), auto (find it in the "
        "photograph) or none (default: DRIVE's mask if it exists, else auto)",
    )
    add(
        "--output",
        help="a PNG for one photograph (255 = vessel), or a folder for several "
        "(default: test_result.png for one, the folder predictions for several)",
    )
    add(
        "--scale",
        default="auto",
        type=scale_or_auto,
        help="factor to resize the photograph by; auto: match the field of view of the model's training photographs",
    )
    add(
        "--threshold",
        default=0.5,
        type=probability_or_auto,
        help="vessel probability above which a pixel is a vessel; auto: the threshold stored in the weights",
    )
    add_switch(
        parser,
        "--tta",
        default=None,
        help="average over the four flips, in four times the time (default: as stored in the weights, else off)",
    )
    add_switch(parser, "--save-prob", default=False, help="also write the vessel probability as a 16-bit PNG")
    add_switch(parser, "--overlay", default=False, help="also write the photograph with the vessels drawn in")
    add_switch(parser, "--report", default=False, help="also write predictions.html, a page to look through them all")
    add(
        "--tile",
        type=at_least(64),
        metavar="N",
        help="side of overlapping tiles, pixels (default: tiles only where memory requires them)",
    )
    add("--batch-size", default=1, type=at_least(1), help="number of tiles or flips in one forward pass")
    add_amp_flags(parser)
    add("--device", default="cuda", help="device; without a GPU, cuda means the CPU")
    add("--export", metavar="FILE", help="write the model as ONNX and predict nothing (needs onnx and onnxscript)")
    return parser


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    return get_parser().parse_args(argv)


if __name__ == "__main__":
    run_script(main, parse_args())
