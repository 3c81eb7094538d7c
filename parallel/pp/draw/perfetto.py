"""Timelines in the Chrome trace event format, which Perfetto (ui.perfetto.dev) and chrome://tracing open.

One process a rank: what it computes on track 0, the messages that reach it on the tracks below, its memory as a
counter, and arrows from the action that made a message through the message to the action that used it.
"""

from __future__ import annotations

import json
from typing import Any

from parallel.pp.action import KINDS, Value
from parallel.pp.draw.figures import headline
from parallel.pp.timeline import Span, Timeline, Transfer

__all__ = ["events", "render"]

_Event = dict[str, Any]
_Key = tuple[str, int, int]


def render(timeline: Timeline) -> bytes:
    """The trace as JSON."""
    title, figures = headline(timeline)
    trace = {
        "traceEvents": events(timeline),
        "displayTimeUnit": "ms",
        "otherData": {"title": title, "figures": figures},
    }
    return json.dumps(trace, separators=(",", ":"), allow_nan=False).encode()


def events(timeline: Timeline) -> list[_Event]:
    """The events of a trace; times in microseconds from the start of the step."""
    start, critical = timeline.start, set(timeline.critical)
    found: list[_Event] = []
    for rank, row in enumerate(timeline.rows):
        found.append(_name("process_name", rank, 0, {"name": f"rank {rank}"}))
        found.append(_name("process_sort_index", rank, 0, {"sort_index": rank}))
        found.append(_name("thread_name", rank, 0, {"name": "compute"}))
        for span in row:
            event = _slice(start, rank, 0, span)
            event["args"]["critical"] = span.action in critical
            found.append(event)
    tracks = _tracks(timeline)
    for rank, track in sorted({(t.target, track) for t, track in tracks}):
        found.append(_name("thread_name", rank, track, {"name": "transfers" + f" {track}" * (track > 1)}))
    for transfer, track in tracks:
        event = _slice(start, transfer.target, track, transfer)
        event["args"] |= {"from": transfer.source, "to": transfer.target}
        found.append(event)
    found += _flows(timeline, dict(tracks))
    found += _counters(timeline)
    return found


def _us(start: float, time: float) -> float:
    return round((time - start) * 1e6, 3)


def _name(what: str, rank: int, track: int, args: _Event) -> _Event:
    return {"ph": "M", "name": what, "pid": rank, "tid": track, "args": args}


def _slice(start: float, rank: int, track: int, within: Span | Transfer) -> _Event:
    first, action = _us(start, within.start), within.action
    return {
        "ph": "X",
        "name": str(action),
        "cat": KINDS[action.op].name,
        "pid": rank,
        "tid": track,
        "ts": first,
        "dur": round(_us(start, within.end) - first, 3),
        "args": {"stage": action.stage, "microbatch": action.microbatch, "kind": KINDS[action.op].name},
    }


def _tracks(timeline: Timeline) -> list[tuple[Transfer, int]]:
    """Every message that takes time, with a track of its target on which nothing else is under way."""
    free: dict[tuple[int, int], float] = {}
    placed = []
    for transfer in sorted(timeline.transfers, key=lambda t: (t.start, t.end)):
        if transfer.end <= transfer.start:
            continue
        track = 1
        while free.get((transfer.target, track), transfer.start) > transfer.start:
            track += 1
        free[transfer.target, track] = transfer.end
        placed.append((transfer, track))
    return placed


def _flows(timeline: Timeline, tracks: dict[Transfer, int]) -> list[_Event]:
    start, (made, used) = timeline.start, _ends(timeline)
    found = []
    for index, transfer in enumerate(timeline.transfers):
        stage, op, microbatch = transfer.action
        key = (KINDS[op].gives[0].name, stage, microbatch)
        if key not in made or key not in used:
            continue
        found.append(_arrow(start, "s", index, (transfer.source, 0), made[key]))
        if transfer in tracks:
            found.append(_arrow(start, "t", index, (transfer.target, tracks[transfer]), transfer))
        found.append(_arrow(start, "f", index, (transfer.target, 0), used[key]))
    return found


def _arrow(start: float, phase: str, index: int, place: tuple[int, int], within: Span | Transfer) -> _Event:
    """One end of an arrow, or its middle; its time says which slice it belongs to, so it keeps off the borders."""
    time = within.start + (within.end - within.start) * {"s": 0.99, "t": 0.5, "f": 0.01}[phase]
    rank, track = place
    event = {"ph": phase, "name": "message", "cat": "message", "id": index, "pid": rank, "tid": track}
    return event | {"ts": _us(start, time)} | ({"bp": "e"} if phase == "f" else {})


def _ends(timeline: Timeline) -> tuple[dict[_Key, Span], dict[_Key, Span]]:
    """Value -> the action that makes it, and the one that uses it."""
    made: dict[_Key, Span] = {}
    used: dict[_Key, Span] = {}

    def note(table: dict[_Key, Span], values: tuple[Value, ...], span: Span) -> None:
        for value in values:
            table[value.name, span.action.stage + value.offset, span.action.microbatch] = span

    for row in timeline.rows:
        for span in row:
            note(made, KINDS[span.action.op].gives, span)
            note(used, KINDS[span.action.op].takes, span)
    return made, used


def _counters(timeline: Timeline) -> list[_Event]:
    start, found = timeline.start, []
    for rank, curve in enumerate(timeline.memory):
        points = [(start, 0.0), *sorted(curve, key=lambda point: point[0])]
        for time, held in points:
            event = {"ph": "C", "name": "memory", "pid": rank, "tid": 0, "ts": _us(start, time)}
            found.append(event | {"args": {"held": round(held, 9)}})
    return found
