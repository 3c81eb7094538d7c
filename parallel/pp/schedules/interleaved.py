"""Interleaved 1F1B (arXiv 2104.04473, section 2.2): v stages a rank make the bubble v times as short."""

from __future__ import annotations

from itertools import pairwise

from parallel.pp.action import Action
from parallel.pp.schedule import Row, Schedule
from parallel.pp.schedules import one_f_one_b
from parallel.pp.schedules.line import alone, looped

__all__ = ["group", "in_groups", "make"]


def make(ranks: int, microbatches: int, virtual: int = 1) -> Schedule:
    """Stages r, r + p, r + 2p ... on rank r; one stage a rank is 1F1B itself.

    Bubble (p - 1)(F + B) / v for p microbatches and more, F and B being those of a rank's share of the model. Rank 0
    holds p + (p - 1) / v activations of such a share if p divides the microbatches; else groups are larger than p, and
    it holds (v - 1) / v more for each microbatch by which the first one is.
    """
    if virtual == 1:
        return Schedule(one_f_one_b.make(ranks, microbatches).rows, "interleaved")
    return Schedule(tuple(_row(rank, ranks, microbatches, virtual) for rank in range(ranks)), "interleaved")


def _row(rank: int, ranks: int, microbatches: int, virtual: int) -> Row:
    if ranks == 1:
        return alone(virtual, microbatches)
    stages, groups = looped(rank, ranks, virtual), group(microbatches, ranks)
    forward, backward = in_groups(stages, "F", groups), in_groups(stages[::-1], "B", groups)
    ahead = min(2 * (ranks - rank - 1) + (virtual - 1) * len(groups[0]), len(forward))
    row = forward[:ahead]
    for at, action in enumerate(backward):
        row += forward[ahead + at : ahead + at + 1]
        row.append(action)
    return tuple(row)


def group(microbatches: int, ranks: int) -> list[range]:
    """The microbatches in groups of the number of ranks, or a few more; in one group where they are fewer."""
    size, larger = divmod(microbatches, count := max(1, microbatches // ranks))
    starts = [at * size + min(at, larger) for at in range(count + 1)]
    return [range(first, end) for first, end in pairwise(starts)]


def in_groups(stages: list[int], op: str, groups: list[range]) -> list[Action]:
    """One action on every stage and microbatch: a group through every stage, then the next group."""
    return [Action(stage, op, microbatch) for members in groups for stage in stages for microbatch in members]
