"""A program in a process of its own that is asked one thing after the other, and killed where it takes too long.

It answers frames on its standard input with frames on its standard output: four bytes with the length, little endian,
and JSON. The first tells it the process it belongs to and how much memory it may take besides what it began with.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import json
import os
import select
import struct
import subprocess
import sys
import time
import weakref
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, Literal, ParamSpec, TypeVar

__all__ = ["Apart", "Died"]

P = ParamSpec("P")
T = TypeVar("T")

_START_S = 30.0
_FRAME = struct.Struct("<I")
_LARGEST = 32 << 20
_PIPE = 1 << 20


Why = Literal["late", "gone", "refused"]


class Died(Exception):
    """It is gone, or was killed.

    Attributes:
        why: it took too long, ended by itself (as who needs too much memory does), or said what it cannot begin with.
    """

    def __init__(self, why: Why, message: str = "") -> None:
        super().__init__(message or why)
        self.why = why


class Apart:
    """A process that is started when it is needed, and again after it has died; it ends with this object.

    It dies with the thread that starts it, and answers one at a time: coroutines :meth:`ask` within a :meth:`turn`.

    Args:
        program: a file of Python that imports nothing of ours, so that it starts at once.
        about: what it is told first, besides ``parent`` and ``bytes``; called at each start.
        memory: bytes that it may take.

    Attributes:
        starts: how often it was started.
    """

    def __init__(self, program: Path, about: Callable[[], Mapping[str, Any]], *, memory: int) -> None:
        self.starts = 0
        self._program, self._about, self._memory = program, about, memory
        self._children: list[subprocess.Popen[bytes]] = []
        self._pool: ThreadPoolExecutor | None = None
        self._finalize = weakref.finalize(self, _end, self._children)

    @property
    def pid(self) -> int | None:
        """Of the process, if there is one."""
        return self._children[0].pid if self._children and self._children[0].poll() is None else None

    def close(self) -> None:
        """End it."""
        self._finalize()
        if self._pool is not None:
            self._pool.shutdown(wait=False)

    async def turn(self, work: Callable[P, T], *arguments: P.args, **options: P.kwargs) -> T:
        """Have ``work`` done off the event loop, by the one thread that asks."""
        if self._pool is None:
            self._pool = ThreadPoolExecutor(1, self._program.stem)
        return await asyncio.get_running_loop().run_in_executor(self._pool, partial(work, *arguments, **options))

    def ask(self, value: Any, seconds: float) -> dict[str, Any]:
        """What it answers; it is killed if that takes more than ``seconds``, which do not count its start.

        Raises:
            Died: there is no answer.
        """
        if self.pid is None:
            _end(self._children)
            self._start()
        return self._exchange(value, seconds)

    def _start(self) -> None:
        child = subprocess.Popen(
            [sys.executable, "-P", str(self._program)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        self._children.append(child)
        self.starts += 1
        assert child.stdin is not None and child.stdout is not None
        os.set_blocking(child.stdin.fileno(), False)
        for pipe in (child.stdin, child.stdout) if hasattr(fcntl, "F_SETPIPE_SZ") else ():
            with contextlib.suppress(OSError):
                fcntl.fcntl(pipe.fileno(), fcntl.F_SETPIPE_SZ, _PIPE)
        told = self._exchange({**self._about(), "parent": os.getpid(), "bytes": self._memory}, _START_S)
        if told.get("problem"):
            _end(self._children)
            raise Died("refused", told["problem"])

    def _exchange(self, value: Any, seconds: float) -> dict[str, Any]:
        try:
            return json.loads(_exchanged(self._children[0], json.dumps(value).encode(), seconds))
        except (OSError, ValueError):
            _end(self._children)
            raise Died("gone") from None
        except Died:
            _end(self._children)
            raise


def _exchanged(child: subprocess.Popen[bytes], data: bytes, seconds: float) -> bytes:
    """Send a frame, and wait for the answer."""
    assert child.stdin is not None and child.stdout is not None
    writing, reading = child.stdin.fileno(), child.stdout.fileno()
    left, out, deadline = memoryview(_FRAME.pack(len(data)) + data), bytearray(), time.monotonic() + seconds
    while len(out) < _FRAME.size or len(out) < _FRAME.size + _FRAME.unpack_from(out)[0]:
        wait = deadline - time.monotonic()
        readable, writable, _ = select.select([reading], [writing] if left else [], [], max(wait, 0.0))
        if writable:
            left = left[os.write(writing, left[:_PIPE]) :]
        elif not readable:
            raise Died("late")
        if readable:
            more = os.read(reading, 1 << 16)
            if not more or len(out) > _LARGEST:
                raise Died("gone")
            out += more
    return bytes(out[_FRAME.size :])


def _end(children: list[subprocess.Popen[bytes]]) -> None:
    while children:
        child = children.pop()
        child.kill()
        child.wait()
        for pipe in (child.stdin, child.stdout):
            if pipe is not None:
                with contextlib.suppress(OSError):
                    pipe.close()
