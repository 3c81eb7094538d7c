"""Validation: a schedule is complete, in order and free of deadlock, or the first offending cell is named."""

from __future__ import annotations

from parallel.errors import ScheduleError, nearest
from parallel.pp.action import KINDS, TRANSFERS, Action
from parallel.pp.schedule import Schedule, grid_around
from parallel.pp.sound import is_sound

__all__ = ["validate"]


def validate(schedule: Schedule) -> Schedule:
    """The schedule itself, with or without sends and receives, once it is found that it can be run.

    It is played: every action takes and gives the values of its kind, ranks go on as far as they can, messages wait
    in their link until their receive is posted.

    Raises:
        ScheduleError: the first cell that is doubled, missing, out of order or never reached, with the table around it.
    """
    if not any(schedule.rows):
        raise ScheduleError("the schedule is empty")
    if not is_sound(schedule):
        _check_kinds(schedule)
        _Whole(schedule).check()
        _Game(schedule).play()
        if schedule.lowered:
            _check_links(schedule)
    return schedule


def _check_kinds(schedule: Schedule) -> None:
    """Raise for a cell that is no action at all."""
    for rank, row in enumerate(schedule.rows):
        for cell, (stage, op, microbatch) in enumerate(row):
            if op not in KINDS:
                text = f"no kind of action {op!r}{nearest(op, KINDS)}; there are: {', '.join(KINDS)}"
                raise _fault(schedule, rank, cell, text)
            if stage < 0 or microbatch < 0:
                raise _fault(schedule, rank, cell, "stages and microbatches are counted from 0")


def _fault(schedule: Schedule, rank: int, cell: int, text: str) -> ScheduleError:
    action = schedule.rows[rank][cell]
    return ScheduleError(f"rank {rank}, cell {cell + 1}, {action}: {text}\n{grid_around(schedule, rank, cell)}")


