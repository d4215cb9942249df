"""The memory of the process: how it is allocated, and what happens where it does not suffice."""

import ctypes
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from src.errors import UserError
from src.photograph import PhotographError

# glibc's parameters, from malloc.h.
M_TRIM_THRESHOLD = -1
M_MMAP_MAX = -4
M_ARENA_MAX = -8

# How the allocators of the CPU (also on Windows) and of MPS, and CUDA's libraries, say that memory is short.
_SHORT_OF_MEMORY = re.compile("can't allocate memory|not enough memory|out of memory|ALLOC_FAILED")


class OutOfMemoryError(UserError):
    """The memory of the device, or of the machine, does not suffice; the message names flags that need less."""

    alone = True


@contextmanager
def explain_out_of_memory(advice: str) -> Iterator[None]:
    """Raise an OutOfMemoryError that gives this advice where memory is short.

    Raises:
        OutOfMemoryError: memory is short.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:  # torch.OutOfMemoryError is a RuntimeError
        if not isinstance(error, MemoryError | torch.OutOfMemoryError) and not _SHORT_OF_MEMORY.search(str(error)):
            raise
        asked = re.search(r"ried to allocate ([\d.]+ \w+)", str(error))
        reason = f"no {asked[1]} more" if asked else str(error) if isinstance(error, MemoryError) else ""
        found = f" ({reason})" if reason else ""
        raise OutOfMemoryError(f"out of memory{found}: {advice}") from error


def keep_freed_memory() -> None:
    """Make the C library (glibc) keep freed memory for the next tensors instead of returning it to the system.

    Without this, the system maps every large tensor of every step again and zeroes its pages, which takes up to 45% of
    a training step on a CPU. Results do not change. The process keeps its peak memory. Without glibc this does nothing.
    """
    if not sys.platform.startswith("linux"):
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(M_MMAP_MAX, 0)  # allocate large blocks on the heap, too
        mallopt(M_TRIM_THRESHOLD, -1)  # never shrink the heap
        mallopt(M_ARENA_MAX, 1)  # one heap for all threads: what one of them has freed, another can use


@contextmanager
def memory_for(photograph: Path) -> Iterator[None]:
    """Make too little memory the failure of a photograph, so that the next one gets its turn.

    Raises:
        PhotographError: memory is short.
    """
    try:
        with explain_out_of_memory("try a smaller --scale, or --tile 512 --batch-size 1"):
            yield
    except OutOfMemoryError as error:
        raise PhotographError(f"{photograph}: {error}") from error
