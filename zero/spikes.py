"""Losses that jump: how a spike is seen, and which data a run passes over because of one."""

from __future__ import annotations

import math
import statistics
from typing import NamedTuple

__all__ = ["Past", "Spikes"]

KEPT = 16
LEAST = 3


class Past(NamedTuple):
    """What of the steps before decides those to come; a checkpoint holds it.

    Attributes:
        losses: of the last 16 steps.
        passed_over: steps' shares of the data, counted from 0, that no step learns from; in order.
    """

    losses: tuple[float, ...] = ()
    passed_over: tuple[int, ...] = ()


class Spikes:
    """Sees spikes, and knows which data is passed over.

    All of it is a function of losses that every rank has, so that all ranks come to the same result.

    Args:
        times: a loss of more than so many times the median of the last 16 is a spike (0: none is).
    """

    def __init__(self, times: float) -> None:
        self.times = times
        self.past = Past()

    def judge(self, loss: float) -> float | None:
        """Take in the loss of a step; how many times the median of those before it is, if that makes it a spike.

        There are none before three losses are known. A loss that is not finite is not taken in, and is no spike: its
        gradients are not finite either.
        """
        if not math.isfinite(loss):
            return None
        before = self.past.losses
        self.past = self.past._replace(losses=(*before, loss)[-KEPT:])
        middle = statistics.median(before) if len(before) >= LEAST else 0.0
        return loss / middle if self.times and middle > 0 and loss > self.times * middle else None

    def share(self, step: int) -> int:
        """Which share of the data a step learns from, both counted from 0: the next one that is not passed over."""
        for passed in self.past.passed_over:
            step += passed <= step
        return step

    def pass_over(self, *shares: int) -> None:
        """Learn from these shares of the data no more."""
        self.past = self.past._replace(passed_over=tuple(sorted({*self.past.passed_over, *shares})))
