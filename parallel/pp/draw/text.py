"""Timelines as text: a grid whose columns are proportional to time."""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction
from functools import reduce

from parallel.pp.action import Action
from parallel.pp.draw.colours import Palette, text_on
from parallel.pp.draw.figures import number, stages_of, summary, ticks
from parallel.pp.schedule import Schedule
from parallel.pp.timeline import Timeline

__all__ = ["document", "grid"]

_USUAL = 160
_MOST_BANDS = 6
_MOST_SPARE = 1.4
_Style = tuple[tuple[int, int, int], bool] | None
"""Of a character: its background and whether it is on the critical path."""


def document(timeline: Timeline) -> bytes:
    """The grid and the summary as comments, then the schedule in its own form: a schedule file."""
    notes = f"{summary(timeline)}\n\n{grid(timeline)}\n".split("\n")
    table = Schedule(tuple(tuple(span.action for span in row) for row in timeline.rows), timeline.name)
    return "\n".join([*(f"# {note}".rstrip() for note in notes), str(table), ""]).encode()


def grid(timeline: Timeline, colour: bool = False, width: int | None = None) -> str:
    """One line a rank: each action where and as long as it runs, ``-`` while it goes on, dots while the rank is idle.

    Actions show kind and microbatch, and their stage where a rank has several. Where all times are multiples of one
    unit, columns align with it; otherwise times are rounded to columns.

    Args:
        timeline: simulated or measured.
        colour: with ANSI colours; the critical path is then underlined.
        width: characters, at which the grid is folded into bands; a grid of more than a few bands is shrunk to it
            instead. None: no folding, and 160 characters where nothing asks for more.
    """
    long = any(len(stages) > 1 for stages in stages_of(timeline))
    heads = [f"rank {rank}".ljust(len(f"rank {len(timeline.rows) - 1}") + 2) for rank in range(len(timeline.rows))]
    margin = max(map(len, heads), default=0)
    scale = _scale(timeline, long, None if width is None else max(20, width - margin))
    rows = [_row(timeline, rank, scale, long) for rank in range(len(timeline.rows))]
    styles = _styles(timeline, scale) if colour else None
    whole = scale.columns
    band = whole if width is None else max(20, width - margin) // scale.cell * scale.cell
    ruler = _ruler(timeline.step, scale)
    bands = []
    for first in range(0, max(1, whole), max(1, band)):
        part = slice(first, first + band)
        lines = [("time".ljust(margin) + ruler[part]).rstrip()]
        for rank, head in enumerate(heads):
            text = rows[rank][part]
            lines.append(head + (_paint(text, styles[rank][part]) if styles else text.rstrip()))
        bands.append("\n".join(lines))
    return "\n\n".join(bands)


@dataclass(frozen=True, slots=True)
class _Scale:
    """From times to columns.

    Attributes:
        start: time of column 0.
        rate: columns per unit of time.
        columns: of the whole step.
        cell: columns that should not be parted when the grid is folded.
    """

    start: float
    rate: float
    columns: int
    cell: int = 1

    def column(self, time: float) -> int:
        return min(self.columns, math.floor((time - self.start) * self.rate + 0.5 + 1e-6))


def _label(action: Action, long: bool) -> str:
    return str(action) if long else f"{action.op}{action.microbatch}"


def _scale(timeline: Timeline, long: bool, width: int | None) -> _Scale:
    start, step = timeline.start, timeline.step
    sizes = [
        (span.end - span.start, len(_label(span.action, long)) + 1)
        for row in timeline.rows
        for span in row
        if span.end > span.start
    ]
    if not sizes or step <= 0:
        return _Scale(start, 1.0, 1)
    wanted = step * max(need / size for size, need in sizes)
    if unit := _unit(timeline):
        cell = max(math.ceil(need / round(size / unit)) for size, need in sizes)
        columns = round(step / unit) * cell
        if columns <= _MOST_SPARE * wanted and (width is None or columns <= _MOST_BANDS * width):
            return _Scale(start, cell / unit, columns, cell)
    limit = width or _USUAL
    typical = sorted(size for size, _ in sizes)[len(sizes) // 10]
    columns = math.ceil(step / typical * (1 + max(need for _, need in sizes)))
    columns = max(limit, columns) if columns <= _MOST_BANDS * limit else limit
    return _Scale(start, columns / step, columns)


def _unit(timeline: Timeline) -> float:
    """The greatest time of which all times are multiples; 0 if there is none to speak of."""
    start, step = timeline.start, timeline.step
    times = {time - start for row in timeline.rows for span in row for time in (span.start, span.end)}
    exact = [Fraction(time).limit_denominator(1000) for time in times]
    if any(abs(fraction - time) > 1e-9 * step for fraction, time in zip(exact, times, strict=True)):
        return 0.0
    whole = math.lcm(*(fraction.denominator for fraction in exact))
    return reduce(math.gcd, (int(fraction * whole) for fraction in exact), 0) / whole


def _row(timeline: Timeline, rank: int, scale: _Scale, long: bool) -> str:
    parts: list[str] = []
    at = 0
    for span in timeline.rows[rank]:
        first, end = max(at, scale.column(span.start)), scale.column(span.end)
        parts.append(_idle(first - at))
        parts.append(_busy(_label(span.action, long), span.action.op, end - first))
        at = max(at, first, end)
    parts.append(_idle(scale.columns - at))
    return "".join(parts)


def _idle(width: int) -> str:
    return "." * (width - 1) + " " if width > 1 else "." * width


def _busy(label: str, op: str, width: int) -> str:
    """A cell; where there is no room for its microbatch it shows its kind alone."""
    if width == len(label):
        return label
    shown = label if width > len(label) else op
    return shown.ljust(width - 1, "-") + " " if width > len(shown) else shown[: max(0, width)]


def _ruler(step: float, scale: _Scale) -> str:
    line = [" "] * scale.columns
    for time in ticks(step, scale.columns // 10):
        text, column = number(time), scale.column(scale.start + time)
        if column + len(text) <= scale.columns:
            line[column : column + len(text)] = text
    return "".join(line)


def _styles(timeline: Timeline, scale: _Scale) -> list[list[_Style]]:
    palette, critical = Palette(timeline), set(timeline.critical)
    rows: list[list[_Style]] = []
    for rank, row in enumerate(timeline.rows):
        styles: list[_Style] = [None] * scale.columns
        for span in row:
            style = palette.of(rank, span.action), span.action in critical
            for column in range(scale.column(span.start), scale.column(span.end)):
                styles[column] = style
        rows.append(styles)
    return rows


def _paint(text: str, styles: list[_Style]) -> str:
    """The text with ANSI sequences, colours taken from the 6 x 6 x 6 cube that every terminal knows."""
    parts: list[str] = []
    last: _Style = None
    for character, style in zip(text, styles, strict=True):
        if style != last:
            parts.append("\033[0m" if last else "")
            if style:
                red, green, blue = (round(part / 255 * 5) for part in style[0])
                ink = 231 if text_on(style[0])[0] == 255 else 16
                parts.append(f"\033[48;5;{16 + 36 * red + 6 * green + blue};38;5;{ink}{';1;4' * style[1]}m")
        parts.append(character)
        last = style
    return "".join(parts) + ("\033[0m" if last else "")
