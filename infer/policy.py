"""What the scheduler is told: its limits, and the groups of pages that layers share."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from parallel.config import option

__all__ = ["PageGroup", "SchedulerConfig", "group_problems", "span"]


@dataclass(frozen=True, slots=True, kw_only=True)
class SchedulerConfig:
    """Limits and preferences of the scheduler. Nothing here is measured by a clock: every rank decides alike."""

    page_size: int = option(16, "tokens a page")
    budget: int = option(2048, "most tokens a step")
    requests: int = option(256, "most requests that run at a time")
    chunk: int = option(0, "most tokens of one request a step; 0: the budget")
    prefix_cache: bool = option(True, "keep full pages by their tokens, for requests that begin alike")
    horizon: int = option(64, "tokens that an admitted request may generate before it can lose its pages to another")
    watermark: float = option(0.01, "part of the pages that admission leaves free")
    comeback: float = option(0.04, "part of the pages that must be free, beyond its own, for a preempted request")
    aging: int = option(256, "steps after which a request is served as if its priority were one lower; 0: never")
    preemption: Literal["auto", "recompute", "swap"] = option("auto", "what becomes of a preempted request's pages")
    host_cache: bool = option(True, "cached pages that are evicted move to CPU memory, where there is room")
    disk_pages: int = option(0, "pages on disk; 0: none")
    loads: int = option(64, "most pages read from disk a step")
    prefetch: int = option(4, "waiting requests whose pages are read from disk ahead")

    def problems(self) -> Iterator[str]:
        """Why these do not go together."""
        for name, least in (("page_size", 1), ("budget", 1), ("requests", 1), ("horizon", 1), ("loads", 1)):
            if getattr(self, name) < least:
                yield f"{name} = {getattr(self, name)}: must be at least {least}"
        for name in ("chunk", "aging", "disk_pages", "prefetch"):
            if getattr(self, name) < 0:
                yield f"{name} = {getattr(self, name)}: must not be negative"
        for name in ("watermark", "comeback"):
            if not 0 <= getattr(self, name) < 1:
                yield f"{name} = {getattr(self, name)}: must be at least 0 and below 1"
        if self.requests > self.budget:
            yield f"requests = {self.requests} exceeds budget = {self.budget}: each that runs needs a token a step"

    @property
    def longest_chunk(self) -> int:
        """Most tokens of one request in a step."""
        return min(self.chunk or self.budget, self.budget)


@dataclass(frozen=True, slots=True)
class PageGroup:
    """Layers that share one table of pages, because they look back equally far.

    Attributes:
        window: tokens that a layer looks back, its own included; None: all.
        pages: on the device.
        host_pages: in CPU memory.
        cost: what it costs to move one page to CPU memory and back, counted in tokens that could be computed in that
            time: ``2 * bytes of a page / bandwidth * (computing speed / operations a token)``.
    """

    window: int | None
    pages: int
    host_pages: int = 0
    cost: float = 4.0


def group_problems(groups: Sequence[PageGroup]) -> Iterator[str]:
    """Why these groups cannot be."""
    if not groups:
        yield "there is no page group"
    for index, group in enumerate(groups):
        if group.window is not None and group.window < 1:
            yield f"page group {index}: a window of {group.window} tokens sees nothing"
        if group.pages < 1:
            yield f"page group {index}: {group.pages} pages hold no sequence"
        if group.host_pages < 0:
            yield f"page group {index}: host_pages = {group.host_pages}: must not be negative"


def span(tokens: int, page_size: int) -> int:
    """Most pages that so many consecutive tokens touch."""
    return (tokens + page_size - 2) // page_size + 1
