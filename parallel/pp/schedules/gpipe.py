"""GPipe (arXiv 1811.06965): all forward passes, then all backward passes."""

from __future__ import annotations

from parallel.pp.schedule import Schedule
from parallel.pp.schedules.line import Lane, Line, alone, fixed_stages

__all__ = ["make"]


def make(ranks: int, microbatches: int, virtual: int = 1) -> Schedule:
    """Stage r on rank r. Bubble (p - 1)(F + B); every activation of the step is held, unless p = 1."""
    fixed_stages("gpipe", virtual)
    if ranks == 1:
        return Schedule((alone(1, microbatches),), "gpipe")
    lines = (Line(Lane(rank, 0, microbatches)) for rank in range(ranks))
    rows = tuple(line.add("F0", microbatches).add("B0", microbatches).row() for line in lines)
    return Schedule(rows, "gpipe")
