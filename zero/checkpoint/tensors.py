"""A safetensors file that is read without being mapped: what is not asked for takes neither time nor memory."""

from __future__ import annotations

import json
import os
import weakref
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from parallel.errors import CheckpointError
from zero.checkpoint.image import DTYPES

__all__ = ["TensorFile"]

_KINDS = {name: dtype for dtype, name in DTYPES.items()}
_LONGEST = 100 << 20  # of a header, in bytes, as the format's own library has it
_CONVERTED = 16 << 20  # bytes at a time, where the target is of another type


class TensorFile:
    """1-D tensors of a file, by name.

    Args:
        path: the file.

    Attributes:
        close: lets go of the file.

    Raises:
        CheckpointError: it cannot be read, or is not of the format.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._descriptor = os.open(path, os.O_RDONLY)
        except OSError as error:
            raise CheckpointError(f"{path}: {error}") from None
        self.close = weakref.finalize(self, os.close, self._descriptor)
        try:
            self._held = self._header()
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            self.close()
            raise CheckpointError(f"{path}: not a safetensors file ({type(error).__name__}: {error})") from None

    def _header(self) -> dict[str, tuple[torch.dtype, int, int]]:
        """Name -> type, first byte in the file, elements."""
        size = os.fstat(self._descriptor).st_size
        length = int.from_bytes(os.pread(self._descriptor, 8, 0), "little")
        if size < 8 or length > min(size - 8, _LONGEST):
            raise ValueError(f"a header of {length} bytes in a file of {size}")
        table: dict[str, Any] = json.loads(os.pread(self._descriptor, length, 8))
        held = {}
        for name, entry in table.items():
            if name == "__metadata__":
                continue
            dtype, (count,), (begin, end) = _KINDS[entry["dtype"]], entry["shape"], entry["data_offsets"]
            if not 0 <= begin <= end <= size - 8 - length or end - begin != count * dtype.itemsize:
                raise ValueError(f"{name}: bytes {begin} to {end} for {count} values in a file of {size} bytes")
            held[name] = dtype, 8 + length + begin, count
        return held

    def dtype(self, name: str) -> torch.dtype:
        """Of a tensor.

        Raises:
            CheckpointError: there is none of that name.
        """
        return self._entry(name)[0]

    def read(self, name: str, target: Tensor, runs: Iterable[tuple[int, int, int]]) -> int:
        """Read runs (first element here, first element of ``target``, length); how many bytes that were.

        Args:
            target: 1-D and contiguous on the CPU; values are converted to its type, at most 16 MiB at a time.

        Raises:
            CheckpointError: they are not there, or cannot be read.
        """
        dtype, begin, count = self._entry(name)
        size, total = dtype.itemsize, 0
        same = target.view(torch.uint8).numpy().data if dtype == target.dtype else None
        for first, into, length in runs:
            if not 0 <= first <= first + length <= count:
                raise CheckpointError(f"{self.path}: {name}: values {first} to {first + length} of {count}")
            at = begin + first * size
            if same is not None:
                self._fill(same[into * size : (into + length) * size], at, name)
            else:
                for done in range(0, length, _CONVERTED // size):
                    part = torch.empty(min(_CONVERTED // size, length - done), dtype=dtype)
                    self._fill(part.view(torch.uint8).numpy().data, at + done * size, name)
                    target[into + done : into + done + len(part)] = part
            total += length * size
        return total

    def _entry(self, name: str) -> tuple[torch.dtype, int, int]:
        if name not in self._held:
            raise CheckpointError(f"{self.path}: holds no {name}")
        return self._held[name]

    def _fill(self, target: memoryview, at: int, name: str) -> None:
        while len(target):
            try:
                got = os.preadv(self._descriptor, [target], at)
            except OSError as error:
                raise CheckpointError(f"{self.path}: {name}: {error}") from None
            if not got:
                raise CheckpointError(f"{self.path}: {name}: the file ends before byte {at + len(target)}")
            target, at = target[got:], at + got
