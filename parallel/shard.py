"""The shard table: how each parameter is cut, said once, as data, by the layer that owns it.

Initialization, loading, saving, gradient reduction, clipping, export and resharding read this table and nothing else.
Everything follows from one primitive, :meth:`Shard.pieces`: which box of the whole tensor stands where in the piece
that a rank holds.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, TypeVar, cast, runtime_checkable

import torch
from torch import Tensor, nn

from parallel import comm, rng
from parallel.errors import ShardError
from parallel.mesh import Mesh, Place

__all__ = [
    "Box",
    "Piece",
    "Section",
    "Shard",
    "Sharded",
    "allocate",
    "assemble",
    "count",
    "fill",
    "finalize_gradients",
    "gather_whole",
    "initialize",
    "meet",
    "overlap",
    "param_shards",
    "sum_repeated",
]

M = TypeVar("M", bound=nn.Module)

Box = tuple[slice, ...]
"""One slice with start and stop for each dim."""

_DENSE, _EXPERT = ("dp", "cp", "tp"), ("edp", "ep", "etp")


@dataclass(frozen=True, slots=True)
class Section:
    """A run of rows of a fused dim that is cut by itself: q, k or v; gate or up.

    Attributes:
        size: rows of the whole tensor.
        unit: rows that stay together (the size of a head).
        repeat: with fewer units than ranks, each unit is held by several ranks.
        name: for people and for name tables.
    """

    size: int
    unit: int = 1
    repeat: bool = False
    name: str = ""

    def share(self, rank: int, size: int) -> tuple[int, int, int]:
        """First row, number of rows, and how many ranks hold the same rows."""
        units = self.size // self.unit
        if self.repeat and units < size:
            return rank * units // size * self.unit, self.unit, size // units
        rows = -(-units // size) * self.unit
        first = min(rank * rows, self.size)
        return first, min(rows, self.size - first), 1

    def rows(self, size: int) -> int:
        """Rows that every rank allocates, padding included."""
        units = self.size // self.unit
        return self.unit if self.repeat and units < size else -(-units // size) * self.unit

    def divides(self, size: int) -> bool:
        """Whether ``size`` ranks can share this section without padding."""
        units = self.size // self.unit
        return units % size == 0 or (self.repeat and size % units == 0)


class Piece(NamedTuple):
    """A box of the whole tensor, the box of the local tensor that holds it, and whether this rank holds it first."""

    full: Box
    local: Box
    first: bool

    def inside(self, box: Box) -> Box:
        """Where a box of the whole tensor, which must lie in this piece, stands in the local tensor."""
        return tuple(
            slice(m.start + b.start - f.start, m.start + b.stop - f.start)
            for f, m, b in zip(self.full, self.local, box, strict=True)
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Shard:
    """How one tensor is cut over the axes of a mesh.

    Attributes:
        shape: of the whole tensor, without repetition or padding.
        split: for each dim the axis that cuts it, or None.
        sections: of the first dim that is cut, where it is fused; they add up to its size.
        pad: a dim that its axis does not divide is padded with zeros (the vocabulary); otherwise it is an error.
        partial: axes over which the gradient of a backward pass arrives as one summand on each rank, although every
            rank holds the same values (norm weights under sequence parallelism).
        mean, std: of the initial values; std 0 means that all are ``mean``.
    """

    shape: tuple[int, ...]
    split: tuple[str | None, ...] = ()
    sections: tuple[Section, ...] = ()
    pad: bool = False
    partial: tuple[str, ...] = ()
    mean: float = 0.0
    std: float = 0.0

    def __post_init__(self) -> None:
        split = self.split or (None,) * len(self.shape)
        object.__setattr__(self, "split", split)
        if len(split) != len(self.shape):
            raise ShardError(f"split {split} does not have one entry for each dim of {self.shape}")
        if self.sections and sum(s.size for s in self.sections) != self.shape[self.dim]:
            raise ShardError(f"sections {self.sections} do not add up to dim {self.dim} of {self.shape}")
        if any(s.size % s.unit for s in self.sections):
            raise ShardError(f"sections {self.sections} of {self.shape} are not whole units")

    @property
    def dim(self) -> int:
        """The first dim that is cut, or 0."""
        return next((dim for dim, axis in enumerate(self.split) if axis is not None), 0)

    def _sections(self, dim: int) -> tuple[Section, ...]:
        return self.sections if self.sections and dim == self.dim else (Section(self.shape[dim]),)

    def local_shape(self, place: Place) -> tuple[int, ...]:
        """The shape of the piece that a rank at ``place`` holds.

        Raises:
            ShardError: an axis does not divide its dim and the shard is not padded.
        """
        return tuple(
            size if axis is None else self._local_size(dim, _on(place, axis)[1])
            for dim, (size, axis) in enumerate(zip(self.shape, self.split, strict=True))
        )

    def _local_size(self, dim: int, size: int) -> int:
        for section in self._sections(dim):
            if not self.pad and not section.divides(size):
                units = section.size // section.unit
                raise ShardError(f"{size} ranks do not divide the {units} units of dim {dim} of {self.shape}")
        return sum(section.rows(size) for section in self._sections(dim))

    def pieces(self, place: Place) -> list[Piece]:
        """The boxes of the whole tensor that a rank at ``place`` holds, in order, without padding."""
        axes = _EXPERT if any(axis in _EXPERT for axis in self.split) else _DENSE
        pieces = [Piece((), (), all(_on(place, axis)[0] == 0 for axis in axes if axis not in self.split))]
        for dim, (size, axis) in enumerate(zip(self.shape, self.split, strict=True)):
            if axis is None:
                runs = [(slice(0, size), slice(0, size), True)]
            else:
                self._local_size(dim, _on(place, axis)[1])
                runs = self._runs(dim, *_on(place, axis))
            pieces = [Piece((*p.full, f), (*p.local, m), p.first and first) for p in pieces for f, m, first in runs]
        return pieces

    def _runs(self, dim: int, rank: int, size: int) -> list[tuple[slice, slice, bool]]:
        runs: list[tuple[slice, slice, bool]] = []
        full = local = 0
        for section in self._sections(dim):
            first, rows, holders = section.share(rank, size)
            if rows:
                runs.append((slice(full + first, full + first + rows), slice(local, local + rows), rank % holders == 0))
            full += section.size
            local += section.rows(size)
        return runs

    def cut(self, full: Tensor, place: Place) -> Tensor:
        """The piece of ``full`` that a rank at ``place`` holds, a copy; padding is zero.

        Raises:
            ShardError: ``full`` has another shape.
        """
        if tuple(full.shape) != self.shape:
            raise ShardError(f"expected the whole tensor {self.shape}, got {tuple(full.shape)}")
        return assemble(self, place, lambda box: full[box], full.dtype, full.device)

    def join(self, locals_: Iterable[tuple[Place, Tensor]]) -> Tensor:
        """The whole tensor from the pieces of all ranks that hold different ones.

        Raises:
            ShardError: a piece of the wrong shape, or a part of the whole that nobody holds.
        """
        full, sizes = None, dict[tuple[tuple[int, int], ...], int]()
        for place, local in locals_:
            if tuple(local.shape) != self.local_shape(place):
                raise ShardError(f"expected a piece {self.local_shape(place)}, got {tuple(local.shape)}")
            full = local.new_empty(self.shape) if full is None else full
            for piece in self.pieces(place):
                full[piece.full] = local[piece.local].to(full.device)
                sizes[tuple((run.start, run.stop) for run in piece.full)] = count(piece.full)
        if full is None or sum(sizes.values()) < full.numel():
            raise ShardError(f"the pieces cover {sum(sizes.values())} of the values of {self.shape}")
        return full

    def held(self, place: Place, tensor: Tensor) -> list[Tensor]:
        """The views of a local tensor that this rank holds first: over all ranks, every value exactly once."""
        return [tensor[piece.local] for piece in self.pieces(place) if piece.first]

    def repeated(self, size: int) -> bool:
        """Whether on an axis of ``size`` some values are held by several ranks."""
        return any(s.repeat and s.size // s.unit < size for s in self.sections)


def _on(place: Place, axis: str) -> tuple[int, int]:
    return place.get(axis, (0, 1))


def assemble(
    shard: Shard,
    place: Place,
    read: Callable[[Box], Tensor],
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
) -> Tensor:
    """The piece of a rank, read box by box: no more than the piece is ever in memory."""
    local = torch.zeros(shard.local_shape(place), dtype=dtype, device=device)
    for piece in shard.pieces(place):
        local[piece.local] = read(piece.full).to(device=device, dtype=dtype)
    return local


@runtime_checkable
class Sharded(Protocol):
    """A module that says how its own parameters are cut."""

    def shards(self) -> dict[str, Shard]:
        """Parameter name (of this module alone) -> its entry."""
        ...


def param_shards(model: nn.Module) -> dict[str, Shard]:
    """The shard table of a model: one entry a parameter, under the names of ``named_parameters``.

    Parameters of modules that say nothing are whole on every rank.
    """
    table: dict[str, Shard] = {}
    for prefix, module in model.named_modules():
        own: dict[str, Shard] = cast(Any, module).shards() if isinstance(module, Sharded) else {}
        for name, parameter in cast(nn.Module, module).named_parameters(recurse=False):
            entry = own.get(name) or Shard(shape=tuple(parameter.shape))
            table[f"{prefix}.{name}" if prefix else name] = entry
    return {name: table[name] for name, _ in model.named_parameters()}


def allocate(module: M, device: torch.device) -> M:
    """Memory on ``device`` for parameters and buffers that were made on ``meta``; it holds nothing yet.

    As ``Module.to_empty``, which imports sympy for tensors on ``meta``: the better part of a second.
    """
    return module._apply(lambda x: torch.empty(x.shape, dtype=x.dtype, device=device))


@torch.no_grad()
def initialize(model: nn.Module, place: Place, seed: int) -> None:
    """Give every parameter its initial value: a function of the seed, its name and global indices.

    The same values result at every layout, bit for bit, rounded to float32 first so that they agree in every precision.
    """
    shards = param_shards(model)
    for name, parameter in model.named_parameters():
        fill(parameter, shards[name], place, rng.key(seed, "init", name))


_BLOCK = 1 << 18  # values drawn at a time: the temporaries stay in cache


@torch.no_grad()
def fill(local: Tensor, shard: Shard, place: Place, draw: int) -> None:
    """Fill a rank's piece with its initial values; padding is zero."""
    if shard.std == 0 and not shard.pad:
        local.fill_(shard.mean)
        return
    local.zero_()
    for piece in shard.pieces(place):
        target = local[piece.local]
        if shard.std == 0:
            target.fill_(shard.mean)
            continue
        index = _indices(shard.shape, piece.full).reshape(-1)
        values = [rng.normal(draw, block) * shard.std + shard.mean for block in index.split(_BLOCK)]
        target.copy_(torch.cat(values).to(torch.float32).view(target.shape))


