"""Log-probabilities of tokens, as tensors until somebody wants numbers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from infer.sampling.weights import Space, largest, log_total, scaled, weights

__all__ = ["LogProbs", "TokenLogProb", "of_scaled", "of_tokens", "prompt_logprobs"]

CHUNK = 1 << 18


class TokenLogProb(NamedTuple):
    """The log-probability of a token, and the likeliest tokens with theirs, likeliest first.

    A token that could not be drawn is not among the likeliest.
    """

    token: int
    value: float
    top: tuple[tuple[int, float], ...]


class LogProbs(NamedTuple):
    """Log-probabilities of some rows.

    Attributes:
        rows: which rows of the batch.
        tokens: int64 (R, 1 + K): the token in question, then the K likeliest.
        values: float32 (R, 1 + K).
    """

    rows: tuple[int, ...]
    tokens: Tensor
    values: Tensor

    def resolve(self) -> dict[int, TokenLogProb]:
        """As numbers, by row; waits for the device."""
        found = {}
        for row, tokens, values in zip(self.rows, self.tokens.tolist(), self.values.tolist(), strict=True):
            pairs = zip(tokens[1:], values[1:], strict=True)
            top = tuple((token, value) for token, value in pairs if value > -torch.inf)
            found[row] = TokenLogProb(tokens[0], values[0], top)
        return found


def of_scaled(s_RV: Tensor, log_total_R: Tensor, tokens_R: Tensor, most: int) -> tuple[Tensor, Tensor]:
    """Tokens and values (R, 1 + most) of a distribution.

    Args:
        s_RV: logits less the largest one of their row; -inf where a token is left out.
        log_total_R: float64, logarithm of the sum of ``exp(s)``.
        tokens_R: the tokens in question.
        most: how many of the likeliest.
    """
    own = tokens_R[:, None]
    tokens, s = own, s_RV.gather(1, own)
    if most:
        values, places = largest(s_RV, most)
        tokens, s = torch.cat([own, places], 1), torch.cat([s, values], 1)
    return tokens, (s.to(torch.float64) - log_total_R[:, None]).to(torch.float32)


def of_tokens(x_RV: Tensor, tokens_R: Tensor, most: int, space: Space) -> tuple[Tensor, Tensor]:
    """The same of logits as the model gave them."""
    s_RV, _ = scaled(x_RV, None, space)
    return of_scaled(s_RV, log_total(weights(s_RV, space), space), tokens_R, most)


@torch.inference_mode()
def prompt_logprobs(logits_TV: Tensor, tokens_T: Tensor | Sequence[int], count: int) -> LogProbs:
    """Raw log-probabilities of a prompt's tokens; a long prompt may come in chunks, and chunking changes no bit.

    Args:
        logits_TV: float32 logits of some positions of the prompt.
        tokens_T: the token that follows each position.
        count: how many of the likeliest tokens to report.

    Returns:
        one row for each position.
    """
    tokens_T = torch.as_tensor(tokens_T, dtype=torch.int64, device=logits_TV.device)
    positions, vocabulary = logits_TV.shape
    step = max(1, CHUNK // vocabulary)
    most, space = min(count, vocabulary), Space(logits_TV.device)
    parts = [
        of_tokens(logits_TV[start : start + step].float(), tokens_T[start : start + step], most, space)
        for start in range(0, positions, step)
    ]
    empty = (tokens_T.new_empty(0, 1 + most), logits_TV.new_empty(0, 1 + most, dtype=torch.float32))
    tokens, values = (torch.cat(column) for column in zip(*(parts or [empty]), strict=True))
    return LogProbs(tuple(range(positions)), tokens, values)
