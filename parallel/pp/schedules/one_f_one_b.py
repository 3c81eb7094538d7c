"""1F1B (PipeDream-flush, arXiv 2006.09503): as few microbatches in flight as keep the pipeline full."""

from __future__ import annotations

from parallel.pp.action import Action
from parallel.pp.schedule import Schedule

__all__ = ["make"]


def make(ranks: int, microbatches: int, virtual: int = 1) -> Schedule:
    """Stage r on rank r. Bubble (p - 1)(F + B); rank r holds p - r activations."""
    rows = []
    for rank in range(ranks):
        ahead = min(ranks - rank - 1, microbatches)
        row = [Action(rank, "F", microbatch) for microbatch in range(ahead)]
        for microbatch in range(microbatches):
            if ahead + microbatch < microbatches:
                row.append(Action(rank, "F", ahead + microbatch))
            row.append(Action(rank, "B", microbatch))
        rows.append(tuple(row))
    return Schedule(tuple(rows), "1f1b")
