"""Timelines as PNG, painted by matplotlib."""

from __future__ import annotations

import io
import itertools
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from parallel.errors import ConfigError
from parallel.pp.draw.layout import compose
from parallel.pp.draw.scene import Box, Colour, Label, Line, Scene, Shape
from parallel.pp.timeline import Timeline

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["render"]

_DPI = 96
_MOST_PIXELS = 40e6
_LONGEST = 30000


def render(timeline: Timeline) -> bytes:
    """The picture, at twice the size of the SVG where that is not too large.

    Raises:
        ConfigError: matplotlib is not installed.
    """
    try:
        import matplotlib as mpl
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        raise ConfigError("PNG pictures need matplotlib (pip install matplotlib); SVG needs nothing") from None

    scene = compose(timeline)
    with mpl.rc_context({"hatch.linewidth": 0.8, "font.family": "DejaVu Sans", "path.simplify": False}):
        figure = Figure(figsize=(scene.width / _DPI, scene.height / _DPI), dpi=_DPI, facecolor="white")
        FigureCanvasAgg(figure)
        axes = figure.add_axes((0, 0, 1, 1), xlim=(0, scene.width), ylim=(scene.height, 0))
        axes.set_axis_off()
        for order, (_, shapes) in enumerate(itertools.groupby(scene.shapes, key=_sort)):
            _paint(axes, list(shapes), order)
        target = io.BytesIO()
        figure.savefig(target, format="png", dpi=_DPI * _zoom(scene), metadata={"Title": scene.title})
    return target.getvalue()


def _zoom(scene: Scene) -> float:
    area = math.sqrt(_MOST_PIXELS / (scene.width * scene.height))
    return min(2.0, area, _LONGEST / scene.width, _LONGEST / scene.height)


def _sort(shape: Shape) -> tuple[type, bool]:
    """Shapes of one sort that follow one another are painted at once."""
    return type(shape), isinstance(shape, Box) and shape.hatched


def _paint(axes: Axes, shapes: Sequence[Any], order: int) -> None:
    from matplotlib.collections import LineCollection, PolyCollection

    if isinstance(shapes[0], Label):
        _write(axes, shapes, order)
        return
    if isinstance(shapes[0], Line):
        open_ = [shape for shape in shapes if shape.fill is None]
        lines = LineCollection([shape.points for shape in open_], zorder=order)
        lines.set(color=[_rgba(shape.stroke) for shape in open_], linewidth=[_points(s.thickness) for s in open_])
        axes.add_collection(lines, autolim=False)
        shapes = [shape for shape in shapes if shape.fill is not None]
    polygons = PolyCollection([_corners(shape) for shape in shapes], zorder=order - 0.5)
    hatched = bool(shapes) and isinstance(shapes[0], Box) and shapes[0].hatched
    polygons.set_facecolor([(0.97, 0.97, 0.97, 1.0) if hatched else _rgba(shape.fill) for shape in shapes])
    polygons.set_edgecolor([(0.82, 0.82, 0.82, 1.0) if hatched else _rgba(shape.stroke) for shape in shapes])
    polygons.set_linewidth([0.0 if hatched else _points(s.thickness) if s.stroke else 0.0 for s in shapes])
    if hatched:
        polygons.set_hatch("/////")
    axes.add_collection(polygons, autolim=False)


def _write(axes: Axes, labels: Sequence[Label], order: int) -> None:
    sides = {"start": "left", "middle": "center", "end": "right"}
    for label in labels:
        axes.text(
            label.x,
            label.baseline,
            label.text,
            fontsize=_points(label.size),
            color=_rgba(label.fill),
            ha=sides[label.anchor],
            va="baseline",
            weight="bold" if label.bold else "normal",
            zorder=order,
            parse_math=False,
        )


def _corners(shape: Box | Line) -> Sequence[tuple[float, float]]:
    if isinstance(shape, Line):
        return shape.points
    right, low = shape.x + shape.width, shape.y + shape.height
    return (shape.x, shape.y), (right, shape.y), (right, low), (shape.x, low)


def _points(pixels: float) -> float:
    return pixels * 72 / _DPI


def _rgba(colour: Colour | None) -> tuple[float, float, float, float]:
    if colour is None:
        return 0.0, 0.0, 0.0, 0.0
    red, green, blue = colour
    return red / 255, green / 255, blue / 255, 1.0
