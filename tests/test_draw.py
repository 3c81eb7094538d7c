"""Pictures of schedules: every form shows exactly the actions of the timeline, where and as long as they are."""

from __future__ import annotations

import importlib.util
import itertools
import json
import os
import re
import struct
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import numpy as np
import pytest

from launch import draw as program
from launch.cli import main
from parallel.errors import ConfigError, ScheduleError
from parallel.pp.action import KINDS, Action
from parallel.pp.draw import draw, grid, path_problems, summary
from parallel.pp.draw.colours import Palette
from parallel.pp.draw.figures import number, ticks
from parallel.pp.draw.file import FORMS
from parallel.pp.draw.perfetto import events
from parallel.pp.draw.text import document
from parallel.pp.schedule import parse_schedule
from parallel.pp.schedules import SCHEDULES, make_schedule
from parallel.pp.simulate import parse_costs, simulate
from parallel.pp.timeline import Span, Timeline, Transfer
from parallel.pp.validate import validate

ROOT = Path(__file__).parent.parent
SVG = "{http://www.w3.org/2000/svg}"

VEE = "0F0 3F0 3I0 0F1 3W0 3F1 3I1 0I0 3W1 0W0 0I1 0W1\n1F0 2F0 1F1 2F1 2I0 1I0 2W0 1W0 2I1 1I1 2W1 1W1"
TWO_WAY = "0F0 1F1 1B1 0B0\n0F1 1F0 1B0 0B1"


def simulated(name: str, ranks: int = 4, microbatches: int = 8, virtual: int = 1, costs: str = "") -> Timeline:
    return simulate(make_schedule(name, ranks, microbatches, virtual), parse_costs(costs))


def table(text: str, costs: str = "") -> Timeline:
    return simulate(validate(parse_schedule(text, "table")), parse_costs(costs))


def measured() -> Timeline:
    """As a clock gives it: arbitrary times far from zero, several stages a rank, no memory, no critical path."""
    rng = np.random.default_rng(5)
    plan, rows = table(VEE, "latency=0.4"), []
    for row in plan.rows:
        at = [1e5 + 1e-3 * (span.start + 0.3 * rng.random()) for span in row]
        rows.append(tuple(Span(s.action, t, t + 1e-3 * (s.end - s.start) * 0.7) for s, t in zip(row, at, strict=True)))
    moves = [Transfer(t.action, t.source, t.target, 1e5 + 1e-3 * t.start, 1e5 + 1e-3 * t.end) for t in plan.transfers]
    return Timeline(tuple(rows), tuple(moves), name="run <a> & 'b'")


TIMELINES = {
    "1f1b": lambda: simulated("1f1b"),
    "latency": lambda: simulated("gpipe", 3, 5, costs="F=1,I=0.7,W=0.4,latency=0.213,transfer=0.1"),
    "in flight": lambda: simulated("gpipe", 3, 5, costs="latency=3.5"),
    "vee": lambda: table(VEE, "latency=0.25,kept=0.5"),
    "two ways": lambda: table(TWO_WAY),
    "measured": measured,
    "one action": lambda: table("0F0"),
    "no time": lambda: simulated("1f1b", 2, 2, costs="F=0,B=0"),
    "idle rank": lambda: Timeline(((Span(Action(0, "F", 0), 0.0, 1.0),), ())),
    "nothing": lambda: Timeline(()),
}


def test_the_grid_of_1f1b() -> None:
    assert grid(simulated("1f1b", 3, 4)).splitlines() == [
        "time    0              5              10             15",
        "rank 0  F0 F1 F2 ........... B0--- F3 B1--- .. B2--- .. B3---",
        "rank 1  .. F0 F1 ..... B0--- F2 B1--- F3 B2--- .. B3--- .....",
        "rank 2  ..... F0 B0--- F1 B1--- F2 B2--- F3 B3--- ...........",
    ]


def test_the_grid_names_stages_where_a_rank_has_several_and_folds_at_the_width() -> None:
    assert grid(table(VEE), width=36).splitlines() == [
        "time    0                   5",
        "rank 0  0F0 ....... 3F0 3I0 0F1 3W0",
        "rank 1  ... 1F0 2F0 ........... 1F1",
        "",
        "time                10",
        "rank 0  ... 3F1 3I1 0I0 3W1 0W0 ...",
        "rank 1  2F1 2I0 1I0 2W0 1W0 2I1 1I1",
        "",
        "time        15",
        "rank 0  0I1 0W1",
        "rank 1  2W1 1W1",
    ]


