"""Rotary position embedding (arXiv 2104.09864), halves rotated against each other as in Llama."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from parallel.comm import apply

__all__ = ["rotary", "rotary_reference"]


def rotary_reference(x_TNH: Tensor, cos_TH: Tensor, sin_TH: Tensor) -> Tensor:
    """``x cos + rotate(x) sin`` where ``rotate((a, b)) = (-b, a)`` for the halves a, b of each head.

    Args:
        x_TNH: queries or keys.
        cos_TH, sin_TH: (T, H / 2), for each position and frequency.
    """
    a, b = x_TNH.chunk(2, dim=-1)
    cos, sin = cos_TH[:, None].to(x_TNH.dtype), sin_TH[:, None].to(x_TNH.dtype)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)


class _Rotary(torch.autograd.Function):
    """A rotation is undone by the opposite one, so nothing but the angles is kept."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _rotate(x, cos, sin)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        cos, sin = ctx.saved_tensors
        return _rotate(grads[0], cos, -sin), None, None


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    half = x.shape[-1] // 2
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    a, b = x[..., :half], x[..., half:]
    cos, sin = cos[:, None].to(x.dtype), sin[:, None].to(x.dtype)
    torch.mul(a, cos, out=out[..., :half]).addcmul_(b, sin, value=-1)
    torch.mul(b, cos, out=out[..., half:]).addcmul_(a, sin)
    return out


def rotary(x_TNH: Tensor, cos_TH: Tensor, sin_TH: Tensor) -> Tensor:
    """:func:`rotary_reference` in fewer passes over memory."""
    return apply(_Rotary, x_TNH, cos_TH, sin_TH)
