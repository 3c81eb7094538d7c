"""The options of a pipeline."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from parallel.config import option
from parallel.errors import Refusal
from parallel.pp.partition import Cut, partition
from parallel.pp.schedule import Schedule
from parallel.pp.schedules import make_schedule

__all__ = ["PipelineConfig"]


@dataclass(frozen=True, slots=True, kw_only=True)
class PipelineConfig:
    """Which schedule, and which layers on which stage."""

    schedule: str = option("1f1b", "name of a schedule, or a file with one (.txt)")
    virtual: int = option(1, "stages a rank, where the schedule leaves that open (interleaved)")
    layers: tuple[int, ...] = option((), "layers of each stage, by hand: 3,5")
    balance: Literal["even", "measured"] = option("even", "of stages not cut by hand: as many layers, or as much time")
    timeout_s: float = option(600.0, "longest wait for another stage, seconds")

    def problems(self) -> Iterator[str]:
        """Why such a pipeline cannot be."""
        if self.virtual < 1:
            yield f"virtual = {self.virtual}: must be at least 1"
        if self.timeout_s <= 0:
            yield f"timeout_s = {self.timeout_s}: must be positive"

    def table(self, ranks: int, microbatches: int) -> Schedule:
        """The schedule of a step.

        Raises:
            ConfigError, ScheduleError: as :func:`~parallel.pp.schedules.make_schedule`.
        """
        if ranks == 1:
            return make_schedule("1f1b", 1, microbatches)
        return make_schedule(self.schedule, ranks, microbatches, self.virtual)

    def cuts(self, layers: int, stages: int, ends: tuple[float, float] = (0.0, 0.0)) -> tuple[Cut, ...]:
        """The stages of a model; ``ends`` as for :func:`~parallel.pp.partition.partition`.

        Raises:
            ConfigError: too few layers, or ``layers`` does not add up.
        """
        return partition(layers, stages, self.layers if stages > 1 else (), ends=ends)

    def misfits(self, layers: int, ranks: int, microbatches: int) -> Iterator[str]:
        """Why this pipeline cannot be on so many ranks, with so many microbatches and layers."""
        try:
            self.cuts(layers, self.table(ranks, microbatches).stages)
        except Refusal as refusal:
            yield from refusal.problems