@pytest.mark.parametrize("width", [None, 40, 100])
def test_a_measured_grid_shows_every_action_in_its_place(width: int | None) -> None:
    timeline = measured()
    bands = grid(timeline, width=width).split("\n\n")
    rows = [
        "".join(band.splitlines()[1 + rank][8:].ljust(32 if width == 40 else 0) for band in bands) for rank in (0, 1)
    ]
    assert width is None or all(len(line) <= width for band in bands for line in band.splitlines())
    for row, spans in zip(rows, timeline.rows, strict=True):
        assert re.findall(r"\d[FIW]\d", row) == [str(span.action) for span in spans]
        columns = [match.start() for match in re.finditer(r"\d[FIW]\d", row)]
        rate = (columns[-1] - columns[0]) / (spans[-1].start - spans[0].start)
        for span, column in zip(spans, columns, strict=True):
            assert column == pytest.approx(columns[0] + rate * (span.start - spans[0].start), abs=1.01)


def test_a_grid_too_long_to_fold_is_shrunk_to_the_width() -> None:
    lines = grid(simulated("1f1b", 4, 200), width=80).splitlines()
    assert len(lines) == 5 and max(map(len, lines)) <= 80


def test_colour_changes_nothing_but_colour() -> None:
    timeline = simulated("1f1b")
    painted = grid(timeline, colour=True, width=60)
    assert re.sub(r"\033\[[\d;]*m", "", painted).replace(" \n", "\n").rstrip() == grid(timeline, width=60)
    backgrounds: dict[str, set[str]] = {"F": set(), "B": set()}
    for background, op in re.findall(r"\033\[48;5;(\d+);[\d;]*m([FB])", painted):
        backgrounds[op].add(background)
    assert all(backgrounds.values()) and not backgrounds["F"] & backgrounds["B"]
    underlined = re.findall(r"\033\[48;[\d;]*;1;4m([FB]\d)", painted)
    assert len(underlined) == len(timeline.critical)
    assert "\033" not in grid(timeline, width=60)


@pytest.mark.parametrize("name", TIMELINES)
def test_text_is_a_schedule_file(name: str, tmp_path: Path) -> None:
    timeline = TIMELINES[name]()
    draw(timeline, tmp_path / "x.txt")
    text = (tmp_path / "x.txt").read_text()
    assert text.encode() == document(timeline)
    assert all(f"# {line}".rstrip() in text.splitlines() for line in grid(timeline).splitlines())
    rows = tuple(tuple(span.action for span in row) for row in timeline.rows if row)
    if rows:
        assert parse_schedule(text).rows == rows
    if name not in ("idle rank", "measured", "nothing"):
        microbatches = 1 + max(action.microbatch for row in rows for action in row)
        assert make_schedule(str(tmp_path / "x.txt"), len(rows), microbatches).rows == rows


def rects(root: ElementTree.Element, role: str) -> list[ElementTree.Element]:
    return [rect for rect in root.iter(f"{SVG}rect") if rect.get("class") == role]


@pytest.mark.parametrize("name", TIMELINES)
def test_svg_has_one_rect_for_each_span(name: str) -> None:
    timeline = TIMELINES[name]()
    root = ElementTree.fromstring(FORMS[".svg"](timeline))
    spans = [(rank, span) for rank, row in enumerate(timeline.rows) for span in row]
    boxes = rects(root, "span")
    assert len(boxes) == len(spans)
    assert timeline.name in (root.findtext(f"{SVG}title") or "")
    whole = float(root.get("width", 0))
    left = min((float(box.get("x", 0)) for box in boxes), default=0.0)
    longest = max((span.end - span.start for _, span in spans), default=0.0)
    scale = max((float(box.get("width", 0)) for box in boxes), default=0.0) / (longest or 1.0)
    heights: dict[str, set[int]] = {}
    for (rank, span), box in zip(spans, boxes, strict=True):
        x, width = float(box.get("x", 0)), float(box.get("width", 0))
        assert width == pytest.approx((span.end - span.start) * scale, abs=0.02)
        assert x == pytest.approx(left + (span.start - timeline.start) * scale, abs=0.3)
        assert x + width < whole
        heights.setdefault(box.get("y", ""), set()).add(rank)
        assert (box.findtext(f"{SVG}title") or "").startswith(f"{span.action}: {KINDS[span.action.op].name}, ")
    assert all(len(ranks) == 1 for ranks in heights.values())


