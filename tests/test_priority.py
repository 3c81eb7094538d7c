"""Engines give way to the process that speaks with clients."""

from __future__ import annotations

import subprocess
import sys

from launch.priority import NICE

GIVES_WAY = """
import os, threading
from launch.priority import give_way
before = os.getpriority(os.PRIO_PROCESS, 0)
assert give_way()
found = []
thread = threading.Thread(target=lambda: found.append(os.getpriority(os.PRIO_PROCESS, threading.get_native_id())))
thread.start()
thread.join()
print(os.getpriority(os.PRIO_PROCESS, 0) - before, found[0] - before, os.sched_getscheduler(0))
"""


def test_a_thread_that_gives_way_and_those_it_starts() -> None:
    run = subprocess.run([sys.executable, "-c", GIVES_WAY], check=True, capture_output=True, text=True, timeout=60)
    assert run.stdout.split() == [str(NICE), str(NICE), "0"]
