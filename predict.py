"""Segment the vessels of retinal photographs with trained weights."""

import argparse
import csv
import io
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torchvision.utils import draw_segmentation_masks

from my_dataset import DatasetError, read_binary_mask
from src.inference import for_inference
from src.photograph import (
    IMAGE_SUFFIXES,
    PhotographError,
    field_of_view_diameter,
    find_field_of_view,
    list_photographs,
    prepare,
    read_photograph,
)
from src.segment import match_scale, segment
from train_utils.checkpoint import Checkpoint, load_model
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
from train_utils.files import make_output_folder, replace_whole
from train_utils.speed import add_amp_flags, amp_dtype, settle_amp

TABLE = "predictions.csv"
VESSEL_COLOUR = (0, 255, 255)  # far from everything in a retina


@dataclass(frozen=True)
class Prediction:
    """A photograph of H x W pixels and what was found in it."""

    path: Path
    photograph: np.ndarray  # uint8 [H, W, 3]
    field_of_view: np.ndarray  # bool [H, W]
    diameter: float  # of the field of view, pixels
    scale: float
    probabilities: Tensor  # [C - 1, H, W], of each class but the background
    labels: np.ndarray  # uint8 [H, W]; 0 is the background, and all outside the field of view
    inference_seconds: float

    @property
    def vessel_share(self) -> float:
        """Of the field of view."""
        return np.count_nonzero(self.labels) / np.count_nonzero(self.field_of_view)


def main(args: argparse.Namespace) -> None:
    device = select_device(args.device)
    print(f"using {device} device.")
    settle_amp(args, device)
    if args.export:
        export_onnx(args.weights, args.export)
        print(f"{args.export}: the model of {args.weights} as ONNX")
        return
    photographs = list_photographs(args.image)
    table, masks = plan_outputs(photographs, args)
    require_roi_mask(args.roi_mask)
    model, checkpoint = load_model(args.weights, device)
    settle_by_checkpoint(args, checkpoint)
    model = for_inference(model, amp=args.amp)
    make_output_folder(masks[0].parent, "--output")

    rows, failures = [], []
    try:
        for number, (path, mask) in enumerate(zip(photographs, masks, strict=True), start=1):
            started = time.perf_counter()
            try:
                prediction = predict(path, model, checkpoint, args)
                write_pictures(prediction, mask, args)
                rows.append(table_row(prediction, time.perf_counter() - started))
                outcome = f"{progress_line(prediction)} -> {mask}"
            except (PhotographError, DatasetError) as error:
                if len(photographs) == 1:
                    raise
                failures.append(str(error))
                outcome = f"failed: {error}"
            print(f"[{number}/{len(photographs)}] {outcome}", flush=True)
    finally:
        if table:
            write_table(rows, table)
    if failures:
        raise PhotographError("\n  ".join([f"{len(failures)} of {len(photographs)} photographs failed:", *failures]))


def predict(path: Path, model: nn.Module, checkpoint: Checkpoint, args: argparse.Namespace) -> Prediction:
    """Read a photograph, find its field of view and segment it.

    Raises:
        PhotographError, DatasetError: the photograph or its ROI mask cannot be used.
        UsageError: it does not fit into the memory of a GPU.
    """
    photograph = read_photograph(path)
    field_of_view, retina = choose_field_of_view(path, photograph, args.roi_mask)
    diameter = field_of_view_diameter(retina)
    scale = match_scale(diameter, checkpoint["fov_diameter"]) if args.scale == "auto" else args.scale
    started = time.perf_counter()
    try:
        probabilities = segment(
            model,
            prepare(photograph, retina, checkpoint),
            checkpoint["mean"],
            checkpoint["std"],
            scale=scale,
            tile=args.tile,
            flips=args.tta,
            batch_size=args.batch_size,
            amp_dtype=amp_dtype(args),
        )
    except torch.OutOfMemoryError as error:
        raise UsageError(f"--tile: {path} does not fit into the GPU's memory; try --tile 512 --batch-size 1") from error
    seconds = time.perf_counter() - started
    labels = np.where(field_of_view, classify(probabilities, args.threshold), 0).astype(np.uint8)
    return Prediction(path, photograph, field_of_view, diameter, scale, probabilities, labels, seconds)


def classify(probabilities: Tensor, threshold: float) -> np.ndarray:
    """The class of each pixel, [H, W]: of two by the threshold, of more the most probable."""
    if len(probabilities) == 1:
        return (probabilities[0] > threshold).numpy()
    background = 1 - probabilities.sum(dim=0, keepdim=True)
    return torch.cat([background, probabilities]).argmax(dim=0).numpy()


# ---- the field of view


def require_roi_mask(choice: str | None) -> None:
    if choice not in (None, "auto", "none") and not Path(choice).exists():
        raise UsageError(f"--roi-mask {choice}: no such file or folder; give one, or auto, or none")