class _Whole:
    """Whether each value is made exactly once, and used."""

    def __init__(self, schedule: Schedule) -> None:
        self.schedule = schedule
        self.made: dict[tuple[str, int, int], tuple[int, int]] = {}

    def check(self) -> None:
        """Raise for the first cell that is doubled, or the first action that is missing."""
        schedule, made = self.schedule, self.made
        gives = {op: [(v.name, v.offset) for v in kind.gives] for op, kind in KINDS.items() if kind.stream == "compute"}
        seen: set[tuple[int, str, int]] = set()
        for rank, row in enumerate(schedule.rows):
            for cell, action in enumerate(row):
                if action in seen:
                    raise _fault(schedule, rank, cell, "is in the table twice")
                seen.add(action)
                stage, op, microbatch = action
                for name, offset in gives.get(op, ()):
                    key = (name, stage + offset, microbatch)
                    if key in made:
                        r, c = made[key]
                        earlier = f"{schedule.rows[r][c]} of rank {r}, cell {c + 1}"
                        raise _fault(schedule, rank, cell, f"makes again what {earlier} makes")
                    made[key] = rank, cell
        self._missing(seen)
        self._strays()
        self._transfers(seen)
        self._takers(seen)
        self._guards()

    def _missing(self, seen: set[tuple[int, str, int]]) -> None:
        schedule, made = self.schedule, self.made
        required = ("saved", "gradient") if schedule.trains else ("saved",)
        for stage in range(schedule.stages):
            for microbatch in range(schedule.microbatches):
                for name in required:
                    if (name, stage, microbatch) not in made:
                        half = (stage, "I", microbatch) in seen
                        what = Action(stage, "F" if name == "saved" else "W" if half else "B", microbatch)
                        self._absent(what)
                if ("kept", stage, microbatch) in made and (stage, "W", microbatch) not in seen:
                    self._absent(Action(stage, "W", microbatch))

    def _transfers(self, seen: set[tuple[int, str, int]]) -> None:
        """Raise for a send or receive that has no other end."""
        where, stages = self.schedule.where, self.schedule.stages
        for rank, row in enumerate(self.schedule.rows):
            for cell, (stage, op, microbatch) in enumerate(row):
                if KINDS[op].stream == "compute":
                    continue
                peer = stage + KINDS[op].peer
                if not 0 <= peer < stages:
                    raise _fault(self.schedule, rank, cell, f"there is no stage {peer}")
                if where[peer][microbatch] == rank:
                    raise _fault(self.schedule, rank, cell, f"stage {peer} is on the same rank")
        for send, receive in TRANSFERS.values():
            step = KINDS[send].peer
            sent = {(stage + step, microbatch) for stage, op, microbatch in seen if op == send}
            received = {(stage, microbatch) for stage, op, microbatch in seen if op == receive}
            for stage, microbatch in sorted(sent ^ received):
                known = (stage, microbatch) in sent
                self._absent(Action(stage, receive, microbatch) if known else Action(stage - step, send, microbatch))

    def _takers(self, seen: set[tuple[int, str, int]]) -> None:
        """Raise for an action that takes what nobody makes, or what nobody receives for it."""
        ends = {"input": 0, "output_gradient": self.schedule.stages - 1}
        for rank, row in enumerate(self.schedule.rows):
            for stage, op, microbatch in row:
                for name, offset in KINDS[op].takes if KINDS[op].stream == "compute" else ():
                    place = stage + offset
                    if ends.get(name) == place:
                        continue
                    if (name, place, microbatch) not in self.made:
                        kind, back = next((k, v.offset) for k in KINDS.values() for v in k.gives if v.name == name)
                        self._absent(Action(place - back, kind.code, microbatch))
                    elif self.schedule.lowered and self.made[name, place, microbatch][0] != rank:
                        receive = Action(place, TRANSFERS[name][1], microbatch)
                        if receive not in seen:
                            self._absent(receive)

    def _absent(self, action: Action) -> None:
        """Raise for an action that is missing: named with the last cell of the same stage and microbatch."""
        near = [
            (rank, cell)
            for rank, row in enumerate(self.schedule.rows)
            for cell, other in enumerate(row)
            if other.stage == action.stage and other.microbatch == action.microbatch
        ]
        what = f"{KINDS[action.op].name} of microbatch {action.microbatch} through stage {action.stage}"
        text = f"{action} ({what}) is missing"
        if not near:
            holders = self.schedule.holders(action.stage)
            row = f" in the row of rank {holders[0]}" if holders else ""
            raise ScheduleError(text + row)
        rank, cell = near[-1]
        around = grid_around(self.schedule, rank, cell)
        raise ScheduleError(f"{text}; rank {rank}, cell {cell + 1} has {self.schedule.rows[rank][cell]}\n{around}")

    def _strays(self) -> None:
        """Raise for an action on another rank than the forward pass of its stage and microbatch."""
        where = self.schedule.where
        for rank, row in enumerate(self.schedule.rows):
            for cell, (stage, _, microbatch) in enumerate(row):
                if where[stage][microbatch] != rank:
                    home = where[stage][microbatch]
                    raise _fault(self.schedule, rank, cell, f"stage {stage} has microbatch {microbatch} on rank {home}")

    def _guards(self) -> None:
        """Raise for an action that comes before one that its kind must follow."""
        for rank, row in enumerate(self.schedule.rows):
            for guard in {action.op for action in row if KINDS[action.op].needed_by}:
                place = {(a.stage, a.microbatch): cell for cell, a in enumerate(row) if a.op == guard}
                for cell, action in enumerate(row):
                    late = place.get((action.stage, action.microbatch), cell)
                    if action.op in KINDS[guard].needed_by and late > cell:
                        raise _fault(self.schedule, rank, cell, f"comes before {row[late]} (cell {late + 1})")


