"""From prompts to an answer, whole or as a stream, in whatever shape a route gives it."""

from __future__ import annotations

import asyncio
import time
from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator, Iterator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, cast

from infer.params import SamplingParams
from infer.server.engine import AtOnce, ServedEngine
from infer.server.errors import ApiError
from infer.server.exchange import Exchange
from infer.server.flight import Ended
from infer.server.server import Server

if TYPE_CHECKING:
    from infer.completion import Choice, Completion, Event
    from infer.sampling import TokenLogProb

__all__ = ["Form", "Tally", "Work", "Written", "answer"]


@dataclass(frozen=True, slots=True)
class Work:
    """What a request asks of the engine.

    Attributes:
        prompts: token ids of each.
        params: of each prompt.
        param: the field that the prompts come from.
        silent: what is generated is not wanted (of a prompt that is only to be scored).
    """

    prompts: Sequence[Sequence[int]]
    params: Sequence[SamplingParams]
    param: str
    silent: bool = False

    @property
    def n(self) -> int:
        """Choices of each prompt."""
        return self.params[0].n


@dataclass(slots=True)
class Written:
    """A choice as far as it was told in events."""

    index: int
    tokens: list[int] = field(default_factory=list)
    logprobs: list[TokenLogProb] = field(default_factory=list)
    pieces: list[str] = field(default_factory=list)
    finish_reason: str = "abort"
    when: float = 0.0

    @property
    def text(self) -> str:
        """All of it."""
        return "".join(self.pieces)


class Tally:
    """What the engine has told so far.

    Args:
        work: that it was asked for.
    """

    def __init__(self, work: Work) -> None:
        self.work = work
        self.completions: dict[int, Completion] = {}
        self.written = [[Written(index) for index in range(work.n)] for _ in work.prompts]

    def take(self, place: int, event: Event) -> None:
        """Of the prompt at this place."""
        if event.completion is not None:
            self.completions[place] = event.completion
        if event.choice < self.work.n:  # else one of those of which the best are told in the end
            own = self.written[place][event.choice]
            own.tokens += event.tokens
            own.logprobs += event.logprobs
            own.pieces.append(event.text)
            own.finish_reason = event.finish_reason or own.finish_reason

    def choices(self, place: int) -> Sequence[Choice | Written]:
        """Of the prompt at this place."""
        whole = self.completions.get(place)
        return self.written[place] if whole is None else whole.choices

    @property
    def cached(self) -> int:
        """Prompt tokens that were not computed."""
        return sum(completion.cached for completion in self.completions.values())

    @property
    def prompt_tokens(self) -> int:
        """Of all prompts."""
        return sum(map(len, self.work.prompts))

    @property
    def generated(self) -> int:
        """Tokens of all choices."""
        if self.work.silent:
            return 0
        return sum(len(choice.tokens) for place in range(len(self.work.prompts)) for choice in self.choices(place))

    def usage(self) -> dict[str, Any]:
        """As OpenAI tells it."""
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.generated,
            "total_tokens": self.prompt_tokens + self.generated,
            "prompt_tokens_details": {"cached_tokens": self.cached},
        }


class Form(ABC):
    """The shape of an answer.

    Args:
        id: of the answer.
        model: its name.
        usage: whether a stream tells the number of tokens at its end.
    """

    whole_kind: str
    chunk_kind: str
    named = False
    """The events of a stream have names, and tell themselves that it ends."""

    def __init__(self, id: str, model: str, *, usage: bool) -> None:
        self.id, self.model, self.with_usage, self.created = id, model, usage, int(time.time())

    def take(self, place: int, event: Event) -> None:  # noqa: B027 - most need not know before they are asked
        """Learn of an event, in a stream or not."""

    @abstractmethod
    def opening(self, place: int) -> Iterator[dict[str, Any]]:
        """The choices with which a stream begins, once the prompt at this place has a token."""

    @abstractmethod
    def pieces(self, place: int, event: Event) -> Iterator[dict[str, Any]]:
        """The choices in which an event is told."""

    @abstractmethod
    def cut(self, place: int, choice: int) -> Iterator[dict[str, Any]]:
        """The choices that say that one was aborted."""

    @abstractmethod
    def choices(self, tally: Tally) -> list[dict[str, Any]]:
        """All choices, whole."""

    def chunk(self, choice: dict[str, Any]) -> dict[str, Any]:
        """A part of a stream."""
        value = {"id": self.id, "object": self.chunk_kind, "created": self.created, "model": self.model}
        return {**value, "choices": [choice], **({"usage": None} if self.with_usage else {})}

    def last(self, tally: Tally) -> dict[str, Any]:
        """The part of a stream that tells the number of tokens."""
        value = {"id": self.id, "object": self.chunk_kind, "created": self.created, "model": self.model}
        return {**value, "choices": [], "usage": self.usage(tally)}

    def closing(self, tally: Tally) -> Iterator[dict[str, Any]]:
        """The parts with which a stream ends."""
        if self.with_usage:
            yield self.last(tally)

    def failing(self, error: ApiError) -> Iterator[dict[str, Any]]:
        """The parts with which a stream ends that has failed."""
        yield error.body()

    def usage(self, tally: Tally) -> dict[str, Any]:
        """The number of tokens."""
        return tally.usage()

    def whole(self, tally: Tally) -> dict[str, Any]:
        """An answer that is no stream."""
        value = {"id": self.id, "object": self.whole_kind, "created": self.created, "model": self.model}
        return {**value, "choices": self.choices(tally), "usage": self.usage(tally)}


