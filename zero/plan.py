"""Which parameter stands where in the flat vectors of a model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, field

import torch
from torch import nn

from parallel.shard import Shard

__all__ = ["Group", "Slot", "plan", "runs_once", "wide"]


@dataclass(frozen=True, slots=True)
class Slot:
    """One parameter's run of a flat vector."""

    name: str
    parameter: nn.Parameter
    start: int

    @property
    def stop(self) -> int:
        """The end of the run."""
        return self.start + self.parameter.numel()


@dataclass(slots=True)
class Group:
    """The parameters of one flat vector: first those with weight decay, then the others.

    Attributes:
        unit: the part of the model that is gathered as one; "" where nothing is.
        shared: pipeline ranks that hold the same parameters; empty: this one alone.
        dtype: of the parameters.
        exact: it is never compressed.
        ways: ranks that share the vector; its length is a multiple.
        whole: no parameter is cut: the largest are placed first, each in the run of the rank that has the least, and
            every run is as long as the longest.
    """

    unit: str
    shared: tuple[int, ...]
    dtype: torch.dtype
    exact: bool
    ways: int
    whole: bool = False
    parameters: list[tuple[str, nn.Parameter]] = field(default_factory=list)

    @property
    def slots(self) -> list[Slot]:
        """Where each parameter stands, in the order of the vector."""
        if self.whole:
            return self._placed()[0]
        slots: list[Slot] = []
        for name, parameter in sorted(self.parameters, key=lambda item: not decays(item[1])):
            start = slots[-1].stop if slots else 0
            if slots and decays(slots[-1].parameter) and not decays(parameter):
                start = _aligned(start)
            slots.append(Slot(name, parameter, start))
        return slots

    @property
    def length(self) -> int:
        """Of the vector, padding included."""
        if self.whole:
            return self._placed()[1] * self.ways
        return _aligned(self.slots[-1].stop, self.ways)

    def _placed(self) -> tuple[list[Slot], int]:
        """Where each parameter stands if none is cut, and the length of a run."""
        runs: list[list[tuple[str, nn.Parameter]]] = [[] for _ in range(self.ways)]
        filled = [0] * self.ways
        for name, parameter in sorted(self.parameters, key=lambda item: -item[1].numel()):
            rank = filled.index(min(filled))
            runs[rank].append((name, parameter))
            filled[rank] += parameter.numel()
        slots: list[Slot] = []
        for rank, run in enumerate(runs):
            start = rank * max(filled)
            for name, parameter in run:
                slots.append(Slot(name, parameter, start))
                start = slots[-1].stop
        return slots, max(filled)


_LINE = 16
"""Runs are multiples of 64 bytes of float32. The fused AdamW rounds what is left over of a run otherwise than the rest:
where a run ends must not decide over a bit of a weight."""


def _aligned(length: int, ways: int = 1) -> int:
    return -(-length // (_LINE * ways)) * _LINE * ways


def decays(parameter: nn.Parameter) -> bool:
    """Weight decay applies to matrices, not to biases and norm weights."""
    return parameter.ndim > 1


def wide(dtype: torch.dtype) -> torch.dtype:
    """The type in which gradients are summed and weights are updated."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def plan(
    parameters: Sequence[tuple[str, nn.Parameter]],
    holders: Mapping[str, Sequence[int]],
    units: Mapping[nn.Parameter, str],
    bucket_bytes: int,
    ways: int,
    exact: Set[str] = frozenset(),
    whole: bool = False,
) -> list[Group]:
    """Groups in the order in which backward reaches them.

    Args:
        parameters: those that are trained, in the order of the model.
        holders: parameter -> pipeline ranks that hold it.
        units: parameter -> the part of the model that it is gathered with.
        bucket_bytes: of gradients; a larger parameter has a group of its own.
        ways: ranks that share each vector.
        exact: parameters that are never compressed.
        whole: no parameter is cut; then a run, not the vector, is of ``bucket_bytes``.
    """
    bucket_bytes *= ways if whole else 1
    groups: list[Group] = []
    open_: dict[tuple[str, tuple[int, ...], torch.dtype, bool], tuple[Group, int]] = {}
    for name, parameter in reversed(parameters):
        shared = tuple(holders[name]) if len(holders[name]) > 1 else ()
        key = units.get(parameter, ""), shared, parameter.dtype, name in exact
        size = parameter.numel() * wide(parameter.dtype).itemsize
        group, filled = open_.get(key, (None, 0))
        if group is None or filled + size > bucket_bytes:
            group, filled = Group(*key, ways, whole), 0
            groups.append(group)
        group.parameters.append((name, parameter))
        open_[key] = (group, filled + size)
    return groups


def runs_once(shard: Shard, place: Mapping[str, tuple[int, int]]) -> Iterator[tuple[int, int]]:
    """Runs of the flattened local piece that this rank holds first: over all ranks, every value exactly once."""
    shape = shard.local_shape(place)
    pieces = shard.pieces(place)
    if (
        all(piece.first for piece in pieces)
        and sum(_count(piece.local) for piece in pieces) == torch.Size(shape).numel()
    ):
        yield 0, torch.Size(shape).numel()
        return
    mask = torch.zeros(shape, dtype=torch.int8)
    for piece in pieces:
        if piece.first:
            mask[piece.local] = 1
    edges = torch.diff(mask.flatten(), prepend=mask.new_zeros(1), append=mask.new_zeros(1)).nonzero().flatten().tolist()
    yield from zip(edges[::2], edges[1::2], strict=True)


def _count(box: Sequence[slice]) -> int:
    return torch.Size([run.stop - run.start for run in box]).numel()
