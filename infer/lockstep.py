"""Several ranks, one of which is told what to do: only requests and aborts travel, every rank plans for itself."""

from __future__ import annotations

import contextlib
import secrets
from collections.abc import Sequence
from typing import Any

from infer.completion import Event
from infer.engine import Engine
from infer.params import SamplingParams
from infer.request import RequestError
from infer.scheduler import Stats
from infer.vectors import VectorEngine
from parallel import comm
from parallel.mesh import Axis, Mesh

__all__ = ["Replica"]


class Replica:
    """An engine on the ranks of ``tp`` and ``pp``; every rank makes one.

    The first rank has the face of :class:`~infer.engine.Engine`. The others call :meth:`follow`, which returns when the
    first one closes. Between two steps the first must not be silent for longer than the process group waits: an idle
    step costs one small message.

    Args:
        engine: of this rank.
        mesh: that it was built on.
    """

    def __init__(self, engine: Engine | VectorEngine, mesh: Mesh) -> None:
        self.engine, self.mesh = engine, mesh
        # Axes of their own, as a step may be under way on the others.
        sizes = {axis.name: axis.size for axis in (mesh.pp, mesh.tp)}
        self._axes: list[Axis] = [mesh.among(name, range(size), "orders") for name, size in sizes.items() if size > 1]
        self._orders: list[list[Any]] = []

    @property
    def first(self) -> bool:
        """Whether this is the rank that is told what to do."""
        return self.mesh.tp.rank == 0 and self.mesh.pp.rank == 0

    @property
    def busy(self) -> bool:
        """Whether there is anything left to do."""
        return self.engine.busy or bool(self._orders)

    @property
    def stats(self) -> Stats:
        """Of the scheduler, which is the same on every rank."""
        return self.engine.stats

    def add(
        self,
        prompt: Sequence[int],
        params: SamplingParams | None = None,
        *,
        priority: int = 0,
        salt: bytes = b"",
        seed: int | None = None,
    ) -> int:
        """As :meth:`Engine.add`; functions as ``logits_processors`` cannot travel and are refused on several ranks."""
        params = SamplingParams() if params is None else params
        if self._axes and params.logits_processors:
            raise RequestError("logits_processors: functions cannot be sent to other ranks; use a single rank")
        seed = secrets.randbits(63) if seed is None else seed
        id = self.engine.add(prompt, params, priority=priority, salt=salt, seed=seed)
        self._orders.append(["add", list(prompt), params.to_json(), priority, salt.hex(), seed])
        return id

    def abort(self, id: int) -> bool:
        """As :meth:`Engine.abort`."""
        found = self.engine.abort(id)
        if found:
            self._orders.append(["abort", id])
        return found

    def embed(self, documents: Sequence[Sequence[int]]) -> list[list[float]]:
        """As :meth:`Engine.embed`, on all ranks."""
        self._orders.append(["embed", [list(document) for document in documents]])
        self._tell()
        return self.engine.embed(documents)

    def step(self) -> list[Event]:
        """Tell the other ranks what is new, and make one step."""
        self._tell()
        return self.engine.step()

    def close(self) -> None:
        """Let the other ranks go."""
        self._orders.append(["close"])
        self._tell()
        self.engine.close()

    def follow(self) -> None:
        """On every rank but the first: make the steps that it makes, until it closes."""
        while True:
            told = self._tell()
            for kind, *order in told:
                if kind == "close":
                    self.engine.close()
                    return
                self._obey(kind, order)
            if not told or told[-1][0] != "embed":  # then the first rank makes no step
                self.engine.step()

    def _obey(self, kind: str, order: list[Any]) -> None:
        if kind == "abort":
            self.engine.abort(*order)
        elif kind == "embed":
            with contextlib.suppress(RequestError):  # it is raised on the first rank as well
                self.engine.embed(*order)
        else:
            prompt, params, priority, salt, seed = order
            options = {"priority": priority, "salt": bytes.fromhex(salt), "seed": seed}
            self.engine.add(prompt, SamplingParams.from_json(params), **options)

    def _tell(self) -> list[list[Any]]:
        """The orders of the first rank, on all."""
        orders, self._orders = self._orders, []
        for axis in self._axes:
            orders = comm.gather_json(orders, axis)[0]
        return orders
