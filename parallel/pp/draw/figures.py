"""The numbers of a timeline in words."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence

from parallel.pp.timeline import Timeline

__all__ = ["headline", "number", "stages_of", "summary", "ticks"]

_LISTED, _MARGIN = 48, 17


def number(value: float) -> str:
    """A time or an amount, to four digits."""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def stages_of(timeline: Timeline) -> list[list[int]]:
    """The stages of each rank, in order."""
    return [sorted({span.action.stage for span in row}) for row in timeline.rows]


def headline(timeline: Timeline) -> tuple[str, str]:
    """What is shown, and its step time, bubble and peak memory: two lines."""
    actions = [span.action for row in timeline.rows for span in row]
    sizes = (
        (len(timeline.rows), "rank"),
        (len({action.stage for action in actions}), "stage"),
        (len({action.microbatch for action in actions}), "microbatch"),
    )
    what = ", ".join(_count(size, noun) for size, noun in sizes)
    figures = [f"step {number(timeline.step)}", f"bubble {number(timeline.bubble)}"]
    figures.append(f"bubble fraction {timeline.bubble_fraction:.1%}")
    if timeline.memory:
        figures.append(f"peak memory {number(max(timeline.peaks, default=0.0))}")
    return f"{timeline.name}: {what}" if timeline.name else what, " · ".join(figures)


def summary(timeline: Timeline, width: int = 100) -> str:
    """Step time, bubble, peak memory of each rank and critical path, one a line or a few lines.

    Args:
        timeline: memory and critical path are left out where they are not known.
        width: at which lines are folded.
    """
    entries = [("", headline(timeline)[0])]
    entries += [
        ("step time", number(timeline.step)),
        ("bubble", f"{number(timeline.bubble)}: the longest idle time of a rank between its first and last action"),
        ("bubble fraction", f"{timeline.bubble_fraction:.1%} of the time of all ranks"),
    ]
    if timeline.memory:
        entries.append(("peak memory", _peaks(timeline.peaks)))
    if timeline.critical:
        path = [str(action) for action in timeline.critical]
        if len(path) > _LISTED:
            half = _LISTED // 2
            path[half:-half] = [f"... {len(path) - 2 * half} more ..."]
        entries.append(("critical path", " ".join(path)))
    lines: list[str] = []
    for name, text in entries:
        head = f"{name:<{_MARGIN}}" if name else ""
        lines += textwrap.wrap(text, width, initial_indent=head, subsequent_indent=" " * _MARGIN)
    return "\n".join(lines)


def ticks(length: float, most: int) -> list[float]:
    """At most ``most`` (at least one) round times from 0 to ``length``."""
    if length <= 0:
        return [0.0]
    size = 10.0 ** (math.floor(math.log10(length)) - 3)
    for step in (size * 10**power * digit for power in range(5) for digit in (1, 2, 5)):
        count = int(length / step + 1e-6) + 1
        if count <= max(1, most):
            return [index * step for index in range(count)]
    return [0.0]


def _peaks(peaks: Sequence[float]) -> str:
    if len(peaks) > 1 and len(set(peaks)) == 1:
        return f"{number(peaks[0])} on every rank"
    return ", ".join(f"{number(peak)}" for peak in peaks) + (f" (ranks 0 to {len(peaks) - 1})" * (len(peaks) > 1))


def _count(size: int, noun: str) -> str:
    plural = "es" if noun.endswith("ch") else "s"
    return f"{size} {noun}{plural * (size != 1)}"
