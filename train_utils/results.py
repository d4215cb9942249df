"""The results files: one row per epoch, in the tutorial's form and as CSV."""

import datetime
import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .files import create_new, replace_whole, write_csv
from .scoring.counts import format_scores

# epoch, train_loss, lr, seconds; where photographs are validated: dice, global_accuracy, recall [class], iou [class],
# mean_iou
Row = dict[str, Any]


def format_row(row: Row) -> str:
    """One epoch in the form of the tutorial's results file."""
    text = f"[epoch: {row['epoch']}]\ntrain_loss: {row['train_loss']:.4f}\nlr: {row['lr']:.6f}\n"
    if "dice" in row:
        text += f"dice coefficient: {row['dice']:.3f}\n"
        text += f"{format_scores(row['global_accuracy'], row['recall'], row['iou'])}\n"
    return text + "\n"


def flatten_row(row: Row) -> Row:
    """The row with one entry per class for each list: iou -> iou_0, iou_1."""
    flat = {}
    for name, value in row.items():
        if isinstance(value, list):
            flat |= {f"{name}_{i}": item for i, item in enumerate(value)}
        else:
            flat[name] = value
    return flat


class ResultsFiles:
    """`<stem>.txt` in the tutorial's form and `<stem>.csv` with one row per epoch, in the working directory.

    The checkpoint also holds the rows and is saved first, and both files are written whole. So a resumed run continues
    the same files without a lost or duplicate row, whenever the earlier run was killed.
    """

    def __init__(self) -> None:
        self._stem: str | None = None
        self.rows: list[Row] = []

    @property
    def stem(self) -> str:
        """The name without its ending, `results<time>`; no other run has it.

        Raises:
            train_utils.files.OutputError: the working directory cannot be written.
        """
        if self._stem is None:
            now = f"results{datetime.datetime.now():%Y%m%d-%H%M%S}"
            names = itertools.chain([now], (f"{now}-{number}" for number in itertools.count(2)))
            # Another run that started here in the same second has taken the first name.
            self._stem = next(name for name in names if create_new(f"{name}.txt"))
        return self._stem

    def resume(self, stem: str | None, rows: list[Row]) -> None:
        """Continue a checkpoint's rows, in the files of that run unless they already have later epochs."""
        self.rows = list(rows)
        if stem is not None:
            table = Path(f"{stem}.csv")
            written = len(table.read_text().splitlines()) - 1 if table.exists() else 0
            if written <= len(rows):
                self._stem = stem

    def write(self, rows: Sequence[Row]) -> None:
        """Write both files, if there is a row.

        Raises:
            train_utils.files.OutputError: they cannot be written.
        """
        if not rows:
            return
        with replace_whole(f"{self.stem}.txt") as file:
            file.write("".join(map(format_row, rows)).encode())
        flat = list(map(flatten_row, rows))
        # Where a run went on without validation, the rows differ in their columns.
        write_csv(f"{self.stem}.csv", dict.fromkeys(name for row in flat for name in row), flat)
