"""1F1B (PipeDream-flush, arXiv 2006.09503): as few microbatches in flight as keep the pipeline full."""

from __future__ import annotations

from parallel.pp.schedule import Schedule
from parallel.pp.schedules.line import Lane, Line, fixed_stages

__all__ = ["make"]


def make(ranks: int, microbatches: int, virtual: int = 1) -> Schedule:
    """Stage r on rank r. Bubble (p - 1)(F + B); rank r holds p - r activations."""
    fixed_stages("1f1b", virtual)
    lines = (Line(Lane(rank, 0, microbatches)) for rank in range(ranks))
    rows = tuple(line.add("F0", ranks - rank - 1).add("F0 B0", microbatches).row() for rank, line in enumerate(lines))
    return Schedule(rows, "1f1b")
