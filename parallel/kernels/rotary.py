"""Rotary position embedding (arXiv 2104.09864), halves rotated against each other as in Llama."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from parallel.comm import apply
from parallel.kernels.inference import rotate_

__all__ = ["rotary", "rotary_", "rotary_reference"]


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


class _RotaryInPlace(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, heads: int, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        ctx.heads = heads
        ctx.mark_dirty(x)
        return _rotate_(x, heads, cos, sin)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        cos, sin = ctx.saved_tensors
        return _rotate_(grads[0].clone(memory_format=torch.contiguous_format), ctx.heads, cos, -sin), None, None, None


def _rotate_(x_TO: Tensor, heads: int, cos: Tensor, sin: Tensor) -> Tensor:
    size = 2 * cos.shape[1]
    x = x_TO.view(x_TO.shape[0], -1, size)[:, :heads]
    a, b = x.chunk(2, dim=-1)
    cos, sin = cos[:, None].to(x.dtype), sin[:, None].to(x.dtype)
    first = a.clone()
    a.mul_(cos).addcmul_(b, sin, value=-1)
    b.mul_(cos).addcmul_(first, sin)
    return x_TO


def rotary_(x_TO: Tensor, heads: int, cos_TH: Tensor, sin_TH: Tensor) -> Tensor:
    """:func:`rotary_reference` of the first ``heads`` heads of (T, heads and more x H), in place."""
    if rotate_(x_TO, heads, cos_TH, sin_TH):
        return x_TO
    return apply(_RotaryInPlace, x_TO, heads, cos_TH, sin_TH)


def rotary(x_TNH: Tensor, cos_TH: Tensor, sin_TH: Tensor) -> Tensor:
    """:func:`rotary_reference` in fewer passes over memory."""
    return apply(_Rotary, x_TNH, cos_TH, sin_TH)