class _Game:
    """Ranks take and give values until nobody can go on."""

    def __init__(self, schedule: Schedule) -> None:
        self.schedule = schedule
        self.stages, self.microbatches = schedule.stages, schedule.microbatches
        self.there: set[int] = set()
        self.outbox: set[int] = set()
        self.posted: set[int] = set()
        self.at = [0] * schedule.ranks
        names = sorted({value.name for kind in KINDS.values() for value in (*kind.takes, *kind.gives)})
        self.base = {name: index * self.stages * self.microbatches for index, name in enumerate(names)}
        self.made: set[int] = set()
        self.takes = self._bases("takes", {"input": 0, "output_gradient": self.stages - 1})
        self.gives = self._bases("gives", {})

    def _bases(self, what: str, outside: dict[str, int]) -> dict[str, list[list[tuple[int, int]]]]:
        """Kind -> stage -> (number of the value for microbatch 0, its stage), without what has no place."""
        table: dict[str, list[list[tuple[int, int]]]] = {}
        for op, kind in KINDS.items():
            table[op] = [
                [
                    (self.base[value.name] + (stage + value.offset) * self.microbatches, stage + value.offset)
                    for value in getattr(kind, what)
                    if 0 <= stage + value.offset < self.stages and outside.get(value.name) != stage + value.offset
                ]
                for stage in range(self.stages)
            ]
        return table

    def play(self) -> None:
        """Raise if a rank cannot come to the end of its row."""
        waiting: dict[int, int] = {}
        ready = list(range(self.schedule.ranks))
        while ready:
            rank = ready.pop()
            key = self._advance(rank, waiting, ready)
            if key >= 0:
                waiting[key] = rank
        for rank, row in enumerate(self.schedule.rows):
            if self.at[rank] < len(row):
                raise self._stuck()

    def _advance(self, rank: int, waiting: dict[int, int], ready: list[int]) -> int:
        """Let a rank go on; the value that it waits for, or -1 at the end of its row."""
        row, where, there = self.schedule.rows[rank], self.schedule.where, self.there
        direct, takes, gives, size = not self.schedule.lowered, self.takes, self.gives, len(row)
        cell = self.at[rank]
        while cell < size:
            stage, op, microbatch = row[cell]
            if KINDS[op].stream != "compute":
                self.at[rank] = cell
                if (key := self._transfer(row[cell])) in waiting:
                    ready.append(waiting.pop(key))
            else:
                for base, _ in takes[op][stage]:
                    if base + microbatch not in there:
                        self.at[rank] = cell
                        return base + microbatch
                for base, target in gives[op][stage]:
                    key = base + microbatch
                    if direct or where[target][microbatch] == rank:
                        there.add(key)
                        if key in waiting:
                            ready.append(waiting.pop(key))
                    else:
                        self.made.add(key)
            cell += 1
        self.at[rank] = cell
        return -1

    def _transfer(self, action: Action) -> int:
        """Send, or post a receive; the value if it has now arrived, or -1."""
        stage, op, microbatch = action
        sends = KINDS[op].stream == "send"
        base, _ = (self.takes if sends else self.gives)[op][stage][0]
        key = base + microbatch
        if sends and key not in self.made:
            rank = self.schedule.where[stage][microbatch]
            raise _fault(self.schedule, rank, self.at[rank], "comes before what it sends is made")
        own, other = (self.outbox, self.posted) if sends else (self.posted, self.outbox)
        if key not in other:
            own.add(key)
            return -1
        self.there.add(key)
        return key

    def _stuck(self) -> ScheduleError:
        """Why nobody can go on: an action before what it needs in its own row, or a circle of ranks."""
        rows, at = self.schedule.rows, self.at
        stopped = [rank for rank, row in enumerate(rows) if at[rank] < len(row)]
        needs = {rank: self._giver(rank) for rank in stopped}
        for rank, (giver, cell) in needs.items():
            if giver == rank:
                text = f"comes before {rows[rank][cell]} (cell {cell + 1}), which it needs"
                return _fault(self.schedule, rank, at[rank], text)
        chain = [stopped[0]]
        while (rank := needs[chain[-1]][0]) not in chain:
            chain.append(rank)
        circle = chain[chain.index(rank) :]
        told = "; ".join(
            f"rank {r} stands at {rows[r][at[r]]} and waits for {rows[needs[r][0]][needs[r][1]]} of rank {needs[r][0]}"
            for r in circle
        )
        return _fault(self.schedule, circle[0], at[circle[0]], f"deadlock: {told}")

    def _giver(self, rank: int) -> tuple[int, int]:
        """The cell, not reached yet, that a rank waits for: in its own row if there is one, else a send if any."""
        action = self.schedule.rows[rank][self.at[rank]]
        missing = {base + action.microbatch for base, _ in self.takes[action.op][action.stage]} - self.there
        found = []
        for r, row in enumerate(self.schedule.rows):
            for cell, other in enumerate(row[self.at[r] :], start=self.at[r]):
                sends = KINDS[other.op].stream == "send"
                moves = (self.takes if sends else self.gives)[other.op][other.stage]
                if any(base + other.microbatch in missing for base, _ in moves):
                    found.append((r != rank, not sends, r, cell))
        return min(found)[2:]


def _check_links(schedule: Schedule) -> None:
    """Raise for a receive that is posted out of the order in which its link sends."""
    where = schedule.where
    sent: dict[tuple[int, int], list[Action]] = {}
    for rank, row in enumerate(schedule.rows):
        for stage, op, microbatch in row:
            if KINDS[op].stream == "send":
                value = KINDS[op].takes[0]
                target = stage + value.offset
                message = Action(target, TRANSFERS[value.name][1], microbatch)
                sent.setdefault((rank, where[target][microbatch]), []).append(message)
    at = dict.fromkeys(sent, 0)
    for rank, row in enumerate(schedule.rows):
        for cell, action in enumerate(row):
            if KINDS[action.op].stream == "receive":
                link = where[action.stage + KINDS[action.op].peer][action.microbatch], rank
                expected = sent[link][at[link]]
                at[link] += 1
                if expected != action:
                    raise _fault(
                        schedule, rank, cell, f"rank {link[0]} sends {expected} first; receives keep that order"
                    )
