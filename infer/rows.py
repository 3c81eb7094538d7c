"""Running requests as rows of arrays: the one place that says how far each is, and where its pages are."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from infer.request import Request
from infer.step import NO_PAGE

__all__ = ["Decoding", "Rows"]


class Rows:
    """One row a running request. All arrays have ``capacity`` entries.

    Args:
        capacity: most requests that run at a time.
        groups: how many page groups there are.

    Attributes:
        request: of each row.
        free: rows without one.
        computed: tokens whose keys and values are in pages once the last planned step is done.
        room: tokens that the pages of the row can hold.
        final: most tokens that it may ever have in pages; the very last token of a request is never computed.
        goal: it was admitted to compute so many tokens undisturbed.
        last: the last token that is known.
        serial: grows whenever the row changes hands.
        given_by: number of the last step that samples for the row.
        given_at: which run of that step.
        counting: 0, 1, 2, ...; nobody writes there.
        left: for each group, pages that the row may still claim of those reserved.
        first: for each group, the first page that it holds.
        tables: for each group (capacity, width): page ids; :data:`NO_PAGE` where there is none.
    """

    def __init__(self, capacity: int, groups: int) -> None:
        self.request: list[Request | None] = [None] * capacity
        self.free = list(range(capacity - 1, -1, -1))
        self.computed, self.room, self.final, self.goal = (np.zeros(capacity, np.int64) for _ in range(4))
        self.last, self.serial, self.given_by, self.given_at = (np.zeros(capacity, np.int64) for _ in range(4))
        self.counting = np.arange(capacity + 1)
        self.left = [np.zeros(capacity, np.int64) for _ in range(groups)]
        self.first = [np.zeros(capacity, np.int64) for _ in range(groups)]
        self.tables = [np.full((capacity, 64), NO_PAGE, np.int32) for _ in range(groups)]

    def widen(self, columns: int) -> None:
        """Let the tables have at least so many columns."""
        width = self.tables[0].shape[1]
        if columns > width:
            more = max(columns, 2 * width) - width
            self.tables = [np.pad(table, ((0, 0), (0, more)), constant_values=NO_PAGE) for table in self.tables]


class Decoding:
    """Rows that compute one token in every step, side by side, so that a step takes them all at once.

    Args:
        capacity: most rows.

    Attributes:
        count: how many there are.
        requests: of each.
        tokens: the ``tokens`` of each request.
    """

    def __init__(self, capacity: int) -> None:
        self.count = 0
        self.requests: list[Request] = []
        self.tokens: list[list[int]] = []
        self._rows = np.zeros(capacity, np.int64)
        self._place = [-1] * capacity

    @property
    def rows(self) -> NDArray[np.int64]:
        """A view of the rows, good until one is added or removed."""
        return self._rows[: self.count]

    def __contains__(self, row: int) -> bool:
        return self._place[row] >= 0

    def add(self, row: int, request: Request) -> None:
        """One row more."""
        assert self._place[row] < 0
        self._place[row] = self.count
        self._rows[self.count] = row
        self.requests.append(request)
        self.tokens.append(request.tokens)
        self.count += 1

    def remove(self, row: int) -> None:
        """One row less; the last takes its place."""
        place, last = self._place[row], self.count - 1
        assert place >= 0
        moved = int(self._rows[last])
        self._rows[place], self._place[moved] = moved, place
        self.requests[place], self.tokens[place] = self.requests[last], self.tokens[last]
        self.requests.pop()
        self.tokens.pop()
        self._place[row] = -1
        self.count = last
