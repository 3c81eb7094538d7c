"""What ``torch.save`` writes: a zip of one pickle and of the bytes of every storage, read without torch's loader."""

from __future__ import annotations

import io
import math
import struct
import sys
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from parallel.errors import CheckpointError
from zero.foreign.stream import Call, Stored, Symbol, Table, read_stream, shown

__all__ = ["Archive", "TensorRecord", "dtype_of", "made", "whole_numbers"]

_STORAGES = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}
_DTYPES = {str(dtype): dtype for dtype in _STORAGES.values()}
_PARAMETERS = {"torch._utils._rebuild_parameter": 3, "torch._utils._rebuild_parameter_with_state": 4}
_REBUILT = ("torch._utils._rebuild_tensor_v2", "torch._utils._rebuild_tensor_v3", *_PARAMETERS)
_PLAIN = ("torch.Tensor", "torch._tensor.Tensor", "torch.nn.parameter.Parameter")
_CHUNK = 8 << 20  # bytes read at a time
_HEADER = struct.Struct("<4s22xHH")  # of an entry: mark, lengths of its name and of what is extra


@dataclass(frozen=True, slots=True)
class TensorRecord:
    """A tensor that an archive describes.

    Attributes:
        key: of its storage.
        dtype: of its values.
        offset: of the first value in the storage, in values.
        shape, stride: as torch has them.
    """

    key: str
    dtype: torch.dtype
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]

    @property
    def count(self) -> int:
        """How many values it has."""
        return math.prod(self.shape)

    @property
    def span(self) -> int:
        """How far it reaches in the storage from ``offset``, in values."""
        return 1 + sum((n - 1) * step for n, step in zip(self.shape, self.stride, strict=True)) if self.count else 0

    @property
    def contiguous(self) -> bool:
        """Whether its values stand in the storage in their row-major order, without gaps."""
        held = [(n, step) for n, step in zip(self.shape, self.stride, strict=True) if n != 1]
        return all(a == n * b for (_, a), (n, b) in pairwise(held)) and (not held or held[-1][1] == 1)


