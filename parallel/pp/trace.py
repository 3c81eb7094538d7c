"""The record of a real step, as a timeline."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from parallel import comm
from parallel.mesh import Mesh
from parallel.pp.action import KINDS, Action, parse_action
from parallel.pp.timeline import Span, Timeline

__all__ = ["Trace"]


class Trace:
    """When the actions of this rank began and ended.

    Times count from a barrier of ``mesh.pp``, so that clocks of different machines agree to the length of one message.
    """

    def __init__(self, mesh: Mesh) -> None:
        self.mesh = mesh
        self.spans: list[tuple[Action, float, float]] = []
        self._events: list[tuple[Action, torch.cuda.Event, torch.cuda.Event]] = []
        comm.barrier(mesh.pp)
        self._zero = time.perf_counter()
        self._origin = self._event() if mesh.device.type == "cuda" else None

    @contextmanager
    def span(self, action: Action) -> Iterator[None]:
        """Record an action."""
        if self._origin is not None:
            start = self._event()
            yield
            self._events.append((action, start, self._event()))
            return
        begun = time.perf_counter()
        yield
        self.spans.append((action, begun - self._zero, time.perf_counter() - self._zero))

    def _event(self) -> torch.cuda.Event:
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def timeline(self) -> Timeline:
        """Of all ranks; memory is counted in activations."""
        if self._origin is not None:
            torch.cuda.synchronize(self.mesh.device)
            origin = self._origin
            self.spans = [(a, origin.elapsed_time(s) / 1e3, origin.elapsed_time(e) / 1e3) for a, s, e in self._events]
        own = [[str(action), start, end] for action, start, end in self.spans]
        rows = [
            tuple(Span(parse_action(text), start, end) for text, start, end in row)
            for row in comm.gather_json(own, self.mesh.pp)
        ]
        return Timeline(tuple(rows), memory=tuple(_memory(row) for row in rows), name="measured")


def _memory(row: tuple[Span, ...]) -> tuple[tuple[float, float], ...]:
    held, steps = 0, list[tuple[float, float]]()
    for action, start, end in row:
        change = KINDS[action.op].activations
        held += change
        if change:
            steps.append((start if change > 0 else end, float(held)))
    return tuple(steps)
