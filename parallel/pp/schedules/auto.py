"""A searched schedule: every fixed one and many of a list scheduler are simulated, and the shortest step is taken."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import product

from parallel.errors import ConfigError, refuse
from parallel.pp.schedule import Schedule
from parallel.pp.schedules.greedy import Policy, greedy
from parallel.pp.schedules.line import looped, vee
from parallel.pp.schedules.registry import SCHEDULES
from parallel.pp.simulate import Costs, simulate
from parallel.pp.timeline import Timeline
from parallel.pp.validate import validate

__all__ = ["make", "search", "split_costs"]

_NEVER = ("auto", "forward", "dualpipe")
"""Not searched: itself, what does not train, and what needs two copies of the model."""

_SIMULATED = 6
"""How many of the list scheduler's tables are simulated."""


def make(ranks: int, microbatches: int, virtual: int = 1) -> Schedule:
    """The best for F = I = W, no cost of transfers, and the memory of 1F1B; ``virtual`` 1 stands for 1 or 2."""
    memory, virtuals = float(min(ranks, microbatches)), (1, 2) if virtual == 1 else (virtual,)
    return search(ranks, microbatches, Costs.uniform(kept=1.0), memory, virtuals=virtuals)


def search(
    ranks: int, microbatches: int, costs: Costs, memory: float | None = None, *, virtuals: Sequence[int] = (1, 2, 3, 4)
) -> Schedule:
    """The schedule with the shortest simulated step among those that fit; of equal ones the simplest.

    Args:
        ranks: of the pipeline.
        microbatches: of a step.
        costs: of the model cut into one part a rank; a schedule with v stages a rank cuts each part v times.
        memory: most that a rank may hold for backward, in the unit of ``costs.activation``; None: any amount.
        virtuals: numbers of stages a rank that may be taken.

    Raises:
        ConfigError: costs for another number of parts, or a limit that no schedule keeps, with the least that works.
    """
    counts = {"ranks": ranks, "microbatches": microbatches, "stages a rank": min(virtuals, default=0)}
    problems = [f"a schedule needs at least 1 of {what}, not {n}" for what, n in counts.items() if n < 1]
    refuse(ConfigError, problems or costs.problems(ranks))
    best: tuple[Schedule, Timeline] | None = None
    for schedule in _candidates(ranks, microbatches, costs, memory, virtuals):
        timeline = simulate(schedule, split_costs(costs, ranks, schedule.stages // ranks))
        fits = memory is None or max(timeline.peaks) <= memory * (1 + 1e-9)
        if fits and (best is None or timeline.step < best[1].step * (1 - 1e-9)):
            best = schedule, timeline
    if best is None:
        least = min(_need(placement, ranks, costs) for placement in _placements(ranks, virtuals))
        raise ConfigError(
            f"no schedule for {ranks} ranks and {microbatches} microbatches holds at most {memory:g} on every rank; "
            f"the least that works is {least}"
        )
    return validate(Schedule(best[0].rows, f"auto: {best[0].name}"))


def split_costs(costs: Costs, ranks: int, virtual: int) -> Costs:
    """Costs of all stages, if each of the parts that ``costs`` are given for is cut into ``virtual`` equal ones."""

    def cut(values: Sequence[float]) -> tuple[float, ...]:
        parts = values if len(values) > 1 else [values[0]] * ranks
        return tuple(value / virtual for value in parts for _ in range(virtual))

    compute = {op: cut(tuple(values)) for op, values in costs.compute.items()}
    return replace(costs, compute=compute, activation=cut(tuple(costs.activation)))


def _candidates(
    ranks: int, microbatches: int, costs: Costs, memory: float | None, virtuals: Sequence[int]
) -> Iterator[Schedule]:
    """Simple ones first."""
    for name in SCHEDULES:
        if name in _NEVER:
            continue
        for virtual in virtuals if name == "interleaved" else (1,):
            schedule = SCHEDULES[name](ranks, microbatches, virtual)
            if schedule.stages // ranks in virtuals:
                yield schedule
    found: list[tuple[float, int, Schedule]] = []
    for placement in _placements(ranks, virtuals):
        own = split_costs(costs, ranks, len(placement[0]))
        for policy in _policies(ranks, microbatches, len(placement[0]), costs, memory):
            schedule, end = greedy(placement, microbatches, own, policy)
            if end < float("inf"):
                found.append((end, len(found), schedule))
    for _, _, schedule in sorted(found)[:_SIMULATED]:
        yield schedule


def _placements(ranks: int, virtuals: Sequence[int]) -> Iterator[list[list[int]]]:
    for virtual in virtuals:
        yield [looped(rank, ranks, virtual) for rank in range(ranks)]
    if 2 in virtuals:
        yield [vee(rank, ranks) for rank in range(ranks)]


def _need(placement: list[list[int]], ranks: int, costs: Costs) -> float:
    """What a rank must hold at least: the largest microbatch in all of its stages."""
    own = split_costs(costs, ranks, len(placement[0]))
    return max(sum(own.held(stage) for stage in stages) for stages in placement) * max(costs.sizes, default=1.0)


def _policies(ranks: int, microbatches: int, stages: int, costs: Costs, memory: float | None) -> Iterator[Policy]:
    one = max(costs.activation) * max(costs.sizes, default=1.0)
    most = one * microbatches if memory is None else memory
    limits = [*(limit for limit in (one * ranks, 2 * one * ranks) if limit < most), most]
    for limit, deep in product(limits, (True, False) if stages > 1 else (True,)):
        yield Policy(limit, split=False, deep=deep)
        for patience in (0.0, 0.5, 1.0):
            yield Policy(limit, deep=deep, patience=patience)
