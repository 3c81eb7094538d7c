"""The C library's allocator, told to keep what it has.

A training step frees and asks again for the same large blocks. By default glibc returns each to the system, which
clears every page anew: on a CPU a tenth of the step and more.
"""

from __future__ import annotations

import ctypes
import sys

__all__ = ["keep_freed_memory"]

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
_HUGE = (1 << 31) - 1


def keep_freed_memory() -> bool:
    """Serve large blocks from the heap and never shrink it; whether the allocator took it (glibc does)."""
    if sys.platform != "linux":
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return False
    return bool(mallopt(_MMAP_THRESHOLD, _HUGE)) and bool(mallopt(_TRIM_THRESHOLD, _HUGE))
