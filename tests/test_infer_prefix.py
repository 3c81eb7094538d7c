"""The prefix cache: what is found, who waits for whom, what is given away first, and how it comes back."""

from __future__ import annotations

import random

import pytest
from paged import Machine, alone, request, serve

from infer.policy import PageGroup, SchedulerConfig
from infer.request import Request
from infer.scheduler import Scheduler
from infer.step import Step

STEM = [(7 * n + 3) % 50 for n in range(40)]


def made(groups: list[PageGroup] | None = None, **more: object) -> tuple[Scheduler, Machine]:
    """A scheduler with pages of four tokens, and its device."""
    groups = [PageGroup(None, 60)] if groups is None else groups
    config = SchedulerConfig(**({"page_size": 4, "budget": 64, "requests": 8} | more))  # type: ignore[arg-type]
    return Scheduler(config, groups), Machine(groups, config.page_size)


def run(scheduler: Scheduler, machine: Machine, *requests: Request) -> list[Step]:
    """Add and finish these; the tokens are those that each would have alone."""
    prompts = [(list(one.tokens), one.most) for one in requests]
    steps: list[Step] = []
    for one in requests:
        scheduler.add(one)
    serve(scheduler, machine, each=steps.append)
    for one, (tokens, most) in zip(requests, prompts, strict=True):
        assert one.tokens == alone(tokens, most - len(tokens), one.salt)
    return steps


@pytest.mark.parametrize(
    ("first", "second", "cached"),
    [
        (STEM[:20], STEM[:20], 16),  # the last token is computed, and its page with it
        (STEM[:20], STEM[:21], 20),
        (STEM[:20], STEM[:30], 20),
        (STEM[:30], STEM[:20] + [1, 2, 3], 20),
        (STEM[:20], [1, *STEM[1:20]], 0),
        (STEM[:20], STEM[:11] + [49] + STEM[12:20], 8),
        (STEM[:3], STEM[:3], 0),
    ],
)
def test_a_request_begins_with_the_full_pages_that_are_there(first: list[int], second: list[int], cached: int) -> None:
    scheduler, machine = made()
    run(scheduler, machine, request(1, first, 2))
    (other,) = requests = (request(2, second, 5),)
    steps = run(scheduler, machine, *requests)
    assert other.cached == cached and int(steps[0].starts_R[0]) == cached
    assert scheduler.stats.hits == cached


def test_generated_tokens_are_found_as_well() -> None:
    """The next turn of a conversation begins with the answer to the last one."""
    scheduler, machine = made()
    first = request(1, STEM[:10], 12)
    run(scheduler, machine, first)
    second = request(2, [*first.tokens, 5, 6], 3)
    run(scheduler, machine, second)
    assert second.cached == 20


def test_what_separates_caches() -> None:
    """Another salt; a request that asks for every row; pages of another size; no cache at all."""
    scheduler, machine = made()
    run(scheduler, machine, request(1, STEM[:20], 2))
    salted, whole = request(2, STEM[:20], 2, salt=b"adapter"), request(3, STEM[:20], 2, reuse=False)
    run(scheduler, machine, salted, whole)
    assert salted.cached == whole.cached == 0
    again = request(4, STEM[:20], 2, salt=b"adapter")
    run(scheduler, machine, again)
    assert again.cached == 16
    keys = [
        made(page_size=size)[0].prefixes.keys(request(1, STEM, 1, salt=salt), 1)[0]
        for size, salt in ((4, b""), (4, b"a"), (8, b""))
    ]
    assert len(set(keys)) == 3
    none, machine = made(prefix_cache=False)
    run(none, machine, request(1, STEM[:20], 2))
    run(none, machine, request(2, STEM[:20], 2))
    assert none.stats.hits == 0 and none.stats.cached == (0,)


def test_an_aborted_request_leaves_only_what_its_prompt_was() -> None:
    scheduler, machine = made()
    first = request(1, STEM[:20], 20)
    scheduler.add(first)
    serve(scheduler, machine, 9)
    scheduler.abort(1)
    scheduler.check()
    assert scheduler.stats.cached == (5,)


