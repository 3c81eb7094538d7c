"""The engine's end of the channel: prompts in, events out."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from functools import partial

from infer.aio import AsyncEngine
from infer.completion import Event
from infer.params import SamplingParams
from infer.request import RequestError
from infer.scheduler import Stats
from infer.server.wire import (
    Add,
    Channel,
    ChannelError,
    Embed,
    Given,
    Hello,
    Refused,
    ToEngine,
    Told,
    Vectors,
    pack,
    unpack,
)

__all__ = ["Worker"]

_TELL_S = 0.25


class Worker:
    """Carries out what comes over a channel, until it closes.

    Args:
        channel: to the HTTP process.
        engine: started.
        hello: what to say first.
        stats: of the scheduler.
    """

    def __init__(self, channel: Channel, engine: AsyncEngine, hello: Hello, stats: Callable[[], Stats]) -> None:
        self._channel, self._engine, self._hello, self._stats = channel, engine, hello, stats
        self._tasks: dict[int, asyncio.Task[None]] = {}
        self._ends: dict[int, Callable[[], None]] = {}
        self._given: list[Event] = []
        self._failed: BaseException | None = None

    async def run(self) -> None:
        """Return when the other end has closed the channel; all prompts are aborted then.

        Raises:
            BaseException: whatever the engine raised.
        """
        self._channel.send(pack(self._hello))
        telling = asyncio.create_task(self._tell())
        orders = asyncio.create_task(self._obey())
        try:
            await asyncio.wait([telling, orders], return_when=asyncio.FIRST_COMPLETED)
            for task in (orders, telling):
                if task.done() and not isinstance(task.exception(), ChannelError | None):
                    task.result()
            if self._failed is not None:
                raise self._failed
        finally:
            for end in self._ends.values():
                end()
            tasks = [telling, orders, *self._tasks.values()]
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            self._channel.close()

    async def _obey(self) -> None:
        while True:
            order = unpack(await self._channel.receive(), ToEngine)
            if isinstance(order, Add):
                self._continue(order)
            elif isinstance(order, Embed):
                self._tasks[order.number] = asyncio.create_task(self._embed(order))
            elif (end := self._ends.pop(order.number, None)) is not None:
                end()
            elif (task := self._tasks.get(order.number)) is not None:
                task.cancel()

    def _continue(self, order: Add) -> None:
        put, options = partial(self._put, order.number), {"priority": order.priority, "salt": order.salt}
        try:
            params = SamplingParams.from_json(order.params)
            self._ends[order.number] = self._engine.begin(put, order.prompt, params, **options)
        except Exception as error:  # noqa: BLE001 - told as those that come later
            put(error)

    def _put(self, number: int, event: Event | BaseException) -> None:
        """Queue what a step gave; all of it is one message, but for the ends of requests, which may be large."""
        if isinstance(event, BaseException) or event.completion is not None:
            self._ends.pop(number, None)
            self._give()
        if isinstance(event, RequestError):
            self._channel.send(pack(Refused(number, list(event.problems))))
        elif isinstance(event, TypeError | KeyError):
            self._channel.send(pack(Refused(number, [f"parameters: {event}"])))
        elif isinstance(event, BaseException):  # the engine is done for, and with it this process
            self._failed = event
            self._channel.close()
        else:
            if not self._given:
                asyncio.get_running_loop().call_soon(self._give)
            self._given.append(event._replace(id=number))
            if event.completion is not None:
                self._give()

    def _give(self) -> None:
        if self._given:
            given, self._given = self._given, []
            self._channel.send(pack(Given(given)))

    async def _embed(self, order: Embed) -> None:
        try:
            vectors = await self._engine.embed(order.documents, urgent=order.urgent)
            self._channel.send(pack(Vectors(order.number, vectors)))
            await self._channel.drain()
        except RequestError as error:
            self._channel.send(pack(Refused(order.number, list(error.problems))))
        except ChannelError:
            pass
        except Exception as error:  # noqa: BLE001 - as above
            self._failed = error
            self._channel.close()
        finally:
            self._tasks.pop(order.number, None)

    async def _tell(self) -> None:
        before: Stats | None = None
        while self._failed is None:
            now = self._stats()
            if now != before:
                self._channel.send(pack(Told(now)))
                await self._channel.drain()
            before = now
            await asyncio.sleep(_TELL_S)
