"""Lowering: the sends and receives that a schedule implies, written into it."""

from __future__ import annotations

from parallel.pp.action import KINDS, TRANSFERS, Action
from parallel.pp.schedule import Row, Schedule

__all__ = ["lower"]

_Links = dict[tuple[int, int], list[tuple[Action, int]]]
"""(from, to) -> the receives of the messages in the order of the sends, each with the cell that uses it."""

_Line = tuple[list[Action], list[int]]
"""A row with sends, and where each cell of the row without them begins in it."""


def lower(schedule: Schedule, ahead: int = 2, *, paired: bool = False) -> Schedule:
    """The schedule with sends and receives.

    A send stands right behind the action that made the value. A receive is posted ``ahead`` actions before the value
    is used; earlier where another message of the same link, which is needed sooner, was sent after it: on each link,
    receives are posted in the order of the sends, which is what NCCL asks for.

    Args:
        schedule: valid, without sends and receives.
        ahead: actions between the posting of a receive and its use; each may cost a buffer.
        paired: F and a B of another microbatch right behind it are one piece of work, as DualPipe has it: what F made
            is sent when both are done. Of the schedules here only the two of DualPipe allow for that, and only from two
            microbatches a stage on.
    """
    if schedule.lowered:
        return schedule
    lines, links = _with_sends(schedule, paired)
    posts = _posts(links, ahead)
    lowered = []
    for rank, (line, starts) in enumerate(lines):
        whole, done = list[Action](), 0
        for cell, receives in sorted(posts.get(rank, {}).items()):
            whole += line[done : starts[cell]]
            whole += receives
            done = starts[cell]
        lowered.append(tuple(whole + line[done:]))
    return Schedule(tuple(lowered), schedule.name)


def _with_sends(schedule: Schedule, paired: bool) -> tuple[list[_Line], _Links]:
    """Each row with its sends, and what is sent over every link."""
    where, stages = schedule.where, schedule.stages
    gives = {
        op: [(v.offset, *TRANSFERS[v.name]) for v in kind.gives if v.name in TRANSFERS] for op, kind in KINDS.items()
    }
    used = _used(schedule)
    links: _Links = {}
    lines: list[_Line] = []
    action = tuple.__new__
    for rank, row in enumerate(schedule.rows):
        line: list[Action] = []
        starts: list[int] = []
        held: list[Action] = []
        for cell, current in enumerate(row):
            starts.append(len(line))
            line.append(current)
            stage, op, microbatch = current
            for offset, send, receive in gives[op]:
                target = stage + offset
                if 0 <= target < stages and (peer := where[target][microbatch]) != rank:
                    held.append(action(Action, (stage, send, microbatch)))
                    message = action(Action, (target, receive, microbatch))
                    if (rank, peer) not in links:
                        links[rank, peer] = []
                    links[rank, peer].append((message, used[receive][target][microbatch]))
            if held and not (paired and _opens_pair(row, cell)):
                line += held
                held = []
        lines.append((line, starts))
    return lines, links


def _opens_pair(row: Row, cell: int) -> bool:
    if row[cell].op != "F" or cell + 1 == len(row):
        return False
    return row[cell + 1].op == "B" and row[cell + 1].microbatch != row[cell].microbatch


def _used(schedule: Schedule) -> dict[str, list[list[int]]]:
    """Kind of receive -> stage -> microbatch -> the cell that uses what is received."""
    stages, microbatches = schedule.stages, schedule.microbatches
    used = {receive: [[0] * microbatches for _ in range(stages)] for _, receive in TRANSFERS.values()}
    takes = {op: [used[TRANSFERS[v.name][1]] for v in kind.takes if v.name in TRANSFERS] for op, kind in KINDS.items()}
    for row in schedule.rows:
        for cell, (stage, op, microbatch) in enumerate(row):
            for table in takes[op]:
                table[stage][microbatch] = cell
    return used


def _posts(links: _Links, ahead: int) -> dict[int, dict[int, list[Action]]]:
    """Rank -> cell -> the receives to post before it."""
    posts: dict[int, dict[int, list[Action]]] = {}
    for (_, rank), messages in links.items():
        latest, at = messages[-1][1], list[tuple[Action, int]]()
        for message, used in reversed(messages):
            latest = min(latest, used)
            at.append((message, max(0, latest - ahead)))
        cells = posts.setdefault(rank, {})
        for message, cell in reversed(at):
            if cell in cells:
                cells[cell].append(message)
            else:
                cells[cell] = [message]
    return posts
