"""Causal attention over packed documents."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from parallel.comm import apply

__all__ = ["packed_attention", "packed_attention_reference"]

_SHORT = 512
"""Documents up to this many tokens are attended to by plain products on the CPU, which there beat the fused kernel
about twofold; their probabilities are kept for backward, which longer documents could not afford."""

_ROWS = 128
"""Queries at a time: the block of probabilities above the diagonal is never formed."""


_PAD = 32


def packed_attention_reference(
    q_TNH: Tensor,
    k_TKH: Tensor,
    v_TKH: Tensor,
    boundaries: Sequence[int],
    window: int | None = None,
    keep_NTT: Tensor | None = None,
    drop: float = 0.0,
) -> Tensor:
    """Attention written out: each token attends to itself and to those before it in its document.

    Args:
        q_TNH: queries.
        k_TKH, v_TKH: keys and values; N / K query heads share one.
        boundaries: where each document begins, and the end.
        window: how many tokens are seen, the token itself included; None: all.
        keep_NTT: which probabilities survive dropout.
        drop: the probability of dropout, for rescaling.

    Returns:
        (T, N, H).
    """
    tokens, heads, size = q_TNH.shape
    share = heads // k_TKH.shape[1]
    k, v = (x.repeat_interleave(share, dim=1).transpose(0, 1) for x in (k_TKH, v_TKH))
    scores = q_TNH.transpose(0, 1) @ k.transpose(1, 2) * size**-0.5
    index = torch.arange(tokens, device=q_TNH.device)
    document = torch.bucketize(index, torch.tensor(boundaries[1:], device=q_TNH.device), right=True)
    distance = index[:, None] - index
    seen = (document[:, None] == document) & (distance >= 0)
    if window is not None:
        seen &= distance < window
    wide = scores if scores.dtype == torch.float64 else scores.float()
    probabilities = wide.masked_fill(~seen, float("-inf")).softmax(-1).to(q_TNH.dtype)
    if keep_NTT is not None:
        probabilities = probabilities * keep_NTT / (1 - drop)
    return (probabilities @ v).transpose(0, 1)


def packed_attention(
    q_TNH: Tensor, k_TKH: Tensor, v_TKH: Tensor, boundaries: Sequence[int], window: int | None = None
) -> Tensor:
    """:func:`packed_attention_reference` without its T x T scores."""
    longest = max(b - a for a, b in pairwise(boundaries))
    if q_TNH.device.type == "cpu" and longest <= min(_SHORT, window or _SHORT):
        return apply(_ShortDocuments, q_TNH, k_TKH, v_TKH, tuple(boundaries))
    outputs = [_equal(q_TNH[rows], k_TKH[rows], v_TKH[rows], length, window) for rows, length in _runs(boundaries)]
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs)


class _ShortDocuments(torch.autograd.Function):
    """Plain products, document by document and block of queries by block; keeps its inputs and the probabilities."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, boundaries: tuple[int, ...]) -> Tensor:
        heads, size = q.shape[1:]
        share, scale = heads // k.shape[1], size**-0.5
        above = torch.full((_ROWS, _ROWS), -math.inf, dtype=q.dtype).triu_(1)
        out = torch.empty_like(q, memory_format=torch.contiguous_format)
        kept: list[Tensor] = []
        for start, end in pairwise(boundaries):
            queries, keys, values = (_by_head(x[start:end], n) for x, n in ((q, 1), (k, share), (v, share)))
            for first, stop in _blocks(queries.shape[1]):
                p = q.new_empty(heads, stop - first, stop)
                torch.baddbmm(p, queries[:, first:stop], keys[:, :stop].mT, beta=0, alpha=scale, out=p)
                p[:, :, first:].add_(above[: stop - first, : stop - first])
                torch.softmax(p, -1, out=p)
                _put(out, start + first, min(start + stop, end), torch.bmm(p, values[:, :stop]))
                kept.append(p)
        ctx.save_for_backward(q, k, v, *kept)
        ctx.boundaries = boundaries
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        g, (q, k, v, *kept) = grads[0], ctx.saved_tensors
        heads, size = q.shape[1:]
        share, scale = heads // k.shape[1], size**-0.5
        gq, gk, gv = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))
        probabilities = iter(kept)
        for start, end in pairwise(ctx.boundaries):
            queries, keys, values = (_by_head(x[start:end], n) for x, n in ((q, 1), (k, share), (v, share)))
            up, into_keys, into_values = _by_head(g[start:end], 1), torch.zeros_like(keys), torch.zeros_like(values)
            for first, stop in _blocks(queries.shape[1]):
                p, rows = next(probabilities), up[:, first:stop]
                d = torch.bmm(rows, values[:, :stop].mT)
                d = torch.ops.aten._softmax_backward_data(d, p, -1, p.dtype)
                _put(gq, start + first, min(start + stop, end), torch.bmm(d, keys[:, :stop]))
                into_keys[:, :stop].baddbmm_(d.mT, queries[:, first:stop])
                into_values[:, :stop].baddbmm_(p.mT, rows)
            _put(gk, start, end, into_keys.unflatten(0, (-1, share)).sum(1))
            _put(gv, start, end, into_values.unflatten(0, (-1, share)).sum(1))
        return gq.mul_(scale), gk.mul_(scale), gv, None


def _blocks(length: int) -> Iterator[tuple[int, int]]:
    for first in range(0, length, _ROWS):
        yield first, min(first + _ROWS, length)


def _by_head(x_TKH: Tensor, share: int) -> Tensor:
    """(T, K, H) of one document as (N, T, H), each key-value head repeated for the query heads that share it.

    In half precision T is padded with zeros, which the causal mask hides from every real query: the library compiles
    its products for each new shape, so there had better be few.
    """
    tokens, heads, size = x_TKH.shape
    padded = tokens if x_TKH.dtype.itemsize > 2 else -(-tokens // _PAD) * _PAD
    x = x_TKH.new_empty(heads, share, padded, size)
    x[:, :, :tokens] = x_TKH.transpose(0, 1)[:, None]
    x[:, :, tokens:] = 0
    return x.view(heads * share, padded, size)


def _put(out_TNH: Tensor, start: int, end: int, rows_NTH: Tensor) -> None:
    """Write rows of all heads to tokens ``start`` to ``end``, without their padding."""
    out_TNH[start:end] = rows_NTH[:, : end - start].transpose(0, 1)


def _runs(boundaries: Sequence[int]) -> Iterator[tuple[slice, int]]:
    """Runs of neighbouring documents of equal length: their rows, and the length."""
    start = 0
    for i in range(1, len(boundaries)):
        length = boundaries[i] - boundaries[i - 1]
        if i + 1 == len(boundaries) or boundaries[i + 1] - boundaries[i] != length:
            yield slice(start, boundaries[i]), length
            start = boundaries[i]


def _equal(q_TNH: Tensor, k_TKH: Tensor, v_TKH: Tensor, length: int, window: int | None) -> Tensor:
    """Documents of one length, by torch's fused attention."""
    q, k, v = (x.unflatten(0, (-1, length)).transpose(1, 2) for x in (q_TNH, k_TKH, v_TKH))
    mask = None
    if window is not None and window < length:
        mask = torch.ones(length, length, dtype=torch.bool, device=q.device).tril_().triu_(1 - window)
    gqa = q.shape[1] != k.shape[1]
    out = scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=gqa)
    return out.transpose(1, 2).flatten(0, 1)
