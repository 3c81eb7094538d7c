"""What the tables written by hand share: a row built from a few words, placements, and refusals."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

from parallel.errors import ConfigError
from parallel.pp.action import Action
from parallel.pp.schedule import Row

__all__ = ["Lane", "Line", "alone", "fixed_stages", "looped", "vee"]


_WAY = {"F": "F", "B": "B", "I": "B"}


@dataclass(frozen=True, slots=True)
class Lane:
    """A stage of a rank, and the microbatches that the rank takes through it.

    Attributes:
        stage: of the model.
        first: number of the first microbatch.
        count: of the microbatches.
    """

    stage: int
    first: int
    count: int


class Line:
    """A row that is written from left to right.

    Words name a kind and a lane, ``F0``: that action on the next microbatch of the lane. ``W`` without a lane takes the
    oldest microbatch that was kept for it. A table may be longer than there are microbatches: what goes beyond them
    leaves no trace, and as microbatches do not depend on one another, the rest is as valid as the whole.
    """

    def __init__(self, *lanes: Lane) -> None:
        self._lanes = lanes
        self._next: dict[str, int] = {}
        self._kept: deque[tuple[int, int]] = deque()
        self._row: list[Action] = []

    def add(self, words: str, times: int = 1) -> Line:
        """Write ``words`` so many times; not at all if ``times`` is below 1."""
        for _ in range(times):
            for word in words.split():
                self._write(word)
        return self

    def _write(self, word: str) -> None:
        op, at = word[0], word[1:]
        if op == "W":
            if not self._kept:
                return
            lane, microbatch = self._kept.popleft()
        else:
            way = _WAY[op] + at
            lane, microbatch = int(at), self._next.get(way, 0)
            self._next[way] = microbatch + 1
            if op == "I":
                self._kept.append((lane, microbatch))
        where = self._lanes[lane]
        if microbatch < where.count:
            self._row.append(Action(where.stage, op, where.first + microbatch))

    def forwards(self, lane: int) -> int:
        """How many F were written on a lane, also beyond its microbatches."""
        return self._next.get(f"F{lane}", 0)

    def row(self) -> Row:
        """The row, with every W that is still owed at its end."""
        self.add("W", len(self._kept))
        return tuple(self._row)


def alone(stages: int, microbatches: int) -> Row:
    """The row of a rank that has all stages to itself: one microbatch after the other."""
    way = [(stage, "F") for stage in range(stages)] + [(stage, "B") for stage in reversed(range(stages))]
    return tuple(Action(stage, op, microbatch) for microbatch in range(microbatches) for stage, op in way)


def looped(rank: int, ranks: int, virtual: int) -> list[int]:
    """Stages of a rank when the pipeline runs through all ranks ``virtual`` times, always in the same direction."""
    return list(range(rank, ranks * virtual, ranks))


def vee(rank: int, ranks: int) -> list[int]:
    """The two stages of a rank when the pipeline runs through all ranks and back."""
    return [rank, 2 * ranks - 1 - rank]


def fixed_stages(name: str, virtual: int, own: int = 1) -> None:
    """Refuse a number of stages a rank that is not the schedule's own; 1 stands for it.

    Raises:
        ConfigError: naming the number that works.
    """
    if virtual not in (1, own):
        raise ConfigError(
            f"schedule {name} has {own} stage{'s' * (own > 1)} a rank, not {virtual}: give {own}; "
            f"interleaved takes any number"
        )
