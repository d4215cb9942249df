"""Memory that the C library keeps after it was freed: given back to the system for photographs that need all of it."""

import ctypes
import sys


def give_back_freed_memory() -> None:
    """Return freed memory to the system, where the C library can (glibc).

    `train_utils.memory.keep_freed_memory` has it kept, which is faster for pictures of the usual size.
    """
    if sys.platform.startswith("linux"):
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(0)
