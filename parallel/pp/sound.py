"""Whether a schedule is valid, and nothing else: quick, for tables of half a million actions.

:mod:`parallel.pp.validate` asks here first, and searches for the cell at fault where the answer is no. An action is a
number, stage times microbatches plus microbatch, in a list for its kind, which holds its cell; what one rank waits for
is a cell of another.
"""

from __future__ import annotations

from parallel.pp.action import KINDS, TRANSFERS, Kind
from parallel.pp.schedule import Schedule

__all__ = ["is_sound"]

_Waits = list[list[tuple[int, int, int]]]
"""Rank -> (cell, other rank, the cell of that rank that must be done before it)."""


def is_sound(schedule: Schedule) -> bool:
    """Whether every action is there once, where its forward pass is, after what it needs; and no rank waits for ever.

    False also for what this cannot judge: a kind that gives a value to another stage than the kinds that give it now.
    """
    known = all(action[1] in KINDS and action[0] >= 0 and action[2] >= 0 for row in schedule.rows for action in row)
    if not known or not schedule.stages:
        return False
    return _Table(schedule).is_sound()


class _Table:
    """The cells of all actions, by kind."""

    def __init__(self, schedule: Schedule) -> None:
        self.schedule, self.stages, self.microbatches = schedule, schedule.stages, schedule.microbatches
        self.size = self.stages * self.microbatches
        self.home = [rank for ranks in schedule.where for rank in ranks]
        self.cells: dict[str, list[int]] = {}
        self.sends: dict[tuple[int, int], list[tuple[int, int]]] = {}
        self.waits: _Waits = [[] for _ in schedule.rows]

    def is_sound(self) -> bool:
        if not self._read() or not self._complete() or not self._guards():
            return False
        for op in self.cells:
            for value in KINDS[op].takes:
                if KINDS[op].stream == "compute" and not self._needs(op, value.name, value.offset):
                    return False
        return self._nothing_else_sent() and self._in_order() and self._ends()

    def _read(self) -> bool:
        """Note every cell; False if one is doubled or away from its forward pass."""
        home, microbatches, cells = self.home, self.microbatches, self.cells
        for row in self.schedule.rows:
            for op in {action[1] for action in row}:
                cells.setdefault(op, [-1] * self.size)
        for rank, row in enumerate(self.schedule.rows):
            for cell, (stage, op, microbatch) in enumerate(row):
                number, column = stage * microbatches + microbatch, cells[op]
                if column[number] >= 0 or home[number] != rank:
                    return False
                column[number] = cell
        return -1 not in home

    def _complete(self) -> bool:
        """Whether what must exist does, and only once."""
        required = ("saved", "gradient") if self.schedule.trains else ("saved",)
        if any(-1 in (self._made(name)[0] or [-1]) for name in required):
            return False
        kept, used = self._made("kept")[0], self.cells.get("W", [-1] * self.size)
        return kept is not None and all((a < 0) == (b < 0) for a, b in zip(kept, used, strict=True))

    def _made(self, name: str) -> tuple[list[int] | None, int]:
        """The cells in which a value is made, and the offset of the stage it is for; None if made twice, or unclear."""
        found: list[int] | None = None
        offsets = {v.offset for kind in self._computing() for v in kind.gives if v.name == name}
        if len(offsets) > 1:
            return None, 0
        for kind in self._computing():
            if any(value.name == name for value in kind.gives):
                column = self.cells[kind.code]
                if found is None:
                    found = column
                elif any(a >= 0 and b >= 0 for a, b in zip(found, column, strict=True)):
                    return None, 0
                else:
                    found = [max(pair) for pair in zip(found, column, strict=True)]
        return found or [-1] * self.size, offsets.pop() if offsets else 0

    def _computing(self) -> list[Kind]:
        return [KINDS[op] for op in self.cells if KINDS[op].stream == "compute"]

    def _guards(self) -> bool:
        """Whether every action comes after those that its kind must follow."""
        for op, column in self.cells.items():
            for later in KINDS[op].needed_by:
                pairs = zip(column, self.cells.get(later, ()), strict=False)
                if any(after >= 0 and cell > after for cell, after in pairs):
                    return False
        return True

    def _needs(self, op: str, name: str, offset: int) -> bool:
        """Whether all actions of a kind come after what they take, as far as their own rank goes; note the rest."""
        made, given = self._made(name)
        if made is None:
            return False
        column, shift = self.cells[op], (offset - given) * self.microbatches
        if not shift:
            return all(cell < 0 or 0 <= maker < cell for cell, maker in zip(column, made, strict=True))
        home, lowered = self.home, self.schedule.lowered
        send, receive = (self.cells.get(code, [-1] * self.size) for code in TRANSFERS[name])
        for number in range(max(0, -shift), min(self.size, self.size - shift)):
            cell, other = column[number], number + shift
            if cell < 0:
                continue
            maker, rank, peer = made[other], home[number], home[other]
            if maker < 0:
                return False
            if rank == peer:
                if maker >= cell:
                    return False
            elif lowered:
                sent, posted = send[other], receive[number]
                if sent <= maker or not 0 <= posted < cell:
                    return False
                self.waits[rank].append((cell, peer, sent))
                self.sends.setdefault((peer, rank), []).append((sent, posted))
            else:
                self.waits[rank].append((cell, peer, maker))
        return True

    def _nothing_else_sent(self) -> bool:
        """Whether there are only the sends and receives that were asked for."""
        count = sum(map(len, self.sends.values()))
        for stream in ("send", "receive"):
            columns = [column for op, column in self.cells.items() if KINDS[op].stream == stream]
            if sum(self.size - column.count(-1) for column in columns) != count:
                return False
        return True

    def _in_order(self) -> bool:
        """Whether receives are posted in the order of the sends of their link."""
        for messages in self.sends.values():
            posted = [receive for _, receive in sorted(messages)]
            if posted != sorted(posted):
                return False
        return True

    def _ends(self) -> bool:
        """Whether every rank comes to the end of its row."""
        waits, sizes = self.waits, [len(row) for row in self.schedule.rows]
        for own in waits:
            own.sort(reverse=True)
        at = [0] * len(sizes)
        asleep: list[list[tuple[int, int]]] = [[] for _ in sizes]
        ready = list(range(len(sizes)))
        while ready:
            rank = ready.pop()
            own = waits[rank]
            while own and at[own[-1][1]] > own[-1][2]:
                own.pop()
            if own:
                at[rank], peer, needed = own[-1]
                asleep[peer].append((needed, rank))
            else:
                at[rank] = sizes[rank]
            if asleep[rank]:
                ready += [other for needed, other in asleep[rank] if needed < at[rank]]
                asleep[rank] = [pair for pair in asleep[rank] if pair[0] >= at[rank]]
        return at == sizes
