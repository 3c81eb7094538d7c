"""Documents of many callers, of which vectors are made together."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence

__all__ = ["Call", "Gather"]


class Call:
    """Documents of one caller.

    Args:
        documents: token ids of each; at least one.
        done: called once, with a vector for each document, or with why there is none.

    Attributes:
        over: nobody waits for it any more; any thread may set it.
    """

    def __init__(
        self,
        documents: Sequence[Sequence[int]],
        done: Callable[[list[Sequence[float]] | BaseException], None],
    ) -> None:
        self.documents, self.over = documents, False
        self.taken = 0
        self._done = done
        self._vectors: dict[int, Sequence[float]] = {}

    def give(self, place: int, vector: Sequence[float]) -> None:
        """The vector of one of its documents."""
        self._vectors[place] = vector
        if len(self._vectors) == len(self.documents):
            self.end([self._vectors[place] for place in range(len(self.documents))])

    def end(self, result: list[Sequence[float]] | BaseException) -> None:
        """Tell the caller; only the first time counts."""
        if not self.over:
            self.over = True
            self._done(result)


class Gather:
    """Calls that wait, and what of them is computed next.

    Callers take turns, a document each: who has many does not hold up who has one.

    Args:
        budget: most tokens at a time, but for a document that is longer.
    """

    def __init__(self, budget: int) -> None:
        self._budget = budget
        self._calls: deque[Call] = deque()

    def __bool__(self) -> bool:
        return bool(self._calls)

    @property
    def documents(self) -> int:
        """How many wait."""
        return sum(len(call.documents) - call.taken for call in list(self._calls) if not call.over)

    def add(self, call: Call, *, urgent: bool = False) -> None:
        """Queue a call; ``urgent``: its first document comes before all others."""
        if urgent:
            self._calls.appendleft(call)
        else:
            self._calls.append(call)

    def take(self) -> list[tuple[Call, int]]:
        """Documents by call and place, to be computed together; none if none waits."""
        found: list[tuple[Call, int]] = []
        room = self._budget
        while self._calls:
            call = self._calls[0]
            length = 0 if call.over else len(call.documents[call.taken])
            if found and length > room:
                break
            self._calls.popleft()
            if call.over:
                continue
            found.append((call, call.taken))
            call.taken += 1
            room -= length
            if call.taken < len(call.documents):
                self._calls.append(call)
        return found

    def fail(self, error: BaseException) -> None:
        """End all calls."""
        while self._calls:
            self._calls.popleft().end(error)
