"""Embeddings: one vector for each document, from the last hidden states of an encoder or a decoder; no cache."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Literal, get_args

import torch
from torch import Tensor

from infer.cache import PagedCore
from parallel.errors import ConfigError, DataError, nearest, refuse
from parallel.models.batch import Batch
from parallel.models.block import Attention
from parallel.models.build import PackedAttention
from parallel.models.decoder import Decoder
from parallel.models.encoder import Encoder
from parallel.models.encoder_config import EncoderConfig
from parallel.sp import gather_tokens

__all__ = ["Pooling", "embed", "pool", "steps"]

Pooling = Literal["mean", "last", "cls"]
"""What stands for a document: the mean of its hidden states, the last one, or the first."""


def pool(x_TD: Tensor, boundaries: Sequence[int], pooling: Pooling) -> Tensor:
    """Hidden states of packed documents -> one vector for each (n, D); means of half precision are taken in float32.

    Args:
        x_TD: all tokens.
        boundaries: where each document begins, and the end.
        pooling: what stands for a document.
    """
    if pooling != "mean":
        return x_TD[_rows(boundaries, pooling)]
    wide = x_TD.float() if x_TD.dtype.itemsize < 4 else x_TD
    lengths = torch.tensor([end - start for start, end in pairwise(boundaries)], device=x_TD.device)
    return torch.segment_reduce(wide, "mean", lengths=lengths)


def _rows(boundaries: Sequence[int], pooling: Pooling) -> list[int]:
    return list(boundaries[:-1]) if pooling == "cls" else [end - 1 for end in boundaries[1:]]


def steps(lengths: Sequence[int], budget: int) -> list[list[int]]:
    """Which documents are computed together: the longest first, each step at most ``budget`` tokens.

    Documents of a step are thus of similar length, those of equal length side by side, which attention likes.

    Args:
        lengths: of the documents, none above the budget.
        budget: tokens of a step.
    """
    found: list[list[int]] = []
    room = 0
    for index in sorted(range(len(lengths)), key=lambda index: -lengths[index]):
        if lengths[index] > room:
            found.append([])
            room = budget
        found[-1].append(index)
        room -= lengths[index]
    return found


@torch.inference_mode()
def embed(
    model: Decoder | Encoder,
    documents: Sequence[Sequence[int] | Tensor],
    *,
    pooling: Pooling = "mean",
    normalize: bool = False,
    budget: int = 2048,
) -> Tensor:
    """Embed documents, many at a time; every rank of the mesh calls it with the same ones and gets the same vectors.

    Args:
        model: an encoder, or a decoder, whose hidden states behind the last norm are taken; it may be an engine's.
        documents: token ids, special tokens included.
        pooling: what stands for a document.
        normalize: give every vector the length 1.
        budget: most tokens a step.

    Returns:
        (n, D) in the order of the documents; float32, float64 if the model is.

    Raises:
        ConfigError: options or a model that cannot be honoured.
        DataError: every document that is empty, too long, or has a token that the model does not know.
    """
    refuse(ConfigError, _problems(model, pooling, budget))
    given = [_vector(document) for document in documents]
    refuse(DataError, (text for index, ids in enumerate(given) for text in _misfits(model, index, ids, budget)))
    weight = next(model.parameters())
    dtype = weight.dtype if weight.dtype.itemsize >= 4 else torch.float32
    out = torch.empty(len(given), model.config.hidden, dtype=dtype, device=weight.device)
    training = model.training
    model.eval()
    try:
        for chosen in steps([len(ids) for ids in given], budget):
            batch = Batch.pack([given[index] for index in chosen]).to(weight.device)
            out[chosen] = _pooled(model, batch, pooling).to(dtype)
    finally:
        model.train(training)
    return torch.nn.functional.normalize(out, dim=-1) if normalize else out


def _pooled(model: Decoder | Encoder, batch: Batch, pooling: Pooling) -> Tensor:
    if not model.sequence_parallel and pooling != "mean":  # the last block computes these rows only
        rows = torch.tensor(_rows(batch.boundaries, pooling), device=batch.tokens_T.device)
        return model.hidden(dataclasses.replace(batch, wanted_R=rows))
    x_TD = model.hidden(batch)
    if model.sequence_parallel:
        assert model.embedding is not None
        x_TD = gather_tokens(x_TD, model.embedding.axis, len(batch), replicated=True)
    return pool(x_TD, batch.boundaries, pooling)


def _problems(model: Decoder | Encoder, pooling: str, budget: int) -> Iterator[str]:
    known = get_args(Pooling)
    if pooling not in known:
        yield f"pooling = {pooling!r}: unknown{nearest(str(pooling), known)}; there are: {', '.join(known)}"
    if budget < 1:
        yield f"budget = {budget}: must be at least 1"
    if isinstance(model, Decoder):
        if model.embedding is None or model.norm is None or len(model.layers) < model.config.layers:
            yield "layout.pp: embedding needs the whole model on each rank; the nearest degree that works is 1"
        cores = {type(module.core) for module in model.modules() if isinstance(module, Attention)}
        for core in cores - {PackedAttention, PagedCore}:
            yield f"the decoder attends by {core.__name__}: give it PackedAttention, or KVCache.core"


def _vector(document: Sequence[int] | Tensor) -> Tensor:
    """The token ids, int64; of two dims where they are no such thing."""
    try:
        ids = torch.as_tensor(document)
    except (TypeError, ValueError, RuntimeError):
        return torch.empty(0, 0)
    whole = ids.dtype in (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)
    if ids.ndim != 1 or (ids.numel() and not whole):
        return torch.empty(0, 0)
    return ids.to(torch.int64)


def _misfits(model: Decoder | Encoder, index: int, ids: Tensor, budget: int) -> Iterator[str]:
    config = model.config
    if ids.ndim != 1 or not len(ids):
        yield f"document {index} is empty" if ids.ndim == 1 else f"document {index}: must be a row of token ids"
        return
    learned = isinstance(config, EncoderConfig) or config.positions == "learned"
    if learned and len(ids) > config.max_positions:
        yield f"document {index} has {len(ids)} tokens, the model has {config.max_positions} positions"
    if len(ids) > budget:
        yield f"document {index} has {len(ids)} tokens, a step at most {budget}: give a larger budget"
    padding = config.first_position - 1 if isinstance(config, EncoderConfig) else -1
    if padding >= 0 and (ids == padding).any():
        yield f"document {index} has the padding token {padding}: documents are not padded"
    low, high = (int(bound) for bound in ids.aminmax())
    if low < 0 or high >= config.vocabulary:
        bad = low if low < 0 else high
        yield f"document {index}: token id {bad} is outside the vocabulary of {config.vocabulary}"
