"""Embedding and head with the vocabulary cut over the tensor-parallel axis."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from parallel import comm
from parallel.deferral import Deferral
from parallel.errors import DataError
from parallel.mesh import Axis
from parallel.shard import Shard, fill
from parallel.tp.loss import LossSum, vocab_parallel_linear_cross_entropy
from parallel.tp.method import Dense, LinearMethod, LinearProduct

__all__ = ["ParallelLMHead", "VocabParallelEmbedding"]


class _VocabParallel(nn.Module):
    """A table (V, D) of which each rank holds a run of rows; the axis need not divide V."""

    weight: nn.Parameter

    def __init__(
        self,
        vocabulary: int,
        hidden: int,
        axis: Axis,
        *,
        sequence_parallel: bool = False,
        std: float = 1.0,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        self.vocabulary, self.hidden, self.axis, self.std = vocabulary, hidden, axis, std
        self.sequence_parallel = sequence_parallel
        shard = self.shards()["weight"]
        self.weight = nn.Parameter(torch.empty(shard.local_shape(axis.place), dtype=dtype, device=device))
        if not self.weight.is_meta:
            fill(self.weight.data, shard, axis.place, int(torch.randint(1 << 62, ()).item()))

    def shards(self) -> dict[str, Shard]:
        """``weight`` (V, D), cut along the vocabulary and padded."""
        split = (self.axis.name, None)
        return {"weight": Shard(shape=(self.vocabulary, self.hidden), split=split, pad=True, std=self.std)}

    def extra_repr(self) -> str:
        """Size of the whole table, and the axis."""
        return f"{self.vocabulary} x {self.hidden}, {self.axis.name}={self.axis.size}"


class VocabParallelEmbedding(_VocabParallel):
    """Rows of a table, each rank holding a run of the vocabulary (Megatron-LM, arXiv 1909.08053, section 3).

    Args:
        vocabulary: rows; the axis need not divide it, the last ranks then hold padding.
        hidden: columns.
        axis: the tensor-parallel axis.
        sequence_parallel: return this rank's piece of the tokens.
        std: of the initial weights.
    """

    def forward(self, tokens_T: Tensor) -> Tensor:
        """(T) -> (T, D); under sequence parallelism this rank's piece of the tokens.

        Raises:
            DataError: a token id outside the vocabulary (checked where the ids are on the CPU).
        """
        if tokens_T.device.type == "cpu" and tokens_T.numel():
            low, high = (int(bound) for bound in tokens_T.aminmax())
            if low < 0 or high >= self.vocabulary:
                bad = low if low < 0 else high
                raise DataError(f"token id {bad} is outside the vocabulary of {self.vocabulary}")
        if self.axis.size == 1:
            return nn.functional.embedding(tokens_T, self.weight)
        rows = self.weight.shape[0]
        local_T = tokens_T - self.axis.rank * rows
        absent_T = (local_T < 0) | (local_T >= rows)
        x_TD = nn.functional.embedding(local_T.masked_fill(absent_T, 0), self.weight)
        x_TD = x_TD.masked_fill(absent_T[:, None], 0.0)
        return comm.reduce_scatter(x_TD, self.axis) if self.sequence_parallel else comm.all_reduce(x_TD, self.axis)


class ParallelLMHead(_VocabParallel):
    """The projection onto the vocabulary, cut like :class:`VocabParallelEmbedding`, whose weight it may share.

    Args:
        vocabulary, hidden, axis, std: as there.
        sequence_parallel: the input holds this rank's piece of the tokens.
        method, deferral: as in :class:`~parallel.tp.linear.ColumnParallelLinear`.
    """

    def __init__(
        self,
        vocabulary: int,
        hidden: int,
        axis: Axis,
        *,
        method: LinearMethod | None = None,
        deferral: Deferral | None = None,
        **options: Any,
    ) -> None:
        super().__init__(vocabulary, hidden, axis, **options)
        self.deferral = Deferral() if deferral is None else deferral
        self.method: LinearMethod = Dense() if method is None else method

    def forward(
        self,
        x_TD: Tensor,
        tokens: int | None = None,
        rows_R: Tensor | None = None,
        *,
        labels_T: Tensor | None = None,
        **options: Any,
    ) -> Any:
        """(T, D) -> the logits of all tokens, or of ``rows_R``, over the whole vocabulary (T, V), on every rank.

        With labels it is :meth:`loss`: called as a module, so that ZeRO 3 has the weight there.
        """
        if labels_T is not None:
            return self.loss(x_TD, labels_T, **options)
        if self.sequence_parallel:
            x_TD = comm.all_gather(x_TD, self.axis, total=tokens)
        else:
            x_TD = comm.replicate(x_TD, self.axis)
        if rows_R is not None:
            x_TD = x_TD[rows_R]
        local_TV = comm.apply(LinearProduct, x_TD, self.weight, self.method)
        return comm.all_gather(local_TV, self.axis, dim=1, grad="replicated")[:, : self.vocabulary]

    def loss(self, x_TD: Tensor, labels_T: Tensor, **options: Any) -> LossSum:
        """:func:`~parallel.tp.loss.vocab_parallel_linear_cross_entropy` with this head."""
        return vocab_parallel_linear_cross_entropy(
            x_TD,
            self.weight,
            labels_T,
            self.axis,
            vocabulary=self.vocabulary,
            sequence_parallel=self.sequence_parallel,
            method=self.method,
            deferral=self.deferral,
            **options,
        )
