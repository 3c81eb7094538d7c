"""A timeline: what every rank did when, as simulated or as measured; the same numbers are read off both."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from parallel.pp.action import Action

__all__ = ["Span", "Timeline", "Transfer"]


class Span(NamedTuple):
    """One action of a rank, from start to end, seconds."""

    action: Action
    start: float
    end: float


class Transfer(NamedTuple):
    """One message, from when it left to when it was there, seconds; ``action`` is its receive."""

    action: Action
    source: int
    target: int
    start: float
    end: float


@dataclass(frozen=True, slots=True)
class Timeline:
    """What every rank did when.

    Attributes:
        rows: the computing actions of each rank, in order.
        transfers: messages between ranks, in no particular order.
        memory: for each rank, (time, memory held from then on) whenever it changes.
        critical: the chain of actions that decides when the step ends; empty where it is not known.
        name: of the schedule.
    """

    rows: tuple[tuple[Span, ...], ...]
    transfers: tuple[Transfer, ...] = ()
    memory: tuple[tuple[tuple[float, float], ...], ...] = ()
    critical: tuple[Action, ...] = ()
    name: str = ""

    @property
    def start(self) -> float:
        """When the first action begins."""
        return min((row[0].start for row in self.rows if row), default=0.0)

    @property
    def step(self) -> float:
        """From the first action to the end of the last, over all ranks."""
        return max((row[-1].end for row in self.rows if row), default=0.0) - self.start

    def busy(self, rank: int) -> float:
        """Time in which a rank computes."""
        return sum(span.end - span.start for span in self.rows[rank])

    def idle(self, rank: int) -> float:
        """Time between a rank's first and last action in which it does not compute."""
        row = self.rows[rank]
        return row[-1].end - row[0].start - self.busy(rank) if row else 0.0

    @property
    def bubble(self) -> float:
        """The longest idle time of a rank between its own first and last action: what the papers call the bubble."""
        return max((self.idle(rank) for rank in range(len(self.rows))), default=0.0)

    @property
    def bubble_fraction(self) -> float:
        """The share of the step, over all ranks, in which nothing is computed."""
        total = self.step * len(self.rows)
        return 1 - sum(self.busy(rank) for rank in range(len(self.rows))) / total if total else 0.0

    def peak(self, rank: int) -> float:
        """The most memory that a rank holds for backward at any time."""
        return max((held for _, held in self.memory[rank]), default=0.0) if self.memory else 0.0

    @property
    def peaks(self) -> tuple[float, ...]:
        """:meth:`peak` of every rank."""
        return tuple(self.peak(rank) for rank in range(len(self.rows)))
