"""A pool of pages: each is free, cached or used, and that is all of them."""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Iterable, Mapping

__all__ = ["Pool"]


class Pool:
    """Pages of one group in one kind of memory, counted by their users.

    A page with users is *used*. One without is *cached* if it has a key, and *free* otherwise. Cached pages are given
    away when no free one is left, the one that was released longest ago first. Whoever releases the pages of a
    sequence does so tail first: a sequence is then lost from its end, and what is left of it can still be found. A page
    that several sequences begin with has as many users, so it is released after all that follow it.

    Args:
        total: pages; they are numbered from 0.

    Attributes:
        users: of each page.
        keys: of each page; None: it cannot be found.
        evictions: cached pages that were given away so far.
    """

    __slots__ = ("_by_key", "_cached", "_free", "evictions", "keys", "total", "users")

    def __init__(self, total: int) -> None:
        self.total = total
        self.users = [0] * total
        self.keys: list[bytes | None] = [None] * total
        self.evictions = 0
        self._free = list(range(total - 1, -1, -1))
        self._cached: OrderedDict[int, None] = OrderedDict()
        self._by_key: dict[bytes, int] = {}

    @property
    def free(self) -> int:
        """Pages that hold nothing."""
        return len(self._free)

    @property
    def cached(self) -> int:
        """Pages that hold something that can be found, and that nobody uses."""
        return len(self._cached)

    @property
    def available(self) -> int:
        """Pages that :meth:`take` can give."""
        return len(self._free) + len(self._cached)

    def take(self, count: int) -> tuple[list[int], list[tuple[int, bytes]]]:
        """Pages with one user each, and those of them that were cached until now with the keys they had.

        ``count`` must not exceed :attr:`available`.
        """
        free, users = self._free, self.users
        evicted: list[tuple[int, bytes]] = []
        if count <= len(free):
            pages = free[len(free) - count :]
            del free[len(free) - count :]
        else:
            pages = free.copy()
            free.clear()
            for _ in range(count - len(pages)):
                page, _none = self._cached.popitem(last=False)
                key = self.keys[page]
                assert key is not None
                del self._by_key[key]
                self.keys[page] = None
                evicted.append((page, key))
                pages.append(page)
            self.evictions += len(evicted)
        for page in pages:
            users[page] = 1
        return pages, evicted

    def share(self, page: int) -> None:
        """One user more, of a page that is used or cached."""
        if self.users[page] == 0:
            del self._cached[page]
        self.users[page] += 1

    def release(self, pages: Iterable[int]) -> None:
        """One user less of each; the pages of a sequence are given tail first."""
        users, keys = self.users, self.keys
        for page in pages:
            left = users[page] - 1
            users[page] = left
            if left == 0:
                if keys[page] is None:
                    self._free.append(page)
                else:
                    self._cached[page] = None

    def find(self, key: bytes) -> int | None:
        """The page with this key."""
        return self._by_key.get(key)

    def name(self, page: int, key: bytes) -> bool:
        """Let a used page be found by ``key``; False: another page is, or this one has a key already."""
        if self.keys[page] is not None or key in self._by_key:
            return False
        self.keys[page] = key
        self._by_key[key] = page
        return True

    def refresh(self, page: int) -> None:
        """Count a cached page as just released."""
        if page in self._cached:
            self._cached.move_to_end(page)

    def check(self, users: Mapping[int, int]) -> None:
        """Prove that free + cached + used = total, and that every page has the users that it counts.

        Args:
            users: how many there are of each page, counted by whoever asks; pages without any may be left out.
        """
        counted = Counter({page: count for page, count in users.items() if count})
        wrong = [(page, count, counted[page]) for page, count in enumerate(self.users) if count != counted[page]]
        assert not wrong, f"(page, users, counted): {wrong}"
        free, cached = set(self._free), set(self._cached)
        assert len(free) == len(self._free), "a page is free twice"
        assert not free & cached and not (free | cached) & counted.keys(), "a page is in two states"
        assert len(free) + len(cached) + len(counted) == self.total, (
            f"{len(free)} free + {len(cached)} cached + {len(counted)} used, of {self.total}"
        )
        assert all(self.keys[page] is None for page in free), "a free page has a key"
        assert all(self.keys[page] is not None for page in cached), "a cached page has no key"
        named = {key: page for page, key in enumerate(self.keys) if key is not None}
        assert named == self._by_key, "keys and pages disagree"
