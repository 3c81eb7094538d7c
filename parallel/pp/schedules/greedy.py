"""A list scheduler: every rank does, whenever it is free, the most urgent action that is ready."""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

from parallel.pp.action import Action
from parallel.pp.schedule import Schedule
from parallel.pp.simulate import Costs

__all__ = ["Policy", "greedy"]


@dataclass(frozen=True, slots=True)
class Policy:
    """What a rank prefers. Backward goes before forward, and W fills the time in which neither can be done.

    Attributes:
        limit: memory that a rank may hold.
        split: I and W instead of B.
        deep: of several F, the one of the last stage first; else microbatches go through a stage in groups.
        patience: the share of the time of a W for which a rank would rather wait for an I than begin the W.
    """

    limit: float
    split: bool = True
    deep: bool = True
    patience: float = 0.0


def greedy(stages: Sequence[Sequence[int]], microbatches: int, costs: Costs, policy: Policy) -> tuple[Schedule, float]:
    """The schedule that the policy leads to, and when it would end if links were never busy.

    Args:
        stages: of each rank.
        microbatches: of a step.
        costs: for every stage.
        policy: of all ranks.

    Returns:
        An incomplete schedule and infinity, if the limit lets nobody go on.
    """
    return _Play(stages, microbatches, costs, policy).run()


class _Play:
    """Ranks, what is on its way to them, and the clock."""

    def __init__(self, stages: Sequence[Sequence[int]], microbatches: int, costs: Costs, policy: Policy) -> None:
        self.stages, self.microbatches, self.costs, self.policy = stages, microbatches, costs, policy
        self.home = {stage: rank for rank, own in enumerate(stages) for stage in own}
        count = len(self.home)
        self.last = count - 1
        self.forward: list[deque[float]] = [deque() for _ in range(count)]
        self.backward: list[deque[float]] = [deque() for _ in range(count)]
        self.forward[0].extend([0.0] * microbatches)
        self.done = {op: [0] * count for op in ("F", "B")}
        self.owed: list[deque[tuple[int, int]]] = [deque() for _ in stages]
        self.free, self.held = [0.0] * len(stages), [0.0] * len(stages)
        self.rows: list[list[Action]] = [[] for _ in stages]
        self.events = [(0.0, rank) for rank in range(len(stages))]

    def run(self) -> tuple[Schedule, float]:
        while self.events:
            now, rank = heapq.heappop(self.events)
            if self.free[rank] <= now and (choice := self._choose(rank, now)):
                self._begin(rank, now, *choice)
        whole = len(self.home) * self.microbatches
        ends = sum(self.done["B"]) == whole and not any(self.owed)
        schedule = Schedule(tuple(map(tuple, self.rows)), "list")
        return schedule, max(self.free) if ends else float("inf")

    def _choose(self, rank: int, now: float) -> tuple[str, int, int] | None:
        """Kind, stage and microbatch of what the rank does next; None: nothing yet."""
        done, own = self.done, self.stages[rank]
        ready = [stage for stage in own if self.backward[stage] and self.backward[stage][0] <= now]
        if ready:
            stage = min(ready, key=lambda stage: (done["B"][stage], stage))
            return "I" if self.policy.split else "B", stage, done["B"][stage]
        ready = [
            stage for stage in own if self.forward[stage] and self.forward[stage][0] <= now and self._fits(rank, stage)
        ]
        if ready:
            group = len(self.stages)
            stage = max(ready) if self.policy.deep else min(ready, key=lambda stage: (done["F"][stage] // group, stage))
            return "F", stage, done["F"][stage]
        if not self.owed[rank]:
            return None
        stage, microbatch = self.owed[rank][0]
        wait = self.policy.patience * self._time("W", stage, microbatch)
        if any(self.backward[other] and self.backward[other][0] < now + wait for other in own):
            return None
        return "W", stage, microbatch

    def _fits(self, rank: int, stage: int) -> bool:
        """Whether a forward pass leaves room for the same microbatch in the later stages of the rank."""
        rest = sum(self._memory(later, self.done["F"][stage]) for later in self.stages[rank] if later >= stage)
        return self.held[rank] + rest <= self.policy.limit * (1 + 1e-9)

    def _begin(self, rank: int, now: float, op: str, stage: int, microbatch: int) -> None:
        end = now + self._time(op, stage, microbatch)
        self.rows[rank].append(Action(stage, op, microbatch))
        self.free[rank] = end
        heapq.heappush(self.events, (end, rank))
        one, kept = self._memory(stage, microbatch), self.costs.kept
        if op == "W":
            self.owed[rank].popleft()
            self.held[rank] -= one * kept
            return
        if op == "F":
            self.forward[stage].popleft()
            self.held[rank] += one
            if stage < self.last:
                self._pass_on(self.forward, rank, stage + 1, microbatch, end)
            else:
                self._pass_on(self.backward, rank, stage, microbatch, end)
        else:
            self.backward[stage].popleft()
            self.held[rank] -= one * (1 - kept) if op == "I" else one
            if op == "I":
                self.owed[rank].append((stage, microbatch))
            if stage:
                self._pass_on(self.backward, rank, stage - 1, microbatch, end)
        self.done["F" if op == "F" else "B"][stage] += 1

    def _pass_on(self, way: list[deque[float]], rank: int, stage: int, microbatch: int, end: float) -> None:
        """Let a stage have what was made, once it is there."""
        target = self.home[stage]
        if target != rank:
            end += self.costs.transfer * self.costs.size(microbatch) + self.costs.latency
        way[stage].append(end)
        heapq.heappush(self.events, (end, target))

    def _time(self, op: str, stage: int, microbatch: int) -> float:
        return self.costs.of(op, stage) * self.costs.size(microbatch)

    def _memory(self, stage: int, microbatch: int) -> float:
        return self.costs.held(stage) * self.costs.size(microbatch)
