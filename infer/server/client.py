"""The HTTP process's end of the channel: an engine in another process, with the face of one in this."""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from collections.abc import AsyncGenerator, Callable, Sequence

from infer.completion import Event
from infer.params import SamplingParams
from infer.request import RequestError
from infer.scheduler import Stats
from infer.server.engine import AtOnce, EngineGone
from infer.server.wire import (
    Abort,
    Add,
    Channel,
    ChannelError,
    Embed,
    Given,
    Hello,
    Refused,
    ToApi,
    Told,
    Vectors,
    pack,
    unpack,
)

__all__ = ["RemoteEngine"]

_FIRST = -(1 << 30)
"""Priority of what asks whether the engine works."""


class _Mail:
    """Events of one request. Those that are waited for may be dealt with at once; those that have come before they are
    asked for are taken as one, where that says the same: a process that is behind does not fall further behind."""

    def __init__(self, at_once: AtOnce | None) -> None:
        self._at_once, self._begun = at_once, False
        self._events: deque[Event | BaseException] = deque()
        self._waiter: asyncio.Future[None] | None = None

    def put(self, event: Event | BaseException, *, behind: bool = False) -> None:
        """One more; ``behind``: others have come that are not looked at yet."""
        if self._waiter is not None and not self._waiter.done():  # so there is nothing before it
            at_once = None if behind or not self._begun else self._at_once
            try:
                if at_once is not None and isinstance(event, Event) and at_once(event):
                    return
            except Exception as error:  # noqa: BLE001 - it belongs to who waits
                event = error
            self._waiter.set_result(None)
        self._begun = True
        self._events.append(event)

    async def take(self) -> Event | BaseException:
        if not self._events:
            self._waiter = asyncio.get_running_loop().create_future()
            await self._waiter
        first = self._events.popleft()
        if not isinstance(first, Event):
            return first
        taken = [first]
        while self._events and taken[-1].finish_reason is None and taken[-1].completion is None:
            following = self._events[0]
            if not isinstance(following, Event) or following.choice != first.choice:
                break
            taken.append(following)
            self._events.popleft()
        return first if len(taken) == 1 else Event.joined(taken)


