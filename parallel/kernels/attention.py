"""Causal attention over packed documents."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

__all__ = ["packed_attention", "packed_attention_reference"]


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
    """:func:`packed_attention_reference` by torch's fused attention; neighbouring documents of one length at a time."""
    outputs = [_equal(q_TNH[rows], k_TKH[rows], v_TKH[rows], length, window) for rows, length in _runs(boundaries)]
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs)


def _runs(boundaries: Sequence[int]) -> Iterator[tuple[slice, int]]:
    """Runs of neighbouring documents of equal length: their rows, and the length."""
    start = 0
    for i in range(1, len(boundaries)):
        length = boundaries[i] - boundaries[i - 1]
        if i + 1 == len(boundaries) or boundaries[i + 1] - boundaries[i] != length:
            yield slice(start, boundaries[i]), length
            start = boundaries[i]


def _equal(q_TNH: Tensor, k_TKH: Tensor, v_TKH: Tensor, length: int, window: int | None) -> Tensor:
    q, k, v = (x.unflatten(0, (-1, length)).transpose(1, 2) for x in (q_TNH, k_TKH, v_TKH))
    mask = None
    if window is not None and window < length:
        mask = torch.ones(length, length, dtype=torch.bool, device=q.device).tril_().triu_(1 - window)
    gqa = q.shape[1] != k.shape[1]
    out = scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=gqa)
    return out.transpose(1, 2).flatten(0, 1)
