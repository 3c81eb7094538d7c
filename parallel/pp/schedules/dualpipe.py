"""DualPipe (arXiv 2412.19437, section 3.2.1): microbatches enter at both ends of two copies of the model."""

from __future__ import annotations

from parallel.errors import ConfigError
from parallel.pp.schedule import Row, Schedule
from parallel.pp.schedules.line import Lane, Line, fixed_stages

__all__ = ["make", "write_row"]


def make(ranks: int, microbatches: int, virtual: int = 1) -> Schedule:
    """The first half of the microbatches takes stage s on rank s, the second half on rank p - 1 - s.

    Every stage has two copies. Bubble (p/2 - 1)(F + 2B - 3W); p + 1 activations.

    Raises:
        ConfigError: an odd number of ranks.
    """
    fixed_stages("dualpipe", virtual)
    if ranks % 2:
        raise ConfigError(
            f"dualpipe needs an even number of ranks, not {ranks}: take {ranks + 1}, or dualpipev with {ranks} ranks"
        )
    down, up = (microbatches + 1) // 2, microbatches // 2
    rows = []
    for rank in range(ranks):
        lanes = [Lane(rank, 0, down), Lane(ranks - 1 - rank, down, up)]
        outer = min(rank, ranks - 1 - rank)
        if rank != outer:
            lanes.reverse()
        rows.append(write_row(*lanes, place=outer, half=ranks // 2))
    return Schedule(tuple(rows), "dualpipe")


def write_row(near: Lane, far: Lane, place: int, half: int) -> Row:
    """The row of the rank that is ``place`` ranks from its end of a pipeline of 2 ``half`` stages.

    Args:
        near: lane of the microbatches that enter at the rank's own end.
        far: lane of those that come from the other end.
        place: 0 at the end, ``half`` - 1 in the middle.
        half: of the stages.
    """
    line, inner = Line(near, far), half - place - 1
    whole = max(near.count, far.count, 2 * half)
    line.add("F0", 2 * inner).add("F0 F1", place + 1).add("I1 W F1", inner)
    line.add("F0 B1 F1 B0", whole - line.forwards(0))
    line.add("B1 F1 B0", inner)
    left = place + 1
    line.add("B1 B0", left // 2)
    if left % 2:
        line.add("B1 I0")
    line.add("I1 I0", left // 2).add("W I0", inner)
    return line.row()
