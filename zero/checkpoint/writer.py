"""Files that are on the disk when the call returns: small ones, and images, which are hashed while they are written."""

from __future__ import annotations

import contextlib
import errno
import fcntl
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
from zero.checkpoint.digest import Digests, lanes
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

    For each file one thread writes, past the page cache where the file system allows that; a thread hashes one file or
    two (see :func:`~zero.checkpoint.digest.lanes`).

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
        files = [stack.enter_context(_File(path, image.bytes, faults, step)) for path, image in images]
        width = lanes()
        hashers = [
            stack.enter_context(_Hasher(len(files[begin : begin + width]), bool(behind)))
            for begin in range(0, len(files), width)
        ]
        for begin in range(0, max(image.bytes for _, image in images), CHUNK):
            if any(file.failed for file in files):
                break
            for number, (file, (_, image)) in enumerate(zip(files, images, strict=True)):
                size = min(CHUNK, image.bytes - begin)
                if size <= 0:
                    continue
                if behind is None:
                    room.acquire()
                chunk = buffers.take()
                image.copy(begin, chunk[:size])
                if buffers.pinned:
                    torch.cuda.current_stream().synchronize()
                used = _Countdown(2, lambda chunk=chunk: (buffers.give(chunk), room.release()))
                file.put(chunk, begin, size, used)
                hashers[number // width].put(number % width, chunk.numpy().data[:size], used)
            for hasher in hashers:
                hasher.begin()
        if behind is not None:
            behind()
        for done in [file.finish() for file in files]:
            done.result()
        digests = [digest for hasher in hashers for digest in hasher.finish()]
        return [Written(image.bytes, digest) for (_, image), digest in zip(images, digests, strict=True)]


class _Hasher:
    """One thread that hashes a file or two.

    Args:
        files: how many.
        behind: with what time others leave.
    """

    def __init__(self, files: int, behind: bool) -> None:
        self._digests = Digests(files)
        self._waiting: list[tuple[int, memoryview, Callable[[Any], None]]] = []
        self._files = files
        self._work: list[Future[None]] = []
        self._thread = ThreadPoolExecutor(1, "sha256", initializer=_step_back if behind else None)

    def __enter__(self) -> _Hasher:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, at: TracebackType | None) -> None:
        self._thread.shutdown(cancel_futures=True)

    def put(self, number: int, data: memoryview, used: Callable[[Any], None]) -> None:
        """The next bytes of file ``number``."""
        self._waiting.append((number, data, used))

    def finish(self) -> list[str]:
        """Of each file, when all is hashed."""
        for future in self._work:
            future.result()
        return self._digests.hexdigests()

    def begin(self) -> None:
        """Hash what was put since the last call, of all files together."""
        if self._waiting:
            pieces = [memoryview(b"")] * self._files
            for number, data, _ in self._waiting:
                pieces[number] = data
            future = self._thread.submit(self._digests.update, pieces)
            for _, _, used in self._waiting:
                future.add_done_callback(used)
            self._work.append(future)
            self._waiting = []


class _File:
    """A file that is being written.

    Attributes:
        failed: something of it could not be written; :meth:`finish` tells.
    """

    def __init__(self, path: Path, size: int, faults: Injector, step: int) -> None:
        self.failed = False
        self._size, self._faults, self._step = size, faults, step
        self._work: list[Future[None]] = []
        self._descriptor, self._direct = _open(path)
        self._thread = ThreadPoolExecutor(1, "write")

    def __enter__(self) -> _File:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, at: TracebackType | None) -> None:
        self._thread.shutdown(cancel_futures=True)
        os.close(self._descriptor)

    def put(self, chunk: Tensor, begin: int, size: int, used: Callable[[Any], None]) -> None:
        """Write the first ``size`` bytes of a chunk; ``used`` is called when it is not needed any more."""
        future = self._thread.submit(self._write, chunk.numpy().data, begin, size)
        future.add_done_callback(used)
        self._work.append(future)

    def finish(self) -> Future[None]:
        """Make the file durable when all of it is written."""
        return self._thread.submit(self._finish)

    def _finish(self) -> None:
        for future in self._work:
            future.result()
        self._faults.at("save.fsync", self._step)
        os.ftruncate(self._descriptor, self._size)
        os.fsync(self._descriptor)

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