class RemoteEngine:
    """Continues prompts in an engine that may be there, be gone, and come again.

    Args:
        key: that engines know.
        version: that they must be of.

    Attributes:
        hello: what the engine said of itself; None: there is none.
    """

    def __init__(self, key: bytes, version: str) -> None:
        self.hello: Hello | None = None
        self._key, self._version = key, version
        self._over = False
        self._channel: Channel | None = None
        self._streams: dict[int, _Mail] = {}
        self._embedding: dict[int, asyncio.Future[list[list[float]]]] = {}
        self._stats: Stats | None = None
        self._next = 0
        self._there = asyncio.Event()
        self._model: str | None = None
        self._stands_still = False
        self.refused: Callable[[str], None] = lambda _reason: None

    @property
    def there(self) -> bool:
        """Whether there is an engine."""
        return self.hello is not None

    @property
    def works(self) -> bool:
        """Whether it made a step when it was last asked to."""
        return self.there and not self._stands_still

    async def accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Somebody has connected: serve them, if they know the key and nobody else is there; returns when they go."""
        try:
            channel = await Channel.open(reader, writer, self._key, listens=True)
        except ChannelError as error:
            self.refused(str(error))
            return
        if self._channel is not None or self._over:
            if not self._over:
                self.refused("a second engine")
            channel.close()
            return
        self._channel = channel
        reason = "the engine has closed the channel"
        try:
            while True:
                self._take(unpack(await channel.receive(), ToApi))
        except ChannelError as error:
            reason = str(error)
        finally:
            self._lost(reason)

    async def ready(self) -> Hello:
        """Wait for an engine."""
        await self._there.wait()
        assert self.hello is not None
        return self.hello

    async def stream(
        self,
        prompt: Sequence[int],
        params: SamplingParams | None = None,
        *,
        priority: int = 0,
        salt: bytes = b"",
        at_once: AtOnce | None = None,
    ) -> AsyncGenerator[Event, None]:
        """Continue a prompt, piece by piece; the last event has the whole. Whoever stops listening ends the request.

        Arguments are those of :class:`~infer.server.engine.ServedEngine`.

        Raises:
            RequestError: it cannot be continued, with every reason.
            EngineGone: there is no engine, or it is gone in the middle.
        """
        channel = self._channel
        if channel is None or self.hello is None:
            raise EngineGone("the engine is not there")
        self._next += 1
        number, events = self._next, _Mail(at_once)
        self._streams[number] = events
        over = False
        try:
            given = (SamplingParams() if params is None else params).to_json()
            channel.send(pack(Add(number, list(prompt), given, priority, salt)))
            while not over:
                event = await events.take()
                over = isinstance(event, BaseException) or event.completion is not None
                if isinstance(event, BaseException):
                    raise event
                yield event
        finally:
            self._streams.pop(number, None)
            if not over and self._channel is channel:
                channel.send(pack(Abort(number)))

    async def embed(self, prompts: Sequence[Sequence[int]], *, urgent: bool = False) -> list[list[float]]:
        """One vector for each prompt; ``urgent``: before all that wait.

        Raises:
            RequestError: they cannot be embedded, with every reason.
            EngineGone: there is no engine, or it is gone in the middle.
        """
        channel = self._channel
        if channel is None or self.hello is None:
            raise EngineGone("the engine is not there")
        self._next += 1
        number = self._next
        self._embedding[number] = done = asyncio.get_running_loop().create_future()
        try:
            channel.send(pack(Embed(number, [list(prompt) for prompt in prompts], urgent)))
            return await done
        finally:
            self._embedding.pop(number, None)
            if done.cancelled() and self._channel is channel:
                channel.send(pack(Abort(number)))

    async def ping(self, timeout_s: float) -> bool:
        """Whether the engine computes something when it is asked to: a token, or the vector of one."""
        try:
            async with asyncio.timeout(timeout_s):
                if self.hello is not None and not self.hello.generates:
                    await self.embed([[self.hello.probe]], urgent=True)
                    works = True
                else:
                    works = await self._generates()
            self._stands_still = False
            return works
        except TimeoutError:
            self._stands_still = True
        except (EngineGone, RequestError):
            pass
        return False

    async def _generates(self) -> bool:
        """Have a token generated."""
        stream = self.stream([0], SamplingParams(max_tokens=1), priority=_FIRST)
        async with contextlib.aclosing(stream) as events:
            async for event in events:
                if event.completion is not None:
                    return not event.completion.error
        return False

    def stats(self) -> Stats | None:
        """What the scheduler held a moment ago; None: there is no engine."""
        return self._stats

    def close(self) -> None:
        """Let the engine go, and any that comes."""
        self._over = True
        if self._channel is not None:
            self._channel.close()

    def _take(self, message: ToApi) -> None:
        if isinstance(message, Hello):
            if message.version != self._version or self._model not in (None, message.model):
                raise ChannelError("an engine of another version or another model")
            self.hello, self._model = message, message.model
            self._there.set()
        elif isinstance(message, Told):
            self._stats = message.stats
        elif isinstance(message, Given):
            behind = self._channel is not None and self._channel.behind
            for event in message.events:
                if (mail := self._streams.get(event.id)) is not None:
                    mail.put(event, behind=behind)
        elif (done := self._embedding.get(message.number)) is not None:
            if not done.done() and isinstance(message, Vectors):
                done.set_result(message.values)
            elif not done.done() and isinstance(message, Refused):
                done.set_exception(RequestError(message.problems))
        elif (mail := self._streams.get(message.number)) is not None and isinstance(message, Refused):
            mail.put(RequestError(message.problems))

    def _lost(self, reason: str) -> None:
        if self._channel is not None:
            self._channel.close()
        self._channel = self.hello = self._stats = None
        self._stands_still = False
        self._there.clear()
        for events in self._streams.values():
            events.put(EngineGone(reason))
        for done in self._embedding.values():
            if not done.done():
                done.set_exception(EngineGone(reason))
