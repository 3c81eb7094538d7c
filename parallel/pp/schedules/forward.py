"""Forward only, for inference."""

from __future__ import annotations

from parallel.pp.schedule import Schedule
from parallel.pp.schedules.interleaved import group, in_groups
from parallel.pp.schedules.line import looped

__all__ = ["make"]


def make(ranks: int, microbatches: int, virtual: int = 1) -> Schedule:
    """Stages r, r + p, r + 2p ... on rank r, about p microbatches through all of them before the next."""
    groups = group(microbatches, ranks)
    rows = (in_groups(looped(rank, ranks, virtual), "F", groups) for rank in range(ranks))
    return Schedule(tuple(tuple(row) for row in rows), "forward")
