"""Paged attention written out, request by request: what every other backend is tested against."""

from __future__ import annotations

import torch
from torch import Tensor

from infer.attention import Pages
from infer.attention.quantize import dequantize, wide, write
from infer.batch import StepBatch

__all__ = ["ReferenceAttention"]


class ReferenceAttention:
    """Gathers all keys and values of a request; any device, any type."""

    def refusal(self, device: torch.device, dtype: torch.dtype) -> str | None:
        """None: it always can."""
        return None

    def __call__(
        self,
        q_TNH: Tensor,
        k_TKH: Tensor,
        v_TKH: Tensor,
        pages: Pages,
        step: StepBatch,
        group: int,
        window: int | None,
    ) -> Tensor:
        """As :class:`~infer.attention.Backend` says."""
        write(pages, k_TKH, v_TKH, step.slots_T[group])
        out = torch.empty_like(q_TNH, memory_format=torch.contiguous_format)
        for request, context in enumerate(step.context_R.tolist()):
            rows = slice(step.boundaries[request], step.boundaries[request + 1])
            start = context - (rows.stop - rows.start)
            low = 0 if window is None else max(0, start - window + 1)
            k_CKH, v_CKH = _gathered(pages, step.table[group][request], low, context, wide(q_TNH.dtype))
            position = torch.arange(start, context, device=q_TNH.device)[:, None]
            key = torch.arange(low, context, device=q_TNH.device)
            seen = key <= position
            if window is not None:
                seen &= key > position - window
            out[rows] = _attend(q_TNH[rows].to(k_CKH.dtype), k_CKH, v_CKH, seen).to(q_TNH.dtype)
        return out


def _gathered(pages: Pages, table_P: Tensor, low: int, high: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Keys and values of tokens ``low`` to ``high`` of one request, each (tokens, K, H)."""
    size, count = pages.k_PKSH.shape[2], pages.k_PKSH.shape[0]
    first = low // size
    chosen = table_P[first : -(-high // size)].long()
    if bool(((chosen < 0) | (chosen >= count)).any()):
        raise IndexError(f"a page table names a page outside 0 to {count - 1}")
    tokens = slice(low - first * size, high - first * size)

    def side(values: Tensor, scales: Tensor | None) -> Tensor:
        picked = values.view(torch.uint8)[chosen].view(values.dtype) if scales is not None else values[chosen]
        whole = dequantize(picked, None if scales is None else scales[chosen], dtype)
        return whole.transpose(1, 2).flatten(0, 1)[tokens]

    return side(pages.k_PKSH, pages.k_scale_PKS), side(pages.v_PKSH, pages.v_scale_PKS)


def _attend(q_TNH: Tensor, k_CKH: Tensor, v_CKH: Tensor, seen_TC: Tensor) -> Tensor:
    share = q_TNH.shape[1] // k_CKH.shape[1]
    k, v = (x.repeat_interleave(share, dim=1) for x in (k_CKH, v_CKH))
    scores = torch.einsum("tnh,cnh->ntc", q_TNH, k) * q_TNH.shape[2] ** -0.5
    return torch.einsum("ntc,cnh->tnh", scores.masked_fill(~seen_TC, float("-inf")).softmax(-1), v)