def choose_field_of_view(path: Path, photograph: np.ndarray, choice: str | None) -> tuple[np.ndarray, np.ndarray]:
    """Where vessels count in a photograph, by the flag --roi-mask, and where its retina is: bool [H, W] both."""
    mask_path = roi_mask_path(path, choice)
    if mask_path is None:
        found = find_field_of_view(photograph)
        # Without a mask the retina is as large as with one, and so are its vessels.
        return np.ones_like(found) if choice == "none" else found, found
    field_of_view = read_binary_mask(mask_path)
    (height, width), (mask_height, mask_width) = photograph.shape[:2], field_of_view.shape
    if (height, width) != (mask_height, mask_width):
        raise PhotographError(
            f"--roi-mask {mask_path}: is {mask_width} x {mask_height} pixels, but its photograph {path} is "
            f"{width} x {height}; they must match (--roi-mask auto does without)"
        )
    if not field_of_view.any():
        raise PhotographError(f"--roi-mask {mask_path}: is black everywhere; the field of view must be white")
    # A mask that is small in its frame may be of a part of the retina, whose size and colours it does not tell.
    small = field_of_view_diameter(field_of_view) < 0.8 * min(height, width)
    return field_of_view, find_field_of_view(photograph) | field_of_view if small else field_of_view


def roi_mask_path(path: Path, choice: str | None) -> Path | None:
    """The file of a photograph's ROI mask; None where its field of view is to be found in itself."""
    if choice in ("auto", "none"):
        return None
    if choice is None:
        beside = path.parent.parent / "mask" / f"{path.stem}_mask.gif"  # as in DRIVE
        return beside if beside.is_file() else None
    if Path(choice).is_file():
        return Path(choice)
    stems = path.stem, f"{path.stem}_mask"
    matches = [file for file in list_photographs([choice]) if file.stem in stems]
    if len(matches) != 1:
        found = "both " + " and ".join(map(str, matches[:2])) if matches else "no such file"
        raise PhotographError(f"--roi-mask {choice}: needs one {stems[0]}.* or {stems[1]}.* for {path}, has {found}")
    return matches[0]


# ---- what is written


def plan_outputs(photographs: Sequence[Path], args: argparse.Namespace) -> tuple[Path | None, list[Path]]:
    """Where the table goes, if there is one, and the mask of each photograph.

    Raises:
        UsageError: --output does not fit, or an input would be overwritten.
    """
    single = len(photographs) == 1
    output = Path(args.output or ("test_result.png" if single else "predictions"))
    looks_like_a_file = output.suffix.lower() in IMAGE_SUFFIXES and not output.is_dir()
    if looks_like_a_file and not single:
        raise UsageError(f"--output {output}: is one file, but there are {len(photographs)} photographs; name a folder")
    if looks_like_a_file and output.suffix.lower() != ".png":
        raise UsageError(f"--output {output}: masks are written as PNG; name it {output.with_suffix('.png')}")
    masks = [output] if looks_like_a_file else [output / f"{name}_vessels.png" for name in output_names(photographs)]

    roi_masks = Path(args.roi_mask or "auto")
    inputs = (*photographs, Path(args.weights), *(roi_masks.iterdir() if roi_masks.is_dir() else [roi_masks]))
    inputs = {path.resolve() for path in inputs}
    written = [path for mask in masks for path in (mask, beside(mask, "probability"), beside(mask, "overlay"))]
    overwritten = next((path for path in written if path.resolve() in inputs), None)
    if overwritten:
        raise UsageError(f"--output {output}: would overwrite the input {overwritten}; choose another place")
    if looks_like_a_file:
        return None, masks
    if any(path.parent.resolve() == output.resolve() for path in photographs):
        raise UsageError(
            f"--output {output}: holds the photographs themselves, and the next run would take the masks for "
            "photographs; choose another folder"
        )
    return output / TABLE, masks


def output_names(photographs: Sequence[Path]) -> list[str]:
    """The stem of each photograph; where two would be the same, with the ending, and then with the folder.

    Raises:
        UsageError: even these are the same.
    """
    names = [path.stem for path in photographs]
    longer_names = (
        lambda path: path.name.replace(".", "_"),
        lambda path: f"{path.absolute().parent.name}_{path.name.replace('.', '_')}",
    )

    def shared() -> set[str]:
        # Some file systems do not tell capitals from small letters.
        return {name for name, count in Counter(name.lower() for name in names).items() if count > 1}

    for longer in longer_names:
        clashes = shared()
        names = [
            longer(path) if name.lower() in clashes else name for name, path in zip(names, photographs, strict=True)
        ]
    if clashes := shared():
        first, second = [path for name, path in zip(names, photographs, strict=True) if name.lower() in clashes][:2]
        raise UsageError(f"--image: {first} and {second} would get masks of the same name; predict them separately")
    return names


