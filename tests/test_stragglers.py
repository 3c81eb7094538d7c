"""Who is slow: against which ranks a rank is compared, and what counts as its own time."""

from __future__ import annotations

import time
from typing import Any

import pytest
import torch
from ranks import Ranks

from parallel import comm
from parallel.mesh import Layout, Mesh
from zero.stragglers import EVERY, Stragglers, slow_ranks

SLOW_S, QUICK_S = 0.06, 0.01


@pytest.mark.parametrize(
    ("layout", "seconds", "expected"),
    [
        ({"dp": 2}, [1.0, 3.0], {1: 3.0}),
        ({"dp": 2}, [3.0, 1.0], {0: 3.0}),
        ({"dp": 2}, [1.0, 1.9], {}),
        ({"tp": 4}, [1.0, 1.1, 3.0, 0.9], {2: 3.0}),
        ({"dp": 4}, [1.0, 4.0, 5.0, 1.0], {1: 4.0, 2: 5.0}),
        ({"dp": 3}, [2.0, 2.0, 4.0], {2: 2.0}),
        ({"pp": 2, "dp": 2}, [1.0, 1.0, 4.0, 4.0], {}),
        ({"pp": 2, "dp": 2}, [1.0, 1.0, 4.0, 12.0], {3: 3.0}),
        ({"pp": 2, "dp": 2}, [3.0, 1.0, 4.0, 4.0], {0: 3.0}),
        ({"pp": 2, "dp": 2}, [0.0, 0.0, 0.0, 0.0], {0: 0.0}),
    ],
)
def test_a_rank_is_compared_with_those_of_its_stage(
    layout: dict[str, int], seconds: list[float], expected: dict[int, float]
) -> None:
    if not any(seconds):
        expected = {}
    assert slow_ranks(seconds, [1.0] * len(seconds), Layout(**layout), 2.0) == expected


def test_a_stage_of_one_rank_is_compared_with_what_it_was() -> None:
    layout, first = Layout(pp=4), [1.0, 4.0, 4.0, 9.0]
    assert slow_ranks(first, first, layout, 2.0) == {}
    assert slow_ranks([3.0, 12.0, 12.0, 27.0], first, layout, 2.0) == {}, "the work has grown, for all"
    assert slow_ranks([1.0, 12.0, 4.0, 9.0], first, layout, 2.0) == {1: 3.0}
    assert slow_ranks([1.0, 3.0], [1.0, 1.0], Layout(pp=2), 2.0) == {1: 3.0}


def measured(layout: dict[str, int], slow: int) -> list[dict[str, float]]:
    """On the ranks: four comparisons of steps in which one rank sleeps for longer and all wait for one another."""
    mesh = Mesh.build(Layout(**layout))
    stragglers, found = Stragglers(mesh, 3.0), []
    for _ in range(4 * EVERY):
        stragglers.begin()
        for _ in range(2):
            time.sleep(SLOW_S if mesh.rank == slow else QUICK_S)
            comm.sum_(torch.ones(3), mesh.world)
        found.append(stragglers.end())
    assert all(not found[step] for step in range(4 * EVERY) if step % EVERY != EVERY - 1 or step < EVERY)
    return [{str(rank): times for rank, times in found[step].items()} for step in range(EVERY - 1, 4 * EVERY, EVERY)]


@pytest.mark.parametrize(("layout", "slow"), [({"dp": 2}, 1), ({"dp": 2}, 0), ({"tp": 2, "dp": 2}, 2)])
def test_time_that_is_waited_is_not_ones_own(ranks: Ranks, layout: dict[str, int], slow: int) -> None:
    """All ranks take equally long for a step, for they wait for the slow one; that alone is named, on all of them."""
    world = Layout(**layout).world
    answers = ranks.run(measured, world=world, layout=layout, slow=slow)
    assert all(answer == answers[0] for answer in answers)
    assert sum([*window] == [str(slow)] for window in answers[0]) >= 2, answers[0]


def test_alone_nobody_is_slow() -> None:
    stragglers, found = Stragglers(Mesh.single(), 2.0), list[Any]()
    for _ in range(2 * EVERY):
        stragglers.begin()
        found.append(stragglers.end())
    assert found == [{}] * (2 * EVERY)


def waited_s() -> list[float]:
    """On the ranks: seconds that each kind of collective says that it was waited for, where rank 1 comes late."""
    mesh = Mesh.build(Layout(tp=2))
    ledger, x = mesh.ledger, torch.ones(4, requires_grad=True)
    kinds = [
        lambda: comm.all_reduce(x, mesh.tp),
        lambda: comm.all_gather(x, mesh.tp),
        lambda: comm.reduce_scatter(x, mesh.tp),
        lambda: comm.all_to_all(x, mesh.tp, [2, 2], [2, 2]),
        lambda: comm.broadcast(x, mesh.tp, 1),
        lambda: comm.shift(x, mesh.tp),
    ]
    found = []
    for kind in kinds:
        comm.barrier(mesh.world)
        ledger.reset()
        if mesh.rank == 1:
            time.sleep(0.2)
        kind()
        found.append(ledger.waited_s)
    return found


def test_the_ledger_knows_how_long_was_waited(ranks: Ranks) -> None:
    early, late = ranks.run(waited_s, world=2)
    assert all(seconds > 0.1 for seconds in early), early
    assert all(seconds < 0.1 for seconds in late), late
