"""Progress on the terminal."""

import datetime
import shutil
import string
import sys
import time
from collections import defaultdict, deque
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from .distributed_utils import is_main_process, sum_over_processes

# Least seconds between two progress lines that make the host wait for a GPU.
SECONDS_UNPRINTED = 1.0


class SmoothedValue:
    """The last values of a series, and the mean over all of them.

    Tensors stay on their device and are read only when a number is needed, so an update never waits for a GPU. Of their
    gradients nothing is kept.
    """

    def __init__(self, window_size: int = 20, fmt: str | None = None) -> None:
        self.deque: deque[float | Tensor] = deque(maxlen=window_size)
        self.total: float | Tensor = 0.0
        self.count = 0
        self.fmt = fmt or "{value:.4f} ({global_avg:.4f})"

    def update(self, value: float | Tensor, n: int = 1) -> None:
        value = value.detach() if isinstance(value, Tensor) else value
        self.deque.append(value)
        self.count += n
        self.total = self.total + value * n

    def synchronize_between_processes(self) -> None:
        """Sum count and total over the processes. The window stays that of this process."""
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
        # Only the numbers that the format names, because reading each one waits for the GPU.
        names = [name for _, name, _, _ in string.Formatter().parse(self.fmt) if name]
        return self.fmt.format(**{name: getattr(self, name) for name in names})


class MetricLogger:
    """Named `SmoothedValue`s, each an attribute too, and a loop whose main process prints them regularly.

    Args:
        delimiter: between the values of a line.
        one_line: in a terminal, each line of a loop takes the place of the one before.
    """

    def __init__(self, delimiter: str = "\t", one_line: bool = False) -> None:
        self.meters: defaultdict[str, SmoothedValue] = defaultdict(SmoothedValue)
        self.delimiter = delimiter
        self.one_line = one_line and sys.stdout.isatty()

    def add_meter(self, name: str, meter: SmoothedValue) -> None:
        self.meters[name] = meter

    def update(self, **values: float | Tensor) -> None:
        for name, value in values.items():
            self.meters[name].update(value)

    def __getattr__(self, name: str) -> SmoothedValue:
        if name in self.__dict__.get("meters", ()):
            return self.meters[name]
        raise AttributeError(f"MetricLogger has no attribute and no meter {name!r}")

    def synchronize_between_processes(self) -> None:
        for meter in self.meters.values():
            meter.synchronize_between_processes()

    def __str__(self) -> str:
        return self.delimiter.join(f"{name}: {meter}" for name, meter in self.meters.items())

    def _on_gpu(self) -> bool:
        totals = [meter.total for meter in self.meters.values()]
        return any(isinstance(total, Tensor) and total.device.type != "cpu" for total in totals)

    def _print(self, parts: list[str], last: bool) -> None:
        line = self.delimiter.join(parts)
        if self.one_line:
            width = shutil.get_terminal_size().columns - 1  # a longer line would wrap, and stay
            while len(line) > width and len(parts) > 1:
                parts = parts[:-1]
                line = self.delimiter.join(parts)
            print(f"\r{line[:width]:{width}}", end="\n" if last else "", flush=True)
        else:
            print(line, flush=True)

    def log_every(self, iterable: Iterable, print_freq: int, header: str | None = None) -> Iterator[Any]:
        """Yield the items of a sized iterable; print a progress line every `print_freq` of them and after the last.

        If a value is on a GPU, printing it makes the host wait: then there is at most one line a second, and the last.
        `time` is seconds per item, `data` the part of it spent loading the item, `max mem` the GPU memory in MiB.
        """
        total, header = len(iterable), header or ""
        item_time, data_time = SmoothedValue(fmt="{avg:.4f}"), SmoothedValue(fmt="{avg:.4f}")
        start = end = printed = time.time()
        for i, item in enumerate(iterable):
            data_time.update(time.time() - end)
            try:
                yield item
            except GeneratorExit:  # the loop was left by an error, whose message needs a line of its own
                if self.one_line and i > 0:
                    print()
                raise
            item_time.update(time.time() - end)
            due = i % print_freq == 0 and (not self._on_gpu() or time.time() - printed >= SECONDS_UNPRINTED)
            if is_main_process() and (due or i == total - 1):
                printed = time.time()
                eta = datetime.timedelta(seconds=int(item_time.global_avg * (total - i - 1)))
                parts = [header, f"[{i:{len(str(total))}d}/{total}]", f"eta: {eta}", str(self)]
                parts += [f"time: {item_time}", f"data: {data_time}"]
                if torch.cuda.is_available():
                    parts.append(f"max mem: {torch.cuda.max_memory_allocated() / 2**20:.0f}")
                self._print([part for part in parts if part], last=i == total - 1)
            end = time.time()
        if is_main_process():
            seconds = time.time() - start
            print(f"{header} Total time: {datetime.timedelta(seconds=int(seconds))}", flush=True)
