"""Schedules as data: every registered one is valid, bad ones are named, and an independent player agrees."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from parallel.errors import ConfigError, ScheduleError
from parallel.pp.action import KINDS, Action, Kind, parse_action
from parallel.pp.lower import lower
from parallel.pp.schedule import Schedule, parse_schedule
from parallel.pp.schedules import SCHEDULES, make_schedule
from parallel.pp.schedules.auto import search, split_costs
from parallel.pp.simulate import Costs, parse_costs, simulate
from parallel.pp.sound import is_sound
from parallel.pp.validate import validate

FIXED = [name for name in SCHEDULES if name != "auto"]
OPEN = {"interleaved", "forward", "auto"}
TWO = {"zb-v", "v-half", "v-min", "dualpipev"}


def _is_valid(schedule: Schedule) -> bool:
    """A second opinion, from the meaning of the actions alone: sets of what was done, tried until nothing moves."""
    rows = [[tuple(action) for action in row] for row in schedule.rows]
    home = {action: rank for rank, row in enumerate(rows) for action in row}
    if sum(map(len, rows)) != len(home) or not home:
        return False
    stages, microbatches = 1 + max(a[0] for a in home), 1 + max(a[2] for a in home)
    ops = {a[1] for a in home}
    travels = bool(ops & {"SF", "RF", "SB", "RB"})
    trains = bool(ops & {"B", "W"})
    for s in range(stages):
        for m in range(microbatches):
            kinds = {op for op in "FBIW" if (s, op, m) in home}
            if kinds not in ([{"F", "B"}, {"F", "I", "W"}] if trains else [{"F"}]):
                return False
            if len({home[s, op, m] for op in ops if (s, op, m) in home}) != 1:
                return False
    links: dict[tuple[int, int], tuple[list, list]] = {}
    wanted = set()
    for (s, op, m), rank in home.items():
        down = op == "F"
        t = s - 1 if down else s + 1
        if op not in ("F", "B", "I") or not 0 <= t < stages or home[t, "F", m] == rank:
            continue
        send, receive = (t, "SF" if down else "SB", m), (s, "RF" if down else "RB", m)
        wanted |= {send, receive}
        if travels:
            if send not in home or receive not in home:
                return False
            sent, received = links.setdefault((home[t, "F", m], rank), ([], []))
            sent.append((rows[home[send]].index(send), send, receive))
            received.append((rows[rank].index(receive), send, receive))
    if travels and wanted != {a for a in home if a[1] in ("SF", "RF", "SB", "RB")}:
        return False
    if any([x[1:] for x in sorted(sent)] != [x[1:] for x in sorted(got)] for sent, got in links.values()):
        return False

    def needs(action: tuple[int, str, int]) -> list[tuple[int, str, int]]:
        s, op, m = action
        back = [(x, "I" if (x, "I", m) in home else "B", m) for x in (s, s + 1)]
        if op in ("RF", "RB"):
            return []
        if op in ("SF", "SB"):
            return [(s, "F", m) if op == "SF" else back[0]]
        if op == "W":
            return [(s, "I", m)]
        own = [] if op == "F" else [(s, "F", m)]
        t, made = (s - 1, (s - 1, "F", m)) if op == "F" else (s + 1, back[1])
        if not 0 <= t < stages:
            return own
        if travels and home[t, "F", m] != home[action]:
            pair = ("SF", "RF") if op == "F" else ("SB", "RB")
            return [*own, (t, pair[0], m), (s, pair[1], m)]
        return [*own, made]

    done: set = set()
    at, moved = [0] * len(rows), True
    while moved:
        moved = False
        for rank, row in enumerate(rows):
            while at[rank] < len(row) and all(need in done for need in needs(row[at[rank]])):
                done.add(row[at[rank]])
                at[rank] += 1
                moved = True
    return len(done) == len(home)


def _found_valid(schedule: Schedule) -> bool:
    try:
        validate(schedule)
    except ScheduleError as error:
        assert not is_sound(schedule)
        assert len(str(error)) > 20
        return False
    assert is_sound(schedule)
    return True


@pytest.mark.parametrize("name", FIXED)
def test_every_schedule_is_valid_for_all_sizes(name: str) -> None:
    made = 0
    for p in (1, 2, 3, 4, 6):
        for m in sorted({1, 2, p - 1, p, p + 1, 2 * p - 1, 2 * p, 3 * p, 3 * p + 1} - {0}):
            for v in (1, 2, 3):
                if (name == "dualpipe" and p % 2) or (v > 1 and name not in OPEN and not (v == 2 and name in TWO)):
                    with pytest.raises(ConfigError, match=r"even number of ranks|stages? a rank"):
                        make_schedule(name, p, m, v)
                    continue
                schedule = make_schedule(name, p, m, v)
                lowered = lower(schedule)
                assert (schedule.ranks, schedule.microbatches) == (p, m)
                assert schedule.stages == p * (2 if name in TWO else v)
                assert _is_valid(schedule)
                assert _is_valid(lowered)
                assert is_sound(lowered)
                assert simulate(lowered).step > 0
                made += 1
    assert made >= 17


@pytest.mark.parametrize("name", sorted(set(FIXED) - {"forward", "dualpipe"}))
def test_one_rank_finishes_a_microbatch_before_the_next(name: str) -> None:
    (row,) = make_schedule(name, 1, 3, 2 if name == "interleaved" else 1).rows
    assert [action.microbatch for action in row] == sorted(action.microbatch for action in row)


def test_tables_of_the_papers() -> None:
    assert str(make_schedule("zb-h1", 3, 4)).splitlines()[2] == "2F0 2I0 2F1 2I1 2F2 2I2 2W0 2F3 2I3 2W1 2W2 2W3"
    assert [str(a) for a in make_schedule("interleaved", 2, 2, 2).rows[0]] == [
        "0F0",
        "0F1",
        "2F0",
        "2F1",
        "2B0",
        "2B1",
        "0B0",
        "0B1",
    ]
    dualpipe = make_schedule("dualpipe", 2, 4)
    assert dualpipe.where == [[0, 0, 1, 1], [1, 1, 0, 0]]
    assert make_schedule("dualpipev", 2, 4).stages_of(0) == [0, 3]


def test_microbatches_of_each_stage_are_taken_in_order() -> None:
    for name in set(FIXED) - {"dualpipe"}:
        for row in make_schedule(name, 4, 9).rows:
            for key in {(action.stage, action.op) for action in row}:
                own = [a.microbatch for a in row if (a.stage, a.op) == key]
                assert own == sorted(own), (name, key)


@pytest.mark.parametrize("name", list(SCHEDULES))
def test_text_round_trip(name: str) -> None:
    schedule = make_schedule(name, 2, 5)
    for table in (schedule, lower(schedule)):
        assert parse_schedule(str(table), table.name) == table


@given(st.integers(0, 10**6), st.sampled_from(sorted(KINDS)), st.integers(0, 10**6))
def test_action_round_trip(stage: int, op: str, microbatch: int) -> None:
    action = Action(stage, op, microbatch)
    assert parse_action(str(action)) == action


@st.composite
def _schedules(draw: st.DrawFn) -> Schedule:
    """Any valid schedule: stages anywhere, also by microbatch, actions in any order that respects what they need."""
    ranks, stages, microbatches = draw(st.integers(1, 4)), draw(st.integers(1, 5)), draw(st.integers(1, 4))
    rng = random.Random(draw(st.integers(0, 2**32)))
    by_microbatch = draw(st.booleans())
    place = [rng.randrange(ranks) for _ in range(stages)]
    homes = [[rng.randrange(ranks) if by_microbatch else rank for _ in range(microbatches)] for rank in place]
    trains = draw(st.booleans())
    rows: list[list[Action]] = [[] for _ in range(ranks)]
    ready = [(0, "F", m) for m in range(microbatches)]
    while ready:
        stage, op, m = ready.pop(rng.randrange(len(ready)))
        rows[homes[stage][m]].append(Action(stage, op, m))
        if op == "F" and stage + 1 < stages:
            ready.append((stage + 1, "F", m))
        elif op == "F" and trains:
            ready.append((stage, rng.choice("BI"), m))
        elif op in ("B", "I"):
            ready += [(stage, "W", m)] * (op == "I") + [(stage - 1, rng.choice("BI"), m)] * (stage > 0)
    return Schedule(tuple(map(tuple, rows)))


@settings(max_examples=80, deadline=None)
@given(_schedules(), st.integers(0, 4))
def test_any_valid_schedule_lowers_and_validates(schedule: Schedule, ahead: int) -> None:
    lowered = lower(validate(schedule), ahead)
    assert _is_valid(schedule)
    assert _is_valid(lowered)
    assert is_sound(schedule)
    assert is_sound(validate(lowered))
    assert parse_schedule(str(lowered)) == Schedule(tuple(row for row in lowered.rows if row)) or () in lowered.rows
    timeline = simulate(lowered, Costs.uniform(1, 2, 3, latency=0.5))
    assert sum(map(len, timeline.rows)) == sum(map(len, schedule.rows))


@settings(max_examples=300, deadline=None)
@given(
    _schedules(), st.booleans(), st.integers(0, 2**32), st.sampled_from(["swap", "move", "drop", "double", "change"])
)
def test_damage_is_found_or_harmless(schedule: Schedule, lowered: bool, seed: int, damage: str) -> None:
    rng = random.Random(seed)
    rows = [list(row) for row in (lower(schedule) if lowered else schedule).rows]
    rank = rng.choice([r for r, row in enumerate(rows) if row])
    row = rows[rank]
    a, b = rng.randrange(len(row)), rng.randrange(len(row))
    if damage == "swap":
        row[a], row[b] = row[b], row[a]
    elif damage == "move":
        rng.choice(rows).insert(0, row.pop(a))
    elif damage == "drop":
        row.pop(a)
    elif damage == "double":
        row.insert(b, row[a])
    else:
        row[a] = row[a]._replace(op=rng.choice(sorted(KINDS)))
    damaged = Schedule(tuple(map(tuple, rows)))
    if damaged.lowered == any(a.op in ("SF", "RF", "SB", "RB") for row in rows for a in row) and any(rows):
        assert _found_valid(damaged) == _is_valid(damaged)


GOOD = "0F0 0F1 0B0 0B1\n1F0 1B0 1F1 1B1"


@pytest.mark.parametrize(
    "text, found",
    [
        ("0F0 0F1 0B0 0B1\n1F0 1B0 1F1", "1B1 .* is missing; rank 1, cell 3 has 1F1"),
        ("0F0 0F1 0B0 0B1\n1B0 1F1 1B1", "1F0 .* is missing"),
        ("0F0 0F1 0B0 0F1 0B1\n1F0 1B0 1F1 1B1", "rank 0, cell 4, 0F1: is in the table twice"),
        (
            "0F0 0F1 0B0 0B1 0I1 0W1\n1F0 1B0 1F1 1B1",
            "cell 5, 0I1: makes again what 0B1 of rank 0, cell 4 makes",
        ),
        ("0F0 0F1 0B0 0B1\n1F0 1B0 1B1 1F1", "rank 1, cell 3, 1B1: comes before 1F1 .cell 4., which it needs"),
        ("0B0 0F0 0F1 0B1\n1F0 1B0 1F1 1B1", "rank 0, cell 1, 0B0: comes before 0F0"),
        ("0F0 0B0 0F1 0B1\n1F0 1F1 1B0 1B1", "rank 0, cell 2, 0B0: deadlock: rank 0 stands at 0B0"),
        ("0F0 0F1 0B0\n1F0 1B0 1F1 1B1 0B1", "rank 1, cell 5, 0B1: stage 0 has microbatch 1 on rank 0"),
        ("0F0 0F1 0I0 0B1\n1F0 1B0 1F1 1B1", "0W0 .* is missing"),
        ("0F0 0SF0 0RB0 0B0\n1F0 1RF0 1B0 1SB0", "rank 1, cell 1, 1F0: comes before 1RF0"),
        ("0SF0 0F0 0RB0 0B0\n1RF0 1F0 1B0 1SB0", "rank 0, cell 1, 0SF0: comes before what it sends is made"),
        ("0F0 0RB0 0B0\n1RF0 1F0 1B0 1SB0", "0SF0 .* is missing"),
        ("0F0 0SF0 0RB0 0B0\n1F0 1B0 1SB0", "1RF0 .* is missing"),
        ("0F0 0B0 0SB0", "rank 0, cell 3, 0SB0: there is no stage -1"),
        ("0F0 0SF0 1RF0 1F0 1B0 0B0", "rank 0, cell 2, 0SF0: stage 1 is on the same rank"),
        ("0F0 0W0", "0I0 .* is missing"),
        ("0F0 0SF0 0RB0 0B0\n1RF0 1F0 1B0 1SB0\n2F0 2B0", "1RB0 .* is missing; rank 1, cell 4 has 1SB0"),
        ("0F0 0SF0 0F1 0SF1\n1RF1 1RF0 1F0 1F1", "rank 1, cell 1, 1RF1: rank 0 sends 1RF0 first"),
    ],
)
def test_a_bad_table_is_refused_with_its_first_bad_cell(text: str, found: str) -> None:
    schedule = parse_schedule(text)
    with pytest.raises(ScheduleError, match=found) as caught:
        validate(schedule)
    assert "rank 0: " in str(caught.value) or "rank 1: " in str(caught.value)
    assert not is_sound(schedule)
    assert not _is_valid(schedule)


def test_the_offending_cell_is_marked_in_the_grid() -> None:
    with pytest.raises(ScheduleError) as caught:
        validate(parse_schedule("0F0 0F1 0B0 0F1 0B1\n1F0 1B0 1F1 1B1"))
    assert "rank 0: 0F0   0F1   0B0   [0F1] 0B1" in str(caught.value)


def test_kinds_and_numbers_that_do_not_exist() -> None:
    with pytest.raises(ScheduleError) as caught:
        parse_schedule("0F0 0X0\n1F0 nonsense")
    assert [problem.split(":")[0] for problem in caught.value.problems] == ["line 1, cell 2", "line 2, cell 2"]
    rows = ((Action(0, "F", 0), Action(0, "BW", 0)),)
    with pytest.raises(ScheduleError, match="rank 0, cell 2, 0BW0: no kind of action 'BW'"):
        validate(Schedule(rows))
    with pytest.raises(ScheduleError, match=r"rank 0, cell 2, -1B0: .*counted from 0"):
        validate(Schedule(((Action(0, "F", 0), Action(-1, "B", 0)),)))
    with pytest.raises(ScheduleError, match="empty"):
        validate(Schedule(((), ())))


def test_names_numbers_and_files(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="did you mean 'zb-h2'"):
        make_schedule("zb-h", 2, 4)
    with pytest.raises(ConfigError) as caught:
        make_schedule("1f1b", 0, 0)
    assert len(caught.value.problems) == 2
    with pytest.raises(ConfigError, match="dualpipe needs an even number of ranks, not 3: take 4"):
        make_schedule("dualpipe", 3, 6)
    with pytest.raises(ConfigError, match="zb-v has 2 stages a rank, not 3: give 2"):
        make_schedule("zb-v", 2, 6, 3)
    path = tmp_path / "mine.txt"
    path.write_text("# by hand\n" + GOOD)
    assert make_schedule(str(path), 2, 2).rows == parse_schedule(GOOD).rows
    with pytest.raises(ConfigError, match="is for 2 ranks and 2 microbatches, not for 2 and 4"):
        make_schedule(str(path), 2, 4)
    path.write_text(GOOD.replace("1B1", ""))
    with pytest.raises(ScheduleError, match=r"mine.txt: 1B1 .* is missing"):
        make_schedule(str(path), 2, 2)


def test_a_new_kind_of_action_touches_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(KINDS, "G", Kind("G", "gather parameters", needed_by=("F", "B")))
    good = parse_schedule("0G0 0F0 0B0\n1G0 1F0 1B0")
    assert str(good) == "0G0 0F0 0B0\n1G0 1F0 1B0"
    lowered = validate(lower(validate(good)))
    assert is_sound(good)
    assert is_sound(lowered)
    costs = replace(Costs.uniform(), compute={"F": (1.0,), "B": (2.0,), "G": (0.25,)})
    timeline = simulate(lowered, costs)
    assert timeline.step == 0.25 + 1 + 1 + 2 + 2
    assert max(timeline.peaks) == 1
    with pytest.raises(ScheduleError, match=r"rank 1, cell 1, 1F0: comes before 1G0 .cell 2."):
        validate(parse_schedule("0G0 0F0 0B0\n1F0 1G0 1B0"))


def test_costs_that_cannot_be_used() -> None:
    schedule = make_schedule("1f1b", 2, 2)
    for costs, found in (
        (Costs.uniform(F=-1), "cost of F = -1"),
        (Costs.uniform(latency=float("nan")), "latency = nan"),
        (Costs.uniform(activation=(1.0, 1.0, 1.0)), "activation is given for 3 stages, the schedule has 2"),
        (Costs.uniform(sizes=(1.0,)), "sizes of 1 microbatches, the schedule has 2"),
        (parse_costs("F=1:2:3"), "cost of F is given for 3 stages"),
    ):
        with pytest.raises(ConfigError, match=found):
            simulate(schedule, costs)


SEARCHES = [
    (2, 5, {}, None),
    (4, 8, {}, 4.0),
    (4, 8, {"latency": 2.0}, 4.0),
    (4, 6, {"latency": 0.5, "transfer": 0.25}, None),
    (4, 16, {"F": 2.0, "I": 3.0, "W": 1.0}, 2.0),
    (3, 7, {"activation": (1.0, 2.0, 1.0)}, 5.0),
]


@pytest.mark.parametrize("p, m, given_costs, memory", SEARCHES)
def test_the_search_is_never_worse_than_a_fixed_schedule(
    p: int, m: int, given_costs: dict, memory: float | None
) -> None:
    costs = Costs.uniform(kept=1.0, **given_costs)
    found = search(p, m, costs, memory)
    timeline = simulate(found, split_costs(costs, p, found.stages // p))
    assert _is_valid(found)
    assert memory is None or max(timeline.peaks) <= memory + 1e-9
    for name in set(FIXED) - {"forward", "dualpipe"}:
        for v in (1, 2, 3, 4) if name == "interleaved" else (1,):
            fixed = make_schedule(name, p, m, v)
            other = simulate(fixed, split_costs(costs, p, fixed.stages // p))
            if memory is None or max(other.peaks) <= memory + 1e-9:
                assert timeline.step <= other.step + 1e-6, name
                if given_costs.get("latency") == 2.0:
                    assert timeline.step < 0.95 * other.step, name


def test_the_search_prefers_the_simplest_and_names_the_least_memory() -> None:
    assert search(1, 4, Costs.uniform()).name == "auto: gpipe"
    assert search(4, 8, Costs.uniform(), 4.0, virtuals=(1,)).name == "auto: zb-h1"
    assert search(4, 8, Costs.uniform(I=2.0, W=0.0), 4.0, virtuals=(1,)).name == "auto: 1f1b"
    with pytest.raises(ConfigError, match=r"the least that works is 1\.0$"):
        search(4, 8, Costs.uniform(kept=1.0), 0.5)
    least = search(4, 8, Costs.uniform(kept=1.0), 1.0)
    assert max(simulate(least, split_costs(Costs.uniform(kept=1.0), 4, least.stages // 4)).peaks) <= 1.0
    assert make_schedule("auto", 4, 8, 3).stages == 12
    with pytest.raises(ConfigError) as caught:
        search(0, 8, Costs.uniform(), virtuals=(0,))
    assert len(caught.value.problems) == 2


def test_split_costs_keep_the_whole() -> None:
    costs = Costs.uniform(activation=(1.0, 3.0))
    split = split_costs(replace(costs, compute={"F": (2.0, 4.0), "I": (1.0,), "W": (1.0,)}), 2, 2)
    assert split.compute["F"] == (1.0, 1.0, 2.0, 2.0)
    assert split.activation == (0.5, 0.5, 1.5, 1.5)
