"""The scheduler: what a step holds, who runs, who gives way, and what it costs."""

from __future__ import annotations

import random
import sys

import numpy as np
import pytest
from paged import Machine, alone, request, serve

from infer.policy import PageGroup, SchedulerConfig
from infer.request import Life, Request, RequestError
from infer.scheduler import Scheduler
from infer.step import NO_MOVES, NO_TOKEN, Step
from parallel.errors import ConfigError


def made(pages: int = 60, **more: object) -> tuple[Scheduler, Machine]:
    """A scheduler with pages of four tokens, and its device."""
    groups = [PageGroup(None, pages)]
    config = SchedulerConfig(**({"page_size": 4, "budget": 16, "requests": 4, "prefix_cache": False} | more))  # type: ignore[arg-type]
    return Scheduler(config, groups), Machine(groups, 4)


def prompt(number: int, length: int) -> list[int]:
    """Tokens of no meaning."""
    return [(number * 17 + 5 * place) % 50 for place in range(length)]


def parts_of(step: Step) -> list[tuple[int, int, int]]:
    """(request, start, stop) of each run."""
    starts, stops = step.starts_R.tolist(), step.stops_R.tolist()
    return [(one.id, start, stop) for one, start, stop in zip(step.requests, starts, stops, strict=True)]


def test_a_step_mixes_chunks_and_decoding_under_one_budget() -> None:
    scheduler, machine = made(chunk=8)
    steps: list[Step] = []
    for number, length in enumerate((3, 20, 6, 10, 5)):
        scheduler.add(request(number, prompt(number, length), 4))
    serve(scheduler, machine, each=steps.append)
    assert [parts_of(step) for step in steps[:4]] == [
        [(0, 0, 3), (1, 0, 8), (2, 0, 5)],
        [(0, 3, 4), (2, 5, 6), (1, 8, 16), (3, 0, 6)],
        [(0, 4, 5), (2, 6, 7), (1, 16, 20), (3, 6, 10)],
        [(0, 5, 6), (2, 7, 8), (1, 20, 21), (3, 10, 11)],
    ]
    assert [(step.decoding, step.samples) for step in steps[:4]] == [(0, 1), (1, 2), (2, 4), (4, 4)]
    second = steps[1]
    assert second.bounds.tolist() == [0, 1, 2, 10, 16] and second.sources_D is None and second.moves is NO_MOVES
    assert second.positions_T.tolist() == [3, 5, *range(8, 16), *range(6)]
    assert second.tokens_T.tolist()[1:] == [prompt(2, 6)[5], *prompt(1, 20)[8:16], *prompt(3, 6)]


def test_a_step_may_be_planned_before_the_last_is_committed() -> None:
    """The same tokens; each decoding run says where its token will be."""
    both = []
    for ahead in (False, True):
        scheduler, machine = made()
        requests = [request(number, prompt(number, 3 + number), 9) for number in range(6)]
        for one in requests:
            scheduler.add(one)
        flights: list = []
        while scheduler.requests:
            step = scheduler.plan()
            scheduler.check()
            if flights:
                assert step.sources_D is not None
                known = step.sources_D < 0
                assert ((step.tokens_T[: step.decoding] == NO_TOKEN) == ~known).all()
            flights.append(machine.prepare(step, scheduler.tables))
            if ahead and len(flights) < 2:
                continue
            prepared = flights.pop(0)
            tokens, _ = machine.execute(prepared)
            scheduler.commit(prepared.step, np.array(tokens, np.int64))
            for one in prepared.step.requests[: prepared.step.samples]:
                if len(one.tokens) == one.most and one.life is Life.RUNNING:
                    scheduler.finish(one, "length")
            scheduler.check()
        both.append([one.tokens for one in requests])
    assert both[0] == both[1] == [alone(prompt(number, 3 + number), 9) for number in range(6)]


def test_a_row_that_fails_ends_its_request_alone() -> None:
    scheduler, _ = made()
    first, second = request(1, prompt(1, 3), 9), request(2, prompt(2, 3), 9)
    scheduler.add(first)
    scheduler.add(second)
    step = scheduler.plan()
    scheduler.commit(step, [NO_TOKEN, 7])
    assert (first.life, first.finish_reason, first.tokens) == (Life.FINISHED, "error", prompt(1, 3))
    assert second.tokens[-1] == 7 and scheduler.stats.running == 1


@pytest.mark.parametrize(
    ("one", "why"),
    [
        (request(1, [], 3), "request 1: the prompt is empty"),
        (request(1, [1, 2], 0), "request 1: 2 tokens leave none to generate, of 2 at most"),
        (
            request(1, [1] * 90, 80),
            "up to 170 tokens need 43 pages of 4 tokens; the whole cache of page group 0 has 20",
        ),
        (request(7, [1], 1), "request 7: there is one with this id already"),
    ],
)
def test_a_request_that_cannot_be_served_is_refused_alone(one: Request, why: str) -> None:
    scheduler, machine = made(20)
    other = request(7, prompt(7, 5), 5)
    scheduler.add(other)
    with pytest.raises(RequestError) as refused:
        scheduler.add(one)
    assert any(why in problem for problem in refused.value.problems)
    scheduler.check()
    serve(scheduler, machine)
    assert other.tokens == alone(prompt(7, 5), 5)


def test_a_window_that_does_not_fit_is_refused_with_its_numbers() -> None:
    scheduler = Scheduler(SchedulerConfig(page_size=4, budget=64, requests=4), [PageGroup(32, 20)])
    with pytest.raises(
        RequestError, match="within its window of 32 and a chunk; the whole cache of page group 0 has 20"
    ):
        scheduler.add(request(1, [1] * 200, 10))


