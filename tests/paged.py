"""A device that carries out steps as the runner does, on pages of plain numbers, and looks at everything it reads.

The "key and value" of a token is a number made of the salt and of all tokens up to it. Whatever is written to a wrong
page, copied too late or taken from somebody else's prefix is therefore a number that does not belong there.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from infer.policy import PageGroup
from infer.request import Life, Request
from infer.scheduler import Scheduler
from infer.step import Step, slots

VOCABULARY = 50
_MODULUS = (1 << 61) - 1


def values_of(tokens: list[int], salt: bytes) -> list[int]:
    """What belongs to each token."""
    value, values = int.from_bytes(salt, "big") + 1, []
    for token in tokens:
        value = (value * 1_000_003 + token + 7) % _MODULUS
        values.append(value)
    return values


def next_token(value: int) -> int:
    """What the "model" says after the token with this value."""
    return (value >> 7) % VOCABULARY


@dataclass(frozen=True)
class Prepared:
    """A step with copies of what the scheduler may change afterwards."""

    step: Step
    tables: list[np.ndarray]


class Machine:
    """Pages on the device, in CPU memory and on disk."""

    def __init__(self, groups: list[PageGroup], page_size: int) -> None:
        self.groups, self.size = groups, page_size
        self.device = [np.zeros((group.pages, page_size), np.int64) for group in groups]
        self.host = [np.zeros((group.host_pages, page_size), np.int64) for group in groups]
        self.disk: dict[tuple[int, bytes], np.ndarray] = {}
        self.last: list[int] = []
        self.moved = {"save": 0, "out": 0, "load": 0, "back": 0, "copies": 0, "drop": 0}

    def prepare(self, step: Step, tables: list[np.ndarray]) -> Prepared:
        """What the runner takes when a step is planned."""
        return Prepared(step, [table.copy() for table in tables])

    def execute(self, prepared: Prepared) -> tuple[list[int], list[tuple[int, bytes]]]:
        """Move, compute, sample: the sampled tokens, and pages whose file was not there."""
        step, lost = prepared.step, self._move(prepared.step)
        tokens_T = step.tokens_T.copy()
        if step.sources_D is not None:
            for run, source in enumerate(step.sources_D.tolist()):
                if source >= 0:
                    tokens_T[run] = self.last[source]
        values = []
        for run, request in enumerate(step.requests):
            own = tokens_T[step.bounds[run] : step.bounds[run + 1]].tolist()
            values.append(self._values(request, int(step.starts_R[run]), own))
        for run in range(len(step.requests)):
            self._look(prepared, run, values[run], int(step.starts_R[run]))
        for group, table in enumerate(prepared.tables):
            new = [v for run in range(len(values)) for v in values[run][int(step.starts_R[run]) :]]
            places = slots(step, table, self.size)
            assert len(set(places.tolist())) == len(places) == len(new), "two tokens in one place"
            assert (places >= 0).all()
            self.device[group].reshape(-1)[places] = new
        for run in range(len(step.requests)):
            self._look(prepared, run, values[run], int(step.stops_R[run]))
        self.last = [next_token(values[run][-1]) for run in range(step.samples)]
        return self.last.copy(), lost

    def _values(self, request: Request, start: int, own: list[int]) -> list[int]:
        """What belongs to the tokens of a request up to the end of its run."""
        tokens = request.tokens[:start] + own
        if request.finish_reason is None and len(request.tokens) >= len(tokens):
            assert request.tokens[: len(tokens)] == tokens, "other tokens than those of the request"
        return values_of(tokens, request.salt)

    def _look(self, prepared: Prepared, run: int, values: list[int], stop: int) -> None:
        """Everything that the run's tokens look at, before ``stop``, is what belongs there."""
        step = prepared.step
        for group, table, device in zip(self.groups, prepared.tables, self.device, strict=True):
            start = int(step.starts_R[run])
            first = 0 if group.window is None else max(0, start - group.window + 1)
            if first < stop:
                positions = np.arange(first, stop)
                pages = table[step.rows_R[run], positions // self.size]
                assert (pages >= 0).all(), "a page is missing"
                found = device[pages, positions % self.size]
                assert (found == np.array(values[first:stop])).all(), (
                    f"step {step.number}: request {step.requests[run].id} reads what is not its own at "
                    f"{positions[found != np.array(values[first:stop])].tolist()}"
                )

    def _move(self, step: Step) -> list[tuple[int, bytes]]:
        """Carry out the moves, kind by kind."""
        moves, lost = step.moves, []
        for place in moves.drop:
            self.disk.pop(place, None)
        for group, key, page in moves.save:
            self.disk[group, key] = self.host[group][page].copy()
        for group, page, place in moves.out:
            self.host[group][place] = self.device[group][page]
        for group, key, page in moves.load:
            if (group, key) in self.disk:
                self.host[group][page] = self.disk[group, key]
            else:
                lost.append((group, key))
        for group, place, page in moves.back:
            self.device[group][page] = self.host[group][place]
        for group, page, copy in moves.copies:
            self.device[group][copy] = self.device[group][page]
        for name in self.moved:
            self.moved[name] += len(getattr(moves, name))
        return lost


def request(number: int, tokens: list[int], new: int, **more: Any) -> Request:
    """A request that generates so many tokens."""
    return Request(number, list(tokens), len(tokens), None, most=len(tokens) + new, **more)


def alone(tokens: list[int], new: int, salt: bytes = b"") -> list[int]:
    """What the "model" makes of a prompt."""
    tokens = list(tokens)
    for _ in range(new):
        tokens.append(next_token(values_of(tokens, salt)[-1]))
    return tokens


def serve(
    scheduler: Scheduler, machine: Machine, steps: int | None = None, each: Callable[[Step], None] | None = None
) -> int:
    """Plan, execute and commit until all have ended, or so many steps; every request ends at its length."""
    for number in range(steps or 10_000):
        if not scheduler.requests:
            return number
        step = scheduler.plan()
        scheduler.check()
        if each is not None:
            each(step)
        tokens, lost = machine.execute(machine.prepare(step, scheduler.tables))
        scheduler.commit(step, tokens, lost)
        for one in step.requests[: step.samples]:
            if one.life is Life.RUNNING and len(one.tokens) >= one.most:
                scheduler.finish(one, "length")
        scheduler.check()
    assert steps is not None, "requests never end"
    return steps
