"""The running requests: their rows, their pages, and what is reserved for them."""

from __future__ import annotations

from bisect import insort
from collections import Counter
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from infer.policy import SchedulerConfig, span
from infer.prefix import Prefixes, first_page
from infer.request import Life, Request
from infer.rows import Decoding, Rows
from infer.step import NO_PAGE
from infer.tiers import Memory

__all__ = ["Held", "Running", "columns"]

Held = tuple[int, list[int]]
"""The pages of a request in one group: the number of the first, and from there on all."""


def columns(tokens: int, page_size: int) -> int:
    """Pages that hold so many tokens."""
    return -(-tokens // page_size)


class Running:
    """Requests that have a row.

    Each is *decoding* (one token a step), *filling* (more than one token is to be computed) or *resting* (nothing is to
    be computed until it is extended or finished).

    Pages that a request needs to compute its goal, which is what it has and ``horizon`` tokens more, are reserved when
    it is seated. Reserved pages are always available, so up to its goal a request gets them without asking; past its
    goal it needs a page that is not reserved. In a group with a window no request ever holds more than its quota, and
    all quotas together never exceed the pages there are.

    Attributes:
        reserved: for each group, pages that running requests may still claim.
        claimed: for each group, what they may claim and what they hold; a shared page counts once for each.
        departures: grows whenever room was made.
    """

    def __init__(self, config: SchedulerConfig, memory: Memory, prefixes: Prefixes) -> None:
        self.config, self.memory, self.prefixes = config, memory, prefixes
        self.groups, self.page_size = memory.groups, config.page_size
        self.rows = Rows(config.requests, len(self.groups))
        self.decoding = Decoding(config.requests)
        self.filling: list[Request] = []
        self.reserved = [0] * len(self.groups)
        self.claimed = [0] * len(self.groups)
        self.priorities: Counter[int] = Counter()
        self.externals = 0
        self.departures = 0
        self._settling: list[tuple[int, int]] = []
        self._windows = [(index, group.window) for index, group in enumerate(self.groups) if group.window is not None]

    def quotas(self, total: int, computed: int, most: int) -> list[int]:
        """For each group, how many pages a request holds at most until it reaches its goal."""
        goal = columns(min(total + self.config.horizon, most - 1), self.page_size)
        chunk = max(1, min(total - computed, self.config.longest_chunk))
        quotas = []
        for group in self.groups:
            if group.window is None:
                quotas.append(goal)
            else:
                quotas.append(min(span(group.window - 1 + chunk, self.page_size), columns(most - 1, self.page_size)))
        return quotas

    def slack(self, group: int) -> int:
        """Pages that nobody uses and nobody may claim."""
        pool = self.memory.device[group]
        if self.groups[group].window is None:
            return pool.available - self.reserved[group]
        return pool.total - self.claimed[group] - self.memory.pinned_copies(group)

    def fits(self, quotas: Sequence[int], used: Sequence[int], margin: float) -> bool:
        """Whether a request can be seated, and ``margin`` of the pages are left.

        Args:
            quotas: from :meth:`quotas`.
            used: of them, pages that others use already and that it would share.
            margin: a part of all pages.
        """
        for group, (quota, shared) in enumerate(zip(quotas, used, strict=True)):
            if self.groups[group].window is None:
                if self.slack(group) < quota - shared + int(margin * self.groups[group].pages):
                    return False
            elif self.slack(group) < quota:
                return False
        return True

    def seat(self, request: Request, computed: int, held: Sequence[Held]) -> None:
        """Give the request a row; there is one, and the request :meth:`fits`.

        Args:
            request: it is filling from now on.
            computed: tokens in the pages that it holds.
            held: for each group.
        """
        rows, total = self.rows, len(request.tokens)
        row = rows.free.pop()
        request.move(Life.RUNNING)
        request.row, rows.request[row] = row, request
        upto = columns(computed, self.page_size)
        rows.widen(columns(request.most - 1, self.page_size))
        rows.computed[row], rows.room[row] = computed, upto * self.page_size
        rows.final[row], rows.goal[row] = request.most - 1, min(total + self.config.horizon, request.most - 1)
        rows.last[row], rows.given_by[row] = request.tokens[-1], 0
        quotas = self.quotas(total, computed, request.most)
        for group, (quota, (first, pages)) in enumerate(zip(quotas, held, strict=True)):
            assert first + len(pages) == upto and len(pages) <= quota
            rows.tables[group][row, first:upto] = pages
            rows.first[group][row] = first
            rows.left[group][row] = quota - len(pages)
            self.reserved[group] += quota - len(pages)
            self.claimed[group] += quota
        self.priorities[request.priority] += 1
        self.externals += request.external
        insort(self.filling, request, key=_rank)

    def held(self, row: int) -> list[Held]:
        """What the request of a row holds in each group."""
        rows, upto = self.rows, int(self.rows.room[row]) // self.page_size
        firsts = [int(first[row]) for first in rows.first]
        return [(first, table[row, first:upto].tolist()) for first, table in zip(firsts, rows.tables, strict=True)]

    def keep(self, request: Request, stop: int) -> None:
        """Let the full pages of the first ``stop`` tokens, which are known and computed, be found."""
        rows, pages = self.rows, stop // self.page_size
        if pages > request.named:
            held: list[Held] = []
            for first, table in zip(rows.first, rows.tables, strict=True):
                begin = max(int(first[request.row]), request.named)
                held.append((begin, table[request.row, begin:pages].tolist()))
            self.prefixes.keep(request, held, pages)

    def unseat(self, request: Request, *, keep: bool) -> None:
        """Take the row and the pages of a request; ``keep``: full ones stay cached until they are needed."""
        rows, row = self.rows, request.row
        held, computed = self.held(row), int(rows.computed[row])
        if keep:
            self.prefixes.keep(request, held, min(computed, len(request.tokens)) // self.page_size)
        self.prefixes.withdraw(request)
        for group, (first, pages) in enumerate(held):
            self.memory.forget_copies(group, pages)
            self.memory.device[group].release(reversed(pages))
            left = int(rows.left[group][row])
            self.reserved[group] -= left
            self.claimed[group] -= left + len(pages)
            rows.tables[group][row, first : first + len(pages)] = NO_PAGE
        self.leave_step(request)
        self.priorities[request.priority] -= 1
        self.externals -= request.external
        request.computed, request.row, rows.request[row] = computed, -1, None
        rows.serial[row] += 1
        self.departures += 1
        rows.free.append(row)

    def leave_step(self, request: Request) -> None:
        """Nothing is computed for the request until further notice."""
        if request.row in self.decoding:
            self.decoding.remove(request.row)
        elif request in self.filling:
            self.filling.remove(request)

    def decode(self, request: Request) -> None:
        """The request has one token to compute in every step from now on."""
        self.leave_step(request)
        self.decoding.add(request.row, request)

    def settle(self, request: Request) -> None:
        """The request has computed all it was admitted with: from the next step on its windows need less."""
        if self._windows:
            self._settling.append((request.row, int(self.rows.serial[request.row])))

    def make_room(self, row: int, stop: int) -> None:
        """Pages for the tokens up to ``stop``, out of what is reserved for the row."""
        rows, at, upto = self.rows, int(self.rows.room[row]) // self.page_size, columns(stop, self.page_size)
        if upto > at:
            for group in range(len(self.groups)):
                rows.tables[group][row, at:upto] = self.memory.take(group, upto - at)
                rows.left[group][row] -= upto - at
                self.reserved[group] -= upto - at
                assert rows.left[group][row] >= 0, "more than was reserved"
            rows.room[row] = upto * self.page_size

    def crossing(self) -> NDArray[np.int64]:
        """Rows of decoding requests whose next token needs another page."""
        rows = self.decoding.rows
        return rows[self.rows.computed[rows] >= self.rows.room[rows]]

    def short_of(self, crossing: NDArray[np.int64]) -> int | None:
        """The first group that cannot give these rows a page each."""
        for group, left in enumerate(self.rows.left):
            if np.count_nonzero(left[crossing] == 0) > self.slack(group):
                return group
        return None

    def cross(self, crossing: NDArray[np.int64]) -> None:
        """One page more for each of these rows."""
        rows, at = self.rows, self.rows.room[crossing] // self.page_size
        for group in range(len(self.groups)):
            claims = rows.left[group][crossing] > 0
            count = int(np.count_nonzero(claims))
            rows.left[group][crossing] -= claims
            self.reserved[group] -= count
            self.claimed[group] += len(crossing) - count
            rows.tables[group][crossing, at] = self.memory.take(group, len(crossing))
        rows.room[crossing] += self.page_size

    def trim_all(self) -> None:
        """Let go of pages that lie outside of every window from now on."""
        rows = self.rows
        for group, window in self._windows:
            at = self.decoding.rows
            pages = (rows.computed[at] - window + 1) // self.page_size - rows.first[group][at]
            if len(one := at[pages == 1]):
                self._trim_one(one, group)
            for row in at[pages > 1].tolist():
                self._trim(row, group, window)
        if self._windows:
            for request in self.filling:
                self.trim(request.row)
            for row, serial in self._settling:
                if rows.serial[row] == serial:
                    self._settle(row)
            self._settling.clear()

    def trim(self, row: int) -> None:
        """Let go of the row's pages that lie outside of every window from now on."""
        for group, window in self._windows:
            self._trim(row, group, window)

    def _trim_one(self, at: NDArray[np.int64], group: int) -> None:
        """Let go of the first page of each of these rows."""
        rows, pool, first = self.rows, self.memory.device[group], self.rows.first[group][at]
        pages = rows.tables[group][at, first].tolist()
        if self.prefixes.enabled:
            for row, page, index in zip(at.tolist(), pages, first.tolist(), strict=True):
                request = rows.request[row]
                assert request is not None
                if index < len(request.keys):
                    pool.name(page, request.keys[index])
        pool.release(pages)
        rows.tables[group][at, first] = NO_PAGE
        rows.first[group][at] += 1
        rows.left[group][at] += 1
        self.reserved[group] += len(pages)

    def _trim(self, row: int, group: int, window: int) -> None:
        rows, pool = self.rows, self.memory.device[group]
        first, keep = int(rows.first[group][row]), first_page(window, int(rows.computed[row]), self.page_size)
        count = keep - first
        if count > 0:
            pages = rows.tables[group][row, first:keep].tolist()
            request = rows.request[row]
            assert request is not None
            if self.prefixes.enabled:
                for page, key in zip(pages, request.keys[first:keep], strict=False):
                    pool.name(page, key)
            pool.release(reversed(pages))
            rows.tables[group][row, first:keep] = NO_PAGE
            rows.first[group][row] = keep
            rows.left[group][row] += count
            self.reserved[group] += count

    def _settle(self, row: int) -> None:
        rows = self.rows
        self.trim(row)
        for group, window in self._windows:
            quota = min(span(window, self.page_size), columns(int(rows.final[row]), self.page_size))
            held = int(rows.room[row]) // self.page_size - int(rows.first[group][row])
            change = quota - held - int(rows.left[group][row])
            rows.left[group][row] += change
            self.reserved[group] += change
            self.claimed[group] += change
            self.departures += change < 0


def _rank(request: Request) -> tuple[int, int]:
    return request.rank