def _indices(shape: Sequence[int], box: Box) -> Tensor:
    """The row-major index in a tensor of ``shape`` of each value of ``box``."""
    index = torch.zeros((), dtype=torch.int64)
    for size, run in zip(shape, box, strict=True):
        index = index[..., None] * size + torch.arange(run.start, run.stop)
    return index


@torch.no_grad()
def finalize_gradients(model: nn.Module, mesh: Mesh) -> None:
    """Complete the gradients of values that several ranks hold, after a backward pass.

    Sums norm weights under sequence parallelism (``partial``) and repeated key-value heads over their ranks. The
    trainer does this by itself; call it before your own optimizer's step. Data-parallel reduction is not part of it.
    """
    shards = param_shards(model)
    partial: dict[str, list[Tensor]] = {}
    for name, parameter in model.named_parameters():
        if parameter.grad is None:
            continue
        for axis in shards[name].partial:
            if mesh.axes[axis].size > 1:
                partial.setdefault(axis, []).append(parameter.grad)
        sum_repeated(parameter.grad, shards[name], mesh)
    for axis, grads in partial.items():
        flat = torch.cat([grad.reshape(-1) for grad in grads])
        comm.sum_(flat, mesh.axes[axis])
        for grad, summed in zip(grads, flat.split([grad.numel() for grad in grads]), strict=True):
            grad.copy_(summed.view_as(grad))


