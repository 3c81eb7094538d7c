"""What the inner optimizer sees: runs of flat master weights, or matrices as they are."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from parallel.mesh import Mesh
from parallel.shard import Shard, gather_whole
from zero.bucket import Bucket
from zero.fragment import Fragment
from zero.plan import Slot

__all__ = ["Flat", "with_room"]


class Flat:
    """A run of a bucket's master weights as one parameter of the inner optimizer.

    With ``slot`` the run is one parameter, in its own shape. Where tensor-parallel ranks share that parameter, each of
    them updates the whole of it, alike, and keeps its piece.

    Args:
        bucket: whose.
        start, stop: of ``bucket.master``.
        decay: whether weight decay applies.
        slot: the parameter, if the run is one that is not to be cut.
        shard: of that parameter.
        mesh: where.
    """

    def __init__(
        self, bucket: Bucket, start: int, stop: int, decay: bool, slot: Slot | None, shard: Shard | None, mesh: Mesh
    ) -> None:
        self.bucket, self.start, self.stop, self.decay, self.slot = bucket, start, stop, decay, slot
        self.mesh = mesh
        cut = shard is not None and mesh.tp.size > 1 and "tp" in shard.split
        self._shard = shard if cut else None
        self._pieces: dict[str, Tensor] = {}
        with torch.no_grad():
            self.values = nn.Parameter(self._whole(bucket.master[start:stop]))

    @property
    def names(self) -> list[str]:
        """The parameters of which the numbers of the inner optimizer's state are."""
        return [slot.name for slot in (self.bucket.slots if self.slot is None else [self.slot])]

    def gradient(self, own: Tensor, scale: float) -> Tensor:
        """The gradient of ``values``, from the reduced one of the bucket's own run, which is scaled."""
        piece = own[self.start : self.stop]
        if scale < 1.0:
            piece.mul_(scale)
        return self._whole(piece)

    def _whole(self, piece: Tensor) -> Tensor:
        """A piece of the run's shape as the inner optimizer sees it."""
        if self.slot is None:
            return piece
        piece = piece.view(self.slot.parameter.shape)
        if self._shard is None:
            return piece
        return gather_whole(piece.to(self.mesh.device), self._shard, self.mesh).to(piece.device)

    def updated(self) -> None:
        """``values`` are new: so is the run of the master weights."""
        if self._shard is not None:
            self.bucket.master[self.start : self.stop] = self._shard.cut(self.values.data, self.mesh.place).view(-1)

    def piece(self, what: str, vector: Tensor) -> Tensor:
        """This rank's piece of a state vector, flattened; a view, or with shared matrices what :meth:`join` reads."""
        if self._shard is None:
            return vector.view(-1)
        piece = self._shard.cut(vector, self.mesh.place).view(-1)
        return self._pieces.setdefault(what, piece).copy_(piece)

    def join(self, vectors: Mapping[str, Tensor]) -> None:
        """After master and pieces were filled: the same for what the inner optimizer sees; all ranks of tp call it."""
        if self._shard is not None:
            self.values.data.copy_(self._whole(self.bucket.master[self.start : self.stop]))
            for what, vector in vectors.items():
                if what in self._pieces:
                    vector.copy_(self._whole(self._pieces[what]))

    def fragments(self, what: str, vector: Tensor) -> Iterator[Fragment]:
        """The parameters in this run, each with its part of the flattened ``vector``."""
        for slot in self.bucket.slots if self.slot is None else [self.slot]:
            _, run = self.bucket.part(slot)
            first, end = max(run.start, self.start), min(run.stop, self.stop)
            if first < end:
                begin = first + self.bucket.own.start - slot.start
                yield Fragment(slot.name, what, begin, vector[first - self.start : end - self.start])


def with_room(flats: Sequence[Flat]) -> Iterator[tuple[Flat, Tensor, Tensor]]:
    """Each run with memory for two more like it, the same for all: what is freed in between would lie in the way."""
    longest = {
        (f.values.dtype, f.values.device): f.values.numel() for f in sorted(flats, key=lambda f: f.values.numel())
    }
    room = {kind: torch.empty(2, length, dtype=kind[0], device=kind[1]) for kind, length in longest.items()}
    for flat in flats:
        shape = flat.values.shape
        one, other = room[flat.values.dtype, flat.values.device][:, : shape.numel()]
        yield flat, one.view(shape), other.view(shape)
