"""Lowering: the sends and receives that a schedule implies, written into it."""

from __future__ import annotations

from parallel.pp.action import KINDS, TRANSFERS, Action
from parallel.pp.schedule import Schedule

__all__ = ["lower"]

_Links = dict[tuple[int, int], list[tuple[Action, int]]]
"""(from, to) -> the receives of the messages in the order of the sends, each with the cell that uses it."""


def lower(schedule: Schedule, ahead: int = 2) -> Schedule:
    """The schedule with sends and receives.

    A send stands right behind the action that made the value. A receive is posted ``ahead`` actions before the value
    is used; earlier where another message of the same link, which is needed sooner, was sent after it: on each link,
    receives are posted in the order of the sends, which is what NCCL asks for.

    Args:
        schedule: valid, without sends and receives.
        ahead: actions between the posting of a receive and its use; each may cost a buffer.
    """
    if schedule.lowered:
        return schedule
    rows, links = _with_sends(schedule)
    posts = _posts(links, ahead)
    lowered = []
    for rank, row in enumerate(rows):
        receives, line = posts.get(rank, {}), list[Action]()
        for cell, actions in enumerate(row):
            line += receives.get(cell, ())
            line += actions
        lowered.append(tuple(line))
    return Schedule(tuple(lowered), schedule.name)


def _with_sends(schedule: Schedule) -> tuple[list[list[list[Action]]], _Links]:
    """Each cell's action with the sends behind it, and what is sent over every link."""
    where, stages = schedule.where, schedule.stages
    takes = {op: [TRANSFERS[v.name][1] for v in kind.takes if v.name in TRANSFERS] for op, kind in KINDS.items()}
    gives = {
        op: [(v.offset, *TRANSFERS[v.name]) for v in kind.gives if v.name in TRANSFERS] for op, kind in KINDS.items()
    }
    used: dict[tuple[int, str, int], int] = {}
    for row in schedule.rows:
        for cell, (stage, op, microbatch) in enumerate(row):
            for receive in takes[op]:
                used[stage, receive, microbatch] = cell
    links: _Links = {}
    rows: list[list[list[Action]]] = []
    for rank, row in enumerate(schedule.rows):
        cells: list[list[Action]] = []
        for action in row:
            stage, op, microbatch = action
            cell = [action]
            for offset, send, receive in gives[op]:
                target = stage + offset
                if 0 <= target < stages and (peer := where[target][microbatch]) != rank:
                    cell.append(Action(stage, send, microbatch))
                    message = Action(target, receive, microbatch)
                    links.setdefault((rank, peer), []).append((message, used[message]))
            cells.append(cell)
        rows.append(cells)
    return rows, links


def _posts(links: _Links, ahead: int) -> dict[int, dict[int, list[Action]]]:
    """Rank -> cell -> the receives to post before it."""
    posts: dict[int, dict[int, list[Action]]] = {}
    for (_, rank), messages in links.items():
        latest, at = len(messages) and messages[-1][1], list[tuple[Action, int]]()
        for message, used in reversed(messages):
            latest = min(latest, used)
            at.append((message, max(0, latest - ahead)))
        cells = posts.setdefault(rank, {})
        for message, cell in reversed(at):
            cells.setdefault(cell, []).append(message)
    return posts
