"""What the sampler gives: tensors at once, plain values when somebody waits for them."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from infer.sampling.logprobs import LogProbs, TokenLogProb

__all__ = ["Resolved", "Sampled"]

NAN = "the logits are not numbers (NaN)"
EMPTY = "no token is left: every logit is -inf, from the model or by what the request bans"


@dataclass(slots=True)
class Resolved:
    """The outcome of a step as plain values.

    Attributes:
        tokens: one a row; None where the row failed.
        errors: why, by row.
        logprobs: of rows that ask for them.
        candidates: of rows of a beam search: tokens and the log-probabilities that lead to them, best first.
    """

    tokens: list[int | None]
    errors: dict[int, str]
    logprobs: dict[int, TokenLogProb]
    candidates: dict[int, tuple[tuple[int, float], ...]]


@dataclass(slots=True)
class Sampled:
    """The outcome of a step, on the device.

    Attributes:
        tokens_R: int64, one a row; of a row that failed, any token.
        largest_R: float32, the largest logit of each row: NaN if any of them is, -inf if no token is left.
        errors: rows that failed on the host.
        logprobs: of the rows that ask for them.
        candidates: of the rows of beam searches; the likeliest are the candidates.
    """

    tokens_R: Tensor
    largest_R: Tensor
    errors: dict[int, str] = field(default_factory=dict)
    logprobs: list[LogProbs] = field(default_factory=list)
    candidates: list[LogProbs] = field(default_factory=list)

    @property
    def failed_R(self) -> Tensor:
        """Which rows have failed, on the device or on the host; bool."""
        failed_R = (self.largest_R > -torch.inf).logical_not_()
        for row in self.errors:
            failed_R[row] = True
        return failed_R

    def resolve(self) -> Resolved:
        """As plain values; waits for the device."""
        bad = {row: most for row, most in enumerate(self.largest_R.tolist()) if not most > -torch.inf}
        errors = {row: EMPTY if most == most else NAN for row, most in bad.items()} | self.errors
        tokens = [None if row in errors else token for row, token in enumerate(self.tokens_R.tolist())]
        logprobs, candidates = (
            {row: value for part in parts for row, value in part.resolve().items() if row not in errors}
            for parts in (self.logprobs, self.candidates)
        )
        return Resolved(tokens, errors, logprobs, {row: value.top for row, value in candidates.items()})
