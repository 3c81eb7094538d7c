"""The engine in a program that does other things meanwhile: a thread makes the steps, coroutines get the events."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import queue
import threading
from collections.abc import AsyncGenerator, Callable, Sequence
from typing import Any

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


@dataclasses.dataclass(slots=True, eq=False)
class _Stream:
    """Who is told the events of a request, and on which loop; ``id`` once the engine has it."""

    loop: asyncio.AbstractEventLoop
    put: Callable[[Event | BaseException], None]
    id: int = 0
    over: bool = False

    def give(self, event: Event | BaseException) -> None:
        """On its loop."""
        if not self.over:
            self.over = isinstance(event, BaseException) or event.completion is not None
            self.put(event)


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
        events = asyncio.Queue[Event | BaseException]()
        end = self.begin(events.put_nowait, prompt, params, **options)
        try:
            while True:
                event = await events.get()
                if isinstance(event, BaseException):
                    raise event
                yield event
                if event.completion is not None:
                    return
        finally:
            end()

    def begin(
        self,
        put: Callable[[Event | BaseException], None],
        prompt: Sequence[int],
        params: SamplingParams | None = None,
        **options: Any,
    ) -> Callable[[], None]:
        """Continue a prompt as :meth:`stream` does, for who is called rather than waits.

        Args:
            put: called on the running loop with each event, or with why there are none; all of a step in one go.
            prompt, params, options: of :meth:`Engine.add`.

        Returns:
            what ends the request; nothing is put after it.
        """
        stream = _Stream(asyncio.get_running_loop(), put)

        def add() -> None:
            try:
                if self._failed is not None:
                    raise self._failed
                stream.id = self.engine.add(prompt, params, **options)
                self._streams[stream.id] = stream
            except BaseException as error:  # noqa: BLE001 - it belongs to whoever asked
                _later(stream.loop, stream.give, error)

        def abort() -> None:
            if self._streams.pop(stream.id, None) is not None:
                self.engine.abort(stream.id)

        def end() -> None:
            if not stream.over:
                stream.over = True
                self._orders.put(abort)

        self._order(add)
        return end

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
            _later(loop, _refuse if isinstance(result, BaseException) else _resolve, done, result)

        call = Call(documents, tell)
        self._order(lambda: self._gather.add(call, urgent=urgent))
        try:
            return await done
        finally:
            call.over = True

    def _order(self, order: Callable[[], None]) -> None:
        self._orders.put(order)
        if self._failed is not None:  # looked at last: who fails looks at the orders last
            raise self._failed

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
        told: dict[asyncio.AbstractEventLoop, list[tuple[_Stream, Event]]] = {}
        for event in events:
            if stream := self._streams.get(event.id):
                told.setdefault(stream.loop, []).append((stream, event))
            if event.completion is not None:
                self._streams.pop(event.id, None)
        for loop, own in told.items():
            _later(loop, _give, own)

    def _run(self) -> None:
        end: BaseException = RuntimeError("the engine was closed")
        try:
            while self._obey():
                self._embed()
                self._tell(self.engine.step())
        except BaseException as error:  # noqa: BLE001 - everybody who waits must hear of it
            end = error
        finally:
            self._end(end)
            self.engine.close()

    def _end(self, error: BaseException) -> None:
        """Tell everybody, also those whose orders nobody has looked at."""
        self._failed = error
        for stream in self._streams.values():
            _later(stream.loop, stream.give, error)
        self._streams.clear()
        while not self._orders.empty():
            if order := self._orders.get():
                order()
        self._gather.fail(error)


def _later(loop: asyncio.AbstractEventLoop, function: Callable[..., None], *arguments: object) -> None:
    """Have it called on a loop, unless that was closed: then nobody waits any more."""
    with contextlib.suppress(RuntimeError):
        loop.call_soon_threadsafe(function, *arguments)


def _give(told: Sequence[tuple[_Stream, Event]]) -> None:
    for stream, event in told:
        stream.give(event)


def _resolve(future: asyncio.Future[Any], value: object) -> None:
    if not future.done():
        future.set_result(value)


def _refuse(future: asyncio.Future[Any], error: BaseException) -> None:
    if not future.done():
        future.set_exception(error)
