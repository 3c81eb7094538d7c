"""One step, as data: what is moved, which tokens are computed, which of them give a next one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from infer.request import Request

__all__ = ["NO_MOVES", "NO_PAGE", "NO_TOKEN", "Copy", "DiskMove", "HostMove", "Moves", "Step", "parts", "slots"]

NO_PAGE = -1
"""Stands in a table where a page was never needed, or let go by a window."""
NO_TOKEN = -1
"""Stands for a token that is not known: one that an uncommitted step will give, or that a row failed to give."""


class HostMove(NamedTuple):
    """One page of a group, between the device and CPU memory, in the direction that its list says."""

    group: int
    source: int
    target: int


class Copy(NamedTuple):
    """One page of a group, within the device."""

    group: int
    source: int
    target: int


class DiskMove(NamedTuple):
    """One page of a group, between CPU memory and a file named by ``key``, in the direction that its list says."""

    group: int
    key: bytes
    page: int


class Moves(NamedTuple):
    """What is moved before a step computes: kind by kind in this order, and within a kind in the order given.

    ``drop``, ``save`` and ``load`` may go on beside the computation, if ``save`` has read its page first; they must be
    done when the step is committed. The others must be done before the step writes or reads any page.

    Attributes:
        drop: files to delete, as (group, key).
        save: from CPU memory to disk.
        out: from the device (source) to CPU memory (target).
        load: from disk to CPU memory.
        back: from CPU memory (source) to the device (target).
        copies: within the device; the copy on write of forked requests.
    """

    drop: tuple[tuple[int, bytes], ...] = ()
    save: tuple[DiskMove, ...] = ()
    out: tuple[HostMove, ...] = ()
    load: tuple[DiskMove, ...] = ()
    back: tuple[HostMove, ...] = ()
    copies: tuple[Copy, ...] = ()


NO_MOVES = Moves()


@dataclass(frozen=True, slots=True, eq=False)
class Step:
    """Runs of consecutive tokens, one of each request that takes part, packed; after the moves.

    First come ``decoding`` runs of one token each, then the runs that reach the last token of their request, then those
    that do not. The first ``samples`` runs therefore give a next token each, from the row of their last token.

    R runs; T tokens in all. Index arrays are int64, as numpy and torch like them.

    Attributes:
        number: 1 for the first step.
        requests: of each run.
        decoding: how many runs are one token of a request whose other tokens are all computed.
        samples: how many runs give a token.
        rows_R: row of :attr:`Scheduler.tables` of each run.
        starts_R: position of its first token.
        stops_R: position after its last token; so many keys it has in pages when the step is done.
        bounds: int64, R + 1 entries: where in T each run begins, and T at the end.
        tokens_T: the tokens; :data:`NO_TOKEN` where the step before is to give it.
        positions_T: their positions.
        sources_D: for each decoding run, the run of the step before whose token it computes; -1: it is in ``tokens_T``.
            None if no step was uncommitted when this one was planned.
        moves: to be carried out before.
    """

    number: int
    requests: list[Request]
    decoding: int
    samples: int
    rows_R: NDArray[np.int64]
    starts_R: NDArray[np.int64]
    stops_R: NDArray[np.int64]
    bounds: NDArray[np.int64]
    tokens_T: NDArray[np.int64]
    positions_T: NDArray[np.int64]
    sources_D: NDArray[np.int64] | None
    moves: Moves

    @property
    def empty(self) -> bool:
        """Whether there is nothing to compute; there may still be something to move."""
        return not self.requests


def slots(step: Step, table: NDArray[np.int32], page_size: int) -> NDArray[np.int64]:
    """For each token of the step (T), where its key and value are written: ``page * page_size + offset``.

    Args:
        step: its runs.
        table: of one page group, from :attr:`Scheduler.tables`, as it stands after :meth:`Scheduler.plan`.
        page_size: in tokens.
    """
    rows_T = step.rows_R
    if step.decoding < len(rows_T):
        rows_T = np.repeat(rows_T, np.diff(step.bounds))
    pages_T = table[rows_T, step.positions_T // page_size].astype(np.int64)
    return pages_T * page_size + step.positions_T % page_size


def parts(step: Step, count: int) -> list[NDArray[np.int64]]:
    """Cut the runs of a step into at most ``count`` microbatches that take about equally long.

    Runs with about equally many keys go together: a microbatch is padded to its longest, in its table of pages and in
    an attention kernel that divides the work by runs. This is where grouping by length helps; a packed step as a whole
    has no padding, and admission keeps to the order of ranks.

    Returns:
        for each microbatch, which runs it has, ascending; none is empty.
    """
    runs = len(step.requests)
    if runs == 0:
        return []
    lengths = np.diff(step.bounds)
    order = np.argsort(step.stops_R, kind="stable")
    cost = np.cumsum((lengths * (_ROW_COST + (step.starts_R + step.stops_R) / 2))[order])
    cuts = np.searchsorted(cost, cost[-1] * np.arange(1, count) / count)
    return [np.sort(piece) for piece in np.split(order, cuts) if len(piece)]


_ROW_COST = 4096.0
"""What a token costs apart from attention, counted in keys that it could look at in that time."""
