"""StepBatch: what the model and its paged attention must know about one step, built from arrays without loops."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from parallel.models.batch import Batch

__all__ = ["StepBatch"]

Array = np.ndarray[Any, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class StepBatch(Batch):
    """A packed step: the tokens between two boundaries continue one request. R requests, T tokens.

    Attributes:
        table: for each page group the page ids of each request, int32 (R, P); page i holds its tokens i S to (i + 1) S.
        slots_T: for each page group where the keys and values of each new token go: page * S + offset, int64.
        context_R: tokens of each request in the cache after this step, int32.
        starts_R: the boundaries, int32 (R + 1).
        longest: the largest of ``context_R``.
        widest: most new tokens of a request.
    """

    table: tuple[Tensor, ...]
    slots_T: tuple[Tensor, ...]
    context_R: Tensor
    starts_R: Tensor
    longest: int
    widest: int

    @staticmethod
    def build(
        tokens: Array,
        tables: Sequence[Array],
        start_R: Array,
        stop_R: Array,
        *,
        page_size: int,
        rows_R: Array | None = None,
        device: torch.device | str = "cpu",
    ) -> StepBatch:
        """The step that computes tokens ``start_R`` to ``stop_R`` of each request.

        Args:
            tokens: token ids of every row of the caller's table of requests, (rows, most tokens).
            tables: page ids for each page group, (rows, most pages).
            start_R: tokens of each request that are in the cache already.
            stop_R: where its slice of this step ends, above ``start_R``.
            page_size: S.
            rows_R: the row of each request; None: row r is request r.
            device: where the tensors shall be.
        """
        count_R = stop_R - start_R
        ends_R = np.cumsum(count_R)
        total, longest = int(ends_R[-1]), int(stop_R.max())
        request_T = np.repeat(np.arange(len(count_R)), count_R)
        position_T = np.arange(total) + np.repeat(start_R - ends_R + count_R, count_R)
        row_T = request_T if rows_R is None else rows_R[request_T]
        page_T, offset_T = position_T // page_size, position_T % page_size
        pages = -(-longest // page_size)
        chosen = slice(None) if rows_R is None else rows_R
        starts = np.concatenate(([0], ends_R))

        def give(array: Array, dtype: type) -> Tensor:
            tensor = torch.from_numpy(array.astype(dtype, order="C"))  # a copy: the caller's arrays change meanwhile
            return tensor if device == "cpu" else _moved(tensor, torch.device(device))

        return StepBatch(
            tokens_T=give(tokens[row_T, position_T], np.int64),
            positions_T=give(position_T, np.int64),
            boundaries=tuple(starts.tolist()),
            table=tuple(give(table[chosen, :pages], np.int32) for table in tables),
            slots_T=tuple(
                give(table[row_T, page_T].astype(np.int64) * page_size + offset_T, np.int64) for table in tables
            ),
            context_R=give(stop_R, np.int32),
            starts_R=give(starts, np.int32),
            longest=longest,
            widest=int(count_R.max()),
        )


def _moved(tensor: Tensor, device: torch.device) -> Tensor:
    """On ``device``; to CUDA from pinned memory, so that nobody waits."""
    if device.type == "cuda":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)
