"""What may end a request that is under way: its client, a clock, or the server."""

from __future__ import annotations

import asyncio
from types import TracebackType
from typing import Literal

from starlette.types import Receive

from infer.server.exchange import Left

__all__ = ["Ended", "Flight", "Reason"]

Reason = Literal["gone", "queue", "deadline", "abort"]


class Ended(Exception):
    """A request was ended from outside.

    Attributes:
        reason: ``gone``: its client is; ``queue``: it waited too long for its first token; ``deadline``: it took too
            long; ``abort``: the server ends everything.
    """

    def __init__(self, reason: Reason) -> None:
        super().__init__(reason)
        self.reason: Reason = reason


class Flight:
    """A block that is cancelled when the client leaves, in time, or by :meth:`end`; it then raises :class:`Ended`.

    Args:
        receive: of a request whose body has been read.
        queue_s: until :meth:`begun` is called.
        deadline_s: for the whole.
        among: all that are under way.
    """

    def __init__(self, receive: Receive, *, queue_s: float, deadline_s: float, among: set[Flight]) -> None:
        self._among = among
        self._receive, self._queue_s, self._deadline_s = receive, queue_s, deadline_s
        self._reason: Reason | None = None
        self._waits, self._open = True, False

    async def __aenter__(self) -> Flight:
        self._started = asyncio.get_running_loop().time()
        self._scope = asyncio.timeout_at(self._started + min(self._queue_s, self._deadline_s))
        await self._scope.__aenter__()
        self._open = True
        self._among.add(self)
        self._watcher = asyncio.create_task(self._watch())
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._open = False
        self._among.discard(self)
        self._watcher.cancel()
        del self._watcher  # which knows this block
        try:
            await self._scope.__aexit__(kind, error, trace)
        except TimeoutError:
            raise Ended(self._reason or ("queue" if self._waits else "deadline")) from None
        if isinstance(error, Left):
            raise Ended("gone") from None

    def begun(self) -> None:
        """The first token is there."""
        if self._waits and self._open and not self._scope.expired() and self._reason is None:
            self._waits = False
            self._scope.reschedule(self._started + self._deadline_s)

    def end(self, reason: Reason) -> None:
        """Cancel the block."""
        if self._open and self._reason is None and not self._scope.expired():
            self._reason = reason
            self._scope.reschedule(asyncio.get_running_loop().time())

    async def _watch(self) -> None:
        while (await self._receive())["type"] != "http.disconnect":
            pass
        self.end("gone")
