"""Normalization layers, whose weights every rank holds whole."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from parallel.kernels.inference import norm_heads_
from parallel.kernels.norm import rms_norm
from parallel.shard import Shard

__all__ = ["LayerNorm", "RMSNorm"]


class RMSNorm(nn.Module):
    """``x / sqrt(mean(x^2) + eps) * weight``.

    Args:
        size: of the last dim.
        eps: added to the mean square.
        partial: axes over which the weight's gradient arrives in parts (tp under sequence parallelism).
    """

    def __init__(
        self,
        size: int,
        eps: float,
        partial: tuple[str, ...] = (),
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        self.size, self.eps, self.partial = size, eps, partial
        self.weight = nn.Parameter(torch.ones(size, dtype=dtype, device=device))

    def shards(self) -> dict[str, Shard]:
        """``weight``, whole, at first all ones."""
        return {"weight": Shard(shape=(self.size,), partial=self.partial, mean=1.0)}

    def forward(self, x_TD: Tensor) -> Tensor:
        """Any leading dims."""
        return rms_norm(x_TD, self.weight, self.eps)

    def heads_(self, x_TO: Tensor, first: int, heads: int) -> bool:
        """Norm some heads of (T, heads x size) in place, each by itself; False, and nothing done: use the layer."""
        return norm_heads_(x_TO, first, heads, self.weight, self.eps)


class LayerNorm(nn.Module):
    """``(x - mean) / sqrt(var + eps) * weight + bias``; arguments as for :class:`RMSNorm`."""

    def __init__(
        self,
        size: int,
        eps: float,
        partial: tuple[str, ...] = (),
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        self.size, self.eps, self.partial = size, eps, partial
        self.weight = nn.Parameter(torch.ones(size, dtype=dtype, device=device))
        self.bias = nn.Parameter(torch.zeros(size, dtype=dtype, device=device))

    def shards(self) -> dict[str, Shard]:
        """``weight`` and ``bias``, whole."""
        return {
            "weight": Shard(shape=(self.size,), partial=self.partial, mean=1.0),
            "bias": Shard(shape=(self.size,), partial=self.partial),
        }

    def forward(self, x_TD: Tensor) -> Tensor:
        """Any leading dims."""
        return nn.functional.layer_norm(x_TD, (self.size,), self.weight, self.bias, self.eps)
