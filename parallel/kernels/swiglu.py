"""The gated activation ``silu(gate) * up`` (arXiv 2002.05202)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import silu

from parallel.comm import apply
from parallel.kernels.inference import swiglu_rows

__all__ = ["swiglu", "swiglu_reference"]


def swiglu_reference(gate_up_TF: Tensor) -> Tensor:
    """(T, 2F), gate before up, to (T, F)."""
    gate, up = gate_up_TF.chunk(2, dim=-1)
    return silu(gate) * up


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate_up: Tensor) -> Tensor:
        ctx.save_for_backward(gate_up)
        gate, up = gate_up.chunk(2, dim=-1)
        return silu(gate).mul_(up)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        (gate_up,), gy = ctx.saved_tensors, grads[0]
        gate, up = gate_up.chunk(2, dim=-1)
        out = torch.empty_like(gate_up)
        g_gate, g_up = out.chunk(2, dim=-1)
        torch.mul(gy, silu(gate), out=g_up)
        torch.ops.aten.silu_backward.grad_input(gy * up, gate, grad_input=g_gate)
        return out


def swiglu(gate_up_TF: Tensor) -> Tensor:
    """:func:`swiglu_reference`, keeping only its input."""
    done = swiglu_rows(gate_up_TF)
    return apply(_SwiGLU, gate_up_TF) if done is None else done
