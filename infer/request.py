"""Requests and their lives. Policy only: nothing here knows of tensors."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum
from typing import Any, Literal, NamedTuple

from parallel.errors import Refusal

__all__ = [
    "MOVES",
    "FinishReason",
    "Life",
    "Request",
    "RequestError",
    "Stored",
]

FinishReason = Literal["stop", "length", "abort", "error"]


class RequestError(Refusal):
    """A request that cannot be honoured; it alone is refused, the others go on."""


class Life(Enum):
    """Where a request stands, and what memory that costs.

    Attributes:
        WAITING: in the queue; holds no pages.
        RUNNING: has a row; holds device pages for its computed tokens, and a claim on those that it needs next.
        SWAPPED: in the queue; holds pages of CPU memory for its computed tokens, none of the device.
        FINISHED: holds nothing; what it computed may stay cached until the pages are needed.
    """

    WAITING = "waiting"
    RUNNING = "running"
    SWAPPED = "swapped"
    FINISHED = "finished"


MOVES = {
    Life.WAITING: {Life.RUNNING, Life.FINISHED},
    Life.RUNNING: {Life.WAITING, Life.SWAPPED, Life.FINISHED},
    Life.SWAPPED: {Life.RUNNING, Life.FINISHED},
    Life.FINISHED: set[Life](),
}


class Stored(NamedTuple):
    """The pages of CPU memory, of one page group, in which a swapped request waits; the first is page ``first``."""

    first: int
    pages: list[int]


@dataclass(slots=True, eq=False)
class Request:
    """A sequence that is being continued; each step closes the gap between computed tokens and those there are.

    The caller gives the first block of attributes and reads the second. The third is the scheduler's. While a request
    is RUNNING, how far it is and where its pages are stands in the scheduler's rows (``infer/rows.py``), not here.

    Attributes:
        id: a number that no other living request has.
        tokens: prompt and what was generated so far; only tokens that are known.
        prompt: how many of them are the prompt.
        params: how to sample; the scheduler never looks at it.
        priority: the lower, the sooner.
        salt: whatever separates prefix caches: a tenant, an adapter, the version of the weights.
        most: most tokens that it may have, prompt included.
        reuse: it may begin with cached pages (not where every row of the prompt must be computed).
        external: :meth:`Scheduler.commit` gives it no token; it stands still after each sampled row until
            :meth:`Scheduler.extend` or :meth:`Scheduler.finish` is called (beam search).
        life: see :class:`Life`.
        finish_reason: why it ended, once it has.
        error: what went wrong, if the reason is ``error``.
        computed: while not RUNNING: tokens whose keys and values are kept.
        preemptions: how many times it lost its pages to another request.
        cached: tokens of the last admission that were found in the prefix cache.
        rank: place in the one order in which requests are served; the smaller, the sooner. Never changes.
        row: of the scheduler's tables; -1: none.
        keys: of its full pages, as far as they are known.
        named: full pages that were offered to the prefix cache.
        stored: for each page group, while SWAPPED.
        paused: it waits for :meth:`Scheduler.extend`.
        left_at: number of the step that preempted it, in which it cannot come back; 0: none did.
        waits_for: key of a page that another request is computing, and that it would rather share.
        fetches: rounds in which pages were asked from disk for it.
    """

    id: int
    tokens: list[int]
    prompt: int
    params: Any
    priority: int = 0
    salt: bytes = b""
    most: int = 0
    reuse: bool = True
    external: bool = False

    life: Life = Life.WAITING
    finish_reason: FinishReason | None = None
    error: str = ""
    computed: int = 0
    preemptions: int = 0
    cached: int = 0

    rank: tuple[int, int] = (0, 0)
    row: int = -1
    keys: list[bytes] = field(default_factory=list)
    named: int = 0
    stored: list[Stored] | None = None
    paused: bool = False
    left_at: int = 0
    waits_for: bytes | None = None
    fetches: int = 0

    def move(self, life: Life) -> None:
        """Change :attr:`life`, as :data:`MOVES` allows."""
        assert life in MOVES[self.life], f"request {self.id}: {self.life.value} -> {life.value}"
        self.life = life
