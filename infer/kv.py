"""Attention that keeps the keys and values of each request between steps."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from parallel.models.batch import Batch
from parallel.models.build import Build
from parallel.models.config import DecoderConfig

__all__ = ["CachedAttention", "StepBatch"]


@dataclass(frozen=True, slots=True, kw_only=True)
class StepBatch(Batch):
    """A packed step: each run of tokens between two boundaries continues one request.

    Attributes:
        requests: the request of each run.
    """

    requests: tuple[int, ...]


class CachedAttention:
    """Causal attention of new tokens to all tokens of their request so far; one of these a layer."""

    def __init__(self, config: DecoderConfig, layer: int, build: Build) -> None:
        self.window = config.window_of(layer)
        self._kept: dict[int, Tensor] = {}

    def __call__(self, q_TNH: Tensor, k_TKH: Tensor, v_TKH: Tensor, batch: Batch, training: bool) -> Tensor:
        assert isinstance(batch, StepBatch), "cached attention serves StepBatch only"
        out = torch.empty_like(q_TNH)
        for index, request in enumerate(batch.requests):
            rows = slice(batch.boundaries[index], batch.boundaries[index + 1])
            start = int(batch.positions_T[rows.start])
            stop = start + rows.stop - rows.start
            kept = self._room(request, stop, k_TKH)
            kept[0, :, start:stop] = k_TKH[rows].transpose(0, 1)
            kept[1, :, start:stop] = v_TKH[rows].transpose(0, 1)
            out[rows] = self._attend(q_TNH[rows].transpose(0, 1), kept[:, :, :stop], start).transpose(0, 1)
        return out

    def release(self, request: int) -> None:
        """Forget a request."""
        self._kept.pop(request, None)

    def _room(self, request: int, stop: int, like: Tensor) -> Tensor:
        """The cache (k and v, K, tokens, H) of a request with room for ``stop`` tokens; it grows by doubling."""
        kept = self._kept.get(request)
        if kept is None or kept.shape[2] < stop:
            grown = like.new_empty(2, like.shape[1], max(64, 2 * stop), like.shape[2])
            if kept is not None:
                grown[:, :, : kept.shape[2]] = kept
            self._kept[request] = kept = grown
        return kept

    def _attend(self, q_NTH: Tensor, kept: Tensor, start: int) -> Tensor:
        tokens, total = q_NTH.shape[1], kept.shape[2]
        key = torch.arange(total, device=q_NTH.device)
        query = torch.arange(start, start + tokens, device=q_NTH.device)[:, None]
        mask = key <= query
        if self.window is not None:
            mask &= key > query - self.window
        gqa = q_NTH.shape[0] != kept.shape[1]
        plain = tokens == 1 and self.window is None
        k, v = kept[0][None], kept[1][None]
        return scaled_dot_product_attention(q_NTH[None], k, v, attn_mask=None if plain else mask, enable_gqa=gqa)[0]
