"""The simulator: a lowered schedule and its costs in, a timeline out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from parallel.errors import ConfigError, refuse
from parallel.pp.action import KINDS, TRANSFERS, Action
from parallel.pp.lower import lower
from parallel.pp.schedule import Schedule
from parallel.pp.timeline import Span, Timeline, Transfer

__all__ = ["Costs", "parse_costs", "simulate"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Costs:
    """What actions cost, in any one unit of time, and what they hold, in any one unit of memory.

    Attributes:
        compute: kind -> seconds for each stage; one number stands for all stages. ``B`` defaults to I + W.
        latency: seconds between the end of a transfer at the sender and its arrival.
        transfer: seconds for which a message occupies its link (bytes over bandwidth).
        activation: memory that a stage holds from F to B or I, for each stage or for all.
        kept: share of it that stays from I to W.
        sizes: of the microbatches, relative; empty: all alike.
    """

    compute: Mapping[str, Sequence[float]]
    latency: float = 0.0
    transfer: float = 0.0
    activation: Sequence[float] = (1.0,)
    kept: float = 0.0
    sizes: Sequence[float] = ()

    @staticmethod
    def uniform(F: float = 1.0, I: float = 1.0, W: float = 1.0, B: float | None = None, **rest: Any) -> Costs:  # noqa: E741
        """Stages that are all alike; ``rest`` as the attributes."""
        compute = {"F": (F,), "I": (I,), "W": (W,)} | ({} if B is None else {"B": (B,)})
        return Costs(compute=compute, **rest)

    def of(self, op: str, stage: int) -> float:
        """Seconds of one computing action on a microbatch of size 1."""
        if op not in self.compute:
            return self.of("I", stage) + self.of("W", stage) if op == "B" else 0.0
        values = self.compute[op]
        return values[stage] if len(values) > 1 else values[0]

    def held(self, stage: int) -> float:
        """Memory of one activation of a stage."""
        return self.activation[stage] if len(self.activation) > 1 else self.activation[0]

    def size(self, microbatch: int) -> float:
        """Of a microbatch, relative."""
        return self.sizes[microbatch] if self.sizes else 1.0

    def problems(self, stages: int) -> list[str]:
        """Why these costs cannot be used for a schedule of so many stages."""
        lists = {f"cost of {op}": values for op, values in self.compute.items()} | {"activation": self.activation}
        found = [
            f"{what} is given for {len(values)} stages, the schedule has {stages}"
            for what, values in lists.items()
            if len(values) not in (1, stages)
        ]
        lists |= {"latency": (self.latency,), "transfer": (self.transfer,), "kept": (self.kept,), "size": self.sizes}
        found += [
            f"{what} = {value:g}: must be a number that is not negative"
            for what, values in lists.items()
            for value in values
            if not 0 <= value < float("inf")
        ]
        return found


def parse_costs(text: str) -> Costs:
    """Costs written as ``F=1,I=1,W=1,latency=0.2``; one number for each stage as ``F=1:1:2:1``.

    Raises:
        ConfigError: every entry that is not a known name and its numbers.
    """
    compute: dict[str, Sequence[float]] = {"F": (1.0,), "I": (1.0,), "W": (1.0,)}
    rest, problems = dict[str, Any](), list[str]()
    for part in filter(None, text.replace(" ", "").split(",")):
        name, _, values = part.partition("=")
        try:
            numbers = tuple(float(value) for value in values.split(":"))
        except ValueError:
            problems.append(f"{part!r}: expected numbers, as in F=1 or F=1:1:2")
            continue
        if name in ("latency", "transfer", "kept") and len(numbers) == 1:
            rest[name] = numbers[0]
        elif name in KINDS and KINDS[name].stream == "compute":
            compute[name] = numbers
        else:
            problems.append(f"{part!r}: costs are those of F, B, I, W, latency, transfer and kept")
    refuse(ConfigError, problems)
    return Costs(compute=compute, **rest)


@dataclass(slots=True)
class _Link:
    """What is known of the messages of one link, in order: when each was sent, and when its receive was posted."""

    sent: list[float] = field(default_factory=list)
    posted: list[tuple[float, Action]] = field(default_factory=list)
    done: int = 0
    free: float = 0.0


class _Cell(NamedTuple):
    """One kind of action on one stage: values, seconds, and the change of memory, for a microbatch of size 1."""

    takes: tuple[tuple[str, int], ...]
    gives: tuple[tuple[str, int], ...]
    time: float
    held: float


class _Run:
    """One play of a schedule in time."""

    def __init__(self, schedule: Schedule, costs: Costs) -> None:
        self.schedule, self.costs = schedule, costs
        ranks = schedule.ranks
        self.at, self.clock = [0] * ranks, [0.0] * ranks
        self.rows: list[list[Span]] = [[] for _ in range(ranks)]
        self.memory: list[list[tuple[float, float]]] = [[] for _ in range(ranks)]
        self.held = [0.0] * ranks
        self.sizes = [costs.size(microbatch) for microbatch in range(schedule.microbatches)]
        self.arrival: dict[tuple[str, int, int], tuple[float, Action]] = {}
        self.before: dict[Action, Action | None] = {}
        self.makers: dict[tuple[str, int, int], Action] = {}
        self.links: dict[tuple[int, int], _Link] = {}
        self.transfers: list[Transfer] = []
        self.waiting: dict[tuple[str, int, int], int] = {}
        self.ready = list(range(ranks))
        self.cells = {(op, stage): self._cell(op, stage) for op in KINDS for stage in range(schedule.stages)}

    def _cell(self, op: str, stage: int) -> _Cell:
        """What a computing action takes, gives, costs and holds."""
        kind, stages = KINDS[op], self.schedule.stages
        takes, gives = (
            tuple((v.name, stage + v.offset) for v in values if 0 <= stage + v.offset < stages)
            for values in (kind.takes, kind.gives)
        )
        outside = {("input", 0), ("output_gradient", stages - 1)}
        held = self.costs.held(stage) * (kind.activations + self.costs.kept * kind.kept)
        takes = tuple(value for value in takes if value not in outside)
        return _Cell(takes, gives, self.costs.of(op, stage), held if self.schedule.trains else 0.0)

    def timeline(self) -> Timeline:
        while self.ready:
            rank = self.ready.pop()
            row = self.schedule.rows[rank]
            while self.at[rank] < len(row) and self._step(rank, row[self.at[rank]]):
                self.at[rank] += 1
        if any(at < len(row) for at, row in zip(self.at, self.schedule.rows, strict=True)):
            raise ValueError("the schedule does not come to its end: validate it first")
        rows, memory = tuple(map(tuple, self.rows)), tuple(map(tuple, self.memory))
        return Timeline(rows, tuple(self.transfers), memory, self._critical(), self.schedule.name)

    def _step(self, rank: int, action: Action) -> bool:
        """Carry out one action; False if it must wait."""
        kind = KINDS[action.op]
        if kind.stream == "compute":
            return self._compute(rank, action)
        peer = self.schedule.where[action.stage + kind.peer][action.microbatch]
        if kind.stream == "send":
            link = self.links.setdefault((rank, peer), _Link())
            link.sent.append(self.clock[rank])
            self._move(rank, peer, link)
        else:
            link = self.links.setdefault((peer, rank), _Link())
            link.posted.append((self.clock[rank], action))
            self._move(peer, rank, link)
        return True

    def _compute(self, rank: int, action: Action) -> bool:
        stage, op, microbatch = action
        cell = self.cells[op, stage]
        start, cause = self.clock[rank], self.rows[rank][-1].action if self.rows[rank] else None
        for name, place in cell.takes:
            key = (name, place, microbatch)
            if key not in self.arrival:
                self.waiting[key] = rank
                return False
            there, maker = self.arrival[key]
            if there > start:
                start, cause = there, maker
        size = self.sizes[microbatch]
        end = start + cell.time * size
        self.rows[rank].append(Span(action, start, end))
        self.clock[rank], self.before[action] = end, cause
        if change := cell.held * size:
            self.held[rank] += change
            self.memory[rank].append((start if change > 0 else end, self.held[rank]))
        for name, place in cell.gives:
            self._made(name, place, microbatch, rank, end, action)
        return True

    def _made(self, name: str, stage: int, microbatch: int, rank: int, end: float, maker: Action) -> None:
        """Note a value; one for another rank is there when its message is."""
        key = (name, stage, microbatch)
        if self.schedule.where[stage][microbatch] == rank:
            self._arrive(key, end, maker)
        else:
            self.makers[TRANSFERS[name][1], stage, microbatch] = maker

    def _arrive(self, key: tuple[str, int, int], time: float, maker: Action) -> None:
        self.arrival[key] = time, maker
        if key in self.waiting:
            self.ready.append(self.waiting.pop(key))

    def _move(self, source: int, target: int, link: _Link) -> None:
        """Carry over every message of a link that was sent and is expected."""
        while link.done < min(len(link.sent), len(link.posted)):
            posted, action = link.posted[link.done]
            start = max(link.sent[link.done], posted, link.free)
            link.free = start + self.costs.transfer * self.costs.size(action.microbatch)
            there = link.free + self.costs.latency
            link.done += 1
            self.transfers.append(Transfer(action, source, target, start, there))
            maker = self.makers[action.op, action.stage, action.microbatch]
            self._arrive((KINDS[action.op].gives[0].name, action.stage, action.microbatch), there, maker)

    def _critical(self) -> tuple[Action, ...]:
        """The chain of actions that decides the end, first to last."""
        last = max((row[-1] for row in self.rows if row), key=lambda span: span.end, default=None)
        action = last.action if last else None
        chain: list[Action] = []
        while action is not None:
            chain.append(action)
            action = self.before[action]
        return tuple(reversed(chain))


def simulate(schedule: Schedule, costs: Costs | None = None) -> Timeline:
    """Play a valid schedule in time: ranks compute one action at a time, links carry one message at a time beside.

    A message leaves when its action is done, its receive is posted and the message before it on the same link has left.

    Args:
        schedule: sends and receives are added where it has none.
        costs: default: F, I and W cost 1, transfers nothing.

    Raises:
        ConfigError: costs for another number of stages or microbatches, or negative ones.
    """
    costs = Costs.uniform() if costs is None else costs
    problems = costs.problems(schedule.stages)
    if costs.sizes and len(costs.sizes) != schedule.microbatches:
        problems.append(f"sizes of {len(costs.sizes)} microbatches, the schedule has {schedule.microbatches}")
    refuse(ConfigError, problems)
    return _Run(lower(schedule), costs).timeline()
