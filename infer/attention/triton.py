"""Paged attention on a GPU, in Triton: a program for some queries of a request and one key-value head."""

from __future__ import annotations

import importlib.util
from typing import Any

import numpy as np
import torch
from torch import Tensor

from infer.attention import Pages
from infer.attention.quantize import write
from infer.batch import StepBatch

__all__ = ["TritonAttention"]

_ROWS = 64
"""Query heads of a program, at most, where a request has many new tokens."""
_KEYS = 64


class TritonAttention:
    """float32, float16 and bfloat16 with pages in the same precision, int8 or fp8; sums in float32.

    A row's keys are taken in tiles at absolute positions, so its bits do not depend on what else is in the step.
    """

    def refusal(self, device: torch.device, dtype: torch.dtype) -> str | None:
        """Why it cannot serve."""
        if device.type != "cuda":
            return f"it is for CUDA, the model is on {device.type}"
        if dtype not in (torch.float32, torch.float16, torch.bfloat16):
            return f"it does not compute in {dtype}"
        if importlib.util.find_spec("triton") is None:
            return "triton is not installed"
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
        """As :class:`~infer.attention.Backend` says, but that bad pages are not named."""
        from infer.attention import triton_kernel

        write(pages, k_TKH, v_TKH, step.slots_T[group])
        out = torch.empty_like(q_TNH, memory_format=torch.contiguous_format)
        q = q_TNH if q_TNH.stride(-1) == 1 else q_TNH.contiguous()
        kv_heads, page_size, size = pages.k_PKSH.shape[1:]
        share = q.shape[1] // kv_heads
        queries = 1 if step.widest == 1 else max(1, _ROWS // share)
        if step.widest == 1:  # nothing comes from the host, so that it can be recorded
            request, first = step.starts_R[:-1], torch.zeros_like(step.starts_R)
        else:
            request, first = torch.from_numpy(_blocks(step.boundaries, queries)).to(q.device, non_blocking=True)
        scales = (pages.k_PKSH, pages.v_PKSH)  # not looked at
        if pages.k_scale_PKS is not None and pages.v_scale_PKS is not None:
            scales = (pages.k_scale_PKS, pages.v_scale_PKS)
        table = step.table[group]
        options: dict[str, Any] = {
            "SHARE": share,
            "SIZE": size,
            "PADDED": max(16, 1 << (size - 1).bit_length()),
            "PAGE": page_size,
            "QUERIES": queries,
            "ROWS": max(16, 1 << (queries * share - 1).bit_length()),
            "KEYS": _KEYS,
            "SCALED": pages.k_scale_PKS is not None,
        }
        kernel: Any = triton_kernel.paged_kernel
        kernel[(len(request), kv_heads)](
            *(q, pages.k_PKSH, pages.v_PKSH, *scales, out),
            *(table, step.context_R, step.starts_R, request, first),
            *(*q.stride()[:2], *out.stride()[:2], *pages.k_PKSH.stride()[:2], *scales[0].stride()[:2]),
            table.stride(0),
            window or 0,
            size**-0.5 * 1.4426950408889634,
            **options,
        )
        return out


def _blocks(boundaries: tuple[int, ...], queries: int) -> np.ndarray[Any, np.dtype[np.int32]]:
    """The request of each program, and which of its new tokens comes first: (2, programs)."""
    counts = -(-np.diff(boundaries) // queries)
    ends = np.cumsum(counts)
    request = np.repeat(np.arange(len(counts)), counts)
    first = (np.arange(ends[-1]) - np.repeat(ends - counts, counts)) * queries
    return np.stack([request, first]).astype(np.int32)
