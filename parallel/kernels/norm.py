"""RMS normalization (arXiv 1910.07467)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from parallel.comm import apply

__all__ = ["rms_norm", "rms_norm_reference"]


def rms_norm_reference(x_TD: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    """``x / sqrt(mean(x^2) + eps) * weight``, the statistics in float32 or wider."""
    wide = x_TD if x_TD.dtype == torch.float64 else x_TD.float()
    return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)).to(x_TD.dtype) * weight_D


class _RMSNorm(torch.autograd.Function):
    """Keeps the input and one number a row; the normalized rows are formed again in backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        wide = x if x.dtype == torch.float64 else x.float()
        scale = torch.linalg.vector_norm(wide, dim=-1, keepdim=True).square_().div_(x.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, scale)
        return (wide * scale).to(x.dtype).mul_(weight)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        gy, (x, weight, scale) = grads[0], ctx.saved_tensors
        wide = torch.float64 if x.dtype == torch.float64 else torch.float32
        normed = x.to(wide) * scale
        g = gy.to(wide)
        gw = (g * normed).reshape(-1, x.shape[-1]).sum(0).to(weight.dtype)
        g = g * weight.to(wide)
        inner = (g * normed).mean(-1, keepdim=True)
        gx = g.addcmul_(normed, inner, value=-1).mul_(scale)
        return gx.to(x.dtype), gw, None


def rms_norm(x_TD: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    """:func:`rms_norm_reference` in fewer passes over memory; any leading dims."""
    return apply(_RMSNorm, x_TD, weight_D, eps)