class Archive:
    """One zip of ``torch.save``, alone in a file or somewhere in one.

    Args:
        path: of the file.
        start, length: where in the file; by default all of it.
        name: of what is read, for errors; by default the path.

    Attributes:
        value: what was saved, with :class:`TensorRecord` for tensors.

    Raises:
        CheckpointError: absent, damaged, or in another format.
    """

    def __init__(self, path: Path, start: int = 0, length: int | None = None, name: str = "") -> None:
        self.path, self.name, self._start = path, name or str(path), start
        try:
            size = path.stat().st_size
        except OSError as error:
            raise CheckpointError(f"{self.name}: {error.strerror}") from None
        self._length = size - start if length is None else length
        if start < 0 or self._length < 0 or start + self._length > size:
            raise CheckpointError(f"{self.name}: {self._length} bytes from {start} on, of a file of {size}")
        self._entries = self._directory()
        roots = [name.removesuffix("data.pkl") for name in self._entries if name.endswith("/data.pkl")]
        if len(roots) != 1 or roots[0].count("/") != 1:
            raise CheckpointError(f"{self.name}: a zip, but not one of torch.save")
        self._root = roots[0]
        self._sums = any(entry.CRC for entry in self._entries.values())  # or torch was told to write none
        self._checked: set[str] = set()
        order = f"{self._root}byteorder"
        if order in self._entries and bytes(self._bytes(order)) != sys.byteorder.encode():
            raise CheckpointError(f"{self.name}: written on a machine of another byte order")
        self.value = read_stream(bytes(self._bytes(f"{self._root}data.pkl")), self.name, made)

    def problem(self, record: TensorRecord) -> str:
        """Why a tensor cannot be read, or an empty string; reads nothing."""
        entry = self._entries.get(f"{self._root}data/{record.key}")
        if entry is None:
            return f"storage {record.key[:40]!r} is not in the file"
        held, last = entry.file_size // record.dtype.itemsize, record.offset + record.span
        if last > held or record.count > held:
            return f"{record.count} values up to {last} of a storage of {held}"
        return ""

    def read(self, record: TensorRecord) -> Tensor:
        """A tensor, read into memory of its own.

        Raises:
            CheckpointError: it does not fit the file, or its bytes are damaged.
        """
        if record.contiguous:
            return self.run(record, 0, record.count).view(record.shape)
        flat = TensorRecord(record.key, record.dtype, record.offset, (record.span,), (1,))
        return self.run(flat, 0, record.span).as_strided(record.shape, record.stride).clone()

    def run(self, record: TensorRecord, begin: int, count: int) -> Tensor:
        """Some values of a contiguous tensor, flattened.

        Raises:
            CheckpointError: they do not fit the file, or its bytes are damaged.
        """
        problem = self.problem(record) or ("" if record.contiguous else "its values do not stand in order")
        if begin + count > record.count:
            problem = f"{count} values from {begin} on, of {record.count}"
        if problem:
            raise CheckpointError(f"{self.name}: {problem}")
        name = f"{self._root}data/{record.key}"
        self._check(name)
        values = torch.empty(count, dtype=record.dtype)
        target = memoryview(values.view(torch.uint8).numpy().data)
        self._fill(target, self._begin(name) + (record.offset + begin) * record.dtype.itemsize)
        return values

    def _directory(self) -> dict[str, zipfile.ZipInfo]:
        """The entries of the zip, each within it and as it is: not compressed."""
        try:
            with zipfile.ZipFile(_Window(self.path, self._start, self._length)) as archive:
                found = archive.infolist()
        except (zipfile.BadZipFile, NotImplementedError, ValueError, OSError, RuntimeError, struct.error) as error:
            hint = "; torch before 1.6 wrote files that are no zip" if self._length else ""
            raise CheckpointError(f"{self.name}: not a whole zip of torch.save ({error}){hint}") from None
        entries = {entry.filename: entry for entry in found}
        if len(entries) < len(found):
            raise CheckpointError(f"{self.name}: two entries of one name")
        for entry in found:
            plain = entry.compress_type == zipfile.ZIP_STORED and not entry.flag_bits & 1
            if not plain or entry.compress_size != entry.file_size:
                raise CheckpointError(f"{self.name}: {shown(entry.filename)} is compressed or encrypted")
        return entries

    def _begin(self, name: str) -> int:
        """Where the bytes of an entry begin in the file."""
        entry = self._entries[name]
        header = bytearray(_HEADER.size)
        self._fill(memoryview(header), self._start + entry.header_offset)
        mark, name_length, extra = _HEADER.unpack(header)
        begin = entry.header_offset + _HEADER.size + name_length + extra
        if mark != b"PK\x03\x04" or begin + entry.file_size > self._length:
            raise CheckpointError(f"{self.name}: damaged: {shown(name)} is not where the directory has it")
        return self._start + begin

    def _bytes(self, name: str) -> bytearray:
        self._check(name)
        data = bytearray(self._entries[name].file_size)
        self._fill(memoryview(data), self._begin(name))
        return data

    def _check(self, name: str) -> None:
        """Compare an entry with its checksum, once."""
        if name in self._checked or not self._sums:
            return
        begin, left, crc = self._begin(name), self._entries[name].file_size, 0
        buffer = memoryview(bytearray(min(_CHUNK, left)))
        while left:
            part = buffer[: min(len(buffer), left)]
            self._fill(part, begin)
            crc, begin, left = zlib.crc32(part, crc), begin + len(part), left - len(part)
        if crc != self._entries[name].CRC:
            raise CheckpointError(f"{self.name}: damaged: {shown(name)} does not have its checksum")
        self._checked.add(name)

    def _fill(self, target: memoryview, begin: int) -> None:
        try:
            with self.path.open("rb", buffering=0) as file:
                file.seek(begin)
                while len(target):
                    got = file.readinto(target[:_CHUNK])
                    if not got:
                        raise CheckpointError(f"{self.name}: it ends too soon")
                    target = target[got:]
        except OSError as error:
            raise CheckpointError(f"{self.name}: {error.strerror}") from None


