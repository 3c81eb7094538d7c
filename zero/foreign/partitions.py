"""Where each parameter stands in the flat vectors of DeepSpeed's data ranks.

As in its ``utils/zero_to_fp32.py``. At stages 1 and 2 the vectors of a group on all ranks, one after the other, are the
parameters of that group, one after the other. At stage 3 the vectors of a rank, one after the other, are its share of
every parameter, one after the other.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import accumulate
from typing import Any, NamedTuple

from parallel.errors import CheckpointError

__all__ = ["Run", "Shapes", "cut_runs", "flat_runs"]

Shapes = Sequence[tuple[str, tuple[int, ...]]]
"""Parameters and their shapes, in the order in which they stand."""


class Run(NamedTuple):
    """Values ``begin`` and on of the vectors of a group (stages 1 and 2) or of a rank (3), one after the other."""

    vector: int
    begin: int
    length: int


def flat_runs(groups: Sequence[Shapes], lengths: Sequence[int], paddings: Any, ranks: int) -> dict[str, list[Run]]:
    """Stages 1 and 2.

    Args:
        groups: of parameters.
        lengths: of the groups' vectors, over all ranks.
        paddings: for each group what follows each parameter; anything else: nothing does.
        ranks: that share them; a vector is padded to twice as many.

    Raises:
        CheckpointError: the lengths are not those of the parameters.
    """
    if len(groups) != len(lengths):
        raise CheckpointError(f"{len(groups)} groups of parameters, {len(lengths)} of their values")
    runs: dict[str, list[Run]] = {}
    for index, (group, total) in enumerate(zip(groups, lengths, strict=True)):
        sizes = [math.prod(shape) for _, shape in group]
        gaps = paddings[index] if isinstance(paddings, list) and index < len(paddings) else [0] * len(group)
        if (
            not isinstance(gaps, list)
            or len(gaps) != len(group)
            or any(type(gap) is not int or gap < 0 for gap in gaps)
        ):
            raise CheckpointError(f"group {index} has paddings of other parameters")
        ends = [0, *accumulate(size + gap for size, gap in zip(sizes, gaps, strict=True))]
        needed = ends[-1] - (gaps[-1] if gaps else 0)
        if total < needed or -(-total // (2 * ranks)) > -(-ends[-1] // (2 * ranks)):
            raise CheckpointError(f"group {index} has {total} values, its parameters need {needed}")
        runs |= {name: [Run(index, end, size)] for (name, _), size, end in zip(group, sizes, ends[:-1], strict=True)}
    return runs


def cut_runs(groups: Sequence[Shapes], lengths: Sequence[int]) -> dict[str, list[Run]]:
    """Stage 3; arguments as for :func:`flat_runs`, with the lengths of the ranks' vectors.

    Raises:
        CheckpointError: the lengths are not those of the parameters.
    """
    shapes = [pair for group in groups for pair in group]
    shares = [-(-math.prod(shape) // len(lengths)) for _, shape in shapes]
    for rank, length in enumerate(lengths):
        if length != sum(shares):
            raise CheckpointError(f"data rank {rank} has {length} values, the parameters need {sum(shares)}")
    begins = [0, *accumulate(shares)][:-1]
    return {
        name: [Run(rank, begin, share) for rank in range(len(lengths))]
        for (name, _), share, begin in zip(shapes, shares, begins, strict=True)
    }
