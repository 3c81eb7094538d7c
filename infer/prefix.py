"""Pages found by the tokens they hold: the key of a full page stands for it and for everything before it."""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Container, Sequence
from typing import NamedTuple

from infer.pages import Pool
from infer.policy import PageGroup
from infer.request import Request

__all__ = ["Match", "Prefixes", "first_page"]


class Match(NamedTuple):
    """Pages with which a request may begin.

    Attributes:
        pages: how many; they hold the first ``pages * page_size`` tokens.
        first: for each page group, the first of them that it needs; those before lie outside of the window.
    """

    pages: int
    first: tuple[int, ...]


def first_page(window: int | None, position: int, page_size: int) -> int:
    """The first page that a token at ``position`` looks at."""
    return 0 if window is None else max(0, position - window + 1) // page_size


class Prefixes:
    """Keys of pages, what is found by them, and who is computing what.

    A key is ``blake2b(key of the page before | tokens)``; before the first page stands a key made of the salt. Two
    pages with one key hold the keys and values of the same tokens, at the same positions, after the same tokens.

    Args:
        groups: of pages.
        device: a pool for each.
        host: a pool for each.
        page_size: in tokens.
        enabled: otherwise nothing is ever found.
    """

    def __init__(
        self, groups: Sequence[PageGroup], device: Sequence[Pool], host: Sequence[Pool], page_size: int, enabled: bool
    ) -> None:
        self.groups, self.device, self.host = groups, device, host
        self.page_size, self.enabled = page_size, enabled
        self.promised: dict[bytes, Request] = {}
        self.kept = 0
        self._pack = struct.Struct(f"<{page_size}I").pack

    def keys(self, request: Request, pages: int) -> list[bytes]:
        """The keys of the request, at least those of the first ``pages`` pages; their tokens are known."""
        keys, tokens, size, pack = request.keys, request.tokens, self.page_size, self._pack
        if len(keys) < pages:
            key = keys[-1] if keys else _root(request.salt, size)
            for start in range(len(keys) * size, pages * size, size):
                key = hashlib.blake2b(key + pack(*tokens[start : start + size]), digest_size=32).digest()
                keys.append(key)
        return keys

    def found(self, group: int, key: bytes) -> bool:
        """Whether a page is on the device or in CPU memory."""
        return self.device[group].find(key) is not None or self.host[group].find(key) is not None

    def match(self, request: Request, disk: Container[tuple[int, bytes]] = ()) -> Match:
        """The longest beginning of the request whose pages are on the device, in CPU memory, or on ``disk``.

        At least one token is left to compute, since that gives the next one.
        """
        if not (self.enabled and request.reuse):
            return Match(0, (0,) * len(self.groups))
        limit = (len(request.tokens) - 1) // self.page_size
        keys = self.keys(request, limit)
        for index, group in enumerate(self.groups):
            if group.window is None:
                limit = next((n for n in range(limit) if self._absent(index, keys[n], disk)), limit)
        while (missing := self._missing(keys, limit, disk)) is not None:
            limit = missing
        return Match(limit, self._first(limit))

    def _absent(self, group: int, key: bytes, disk: Container[tuple[int, bytes]]) -> bool:
        return not self.found(group, key) and (group, key) not in disk

    def _first(self, pages: int) -> tuple[int, ...]:
        return tuple(first_page(group.window, pages * self.page_size, self.page_size) for group in self.groups)

    def _missing(self, keys: list[bytes], pages: int, disk: Container[tuple[int, bytes]]) -> int | None:
        """The last page that a window needs before ``pages`` and that is nowhere."""
        for index, (first, group) in enumerate(zip(self._first(pages), self.groups, strict=True)):
            if group.window is not None:
                for page in range(pages - 1, first - 1, -1):
                    if self._absent(index, keys[page], disk):
                        return page
        return None

    def promise(self, request: Request, pages: int) -> None:
        """Say that the request is about to compute its tokens from page ``pages`` on: others may wait for them."""
        if self.enabled:
            for key in self.keys(request, len(request.tokens) // self.page_size)[pages:]:
                self.promised.setdefault(key, request)

    def keep(self, request: Request, group_pages: Sequence[tuple[int, Sequence[int]]], pages: int) -> None:
        """Let the first ``pages`` pages of the request be found.

        Args:
            request: it holds them; their tokens are known, and computed by steps that are planned.
            group_pages: for each page group, the first page that it holds, and from there on all.
            pages: how many.
        """
        if not self.enabled or pages <= request.named:
            return
        keys = self.keys(request, pages)
        for pool, (first, held) in zip(self.device, group_pages, strict=True):
            for index in range(max(first, request.named), pages):
                pool.name(held[index - first], keys[index])
        self.withdraw(request, pages)
        request.named = pages
        self.kept += 1

    def withdraw(self, request: Request, pages: int | None = None) -> None:
        """Take back the promise of the first ``pages`` pages, or of all."""
        if self.promised:
            for key in request.keys[request.named : pages]:
                if self.promised.get(key) is request:
                    del self.promised[key]


def _root(salt: bytes, page_size: int) -> bytes:
    return hashlib.blake2b(b"pages of %d tokens|" % page_size + salt, digest_size=32).digest()
