"""The options of a pipeline."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal

from parallel.config import option
from parallel.errors import ConfigError, Refusal
from parallel.pp.partition import Cut, partition
from parallel.pp.schedule import Schedule
from parallel.pp.schedules import make_schedule
from parallel.pp.schedules.auto import search
from parallel.pp.simulate import parse_costs

__all__ = ["PipelineConfig"]


@dataclass(frozen=True, slots=True, kw_only=True)
class PipelineConfig:
    """Which schedule, and which layers on which stage."""

    schedule: str = option("1f1b", "name of a schedule, or a file with one (.txt)")
    virtual: int = option(1, "stages a rank, where the schedule leaves that open (interleaved)")
    layers: tuple[int, ...] = option((), "layers of each stage, by hand: 3,5")
    balance: Literal["even", "measured"] = option("even", "of stages not cut by hand: as many layers, or as much time")
    costs: str = option("", "of a rank's share, for auto: F=1,I=1,W=1,latency=0.2; one for each rank: F=1:1:2:1")
    memory: float = option(0.0, "most activations of a rank's share that a rank may hold, for auto (0: as 1f1b)")
    timeout_s: float = option(600.0, "longest wait for another stage, seconds")

    def problems(self) -> Iterator[str]:
        """Why such a pipeline cannot be."""
        if self.virtual < 1:
            yield f"virtual = {self.virtual}: must be at least 1"
        if self.memory < 0:
            yield f"memory = {self.memory}: must not be negative"
        if (self.costs or self.memory) and self.schedule != "auto":
            yield f"costs and memory are for schedule = 'auto', not {self.schedule!r}"
        try:
            parse_costs(self.costs)
        except ConfigError as error:
            yield from (f"costs: {problem}" for problem in error.problems)
        if self.timeout_s <= 0:
            yield f"timeout_s = {self.timeout_s}: must be positive"

    def table(self, ranks: int, microbatches: int, layers: int) -> Schedule:
        """The schedule of a training step.

        Args:
            ranks: of the pipeline.
            microbatches: of the step.
            layers: of the model; ``auto`` makes no more stages.

        Raises:
            ConfigError, ScheduleError: as :func:`~parallel.pp.schedules.make_schedule`; it does not train.
        """
        if ranks == 1:
            return make_schedule("1f1b", 1, microbatches)
        if self.schedule != "auto":
            table = make_schedule(self.schedule, ranks, microbatches, self.virtual)
            if not table.trains:
                raise ConfigError(f"schedule {self.schedule!r} has no backward pass; the nearest that trains is 1f1b")
            return table
        virtuals = (1, 2) if self.virtual == 1 and layers >= 2 * ranks else (self.virtual,)
        costs = replace(parse_costs(self.costs), kept=1.0)
        return search(ranks, microbatches, costs, self.memory or min(ranks, microbatches), virtuals=virtuals)

    def cuts(self, layers: int, stages: int, ends: tuple[float, float] = (0.0, 0.0)) -> tuple[Cut, ...]:
        """The stages of a model; ``ends`` as for :func:`~parallel.pp.partition.partition`.

        Raises:
            ConfigError: too few layers, or ``layers`` does not add up.
        """
        return partition(layers, stages, self.layers if stages > 1 else (), ends=ends)

    def misfits(self, layers: int, ranks: int, microbatches: int) -> Iterator[str]:
        """Why this pipeline cannot be on so many ranks, with so many microbatches and layers."""
        try:
            self.cuts(layers, self.table(ranks, microbatches, layers).stages)
        except Refusal as refusal:
            yield from refusal.problems
