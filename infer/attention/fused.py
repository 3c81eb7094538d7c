"""Paged attention by torch's fused attention, request by request: where no kernel of ours can be had."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from infer.attention import Pages
from infer.attention.quantize import history, write
from infer.batch import StepBatch

__all__ = ["FusedAttention"]


class FusedAttention:
    """Any device, any type. Gathers one request at a time, so its workspace is one context of one layer."""

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
            found = history(pages, step.table[group][request], low, context, q_TNH.dtype)
            q, k, v = (x.transpose(0, 1)[None] for x in (q_TNH[rows], *found))
            mask = None if rows.stop - rows.start == 1 else _seen(low, start, context, window, q.device)
            attended = scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=q.shape[1] != k.shape[1])
            out[rows] = attended[0].transpose(0, 1)
        return out


def _seen(low: int, start: int, stop: int, window: int | None, device: torch.device) -> Tensor:
    """Which of the keys ``low`` to ``stop`` the queries ``start`` to ``stop`` see."""
    at = torch.arange(start, stop, device=device)[:, None]
    key = torch.arange(low, stop, device=device)
    return (key <= at) if window is None else (key <= at) & (key > at - window)
