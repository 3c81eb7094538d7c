"""A row of logits to sample from, and what its request's parameters come to once they are compiled."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import NamedTuple

import torch
from torch import Tensor

from infer.constrain.forms import Form
from infer.params import SamplingParams
from infer.sampling.draw import width_of
from parallel.rng import key

__all__ = ["NUMBERS", "Entry", "Feature", "Kind", "Row", "compile_row", "request_seed"]

NUMBERS = (
    "temperature",
    "top_p",
    "min_p",
    "typical_p",
    "presence_penalty",
    "frequency_penalty",
    "repetition_penalty",
)


class Row(NamedTuple):
    """One row of logits: the request that it continues.

    Attributes:
        id: of the request; the tokens of an id only grow.
        params: how it is continued; the same at every step.
        tokens: prompt and generated tokens as far as the host knows them.
        prompt: how many of them are the prompt.
        generated: tokens before this one, those that the host does not know yet included.
        seed: of the request, by :func:`request_seed`.
    """

    id: int
    params: SamplingParams
    tokens: Sequence[int]
    prompt: int
    generated: int
    seed: int


def request_seed(seed: int, completion: int = 0) -> int:
    """The key of one of the completions (n, best_of) of a request with this seed: a signed 64-bit number."""
    value = key("sample", seed, completion)
    return value - (1 << 64) if value >> 63 else value


class Feature:
    """Bits for what a request asks for, besides the likeliest token or a draw at its temperature.

    Plain numbers: they are tested for every row of every step.
    """

    BIAS = 1
    PENALTY = 2
    ALLOWED = 4
    BANNED = 8
    WORDS = 16
    MINIMUM = 32
    PROCESSOR = 64
    TOP_K = 128
    TOP_P = 256
    MIN_P = 512
    TYPICAL = 1024
    RAW = 2048
    PROCESSED = 4096
    FORM = 8192


class Kind(IntEnum):
    """How the token of a row is found; rows of one kind are computed together."""

    PLAIN = 0
    GREEDY = 1
    DRAW = 2
    BEAM = 3


@dataclass(slots=True)
class Entry:
    """What the sampler keeps of a request between steps.

    Attributes:
        kind, features: of its parameters.
        slot: its row in the tables of history; -1: it needs none.
        top_k: 0: all.
        width: how many of the largest logits its draw needs; 0: all.
        numbers: its :data:`NUMBERS`, float32 values.
        reported: log-probabilities besides the token's own; -1: none at all.
        candidates: how many continuations a beam search wants: so many that, whichever stop, enough go on.
        bias_tokens, bias_values, allowed, banned, stops: int64 (float32 for the values), any of them may be empty.
        sequences: bad words of more than one token.
        tail: how many tokens the longest of them looks back.
        late: where a processor or a form wants the tokens, the last that was sampled: a tensor, and the place in it.
        form: how far it has come in the form of its completion.
    """

    kind: Kind
    features: int
    slot: int
    top_k: int
    width: int
    numbers: tuple[float, ...]
    reported: int
    candidates: int
    bias_tokens: Tensor
    bias_values: Tensor
    allowed: Tensor
    banned: Tensor
    stops: Tensor
    sequences: tuple[tuple[int, ...], ...]
    tail: int
    late: tuple[Tensor, int] | None = None
    form: Form | None = None


def compile_row(row: Row, *, vocabulary: int, ends: Sequence[int], device: torch.device) -> Entry:
    """The entry of a request that is seen for the first time, without a slot."""
    params = row.params
    kind, features = _features(params, vocabulary)
    reported = -1 if params.logprobs is None else min(params.logprobs, vocabulary)
    if reported < 0 and params.samples > params.n:
        reported = 0  # the best of several are told by their log-probabilities
    if reported >= 0 and kind is not Kind.BEAM:
        features |= Feature.RAW if params.logprobs_of == "raw" else Feature.PROCESSED
    if kind is Kind.PLAIN and features:
        kind = Kind.GREEDY
    stops = params.stops(ends)
    held = stops if params.constraint is None else [token for token in stops if token not in ends]  # a form holds ends
    words = params.sequences
    bias = params.logit_bias or {}
    banned = sorted({*params.banned_tokens, *(word[0] for word in words if len(word) == 1)})

    def ids(tokens: Sequence[int]) -> Tensor:
        return torch.tensor(tokens, dtype=torch.int64, device=device)

    return Entry(
        kind=kind,
        features=features,
        slot=-1,
        top_k=min(params.top_k, vocabulary),
        width=width_of(params.top_k, vocabulary) if kind is Kind.DRAW else 0,
        numbers=tuple(float(getattr(params, name)) for name in NUMBERS),
        reported=reported,
        candidates=min(vocabulary, max(params.beams * max(2, 1 + len(stops)), reported)),
        bias_tokens=ids(list(bias)),
        bias_values=torch.tensor(list(bias.values()), dtype=torch.float32, device=device),
        allowed=ids(sorted(set(params.allowed_tokens or ()))),
        banned=ids(banned),
        stops=ids([token for token in held if token < vocabulary]),
        sequences=tuple(word for word in words if len(word) > 1),
        tail=max((len(word) for word in words), default=2) - 1,
    )


def _features(params: SamplingParams, vocabulary: int) -> tuple[Kind, int]:
    found = 0
    penalties = (params.presence_penalty, params.frequency_penalty, params.repetition_penalty)
    asked = {
        Feature.BIAS: bool(params.logit_bias),
        Feature.PENALTY: penalties != (0, 0, 1),
        Feature.ALLOWED: params.allowed_tokens is not None,
        Feature.BANNED: bool(params.banned_tokens) or any(len(word) == 1 for word in params.sequences),
        Feature.WORDS: any(len(word) > 1 for word in params.sequences),
        Feature.MINIMUM: params.min_tokens > 0,
        Feature.PROCESSOR: bool(params.logits_processors),
        Feature.FORM: params.constraint is not None,
    }
    drawn = {
        Feature.TOP_K: 0 < params.top_k < vocabulary,
        Feature.TOP_P: params.top_p < 1,
        Feature.MIN_P: params.min_p > 0,
        Feature.TYPICAL: params.typical_p < 1,
    }
    for feature, wanted in (asked | (drawn if params.temperature > 0 else {})).items():
        if wanted:
            found |= feature
    if params.beams > 1:
        return Kind.BEAM, found
    return (Kind.DRAW if params.temperature > 0 else Kind.PLAIN), found