def test_requests_that_begin_alike_compute_it_once() -> None:
    """All come at once: the others wait for the steps in which the first computes what they share."""
    scheduler, machine = made(chunk=8, budget=64)
    requests = [request(n, [*STEM[:33], n], 4) for n in range(6)]
    steps = run(scheduler, machine, *requests)
    assert [one.cached for one in requests] == [0, *[32] * 5]
    assert scheduler.stats.computed == 34 + 5 * 2 + 6 * 3
    assert len(steps[0].requests) == 1, "the others did not wait"
    assert not scheduler.prefixes.promised


def test_nobody_waits_for_a_request_that_is_gone() -> None:
    scheduler, machine = made(chunk=8)
    first, second = (request(n, STEM[:33], 4) for n in (1, 2))
    scheduler.add(first)
    scheduler.add(second)
    serve(scheduler, machine, 1)
    assert second.waits_for is not None
    scheduler.abort(1)
    serve(scheduler, machine)
    assert second.tokens == alone(STEM[:33], 4) and second.cached == 8


def test_nobody_waits_for_a_less_urgent_request() -> None:
    scheduler, machine = made(chunk=8)
    low, high = request(1, STEM[:33], 4, priority=1), request(2, STEM[:33], 4)
    scheduler.add(low)
    serve(scheduler, machine, 1)
    scheduler.add(high)
    serve(scheduler, machine, 1)
    assert high.waits_for is None and high.row >= 0


def test_the_longest_unused_goes_first_and_its_tail_before_its_beginning() -> None:
    scheduler, machine = made([PageGroup(None, 12)], horizon=1, watermark=0.0)
    old, new = STEM[:17], [49 - token for token in STEM[:17]]
    run(scheduler, machine, request(1, old, 1))
    run(scheduler, machine, request(2, new, 1))
    run(scheduler, machine, request(3, old, 1))  # used again: now the other is the oldest
    assert scheduler.stats.cached == (8,) and scheduler.stats.evictions == (0,)
    run(scheduler, machine, request(4, [1] * 25, 1))
    assert scheduler.stats.evictions[0] > 0
    left = [scheduler.prefixes.match(request(5, tokens, 1)).pages for tokens in (old, new)]
    assert left[0] == 4 and 0 < left[1] < 4


def test_a_page_is_not_found_before_it_is_computed() -> None:
    """A prompt that is half computed is half found, planned ahead or not."""
    scheduler, machine = made(chunk=6)
    first = request(1, STEM[:20], 2)
    scheduler.add(first)
    found = []
    for _ in range(3):
        step = scheduler.plan()
        found.append(scheduler.prefixes.match(request(2, STEM[:20], 1)).pages)
        tokens, _ = machine.execute(machine.prepare(step, scheduler.tables))
        scheduler.commit(step, tokens)
    assert found == [0, 1, 3]


def test_a_page_that_comes_back_half_full_is_not_found() -> None:
    """A request that is swapped in the middle of its prompt comes back with the page that it was about to fill."""
    scheduler, machine = made([PageGroup(None, 60, 20)], chunk=6, preemption="swap")
    first = request(1, STEM[:30], 2)
    scheduler.add(first)
    serve(scheduler, machine, 1)
    scheduler.preempt(first)
    serve(scheduler, machine, 1)
    assert first.row < 0 and first.computed == 6
    scheduler.plan()
    assert first.row >= 0
    assert scheduler.prefixes.match(request(2, STEM[:30], 1)).pages == 1


WINDOWED = [PageGroup(None, 60), PageGroup(6, 40)]


def test_a_window_needs_only_the_end_of_what_is_found() -> None:
    scheduler, machine = made(WINDOWED, chunk=8)
    run(scheduler, machine, request(1, STEM[:33], 2))
    found = scheduler.prefixes.match(request(2, STEM[:33], 1))
    assert found.pages == 8 and found.first == (0, 6)
    second = request(2, STEM[:33], 8)
    run(scheduler, machine, second)
    assert second.cached == 32
    pool = scheduler.memory.device[1]
    page = pool.find(second.keys[6])
    assert page is not None
    pool.share(page)  # take one of the two away
    del pool._by_key[second.keys[6]]
    assert scheduler.prefixes.match(request(3, STEM[:33], 1)).pages == 6


