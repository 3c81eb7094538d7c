"""Are two checkpoints the same, bit for bit, whatever ranks wrote them? A few MiB of each are in memory at a time."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from parallel.shard import Box
from zero.checkpoint.reader import Checkpoint

__all__ = ["Comparison", "compare"]

_BOX = 4 << 20  # values at a time, or one row


@dataclass(slots=True)
class Comparison:
    """What two checkpoints have in common.

    Attributes:
        parameters, tensors, values, scalars: how many of each were compared.
        differences: one sentence each; none where they are the same.
    """

    parameters: int
    tensors: int
    values: int
    scalars: int
    differences: tuple[str, ...]


def compare(one: Checkpoint, two: Checkpoint) -> Comparison:
    """Weights, optimizer state, scalars, step and tokens of two checkpoints; how they are cut does not matter.

    Raises:
        CheckpointError: a file cannot be read.
    """
    found = Comparison(0, 0, 0, 0, ())
    found.differences = tuple(_differences(one, two, found))
    return found


def _differences(one: Checkpoint, two: Checkpoint, found: Comparison) -> Iterator[str]:
    for name in ("step", "tokens", "past"):
        first, second = getattr(one.manifest, name), getattr(two.manifest, name)
        if first != second:
            yield f"{name}: {first} and {second}"
    found.parameters = len(one.shards.keys() | two.shards.keys())
    for name, what in sorted(one.tensors | two.tensors):
        found.tensors += 1
        missing = [checkpoint.folder for checkpoint in (one, two) if (name, what) not in checkpoint.tensors]
        shapes = [checkpoint.shards[name].shape for checkpoint in (one, two) if name in checkpoint.shards]
        if missing:
            yield f"{name}|{what}: not in {missing[0]}"
        elif shapes[0] != shapes[1]:
            yield f"{name}|{what}: of shape {shapes[0]} and {shapes[1]}"
        else:
            found.values += torch.Size(shapes[0]).numel()
            yield from _in_values(one, two, name, what, shapes[0])
    found.scalars = len(one.scalars.keys() | two.scalars.keys())
    for name in sorted(one.scalars.keys() | two.scalars.keys()):
        if one.scalars.get(name) != two.scalars.get(name):
            yield f"{name}: {one.scalars.get(name, 'absent')} and {two.scalars.get(name, 'absent')}"


def _in_values(one: Checkpoint, two: Checkpoint, name: str, what: str, shape: tuple[int, ...]) -> Iterator[str]:
    differing, shown = 0, ""
    for box in _boxes(shape):
        first, second = one.read(name, what, box), two.read(name, what, box)
        if first.dtype != second.dtype:
            yield f"{name}|{what}: of {first.dtype} and {second.dtype}"
            return
        if differs := int((unequal := _bits(first) != _bits(second)).sum()):
            if not differing:
                at = [int(index) for index in unequal.nonzero()[0]]
                place = [index + run.start for index, run in zip(at, box, strict=True)]
                shown = f"first at {place}: {first[tuple(at)].item()!r} and {second[tuple(at)].item()!r}"
            differing += differs
    if differing:
        yield f"{name}|{what}: {differing:,} of {torch.Size(shape).numel():,} values differ, {shown}"


def _bits(values: Tensor) -> Tensor:
    """The same memory as whole numbers: equal where every bit is, NaN and the two zeros included."""
    whole = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    return values.view(whole[values.element_size()])


def _boxes(shape: tuple[int, ...]) -> Iterator[Box]:
    """Blocks of rows."""
    if not shape:
        yield ()
        return
    rows = max(1, _BOX // max(1, torch.Size(shape[1:]).numel()))
    for begin in range(0, shape[0], rows):
        yield slice(begin, min(begin + rows, shape[0])), *(slice(0, size) for size in shape[1:])
