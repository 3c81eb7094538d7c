"""The ledger: what this rank sent, over which axis, and from which place in the code."""

from __future__ import annotations

import sys
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

__all__ = ["Entry", "Ledger", "Timed", "caller"]

_ROOT = str(Path(__file__).resolve().parent.parent)


@dataclass(frozen=True, slots=True)
class Entry:
    """One collective.

    Attributes:
        operation: ``all_reduce``, ``all_gather``, ``reduce_scatter``, ``all_to_all``, ``broadcast``, ``send`` ...
        axis: name of the axis.
        payload: bytes of the whole message: of the reduced tensor, of the gathered result, of the scattered input.
        sent: bytes that leave this rank with a ring algorithm: 2(n-1)/n of the payload for an all-reduce, (n-1)/n
            for a gather or a scatter, the payload itself for a point-to-point message.
        place: ``file:line`` of the caller; `` (backward)`` is appended where autograd calls.
    """

    operation: str
    axis: str
    payload: int
    sent: int
    place: str


class Ledger:
    """Totals for each (operation, axis, place), and the most recent entries in order.

    Attributes:
        recent: the entries.
        waited_s: seconds that the host has waited for other ranks; with NCCL it is the device that waits.
    """

    def __init__(self, recent: int = 256) -> None:
        self.recent: deque[Entry] = deque(maxlen=recent)
        self.waited_s = 0.0
        self._totals: dict[tuple[str, str, str], list[int]] = {}

    def record(self, entry: Entry) -> None:
        """Add one collective."""
        self.recent.append(entry)
        total = self._totals.setdefault((entry.operation, entry.axis, entry.place), [0, 0, 0])
        total[0] += 1
        total[1] += entry.payload
        total[2] += entry.sent

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """What is done inside is waiting for other ranks."""
        began = time.perf_counter()
        try:
            yield
        finally:
            self.waited_s += time.perf_counter() - began

    def calls(self, operation: str | None = None, axis: str | None = None) -> int:
        """How many collectives there were, of one operation and axis or of all."""
        return self._sum(0, operation, axis)

    def payload(self, operation: str | None = None, axis: str | None = None) -> int:
        """Bytes of the messages, see :class:`Entry`."""
        return self._sum(1, operation, axis)

    def sent(self, operation: str | None = None, axis: str | None = None) -> int:
        """Bytes that left this rank, see :class:`Entry`."""
        return self._sum(2, operation, axis)

    def reset(self) -> None:
        """Forget everything."""
        self.waited_s = 0.0
        self.recent.clear()
        self._totals.clear()

    def table(self) -> str:
        """One line for each (operation, axis, place), the heaviest first."""
        rows = sorted(self._totals.items(), key=lambda item: -item[1][2])
        lines = [f"{'operation':<16}{'axis':<8}{'calls':>8}{'payload':>14}{'sent':>14}  place"]
        lines += [f"{op:<16}{axis:<8}{n:>8}{size:>14}{sent:>14}  {at}" for (op, axis, at), (n, size, sent) in rows]
        return "\n".join(lines)

    def _sum(self, column: int, operation: str | None, axis: str | None) -> int:
        return sum(
            total[column]
            for (op, ax, _), total in self._totals.items()
            if operation in (None, op) and axis in (None, ax)
        )


class Timed:
    """A collective under way of which the ledger learns how long it is waited for."""

    __slots__ = ("_ledger", "_work")

    def __init__(self, work: Any, ledger: Ledger) -> None:
        self._work, self._ledger = work, ledger

    def wait(self, *limit: timedelta) -> None:
        """As of the work itself."""
        with self._ledger.waiting():
            self._work.wait(*limit)

    def is_completed(self) -> bool:
        """As of the work itself."""
        return self._work.is_completed()


def caller(*skip: str) -> str:
    """``file:line`` of the nearest frame outside the files ``skip`` and torch; relative to the project inside it."""
    frame = sys._getframe(1)
    while frame.f_back is not None and (
        frame.f_code.co_filename in (*skip, __file__) or frame.f_globals.get("__name__", "").startswith("torch.")
    ):
        frame = frame.f_back
    return f"{frame.f_code.co_filename.removeprefix(_ROOT + '/')}:{frame.f_lineno}"
