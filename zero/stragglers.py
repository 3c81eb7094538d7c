"""Ranks that compute for longer than others: each measures its own time, and the slow ones are named."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence

import torch

from parallel import comm
from parallel.mesh import Layout, Mesh

__all__ = ["EVERY", "Stragglers", "slow_ranks"]

EVERY = 5
"""Steps over which a rank's time is measured before the ranks compare."""


class Stragglers:
    """Compares how long the ranks of a mesh compute; what they wait for one another is not counted.

    Every fifth step each rank tells the median of its own seconds a step since the last time, in one gather of eight
    bytes; all ranks know the result, see :func:`slow_ranks`. A rank is named where it is slow twice in a row. What the
    host waits is measured (gloo): with NCCL, where the device waits, all ranks seem equally slow, and none is named.

    Args:
        mesh: all of its ranks make one, and call it in the same steps.
        times: a rank is slow from so many times its like on (0: nothing is compared).
    """

    def __init__(self, mesh: Mesh, times: float) -> None:
        self.mesh, self.times = mesh, times
        self._began = self._waited = 0.0
        self._own: list[float] = []
        self._first: list[float] = []
        self._slow: dict[int, float] = {}

    def begin(self) -> None:
        """A step begins."""
        self._began, self._waited = time.perf_counter(), self.mesh.ledger.waited_s

    def end(self) -> dict[int, float]:
        """A step is over; every fifth time, the ranks that were slow this time and the last, and how many times."""
        if not self.times or self.mesh.world.group is None:
            return {}
        waited = self.mesh.ledger.waited_s - self._waited
        self._own.append(time.perf_counter() - self._began - waited)
        if len(self._own) < EVERY:
            return {}
        own = torch.tensor([statistics.median(self._own)], dtype=torch.float64, device=self.mesh.device)
        self._own.clear()
        seconds = comm.start_all_gather(own, self.mesh.world).wait().tolist()
        self._first = self._first or seconds
        before, self._slow = self._slow, slow_ranks(seconds, self._first, self.mesh.layout, self.times)
        return {rank: times for rank, times in self._slow.items() if rank in before}


def slow_ranks(seconds: Sequence[float], first: Sequence[float], layout: Layout, times: float) -> dict[int, float]:
    """Ranks that take at least ``times`` as long as their like, and how many times.

    A rank is compared with the ranks of its pipeline stage, which do the same work: with the median of their seconds,
    the lower one of two, so that one of two ranks can be slow. A stage of one rank has no like; how much slower it has
    become since the first comparison is compared with the median of how much all ranks have.

    Args:
        seconds: of each rank.
        first: the same, at the first comparison.
        layout: of the ranks.
        times: what is slow.
    """
    if layout.world == layout.pp:
        ratios = [now / max(before, 1e-9) for now, before in zip(seconds, first, strict=True)]
        alike = [range(layout.world)]
    else:
        ratios, each = [*seconds], layout.world // layout.pp
        alike = [range(stage * each, (stage + 1) * each) for stage in range(layout.pp)]
    found: dict[int, float] = {}
    for ranks in alike:
        usual = max(statistics.median_low(ratios[rank] for rank in ranks), 1e-9)
        found |= {rank: round(ratios[rank] / usual, 2) for rank in ranks if ratios[rank] >= times * usual}
    return found
