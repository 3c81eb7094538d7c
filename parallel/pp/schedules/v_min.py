"""V-Min (arXiv 2405.15362, section 4): a third of the memory of 1F1B, and about two thirds of its bubble."""

from __future__ import annotations

from parallel.pp.schedule import Schedule
from parallel.pp.schedules.blocks import repeat
from parallel.pp.schedules.line import fixed_stages

__all__ = ["make"]


def make(ranks: int, microbatches: int, virtual: int = 1) -> Schedule:
    """Stages r and 2p - 1 - r on rank r, which holds at most (p + 4) // 3 activations of its share."""
    fixed_stages("v-min", virtual, 2)
    turn = 2 * ranks + (0 if ranks % 3 else 2)
    blocks = [(r, 2 * ranks - 1 - r, turn + r, turn + 2 * ranks - 1 - r) for r in range(ranks)]
    return repeat("v-min", blocks, microbatches, 2 * ((ranks + 4) // 3))
