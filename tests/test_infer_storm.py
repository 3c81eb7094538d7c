"""Random operations lose no page and no request, and nobody reads what is not its own; a broken scheduler is seen."""

from __future__ import annotations

import hashlib
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule
from storm import WORLDS, World, run_storm, storm

import infer.prefix
import infer.running
from infer.pages import Pool
from infer.preemption import Preemption
from infer.running import Running
from infer.scheduler import Scheduler
from infer.step import Moves, Step
from infer.tiers import Memory


@pytest.mark.parametrize("asynchronous", [False, True])
@pytest.mark.parametrize("world", WORLDS)
def test_random_operations_lose_nothing(world: str, asynchronous: bool) -> None:
    """The short form of `python tests/storm.py`."""
    storm(1, world, asynchronous, 150)


def steps_of_a_storm() -> str:
    """A digest of every step of one."""
    seen = hashlib.sha256()

    class Noted(World):
        def step(self) -> None:
            super().step()
            if self.flights:
                step = self.flights[-1].step
                text = [one.id for one in step.requests], step.stops_R.tolist(), step.rows_R.tolist(), step.moves
                seen.update(repr(text).encode())

    config, groups = WORLDS["both"]
    made = Noted(5, config, groups, True)
    run_storm(made, 200)
    return seen.hexdigest()


def test_every_rank_comes_to_the_same_steps() -> None:
    """In another process, with other hashes of strings."""
    code = "import sys; sys.path.insert(0, 'tests'); import test_infer_storm as t; print(t.steps_of_a_storm())"
    root = Path(__file__).resolve().parent.parent
    other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=root)
    assert other.stdout.strip() == steps_of_a_storm()


class Stormy(RuleBasedStateMachine):
    """Hypothesis looks for a short sequence of operations that fails."""

    world: World

    @initialize(chance=st.randoms(use_true_random=False), name=st.sampled_from(list(WORLDS)), ahead=st.booleans())
    def begin(self, chance: random.Random, name: str, ahead: bool) -> None:
        config, groups = WORLDS[name]
        self.world = World(0, config, groups, ahead)
        self.world.random = chance

    @rule(external=st.booleans())
    def submit(self, external: bool) -> None:
        self.world.submit(external)

    @rule(count=st.integers(1, 6))
    def step(self, count: int) -> None:
        for _ in range(count):
            self.world.step()
            self.world.check()

    @rule(name=st.sampled_from(["extend", "fork", "abort", "preempt", "commit", "spoil"]))
    def other(self, name: str) -> None:
        getattr(self.world, name)()

    @invariant()
    def nothing_is_lost(self) -> None:
        if hasattr(self, "world"):
            self.world.check()

    def teardown(self) -> None:
        if hasattr(self, "world"):
            self.world.drain()


Stormy.TestCase.settings = settings(max_examples=25, stateful_step_count=25, deadline=None, derandomize=True)
TestStormy = Stormy.TestCase


def without(kind: str) -> Callable[[pytest.MonkeyPatch], None]:
    """Moves of one kind are forgotten."""

    def broken(patch: pytest.MonkeyPatch) -> None:
        finish_plan = Memory.finish_plan
        patch.setattr(Memory, "finish_plan", lambda self: Moves._replace(finish_plan(self), **{kind: ()}))

    return broken


def around(owner: type, name: str, change: Callable[..., Any]) -> Callable[[pytest.MonkeyPatch], None]:
    """``owner.name`` becomes ``change``, which is given the right one first."""

    def broken(patch: pytest.MonkeyPatch) -> None:
        right = getattr(owner, name)
        patch.setattr(owner, name, lambda *given, **named: change(right, *given, **named))

    return broken


def no_salt(patch: pytest.MonkeyPatch) -> None:
    root = infer.prefix._root
    patch.setattr(infer.prefix, "_root", lambda salt, size: root(b"", size))


def narrow_window(patch: pytest.MonkeyPatch) -> None:
    first = infer.running.first_page
    patch.setattr(infer.running, "first_page", lambda window, position, size: first(window, position + size, size))


def forgets_one_page(right: Callable, pool: Pool, pages: Any) -> None:
    right(pool, list(pages)[1:])


def keeps_too_much(right: Callable, running: Running, request: Any, stop: int) -> None:
    right(running, request, min(stop + running.page_size - 1, len(request.tokens)))


def takes_a_used_page(right: Callable, memory: Memory, group: int, source: int) -> int:
    page = right(memory, group, source)
    memory._copies.pop((group, page))
    memory.device[group].release([source])
    return page


def wrong_source(right: Callable, scheduler: Scheduler, step: Step) -> bool:
    plain = right(scheduler, step)
    scheduler.running.rows.given_at[:] = 0
    return plain


def loses_the_request(right: Callable, preemption: Any, request: Any, number: int) -> None:
    right(preemption, request, number)
    preemption.queue.remove(request)


def unpinned(right: Callable, memory: Memory, group: int, keys: Any) -> Any:
    """What is to be read back from CPU memory is not kept there until it is."""
    before = len(memory._pinned)
    pages = right(memory, group, keys)
    for pool, page in memory._pinned[before:]:
        pool.release([page])
    del memory._pinned[before:]
    return pages


BROKEN = {
    "pages do not go out": without("out"),
    "pages do not come back": without("back"),
    "pages are not read from disk": without("load"),
    "pages are not copied": without("copies"),
    "the salt does not count": no_salt,
    "a window forgets a page too many": narrow_window,
    "a page is not released": around(Pool, "release", forgets_one_page),
    "a page is found before it is full": around(Running, "keep", keeps_too_much),
    "a fork writes where its parent does": around(Memory, "copy", takes_a_used_page),
    "a step planned ahead takes another's token": around(Scheduler, "_advance", wrong_source),
    "a preempted request is not queued": around(Preemption, "preempt", loses_the_request),
    "what is read back is given away before": around(Memory, "bring", unpinned),
    "nothing is reserved": around(Running, "fits", lambda right, *given: True),
}


@pytest.mark.parametrize("fault", BROKEN)
def test_a_broken_scheduler_is_seen(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    BROKEN[fault](monkeypatch)
    with pytest.raises((AssertionError, KeyError, IndexError)):
        for seed in range(40):
            for world in ("disk", "both", "swap"):
                storm(seed, world, seed % 2 == 1, 200)
