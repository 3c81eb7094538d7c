"""Schedules made by repeating a building block (arXiv 2405.15362, sections 3 and 4): one microbatch, every six slots.

A slot is the time of one F, I or W of a stage; the two stages of a rank form a V. What a block holds for how long
decides the memory of the whole schedule. Repeated as it is, the block leaves gaps at the beginning and at the end of
the step, where fewer microbatches are under way than in between. These are closed in two passes over the actions in the
order of their slots; neither lets a rank hold more than the limit.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

from parallel.pp.action import Action
from parallel.pp.schedule import Schedule
from parallel.pp.schedules.line import alone, vee

__all__ = ["Block", "repeat"]

Block = tuple[int, int, int, int]
"""Slots in which a rank takes microbatch 0: F of its first stage, F of its second, I of its second, I of its first."""

_PERIOD = 6
_Key = tuple[str, int, int]
_Cells = dict[int, _Key]
"""What a rank does in which slot: kind, stage, microbatch."""


def repeat(name: str, blocks: Sequence[Block], microbatches: int, limit: int) -> Schedule:
    """The schedule that repeats a block for every microbatch.

    Args:
        name: of the schedule.
        blocks: slots of the ranks; different modulo six on each rank.
        microbatches: of a step.
        limit: activations of a stage that a rank may hold, from F to W.
    """
    ranks = len(blocks)
    if ranks == 1:
        return Schedule((alone(2, microbatches),), name)
    rows = [_filled(_unrolled(block, vee(rank, ranks), microbatches)) for rank, block in enumerate(blocks)]
    rows = [_filled(cells) for cells in _end_first(_advanced(rows, limit))]
    return Schedule(
        tuple(tuple(Action(stage, op, microbatch) for op, stage, microbatch in cells.values()) for cells in rows), name
    )


def _unrolled(block: Block, stages: list[int], microbatches: int) -> _Cells:
    first, second = stages
    ways = zip(block, (("F", first), ("F", second), ("I", second), ("I", first)), strict=True)
    cells = {
        slot + _PERIOD * microbatch: (op, stage, microbatch)
        for slot, (op, stage) in ways
        for microbatch in range(microbatches)
    }
    return dict(sorted(cells.items()))


def _filled(cells: _Cells) -> _Cells:
    """Each W in the first free slot after its I, the oldest first."""
    filled: _Cells = {}
    owed: deque[_Key] = deque()
    slot, end = min(cells), max(cells)
    while slot <= end or owed:
        if slot in cells:
            filled[slot] = op, stage, microbatch = cells[slot]
            if op == "I":
                owed.append(("W", stage, microbatch))
        elif owed:
            filled[slot] = owed.popleft()
        slot += 1
    return filled


class _Slots:
    """Slots of all actions, while they are moved one after the other."""

    def __init__(self, rows: Sequence[_Cells]) -> None:
        self.last = 2 * len(rows) - 1
        self.taken = [set(cells) for cells in rows]
        self.slot: dict[_Key, int] = {}
        self.order = sorted((slot, rank, key) for rank, cells in enumerate(rows) for slot, key in cells.items())

    def earliest(self, key: _Key) -> int:
        """The slot behind everything that an action needs, and behind the same of the microbatch before."""
        op, stage, microbatch = key
        if op == "F":
            need = self.slot["F", stage - 1, microbatch] if stage else -1
        elif op == "W":
            need = self.slot["I", stage, microbatch]
        else:
            need = self.slot[("I", stage + 1, microbatch) if stage < self.last else ("F", stage, microbatch)]
        return 1 + max(need, self.slot[op, stage, microbatch - 1] if microbatch else -1)

    def place(self, rank: int, key: _Key, low: int, slot: int) -> int:
        """Put an action into the first free slot from ``low`` on; where it is, if there is none."""
        taken = self.taken[rank]
        new = low
        while new < slot and new in taken:
            new += 1
        if new < slot:
            taken.discard(slot)
            taken.add(new)
        else:
            new = slot
        self.slot[key] = new
        return new


def _advanced(rows: Sequence[_Cells], limit: int) -> list[_Cells]:
    """Every action as early as it can be in a free slot, with no more memory than the limit."""
    slots = _Slots(rows)
    held = [_held(cells) for cells in rows]
    moved: list[_Cells] = [{} for _ in rows]
    for slot, rank, key in slots.order:
        low, memory = slots.earliest(key), held[rank]
        if key[0] == "F":
            start = slot
            while start > low and memory[start - 1] < limit:
                start -= 1
            low = start
        new = slots.place(rank, key, low, slot)
        moved[rank][new] = key
        if key[0] == "F":
            for at in range(new, slot):
                memory[at] += 1
        elif key[0] == "W":
            for at in range(new + 1, slot + 1):
                memory[at] -= 1
    return moved


def _held(cells: _Cells) -> list[int]:
    """Activations held in every slot."""
    held, table = 0, list[int]()
    for slot in range(max(cells) + 1):
        op = cells[slot][0] if slot in cells else ""
        held += op == "F"
        table.append(held)
        held -= op == "W"
    return table


def _end_first(rows: Sequence[_Cells]) -> list[_Cells]:
    """Every I before the W in its way, once its rank has no F left that could want their memory; without W."""
    rows = [{slot: key for slot, key in cells.items() if key[0] != "W"} for cells in rows]
    slots = _Slots(rows)
    no_more = [max(slot for slot, key in cells.items() if key[0] == "F") for cells in rows]
    moved: list[_Cells] = [{} for _ in rows]
    for slot, rank, key in slots.order:
        low = max(slots.earliest(key), no_more[rank]) if key[0] == "I" else slot
        moved[rank][slots.place(rank, key, low, slot)] = key
    return moved
