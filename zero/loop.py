"""What the training loop does on the way, and where it stops of its own accord."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from parallel.config import option
from parallel.errors import LockstepError
from zero.faults import fault_problems

__all__ = ["NotFiniteError", "TrainerConfig"]


class NotFiniteError(LockstepError):
    """Gradients that are not finite, in a run that is to stop there; every rank raises it, and nothing was changed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainerConfig:
    """What to do on the way."""

    label_smoothing: float = option(0.0, "weight of the uniform distribution in the loss")
    z_loss: float = option(0.0, "weight of the squared log-sum-exp in the loss")
    validate_every: int = option(0, "steps between validations (0: only at the end)")
    save_every: int = option(0, "steps between checkpoints (0: only at the end)")
    save_async: bool = option(False, "write checkpoints behind the training, from a copy in memory")
    keep: int = option(2, "checkpoints that stay")
    fall_back: bool = option(False, "continue from the newest checkpoint that is whole if the latest is damaged")
    on_not_finite: Literal["skip", "stop"] = option(
        "skip", "where gradients are not finite: skip the step, or stop the run"
    )
    spike: float = option(3.0, "a loss of so many times the median of the last 16 is a spike, and told (0: none is)")
    rewind: int = option(
        0, "spikes at which the run goes back to its latest checkpoint and passes over the step's data"
    )
    slow: float = option(2.0, "ranks that compute so many times as long as others like them are named (0: none)")
    fault: str = option("", "for tests of what a run survives: kind@rank,step,point; see docs/checkpoints.md")

    def problems(self) -> Iterator[str]:
        """Why such a run cannot be."""
        for name in ("validate_every", "save_every", "rewind"):
            if getattr(self, name) < 0:
                yield f"{name} = {getattr(self, name)}: must not be negative"
        if self.keep < 1:
            yield f"keep = {self.keep}: at least one checkpoint must stay"
        if not 0 <= self.label_smoothing < 1:
            yield f"label_smoothing = {self.label_smoothing}: must be at least 0 and below 1"
        if self.z_loss < 0:
            yield f"z_loss = {self.z_loss}: must not be negative"
        for name in ("spike", "slow"):
            if getattr(self, name) and not 1 < getattr(self, name) < math.inf:
                yield f"{name} = {getattr(self, name)}: must be above 1, or 0"
        if self.rewind and not self.spike:
            yield f"rewind = {self.rewind} without spikes: the nearest that works is spike = 3.0"
        yield from fault_problems(self.fault)
