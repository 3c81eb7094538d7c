"""The system's scheduler, told that a process computes for long.

An engine keeps every core busy, and whoever is to pass its tokens on waits for one of them to be free: for up to a
tick, 4 ms, when all have the same priority. An engine that gives way is interrupted at once.
"""

from __future__ import annotations

import ctypes
import os
import platform
import struct
import sys

__all__ = ["give_way"]

NICE, SLICE_NS = 3, 3_000_000
_SCHED_SETATTR = {"x86_64": 314, "aarch64": 274}
_ATTRIBUTES = struct.Struct("=IIQiIQQQ")
"""``struct sched_attr``: size, policy, flags, nice, priority, runtime, deadline, period (linux/sched/types.h)."""


def give_way() -> bool:
    """Let other processes go before this thread, and before those that it starts; whether the system took it.

    It keeps two thirds of what it had where others compute as well. Linux 6.12 and later also learn that it needs a
    core for longer at a time than most, so that those which need it for a moment come first.
    """
    try:
        os.nice(NICE)
    except OSError:
        return False
    number = _SCHED_SETATTR.get(platform.machine())
    if sys.platform == "linux" and number is not None:
        nice = os.getpriority(os.PRIO_PROCESS, 0)
        attributes = _ATTRIBUTES.pack(_ATTRIBUTES.size, os.SCHED_OTHER, 0, nice, 0, SLICE_NS, 0, 0)
        ctypes.CDLL(None).syscall(number, 0, attributes, 0)  # an older kernel ignores the slice
    return True
