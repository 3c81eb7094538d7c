"""Pages: every one is free, cached or used; moved pages hold what they held; windows keep no more than they see."""

from __future__ import annotations

import random
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from paged import Machine, alone, request, serve

from infer.pages import Pool
from infer.policy import PageGroup, SchedulerConfig, span
from infer.request import Life, Request
from infer.running import columns
from infer.scheduler import Scheduler
from infer.step import NO_PAGE

PROMPT = [7, 3, 9, 1, 4, 4, 2, 8, 5, 6, 0, 3, 1]


@given(st.randoms(use_true_random=False), st.integers(1, 9))
@settings(max_examples=60, deadline=None, derandomize=True)
def test_a_pool_does_what_a_list_of_pages_would(chance: random.Random, total: int) -> None:
    """Against a plain account: who uses what, and what was released when."""
    pool, users, keys, released = Pool(total), Counter[int](), dict[int, bytes](), list[int]()
    for number in range(60):
        action = chance.choice(("take", "share", "release", "name"))
        used = [page for page in users if users[page]]
        if action == "take":
            free = total - len(used) - len(released)
            assert (pool.free, pool.cached, pool.available) == (free, len(released), free + len(released))
            count = chance.randint(0, pool.available)
            pages, evicted = pool.take(count)
            assert evicted == [(page, keys.pop(page)) for page in released[: max(0, count - free)]]
            del released[: len(evicted)]
            assert len(set(pages)) == count and not set(pages) & set(used)
            users.update(pages)
        elif action == "share" and used + released:
            page = chance.choice(used + released)
            pool.share(page)
            users[page] += 1
            released = [other for other in released if other != page]
        elif action == "release" and used:
            page = chance.choice(used)
            pool.release([page])
            users[page] -= 1
            if not users[page] and page in keys:
                released.append(page)
        elif action == "name" and used:
            page, key = chance.choice(used), b"key %d" % chance.choice((number, number // 7))
            named = pool.name(page, key)
            assert named == (page not in keys and key not in keys.values())
            if named:
                keys[page] = key
        for page, key in keys.items():
            assert pool.find(key) == page
        pool.check(users)


def test_the_check_of_a_pool_sees_what_is_wrong() -> None:
    def pool() -> tuple[Pool, Counter[int]]:
        made = Pool(6)
        pages, _ = made.take(4)
        made.name(pages[0], b"a")
        made.name(pages[1], b"b")
        made.release([pages[1]])
        return made, Counter({page: 1 for page in pages if page != pages[1]})

    right, users = pool()
    right.check(users)
    lost, users = pool()
    lost._free.pop()
    with pytest.raises(AssertionError, match=r"1 free \+ 1 cached \+ 3 used, of 6"):
        lost.check(users)
    counted, users = pool()
    counted.users[2] += 1
    with pytest.raises(AssertionError, match="users"):
        counted.check(users)
    twice, users = pool()
    twice._free.append(twice._free[0])
    with pytest.raises(AssertionError, match="twice"):
        twice.check(users)
    unnamed, users = pool()
    unnamed.keys[unnamed.find(b"b") or 0] = None
    with pytest.raises(AssertionError, match="key"):
        unnamed.check(users)


@given(st.integers(1, 40), st.integers(1, 9), st.integers(0, 30))
def test_span_is_the_most_pages_that_tokens_touch(tokens: int, size: int, _start: int) -> None:
    touched = [len({position // size for position in range(start, start + tokens)}) for start in range(size)]
    assert span(tokens, size) == max(touched)
    assert columns(tokens, size) == touched[0]


@pytest.mark.parametrize("window", [1, 3, 4, 5, 9, 30])
@pytest.mark.parametrize("chunk", [1, 3, 0])
def test_a_window_keeps_only_what_it_sees(window: int, chunk: int) -> None:
    """Beside a group that keeps all; the table has holes where the window let go."""
    config = SchedulerConfig(page_size=4, budget=16, requests=4, chunk=chunk, prefix_cache=False)
    groups = [PageGroup(None, 40), PageGroup(window, 40)]
    scheduler, machine = Scheduler(config, groups), Machine(groups, 4)
    first, second = request(1, PROMPT, 20), request(2, PROMPT[:3], 25)
    most = 0

    def look(_step: object) -> None:
        nonlocal most
        for one in (first, second):
            if one.life is Life.RUNNING:
                computed = int(scheduler.running.rows.computed[one.row])
                row = scheduler.tables[1][one.row]
                begin = int(scheduler.running.rows.first[1][one.row])
                assert (row[:begin] == NO_PAGE).all()
                kept = int((row >= 0).sum())
                most = max(most, kept)
                assert kept == columns(computed, 4) - begin
                if row is not None and computed > len(PROMPT) + 1:
                    assert kept <= span(window, 4)
                assert (scheduler.tables[0][one.row] >= 0).sum() == columns(computed, 4)

    scheduler.add(first)
    scheduler.add(second)
    serve(scheduler, machine, each=look)
    assert first.tokens == alone(PROMPT, 20) and second.tokens == alone(PROMPT[:3], 25)
    assert most <= span(window - 1 + (chunk or 16), 4)
    assert scheduler.stats.free == (40, 40)


def crowded(preemption: str, host: int, cost: float = 4.0, pages: int = 12) -> tuple[Scheduler, Machine, list[Request]]:
    """Three requests, each of which could nearly fill the cache alone."""
    config = SchedulerConfig(page_size=4, budget=16, requests=4, horizon=4, preemption=preemption, prefix_cache=False)
    groups = [PageGroup(None, pages, host, cost)]
    scheduler = Scheduler(config, groups)
    requests = [request(n, PROMPT[n:], 30) for n in range(3)]
    for one in requests:
        scheduler.add(one)
    return scheduler, Machine(groups, 4), requests


@pytest.mark.parametrize(
    ("preemption", "host", "cost", "how"),
    [
        ("recompute", 40, 0.1, "recomputed"),
        ("swap", 40, 99.0, "swapped"),
        ("swap", 0, 0.1, "recomputed"),
        ("auto", 40, 2.0, "swapped"),
        ("auto", 40, 4.5, "recomputed"),
        ("auto", 2, 0.1, "recomputed"),
    ],
)
def test_pages_are_moved_or_computed_again_whichever_costs_less(
    preemption: str, host: int, cost: float, how: str
) -> None:
    """A page of four tokens costs four to compute again; it is moved where that costs less and there is room."""
    scheduler, machine, requests = crowded(preemption, host, cost)
    serve(scheduler, machine)
    stats = scheduler.stats
    assert (stats.swaps > 0, stats.recomputed > 0) == (how == "swapped", how == "recomputed")
    assert (machine.moved["back"] > 0) == (how == "swapped")
    assert [one.tokens for one in requests] == [alone(PROMPT[n:], 30) for n in range(3)]
    if how == "swapped":
        assert stats.computed == sum(len(one.tokens) - 1 for one in requests), "what was swapped was computed again"


def test_a_swapped_request_that_is_aborted_gives_its_pages_back() -> None:
    scheduler, machine, requests = crowded("swap", 40)
    serve(scheduler, machine, 4)
    running = next(one for one in requests if one.life is Life.RUNNING)
    scheduler.preempt(running)
    scheduler.check()
    assert running.life is Life.SWAPPED and scheduler.stats.host_used == (columns(running.computed, 4),)
    assert scheduler.abort(running.id) and not scheduler.abort(running.id)
    serve(scheduler, machine)
    assert scheduler.stats.host_used == (0,) and scheduler.stats.used == (0,)


def test_moves_are_made_before_what_needs_their_pages() -> None:
    """A page that goes out in a step may be written in the same step, and one that comes back be read."""
    scheduler, machine, _ = crowded("swap", 40)
    reused = 0

    def look(step: object) -> None:
        nonlocal reused
        out = {move.source for move in step.moves.out}  # type: ignore[attr-defined]
        back = {move.target for move in step.moves.back}  # type: ignore[attr-defined]
        written = np.concatenate(
            [scheduler.tables[0][row] for row in step.rows_R]  # type: ignore[attr-defined]
        )
        reused += len(out & (set(written.tolist()) | back))

    serve(scheduler, machine, each=look)
    assert reused > 0
