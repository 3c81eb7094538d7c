"""DualPipeV (github.com/deepseek-ai/DualPipe): DualPipe cut in half, so that one copy of the model is enough."""

from __future__ import annotations

from parallel.pp.schedule import Schedule
from parallel.pp.schedules.dualpipe import write_row
from parallel.pp.schedules.line import Lane, alone, fixed_stages, vee

__all__ = ["make"]


def make(ranks: int, microbatches: int, virtual: int = 1) -> Schedule:
    """Stages r and 2p - 1 - r on rank r. The bubble of DualPipe with 2p stages, p - 1 times (F + 2B - 3W)."""
    fixed_stages("dualpipev", virtual, 2)
    if ranks == 1:
        return Schedule((alone(2, microbatches),), "dualpipev")
    rows = tuple(
        write_row(*(Lane(stage, 0, microbatches) for stage in vee(rank, ranks)), place=rank, half=ranks)
        for rank in range(ranks)
    )
    return Schedule(rows, "dualpipev")
