"""Decoding steps of fixed sizes, recorded once as CUDA graphs and then replayed: one launch instead of hundreds."""

from __future__ import annotations

import bisect
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from infer.batch import StepBatch

__all__ = ["Graphs", "cuda_graph", "sizes"]

Work = Callable[[], Tensor]
_WARM_UP = 2


class _Recorded(NamedTuple):
    """A step of one size.

    Attributes:
        batch: where it reads; the tensors stay where they are.
        replay: computes again.
        logits_RV: where what it computes is then.
    """

    batch: StepBatch
    replay: Callable[[], object]
    logits_RV: Tensor


class Graphs:
    """Computes steps in which every request has one new token, from recordings of a few sizes.

    A step is filled up to the next size with rows that belong to no request: they see one token, which they write to a
    page of their own.

    Args:
        work: the model, on a batch.
        most: most requests of a step.
        columns: most pages of a request, for each page group.
        scratch: a page that no request has, for each page group.
        page_size: tokens of a page.
        device: of the batches.
        record: runs some work, and gives how to run it again and where the result is.
    """

    def __init__(
        self,
        work: Callable[[StepBatch], Tensor],
        *,
        most: int,
        columns: Sequence[int],
        scratch: Sequence[int],
        page_size: int,
        device: torch.device,
        record: Callable[[Work], tuple[Callable[[], object], Tensor]] | None = None,
    ) -> None:
        self._work, self._columns, self._scratch = work, tuple(columns), tuple(scratch)
        self._page_size, self._device = page_size, device
        self._record = cuda_graph() if record is None else record
        self._sizes = sizes(most)
        self._recorded: dict[int, _Recorded] = {}

    def __call__(self, batch: StepBatch) -> Tensor | None:
        """The logits of a step (R, V), until the next one; None: it is not of this kind."""
        requests = len(batch)
        if batch.widest != 1 or batch.wanted_R is not None or requests > self._sizes[-1]:
            return None
        size = self._sizes[bisect.bisect_left(self._sizes, requests)]
        if size not in self._recorded:
            place = self._place(size)
            self._recorded[size] = _Recorded(place, *self._record(lambda: self._work(place)))
        recorded = self._recorded[size]
        self._fill(recorded.batch, batch)
        recorded.replay()
        return recorded.logits_RV[:requests]

    def _place(self, size: int) -> StepBatch:
        """Memory for the inputs of a step, of which no row belongs to a request yet."""

        def full(*shape: int, value: int = 0, dtype: torch.dtype = torch.int64) -> Tensor:
            return torch.full(shape, value, dtype=dtype, device=self._device)

        tables = zip(self._columns, self._scratch, strict=True)
        return StepBatch(
            tokens_T=full(size),
            positions_T=full(size),
            boundaries=tuple(range(size + 1)),
            table=tuple(full(size, columns, value=page, dtype=torch.int32) for columns, page in tables),
            slots_T=tuple(full(size, value=page * self._page_size) for page in self._scratch),
            context_R=full(size, value=1, dtype=torch.int32),
            starts_R=torch.arange(size + 1, dtype=torch.int32, device=self._device),
            longest=max(self._columns) * self._page_size,
            widest=1,
        )

    def _fill(self, place: StepBatch, batch: StepBatch) -> None:
        """Put a step where a recording reads; rows that are left over see one token of the scratch page."""
        requests = len(batch)
        moves: list[tuple[Tensor, Tensor, int]] = [
            (place.tokens_T, batch.tokens_T, 0),
            (place.positions_T, batch.positions_T, 0),
            (place.context_R, batch.context_R, 1),
        ]
        for group, page in enumerate(self._scratch):
            own = batch.table[group]
            moves.append((place.table[group][:, : own.shape[1]], own, page))
            moves.append((place.slots_T[group], batch.slots_T[group], page * self._page_size))
        for into, given, left in moves:
            into[:requests].copy_(given)
            into[requests:].fill_(left)


def sizes(most: int) -> tuple[int, ...]:
    """Of steps that are recorded: close together where steps are short."""
    steps = [1, 2, 4, *range(8, 64, 8), *range(64, 256, 32), *range(256, 1024, 128)]
    return (*(size for size in steps if size < most), most)


def cuda_graph() -> Callable[[Work], tuple[Callable[[], object], Tensor]]:
    """Records CUDA graphs that share their memory: one runs at a time."""
    pool: list[Any] = []

    def record(work: Work) -> tuple[Callable[[], object], Tensor]:
        if not pool:
            pool.append(torch.cuda.graph_pool_handle())
        beside = torch.cuda.Stream()
        beside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(beside):
            for _ in range(_WARM_UP):
                work()
        torch.cuda.current_stream().wait_stream(beside)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=pool[0], capture_error_mode="thread_local"):
            logits_RV = work()
        return graph.replay, logits_RV

    return record
