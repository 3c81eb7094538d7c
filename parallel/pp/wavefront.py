"""Forward passes over any placement of stages."""

from __future__ import annotations

from collections.abc import Sequence

from parallel.pp.action import Action
from parallel.pp.schedule import Schedule

__all__ = ["forward_only", "spread"]


def spread(held: Sequence[Sequence[int]]) -> list[int]:
    """A rank for every stage: of those that hold it, the one with the fewest so far.

    Args:
        held: stages of each rank.
    """
    placement: list[int] = []
    for stage in range(1 + max(stage for own in held for stage in own)):
        able = [rank for rank, own in enumerate(held) if stage in own]
        placement.append(min(able, key=lambda rank: (placement.count(rank), rank)))
    return placement


def forward_only(placement: Sequence[int], ranks: int, microbatches: int) -> Schedule:
    """The forward passes of a step, in the order in which their inputs can be there.

    Args:
        placement: rank of each stage.
        ranks: of the pipeline; some may have none.
        microbatches: of the step.
    """
    rows: list[list[Action]] = [[] for _ in range(ranks)]
    cells = ((stage, microbatch) for stage in range(len(placement)) for microbatch in range(microbatches))
    for stage, microbatch in sorted(cells, key=lambda cell: (sum(cell), -cell[0])):
        rows[placement[stage]].append(Action(stage, "F", microbatch))
    return Schedule(tuple(map(tuple, rows)), "forward")
