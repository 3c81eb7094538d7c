"""What the picture of a timeline shows, and where: rows to scale, memory below each, legend, axis."""

from __future__ import annotations

import itertools
import math

from parallel.pp.action import KINDS
from parallel.pp.draw.colours import Palette, text_on
from parallel.pp.draw.figures import headline, number, stages_of, ticks
from parallel.pp.draw.scene import Box, Colour, Label, Line, Scene, Shape, label_width
from parallel.pp.timeline import Span, Timeline

__all__ = ["compose"]

_MARGIN, _RIGHT = 18.0, 92.0
_ROW, _STRIP, _GAP = 26.0, 18.0, 10.0
_CELL_TEXT, _SMALL, _NORMAL, _LARGE = 9.5, 9.0, 11.0, 16.0
_NARROWEST, _WIDEST = 640.0, 5000.0
_INK, _GREY, _PALE, _WHITE = (25, 25, 25), (110, 110, 110), (225, 225, 225), (255, 255, 255)
_MEMORY, _MEMORY_EDGE, _TRANSFER = (222, 214, 236), (126, 100, 170), (150, 150, 150)
_HAIR = 0.8


def compose(timeline: Timeline) -> Scene:
    """The picture of a timeline."""
    return _Picture(timeline).scene()


class _Picture:
    """Where everything of one timeline is, and the shapes for it."""

    def __init__(self, timeline: Timeline) -> None:
        self.timeline, self.start, self.palette = timeline, timeline.start, Palette(timeline)
        self.stages = [", ".join(map(str, stages)) for stages in stages_of(timeline)]
        several = any("," in stages for stages in self.stages)
        self.under = [f"stage{'s' * several} {stages}" if stages else "" for stages in self.stages]
        widest = max((label_width(text, _SMALL) for text in self.under), default=0.0)
        self.left = _MARGIN + min(150.0, max(52.0, widest + 10))
        self.length = _length(timeline)
        self.scale = self.length / timeline.step if timeline.step else 1.0
        self.entries, self.top = self._legend()
        self.strip = _STRIP if timeline.memory else 0.0
        self.pitch = _ROW + self.strip + _GAP + (0.0 if timeline.memory else 4.0)

    def scene(self) -> Scene:
        title, figures = headline(self.timeline)
        bottom = self.top + self.pitch * len(self.timeline.rows)
        scene = Scene(self.left + self.length + _RIGHT, bottom + 34.0, f"{title}; {figures}")
        scene.shapes += [Label(_MARGIN, 22.0, title, _LARGE, _INK, bold=True), Label(_MARGIN, 44.0, figures, 12.0)]
        scene.shapes += self.entries + self._axis(bottom)
        for rank in range(len(self.timeline.rows)):
            scene.shapes += self._idle(rank)
        for rank in range(len(self.timeline.rows)):
            scene.shapes += self._memory(rank)
        spans = [(rank, span) for rank, row in enumerate(self.timeline.rows) for span in row]
        scene.shapes += self._transfers()
        scene.shapes += [self._box(rank, span) for rank, span in spans]
        scene.shapes += self._critical()
        scene.shapes += [label for rank, span in spans for label in self._label(rank, span)]
        for rank in range(len(self.timeline.rows)):
            scene.shapes += self._heads(rank)
        return scene

    def x(self, time: float) -> float:
        return self.left + (time - self.start) * self.scale

    def y(self, rank: int) -> float:
        return self.top + self.pitch * rank

    def _box(self, rank: int, span: Span) -> Box:
        action, (start, end) = span.action, (self.x(span.start), self.x(span.end))
        edge = _WHITE if end - start > 3 else None
        begin, finish = (number(time - self.start) for time in (span.start, span.end))
        note = f"{action}: {KINDS[action.op].name}, {begin} to {finish}"
        colour = self.palette.of(rank, action)
        return Box(start, self.y(rank), end - start, _ROW, colour, edge, 0.7, role="span", note=note)

    def _label(self, rank: int, span: Span) -> list[Label]:
        text, room = str(span.action.microbatch), (span.end - span.start) * self.scale - 3
        if label_width(text, _CELL_TEXT) > room:
            return []
        ink = text_on(self.palette.of(rank, span.action))
        middle = (self.x(span.start) + self.x(span.end)) / 2
        return [Label(middle, self.y(rank) + _ROW / 2, text, _CELL_TEXT, ink, "middle")]

    def _idle(self, rank: int) -> list[Shape]:
        """The whole step, hatched: what is not covered by actions stays so."""
        end = self.left + self.length
        shapes: list[Shape] = []
        at = self.left
        for span in self.timeline.rows[rank]:
            if self.x(span.start) - at > 0.05:
                shapes.append(self._hatched(rank, at, self.x(span.start)))
            at = max(at, self.x(span.end))
        return [*shapes, self._hatched(rank, at, end)] if end - at > 0.05 else shapes

    def _hatched(self, rank: int, start: float, end: float) -> Box:
        return Box(start, self.y(rank), end - start, _ROW, hatched=True, role="idle")

    def _memory(self, rank: int) -> list[Shape]:
        """What the rank holds, all ranks to one scale."""
        if not self.strip:
            return []
        low, most = self.y(rank) + _ROW + self.strip, max(self.timeline.peaks) or 1.0
        held, outline = 0.0, [(self.left, low)]
        levels = {
            round(self.x(time), 3): amount for time, amount in sorted(self.timeline.memory[rank], key=lambda p: p[0])
        }
        for x, amount in levels.items():
            outline += [(x, self._level(low, held, most)), (x, self._level(low, amount, most))]
            held = amount
        x = self.left + self.length
        outline += [(x, self._level(low, held, most)), (x, low)]
        base = Line(((self.left, low), (x, low)), _PALE, _HAIR)
        return [Line(tuple(outline), None, fill=_MEMORY, role="memory"), base, Line(tuple(outline[1:-1]), _MEMORY_EDGE)]

    def _level(self, low: float, held: float, most: float) -> float:
        return low - max(0.0, held) / most * (self.strip - 4)

    def _heads(self, rank: int) -> list[Shape]:
        """Names at the left, figures at the right."""
        timeline, y = self.timeline, self.y(rank)
        whole = timeline.step or 1.0
        right = self.left + self.length + 8
        shapes: list[Shape] = [
            Label(_MARGIN, y + _ROW / 2 - (0 if self.strip else 6), f"rank {rank}", _NORMAL, _INK, bold=True),
            Label(_MARGIN, y + _ROW + (self.strip / 2 if self.strip else -6), self.under[rank], _SMALL, _GREY),
            Label(right, y + _ROW / 2, f"idle {1 - timeline.busy(rank) / whole:.1%}", _NORMAL, _GREY),
        ]
        if self.strip:
            peak = f"peak {number(timeline.peak(rank))}"
            shapes.append(Label(right, y + _ROW + self.strip / 2, peak, _NORMAL, _MEMORY_EDGE))
        return shapes

    def _axis(self, bottom: float) -> list[Shape]:
        shapes: list[Shape] = []
        for time in ticks(self.timeline.step, int(self.length / 70)):
            x = self.left + time * self.scale
            shapes.append(Line(((x, self.top - 4), (x, bottom)), (236, 236, 236), _HAIR))
            shapes.append(Label(x, bottom + 10, number(time), _SMALL + 1, _GREY, "middle"))
        shapes.append(Label(_MARGIN, bottom + 10, "time", _SMALL + 1, _GREY))
        return shapes

    def _transfers(self) -> list[Shape]:
        """A thin line for each message that takes time, from row to row."""
        return [
            Line(self._between(t.source, t.start, t.target, t.end), _TRANSFER, _HAIR, role="transfer")
            for t in self.timeline.transfers
            if t.end > t.start
        ]

    def _between(self, source: int, start: float, target: int, end: float) -> tuple[tuple[float, float], ...]:
        """From the border of one row to the facing border of another."""
        down = target > source
        first = self.y(source) + (_ROW if down else 0.0)
        return (self.x(start), first), (self.x(end), self.y(target) + (0.0 if down else _ROW))

    def _critical(self) -> list[Shape]:
        """An outline around actions that follow one another at once, and lines where the chain changes rank."""
        places = {span.action: (rank, span) for rank, row in enumerate(self.timeline.rows) for span in row}
        shapes: list[Shape] = []
        runs: list[tuple[int, float, float]] = []
        for action in self.timeline.critical:
            if action not in places:
                continue
            rank, span = places[action]
            if runs and runs[-1][0] == rank and math.isclose(runs[-1][2], span.start, abs_tol=1e-9):
                runs[-1] = (rank, runs[-1][1], span.end)
            else:
                runs.append((rank, span.start, span.end))
        for (rank, _, end), (after, start, _) in itertools.pairwise(runs):
            if rank != after:
                shapes.append(Line(self._between(rank, end, after, start), _INK, 1.8, role="critical"))
        for rank, start, end in runs:
            x = self.x(start)
            shapes.append(Box(x, self.y(rank), self.x(end) - x, _ROW, None, _INK, 1.8, role="critical"))
        return shapes

    def _legend(self) -> tuple[list[Shape], float]:
        """The legend, folded at the width of the picture, and where the rows begin below it."""
        present = {span.action.op for row in self.timeline.rows for span in row}
        entries: list[tuple[str, str]] = [(op, f"{op} {KINDS[op].name}") for op in KINDS if op in present]
        entries.append(("idle", "idle"))
        if self.timeline.critical:
            entries.append(("critical", "critical path"))
        if any(transfer.end > transfer.start for transfer in self.timeline.transfers):
            entries.append(("transfer", "transfer"))
        if self.timeline.memory:
            entries.append(("memory", "activation memory"))
        if self.palette.groups > 1:
            how = "by direction" if self.palette.two_way else "from the rank's first stage to its last"
            entries.append(("", f"paler: {how}, and with the microbatch"))
        else:
            entries.append(("", "paler with the microbatch"))
        shapes: list[Shape] = []
        x, y = _MARGIN, 68.0
        for mark, text in entries:
            swatch = 0.0 if not mark else 28.0
            width = swatch + label_width(text, _NORMAL) + 20
            if x > _MARGIN and x + width > self.left + self.length + _RIGHT:
                x, y = _MARGIN, y + 20
            shapes += self._swatch(mark, x, y)
            shapes.append(Label(x + swatch, y, text, _NORMAL))
            x += width
        return shapes, y + 26

    def _swatch(self, mark: str, x: float, y: float) -> list[Shape]:
        frame = {"idle": (None, True), "critical": (_INK, False)}
        if mark in frame:
            stroke, hatched = frame[mark]
            return [Box(x, y - 6, 22, 12, None, stroke, 1.8, hatched, role="legend")]
        if mark == "transfer":
            return [Line(((x, y - 6), (x + 22, y + 6)), _TRANSFER, _HAIR)]
        if mark == "memory":
            points = ((x, y + 6), (x, y + 1), (x + 7, y + 1), (x + 7, y - 5), (x + 16, y - 5), (x + 16, y + 6))
            return [Line(points, None, fill=_MEMORY), Line(points, _MEMORY_EDGE)]
        if not mark:
            return []
        steps = 4
        part = 22 / (steps * self.palette.groups)
        boxes: list[Shape] = []
        for index in range(steps * self.palette.groups):
            colour: Colour = self.palette.shade(mark, index // steps, index % steps / (steps - 1))
            boxes.append(Box(x + part * index, y - 6, part + 0.3, 12, colour, role="legend"))
        return boxes


def _length(timeline: Timeline) -> float:
    """How wide the rows are: all but the shortest actions have room for their microbatch."""
    sizes = sorted(span.end - span.start for row in timeline.rows for span in row if span.end > span.start)
    if not sizes or timeline.step <= 0:
        return _NARROWEST
    most = max(span.action.microbatch for row in timeline.rows for span in row)
    cell = max(15.0, label_width(str(most), _CELL_TEXT) + 4.5)
    typical = sizes[len(sizes) // 10]
    return min(_WIDEST, max(_NARROWEST, cell * timeline.step / typical))
