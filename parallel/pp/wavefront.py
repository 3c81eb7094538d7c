"""Forward passes over any placement of stages."""

from __future__ import annotations

from collections.abc import Sequence

from parallel.pp.action import Action
from parallel.pp.schedule import Schedule

__all__ = ["forward_only"]


def forward_only(placement: Sequence[int], microbatches: int) -> Schedule:
    """The forward passes of a step, in the order in which their inputs can be there.

    Args:
        placement: rank of each stage.
        microbatches: of the step.
    """
    rows: list[list[Action]] = [[] for _ in range(1 + max(placement))]
    cells = ((stage, microbatch) for stage in range(len(placement)) for microbatch in range(microbatches))
    for stage, microbatch in sorted(cells, key=lambda cell: (sum(cell), -cell[0])):
        rows[placement[stage]].append(Action(stage, "F", microbatch))
    return Schedule(tuple(map(tuple, rows)), "forward")
