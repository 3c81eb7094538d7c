"""Where boxes of a tensor stand in flat memory: the arithmetic between any two layouts."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from parallel.shard import Box

__all__ = ["Offsets", "clip", "shared_runs"]

Offsets = NDArray[np.int64]


def shared_runs(
    source: Sequence[int], source_box: Box, target: Sequence[int], target_box: Box
) -> tuple[Offsets, Offsets, int]:
    """A box of one row-major tensor and its place in another, as runs that are contiguous in both.

    Args:
        source, target: shapes of the two tensors.
        source_box, target_box: of the same size, one in each.

    Returns:
        where each run begins in the flat source, ascending; where in the flat target; the length of all runs.
    """
    sizes = [run.stop - run.start for run in source_box]
    outer, length = len(sizes), 1
    while outer:
        outer -= 1
        length *= sizes[outer]
        if sizes[outer] != source[outer] or sizes[outer] != target[outer]:
            break
    return _begins(source, source_box, outer), _begins(target, target_box, outer), length


def _begins(shape: Sequence[int], box: Box, outer: int) -> Offsets:
    """Flat offsets of the first elements of a box, for all indices of its first ``outer`` dims."""
    stride, strides = 1, [0] * len(shape)
    for dim in reversed(range(len(shape))):
        strides[dim], stride = stride, stride * shape[dim]
    begins = np.array([sum(run.start * step for run, step in zip(box, strides, strict=True))], np.int64)
    for dim in range(outer):
        steps = np.arange(box[dim].stop - box[dim].start, dtype=np.int64) * strides[dim]
        begins = (begins[:, None] + steps).reshape(-1)
    return begins


def clip(
    source: Offsets, target: Offsets, length: int, held: tuple[int, int], wanted: tuple[int, int]
) -> tuple[Offsets, Offsets, Offsets]:
    """The parts of runs that are in ``held`` of the source and in ``wanted`` of the target.

    Args:
        source, target: where the runs begin.
        length: of every run.
        held, wanted: first element and end of what there is of the flat source, and is asked of the flat target.

    Returns:
        where the parts begin, counted from the beginning of ``held``, and of ``wanted``; their lengths.
    """
    first = np.maximum(0, np.maximum(held[0] - source, wanted[0] - target))
    end = np.minimum(length, np.minimum(held[1] - source, wanted[1] - target))
    some = first < end
    first, end = first[some], end[some]
    return source[some] + first - held[0], target[some] + first - wanted[0], end - first
