"""GPipe (arXiv 1811.06965): all forward passes, then all backward passes."""

from __future__ import annotations

from parallel.pp.action import Action
from parallel.pp.schedule import Schedule

__all__ = ["make"]


def make(ranks: int, microbatches: int, virtual: int = 1) -> Schedule:
    """Stage r on rank r. Bubble (p - 1)(F + B); every activation of the step is held."""
    rows = [
        tuple(Action(rank, op, microbatch) for op in "FB" for microbatch in range(microbatches))
        for rank in range(ranks)
    ]
    return Schedule(tuple(rows), "gpipe")
