"""Paged attention written out, request by request: what every other backend is tested against."""

from __future__ import annotations

import torch
from torch import Tensor

from infer.attention import Pages
from infer.attention.quantize import history, write
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
        wide = torch.float64 if q_TNH.dtype == torch.float64 else torch.float32
        for request, context in enumerate(step.context_R.tolist()):
            rows = slice(step.boundaries[request], step.boundaries[request + 1])
            start = context - (rows.stop - rows.start)
            low = 0 if window is None else max(0, start - window + 1)
            k_CKH, v_CKH = history(pages, step.table[group][request], low, context, wide)
            position = torch.arange(start, context, device=q_TNH.device)[:, None]
            key = torch.arange(low, context, device=q_TNH.device)
            seen = key <= position
            if window is not None:
                seen &= key > position - window
            out[rows] = _attend(q_TNH[rows].to(wide), k_CKH, v_CKH, seen).to(q_TNH.dtype)
        return out


def _attend(q_TNH: Tensor, k_CKH: Tensor, v_CKH: Tensor, seen_TC: Tensor) -> Tensor:
    share = q_TNH.shape[1] // k_CKH.shape[1]
    k, v = (x.repeat_interleave(share, dim=1) for x in (k_CKH, v_CKH))
    scores = torch.einsum("tnh,cnh->ntc", q_TNH, k) * q_TNH.shape[2] ** -0.5
    return torch.einsum("ntc,cnh->tnh", scores.masked_fill(~seen_TC, float("-inf")).softmax(-1), v)
