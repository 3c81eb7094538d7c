"""What the scheduler holds, counted; and the proof that nothing is lost: requests, pages, reservations."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, fields
from itertools import pairwise
from operator import add
from typing import Any

from infer.prefix import first_page
from infer.queue import Queue
from infer.request import Life, Request
from infer.running import Running, columns
from infer.tiers import Memory

__all__ = ["Stats", "audit"]


@dataclass(frozen=True, slots=True)
class Stats:
    """What the scheduler holds now, and what it has done so far.

    Attributes:
        running: requests with a row.
        waiting: in the queue, without pages.
        swapped: with their pages in CPU memory.
        free, cached, used: device pages, for each group.
        host_free, host_cached, host_used: pages of CPU memory, for each group.
        disk: pages on disk.
        steps: that were planned.
        computed: tokens that were planned.
        hits: tokens that were found in the prefix cache instead of being computed.
        recomputed: preemptions by which pages were given up.
        swaps: preemptions by which they were moved to CPU memory.
        evictions: cached pages that were given away, for each group.
    """

    running: int
    waiting: int
    swapped: int
    free: tuple[int, ...]
    cached: tuple[int, ...]
    used: tuple[int, ...]
    host_free: tuple[int, ...]
    host_cached: tuple[int, ...]
    host_used: tuple[int, ...]
    disk: int
    steps: int
    computed: int
    hits: int
    recomputed: int
    swaps: int
    evictions: tuple[int, ...]

    def __add__(self, other: Stats) -> Stats:
        """Of both together, which have the same groups."""

        def sum_of(a: Any, b: Any) -> Any:
            return tuple(map(add, a, b)) if isinstance(a, tuple) else a + b

        return Stats(*(sum_of(getattr(self, field.name), getattr(other, field.name)) for field in fields(self)))


def audit(requests: Mapping[int, Request], running: Running, queue: Queue, memory: Memory) -> None:
    """Compare what is counted with what is there; raises AssertionError."""
    seated = [request for request in running.rows.request if request is not None]
    _requests(requests, seated, running, queue)
    _pages(requests, seated, running, memory)
    for request in seated:
        _row(request, running)
    for group, description in enumerate(memory.groups):
        left = sum(int(running.rows.left[group][request.row]) for request in seated)
        held = sum(len(running.held(request.row)[group][1]) for request in seated)
        assert running.reserved[group] == left and running.claimed[group] == left + held, "reservations do not add up"
        assert left <= memory.device[group].available, "more pages are reserved than there are"
        assert description.window is None or running.slack(group) >= 0, "windows claim more pages than there are"
    promised = running.prefixes.promised.values()
    assert all(request.life is Life.RUNNING for request in promised), "a promise by a request that does not run"


def _requests(requests: Mapping[int, Request], seated: list[Request], running: Running, queue: Queue) -> None:
    lives = Counter(request.life for request in requests.values())
    assert Life.FINISHED not in lives, "a finished request is still there"
    assert len(seated) == lives[Life.RUNNING] and all(requests[request.id] is request for request in seated)
    assert len(running.rows.free) + len(seated) == len(running.rows.request), "a row is lost"
    waiting = [request for request in requests.values() if request.life in (Life.WAITING, Life.SWAPPED)]
    ready = [request for request in waiting if not request.paused and len(request.tokens) < request.most]
    queued = list(queue)
    assert {request.id for request in queued} == {request.id for request in ready}, "a request is lost"
    assert all(a.rank < b.rank for a, b in pairwise(queued)), "the queue is out of order"
    decoding = {request.id for request in running.decoding.requests}
    filling = {request.id for request in running.filling}
    assert len(decoding) == running.decoding.count and len(filling) == len(running.filling)
    assert not decoding & filling and decoding | filling <= {request.id for request in seated}
    assert [r.row for r in running.decoding.requests] == running.decoding.rows.tolist(), "decoding rows are mixed up"
    assert all(r.tokens is t for r, t in zip(running.decoding.requests, running.decoding.tokens, strict=True))
    assert running.externals == sum(request.external for request in seated)


def _pages(requests: Mapping[int, Request], seated: list[Request], running: Running, memory: Memory) -> None:
    """Every page's users are the requests that hold it and the moves that need it."""
    device = [Counter[int]() for _ in memory.groups]
    host = [Counter[int]() for _ in memory.groups]
    for request in seated:
        for count, (_first, pages) in zip(device, running.held(request.row), strict=True):
            count.update(pages)
    for request in requests.values():
        for count, stored in zip(host, request.stored or (), strict=False):
            count.update(stored.pages)
        assert (request.stored is not None) == (request.life is Life.SWAPPED)
    pools, counts = (*memory.device, *memory.host), (*device, *host)
    for pool, page in memory.pins():
        counts[pools.index(pool)][page] += 1
    for pool, count in zip(pools, counts, strict=True):
        pool.check(count)


def _row(request: Request, running: Running) -> None:
    """The pages of a running request are those that its position needs."""
    rows, row, size = running.rows, request.row, running.page_size
    assert rows.request[row] is request
    computed, room = int(rows.computed[row]), int(rows.room[row])
    assert computed <= room <= columns(computed, size) * size + size and computed <= rows.final[row]
    assert computed <= len(request.tokens) + 1, "tokens are computed before they are known"  # one may be on its way
    for group, table, first in zip(running.groups, rows.tables, rows.first, strict=True):
        begin = int(first[row])
        pages = table[row].tolist()
        assert begin <= first_page(group.window, computed, size), "a window lost a page that it needs"
        assert all((page >= 0) == (begin <= index < room // size) for index, page in enumerate(pages))
    decoding = row in running.decoding
    assert not (decoding and request.paused)
