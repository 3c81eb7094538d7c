"""What the ranks of a pipeline tell one another when a step fails, through the rendezvous store."""

from __future__ import annotations

import json
import secrets
import threading
import time
from collections.abc import Mapping
from typing import Any

from torch.distributed import Store

from parallel import comm
from parallel.mesh import Axis

__all__ = ["Board"]

_EVERY_S = 0.2
_STALE_S = 1.0


class Board:
    """One alarm for all ranks, and a line from each rank that waits.

    The store is read and written by a thread of its own, for it stands still where the rank that serves it does.

    Args:
        axis: all ranks, each of which makes its board at the same time.
    """

    def __init__(self, axis: Axis) -> None:
        self.rank = axis.rank
        name = comm.gather_json(secrets.token_hex(8), axis)[0]
        self._store = comm.store(axis, f"board/{name}")
        self._line: dict[str, Any] | None = None
        self._alarm: str | None = None
        self._others: dict[int, tuple[Mapping[str, Any], float]] = {}
        self._beat, self._looked = 0, 0.0
        self._thread: threading.Thread | None = None

    def alarm(self) -> str | None:
        """What has failed, if a rank has said so."""
        return self._alarm

    def raise_alarm(self, text: str, patience_s: float = 2.0) -> str:
        """Tell all ranks that the step has failed; the first alarm stands, and is returned."""
        if self._store is not None:
            thread = threading.Thread(target=self._publish, args=(text,), daemon=True)
            thread.start()
            thread.join(patience_s)
        return self._alarm or text

    def _publish(self, text: str) -> None:
        assert self._store is not None
        self._alarm = self._store.compare_set("alarm", "", text).decode() or text

    def wait_for(self, rank: int, line: Mapping[str, Any]) -> None:
        """Say that this rank waits for another; until :meth:`go_on` alarms and the lines of others are read."""
        self._line, self._looked = {"for": rank, **line}, time.monotonic()
        if self._store is not None and (self._thread is None or not self._thread.is_alive()):
            self._thread = threading.Thread(target=self._watch, daemon=True)
            self._thread.start()

    def go_on(self) -> None:
        """Say that this rank no longer waits."""
        self._line = None

    def silent(self) -> tuple[int, Mapping[str, Any]]:
        """The rank at the end of the chain of ranks that wait for one another, and the line of the last that waits."""
        now, first = time.monotonic(), self._line or {"for": self.rank}
        frozen = now - self._looked > _STALE_S  # the store does not answer: what was read last must do
        seen, line = {self.rank}, first
        while (found := self._others.get(line["for"])) is not None and (frozen or now - found[1] <= _STALE_S):
            if found[0]["for"] in seen:  # ranks never wait in a circle: a line in it is out of date
                return first["for"], first
            seen.add(line["for"])
            line = found[0]
        return line["for"], line

    def _watch(self) -> None:
        store, written = self._store, False
        assert store is not None
        while self._line is not None or written:
            line = self._line
            self._beat += 1  # a line that is not renewed is that of a rank that stands still
            store.set(f"line/{self.rank}", "" if line is None else json.dumps({**line, "beat": self._beat}))
            written = line is not None
            if store.check(["alarm"]):
                self._alarm = store.get("alarm").decode()
            self._others = self._chain(store, line)
            self._looked = time.monotonic()
            time.sleep(_EVERY_S)

    def _chain(self, store: Store, line: Mapping[str, Any] | None) -> dict[int, tuple[Mapping[str, Any], float]]:
        """The lines of those that this rank waits for, one after the other, and since when each has been the same."""
        found: dict[int, tuple[Mapping[str, Any], float]] = {}
        while line is not None and (rank := line["for"]) not in found and store.check([f"line/{rank}"]):
            text = store.get(f"line/{rank}").decode()
            line = json.loads(text) if text else None
            if line is not None:
                before = self._others.get(rank)
                found[rank] = before if before and before[0] == line else (line, time.monotonic())
        return found
