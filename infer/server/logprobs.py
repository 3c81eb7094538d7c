"""Log-probabilities in OpenAI's two shapes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from infer.server.codec import Codec, Reader

if TYPE_CHECKING:
    from infer.sampling import TokenLogProb

__all__ = ["chat_logprobs", "completion_logprobs"]

LEAST = -9999.0
"""What stands for minus infinity, which JSON has not."""


def completion_logprobs(
    codec: Codec, scored: Sequence[TokenLogProb], reader: Reader | None, *, top: bool, first: int | None = None
) -> dict[str, Any]:
    """Of /v1/completions: lists with an entry a token; the likeliest include the token itself.

    Args:
        codec: spells tokens.
        scored: of each token.
        reader: where they begin in the text; None: there is no text.
        top: whether the likeliest were asked for.
        first: a token before them that nothing was before, so that it has no log-probability.
    """
    tokens = [] if first is None else [first]
    values: list[float | None] = [None] * len(tokens)
    likeliest: list[dict[str, float] | None] = [None] * len(tokens)
    for entry in scored:
        tokens.append(entry.token)
        values.append(_finite(entry.value))
        found = {codec.spell(token)[0]: _finite(value) for token, value in reversed(entry.top)}
        likeliest.append({**dict(reversed(found.items())), codec.spell(entry.token)[0]: _finite(entry.value)})
    return {
        "tokens": [codec.spell(token)[0] for token in tokens],
        "token_logprobs": values,
        "top_logprobs": likeliest if top else None,
        "text_offset": [0 if reader is None else reader.place(token) for token in tokens],
    }


def chat_logprobs(codec: Codec, scored: Sequence[TokenLogProb]) -> dict[str, Any]:
    """Of /v1/chat/completions: an entry a token, with its bytes."""
    content = []
    for entry in scored:
        likeliest = [_entry(codec, token, value) for token, value in entry.top]
        content.append({**_entry(codec, entry.token, entry.value), "top_logprobs": likeliest})
    return {"content": content, "refusal": None}


def _entry(codec: Codec, token: int, value: float) -> dict[str, Any]:
    text, data = codec.spell(token)
    return {"token": text, "logprob": _finite(value), "bytes": list(data)}


def _finite(value: float) -> float:
    return value if math.isfinite(value) else LEAST
