"""Progress on the terminal, and the results files."""

import csv
import datetime
import io
import itertools
import string
import time
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .distributed_utils import is_main_process, sum_over_processes
from .files import create_new, replace_whole
from .metrics import format_scores

# Seconds between progress lines for whose numbers a GPU must be waited for.
SECONDS_UNPRINTED = 1.0


class SmoothedValue:
    """The last values of a series, and the mean over all of them.

    Tensors stay on their device and are read only when a number is asked for: an update never waits for a GPU.
    """

    def __init__(self, window_size: int = 20, fmt: str = "{value:.4f} ({global_avg:.4f})") -> None:
        self.deque: deque[float | Tensor] = deque(maxlen=window_size)
        self.total: float | Tensor = 0.0
        self.count = 0
        self.fmt = fmt

    def update(self, value: float | Tensor, n: int = 1) -> None:
        self.deque.append(value)
        self.count += n
        self.total = self.total + value * n

    def synchronize_between_processes(self) -> None:
        """Sum count and total over the processes; the window stays this process's own."""
        both = sum_over_processes(torch.tensor([float(self.total), self.count], dtype=torch.float64))
        self.total, self.count = both[0].item(), int(both[1])

    def _window(self) -> Tensor:
        return torch.stack([torch.as_tensor(value) for value in self.deque]).float()

    @property
    def median(self) -> float:
        return self._window().median().item()

    @property
    def avg(self) -> float:
        return self._window().mean().item()

    @property
    def global_avg(self) -> float:
        return float(self.total) / max(self.count, 1)

    @property
    def max(self) -> float:
        return self._window().max().item()

    @property
    def value(self) -> float:
        return float(self.deque[-1])

    def __str__(self) -> str:
        # Only what the format names: each number of a series on a GPU is a wait for it.
        names = [name for _, name, _, _ in string.Formatter().parse(self.fmt) if name]
        return self.fmt.format(**{name: getattr(self, name) for name in names})


class MetricLogger:
    """Named `SmoothedValue`s, and a loop that prints them now and then (in the main process)."""

    def __init__(self, delimiter: str = "\t") -> None:
        self.meters: dict[str, SmoothedValue] = {}
        self.delimiter = delimiter

    def add_meter(self, name: str, meter: SmoothedValue) -> None:
        self.meters[name] = meter

    def update(self, **values: float | Tensor) -> None:
        for name, value in values.items():
            self.meters.setdefault(name, SmoothedValue()).update(value)

    def synchronize_between_processes(self) -> None:
        for meter in self.meters.values():
            meter.synchronize_between_processes()

    def __str__(self) -> str:
        return self.delimiter.join(f"{name}: {meter}" for name, meter in self.meters.items())

    def _on_gpu(self) -> bool:
        totals = [meter.total for meter in self.meters.values()]
        return any(isinstance(total, Tensor) and total.device.type != "cpu" for total in totals)

    def log_every(self, iterable: Iterable, print_freq: int, header: str = "") -> Iterator[Any]:
        """Yield the items of a sized iterable; print a progress line every `print_freq` of them and after the last.

        Where a value lies on a GPU, a line makes the host wait for it: there is one a second at most, and the last.
        `time` is seconds an item, `data` the part of it spent waiting for the item, `max mem` MiB of GPU memory.
        """
        total = len(iterable)
        item_time, data_time = SmoothedValue(fmt="{avg:.4f}"), SmoothedValue(fmt="{avg:.4f}")
        start = end = printed = time.time()
        for i, item in enumerate(iterable):
            data_time.update(time.time() - end)
            yield item
            item_time.update(time.time() - end)
            due = i % print_freq == 0 and (not self._on_gpu() or time.time() - printed >= SECONDS_UNPRINTED)
            if is_main_process() and (due or i == total - 1):
                printed = time.time()
                eta = datetime.timedelta(seconds=int(item_time.global_avg * (total - i - 1)))
                parts = [header, f"[{i:{len(str(total))}d}/{total}]", f"eta: {eta}", str(self)]
                parts += [f"time: {item_time}", f"data: {data_time}"]
                if torch.cuda.is_available():
                    parts.append(f"max mem: {torch.cuda.max_memory_allocated() / 2**20:.0f}")
                print(self.delimiter.join(part for part in parts if part), flush=True)
            end = time.time()
        if is_main_process():
            seconds = time.time() - start
            print(f"{header} Total time: {datetime.timedelta(seconds=int(seconds))}", flush=True)


Row = dict[str, Any]  # epoch, train_loss, lr, dice, global_accuracy, recall [class], iou [class], mean_iou, seconds


def format_row(row: Row) -> str:
    """One epoch as the tutorial's results file has it."""
    return (
        f"[epoch: {row['epoch']}]\n"
        f"train_loss: {row['train_loss']:.4f}\n"
        f"lr: {row['lr']:.6f}\n"
        f"dice coefficient: {row['dice']:.3f}\n"
        f"{format_scores(row['global_accuracy'], row['recall'], row['iou'])}\n\n"
    )


def flatten_row(row: Row) -> Row:
    """The row with each list spread over one name per class: iou -> iou_0, iou_1."""
    flat = {}
    for name, value in row.items():
        if isinstance(value, list):
            flat |= {f"{name}_{i}": item for i, item in enumerate(value)}
        else:
            flat[name] = value
    return flat


class ResultsFiles:
    """`<stem>.txt` in the tutorial's form and `<stem>.csv` with a row an epoch, in the working directory.

    The rows travel in the checkpoint, which is saved first, and both files are written whole: a resumed run goes on
    in the same files without a lost or a double row, whatever moment the run before it was killed at.
    """

    def __init__(self) -> None:
        self._stem: str | None = None
        self.rows: list[Row] = []

    @property
    def stem(self) -> str:
        """The name without its ending: `results<time>`, of this run alone.

        Raises:
            train_utils.files.OutputError: the working directory cannot be written.
        """
        if self._stem is None:
            now = f"results{datetime.datetime.now():%Y%m%d-%H%M%S}"
            names = itertools.chain([now], (f"{now}-{number}" for number in itertools.count(2)))
            # A run that was started in the same second and place has taken the first of these.
            self._stem = next(name for name in names if create_new(f"{name}.txt"))
        return self._stem

    def resume(self, stem: str | None, rows: list[Row]) -> None:
        """Go on from a checkpoint's rows, in the files of that run unless these already tell of later epochs."""
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
        table = io.StringIO(newline="")
        writer = csv.DictWriter(table, flatten_row(rows[-1]))
        writer.writeheader()
        writer.writerows(map(flatten_row, rows))
        with replace_whole(f"{self.stem}.csv") as file:
            file.write(table.getvalue().encode())
