"""A picture as plain shapes: what to draw where, before it becomes SVG or PNG. Lengths in pixels, y downwards."""

from __future__ import annotations

from dataclasses import dataclass, field

__all__ = ["Box", "Colour", "Label", "Line", "Scene", "Shape", "label_width"]

Colour = tuple[int, int, int]

_NARROW, _THIN, _WIDE = frozenset("fijlrtI .,:'"), 0.36, 0.64


@dataclass(frozen=True, slots=True)
class Box:
    """A rectangle; ``role`` and ``note`` tell programs and people what it stands for."""

    x: float
    y: float
    width: float
    height: float
    fill: Colour | None = None
    stroke: Colour | None = None
    thickness: float = 1.0
    hatched: bool = False
    role: str = ""
    note: str = ""


@dataclass(frozen=True, slots=True)
class Line:
    """A line through points; closed and filled if it has a ``fill``."""

    points: tuple[tuple[float, float], ...]
    stroke: Colour | None = None
    thickness: float = 1.0
    fill: Colour | None = None
    role: str = ""


@dataclass(frozen=True, slots=True)
class Label:
    """Text at a point: its left end, middle or right end, half its height."""

    x: float
    y: float
    text: str
    size: float = 11.0
    fill: Colour = (40, 40, 40)
    anchor: str = "start"
    bold: bool = False

    @property
    def baseline(self) -> float:
        """Where the letters stand."""
        return self.y + 0.36 * self.size


Shape = Box | Line | Label


@dataclass(slots=True)
class Scene:
    """Shapes in the order in which they are painted."""

    width: float
    height: float
    title: str = ""
    shapes: list[Shape] = field(default_factory=list)


def label_width(text: str, size: float) -> float:
    """About how wide a text is."""
    return size * sum(_THIN if character in _NARROW else _WIDE for character in text)
