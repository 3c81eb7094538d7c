"""ZB-H1 (arXiv 2401.10241, section 2.1): 1F1B whose W fill the gaps at the end, with the memory of 1F1B."""

from __future__ import annotations

from parallel.pp.schedule import Schedule
from parallel.pp.schedules.line import Lane, Line, fixed_stages

__all__ = ["make"]


def make(ranks: int, microbatches: int, virtual: int = 1) -> Schedule:
    """Stage r on rank r, which keeps up to r inputs for W. Bubble (p - 1)(F + I - W); every rank holds p."""
    fixed_stages("zb-h1", virtual)
    rows = []
    for rank in range(ranks):
        line = Line(Lane(rank, 0, microbatches))
        line.add("F0", ranks - rank - 1).add("F0 I0", rank).add("F0 I0 W", microbatches - rank)
        rows.append(line.row())
    return Schedule(tuple(rows), "zb-h1")
