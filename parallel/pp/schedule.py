"""A schedule: for each rank a row of actions. Data that is printed, read, lowered, validated, simulated, drawn, run.

The text form has one line a rank, actions separated by blanks; ``.`` stands for an idle cell and ``#`` begins a
comment. It says everything: a stage is where its actions are.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from parallel.errors import ScheduleError, refuse
from parallel.pp.action import KINDS, Action, parse_action

__all__ = ["Schedule", "grid_around", "parse_schedule"]

Row = tuple[Action, ...]


@dataclass(frozen=True)
class Schedule:
    """Rows of actions, one a rank, each in the order in which the rank carries them out.

    Attributes:
        rows: of the ranks.
        name: for people.
    """

    rows: tuple[Row, ...]
    name: str = ""

    @property
    def ranks(self) -> int:
        """How many ranks take part."""
        return len(self.rows)

    @cached_property
    def stages(self) -> int:
        """How many stages the model is cut into."""
        return 1 + max((action[0] for row in self.rows for action in row), default=-1)

    @cached_property
    def microbatches(self) -> int:
        """How many microbatches a step has."""
        return 1 + max((action[2] for row in self.rows for action in row), default=-1)

    @cached_property
    def lowered(self) -> bool:
        """Whether sends and receives are in the table."""
        return any(KINDS[action[1]].stream != "compute" for row in self.rows for action in row)

    @cached_property
    def trains(self) -> bool:
        """Whether there is a backward pass."""
        ops = {action[1] for row in self.rows for action in row}
        return any(value.name == "gradient" for op in ops for value in KINDS[op].gives)

    @cached_property
    def where(self) -> list[list[int]]:
        """``where[stage][microbatch]``: the rank that takes this microbatch through the stage, -1 if none does."""
        table = [[-1] * self.microbatches for _ in range(self.stages)]
        for rank, row in enumerate(self.rows):
            for stage, op, microbatch in row:
                if op == "F":
                    table[stage][microbatch] = rank
        return table

    def holders(self, stage: int) -> list[int]:
        """The ranks that hold a stage: one, or several where microbatches take different ways."""
        return sorted({rank for rank in self.where[stage] if rank >= 0})

    def stages_of(self, rank: int) -> list[int]:
        """The stages that a rank holds, in order."""
        return [stage for stage in range(self.stages) if rank in self.where[stage]]

    def __str__(self) -> str:
        cells = [[str(action) for action in row] for row in self.rows]
        width = max((len(cell) for row in cells for cell in row), default=1)
        return "\n".join(" ".join(cell.ljust(width) for cell in row).rstrip() for row in cells)


def parse_schedule(text: str, name: str = "") -> Schedule:
    """The schedule that prints as ``text``.

    Raises:
        ScheduleError: every cell that is not an action, by line and cell.
    """
    rows: list[Row] = []
    problems: list[str] = []
    for number, line in enumerate(text.splitlines(), start=1):
        words = line.partition("#")[0].replace(",", " ").split()
        if not words:
            continue
        row: list[Action] = []
        for cell, word in enumerate(words, start=1):
            try:
                if word != ".":
                    row.append(parse_action(word))
            except ScheduleError as error:
                problems += [f"line {number}, cell {cell}: {problem}" for problem in error.problems]
        rows.append(tuple(row))
    if not rows and not problems:
        problems.append("no row of actions in it")
    refuse(ScheduleError, problems)
    return Schedule(tuple(rows), name)


def grid_around(schedule: Schedule, rank: int, cell: int, rows: int = 2, cells: int = 4) -> str:
    """The part of the table around one cell, which is marked; rows and cells are counted from 0."""
    shown = range(max(0, rank - rows), min(schedule.ranks, rank + rows + 1))
    first, end = max(0, cell - cells), cell + cells + 1
    texts = {r: [str(action) for action in schedule.rows[r][first:end]] for r in shown}
    if rank in texts and 0 <= cell - first < len(texts[rank]):
        texts[rank][cell - first] = f"[{texts[rank][cell - first]}]"
    width = max((len(text) for row in texts.values() for text in row), default=1)
    lines = []
    for r, row in texts.items():
        before, after = "... " if first else "", " ..." if len(schedule.rows[r]) > end else ""
        lines.append(f"rank {r}: {before}{' '.join(text.ljust(width) for text in row).rstrip()}{after}")
    return "\n".join(lines)
