"""Counters and histograms, in the text format of Prometheus (0.0.4)."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from infer.server.limits import Admission

if TYPE_CHECKING:
    from infer.scheduler import Stats

__all__ = ["OUTCOMES", "ROUTES", "Histogram", "Metrics"]

ROUTES = ("completions", "chat", "responses", "embeddings", "tokenize", "detokenize", "models", "health", "other")
OUTCOMES = ("ok", "refused", "limited", "deadline", "gone", "failed")
"""``refused``: the request was wrong; ``limited``: 429 or 503; ``gone``: its client left."""
_FIRST = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
_EACH = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5)
_WHOLE = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)


class Histogram:
    """How often a value was at most so much.

    Args:
        bounds: ascending.
    """

    def __init__(self, bounds: Sequence[float]) -> None:
        self.bounds, self.counts, self.sum = tuple(bounds), [0] * (len(bounds) + 1), 0.0

    def observe(self, value: float, times: int = 1) -> None:
        """Count a value."""
        self.counts[bisect_left(self.bounds, value)] += times
        self.sum += value * times

    def lines(self, name: str) -> Iterator[str]:
        """As Prometheus reads it."""
        total = 0
        for bound, count in zip((*map(str, self.bounds), "+Inf"), self.counts, strict=True):
            total += count
            yield f'{name}_bucket{{le="{bound}"}} {total}'
        yield f"{name}_sum {self.sum!r}"
        yield f"{name}_count {total}"


class Metrics:
    """What a server has done so far. Labels are fixed: nothing of a request is among them."""

    def __init__(self) -> None:
        self.requests = {(route, outcome): 0 for route in ROUTES for outcome in OUTCOMES}
        self.prompt_tokens = self.cached_tokens = self.generated_tokens = 0
        self.first, self.each, self.whole = Histogram(_FIRST), Histogram(_EACH), Histogram(_WHOLE)

    def count(self, route: str, status: int, outcome: str) -> None:
        """A request has been answered."""
        self.requests[route, outcome or _outcome(status)] += 1

    def lines(self, stats: Stats | None, admission: Admission, *, in_flight: int, draining: bool) -> Iterator[str]:
        """As Prometheus reads it.

        Args:
            stats: of the scheduler; None: not known.
            admission: what waits.
            in_flight: requests that are being answered.
            draining: whether no more are taken.
        """
        yield from _head("requests_total", "counter", "requests that were answered")
        for (route, outcome), count in self.requests.items():
            yield f'lockstep_requests_total{{route="{route}",outcome="{outcome}"}} {count}'
        for name, value, doc in (
            ("prompt_tokens_total", self.prompt_tokens, "tokens of prompts that were answered"),
            ("prompt_tokens_cached_total", self.cached_tokens, "of these, found in the prefix cache"),
            ("generated_tokens_total", self.generated_tokens, "tokens that were generated"),
        ):
            yield from _single(name, "counter", value, doc)
        for name, histogram, doc in (
            ("time_to_first_token_seconds", self.first, "from a request to its first token"),
            ("time_per_token_seconds", self.each, "from one token of a sequence to the next"),
            ("request_seconds", self.whole, "from a request to the end of its answer"),
        ):
            yield from _head(name, "histogram", doc)
            yield from histogram.lines(f"lockstep_{name}")
        for name, value, doc in (
            ("requests_in_flight", in_flight, "requests that are being answered"),
            ("prompts_waiting", admission.requests, "prompts without their first token"),
            ("prompt_tokens_waiting", admission.tokens, "tokens of these"),
            ("draining", int(draining), "1: no more requests are taken"),
            ("engine_up", int(stats is not None), "1: the engine tells what it does"),
        ):
            yield from _single(name, "gauge", value, doc)
        if stats is not None:
            yield from _of_engine(stats)


def _of_engine(stats: Stats) -> Iterator[str]:
    for name, value, doc in (
        ("engine_running", stats.running, "sequences that have a row"),
        ("engine_waiting", stats.waiting, "sequences in the queue"),
        ("engine_swapped", stats.swapped, "sequences whose pages are in CPU memory"),
        ("disk_pages", stats.disk, "pages on disk"),
    ):
        yield from _single(name, "gauge", value, doc)
    for tier, parts in (
        ("device", (stats.free, stats.cached, stats.used)),
        ("host", (stats.host_free, stats.host_cached, stats.host_used)),
    ):
        yield from _head(f"kv_pages_{tier}", "gauge", "pages of keys and values, by page group")
        for state, pages in zip(("free", "cached", "used"), parts, strict=True):
            for group, count in enumerate(pages):
                yield f'lockstep_kv_pages_{tier}{{group="{group}",state="{state}"}} {count}'
    for name, value, doc in (
        ("engine_steps_total", stats.steps, "steps"),
        ("engine_computed_tokens_total", stats.computed, "tokens that were computed"),
        ("prefix_hit_tokens_total", stats.hits, "tokens that were found instead of computed"),
        ("preemptions_recomputed_total", stats.recomputed, "preemptions that gave pages up"),
        ("preemptions_swapped_total", stats.swaps, "preemptions that moved pages"),
        ("evictions_total", sum(stats.evictions), "cached pages that were given away"),
    ):
        yield from _single(name, "counter", value, doc)


def _head(name: str, kind: str, doc: str) -> Iterator[str]:
    yield f"# HELP lockstep_{name} {doc}"
    yield f"# TYPE lockstep_{name} {kind}"


def _single(name: str, kind: str, value: float, doc: str) -> Iterator[str]:
    yield from _head(name, kind, doc)
    yield f"lockstep_{name} {value}"


def _outcome(status: int) -> str:
    if status < 400:
        return "ok"
    if status == 504:
        return "deadline"
    if status in (429, 503):
        return "limited"
    return "refused" if status < 500 else "failed"
