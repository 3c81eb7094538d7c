"""Pictures of timelines, simulated or measured: text, SVG, PNG, and a trace for Perfetto."""

from __future__ import annotations

from parallel.pp.draw.figures import summary
from parallel.pp.draw.file import draw, path_problems
from parallel.pp.draw.text import grid

__all__ = ["draw", "grid", "path_problems", "summary"]
