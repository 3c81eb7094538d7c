"""What varies between two builds of the same model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from parallel import rng
from parallel.deferral import Deferral
from parallel.kernels.attention import packed_attention, packed_attention_reference
from parallel.mesh import Mesh
from parallel.models.batch import Batch
from parallel.models.config import DecoderConfig
from parallel.pp.partition import Cut
from parallel.tp.method import Dense, LinearMethod

__all__ = ["AttentionCore", "Build", "PackedAttention", "Recompute"]

Recompute = Literal["none", "selective", "full"]


class AttentionCore(Protocol):
    """Attention without its projections. A core may keep what it needs between calls (pages, for serving)."""

    def __call__(self, q_TNH: Tensor, k_TKH: Tensor, v_TKH: Tensor, batch: Batch, training: bool) -> Tensor:
        """This rank's heads of every token of the batch, rotated; returns (T, N, H)."""
        ...


class PackedAttention:
    """Causal attention inside each document of the batch: what training uses.

    Args:
        config: of the model.
        layer: index of the block.
        build: gives the mesh (which heads are ours) and the seed of dropout.
    """

    def __init__(self, config: DecoderConfig, layer: int, build: Build) -> None:
        self.window = config.window_of(layer)
        self.drop = config.attention_dropout
        self.layer, self.seed = layer, build.seed
        self.first_head = build.mesh.tp.rank * (config.heads // build.mesh.tp.size)

    def __call__(self, q_TNH: Tensor, k_TKH: Tensor, v_TKH: Tensor, batch: Batch, training: bool) -> Tensor:
        if self.drop and training:
            keep = self._keep(batch, q_TNH.shape[1])
            return packed_attention_reference(q_TNH, k_TKH, v_TKH, batch.boundaries, self.window, keep, self.drop)
        return packed_attention(q_TNH, k_TKH, v_TKH, batch.boundaries, self.window)

    def _keep(self, batch: Batch, heads: int) -> Tensor:
        """Survivors (N, T, T), by global head, global index of the query, and position of the key."""
        assert batch.index_T is not None, "dropout needs Batch.index_T"
        draws = [
            rng.key(self.seed, batch.key, "attention", self.layer, self.first_head + head) for head in range(heads)
        ]
        row, column = batch.index_T[:, None], batch.positions_T
        return torch.stack([rng.keep_mask(draw, row, column, self.drop) for draw in draws])


def _dense(name: str) -> LinearMethod:
    return Dense()


@dataclass(frozen=True, slots=True, kw_only=True)
class Build:
    """Where and how a model is built; the same configuration gives the same function under every build.

    Attributes:
        mesh: which pieces are ours, and where they live.
        dtype: of parameters and activations.
        seed: of dropout.
        recompute: what is formed again in backward instead of kept: nothing, attention, or whole blocks.
        attention: (config, layer, build) -> the attention core of a layer.
        linear: name of a layer (``layers.3.attention.qkv``) -> how it holds and multiplies its weight.
        deferral: shared by all linear layers; a pipeline puts off weight gradients through it.
        cuts: the pipeline stages that this rank holds; None: the whole model.
    """

    mesh: Mesh
    dtype: torch.dtype = torch.float32
    seed: int = 0
    recompute: Recompute = "none"
    attention: Callable[[DecoderConfig, int, Build], AttentionCore] = PackedAttention
    linear: Callable[[str], LinearMethod] = _dense
    deferral: Deferral = field(default_factory=Deferral)
    cuts: tuple[Cut, ...] | None = None

    @property
    def sequence_parallel(self) -> bool:
        """Whether tokens are cut over tp between the linear layers."""
        return self.mesh.layout.sequence_parallel and self.mesh.tp.size > 1

    @property
    def partial(self) -> tuple[str, ...]:
        """Axes over which gradients of weights in the sequence-parallel region arrive in parts."""
        return ("tp",) if self.sequence_parallel else ()

    def linear_options(self, name: str) -> dict[str, Any]:
        """What every parallel linear layer of the model is given."""
        return {
            "sequence_parallel": self.sequence_parallel,
            "method": self.linear(name),
            "deferral": self.deferral,
            "dtype": self.dtype,
            "device": "meta",
        }
