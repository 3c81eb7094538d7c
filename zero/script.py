"""Stage 3: the data ranks gather the same parameters one after the other, and say so where it is new."""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import Callable
from datetime import timedelta

from parallel import comm
from parallel.errors import LockstepError
from parallel.mesh import Axis

__all__ = ["OutOfStep", "Script"]

_SHORT_S = 2.0  # a gathering that takes longer is told the others
_LOOK_S = 0.5


class OutOfStep(LockstepError):
    """Data ranks that gather different parameters; the message says which of them is where."""


class Script:
    """What was gathered in the last round, in order; a round is a step, or what is between two.

    Where a round goes on as the last one of its kind did, nothing is said, since every rank knows the same order. Where
    it does not, the ranks agree by way of the rendezvous store before any of them gathers; a rank that
    is alone with what it does raises an error and does not hang, nor mix the parameters of two blocks.

    Args:
        axis: the ranks that gather; each makes its script at the same time.
    """

    def __init__(self, axis: Axis) -> None:
        self.axis = axis
        name = comm.gather_json(secrets.token_hex(8), axis)[0] if axis.size > 1 else ""
        self._store = comm.store(axis, f"script/{name}")
        self._limit_s = getattr(self._store, "timeout", timedelta(minutes=30)).total_seconds()
        self._lines: dict[str, list[str]] = {}
        self._kind, self._round, self._at = "", 0, 0

    def open(self, kind: str) -> None:
        """A round begins, and the one before it is over.

        Raises:
            OutOfStep: on some ranks it is not.
        """
        if 0 < self._at < len(self._lines.get(self._kind, ())):
            self._agree(self._at, "no more")
        self._kind, self._round, self._at = kind, self._round + 1, 0

    def follow(self, use: str) -> None:
        """Something is about to be gathered, in words.

        Raises:
            OutOfStep: some rank is about to gather something else.
        """
        lines, at = self._lines.setdefault(self._kind, []), self._at
        self._at += 1
        if at < len(lines) and lines[at] == use:
            return
        self._agree(at, use)
        lines[at:] = [use]

    def wait(self, there: Callable[[float], bool], use: str) -> None:
        """Return when something has come that all ranks gather.

        Args:
            there: whether it has within so many seconds.

        Raises:
            OutOfStep: some rank has found that the ranks differ.
        """
        try:
            if there(_SHORT_S):
                return
            self._tell(f"stalled/{self.axis.rank}", [self._round, self._at - 1, use])
            while not there(_LOOK_S):
                self._listen()
        except RuntimeError:  # a rank has gone; perhaps it said why
            self._listen()
            raise

    def _agree(self, at: int, use: str) -> None:
        """Return when every rank has come to the same."""
        store = self._store
        if store is None:
            return
        key, mine = f"{self._round}/{at}", json.dumps([self.axis.rank, use])
        rank, other = json.loads(store.compare_set(key, "", mine).decode())
        if other != use:
            self._part(use, rank, other)
        store.add(f"{key}/count", 1)
        began = looked = time.monotonic()
        while store.add(f"{key}/count", 0) < self.axis.size:
            now = time.monotonic()
            if now - looked > _LOOK_S:
                looked = now
                self._listen()
                self._look(at, use)
            if now - began > self._limit_s:
                self._part(use, None, "")
            time.sleep(min(0.02, max(0.0002, (now - began) / 20)))

    def _look(self, at: int, use: str) -> None:
        """Whether a rank waits for what it gathers without having come by here."""
        assert self._store is not None
        for rank in range(self.axis.size):
            if rank != self.axis.rank and self._store.check([f"stalled/{rank}"]):
                round_, there, other = json.loads(self._store.get(f"stalled/{rank}").decode())
                if (round_, there) >= (self._round, at):
                    self._part(use, rank, other)

    def _part(self, use: str, rank: int | None, other: str) -> None:
        mine = f"data rank {self.axis.rank} of {self.axis.size} is at {use} (number {self._at} of its round)"
        theirs = f"rank {rank} at {other}" if rank is not None else "not all others came there in time"
        self._tell("alarm", text := f"{mine}, {theirs}: at stage 3 data ranks run the same modules in the same order")
        raise OutOfStep(text)

    def _tell(self, key: str, what: object) -> None:
        if self._store is not None:
            self._store.set(key, json.dumps(what))

    def _listen(self) -> None:
        if self._store is not None and self._store.check(["alarm"]):
            raise OutOfStep(json.loads(self._store.get("alarm").decode()))
