"""RMS normalization (arXiv 1910.07467)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from parallel.comm import apply
from parallel.kernels.inference import norm

__all__ = ["rms_norm", "rms_norm_reference"]


def rms_norm_reference(x_TD: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    """``x / sqrt(mean(x^2) + eps) * weight``, the statistics in float32 or wider."""
    wide = x_TD if x_TD.dtype == torch.float64 else x_TD.float()
    return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)).to(x_TD.dtype) * weight_D


class _RMSNorm(torch.autograd.Function):
    """Keeps the input and one number a row. With r = 1 / rms, p = gy x and c = p w::

    gw = sum_rows(p r);   gx = gy w r - x r^3 c / D
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        wide = torch.float64 if x.dtype == torch.float64 else torch.float32
        r = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=wide)
        r = r.square_().div_(x.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, r)
        return torch.mul(x, r, out=torch.empty_like(x)).mul_(weight)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        x, weight, r = ctx.saved_tensors
        size, dtype = x.shape[-1], x.dtype
        rows, scale = x.reshape(-1, size).to(r.dtype), r.view(-1, 1)
        gy, w = grads[0].reshape(-1, size).to(r.dtype), weight.to(r.dtype)
        p = gy * rows
        c = torch.mv(p, w)
        gw = torch.mv(p.t(), scale.view(-1))
        factor = scale.pow(3).mul_(c.view(-1, 1)).div_(-size)
        gx = torch.mul(gy, w, out=p).mul_(scale).addcmul_(rows, factor)
        return gx.to(dtype).view_as(x), gw.to(weight.dtype), None


def rms_norm(x_TD: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    """:func:`rms_norm_reference` in fewer passes over memory; any leading dims."""
    done = norm(x_TD, weight_D, eps)
    return apply(_RMSNorm, x_TD, weight_D, eps) if done is None else done
