"""One checkpoint folder, readable at any layout: no more bytes of its tensors than are asked for."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence, Set
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from parallel.errors import CheckpointError
from parallel.mesh import Place
from parallel.shard import Box, Piece, Shard, count, overlap
from zero.checkpoint.manifest import FileEntry, Manifest
from zero.checkpoint.runs import Offsets, clip, shared_runs
from zero.checkpoint.tensors import TensorFile
from zero.fragment import Fragment

__all__ = ["Checkpoint"]

_OPEN = 64  # files at a time


class _Move(NamedTuple):
    """Runs to copy from one tensor of a file: where they begin there and in the target, and their lengths."""

    entry: FileEntry
    key: str
    source: Offsets
    target: Offsets
    lengths: Offsets


class Checkpoint:
    """What a checkpoint holds; tensors are read when they are asked for.

    Attributes:
        folder: where.
        manifest: all that is known of it.
        step, tokens: how far it is.
        layout, scalars, shards, files: of the manifest.
        bytes_read: of tensors, so far.
    """

    def __init__(self, folder: Path, manifest: Manifest) -> None:
        self.folder, self.manifest = folder, manifest
        self.step, self.tokens, self.layout = manifest.step, manifest.tokens, manifest.layout
        self.scalars, self.shards, self.files = manifest.scalars, manifest.shards, manifest.files
        self.bytes_read = 0
        self._held: dict[tuple[str, str], list[tuple[FileEntry, int, int]]] = {}
        for entry in self.files:
            for name, what, start, length in entry.fragments:
                self._held.setdefault((name, what), []).append((entry, start, length))
        self._open: dict[str, TensorFile] = {}

    @property
    def tensors(self) -> Set[tuple[str, str]]:
        """All that :meth:`read` has: (parameter, what)."""
        return self._held.keys()

    @staticmethod
    def open(folder: Path) -> Checkpoint:
        """Read the manifest.

        Raises:
            CheckpointError: it is absent, damaged or of another format.
        """
        return Checkpoint(folder, Manifest.read(folder))

    def problems(self, part: int = 0, parts: int = 1) -> Iterator[str]:
        """Files that are missing, are not what was written, or do not belong here.

        Args:
            part, parts: of so many ranks that share the work, which this is; every file is read by one of them.
        """
        for entry in self.files[part::parts]:
            path = self.folder / entry.name
            try:
                size = path.stat().st_size if path.is_file() else None
                if size is None:
                    yield f"{path}: missing"
                elif size != entry.bytes:
                    yield f"{path}: damaged ({size} bytes, the manifest says {entry.bytes})"
                elif _sha256(path) != entry.sha256:
                    yield f"{path}: damaged (its SHA-256 is not that of the manifest)"
            except OSError as error:
                yield f"{path}: cannot be read ({error.strerror})"
        if part == 0:
            known = {"manifest.json", *(entry.name for entry in self.files)}
            for path in sorted(self.folder.iterdir()):
                if path.name not in known and not path.name.startswith(".nfs"):
                    yield f"{path}: not in the manifest"

    def read(self, name: str, what: str, box: Box) -> Tensor:
        """A box of a parameter (``what`` = master) or of its optimizer state, on the CPU.

        Raises:
            CheckpointError: it is not there, or cannot be read.
        """
        sizes = [run.stop - run.start for run in box]
        piece = Piece(box, tuple(slice(0, size) for size in sizes), True)
        moves = self._moves(name, what, [piece], sizes, (0, count(box)))
        self._check(name, what, moves, count(box))
        values = torch.empty(count(box), dtype=self._dtype(moves))
        for move in moves:
            self._copy(move, values)
        return values.view(sizes)

    def whole(self, name: str, what: str = "master") -> Tensor:
        """The whole of a parameter.

        Raises:
            CheckpointError: it is not there, or cannot be read.
        """
        if name not in self.shards:
            raise CheckpointError(f"{self.folder}: has no parameter {name}")
        return self.read(name, what, tuple(slice(0, size) for size in self.shards[name].shape))

    def kinds(self, name: str) -> Iterator[str]:
        """What there is of a parameter: ``master``, and its optimizer state."""
        return (what for parameter, what in self._held if parameter == name)

    def covers(self, fragment: Fragment, shard: Shard, place: Place) -> str:
        """Why a fragment cannot be filled, or an empty string; reads nothing."""
        pieces, shape, span = _target(fragment, shard, place)
        moves = self._moves(fragment.parameter, fragment.what, pieces, shape, span)
        try:
            self._check(fragment.parameter, fragment.what, moves, _without_padding(pieces, shape, span))
        except CheckpointError as error:
            return str(error)
        return ""

    def fill(self, fragment: Fragment, shard: Shard, place: Place) -> None:
        """Give a fragment its values; padding becomes zero.

        Args:
            shard: how the fragment's parameter is cut now.
            place: of the rank that holds it.

        Raises:
            CheckpointError: a file cannot be read.
        """
        pieces, shape, span = _target(fragment, shard, place)
        on_cpu = fragment.values.device.type == "cpu"
        values = fragment.values if on_cpu else torch.empty_like(fragment.values, device="cpu")
        values.zero_()
        for move in self._moves(fragment.parameter, fragment.what, pieces, shape, span):
            self._copy(move, values)
        if not on_cpu:
            fragment.values.copy_(values)

    def close(self) -> None:
        """Let go of the files."""
        for file in self._open.values():
            file.close()
        self._open.clear()

    def _moves(
        self, name: str, what: str, pieces: Sequence[Piece], shape: Sequence[int], span: tuple[int, int]
    ) -> list[_Move]:
        """What to copy for ``span`` of a flat local tensor of ``shape`` that holds ``pieces``; every value once."""
        moves: list[_Move] = []
        for entry, start, length in self._held.get((name, what), ()):
            shard, place = self.shards[name], _without_replicas(self.layout.place(entry.rank))
            local = shard.local_shape(place)
            for held in shard.pieces(place):
                for wanted in pieces if held.first else ():
                    if (shared := overlap(held.full, wanted.full)) is None:
                        continue
                    runs = shared_runs(local, held.inside(shared), shape, wanted.inside(shared))
                    parts = clip(*runs, (start, start + length), span)
                    if len(parts[2]):
                        moves.append(_Move(entry, f"{name}|{what}|{start}", *parts))
        return moves

    def _check(self, name: str, what: str, moves: Sequence[_Move], wanted: int) -> None:
        found = sum(int(move.lengths.sum()) for move in moves)
        if (name, what) not in self._held:
            raise CheckpointError(f"{self.folder}: no file holds {name}|{what}")
        if found != wanted:
            raise CheckpointError(f"{self.folder}: the files hold {found} of {wanted} values of {name}|{what}")

    def _dtype(self, moves: Sequence[_Move]) -> torch.dtype:
        return self._file(moves[0].entry).dtype(moves[0].key) if moves else torch.float32

    def _copy(self, move: _Move, target: Tensor) -> None:
        runs = zip(move.source.tolist(), move.target.tolist(), move.lengths.tolist(), strict=True)
        self.bytes_read += self._file(move.entry).read(move.key, target, runs)

    def _file(self, entry: FileEntry) -> TensorFile:
        if entry.name not in self._open:
            if len(self._open) >= _OPEN:
                self._open.pop(next(iter(self._open))).close()
            self._open[entry.name] = TensorFile(self.folder / entry.name)
        return self._open[entry.name]


def _target(fragment: Fragment, shard: Shard, place: Place) -> tuple[list[Piece], tuple[int, ...], tuple[int, int]]:
    """The pieces of a rank, the shape of all of them together, and the span of the fragment in it."""
    span = fragment.start, fragment.start + fragment.values.numel()
    return shard.pieces(place), shard.local_shape(place), span


def _without_padding(pieces: Sequence[Piece], shape: Sequence[int], span: tuple[int, int]) -> int:
    """How many of the elements of ``span`` are values of the whole tensor."""
    total = 0
    for piece in pieces:
        _, _, lengths = clip(*shared_runs(shape, piece.local, shape, piece.local), span, span)
        total += int(lengths.sum())
    return total


def _without_replicas(place: Place) -> Place:
    """A place among the ranks that hold different parts of the model; the data ranks divide each part as fragments."""
    return {axis: (0, 1) if axis in ("dp", "cp", "edp", "data", "world") else where for axis, where in place.items()}


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