def test_evicted_pages_come_back_from_cpu_memory() -> None:
    scheduler, machine = made([PageGroup(None, 12, 30)], horizon=1)
    run(scheduler, machine, request(1, STEM[:25], 1))
    run(scheduler, machine, request(2, [1] * 40, 1))
    again = request(3, STEM[:25], 5)
    steps = run(scheduler, machine, again)
    assert again.cached == 24
    moved = len(steps[0].moves.back)
    assert 0 < moved <= 6, "pages that are still on the device are not moved"
    assert scheduler.stats.host_used == (0,)
    without, machine = made([PageGroup(None, 12, 30)], horizon=1, host_cache=False)
    run(without, machine, request(1, STEM[:25], 1))
    run(without, machine, request(2, [1] * 40, 1))
    assert machine.moved["out"] == 0


def on_disk(**more: object) -> tuple[Scheduler, Machine]:
    """A scheduler that has the beginning of ``STEM`` on disk only."""
    scheduler, machine = made([PageGroup(None, 10, 6)], horizon=1, disk_pages=50, **more)
    run(scheduler, machine, request(1, STEM[:25], 1))
    for number in range(4):
        run(scheduler, machine, request(2 + number, [number] * 33, 1))
    probe = request(9, STEM[:25], 1)
    assert scheduler.prefixes.match(probe).pages == 0
    assert scheduler.prefixes.match(probe, scheduler.memory.disk).pages == 6
    return scheduler, machine


@pytest.mark.parametrize("loads", [2, 64])
def test_pages_on_disk_are_read_before_a_request_is_admitted(loads: int) -> None:
    scheduler, machine = on_disk(loads=loads)
    again = request(10, STEM[:25], 3)
    steps = run(scheduler, machine, again)
    rounds = -(-6 // loads)
    assert [len(step.moves.load) for step in steps[:rounds]] == [min(loads, 6)] * rounds
    assert all(step.empty for step in steps[:rounds]) and not steps[rounds].empty
    assert again.cached == 24 and len(steps[rounds].moves.back) == 6


def test_reading_ahead_goes_on_beside_the_computation() -> None:
    """While another request runs in the only row, the pages of the next one are read."""
    scheduler, machine = on_disk(requests=1)
    first, second = request(10, [45] * 5, 6), request(11, STEM[:25], 3)
    steps = run(scheduler, machine, first, second)
    begins = next(number for number, step in enumerate(steps) if second in step.requests)
    loads = [number for number, step in enumerate(steps) if step.moves.load]
    assert loads and max(loads) < begins
    assert second.cached >= 20, "of what was read, at most a page may have gone again while it waited"
    assert not any(step.empty for step in steps)


def test_a_file_that_is_gone_costs_only_time() -> None:
    scheduler, machine = on_disk()
    probe = request(10, STEM[:25], 3)
    keys = scheduler.prefixes.keys(probe, 6)
    del machine.disk[0, keys[2]]
    run(scheduler, machine, probe)
    assert probe.cached == 8
    assert (0, keys[2]) in scheduler.memory.disk or scheduler.memory.host[0].find(keys[2]) is None


def test_the_disk_keeps_what_was_used_last_and_a_later_run_finds_it() -> None:
    scheduler, machine = made([PageGroup(None, 10, 4)], horizon=1, disk_pages=6)
    for number in range(5):
        run(scheduler, machine, request(number, [number] * 33, 1))
    assert scheduler.stats.disk == 6 and len(machine.disk) >= 6 and machine.moved["drop"] > 0
    following = Scheduler(scheduler.config, scheduler.groups, list(machine.disk))
    files, device = machine.disk, Machine(list(scheduler.groups), 4)
    device.disk = files
    found = max(
        (request(10 + n, [n] * 33, 2) for n in range(5)),
        key=lambda one: following.prefixes.match(one, following.memory.disk).pages,
    )
    run(following, device, found)
    assert found.cached > 0


def test_random_prompts_that_share_nothing_find_nothing() -> None:
    chance = random.Random(3)
    scheduler, machine = made()
    requests = [request(n, [n, *(chance.randrange(50) for _ in range(20))], 3) for n in range(20)]
    run(scheduler, machine, *requests)
    assert scheduler.stats.hits == 0
