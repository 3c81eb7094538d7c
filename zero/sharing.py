"""How training state is cut over the data axis, and how it travels."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from parallel.mesh import Axis, Mesh
from zero.offload import Lane, Offload

__all__ = ["Sharing"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Sharing:
    """How state is cut over the data axis, and how it travels.

    Attributes:
        stage: of ZeRO.
        shard: the ranks that share one copy of the state.
        reduction: the ranks of ``shard`` (at stage 0: all data ranks), in a group of their own: gradients are summed in
            another order than all else goes over the axis, and neither is to wait for the other.
        replica: the ranks that hold the same run of it.
        lane: copies to and from CPU memory.
        secondary: the neighbouring ranks that share a second copy of the parameters from forward to the update; None:
            there is no such copy.
        quantize_weights: they are gathered as int8.
        gradient_bits: of the integers as which gradients are reduced; 0: they are reduced exactly.
        top_k: the share of a gradient that is sent; 0: all.
        offload: what lives in CPU memory.
        whole_matrices: no parameter is cut: each is in the run of one rank.
    """

    stage: int
    shard: Axis
    reduction: Axis
    replica: Axis
    lane: Lane
    secondary: Axis | None = None
    quantize_weights: bool = False
    gradient_bits: int = 0
    top_k: float = 0.0
    offload: Offload = "none"
    whole_matrices: bool = False

    @property
    def compressed(self) -> bool:
        """Whether anything arrives other than as it was sent."""
        return self.quantize_weights or self.gradient_bits > 0 or self.top_k > 0

    @staticmethod
    def over(
        mesh: Mesh,
        stage: int,
        size: int = 0,
        secondary: int = 0,
        *,
        quantize_weights: bool = False,
        gradient_bits: int = 0,
        top_k: float = 0.0,
        offload: Offload = "none",
        whole_matrices: bool = False,
    ) -> Sharing:
        """Over ``mesh.data``, in runs of ``size`` neighbouring ranks (0: all); stage 0 shares nothing."""
        data = mesh.data
        size = 1 if stage == 0 else size or data.size
        first, second = data.rank - data.rank % size, data.rank - data.rank % max(1, secondary)
        shard = mesh.among("data", range(first, first + size))
        summed = range(first, first + size) if stage else range(data.size)
        return Sharing(
            stage=stage,
            shard=shard,
            reduction=replace(mesh.among("data", summed, "gradients"), name=shard.name if stage else data.name),
            replica=mesh.among("data", range(data.rank % size, data.size, size)),
            lane=Lane(torch.device(mesh.device)),
            secondary=mesh.among("data", range(second, second + secondary)) if secondary else None,
            quantize_weights=quantize_weights,
            gradient_bits=gradient_bits,
            top_k=top_k,
            offload=offload,
            whole_matrices=whole_matrices,
        )
