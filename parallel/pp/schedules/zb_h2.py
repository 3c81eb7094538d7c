"""ZB-H2 (arXiv 2401.10241, section 2.2): no bubble where F = I = W, for twice the memory of 1F1B."""

from __future__ import annotations

from parallel.pp.schedule import Schedule
from parallel.pp.schedules.line import Lane, Line, fixed_stages

__all__ = ["make"]


def make(ranks: int, microbatches: int, virtual: int = 1) -> Schedule:
    """Stage r on rank r, which keeps up to 2r inputs for W. Bubble (p - 1)(F + I - 2W); every rank holds 2p - 1."""
    fixed_stages("zb-h2", virtual)
    rows = []
    for rank in range(ranks):
        line = Line(Lane(rank, 0, microbatches))
        line.add("F0", 2 * (ranks - rank - 1)).add("F0 I0", 2 * rank).add("F0 I0 W", microbatches - 2 * rank)
        rows.append(line.row())
    return Schedule(tuple(rows), "zb-h2")
