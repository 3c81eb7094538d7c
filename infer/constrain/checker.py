"""Tries forms in a process of its own, with bounds of time and memory, before an engine sees them."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import os
import select
import struct
import subprocess
import sys
import threading
import time
import weakref
from collections import OrderedDict
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from infer.constraint import Constraint

__all__ = ["Checker"]

_PROGRAM = Path(__file__).with_name("compile.py")
_START_S = 30.0
_FRAME = struct.Struct("<I")
_LARGEST = 1 << 20
_ENTRY = 200
"""Bytes that are kept of a form that was tried, besides what was wrong with it."""


class _Died(Exception):
    """The child is gone, or was killed; the message says why."""


class Checker:
    """Says of forms whether they can be kept; what was said is remembered.

    The process is started when the first form comes, killed when a form takes too long, and started again for the next.
    It ends with this one, and with this object.

    Args:
        tokenizer: of the model; None: there is no text.
        vocabulary: of the model.
        seconds: that a form may take.
        memory: bytes that it may take.
        kept_bytes: that may be remembered.
    """

    def __init__(
        self,
        tokenizer: Tokenizer | None,
        vocabulary: int,
        *,
        seconds: float = 1.0,
        memory: int = 512 << 20,
        kept_bytes: int = 1 << 20,
    ) -> None:
        self.seconds, self.memory, self.vocabulary, self.kept_bytes = seconds, memory, vocabulary, kept_bytes
        self.waiting = self.kept = self.starts = 0
        self._tokenizer = tokenizer
        self._known: OrderedDict[bytes, str] = OrderedDict()
        self._child: list[subprocess.Popen[bytes]] = []
        self._lock = threading.Lock()
        self._pool: ThreadPoolExecutor | None = None
        self._finalize = weakref.finalize(self, _end, self._child)

    def close(self) -> None:
        """End the process."""
        self._finalize()
        if self._pool is not None:
            self._pool.shutdown(wait=False)

    async def problem(self, constraint: Constraint) -> str:
        """Why a form cannot be kept; nothing if it can. One form is tried at a time, off the event loop."""
        key = hashlib.sha256(f"{constraint.kind}\0{constraint.text}".encode(errors="surrogatepass")).digest()
        found = self._known.get(key)
        if found is not None:
            self._known.move_to_end(key)
            return found
        if self._tokenizer is None:
            return "there is no tokenizer, so there is no text"
        if self._pool is None:
            self._pool = ThreadPoolExecutor(1, "forms")
        self.waiting += 1
        try:
            found = await asyncio.get_running_loop().run_in_executor(self._pool, self._try, constraint)
        finally:
            self.waiting -= 1
        self._remember(key, found)
        return found

    def _remember(self, key: bytes, problem: str) -> None:
        if key not in self._known:
            self._known[key] = problem
            self.kept += _ENTRY + len(problem)
        while self.kept > self.kept_bytes:
            self.kept -= _ENTRY + len(self._known.popitem(last=False)[1])

    def _try(self, constraint: Constraint) -> str:
        try:
            child = self._started()
        except _Died as died:
            return f"forms cannot be tried: {died}"
        try:
            told = _ask(child, {"kind": constraint.kind, "text": constraint.text}, self.seconds)
        except _Died as died:
            _end(self._child)
            return str(died)
        slow = told.get("cpu_s", 0.0) > self.seconds / 4
        return str(told["problem"]) or ("it takes too long to compile, and to follow" if slow else "")

    def _started(self) -> subprocess.Popen[bytes]:
        if self._child and self._child[0].poll() is None:
            return self._child[0]
        _end(self._child)
        assert self._tokenizer is not None
        child = subprocess.Popen(  # it dies with the thread that starts it, which is that of the pool
            [sys.executable, "-P", str(_PROGRAM)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        self._child.append(child)
        self.starts += 1
        ids = self._tokenizer.get_vocab(with_added_tokens=True).values()
        about = {
            "parent": os.getpid(),
            "tokenizer": self._tokenizer.to_str(),
            "vocabulary": self.vocabulary,
            "ends": [min(ids, default=0)],
            "bytes": self.memory,
        }
        told = _ask(child, about, _START_S)
        if told["problem"]:
            raise _Died(told["problem"])
        return child


def _ask(child: subprocess.Popen[bytes], value: Any, seconds: float) -> dict[str, Any]:
    """Send a frame, and wait for the answer."""
    assert child.stdin is not None and child.stdout is not None
    data = json.dumps(value).encode()
    deadline, out = time.monotonic() + seconds, b""
    try:
        child.stdin.write(_FRAME.pack(len(data)) + data)
        child.stdin.flush()
        while len(out) < _FRAME.size or len(out) < _FRAME.size + _FRAME.unpack(out[: _FRAME.size])[0]:
            left = deadline - time.monotonic()
            if left <= 0 or not select.select([child.stdout], [], [], left)[0]:
                raise _Died(f"it takes more than {seconds:g} s to compile")
            more = os.read(child.stdout.fileno(), 1 << 16)
            if not more or len(out) > _LARGEST:
                raise _Died("it needs too much memory, or is nested too deeply")
            out += more
    except OSError:
        raise _Died("it needs too much memory, or is nested too deeply") from None
    return json.loads(out[_FRAME.size :])


def _end(children: list[subprocess.Popen[bytes]]) -> None:
    while children:
        child = children.pop()
        child.kill()
        child.wait()
        for pipe in (child.stdin, child.stdout):
            if pipe is not None:
                with contextlib.suppress(OSError):
                    pipe.close()