def test_svg_shows_idle_time_critical_path_memory_and_transfers() -> None:
    timeline = simulated("1f1b", 4, 8, costs="latency=0.5")
    root = ElementTree.fromstring(FORMS[".svg"](timeline))
    scale = float(rects(root, "span")[0].get("width", 0)) / 1.0
    idle = sum(float(box.get("width", 0)) for box in rects(root, "idle"))
    assert idle / scale == pytest.approx(timeline.step * 4 * timeline.bubble_fraction, abs=0.02)
    lines = [line.get("class") for tag in ("polyline", "polygon") for line in root.iter(SVG + tag)]
    assert lines.count("memory") == 4 and lines.count("transfer") == len(timeline.transfers) == 48
    assert b'"transfer"' not in FORMS[".svg"](simulated("1f1b"))
    outlined = sum(float(box.get("width", 0)) for box in rects(root, "critical"))
    ends = {span.action: span.end - span.start for row in timeline.rows for span in row}
    assert outlined / scale == pytest.approx(sum(ends[action] for action in timeline.critical), abs=0.02)
    texts = [text.text for text in root.iter(f"{SVG}text")]
    assert {f"peak {number(peak)}" for peak in timeline.peaks} == {"peak 4", "peak 3", "peak 2", "peak 1"} <= set(texts)
    assert f"step {number(timeline.step)}" in str(texts[1])


@pytest.mark.parametrize("name", TIMELINES)
def test_png_is_written(name: str, tmp_path: Path) -> None:
    draw(TIMELINES[name](), tmp_path / "x.png")
    data = (tmp_path / "x.png").read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n" and data[-8:-4] == b"IEND"
    width, height = struct.unpack(">II", data[16:24])
    assert width >= 1280 and height >= 150


@pytest.mark.parametrize("name", TIMELINES)
def test_trace_events_match_the_timeline(name: str) -> None:
    timeline = TIMELINES[name]()
    trace = json.loads(FORMS[".json"](timeline))
    assert set(trace) == {"traceEvents", "displayTimeUnit", "otherData"} and trace["displayTimeUnit"] in ("ms", "ns")
    slices = [event for event in trace["traceEvents"] if event["ph"] == "X"]
    compute = [event for event in slices if event["tid"] == 0]
    spans = [(rank, span) for rank, row in enumerate(timeline.rows) for span in row]
    assert [(event["pid"], event["name"]) for event in compute] == [(rank, str(span.action)) for rank, span in spans]
    for event, (_, span) in zip(compute, spans, strict=True):
        assert event["ts"] == pytest.approx((span.start - timeline.start) * 1e6, abs=0.002)
        assert event["dur"] == pytest.approx((span.end - span.start) * 1e6, abs=0.002)
        assert event["args"]["critical"] == (span.action in timeline.critical)
    moves = sorted((event["pid"], event["name"]) for event in slices if event["tid"] > 0)
    assert moves == sorted((t.target, str(t.action)) for t in timeline.transfers if t.end > t.start)
    counters = [(e["pid"], e["args"]["held"]) for e in trace["traceEvents"] if e["ph"] == "C"]
    for rank, _ in enumerate(timeline.memory):
        assert max(held for pid, held in counters if pid == rank) == timeline.peak(rank)


@pytest.mark.parametrize("name", TIMELINES)
def test_traces_keep_to_the_format(name: str) -> None:
    """https://docs.google.com/document/d/1CvAClvFfyA5R-PhYUmn5OOQtYMH4h6I0nSsKchNAySU"""
    found = events(TIMELINES[name]())
    fields = {"X": {"dur", "args"}, "M": {"args"}, "C": {"args"}, "s": {"id", "cat"}, "t": {"id"}, "f": {"bp"}}
    tracks: dict[tuple[int, int], list[tuple[float, float]]] = {}
    flows: dict[int, list[tuple[float, str]]] = {}
    for event in found:
        assert {"name", "ph", "pid", "tid"} | fields[event["ph"]] <= set(event)
        assert event["ph"] == "M" or (isinstance(event["ts"], float) and event["ts"] >= 0)
        if event["ph"] == "X":
            tracks.setdefault((event["pid"], event["tid"]), []).append((event["ts"], event["ts"] + event["dur"]))
        if event["ph"] == "C":
            assert all(isinstance(value, float) for value in event["args"].values())
    for track in tracks.values():
        assert all(a[0] <= a[1] <= b[0] + 0.002 for a, b in itertools.pairwise(sorted(track)))
    named = {(event["pid"], event["tid"]) for event in found if event["name"] == "thread_name"}
    assert set(tracks) <= named
    for event in found:
        if event["ph"] in ("s", "t", "f"):
            flows.setdefault(event["id"], []).append((event["ts"], event["ph"]))
            assert any(a <= event["ts"] <= b for a, b in tracks[event["pid"], event["tid"]])
    for flow in flows.values():
        assert [phase for _, phase in flow] in (["s", "t", "f"], ["s", "f"])
        assert name == "measured" or flow == sorted(flow, key=lambda step: step[0])


