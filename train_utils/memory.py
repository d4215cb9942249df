"""The memory of the process: how it is allocated, and what happens where it does not suffice."""

import ctypes
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from src.photograph import PhotographError

# glibc's parameters, from malloc.h.
M_TRIM_THRESHOLD = -1
M_MMAP_MAX = -4


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


@contextmanager
def memory_for(photograph: Path) -> Iterator[None]:
    """Make too little memory the failure of a photograph, so that the next one gets its turn.

    Raises:
        PhotographError: the memory of the GPU or of the CPU does not suffice.
    """
    try:
        yield
    except torch.OutOfMemoryError as error:
        advice = "try --tile 512 --batch-size 1"
        raise PhotographError(f"{photograph}: does not fit into the GPU's memory; {advice}") from error
    except (MemoryError, RuntimeError) as error:
        # PyTorch has no error of its own for the CPU's memory.
        if isinstance(error, RuntimeError) and "DefaultCPUAllocator" not in str(error):
            raise
        found = str(error).partition(": ")[2].partition(". ")[0] if isinstance(error, RuntimeError) else str(error)
        raise PhotographError(
            f"{photograph}: does not fit into memory ({found or 'out of memory'}); try a smaller --scale or --tile 512"
        ) from error
