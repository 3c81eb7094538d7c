"""The router: who gets a prompt, what happens when engines go, and what is counted."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass, field

import pytest

from infer.audit import Stats
from infer.completion import Event
from infer.params import SamplingParams
from infer.request import RequestError
from infer.server.engine import AtOnce, EngineGone
from infer.server.router import Router

PARAMS = SamplingParams(max_tokens=4)
LONG = list(range(640))


@dataclass(eq=False)
class Fake:
    """An engine that gives as many tokens as it is let, and fails where it is told to."""

    name: str
    there: bool = True
    works: bool = True
    fails_after: int | None = None
    refuses: bool = False
    answers: bool = True
    gate: asyncio.Event | None = None
    got: list[list[int]] = field(default_factory=list)
    open: int = 0

    async def stream(
        self,
        prompt: Sequence[int],
        params: SamplingParams,
        *,
        priority: int = 0,
        salt: bytes = b"",
        at_once: AtOnce | None = None,
    ) -> AsyncGenerator[Event, None]:
        self.got.append(list(prompt))
        self.open += 1
        try:
            if self.refuses:
                raise RequestError("no")
            for number in range(params.max_tokens):
                if self.fails_after == number:
                    raise EngineGone(self.name)
                if number == 1 and self.gate is not None:
                    await self.gate.wait()
                yield Event(0, 0, text=self.name, tokens=(number,))
                await asyncio.sleep(0)
        finally:
            self.open -= 1

    async def ping(self, timeout_s: float) -> bool:
        await asyncio.sleep(0 if self.answers else timeout_s)
        return self.answers

    def stats(self) -> Stats | None:
        return Stats(1, 2, 0, (3,), (4,), (5,), (0,), (0,), (0,), 0, 7, 8, 9, 0, 0, (1,)) if self.there else None

    async def embed(self, prompts: Sequence[Sequence[int]]) -> Sequence[Sequence[float]]:
        if self.fails_after is not None:
            raise EngineGone(self.name)
        return [[1.0] for _ in prompts]


async def text(router: Router, prompt: Sequence[int] = (1, 2, 3), salt: bytes = b"") -> str:
    return "".join([event.text async for event in router.stream(prompt, PARAMS, salt=salt)])


def test_prompts_with_one_beginning_go_to_one_engine_and_others_elsewhere() -> None:
    async def run() -> None:
        engines = [Fake("a"), Fake("b")]
        router = Router(engines)
        first = (await text(router, LONG))[0]
        for tail in range(5):
            assert (await text(router, [*LONG, tail]))[0] == first
        others = {(await text(router, [7, *LONG, tail]))[0] for tail in range(1)}
        assert others <= {"a", "b"}
        salted = [(await text(router, LONG, salt=b"x"))[0]]
        assert salted, "another key shares nothing, so it goes where there is least to do"

    asyncio.run(run())


def test_a_busy_engine_is_passed_over_even_for_a_known_beginning() -> None:
    async def run() -> None:
        gates = asyncio.Event()
        engines = [Fake("a", gate=gates), Fake("b", gate=gates)]
        router = Router(engines)
        gates.set()
        home = (await text(router, LONG))[0]
        gates.clear()
        tasks = [asyncio.create_task(text(router, LONG)) for _ in range(30)]
        await asyncio.sleep(0.02)
        away = "b" if home == "a" else "a"
        assert {engine.name: engine.open for engine in engines} == {home: 30, away: 0}
        tasks += [asyncio.create_task(text(router, LONG)) for _ in range(60)]
        await asyncio.sleep(0.05)
        assert {engine.name: engine.open for engine in engines} == {home: 45, away: 45}
        gates.set()
        await asyncio.gather(*tasks)
        assert not any(engine.open for engine in engines)

    asyncio.run(run())


def test_work_is_shared_evenly() -> None:
    async def run() -> None:
        gate = asyncio.Event()
        engines = [Fake(name, gate=gate) for name in "abc"]
        router = Router(engines)
        tasks = [asyncio.create_task(text(router, [i, 1, 2])) for i in range(31)]
        await asyncio.sleep(0.02)
        assert sorted(engine.open for engine in engines) == [10, 10, 11]
        gate.set()
        await asyncio.gather(*tasks)

    asyncio.run(run())


def test_a_prompt_goes_to_another_engine_as_long_as_it_has_no_token() -> None:
    async def run() -> None:
        engines = [Fake("a", fails_after=0), Fake("b")]
        router = Router(engines)
        assert [await text(router) for _ in range(6)] == ["bbbb"] * 6
        assert len(engines[0].got) <= 3, "after three failures in a row it is left alone for a while"

    asyncio.run(run())


def test_after_a_token_it_is_lost_and_when_none_is_left() -> None:
    async def run() -> None:
        with pytest.raises(EngineGone, match="a"):
            await text(Router([Fake("a", fails_after=2), Fake("b", there=False)]))
        both = [Fake("a", fails_after=2), Fake("b", fails_after=2)]
        with pytest.raises(EngineGone):
            await text(Router(both))
        assert len(both[0].got) + len(both[1].got) == 1, "tokens cannot be taken back"
        with pytest.raises(EngineGone):
            await text(Router([Fake("a", fails_after=0), Fake("b", fails_after=0)]))
        with pytest.raises(EngineGone):
            await text(Router([Fake("a", there=False)]))

    asyncio.run(run())


def test_a_refused_prompt_is_refused_once() -> None:
    async def run() -> None:
        engines = [Fake("a", refuses=True), Fake("b", refuses=True)]
        with pytest.raises(RequestError):
            await text(Router(engines))
        assert len(engines[0].got) + len(engines[1].got) == 1

    asyncio.run(run())


def test_an_engine_that_stands_still_is_asked_last_and_one_that_flaps_comes_back() -> None:
    async def run() -> None:
        engines = [Fake("a", works=False), Fake("b")]
        router = Router(engines)
        assert {await text(router) for _ in range(4)} == {"bbbb"}
        engines[1].there = False
        assert await text(router) == "aaaa", "better than none"
        engines[0].works, engines[0].fails_after, engines[1].there = True, 0, True
        assert {await text(router) for _ in range(8)} == {"bbbb"}
        engines[0].fails_after = None
        engines[1].there = False
        assert await text(router) == "aaaa"
        engines[1].there = True
        assert {(await text(router, [i]))[0] for i in range(8)} == {"a", "b"}

    asyncio.run(run())


def test_whoever_stops_listening_ends_the_request_and_its_account() -> None:
    async def run() -> None:
        engine = Fake("a", gate=asyncio.Event())
        router = Router([engine, Fake("b", there=False)])
        stream = router.stream(LONG, PARAMS)
        await anext(stream)
        await stream.aclose()
        assert engine.open == 0
        assert router._places[0].work == 0

    asyncio.run(run())


def test_readiness_statistics_and_vectors() -> None:
    async def run() -> None:
        slow, quick = Fake("a", answers=False), Fake("b")
        assert await Router([slow, quick]).ping(5.0)
        assert not await Router([Fake("a", there=False)]).ping(1.0)
        stats = Router([slow, quick]).stats()
        assert stats is not None
        assert (stats.running, stats.waiting, stats.free, stats.hits) == (2, 4, (6,), 18)
        assert Router([Fake("a", there=False)]).stats() is None
        assert await Router([Fake("a", fails_after=0), quick]).embed([[1], [2]]) == [[1.0], [1.0]]

    asyncio.run(run())


def test_what_is_remembered_is_bounded() -> None:
    async def run() -> None:
        router = Router([Fake("a"), Fake("b")], remembered=10)
        for start in range(20):
            await text(router, list(range(start, start + 200)))
        assert len(router._seen) == 10

    asyncio.run(run())