@torch.no_grad()
def gather_whole(local: Tensor, shard: Shard, mesh: Mesh) -> Tensor:
    """The whole of one parameter on every rank, joined from the pieces of the tensor-parallel ranks."""
    pieces = comm.start_all_gather(local.contiguous().view(1, -1), mesh.tp).wait()
    places = [{"tp": (rank, mesh.tp.size)} for rank in range(mesh.tp.size)]
    return shard.join((place, piece.view_as(local)) for place, piece in zip(places, pieces, strict=True))


def sum_repeated(grad: Tensor, shard: Shard, mesh: Mesh) -> None:
    """Sum, in place, the gradient rows of units that several ranks of an axis hold."""
    if not shard.sections or not shard.repeated(mesh.axes[shard.split[shard.dim] or "tp"].size):
        return
    axis = mesh.axes[shard.split[shard.dim] or "tp"]
    local = 0
    for section in shard.sections:
        rows = section.rows(axis.size)
        units = section.size // section.unit
        if section.repeat and units < axis.size:
            view = grad.narrow(shard.dim, local, rows)
            view.copy_(comm.sum_(view.contiguous(), mesh.subaxis(axis.name, axis.size // units)))
        local += rows


def count(box: Box) -> int:
    """How many values a box holds."""
    total = 1
    for run in box:
        total *= run.stop - run.start
    return total


def overlap(a: Box, b: Box) -> Box | None:
    """The box that two boxes share, or None."""
    box = tuple(slice(max(x.start, y.start), min(x.stop, y.stop)) for x, y in zip(a, b, strict=True))
    return box if all(run.start < run.stop for run in box) else None


def meet(piece: Piece, box: Box) -> tuple[Box, Box] | None:
    """Where what a piece has of ``box`` stands in the local tensor, and where in ``box``; None if it has nothing."""
    if (shared := overlap(piece.full, box)) is None:
        return None
    outside = tuple(slice(s.start - b.start, s.stop - b.start) for s, b in zip(shared, box, strict=True))
    return piece.inside(shared), outside
