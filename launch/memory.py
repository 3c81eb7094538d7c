"""The C library's allocator, told to keep what it has, and Python's collector, told what stays."""

from __future__ import annotations

import ctypes
import gc
import sys

__all__ = ["keep_freed_memory", "keep_what_is_there"]

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
_HUGE = (1 << 31) - 1


def keep_freed_memory() -> bool:
    """Serve large blocks from the heap and never shrink it; whether the allocator took it (glibc does).

    A training step frees and asks again for the same large blocks. By default glibc returns each to the system, which
    clears every page anew: on a CPU a tenth of the step and more.
    """
    if sys.platform != "linux":
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return False
    return bool(mallopt(_MMAP_THRESHOLD, _HUGE)) and bool(mallopt(_TRIM_THRESHOLD, _HUGE))


def keep_what_is_there() -> None:
    """Leave what this process holds by now to its end: looking through all that is imported takes a tenth of a second.

    For a process that serves, once it is ready to.
    """
    gc.collect()
    gc.freeze()
