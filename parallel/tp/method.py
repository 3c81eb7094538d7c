"""How a linear layer holds its weight and multiplies by it: the one seam through which every matrix product goes."""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor, nn

from parallel.kernels.inference import Panels
from parallel.kernels.product import linear_product, pack, packed_product

__all__ = ["Dense", "LinearMethod", "LinearProduct", "Packed"]


class LinearMethod(Protocol):
    """Three products of a layer and its weight; collectives and bias are the layer's own affair.

    A method whose weights cannot be trained raises ``TypeError`` from the two gradients.
    """

    def create(self, layer: nn.Module, shape: tuple[int, int], dtype: torch.dtype, device: torch.device | str) -> None:
        """Register on ``layer`` what holds a local weight of ``shape`` (out, in)."""
        ...

    def product(self, x_TI: Tensor, weight: Tensor, bias_O: Tensor | None) -> Tensor:
        """``x W^T + b``, (T, out)."""
        ...

    def input_gradient(self, gy_TO: Tensor, weight: Tensor) -> Tensor:
        """``gy W``, (T, in)."""
        ...

    def weight_gradient(self, gy_TO: Tensor, x_TI: Tensor) -> Tensor:
        """``gy^T x``, (out, in)."""
        ...


class Dense:
    """A plain weight in the precision of the model."""

    def create(self, layer: nn.Module, shape: tuple[int, int], dtype: torch.dtype, device: torch.device | str) -> None:
        layer.register_parameter("weight", nn.Parameter(torch.empty(shape, dtype=dtype, device=device)))

    def product(self, x_TI: Tensor, weight: Tensor, bias_O: Tensor | None) -> Tensor:
        return linear_product(x_TI, weight, bias_O)

    def input_gradient(self, gy_TO: Tensor, weight: Tensor) -> Tensor:
        return linear_product(gy_TO, weight.t())

    def weight_gradient(self, gy_TO: Tensor, x_TI: Tensor) -> Tensor:
        return gy_TO.t() @ x_TI


class Packed(Dense):
    """A weight that is only multiplied with: after :meth:`finish` in the order in which the processor does so."""

    def __init__(self) -> None:
        self.packed: Tensor | Panels | None = None

    def finish(self, weight: Tensor, *, keep: bool) -> None:
        """The weight is loaded.

        Args:
            keep: leave the weight as it is as well: somebody else reads it (a tied embedding).
        """
        self.packed = pack(weight)
        if self.packed is not None and not keep:
            weight.data = weight.data.new_empty(0)

    def product(self, x_TI: Tensor, weight: Tensor, bias_O: Tensor | None) -> Tensor:
        packed = self.packed
        return super().product(x_TI, weight, bias_O) if packed is None else packed_product(x_TI, packed, bias_O)


class LinearProduct(torch.autograd.Function):
    """The product of a method, differentiable, without communication."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, method: LinearMethod) -> Tensor:
        ctx.method = method
        ctx.save_for_backward(x, weight)
        return method.product(x, weight, None)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        x, weight = ctx.saved_tensors
        gx = ctx.method.input_gradient(grads[0], weight) if ctx.needs_input_grad[0] else None
        gw = ctx.method.weight_gradient(grads[0], x) if ctx.needs_input_grad[1] else None
        return gx, gw, None