class _Window(io.RawIOBase):
    """A part of a file, as a file."""

    def __init__(self, path: Path, start: int, length: int) -> None:
        self._file, self._start, self._length, self._at = path.open("rb", buffering=0), start, length, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        at = offset + (0, self._at, self._length)[whence]
        if at < 0:
            raise ValueError("before the beginning")
        self._at = at
        return at

    def tell(self) -> int:
        return self._at

    def readinto(self, buffer: Any) -> int:
        view = memoryview(buffer)[: max(0, self._length - self._at)]
        self._file.seek(self._start + self._at)
        got = self._file.readinto(view) or 0
        self._at += got
        return got

    def close(self) -> None:
        self._file.close()
        super().close()


def dtype_of(value: Any) -> torch.dtype | None:
    """The type that ``torch.float32`` and the like mean."""
    return _DTYPES.get(value.path) if isinstance(value, Symbol) else None


def whole_numbers(value: Any) -> tuple[int, ...] | None:
    """A shape, an offset or a stride: a tuple of whole numbers that are not negative and not absurd."""
    if not isinstance(value, tuple | list) or len(value) > 64:
        return None
    fine = all(isinstance(n, int) and not isinstance(n, bool) and 0 <= n < 1 << 48 for n in value)
    return tuple(value) if fine else None


def made(path: str, arguments: Any) -> Any:
    """The few calls that stand for data: dictionaries, shapes, tensors."""
    given: tuple[Any, ...] = arguments if isinstance(arguments, tuple) else ()
    if path == "collections.OrderedDict" and len(given) < 2:
        return Table(_entries(given[0])) if given else Table()
    if path == "collections.defaultdict" and len(given) < 2:
        return Table()
    if path == "torch.Size" and len(given) == 1:
        return whole_numbers(given[0])
    if path in _PARAMETERS and len(given) == _PARAMETERS[path]:
        return given[0] if isinstance(given[0], TensorRecord) else None
    if path == "torch._tensor._rebuild_from_type_v2" and len(given) == 4:  # a tensor with attributes, which are left
        inner, kind = given[0], given[1]
        plain = isinstance(kind, Symbol) and kind.path in _PLAIN
        return made(inner.path, given[2]) if plain and isinstance(inner, Symbol) and inner.path in _REBUILT else None
    if path == "torch._utils._rebuild_tensor_v2" and len(given) in (6, 7):
        return _tensor(given, None)
    if path == "torch._utils._rebuild_tensor_v3" and len(given) in (7, 8):
        return _tensor(given, dtype_of(given[6]))
    return None


def _entries(value: Any) -> Iterator[tuple[Any, Any]]:
    pairs: Sequence[Any] = value if isinstance(value, list | tuple) else ()
    return ((pair[0], pair[1]) for pair in pairs if isinstance(pair, list | tuple) and len(pair) == 2)


def _tensor(given: Sequence[Any], dtype: torch.dtype | None) -> TensorRecord | Call | None:
    """A tensor of a storage; None if something of it is not as torch writes it."""
    storage = given[0].identifier if isinstance(given[0], Stored) else None
    if not isinstance(storage, tuple) or len(storage) != 5 or storage[0] != "storage":
        return None
    kind, key = storage[1], storage[2]
    if dtype is None and isinstance(kind, Symbol) and kind.module in ("torch", "torch.storage"):
        dtype = _STORAGES.get(kind.name)
    start, shape, stride = whole_numbers((given[1],)), whole_numbers(given[2]), whole_numbers(given[3])
    if dtype is None or not isinstance(key, str) or start is None or shape is None or stride is None:
        return None
    return TensorRecord(key, dtype, start[0], shape, stride) if len(shape) == len(stride) else None