async def answer(server: Server, exchange: Exchange, work: Work, form: Form, *, stream: bool) -> None:
    """Have the engine continue the prompts, and tell the client.

    Raises:
        ApiError: 429, 503, 504, or the engine failed on a prompt.
        RequestError: the engine refuses a prompt.
        EngineGone: there is no engine.
        Ended, Left: the client is gone.
    """
    await server.check_forms(work.params)
    telling = _Telling(server, exchange, form, Tally(work), stream)
    exchange.failing = form.failing
    tokens = [len(prompt) for prompt in work.prompts]
    try:
        with server.admission.seat(tokens, work.param) as seat:
            alone = len(work.prompts) == 1
            merged = _merged(server.engine, work, exchange.salt)
            single = _events(server.engine, work, 0, exchange.salt, telling.at_once)
            source: AsyncGenerator[Any, None] = single if alone else merged
            async with server.flight(exchange) as flight, aclosing(source) as given:
                async for one in given:
                    place, event = (0, one) if alone else one
                    seat.begun(place)
                    flight.begun()
                    await telling.take(place, event)
    except Ended as ended:
        if ended.reason == "queue":
            exchange.outcome = "deadline"
            raise server.unavailable("no token within the time that a request may wait", "queue_deadline") from None
        if ended.reason == "deadline":
            exchange.outcome = "deadline"
            raise ApiError(504, f"no answer within {server.config.deadline_s:g} s") from None
        if ended.reason != "abort":
            raise
        exchange.outcome = "failed"
        await telling.cut()
    await telling.end()


class _Telling:
    """Tells a client what the engine tells."""

    def __init__(self, server: Server, exchange: Exchange, form: Form, tally: Tally, stream: bool) -> None:
        self.metrics, self.exchange, self.form, self.tally, self.stream = server.metrics, exchange, form, tally, stream
        self._opened: set[int] = set()

    def at_once(self, event: Event) -> bool:
        """As :meth:`take`, of the only prompt, where nothing has to be waited for; otherwise False, and nothing."""
        if event.finish_reason is not None or event.completion is not None:
            return False
        if self.stream and not (self._opened and self.exchange.flows):
            return False
        self._note(0, event)
        if self.stream:
            chunks = [self.form.chunk(choice) for choice in self.form.pieces(0, event)]
            self.exchange.pour(chunks, named=self.form.named)
        return True

    async def take(self, place: int, event: Event) -> None:
        self._note(place, event)
        if event.finish_reason == "error":
            raise ApiError(500, "the model failed on this prompt", code="generation_failed")
        if self.stream:
            await self._open(place)
            for choice in self.form.pieces(place, event):
                await self._tell(choice)

    async def cut(self) -> None:
        """End what has not ended."""
        if not self.stream:
            return
        for place, choices in enumerate(self.tally.written):
            await self._open(place)
            for choice in choices:
                if choice.finish_reason == "abort":
                    for part in self.form.cut(place, choice.index):
                        await self._tell(part)

    async def end(self) -> None:
        tally, metrics = self.tally, self.metrics
        metrics.prompt_tokens += tally.prompt_tokens
        metrics.cached_tokens += tally.cached
        metrics.generated_tokens += tally.generated
        if not self.stream:
            await self.exchange.json(self.form.whole(tally))
            return
        for part in self.form.closing(tally):
            await self.exchange.event(part, named=self.form.named)
        await self.exchange.done(mark=not self.form.named)

    async def _tell(self, choice: dict[str, Any]) -> None:
        await self.exchange.event(self.form.chunk(choice), named=self.form.named)

    async def _open(self, place: int) -> None:
        if place not in self._opened:
            self._opened.add(place)
            for choice in self.form.opening(place):
                await self._tell(choice)

    def _note(self, place: int, event: Event) -> None:
        self._measure(place, event)
        self.tally.take(place, event)
        if event.choice < self.tally.work.n:
            self.form.take(place, event)

    def _measure(self, place: int, event: Event) -> None:
        if event.choice >= self.tally.work.n or not event.tokens:
            return
        now, own = time.monotonic(), self.tally.written[place][event.choice]
        if own.when:
            count = len(event.tokens)
            self.metrics.each.observe((now - own.when) / count, count)
        else:
            self.metrics.first.observe(now - self.exchange.arrived)
        own.when = now


async def _merged(engine: ServedEngine, work: Work, salt: bytes) -> AsyncGenerator[tuple[int, Event], None]:
    """The events of all prompts, with their places, as they come."""
    queue = asyncio.Queue[tuple[int, "Event | BaseException | None"]]()

    async def pump(place: int) -> None:
        try:
            async with aclosing(_events(engine, work, place, salt)) as events:
                async for event in events:
                    queue.put_nowait((place, event))
            queue.put_nowait((place, None))
        except Exception as error:  # noqa: BLE001 - it belongs to whoever asked
            queue.put_nowait((place, error))

    tasks = [asyncio.create_task(pump(place)) for place in range(len(work.prompts))]
    left = len(tasks)
    try:
        while left:
            place, event = await queue.get()
            if isinstance(event, BaseException):
                raise event
            if event is None:
                left -= 1
            else:
                yield place, event
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def _events(
    engine: ServedEngine, work: Work, place: int, salt: bytes, at_once: AtOnce | None = None
) -> AsyncGenerator[Event, None]:
    events = engine.stream(work.prompts[place], work.params[place], priority=0, salt=salt, at_once=at_once)
    return cast("AsyncGenerator[Event, None]", events)
