"""Several engines with the same model behind one face: each prompt goes where it will have a token soonest."""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections import OrderedDict
from collections.abc import AsyncGenerator, Iterator, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from functools import reduce
from operator import add
from typing import TYPE_CHECKING, Any, Protocol, cast

from infer.params import SamplingParams
from infer.server.engine import AtOnce, EngineGone, ServedEngine

if TYPE_CHECKING:  # these import torch, which a process that only answers clients does not need
    from infer.completion import Event
    from infer.scheduler import Stats

__all__ = ["Backend", "Router"]

_BLOCK = 64
"""Tokens of a prompt that are remembered, or not, together."""
_DECODING = 16
"""Tokens of a prompt that take as long as a request that is being answered holds up the next one."""
_FAILURES = 3
_SHORTEST_S, _LONGEST_S = 1.0, 30.0
"""Pauses of an engine that failed so often, one after the other."""


class Backend(ServedEngine, Protocol):
    """An engine that may be gone, and come again."""

    @property
    def there(self) -> bool:
        """Whether it takes prompts."""
        ...

    @property
    def works(self) -> bool:
        """Whether it made a step when it was last asked to."""
        ...


@dataclass(slots=True, eq=False)
class _Place:
    """What the router knows of an engine.

    Attributes:
        engine: itself.
        waiting: tokens of prompts that have no token yet, and are not in its prefix cache as far as we know.
        running: prompts that are being answered.
        failures: one after the other.
        closed_until: it is not asked before, unless no other is there.
    """

    engine: Backend
    waiting: int = 0
    running: int = 0
    failures: int = 0
    closed_until: float = 0.0

    def failed(self) -> None:
        self.failures += 1
        if self.failures >= _FAILURES:
            pause = min(_SHORTEST_S * 2 ** (self.failures - _FAILURES), _LONGEST_S)
            self.closed_until = time.monotonic() + pause

    @property
    def work(self) -> int:
        return self.waiting + _DECODING * self.running


class Router:
    """Has the face of an engine.

    A prompt costs an engine the tokens that are not in its prefix cache, on top of what it has to do already; it goes
    where the sum is least. What is in the caches is estimated from where prompts went before. If an engine goes before
    it has given a token, the prompt goes to another one; later it is lost, as tokens cannot be taken back.

    Args:
        engines: at least one.
        remembered: blocks of prompts of which the engine is known.
    """

    def __init__(self, engines: Sequence[Backend], *, remembered: int = 1 << 16) -> None:
        self._places = [_Place(engine) for engine in engines]
        self._remembered = remembered
        self._seen: OrderedDict[tuple[bytes, int], None] = OrderedDict()
        self._turn = 0

    async def stream(
        self,
        prompt: Sequence[int],
        params: SamplingParams,
        *,
        priority: int = 0,
        salt: bytes = b"",
        at_once: AtOnce | None = None,
    ) -> AsyncGenerator[Event, None]:
        """As :class:`~infer.server.engine.ServedEngine`.

        Raises:
            RequestError: it cannot be continued.
            EngineGone: there is no engine, or the one that continued it has gone.
        """
        blocks = list(_blocks(prompt, salt)) if len(self._places) > 1 else []
        tried: set[int] = set()
        while True:
            index = self._choose(len(prompt), blocks, tried)
            tried.add(index)
            begun = False
            try:
                given = {"priority": priority, "salt": salt, "at_once": at_once}
                async with aclosing(self._on(index, prompt, params, blocks, given)) as events:
                    async for event in events:
                        begun = True
                        yield event
                return
            except EngineGone:
                self._places[index].failed()
                if begun or len(tried) == len(self._places):
                    raise

    async def embed(self, prompts: Sequence[Sequence[int]]) -> Sequence[Sequence[float]]:
        """As :class:`~infer.server.engine.Embeds`, if the engines do.

        Raises:
            RequestError: they cannot be embedded.
            EngineGone: there is no engine.
        """
        tried: set[int] = set()
        tokens = sum(map(len, prompts))
        while True:
            index = self._choose(tokens, (), tried)
            tried.add(index)
            place = self._places[index]
            place.waiting += tokens
            try:
                vectors = await cast("Any", place.engine).embed(prompts)
                place.failures, place.closed_until = 0, 0.0
                return vectors
            except EngineGone:
                place.failed()
                if len(tried) == len(self._places):
                    raise
            finally:
                place.waiting -= tokens

    async def ping(self, timeout_s: float) -> bool:
        """Whether any engine made a step when it was asked to."""
        asked = [asyncio.create_task(self._ping(place, timeout_s)) for place in self._places]
        try:
            for done in asyncio.as_completed(asked):
                if await done:
                    return True
            return False
        finally:
            for task in asked:
                task.cancel()

    def stats(self) -> Stats | None:
        """The sums over all engines; None: of none they are known."""
        known = [stats for place in self._places if (stats := place.engine.stats()) is not None]
        if not known:
            return None
        return reduce(add, known)

    @staticmethod
    async def _ping(place: _Place, timeout_s: float) -> bool:
        return place.engine.there and await place.engine.ping(timeout_s)

    async def _on(
        self,
        index: int,
        prompt: Sequence[int],
        params: SamplingParams,
        blocks: Sequence[bytes],
        given: dict[str, Any],
    ) -> AsyncGenerator[Event, None]:
        """On this engine, with the accounts of what it has to do."""
        place = self._places[index]
        new = len(prompt) - self._known(index, blocks)
        self._remember(index, blocks)
        place.waiting += new
        waits = True
        stream = place.engine.stream(prompt, params, **given)
        try:
            async with aclosing(cast("AsyncGenerator[Event, None]", stream)) as events:
                async for event in events:
                    if waits:
                        waits, place.failures, place.closed_until = False, 0, 0.0
                        place.waiting, place.running = place.waiting - new, place.running + 1
                    yield event
        finally:
            if waits:
                place.waiting -= new
            else:
                place.running -= 1

    def _choose(self, tokens: int, blocks: Sequence[bytes], tried: set[int]) -> int:
        """Where a prompt has least before it; of equals, the next in turn."""
        now, count = time.monotonic(), len(self._places)
        there = [i for i, place in enumerate(self._places) if i not in tried and place.engine.there]
        if not there:
            raise EngineGone("no engine is there")
        places = self._places
        open_ = [i for i in there if places[i].closed_until <= now and places[i].engine.works] or there
        self._turn += 1

        def cost(index: int) -> tuple[int, int]:
            new = tokens - self._known(index, blocks)
            return self._places[index].work + new, (index - self._turn) % count

        return min(open_, key=cost)

    def _known(self, index: int, blocks: Sequence[bytes]) -> int:
        """Tokens of a prompt that this engine has seen before."""
        found = 0
        for block in blocks:
            if (block, index) not in self._seen:
                break
            found += _BLOCK
        return found

    def _remember(self, index: int, blocks: Sequence[bytes]) -> None:
        for block in reversed(blocks):  # the ends of prompts are forgotten first
            self._seen[block, index] = None
            self._seen.move_to_end((block, index))
        while len(self._seen) > self._remembered:
            self._seen.popitem(last=False)


def _blocks(prompt: Sequence[int], salt: bytes) -> Iterator[bytes]:
    """A hash of each whole block of a prompt and all before it."""
    before = hashlib.blake2b(salt, digest_size=16).digest()
    for start in range(0, len(prompt) - _BLOCK + 1, _BLOCK):
        digest = hashlib.blake2b(before, digest_size=16)
        digest.update(b"".join(token.to_bytes(8, "little", signed=True) for token in prompt[start : start + _BLOCK]))
        before = digest.digest()
        yield before
