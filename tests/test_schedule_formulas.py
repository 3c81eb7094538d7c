"""The table in docs/schedules.md against the simulator: bubble and peak memory, exactly."""

from __future__ import annotations

import re
from fractions import Fraction
from pathlib import Path

import pytest

from parallel.pp.lower import lower
from parallel.pp.schedules import SCHEDULES, make_schedule
from parallel.pp.simulate import Costs, simulate

DOCUMENT = Path(__file__).parents[1] / "docs" / "schedules.md"
TIMES = ((1, 1, 1), (2, 3, 1), (2, 2, 1), (3, 2, 2), (2, 3, 2), (4, 1, 2), (1, 2, 3))
SMALL = (2, 3, 4, 5, 6, 8, 13)
LARGE = (24, 32, 64)


def _table() -> list[tuple[str, bool, str, str, str, str]]:
    """(name, paired, bubble, exact where, peak memory, copies) of every row."""
    rows = []
    for line in DOCUMENT.read_text().splitlines():
        if match := re.match(r"\| `([\w-]+)`( paired)? \|", line):
            cells = [cell.strip().strip("`") for cell in line.strip("|").split("|")]
            rows.append((match[1], bool(match[2]), cells[3], cells[4], cells[5], cells[6]))
    return rows


TABLE = _table()
IDS = [name + " paired" * paired for name, paired, *_ in TABLE]


def _value(expression: str, **names: object) -> Fraction:
    assert re.fullmatch(r"[\w\s+\-*/%()=<>,\[\]]+", expression)
    return eval(expression, {"max": max}, names)


def _check(
    row: tuple[str, bool, str, str, str, str], p: int, m: int, v: int, times: list[tuple[int, int, int]]
) -> None:
    name, paired, bubble, where, memory, _ = row
    schedule = lower(make_schedule(name, p, m, v), paired=paired)
    stages = schedule.stages // p
    for F, I, W in times:  # noqa: E741
        names = {"p": p, "m": m} | {n: Fraction(x) for n, x in zip("vFIWB", (v, F, I, W, I + W), strict=True)}
        if not _value(where, **names):
            continue
        unit = Costs.uniform(F, I, W, kept=1.0)
        timeline = simulate(schedule, unit)
        about = f"{name} p={p} m={m} v={v} F={F} I={I} W={W}"
        assert Fraction(timeline.bubble) / stages == _value(bubble, **names), about
        assert Fraction(max(timeline.peaks)) / stages == _value(memory, **names), about


def test_every_schedule_has_a_row() -> None:
    assert {row[0] for row in TABLE} == set(SCHEDULES) - {"auto"}


@pytest.mark.parametrize("row", TABLE, ids=IDS)
def test_formulas_for_many_times(row: tuple[str, bool, str, str, str, str]) -> None:
    held = [times for times in TIMES if _value(row[3], F=times[0], I=times[1], W=times[2])]
    assert len(held) >= 1
    for p in SMALL:
        if row[0] == "dualpipe" and p % 2:
            continue
        for m in (2 * p, 3 * p + (p % 2 if "dual" in row[0] else 0), 4 * p):
            for v in (2, 3) if row[0] == "interleaved" else (1,):
                _check(row, p, m, v, held if p <= 6 else held[:2])


@pytest.mark.parametrize("row", TABLE, ids=IDS)
def test_formulas_up_to_64_ranks(row: tuple[str, bool, str, str, str, str]) -> None:
    for p in LARGE:
        _check(row, p, 2 * p, 2 if row[0] == "interleaved" else 1, [(1, 1, 1)])


@pytest.mark.parametrize("row", TABLE, ids=IDS)
def test_copies(row: tuple[str, bool, str, str, str, str]) -> None:
    schedule = make_schedule(row[0], 4, 8, 2 if row[0] == "interleaved" else 1)
    assert {len(schedule.holders(stage)) for stage in range(schedule.stages)} == {int(row[5])}


@pytest.mark.parametrize("v", [2, 3, 4])
@pytest.mark.parametrize("p", [2, 3, 4, 8])
def test_interleaved_for_microbatches_that_p_does_not_divide(p: int, v: int) -> None:
    for m in range(p, 3 * p + 2):
        timeline = simulate(make_schedule("interleaved", p, m, v), Costs.uniform(2, 3, 1))
        group = -(-m // (m // p))
        assert timeline.bubble == (p - 1) * 6
        assert max(timeline.peaks) == min(2 * p - 1 + (v - 1) * group, v * m)


def test_memory_of_every_rank_of_1f1b_and_of_the_zero_bubble_schedules() -> None:
    unit = Costs.uniform(kept=1.0)
    assert simulate(make_schedule("1f1b", 4, 8), unit).peaks == (4, 3, 2, 1)
    assert simulate(make_schedule("zb-h1", 4, 8), unit).peaks == (4, 4, 4, 4)
    assert simulate(make_schedule("zb-h2", 4, 8), unit).peaks == (7, 7, 7, 7)
    assert simulate(make_schedule("zb-v", 4, 8), unit).peaks == (8, 8, 8, 8)
