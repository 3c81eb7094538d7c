"""Timelines as SVG."""

from __future__ import annotations

from xml.sax.saxutils import escape

from parallel.pp.draw.layout import compose
from parallel.pp.draw.scene import Box, Colour, Label, Line, Scene, Shape
from parallel.pp.timeline import Timeline

__all__ = ["render"]

_HEAD = """<svg xmlns="http://www.w3.org/2000/svg" width="{w}" height="{h}" viewBox="0 0 {w} {h}" \
font-family="DejaVu Sans, Verdana, Helvetica, Arial, sans-serif">
<title>{title}</title>
<defs><pattern id="idle" width="5" height="5" patternUnits="userSpaceOnUse" patternTransform="rotate(45)">\
<rect width="5" height="5" fill="#f7f7f7"/><line x1="0" y1="0" x2="0" y2="5" stroke="#d2d2d2" stroke-width="1.6"/>\
</pattern></defs>
<rect width="{w}" height="{h}" fill="#ffffff"/>
"""


def render(timeline: Timeline) -> bytes:
    """The picture; each span is a ``rect`` of class ``span`` whose title says what it is and when."""
    scene = compose(timeline)
    return (_head(scene) + "\n".join(map(_shape, scene.shapes)) + "\n</svg>\n").encode()


def _head(scene: Scene) -> str:
    return _HEAD.format(w=_px(scene.width), h=_px(scene.height), title=escape(scene.title))


def _px(length: float) -> str:
    return f"{length:.2f}".rstrip("0").rstrip(".")


def _hex(colour: Colour | None) -> str:
    return "none" if colour is None else "#{:02x}{:02x}{:02x}".format(*colour)


def _attributes(**values: str | float) -> str:
    return "".join(
        f' {name.replace("_", "-")}="{value if isinstance(value, str) else _px(value)}"'
        for name, value in values.items()
        if value != ""
    )


def _shape(shape: Shape) -> str:
    if isinstance(shape, Box):
        fill = "url(#idle)" if shape.hatched else _hex(shape.fill)
        place = _attributes(x=shape.x, y=shape.y, width=shape.width, height=shape.height, fill=fill)
        mark = (f' class="{shape.role}"' if shape.role else "") + _stroke(shape.stroke, shape.thickness)
        return f"<rect{place}{mark}" + (f"><title>{escape(shape.note)}</title></rect>" if shape.note else "/>")
    if isinstance(shape, Line):
        points = " ".join(f"{_px(x)},{_px(y)}" for x, y in shape.points)
        mark = (f' class="{shape.role}"' if shape.role else "") + _stroke(shape.stroke, shape.thickness)
        return f'<{"polygon" if shape.fill else "polyline"} points="{points}" fill="{_hex(shape.fill)}"{mark}/>'
    return _text(shape)


def _stroke(colour: Colour | None, thickness: float) -> str:
    return _attributes(stroke=_hex(colour), stroke_width=thickness) if colour else ""


def _text(label: Label) -> str:
    anchor = "" if label.anchor == "start" else label.anchor
    place = _attributes(x=label.x, y=label.baseline, font_size=label.size, fill=_hex(label.fill), text_anchor=anchor)
    weight = _attributes(font_weight="bold" if label.bold else "")
    return f"<text{place}{weight}>{escape(label.text)}</text>"