def beside(mask: Path, kind: str) -> Path:
    return mask.with_name(f"{mask.stem.removesuffix('_vessels')}_{kind}.png")


def write_pictures(prediction: Prediction, mask: Path, args: argparse.Namespace) -> None:
    """Write the mask, and what else was asked for beside it."""
    two_classes = len(prediction.probabilities) == 1
    pictures = {mask: prediction.labels * np.uint8(255) if two_classes else prediction.labels}
    if args.save_prob:
        vessels = prediction.probabilities.sum(dim=0).numpy() * prediction.field_of_view
        pictures[beside(mask, "probability")] = np.rint(vessels.clip(0, 1) * 65535).astype(np.uint16)
    if args.overlay:
        pictures[beside(mask, "overlay")] = draw_overlay(prediction)
    for path, picture in pictures.items():
        with replace_whole(path) as file:
            Image.fromarray(picture).save(file, format="PNG")


def draw_overlay(prediction: Prediction) -> np.ndarray:
    """The photograph with the vessels drawn in, each class in a colour of its own: uint8 [H, W, 3]."""
    classes = len(prediction.probabilities)
    labels = torch.from_numpy(prediction.labels)
    masks = labels == torch.arange(1, classes + 1, dtype=torch.uint8)[:, None, None]  # [C - 1, H, W]
    photograph = torch.from_numpy(prediction.photograph).permute(2, 0, 1)
    colours = [VESSEL_COLOUR] if classes == 1 else None
    return draw_segmentation_masks(photograph, masks, alpha=0.6, colors=colours).permute(1, 2, 0).numpy()


def table_row(prediction: Prediction, seconds: float) -> dict[str, Any]:
    height, width = prediction.labels.shape
    return {
        "file": prediction.path,
        "width": width,
        "height": height,
        "field_of_view_diameter": f"{prediction.diameter:g}",
        "scale": f"{prediction.scale:.4g}",
        "vessel_share": f"{prediction.vessel_share:.5f}",
        "seconds": f"{seconds:.3f}",
    }


def write_table(rows: Sequence[dict[str, Any]], path: Path) -> None:
    header = ["file", "width", "height", "field_of_view_diameter", "scale", "vessel_share", "seconds"]
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, header)
    writer.writeheader()
    writer.writerows(rows)
    with replace_whole(path) as file:
        file.write(text.getvalue().encode())


def progress_line(prediction: Prediction) -> str:
    height, width = prediction.labels.shape
    return (
        f"{prediction.path}: {width} x {height}, field of view {prediction.diameter:g} px, scale "
        f"{prediction.scale:.3g}, vessels are {prediction.vessel_share:.1%} of the field of view, "
        f"inference time: {prediction.inference_seconds:.3f} s"
    )


# ---- the flags


def settle_by_checkpoint(args: argparse.Namespace, checkpoint: Checkpoint) -> None:
    """Check the flags against the model, and take `--threshold auto` and an open `--tta` from the checkpoint.

    Raises:
        UsageError: the model is not for colour photographs, or not for two classes where a flag needs that.
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
    add("--weights", default="./save_weights/best_model.pth", help="weights that train.py or the tutorial wrote")
    add(
        "--image",
        nargs="+",
        default=["./DRIVE/test/images/01_test.tif"],
        metavar="PATH",
        help="photographs: files, folders or glob patterns",
    )
    add(
        "--roi-mask",
        metavar="PATH",
        help="the field of view, white inside: a file, a folder (matched by stem), auto (found in the photograph) or "
        "none (default: DRIVE's mask where there is one beside the images, else auto)",
    )
    add(
        "--output",
        help="a PNG for one photograph (255 = vessel), a folder for more "
        "(default: test_result.png for one, the folder predictions for more)",
    )
    add(
        "--scale",
        default="auto",
        type=scale_or_auto,
        help="resize by this for the model; auto: to the field of view that it was trained on",
    )
    add("--threshold", default=0.5, type=probability_or_auto, help="of the probability; auto: as stored in the weights")
    add_switch(
        parser,
        "--tta",
        default=None,
        help="average over the four flips, in four times the time (default: as stored in the weights, else not)",
    )
    add_switch(parser, "--save-prob", default=False, help="write the vessel probability too, as a 16-bit PNG")
    add_switch(parser, "--overlay", default=False, help="write the photograph with the vessels drawn in, too")
    add("--tile", type=at_least(64), metavar="N", help="side of overlapping tiles (default: as memory demands)")
    add("--batch-size", default=1, type=at_least(1), help="tiles or flips that go through the model at once")
    add_amp_flags(parser)
    add("--device", default="cuda", help="cuda means the CPU where there is no GPU")
    add("--export", metavar="FILE", help="predict nothing, but write the model as ONNX (needs onnx and onnxscript)")
    return parser


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    return get_parser().parse_args(argv)


if __name__ == "__main__":
    run_script(main, parse_args())
