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
    """Warm-up from zero, then a decay to ``floor``.

    The kinds that begin with ``warmup`` are DeepSpeed's WarmupLR, WarmupDecayLR and WarmupCosineLR, step by step.
    """

    kind: Literal["cosine", "linear", "wsd", "constant", "warmup", "warmup-decay", "warmup-cosine"] = option(
        "cosine", "shape of the decay; warmup...: DeepSpeed's schedules"
    )
    warmup: int = option(20, "steps of warm-up")
    decay: int = option(0, "wsd: steps of the final linear decay (0: a fifth of the run)")
    floor: float = option(0.1, "last learning rate, as a share of the highest")
    ramp: Literal["linear", "log"] = option("linear", "warmup...: shape of the warm-up")
    first: float = option(0.0, "warmup...: learning rate of the first step, as a share of the highest")

    def problems(self) -> Iterator[str]:
        """Why such a schedule cannot be."""
        if self.warmup < 0 or self.decay < 0:
            yield "warmup and decay are numbers of steps, at least 0"
        for name in ("floor", "first"):
            if not 0 <= getattr(self, name) <= 1:
                yield f"{name} = {getattr(self, name)}: a share between 0 and 1"
        if not self.kind.startswith("warmup") and (self.ramp, self.first) != ("linear", 0.0):
            yield f"ramp and first are of the kinds warmup, warmup-decay and warmup-cosine, not of {self.kind}"

    def factor(self, step: int, steps: int) -> float:
        """The learning rate of ``step`` (from 0) of ``steps``, as a share of the highest."""
        if self.kind.startswith("warmup"):
            return self._behind(step - 1, steps)
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

    def _behind(self, done: int, steps: int) -> float:
        """DeepSpeed's schedules, which count the steps that are done, and of which the first two steps are alike."""
        cosine, warmup = self.kind == "warmup-cosine", max(2, self.warmup)
        if done < 0:
            return 0.0 if cosine else self.first
        if done < warmup:
            risen = math.log(done + 1) / math.log(warmup) if self.ramp == "log" else done / warmup
            return self.first + (1 - self.first) * risen
        length = max(1, steps - warmup)
        if cosine:
            shape = 0.5 * (1 + math.cos(math.pi * min(1.0, (done - warmup + 1) / length)))
            return max(0.0, self.floor + (1 - self.floor) * shape)
        return 1.0 if self.kind == "warmup" else self.first + (1 - self.first) * max(0.0, (steps - done) / length)
