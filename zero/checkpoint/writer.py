"""Files that are on the disk when the call returns: small ones, and images, which are hashed while they are written."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import os
import sys
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import IO, Any, NamedTuple

import torch
from torch import Tensor

from zero.checkpoint.buffers import CHUNK, Buffers
from zero.checkpoint.image import Image
from zero.faults import Injector

__all__ = ["Written", "write_durably", "write_images"]

_AHEAD = 4  # chunks of a file that are in memory where the disk is waited for
_SECTOR = 4096
_DIRECT: int = getattr(os, "O_DIRECT", 0)


class Written(NamedTuple):
    """A file that is on the disk."""

    bytes: int
    sha256: str


def write_images(
    images: Sequence[tuple[Path, Image]],
    buffers: Buffers,
    faults: Injector,
    step: int,
    behind: Callable[[], None] | None = None,
) -> list[Written]:
    """Write files side by side; they are durable when this returns.

    For each file one thread hashes while another writes, past the page cache where the file system allows that.

    Args:
        images: path and content of each.
        buffers: memory on the way; at most four chunks a file.
        behind: write behind the training: copy everything as soon as may be, into as much memory, then call this, and
            do it all with what time the training leaves.

    Raises:
        OSError: one could not be written.
    """
    room = threading.Semaphore(_AHEAD * len(images))
    with contextlib.ExitStack() as stack:
        files = [stack.enter_context(_File(path, image.bytes, faults, step, bool(behind))) for path, image in images]
        for begin in range(0, max(image.bytes for _, image in images), CHUNK):
            for file, (_, image) in zip(files, images, strict=True):
                size = min(CHUNK, image.bytes - begin)
                if size <= 0 or file.failed:
                    continue
                if behind is None:
                    room.acquire()
                chunk = buffers.take()
                image.copy(begin, chunk[:size])
                if buffers.pinned:
                    torch.cuda.current_stream().synchronize()
                file.put(chunk, begin, size, lambda chunk=chunk: (buffers.give(chunk), room.release()))
        if behind is not None:
            behind()
        return [done.result() for done in [file.finish() for file in files]]


class _File:
    """A file that is being written.

    Attributes:
        failed: something of it could not be written; :meth:`finish` tells.
    """

    def __init__(self, path: Path, size: int, faults: Injector, step: int, behind: bool) -> None:
        self.failed = False
        self._size, self._faults, self._step = size, faults, step
        self._digest = hashlib.sha256()
        self._work: list[Future[None]] = []
        self._descriptor, self._direct = _open(path)
        self._hasher, self._writer = (
            ThreadPoolExecutor(1, name, initializer=_step_back if behind else None) for name in ("sha256", "write")
        )

    def __enter__(self) -> _File:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, at: TracebackType | None) -> None:
        for executor in (self._hasher, self._writer):
            executor.shutdown(cancel_futures=True)
        os.close(self._descriptor)

    def put(self, chunk: Tensor, begin: int, size: int, used: Callable[[], Any]) -> None:
        """Write and hash the first ``size`` bytes of a chunk; ``used`` is called when it is not needed any more."""
        data = chunk.numpy().data
        countdown = _Countdown(2, used)
        for future in (
            self._hasher.submit(self._digest.update, data[:size]),
            self._writer.submit(self._write, data, begin, size),
        ):
            future.add_done_callback(countdown)
            self._work.append(future)

    def finish(self) -> Future[Written]:
        """Make the file durable when all of it is written."""
        return self._writer.submit(self._finish)

    def _finish(self) -> Written:
        for future in self._work:
            future.result()
        self._faults.at("save.fsync", self._step)
        os.ftruncate(self._descriptor, self._size)
        os.fsync(self._descriptor)
        return Written(self._size, self._digest.hexdigest())

    def _write(self, data: memoryview, begin: int, size: int) -> None:
        if self.failed:
            return
        try:
            if begin == CHUNK or self._size <= CHUNK:
                self._faults.at("save.write", self._step)
            done = 0
            while done < size:
                done += self._some(data[done : -(-size // _SECTOR) * _SECTOR if self._direct else size], begin + done)
        except BaseException:
            self.failed = True
            raise

    def _some(self, data: memoryview, begin: int) -> int:
        """Write some of it; how many bytes."""
        try:
            written = os.pwrite(self._descriptor, data, begin)
        except OSError as error:
            if error.errno != errno.EINVAL or not self._direct:
                raise
            flags = fcntl.fcntl(self._descriptor, fcntl.F_GETFL)  # it wants another alignment: through the cache then
            fcntl.fcntl(self._descriptor, fcntl.F_SETFL, flags & ~_DIRECT)
            self._direct = False
            return 0
        if not self._direct and hasattr(os, "posix_fadvise"):  # on its way to the disk at once, not with fsync
            os.posix_fadvise(self._descriptor, begin, written, os.POSIX_FADV_DONTNEED)
        return written


class _Countdown:
    """Calls something when it was itself called so many times."""

    def __init__(self, left: int, then: Callable[[], Any]) -> None:
        self._left, self._then, self._lock = left, then, threading.Lock()

    def __call__(self, _: object) -> None:
        with self._lock:
            self._left -= 1
            last = not self._left
        if last:
            self._then()


def _open(path: Path) -> tuple[int, bool]:
    """A new file, and whether it is written past the page cache."""
    flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC
    if _DIRECT:
        try:
            return os.open(path, flags | _DIRECT, 0o666), True
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
    return os.open(path, flags, 0o666), False


def _step_back() -> None:
    """From here on this thread works only where no other wants to."""
    if sys.platform == "linux":
        with contextlib.suppress(OSError):
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 19)


def write_durably(path: Path, data: bytes, before_sync: Callable[[], None]) -> None:
    """Write a small file that is on the disk when this returns.

    Args:
        before_sync: called between the two.
    """
    with path.open("wb", buffering=0) as file:
        _write(file, memoryview(data))
        before_sync()
        os.fsync(file.fileno())


def _write(file: IO[bytes], data: memoryview) -> None:
    while len(data):
        data = data[file.write(data) :]