def test_limits_that_cannot_be_are_refused_together() -> None:
    config = SchedulerConfig(page_size=0, budget=4, requests=8, watermark=1.0, aging=-1)
    with pytest.raises(ConfigError) as refused:
        Scheduler(config, [PageGroup(0, 0)])
    assert len(refused.value.problems) == 6


def test_the_more_urgent_come_first_and_nobody_waits_for_ever() -> None:
    def served(aging: int) -> tuple[int, int]:
        """Steps until the less urgent one has ended, and how often it lost its pages, among a stream of others."""
        scheduler, machine = made(requests=1, aging=aging)
        low = request(1000, prompt(1, 4), 3, priority=1)
        scheduler.add(low)
        for number in range(60):
            scheduler.add(request(number, prompt(number, 4), 1))
            serve(scheduler, machine, 1)
            if low.life is Life.FINISHED:
                assert low.tokens == alone(prompt(1, 4), 3)
                return number, low.preemptions
        return 60, low.preemptions

    soon, lost = served(10)
    assert soon < 16 and lost <= 1
    assert served(0)[0] == 60, "without aging, a stream of more urgent ones goes before"


def test_a_more_urgent_request_takes_the_place_of_others_but_only_if_that_is_enough() -> None:
    scheduler, machine = made(16, requests=4, horizon=4, watermark=0.0, comeback=0.0, aging=0)
    low = [request(number, prompt(number, 8), 20, priority=2) for number in range(2)]
    equal = request(5, prompt(5, 8), 24, priority=0)
    for one in (*low, equal):
        scheduler.add(one)
    serve(scheduler, machine, 3)
    assert [one.life for one in (*low, equal)] == [Life.RUNNING] * 3
    large = request(6, prompt(6, 50), 5, priority=1)
    scheduler.add(large)
    serve(scheduler, machine, 1)
    assert [one.preemptions for one in (*low, equal)] == [0, 0, 0], "what would not be enough is not taken"
    scheduler.abort(6)
    urgent = request(7, prompt(7, 30), 5, priority=1)
    scheduler.add(urgent)
    serve(scheduler, machine, 1)
    assert urgent.life is Life.RUNNING and equal.preemptions == 0
    assert low[1].preemptions == 1, "the last of the least urgent gives way"
    serve(scheduler, machine)
    assert low[1].tokens == alone(prompt(1, 8), 20) and urgent.tokens == alone(prompt(7, 30), 5)


@pytest.mark.parametrize("seed", range(4))
def test_who_is_admitted_gets_its_horizon(seed: int) -> None:
    """However short pages are: from admission to preemption a request generates at least ``horizon`` tokens."""
    chance = random.Random(seed)
    horizon = chance.choice((1, 5, 9))
    scheduler, machine = made(chance.randrange(18, 40), requests=6, horizon=horizon, prefix_cache=seed % 2 == 0)
    seated: dict[int, tuple[int, int]] = {}
    lost = 0
    for number in range(25):
        scheduler.add(request(number, prompt(number, chance.randrange(1, 30)), chance.randrange(1, 40)))

    def look(_step: Step) -> None:
        nonlocal lost
        for one in scheduler.requests.values():
            if one.id in seated and seated[one.id][1] < one.preemptions:
                assert len(one.tokens) - seated.pop(one.id)[0] >= horizon
                lost += 1
            if one.life is Life.RUNNING and one.id not in seated:
                seated[one.id] = len(one.tokens), one.preemptions

    serve(scheduler, machine, each=look)
    assert lost > 0, "nothing was short"


def test_a_preempted_request_comes_back_when_there_is_more_room_than_it_needs() -> None:
    def back(comeback: float) -> tuple[int, int, int]:
        """Tokens of the one that goes on, and what runs and is left, when the one that gave way comes back."""
        scheduler, machine = made(30, horizon=2, comeback=comeback, watermark=0.0)
        short, long, last = request(1, prompt(1, 16), 30), request(2, prompt(2, 20), 60), request(3, prompt(3, 8), 60)
        for one in (short, long, last):
            scheduler.add(one)
        while not (last.preemptions and last.life is Life.RUNNING):
            serve(scheduler, machine, 1)
            assert short.preemptions == long.preemptions == 0
        return len(long.tokens), scheduler.stats.running, scheduler.running.slack(0)

    early, together, left = back(0.0)
    assert early < 60 and together == 2 and left < 12
    late, alone_then, _ = back(0.4)
    assert late == 80 and alone_then == 1


def calls(running: int) -> int:
    """Python and C functions that are called in 32 steps of so many decoding requests."""
    config = SchedulerConfig(page_size=16, budget=4096, requests=running)
    scheduler = Scheduler(config, [PageGroup(None, 8 * running)])
    for number in range(running):
        scheduler.add(request(number, prompt(number, 3 + number % 16), 100))
    for _ in range(20):
        step = scheduler.plan()
        scheduler.commit(step, np.full(step.samples, 3))
    count = 0

    def note(_frame: object, _event: str, _argument: object) -> None:
        nonlocal count
        count += 1

    tokens = np.full(running, 3)
    sys.setprofile(note)
    for _ in range(32):
        scheduler.commit(scheduler.plan(), tokens)
    sys.setprofile(None)
    return count


def test_a_step_makes_no_call_a_decoding_request() -> None:
    few, many = calls(16), calls(256)
    assert many < 1.05 * few
