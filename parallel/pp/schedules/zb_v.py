"""ZB-V (arXiv 2401.10241, section 6): two stages a rank in the shape of a V; no bubble where F = I = W."""

from __future__ import annotations

from parallel.pp.schedule import Row, Schedule
from parallel.pp.schedules.line import Lane, Line, alone, fixed_stages, vee

__all__ = ["make"]


def make(ranks: int, microbatches: int, virtual: int = 1) -> Schedule:
    """Stages r and 2p - 1 - r on rank r. Every rank holds 2p activations of a stage, as many bytes as in 1F1B."""
    fixed_stages("zb-v", virtual, 2)
    return Schedule(tuple(_row(rank, ranks, microbatches) for rank in range(ranks)), "zb-v")


def _row(rank: int, ranks: int, microbatches: int) -> Row:
    if ranks == 1:
        return alone(2, microbatches)
    line = Line(*(Lane(stage, 0, microbatches) for stage in vee(rank, ranks)))
    behind, whole = ranks - rank, max(microbatches, 2 * ranks)
    line.add("F0", 2 * behind - 1).add("F1 F0", rank).add("F1 I1 W", behind)
    line.add("F0 I0 W F1 I1 W", whole - line.forwards(0))
    line.add("I0 W F1 I1 W", whole - line.forwards(1))
    line.add("I0 I1", rank).add("I0 W", behind)
    return line.row()
