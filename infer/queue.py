"""Requests that wait, in the order in which they will be served."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterator

from infer.request import Request

__all__ = ["Queue"]


class Queue:
    """Waiting and swapped requests, ordered by rank."""

    def __init__(self) -> None:
        self._requests: list[Request] = []

    def __len__(self) -> int:
        return len(self._requests)

    def __iter__(self) -> Iterator[Request]:
        return iter(self._requests)

    def __contains__(self, request: Request) -> bool:
        place = bisect_left(self._requests, request.rank, key=_rank)
        return place < len(self._requests) and self._requests[place] is request

    def add(self, request: Request) -> None:
        """One more."""
        insort(self._requests, request, key=_rank)

    def remove(self, request: Request) -> None:
        """One less, if it is there."""
        place = bisect_left(self._requests, request.rank, key=_rank)
        if place < len(self._requests) and self._requests[place] is request:
            del self._requests[place]


def _rank(request: Request) -> tuple[int, int]:
    return request.rank