def test_an_arrow_runs_from_the_maker_of_a_message_to_its_user() -> None:
    timeline = table(VEE, "latency=0.25")
    found = events(timeline)
    arrows: dict[int, list[str]] = {}
    for event in found:
        if event["ph"] in ("s", "f"):
            (name,) = (
                other["name"]
                for other in found
                if other["ph"] == "X"
                and (other["pid"], other["tid"]) == (event["pid"], event["tid"])
                and other["ts"] < event["ts"] < other["ts"] + other["dur"]
            )
            arrows.setdefault(event["id"], []).append(name)
    expected = [[f"{s}F{m}", f"{s + 1}F{m}"] for s in (0, 2) for m in (0, 1)]
    expected += [[f"{s}I{m}", f"{s - 1}I{m}"] for s in (3, 1) for m in (0, 1)]
    assert sorted(arrows.values()) == sorted(expected)


def test_shades_tell_chunks_directions_and_microbatches_apart() -> None:
    vee, two_way = table(VEE), table(TWO_WAY)
    for timeline, groups in ((vee, 2), (two_way, 2), (simulated("1f1b"), 1)):
        palette = Palette(timeline)
        assert palette.groups == groups
        actions = [(rank, span.action) for rank, row in enumerate(timeline.rows) for span in row]
        colours = {(a.op, palette.group(rank, a), a.microbatch): palette.of(rank, a) for rank, a in actions}
        assert len(set(colours.values())) == len(colours)
    assert Palette(two_way).two_way and not Palette(vee).two_way
    assert Palette(two_way).group(0, Action(1, "F", 1)) == Palette(two_way).group(1, Action(0, "F", 1)) == 1
    assert Palette(vee).group(0, Action(3, "F", 0)) == Palette(vee).group(1, Action(2, "F", 0)) == 1


@pytest.mark.parametrize(
    "seen",
    [
        [[1, 0, 0], [0, 1, 0], [0, 0, 1]],
        [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
        [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.01182, 0.04294, 0.968881]],
        [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.3039]],
    ],
    ids=["all cones", "no red cone", "no green cone", "no blue cone"],
)
def test_actions_differ_in_colour_for_everybody(seen: list[list[float]]) -> None:
    """Machado et al. 2009; difference in CIELAB, where about 2 is the least that is seen."""

    def lab(colour: tuple[int, int, int]) -> np.ndarray:
        value = np.array(colour) / 255
        linear = np.where(value <= 0.04045, value / 12.92, ((value + 0.055) / 1.055) ** 2.4)
        xyz = [[0.4339, 0.3762, 0.1899], [0.2126, 0.7152, 0.0722], [0.0177, 0.1095, 0.8727]]
        x, y, z = np.cbrt(np.array(xyz) @ np.clip(np.array(seen) @ linear, 0, 1))
        return np.array([116 * y - 16, 500 * (x - y), 200 * (y - z)])

    palette = Palette(table(VEE))
    shades = {op: [lab(palette.shade(op, group, p)) for group in (0, 1) for p in (0.0, 0.5, 1.0)] for op in "FBIW"}
    for one, other in itertools.combinations(shades.values(), 2):
        assert min(np.linalg.norm(a - b) for a in one for b in other) > 10


def test_summary_of_1f1b() -> None:
    assert summary(simulated("1f1b", 3, 2)).splitlines() == [
        "1f1b: 3 ranks, 3 stages, 2 microbatches",
        "step time        12",
        "bubble           6: the longest idle time of a rank between its first and last action",
        "bubble fraction  50.0% of the time of all ranks",
        "peak memory      2, 2, 1 (ranks 0 to 2)",
        "critical path    0F0 1F0 2F0 2B0 2F1 2B1 1B1 0B1",
    ]
    assert "memory" not in summary(measured()) and "critical" not in summary(measured())
    assert "more ..." in summary(simulated("1f1b", 4, 40))


