"""Batch: packed tokens and what a model must know about them."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from parallel.tp.loss import IGNORE

__all__ = ["IGNORE", "Batch"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """T tokens of one or more documents, one after the other, without padding.

    Attributes:
        tokens_T: token ids, int64.
        positions_T: position of each token in its document, int64.
        boundaries: where each document begins, and the end: ``0 = b[0] < b[1] < ... < b[-1] = T``.
        labels_T: the token that follows each, or :data:`IGNORE`; None where there is nothing to predict.
        index_T: the index of each token among all tokens of the step, whatever rank holds it. Random numbers are
            keyed by it, so that no layout changes them. None where nothing is random.
        key: names the draw of random numbers (the optimizer step, usually).
        wanted_R: in evaluation, the tokens whose output is wanted, all that the last block computes; None: all tokens.
    """

    tokens_T: Tensor
    positions_T: Tensor
    boundaries: tuple[int, ...]
    labels_T: Tensor | None = None
    index_T: Tensor | None = None
    key: int = 0
    wanted_R: Tensor | None = None

    def __len__(self) -> int:
        return self.tokens_T.shape[0]

    @staticmethod
    def pack(
        documents: list[Tensor], labels: list[Tensor] | None = None, *, first_index: int = 0, key: int = 0
    ) -> Batch:
        """Documents (each a vector of token ids) packed one after the other; positions count from 0 in each."""
        ends = [0]
        for document in documents:
            ends.append(ends[-1] + document.shape[0])
        tokens = torch.cat(documents)
        return Batch(
            tokens_T=tokens,
            positions_T=torch.cat([torch.arange(d.shape[0], device=tokens.device) for d in documents]),
            boundaries=tuple(ends),
            labels_T=torch.cat(labels) if labels is not None else None,
            index_T=torch.arange(first_index, first_index + ends[-1], device=tokens.device),
            key=key,
        )

    def to(self, device: torch.device | str) -> Batch:
        """The same batch with its tensors on ``device``."""
        moved = {
            name: value.to(device)
            for name in ("tokens_T", "positions_T", "labels_T", "index_T", "wanted_R")
            if (value := getattr(self, name)) is not None
        }
        return replace(self, **moved)
