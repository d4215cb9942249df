"""A measurement -> the table on the terminal, scores.json, scores.csv and scores.png."""

import json
import math
import shutil
import statistics
import sys
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from src.segment import ONE_SIZE
from src.weights import Checkpoint

from ..files import replace_whole, write_csv, write_picture
from .contact_sheet import contact_sheet
from .counts import PixelCounts, ProbabilityHistogram
from .measure import Agreement, Measurement, PhotographScore

COUNTED = ("accuracy", "sensitivity", "specificity", "precision", "dice", "iou", "mcc")
RANKED = ("roc_auc", "average_precision")
AVERAGED = ("dice", "sensitivity", "specificity", "iou", "cl_dice")
HEADINGS = {
    "dice": "Dice",
    "iou": "IoU",
    "mcc": "MCC",
    "roc_auc": "ROC-AUC",
    "average_precision": "avg. precision",
    "cl_dice": "clDice",
}
REGIONS = {
    "field_of_view": "Inside the field of view",
    "full_frame": "Full frame (outside the field of view predicted as background)",
}
OBSERVERS = ("model", "second_observer")


@dataclass(frozen=True)
class Threshold:
    """The probability above which a pixel is a vessel, and where that number comes from."""

    value: float | None  # None: of more than two classes, none is used
    source: str


@dataclass(frozen=True)
class Origin:
    """What is scored, and how it came about; what is not known, or has no meaning for masks, is None."""

    weights: str
    epoch: int | None = None
    selected_on: str | None = None
    threshold: Threshold | None = None
    tta: bool = False
    tta_scales: Sequence[float] = ONE_SIZE
    seed: int | None = None
    fold: str | None = None
    validated_on: Collection[str] = ()  # digests of photographs
    flags: Mapping[str, Any] | None = None  # of the run that trained the weights
    sha256: str | None = None  # of the file of weights

    @classmethod
    def of(
        cls, checkpoint: Checkpoint, threshold: Threshold, tta: bool, tta_scales: Sequence[float], sha256: str
    ) -> "Origin":
        """The weights of a checkpoint, whose file has this digest."""
        return cls(
            checkpoint["path"],
            checkpoint.get("epoch"),
            checkpoint.get("selected_on", "not recorded in the weights"),
            threshold,
            tta,
            tta_scales,
            checkpoint["args"].get("seed"),
            checkpoint["args"].get("fold"),
            checkpoint.get("validated_on", ()),
            checkpoint["args"],
            sha256,
        )


def make_report(measurement: Measurement, origin: Origin) -> dict[str, Any]:
    """All scores and where they come from, as scores.json holds them: shares of 1; NaN (0 / 0) as None."""
    accuracy, recall, iou = measurement.confusion_matrix.compute()
    threshold = origin.threshold
    report: dict[str, Any] = {
        "weights": origin.weights,
        "epoch": origin.epoch,
        "selected_on": origin.selected_on,
        "threshold": None if threshold is None else {"value": threshold.value, "source": threshold.source},
        "tta": origin.tta,
        "tta_scales": list(origin.tta_scales),
        "seed": origin.seed,
        "fold": origin.fold,
        "flags": origin.flags,
        "sha256": origin.sha256,
        "scored_on": _scored_on(measurement.photographs, origin),
        "photographs": [score.name for score in measurement.photographs],
    }
    observers = {
        observer: [agreement for score in measurement.photographs if (agreement := getattr(score, observer))]
        for observer in OBSERVERS
    }
    for region in REGIONS:
        histograms = {"model": getattr(measurement, region)}  # a yes/no segmentation ranks nothing
        report[region] = {
            observer: summarize(agreements, region, histograms.get(observer)) if agreements else None
            for observer, agreements in observers.items()
        }
    report["tutorial"] = {
        "global_correct": accuracy.item(),
        "row_correct": recall.tolist(),
        "iou": iou.tolist(),
        "mean_iou": iou.mean().item(),
        "dice": measurement.dice.value.item(),
    }
    by_data_set = _by_data_set(measurement.photographs)
    if len(by_data_set) > 1:
        report["data_sets"] = {
            name: {
                "scored_on": _scored_on(scores, origin),
                **summarize([score.model for score in scores], "field_of_view", None),
            }
            for name, scores in by_data_set.items()
        }
    report["each_photograph"] = photograph_rows(measurement)
    return _nan_to_none(report)


def _scored_on(scores: Sequence[PhotographScore], origin: Origin) -> str:
    """The part of the data that these photographs are of: "test", "held-out training" or "labelled"."""
    held_out = "held-out training"
    kinds = [held_out if score.digest in origin.validated_on else "labelled" for score in scores]
    parts = ["test" if score.part == "test" else kind for score, kind in zip(scores, kinds, strict=True)]
    return " and ".join(dict.fromkeys(parts))


def _by_data_set(scores: Sequence[PhotographScore]) -> dict[str, list[PhotographScore]]:
    return {name: [score for score in scores if score.data_set == name] for name in {s.data_set: None for s in scores}}


def summarize(agreements: Sequence[Agreement], region: str, histogram: ProbabilityHistogram | None) -> dict[str, Any]:
    """One observer's scores over all pixels, and their mean and standard deviation over the photographs.

    The deviation is the sample's (n - 1). Photographs for which a score is undefined are left out of its mean.
    """
    counts = [getattr(agreement, region) for agreement in agreements]
    total = sum(counts, PixelCounts())
    values = {name: [getattr(count, name) for count in counts] for name in AVERAGED if name in COUNTED}
    if region == "field_of_view":
        values["cl_dice"] = [agreement.cl_dice for agreement in agreements]
    return {
        "photographs": len(agreements),
        "pooled": {name: getattr(total, name) for name in COUNTED}
        | {name: getattr(histogram, name)() if histogram else math.nan for name in RANKED},
        "per_photograph": {name: _mean_and_deviation(series) for name, series in values.items()},
    }


