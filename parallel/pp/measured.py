"""From a measured timeline to the costs that the simulator takes: plan and reality side by side."""

from __future__ import annotations

from collections import defaultdict
from statistics import median

from parallel.pp.simulate import Costs
from parallel.pp.timeline import Timeline

__all__ = ["measured_costs"]


def measured_costs(*timelines: Timeline, latency: float = 0.0) -> Costs:
    """The median time of every kind of action on every stage, over one or more traced steps.

    Args:
        latency: of a message, seconds, which a timeline of computing actions does not show.
    """
    times: dict[str, dict[int, list[float]]] = defaultdict(lambda: defaultdict(list))
    stages = 0
    for timeline in timelines:
        for row in timeline.rows:
            for (stage, op, _), start, end in row:
                times[op][stage].append(end - start)
                stages = max(stages, stage + 1)
    compute = {op: tuple(median(of.get(stage, [0.0])) for stage in range(stages)) for op, of in times.items()}
    return Costs(compute=compute, latency=latency)
