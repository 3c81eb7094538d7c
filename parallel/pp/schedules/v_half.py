"""V-Half (arXiv 2405.15362, section 4): half the memory of 1F1B, and about half its bubble."""

from __future__ import annotations

from parallel.pp.schedule import Schedule
from parallel.pp.schedules.blocks import repeat
from parallel.pp.schedules.line import fixed_stages

__all__ = ["make"]


def make(ranks: int, microbatches: int, virtual: int = 1) -> Schedule:
    """Stages r and 2p - 1 - r on rank r, which holds at most (p + 2) // 2 activations of its share."""
    fixed_stages("v-half", virtual, 2)
    turn = 3 * ranks - 1 + (0 if ranks % 2 else 3)
    blocks = [(2 * r, 3 * ranks - 2 - r, turn + 2 * r, turn + 3 * ranks - 1 - r) for r in range(ranks)]
    return repeat("v-half", blocks, microbatches, 2 * ((ranks + 2) // 2))
