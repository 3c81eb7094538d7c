"""Colours: the hue says which action, the shade which chunk or direction, and within it which microbatch."""

from __future__ import annotations

from parallel.pp.action import KINDS, Action
from parallel.pp.draw.figures import stages_of
from parallel.pp.timeline import Timeline

__all__ = ["Palette", "text_on"]

_Colour = tuple[int, int, int]

_HUES: dict[str, _Colour] = {"F": (64, 130, 196), "B": (240, 163, 10), "I": (186, 44, 100), "W": (120, 215, 160)}
_OTHERS: tuple[_Colour, ...] = ((128, 106, 190), (90, 190, 205), (150, 110, 70), (200, 195, 60), (130, 130, 130))
_DARKEST, _PALEST = -0.12, 0.56


class Palette:
    """The colour of every action of a timeline.

    Attributes:
        groups: how many chunks and directions are told apart by shade.
        two_way: microbatches enter the pipeline at several ranks.
    """

    def __init__(self, timeline: Timeline) -> None:
        self._chunks = {
            (rank, stage): chunk
            for rank, stages in enumerate(stages_of(timeline))
            for chunk, stage in enumerate(stages)
        }
        entry: dict[int, tuple[int, int]] = {}
        for rank, row in enumerate(timeline.rows):
            for span in row:
                stage, _, microbatch = span.action
                entry[microbatch] = min(entry.get(microbatch, (stage, rank)), (stage, rank))
        doors = sorted({rank for _, rank in entry.values()})
        self._doors = {microbatch: doors.index(rank) for microbatch, (_, rank) in entry.items()}
        self.two_way = len(doors) > 1
        self.groups = len(doors) if self.two_way else 1 + max(self._chunks.values(), default=0)
        self._order = {microbatch: place for place, microbatch in enumerate(sorted(entry))}

    def group(self, rank: int, action: Action) -> int:
        """Which chunk of its rank, or which direction, an action belongs to."""
        return self._doors[action.microbatch] if self.two_way else self._chunks[rank, action.stage]

    def of(self, rank: int, action: Action) -> _Colour:
        """Of an action: red, green, blue from 0 to 255."""
        place = self._order[action.microbatch] / max(1, len(self._order) - 1)
        return self.shade(action.op, self.group(rank, action), place)

    def shade(self, op: str, group: int = 0, place: float = 0.5) -> _Colour:
        """Of a kind of action in a group, for the first (0) to the last (1) microbatch."""
        band = (_PALEST - _DARKEST) / (self.groups + 0.4 * (self.groups - 1))
        amount = _DARKEST + band * 1.4 * group + band * place * (0.8 if self.groups == 1 else 1)
        target = 255 if amount > 0 else 0
        red, green, blue = (round(part + (target - part) * abs(amount)) for part in _hue(op))
        return red, green, blue


def text_on(colour: _Colour) -> _Colour:
    """Black or white, whichever is read better on a colour."""
    red, green, blue = colour
    return (255, 255, 255) if 0.299 * red + 0.587 * green + 0.114 * blue < 125 else (20, 20, 20)


def _hue(op: str) -> _Colour:
    if op in _HUES:
        return _HUES[op]
    others = [code for code in KINDS if code not in _HUES]
    return _OTHERS[others.index(op) % len(_OTHERS)] if op in others else _OTHERS[-1]
