"""Learning rates over the steps of a run."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from parallel.config import option

__all__ = ["ScheduleConfig"]


@dataclass(frozen=True, slots=True, kw_only=True)
class ScheduleConfig:
    """Warm-up from zero, then a decay to ``floor``."""

    kind: Literal["cosine", "linear", "wsd", "constant"] = option("cosine", "shape of the decay")
    warmup: int = option(20, "steps of linear warm-up")
    decay: int = option(0, "wsd: steps of the final linear decay (0: a fifth of the run)")
    floor: float = option(0.1, "last learning rate, as a share of the highest")

    def problems(self) -> Iterator[str]:
        """Why such a schedule cannot be."""
        if self.warmup < 0 or self.decay < 0:
            yield "warmup and decay are numbers of steps, at least 0"
        if not 0 <= self.floor <= 1:
            yield f"floor = {self.floor}: a share between 0 and 1"

    def factor(self, step: int, steps: int) -> float:
        """The learning rate of ``step`` (from 0) of ``steps``, as a share of the highest."""
        if step < self.warmup:
            return (step + 1) / self.warmup
        if self.kind == "constant":
            return 1.0
        start = max(self.warmup, steps - (self.decay or max(1, steps // 5))) if self.kind == "wsd" else self.warmup
        if step < start:
            return 1.0
        progress = min(1.0, (step - start + 1) / max(1, steps - start))
        shape = 0.5 * (1 + math.cos(math.pi * progress)) if self.kind == "cosine" else 1 - progress
        return self.floor + (1 - self.floor) * shape
