"""Vectors of many callers at once: what is computed together, who goes first, and whose fault a refusal is."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import pytest

from infer.aio import AsyncEngine
from infer.gather import Call, Gather
from infer.request import RequestError


def call_of(*lengths: int) -> Call:
    return Call([[7] * length for length in lengths], lambda _result: None)


def drawn(gather: Gather, names: dict[Call, str]) -> list[str]:
    """What is computed together, one word for each time: the callers and the places of their documents."""
    found = []
    while taken := gather.take():
        found.append(" ".join(f"{names[call]}{place}" for call, place in taken))
    return found


def test_callers_take_turns_within_the_budget() -> None:
    many, one, other, ended, pressing = call_of(4, 4, 4, 4, 30, 2), call_of(3), call_of(5, 1), call_of(9), call_of(1)
    names = {many: "m", one: "a", other: "b", ended: "e", pressing: "p"}
    gather = Gather(12)
    for call in (many, one, ended, other):
        gather.add(call)
    ended.over = True
    gather.add(pressing, urgent=True)
    assert gather.documents == 10
    assert drawn(gather, names) == ["p0 m0 a0", "b0 m1 b1", "m2 m3", "m4", "m5"]
    assert not gather and gather.documents == 0


def test_the_results_of_a_call_are_in_its_order_and_told_once() -> None:
    told: list[Any] = []
    call = Call([[1], [2], [3]], told.append)
    for place in (2, 0, 1):
        assert not told
        call.give(place, [float(place)])
    call.end(ValueError())
    assert told == [[[0.0], [1.0], [2.0]]]


class Engine:
    """Its vectors are the sums of documents; -1 is refused, -2 breaks it; it computes when it is let to."""

    busy, stats = False, None

    def __init__(self) -> None:
        self.given: list[list[list[int]]] = []
        self.go, self.inside = threading.Semaphore(0), threading.Event()

    def embed(self, documents: Sequence[Sequence[int]]) -> list[list[float]]:
        bad = [f"document {place} is bad" for place, ids in enumerate(documents) if -1 in ids]
        if bad:
            raise RequestError(bad)
        self.inside.set()
        self.go.acquire()
        self.given.append([list(ids) for ids in documents])
        if any(-2 in ids for ids in documents):
            raise ArithmeticError("broken")
        return [[float(sum(ids))] for ids in documents]

    def step(self) -> list[Any]:
        return []

    def close(self) -> None:
        pass


def together(engine: Engine, main: Callable[[AsyncEngine], Awaitable[None]], budget: int = 100) -> None:
    async def run() -> None:
        async with AsyncEngine(engine, budget=budget) as running:  # type: ignore[arg-type]
            try:
                await main(running)
            finally:
                engine.go.release(1000)

    asyncio.run(asyncio.wait_for(run(), 20))


async def begun(engine: Engine, running: AsyncEngine, *calls: list[list[int]]) -> list[asyncio.Task[list[list[float]]]]:
    """Calls that wait behind one that is being computed."""
    tasks = [asyncio.create_task(running.embed([[0]]))]
    await asyncio.to_thread(engine.inside.wait)
    for call in calls:
        tasks.append(asyncio.create_task(running.embed(call)))
        await asyncio.sleep(0)
    return tasks


def test_what_waits_is_computed_together() -> None:
    engine = Engine()

    async def main(running: AsyncEngine) -> None:
        tasks = await begun(engine, running, *([[number] * 3] for number in range(1, 11)), [[20], [30] * 2])
        engine.go.release(3)
        assert await asyncio.gather(*tasks) == [[[0.0]], *([[3.0 * n]] for n in range(1, 11)), [[20.0], [60.0]]]
        assert [len(given) for given in engine.given] == [1, 6, 6]
        assert await running.embed([]) == []

    together(engine, main, budget=20)


def test_a_refusal_is_of_its_caller_alone() -> None:
    engine = Engine()

    async def main(running: AsyncEngine) -> None:
        tasks = await begun(engine, running, [[1], [2]], [[3], [4], [5, -1], [6], [-1]], [[7]])
        engine.go.release(100)
        found = await asyncio.gather(*tasks, return_exceptions=True)
        assert found[1] == [[1.0], [2.0]] and found[3] == [[7.0]]
        assert isinstance(found[2], RequestError)
        assert found[2].problems == ("document 2 is bad", "document 4 is bad")
        assert max(map(len, engine.given)) <= 2, "nobody else's documents are computed at once because of it"

    together(engine, main)


def test_a_caller_that_leaves_takes_its_documents_along() -> None:
    engine = Engine()

    async def main(running: AsyncEngine) -> None:
        first, gone, stays = await begun(engine, running, [[1]] * 9, [[2]])
        gone.cancel()
        await asyncio.wait([gone])
        engine.go.release(100)
        assert (await first, await stays) == ([[0.0]], [[2.0]])
        assert [[1]] not in engine.given and sum(map(len, engine.given)) == 2

    together(engine, main)


def test_an_engine_that_breaks_tells_all_who_wait() -> None:
    engine = Engine()

    async def main(running: AsyncEngine) -> None:
        tasks = await begun(engine, running, [[-2] * 8], [[3] * 8], [[4] * 20, [5]])
        engine.go.release(100)
        first, *others = await asyncio.gather(*tasks, return_exceptions=True)
        assert first == [[0.0]]
        assert [type(other) for other in others] == [ArithmeticError] * 3
        with pytest.raises(ArithmeticError):
            await running.embed([[1]])

    together(engine, main, budget=20)