@pytest.mark.parametrize("length", [0.0, 1e-7, 0.99, 1.0, 33.0, 1e9])
@pytest.mark.parametrize("most", [1, 2, 7, 30])
def test_ticks_are_few_and_round(length: float, most: int) -> None:
    found = ticks(length, most)
    assert found[0] == 0 and found[-1] <= length * (1 + 1e-6) and len(found) <= most
    if length and most > 5:
        assert len(found) > most / 3


@pytest.mark.parametrize("name", list(SCHEDULES))
def test_every_schedule_is_drawn_in_every_form(name: str, tmp_path: Path) -> None:
    timeline = simulated(name, costs="latency=0.2")
    for suffix in FORMS:
        draw(timeline, tmp_path / f"x{suffix}")
        assert (tmp_path / f"x{suffix}").stat().st_size > 500


def refused(*words: object) -> tuple[str, ...]:
    with pytest.raises((ConfigError, ScheduleError)) as error:
        program.main([str(word) for word in words])
    return error.value.problems


def test_every_problem_is_named_at_once() -> None:
    problems = refused(
        *("1f1d", "--stages", 0, "--microbatches", -1, "--costs", "F=x,Q=1", "--out", "/nowhere/x.pdf", "--colour", 1)
    )
    for words in ("did you mean '1f1b'", "stages = 0", "microbatches = -1", "'F=x'", "'Q=1'", "'colour'", "/nowhere"):
        assert any(words in problem for problem in problems), words
    assert any(".txt, .svg, .png, .json" in problem for problem in problems)


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ([], "expected SCHEDULE"),
        (["1f1b", "gpipe"], "expected SCHEDULE"),
        (["absent.txt"], "absent.txt"),
        (["1f1b", "--costs", "W=nan"], "finite"),
        (["1f1b", "--costs", "F=-1"], "negative"),
        (["1f1b", "--costs", "F=1:2"], "2 stages"),
        (["1f1b", "--virtual", "3"], "3"),
        (["1f1b", "--stages", "two"], "whole number"),
        (["1f1b", "--out", "/"], "unknown form"),
    ],
)
def test_bad_input_is_refused(words: list[str], told: str) -> None:
    assert told in "\n".join(refused(*words))


def test_paths_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "folder.svg").mkdir()
    assert "is a folder" in path_problems(tmp_path / "folder.svg")[0]
    assert "no folder" in path_problems(tmp_path / "absent" / "x.svg")[0]
    assert path_problems(tmp_path / "x.svg") == []
    with pytest.raises(ConfigError, match=re.escape(".txt, .svg, .png, .json")):
        draw(measured(), tmp_path / "x.jpeg")
    monkeypatch.setattr(os, "access", lambda *_: False)
    assert "may not be written" in path_problems(tmp_path / "x.svg")[0]
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    assert "matplotlib" in path_problems(tmp_path / "x.png")[0]
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ConfigError, match="matplotlib"):
        FORMS[".png"](measured())
    assert list(tmp_path.iterdir()) == [tmp_path / "folder.svg"]


def test_the_program_prints_the_grid_and_the_summary(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["draw", "1f1b", "--stages", "3", "--microbatches", "4", "--costs", "F=2"]) == 0
    timeline = simulated("1f1b", 3, 4, costs="F=2")
    assert capsys.readouterr().out == f"{grid(timeline)}\n\n{summary(timeline)}\n"


def test_the_program_reads_back_what_it_wrote(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "mine.txt"
    assert main(["draw", "gpipe", "--stages", "3", "--microbatches", "5", "--out", str(path)]) == 0
    assert main(["draw", str(path), "--out", str(tmp_path / "x.svg")]) == 0
    assert "mine: 3 ranks, 3 stages, 5 microbatches" in capsys.readouterr().out
    assert "for 3 ranks and 5 microbatches, not for 4 and 5" in refused(path, "--stages", 4)[0]
    assert refused(path, "--virtual", 2) == (f"virtual = 2: {path} has 1 stage a rank",)
    path.write_text("0F0 0B0\n1F0")
    assert "1B0" in refused(path)[0]


def test_the_program_takes_no_torch(tmp_path: Path) -> None:
    code = f"import sys; from launch.cli import main; main(['draw', '1f1b', '--out', {str(tmp_path / 'x.svg')!r}]); "
    code += "sys.exit(' '.join({'torch', 'numpy', 'matplotlib'} & set(sys.modules)) or 0)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert result.returncode == 0, result.stderr
