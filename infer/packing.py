"""From planned runs to the packed arrays of a step."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from infer.request import Request
from infer.running import Running
from infer.step import NO_TOKEN, Moves, Step

__all__ = ["Chunk", "pack"]


class Chunk(NamedTuple):
    """Tokens ``start`` to ``stop`` of a request that is not decoding; all of them are known."""

    request: Request
    start: int
    stop: int


def pack(
    number: int, running: Running, chunks: Sequence[Chunk], before: int, moves: Moves
) -> tuple[Step, list[list[int]]]:
    """The step that computes a token of every decoding request, and these chunks.

    Args:
        number: of the step.
        running: as it stands before the step.
        chunks: at most one a request.
        before: number of the step that is not committed; 0: there is none.
        moves: of the step.

    Returns:
        the step, and the ``tokens`` of each request that samples.
    """
    rows, decoding = running.rows, running.decoding
    count = decoding.count
    rows_R = decoding.rows.copy()
    starts_R, tokens_T = rows.computed[rows_R], rows.last[rows_R]
    sources_D = None
    if before:
        sources_D = np.where(rows.given_by[rows_R] == before, rows.given_at[rows_R], -1)
        tokens_T[sources_D >= 0] = NO_TOKEN
    requests, lists = decoding.requests.copy(), decoding.tokens.copy()
    if not chunks:
        bounds = rows.counting[: count + 1]
        return Step(
            number, requests, count, count, rows_R, starts_R, starts_R + 1, bounds, tokens_T, starts_R, sources_D, moves
        ), lists
    last = [chunk for chunk in chunks if chunk.stop == len(chunk.request.tokens)]
    ordered = last + [chunk for chunk in chunks if chunk.stop < len(chunk.request.tokens)]
    starts = np.array([chunk.start for chunk in ordered], np.int64)
    stops = np.array([chunk.stop for chunk in ordered], np.int64)
    pieces = [np.array(chunk.request.tokens[chunk.start : chunk.stop], np.int64) for chunk in ordered]
    places = [np.arange(chunk.start, chunk.stop) for chunk in ordered]
    bounds = np.concatenate([rows.counting[: count + 1], count + np.cumsum(stops - starts)])
    step = Step(
        number,
        requests + [chunk.request for chunk in ordered],
        count,
        count + len(last),
        np.concatenate([rows_R, np.array([chunk.request.row for chunk in ordered], np.int64)]),
        np.concatenate([starts_R, starts]),
        np.concatenate([starts_R + 1, stops]),
        bounds,
        np.concatenate([tokens_T, *pieces]),
        np.concatenate([starts_R, *places]),
        sources_D,
        moves,
    )
    return step, lists + [chunk.request.tokens for chunk in last]
