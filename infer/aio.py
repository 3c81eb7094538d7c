"""The engine in a program that does other things meanwhile: a thread makes the steps, coroutines get the events."""

from __future__ import annotations

import asyncio
import dataclasses
import queue
import threading
from collections.abc import AsyncGenerator, Callable, Sequence
from typing import Any, NamedTuple

from infer.completion import Completion, Event
from infer.engine import Engine
from infer.gather import Call, Gather
from infer.lockstep import Replica
from infer.params import SamplingParams
from infer.request import RequestError
from infer.scheduler import Stats
from infer.vectors import VectorEngine
from parallel.native import let_go_of_threads

__all__ = ["AsyncEngine"]


class _Stream(NamedTuple):
    """Who waits for the events of a request, and on which loop."""

    loop: asyncio.AbstractEventLoop
    events: asyncio.Queue[Event | BaseException]


class AsyncEngine:
    """Continues prompts for many coroutines at once; ``async with`` starts and ends it.

    Args:
        engine: on a single rank, or the first rank of a :class:`Replica`; only this may use it meanwhile.
        pulse_s: an idle engine of several ranks makes an empty step so often.
        budget: tokens of documents that are embedded at a time, between two steps.
    """

    def __init__(self, engine: Engine | Replica | VectorEngine, *, pulse_s: float = 5.0, budget: int = 2048) -> None:
        self.engine, self._pulse_s = engine, pulse_s
        self._orders: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._streams: dict[int, _Stream] = {}
        self._gather = Gather(budget)
        self._failed: BaseException | None = None
        self._thread = threading.Thread(target=self._run, daemon=True, name="engine loop")

    @property
    def stats(self) -> Stats:
        """Of the engine; documents that are not embedded yet wait."""
        stats = self.engine.stats
        return dataclasses.replace(stats, waiting=stats.waiting + self._gather.documents)

    async def __aenter__(self) -> AsyncEngine:
        let_go_of_threads()
        self._thread.start()
        return self

    async def __aexit__(self, *error: object) -> None:
        self._orders.put(None)
        await asyncio.to_thread(self._thread.join)

    async def stream(
        self, prompt: Sequence[int], params: SamplingParams | None = None, **options: Any
    ) -> AsyncGenerator[Event, None]:
        """Continue a prompt, piece by piece; the last event has the whole. Whoever stops listening ends the request.

        Args:
            prompt, params, options: of :meth:`Engine.add`.

        Raises:
            RequestError: it cannot be continued, with every reason.
        """
        loop, events = asyncio.get_running_loop(), asyncio.Queue[Event | BaseException]()
        number: asyncio.Future[int] = loop.create_future()

        def order() -> None:
            try:
                id = self.engine.add(prompt, params, **options)
                self._streams[id] = _Stream(loop, events)
                loop.call_soon_threadsafe(_resolve, number, id)
            except BaseException as error:  # noqa: BLE001 - it belongs to whoever asked
                loop.call_soon_threadsafe(_refuse, number, error)

        self._order(order)
        try:
            while True:
                event = await events.get() if number.done() else await self._first(number, events)
                if isinstance(event, BaseException):
                    raise event
                yield event
                if event.completion is not None:
                    return
        finally:
            if not number.cancelled():
                self._order(lambda: self._abort(number))

    async def generate(self, prompt: Sequence[int], params: SamplingParams | None = None, **options: Any) -> Completion:
        """Continue a prompt; arguments and errors as those of :meth:`stream`."""
        async for event in self.stream(prompt, params, **options):
            if event.completion is not None:
                return event.completion
        raise AssertionError("a stream ends with a completion")

    async def embed(self, documents: Sequence[Sequence[int]], *, urgent: bool = False) -> list[list[float]]:
        """As :meth:`Engine.embed`, together with what others want meanwhile; whoever stops waiting ends the rest of it.

        Args:
            documents: token ids of each.
            urgent: before all that wait.

        Raises:
            RequestError: these documents cannot be embedded, with every reason.
        """
        if not documents:
            return []
        loop = asyncio.get_running_loop()
        done: asyncio.Future[list[list[float]]] = loop.create_future()

        def tell(result: Any) -> None:
            loop.call_soon_threadsafe(_refuse if isinstance(result, BaseException) else _resolve, done, result)

        call = Call(documents, tell)
        self._order(lambda: self._gather.add(call, urgent=urgent))
        try:
            return await done
        finally:
            call.over = True

    async def _first(self, number: asyncio.Future[int], events: asyncio.Queue[Event | BaseException]) -> Any:
        await asyncio.shield(number)
        return await events.get()

    def _order(self, order: Callable[[], None]) -> None:
        if self._failed is not None:
            raise self._failed
        self._orders.put(order)

    def _abort(self, number: asyncio.Future[int]) -> None:
        if number.done() and not number.exception():
            self._streams.pop(number.result(), None)
            self.engine.abort(number.result())

    def _obey(self) -> bool:
        """Do what was ordered meanwhile; with nothing else to do, wait for an order. False: the order was to end."""
        wait = not self.engine.busy and not self._gather
        while wait or not self._orders.empty():
            try:
                order = self._orders.get(timeout=self._pulse_s)
            except queue.Empty:
                return True
            if order is None:
                return False
            order()
            wait = not self.engine.busy and not self._gather and not isinstance(self.engine, Replica)
        return True

    def _embed(self) -> None:
        """Embed some of the documents that wait."""
        taken = self._gather.take()
        if not taken:
            return
        try:
            try:
                vectors = self.engine.embed([call.documents[place] for call, place in taken])
            except RequestError:
                self._embed_apart(taken)
                return
        except BaseException as error:
            for call, _ in taken:
                call.end(error)
            raise
        for (call, place), vector in zip(taken, vectors, strict=True):
            call.give(place, vector)

    def _embed_apart(self, taken: Sequence[tuple[Call, int]]) -> None:
        """At least one of these cannot be embedded: tell its caller, with all that is wrong with the whole call."""
        for call, place in taken:
            if call.over:
                continue
            try:
                (vector,) = self.engine.embed([call.documents[place]])
            except RequestError:
                try:
                    self.engine.embed(call.documents)  # refused before anything is computed
                except RequestError as error:
                    call.end(error)
            else:
                call.give(place, vector)

    def _tell(self, events: Sequence[Event]) -> None:
        """Give events to those who wait for them: a loop is woken once a step, not once an event."""
        told: dict[asyncio.AbstractEventLoop, list[tuple[asyncio.Queue[Event | BaseException], Event]]] = {}
        for event in events:
            if stream := self._streams.get(event.id):
                told.setdefault(stream.loop, []).append((stream.events, event))
            if event.completion is not None:
                self._streams.pop(event.id, None)
        for loop, own in told.items():
            loop.call_soon_threadsafe(_put, own)

    def _run(self) -> None:
        try:
            while True:
                if not self._obey():
                    return
                self._embed()
                self._tell(self.engine.step())
        except BaseException as error:  # noqa: BLE001 - everybody who waits must hear of it
            self._failed = error
            for stream in list(self._streams.values()):
                stream.loop.call_soon_threadsafe(stream.events.put_nowait, error)
            self._gather.fail(error)
        finally:
            self.engine.close()


def _put(told: Sequence[tuple[asyncio.Queue[Event | BaseException], Event]]) -> None:
    for events, event in told:
        events.put_nowait(event)


def _resolve(future: asyncio.Future[Any], value: object) -> None:
    if not future.done():
        future.set_result(value)


def _refuse(future: asyncio.Future[Any], error: BaseException) -> None:
    if not future.done():
        future.set_exception(error)
