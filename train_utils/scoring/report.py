"""A measurement -> the table on the terminal, scores.json, scores.csv and scores.png."""

import json
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..checkpoint import Checkpoint
from ..files import replace_whole, write_csv
from .contact_sheet import contact_sheet
from .counts import PixelCounts, ProbabilityHistogram
from .drawing import write_png
from .measure import Measurement, Segmentation

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

    value: float
    source: str


def make_report(
    measurement: Measurement, checkpoint: Checkpoint, threshold: Threshold, tta: bool = False
) -> dict[str, Any]:
    """All scores and where they come from, as scores.json holds them: shares of 1; NaN (0 / 0) as None."""
    accuracy, recall, iou = measurement.confusion_matrix.compute()
    report: dict[str, Any] = {
        "weights": checkpoint["path"],
        "epoch": checkpoint.get("epoch"),
        "selected_on": checkpoint.get("selected_on", "not recorded in the weights"),
        "threshold": {"value": threshold.value, "source": threshold.source},
        "tta": tta,
        "scored_on": "test",
        "photographs": [score.name for score in measurement.photographs],
    }
    observers = {
        observer: [segmentation for score in measurement.photographs if (segmentation := getattr(score, observer))]
        for observer in OBSERVERS
    }
    for region in REGIONS:
        histograms = {"model": getattr(measurement, region)}  # a yes/no segmentation ranks nothing
        report[region] = {
            observer: summarize(segmentations, region, histograms.get(observer)) if segmentations else None
            for observer, segmentations in observers.items()
        }
    report["tutorial"] = {
        "global_correct": accuracy.item(),
        "row_correct": recall.tolist(),
        "iou": iou.tolist(),
        "mean_iou": iou.mean().item(),
        "dice": measurement.dice.value.item(),
    }
    return _nan_to_none(report)


def summarize(
    segmentations: Sequence[Segmentation], region: str, histogram: ProbabilityHistogram | None
) -> dict[str, Any]:
    """One observer's scores over all pixels, and their mean and standard deviation over the photographs.

    The deviation is the sample's (n - 1). Photographs for which a score is undefined are left out of its mean.
    """
    counts = [getattr(segmentation, region) for segmentation in segmentations]
    total = sum(counts, PixelCounts())
    values = {name: [getattr(count, name) for count in counts] for name in AVERAGED if name in COUNTED}
    if region == "field_of_view":
        values["cl_dice"] = [segmentation.cl_dice for segmentation in segmentations]
    return {
        "photographs": len(segmentations),
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
        f"scores of {report['weights']}{epoch} on {len(names)} test photographs ({names[0]} to {names[-1]})",
        f"selected on: {report['selected_on']}",
        f"threshold: {report['threshold']['value']:.4g} ({report['threshold']['source']})"
        + (", mean over the four flips" if report["tta"] else ""),
    ]
    for region, heading in REGIONS.items():
        observers = {name: scores for name, scores in report[region].items() if scores}
        pooled = {name: list(map(_number, scores["pooled"].values())) for name, scores in observers.items()}
        averages = {
            name: [f"{_number(score['mean'])} ± {_number(score['std'])}" for score in scores["per_photograph"].values()]
            for name, scores in observers.items()
        }
        counts = {name: scores["photographs"] for name, scores in observers.items()}
        lines += ["", f"{heading}, over all pixels:", *_table(pooled, report[region]["model"]["pooled"], counts)]
        lines += ["", f"{heading}, mean ± standard deviation over photographs:"]
        lines += _table(averages, report[region]["model"]["per_photograph"], counts)
    lines += ["", "As the tutorial scores (inside the field of view, the most probable class):"]
    lines += [str(measurement.confusion_matrix), f"dice coefficient: {measurement.dice.value.item():.3f}"]
    return "\n".join(lines)


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"


def _table(cells: dict[str, list[str]], columns: Sequence[str], counts: dict[str, int]) -> list[str]:
    """Lines of a table with a row for each observer."""
    headings = [HEADINGS.get(name, name) for name in columns]
    labels = {name: name.replace("_", " ") for name in cells}
    for name in cells:
        if counts[name] < counts["model"]:
            labels[name] += f" ({counts[name]} photographs)"
    width = max(map(len, labels.values()))
    widths = [max(map(len, column)) for column in zip(headings, *cells.values(), strict=True)]

    def line(label: str, items: Sequence[str]) -> str:
        return "  ".join([label.ljust(width), *(item.rjust(size) for item, size in zip(items, widths, strict=True))])

    return [line("", headings), *(line(labels[name], items) for name, items in cells.items())]


def write_report(report: dict[str, Any], measurement: Measurement, folder: Path) -> None:
    """Write scores.json, scores.csv (a row for each photograph) and scores.png.

    Raises:
        train_utils.files.OutputError: one cannot be written.
    """
    with replace_whole(folder / "scores.json") as file:
        file.write((json.dumps(report, indent=2, allow_nan=False) + "\n").encode())
    rows = photograph_rows(measurement)
    write_csv(folder / "scores.csv", rows[0], rows)
    threshold = report["threshold"]
    heading = (
        f"{report['weights']}, selected on: {report['selected_on']}, "
        f"threshold: {threshold['value']:.4g} ({threshold['source']})"
    )
    write_png(contact_sheet(measurement.worst, len(rows), heading), folder / "scores.png")


def photograph_rows(measurement: Measurement) -> list[dict[str, Any]]:
    """A flat row for each photograph; empty cells are undefined scores, or photographs without a second observer."""
    rows = []
    present = [name for name in OBSERVERS if any(getattr(score, name) for score in measurement.photographs)]
    for score in measurement.photographs:
        row: dict[str, Any] = {"photograph": score.name}
        for observer in present:
            segmentation = getattr(score, observer)
            prefix = "" if observer == "model" else f"{observer}_"
            for region in REGIONS:
                inside = region == "field_of_view"
                for name in COUNTED:
                    value = getattr(getattr(segmentation, region), name) if segmentation else math.nan
                    row[f"{prefix}{name}" if inside else f"{prefix}full_frame_{name}"] = value
            row[f"{prefix}cl_dice"] = segmentation.cl_dice if segmentation else math.nan
        rows.append(_nan_to_none(row))
    return rows
