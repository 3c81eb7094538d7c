"""A safetensors file written by hand: streamed, hashed on the way, and on the disk when it returns."""

from __future__ import annotations

import hashlib
import json
import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

from zero.faults import Injector
from zero.fragment import Fragment

__all__ = ["DTYPES", "write_durably", "write_fragments"]

DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
"""Names of types in the format."""

_CHUNK = 8 << 20
_AHEAD = 3  # chunks that are written and not hashed yet


def write_fragments(path: Path, held: Sequence[Fragment], faults: Injector, step: int) -> dict[str, Any]:
    """Write fragments as 1-D tensors named ``parameter|what|start``; the file is durable when this returns.

    Memory: four chunks of 8 MiB for values that are not on the CPU, none for those that are.

    Returns:
        ``bytes`` and ``sha256`` of the file.

    Raises:
        OSError: it could not be written.
    """
    digest = hashlib.sha256()
    with path.open("wb", buffering=0) as file, ThreadPoolExecutor(1, "sha256") as hasher:
        waiting: deque[Future[None]] = deque()
        for number, chunk in enumerate(_chunks(held)):
            if number == 1:
                faults.at("save.write", step)
            waiting.append(hasher.submit(digest.update, chunk))  # a thread hashes while this one writes
            begin = file.tell()
            _write(file, chunk)
            if hasattr(os, "posix_fadvise"):  # what is written starts on its way to the disk at once, not with fsync
                os.posix_fadvise(file.fileno(), begin, len(chunk), os.POSIX_FADV_DONTNEED)
            while len(waiting) > _AHEAD:
                waiting.popleft().result()
        faults.at("save.fsync", step)
        os.fsync(file.fileno())
        while waiting:
            waiting.popleft().result()
        return {"bytes": file.tell(), "sha256": digest.hexdigest()}


def write_durably(path: Path, data: bytes, before_sync: Callable[[], None]) -> None:
    """Write a small file that is on the disk when this returns.

    Args:
        before_sync: called between the two.
    """
    with path.open("wb", buffering=0) as file:
        _write(file, memoryview(data))
        before_sync()
        os.fsync(file.fileno())


def _chunks(held: Sequence[Fragment]) -> Iterator[memoryview]:
    """The header, and then the values."""
    table: dict[str, Any] = {}
    end = 0
    for fragment in held:
        begin, end = end, end + fragment.values.numel() * fragment.values.element_size()
        table[fragment.key] = {
            "dtype": DTYPES[fragment.values.dtype],
            "shape": [fragment.values.numel()],
            "data_offsets": [begin, end],
        }
    header = json.dumps(table, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)
    yield memoryview(len(header).to_bytes(8, "little") + header)
    for fragment in held:
        for part in fragment.values.detach().split(max(1, _CHUNK // fragment.values.element_size())):
            yield _bytes(part)


def _bytes(values: Tensor) -> memoryview:
    return memoryview(values.cpu().contiguous().view(torch.uint8).numpy().data)


def _write(file: IO[bytes], data: memoryview) -> None:
    while len(data):
        data = data[file.write(data) :]