def _mean_and_deviation(values: Sequence[float]) -> dict[str, float]:
    defined = [value for value in values if not math.isnan(value)]
    return {
        "mean": statistics.fmean(defined) if defined else math.nan,
        "std": statistics.stdev(defined) if len(defined) > 1 else math.nan,
    }


def _nan_to_none(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _nan_to_none(item) for name, item in value.items()}
    if isinstance(value, list):
        return [_nan_to_none(item) for item in value]
    return None if isinstance(value, float) and math.isnan(value) else value


def format_report(report: dict[str, Any], measurement: Measurement) -> str:
    """The report as a table for the terminal, with the tutorial's own lines last."""
    names = report["photographs"]
    epoch = "" if report["epoch"] is None else f" (epoch {report['epoch']})"
    lines = [
        "",
        f"scores of {report['weights']}{epoch} on {len(names)} {report['scored_on']} photographs "
        f"({names[0]} to {names[-1]})",
    ]
    if report["threshold"] is not None:
        lines.append(f"selected on: {report['selected_on']}")
        lines.append(f"threshold: {_threshold(report)}{_views(report)}")
    for region, heading in REGIONS.items():
        observers = {name: scores for name, scores in report[region].items() if scores}
        labels = {name: name.replace("_", " ") for name in observers}
        for name, scores in observers.items():
            if scores["photographs"] < len(names):
                labels[name] += f" ({scores['photographs']} photographs)"
        pooled = {labels[name]: list(map(_number, scores["pooled"].values())) for name, scores in observers.items()}
        averages = {labels[name]: _averages(scores) for name, scores in observers.items()}
        lines += ["", f"{heading}, over all pixels:", *_table(pooled, report[region]["model"]["pooled"])]
        lines += ["", f"{heading}, mean ± standard deviation over photographs:"]
        lines += _table(averages, report[region]["model"]["per_photograph"])
    if "data_sets" in report:
        lines += ["", "Each data set, inside the field of view, mean ± standard deviation over photographs:"]
        lines += _table(
            {
                f"{name} ({scores['photographs']} {scores['scored_on']})": _averages(scores)
                for name, scores in report["data_sets"].items()
            },
            AVERAGED,
        )
    lines += ["", "As the tutorial scores (inside the field of view, the most probable class):"]
    lines += [str(measurement.confusion_matrix), f"dice coefficient: {measurement.dice.value.item():.3f}"]
    return "\n".join(lines)


def _threshold(report: Mapping[str, Any]) -> str:
    value, source = report["threshold"]["value"], report["threshold"]["source"]
    return f"{'none' if value is None else format(value, '.4g')} ({source})"


def _views(report: Mapping[str, Any]) -> str:
    if not report["tta"]:
        return ""
    scales = [f"{scale:g}" for scale in report["tta_scales"]]
    if len(scales) == 1:
        return ", mean over the four flips"
    return f", mean over {len(scales)} flips" if set(scales) == {"1"} else f", mean over the sizes {', '.join(scales)}"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"


def _averages(scores: dict[str, Any]) -> list[str]:
    return [f"{_number(score['mean'])} ± {_number(score['std'])}" for score in scores["per_photograph"].values()]


def _table(cells: dict[str, list[str]], columns: Sequence[str]) -> list[str]:
    """Lines of a table with a row for each label; with a column for each, where the terminal is too narrow."""
    rows = [("", *(HEADINGS.get(name, name) for name in columns)), *((label, *cells[label]) for label in cells)]
    lines = _aligned(rows)
    if sys.stdout.isatty() and len(lines[0]) > shutil.get_terminal_size().columns:
        return _aligned(list(zip(*rows, strict=True)))
    return lines


def _aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    first, *others = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join([row[0].ljust(first), *map(str.rjust, row[1:], others)]) for row in rows]


def write_scores(report: dict[str, Any], measurement: Measurement, folder: Path) -> None:
    """Write scores.json, scores.csv (a row for each photograph) and scores.png.

    Raises:
        train_utils.files.OutputError: one cannot be written.
    """
    with replace_whole(folder / "scores.json") as file:
        file.write((json.dumps(report, indent=2, allow_nan=False) + "\n").encode())
    rows = report["each_photograph"]
    write_csv(folder / "scores.csv", rows[0], rows)
    heading = report["weights"]
    if report["threshold"]:
        heading += f", selected on: {report['selected_on']}, threshold: {_threshold(report)}"
    write_picture(folder / "scores.png", contact_sheet(measurement.worst, len(rows), heading))


def photograph_rows(measurement: Measurement) -> list[dict[str, Any]]:
    """A flat row for each photograph; the digests tell it and its label from others of the same name.

    NaN are undefined scores, or those of a photograph without a second observer.
    """
    rows = []
    present = [name for name in OBSERVERS if any(getattr(score, name) for score in measurement.photographs)]
    for score in measurement.photographs:
        digests = {"digest": score.digest, "label_digest": score.label_digest}
        row: dict[str, Any] = {"photograph": score.name, "data_set": score.data_set} | digests
        for observer in present:
            agreement = getattr(score, observer)
            prefix = "" if observer == "model" else f"{observer}_"
            for region in REGIONS:
                inside = region == "field_of_view"
                for name in COUNTED:
                    value = getattr(getattr(agreement, region), name) if agreement else math.nan
                    row[f"{prefix}{name}" if inside else f"{prefix}full_frame_{name}"] = value
            row[f"{prefix}cl_dice"] = agreement.cl_dice if agreement else math.nan
        rows.append(row)
    return rows
