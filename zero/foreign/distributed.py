"""A checkpoint of ``torch.distributed.checkpoint``: chunks of tensors in ``.distcp`` files, and where each stands."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from parallel.errors import CheckpointError, refuse
from zero.foreign.archive import Archive, TensorRecord, dtype_of, made, whole_numbers
from zero.foreign.source import Entry, Foreign, by_name, printable
from zero.foreign.stream import Call, Table, read_stream, shown

__all__ = ["Distributed"]

_MODULE = "torch.distributed.checkpoint."
_FILE = re.compile(r"[\w.-]+(/[\w-][\w.-]*)*")


@dataclass(frozen=True, slots=True)
class _Place:
    """Where the bytes of a chunk stand."""

    file: str
    offset: int
    length: int


@dataclass(frozen=True, slots=True)
class _Chunk:
    """A box of a tensor."""

    begin: tuple[int, ...]
    size: tuple[int, ...]
    place: _Place


_Places = dict[tuple[str, tuple[int, ...] | None], _Place]
"""(name, offsets of the chunk) -> where it stands; what is no tensor has no offsets."""


class Distributed(Foreign):
    """A folder with ``.metadata``.

    Args:
        path: of the folder.

    Raises:
        CheckpointError: the metadata is absent, damaged or contradicts itself or the files; all that is found wrong.
    """

    def __init__(self, path: Path) -> None:
        self.path, self.kind = path, "a torch distributed checkpoint"
        self._where = str(path / ".metadata")
        root = self._metadata()
        places = self._places(root.attribute("storage_data"))
        self._chunks: dict[str, list[_Chunk]] = {}
        problems: list[str] = []
        found: list[tuple[str, Entry]] = []
        others: list[str] = []
        for name, value in self._named(root.attribute("state_dict_metadata")):
            path_ = value.path if isinstance(value, Call) else ""
            if path_ == f"{_MODULE}metadata.BytesStorageMetadata":
                others.append(name)
                continue
            try:
                found.append((name, self._tensor(name, value, places)))
            except CheckpointError as error:
                problems += error.problems
        refuse(CheckpointError, [*problems, *self._misplaced()])
        self.entries, self.others = by_name(path, found), printable(others)

    def read(self, name: str, what: str = "master") -> Tensor:
        """See :class:`~zero.foreign.source.Foreign`."""
        if name not in self.entries or what != "master":
            raise CheckpointError(f"{self.path}: has no {name}{'' if what == 'master' else '|' + what}")
        entry, chunks = self.entries[name], self._chunks[name]
        if len(chunks) == 1:
            return self._read(name, chunks[0], entry.dtype)
        values = torch.empty(entry.shape, dtype=entry.dtype)
        missing = torch.ones(entry.shape, dtype=torch.bool)
        for chunk in chunks:
            box = tuple(slice(b, b + n) for b, n in zip(chunk.begin, chunk.size, strict=True))
            values[box] = self._read(name, chunk, entry.dtype)
            missing[box] = False
        if missing.any():
            raise CheckpointError(f"{self.path}: the chunks of {name} leave {int(missing.sum())} values out")
        return values

    def _read(self, name: str, chunk: _Chunk, dtype: torch.dtype) -> Tensor:
        place = chunk.place
        where = f"{self.path / place.file}: {name} from {list(chunk.begin)} on"
        archive = Archive(self.path / place.file, place.offset, place.length, where)
        record = archive.value
        if not isinstance(record, TensorRecord):
            raise CheckpointError(f"{where}: is {shown(record)}, not a tensor")
        if record.shape != chunk.size or record.dtype != dtype:
            raise CheckpointError(
                f"{where}: is {record.dtype} {list(record.shape)}, .metadata has {dtype} {list(chunk.size)}"
            )
        return archive.read(record)

    def _metadata(self) -> Call:
        try:
            data = (self.path / ".metadata").read_bytes()
        except OSError as error:
            raise CheckpointError(f"{self._where}: {error.strerror}") from None
        root = read_stream(data, self._where, made)
        if not isinstance(root, Call) or root.path != f"{_MODULE}metadata.Metadata":
            raise CheckpointError(f"{self._where}: describes {shown(root)}, not a distributed checkpoint")
        return root

    def _named(self, value: Any) -> Iterator[tuple[str, Any]]:
        if not isinstance(value, Table) or len(value.named()) != len(value):
            raise CheckpointError(f"{self._where}: has no table of what was saved, or one with a name twice")
        yield from value.named().items()

    def _places(self, value: Any) -> _Places:
        """Where everything stands."""
        found: _Places = {}
        problems: list[str] = []
        for index, info in value.pairs if isinstance(value, Table) else ():
            name = index.attribute("fqn") if isinstance(index, Call) else None
            file, start, length = (info.attribute(n) if isinstance(info, Call) else None for n in _PLACE)
            numbers = whole_numbers((start, length))
            if not isinstance(name, str) or not isinstance(file, str) or numbers is None:
                problems.append(f"{self._where}: a place that cannot be read, of {shown(name)}")
            elif not _FILE.fullmatch(file) or ".." in file:
                problems.append(f"{self._where}: {shown(file)} is not the name of a file in the folder")
            elif info.attribute("transform_descriptors"):
                problems.append(
                    f"{self._where}: {shown(name)} was transformed when it was written, which is not undone"
                )
            else:
                found[name, whole_numbers(index.attribute("offset"))] = _Place(file, *numbers)
        refuse(CheckpointError, problems[:_SHOWN])
        return found

    def _tensor(self, name: str, value: Any, places: dict[tuple[str, tuple[int, ...] | None], _Place]) -> Entry:
        """An entry of the table.

        Raises:
            CheckpointError: it is none, or its chunks are not those of the tensor.
        """
        known = isinstance(value, Call) and value.path == f"{_MODULE}metadata.TensorStorageMetadata"
        shape = whole_numbers(value.attribute("size")) if known else None
        chunks = value.attribute("chunks") if known else None
        dtype = _dtype(value.attribute("properties")) if known else None
        if shape is None or dtype is None or not isinstance(chunks, list) or not chunks:
            raise CheckpointError(f"{self._where}: {shown(name)}: not a tensor of a type that is read")
        held: list[_Chunk] = []
        for chunk in chunks:
            begin, size = (whole_numbers(chunk.attribute(n)) if isinstance(chunk, Call) else None for n in _BOX)
            if begin is None or size is None or not len(begin) == len(size) == len(shape):
                raise CheckpointError(f"{self._where}: {shown(name)}: a chunk that cannot be read")
            if any(b + n > whole for b, n, whole in zip(begin, size, shape, strict=True)):
                raise CheckpointError(f"{self._where}: {shown(name)}: a chunk outside its tensor {list(shape)}")
            place = places.get((name, begin))
            if place is None:
                raise CheckpointError(f"{self._where}: {shown(name)}: no file holds what begins at {list(begin)}")
            held.append(_Chunk(begin, size, place))
        self._chunks[name] = held
        if sum(math.prod(chunk.size) for chunk in held) < math.prod(shape):
            raise CheckpointError(f"{self._where}: the chunks of {shown(name)} leave values of it out")
        if any(math.prod(chunk.size) * dtype.itemsize > chunk.place.length for chunk in held):
            raise CheckpointError(f"{self._where}: a chunk of {shown(name)} is larger than its place")
        return Entry(held[0].place.file, shape, dtype)

    def _misplaced(self) -> Iterator[str]:
        """Files that are missing or too short."""
        ends: dict[str, int] = {}
        for chunk in (chunk for chunks in self._chunks.values() for chunk in chunks):
            ends[chunk.place.file] = max(ends.get(chunk.place.file, 0), chunk.place.offset + chunk.place.length)
        for file, end in sorted(ends.items()):
            path = self.path / file
            if not path.is_file():
                yield f"{path}: missing"
            elif path.stat().st_size < end:
                yield f"{path}: cut short ({path.stat().st_size} bytes of at least {end})"


_PLACE = ("relative_path", "offset", "length")
_BOX = ("offsets", "sizes")
_SHOWN = 20


def _dtype(properties: Any) -> torch.dtype | None:
    """The type among the properties of a tensor, which torch writes as a tuple."""
    state = properties.state if isinstance(properties, Call) else None
    return dtype_of(state[0]) if isinstance(state, tuple) and state else None
