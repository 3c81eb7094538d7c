"""From answers to numbers.

The names and definitions are those of vLLM's ``benchmark_serving`` (``vllm bench serve``): TTFT, from a request to its
first text; TPOT, from there to its last text, over the tokens after the first; ITL, from one piece of text to the next;
E2E, from a request to its last text; goodput, requests a second that meet all objectives. But for one thing: in an open
loop a request begins when it was to be sent, not when this program came to send it, so a server that makes its clients
wait cannot hide it (coordinated omission).
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import numpy as np

from launch.bench.client import Answer
from launch.bench.config import Objective

__all__ = ["PERCENTILES", "Record", "outcome", "spread", "summary"]

PERCENTILES = (50, 90, 99)
_MS = 1000.0


@dataclass(slots=True)
class Record:
    """What became of one request; times in seconds from the beginning of the load.

    Attributes:
        due: when it was to be sent.
        sent: when it was.
        chunks: when each piece of text came.
        ended: when it was over.
        outcome: ``ok``; the status (``429`` ...), ``timeout``, ``connection`` or ``stream`` of what failed;
            ``cut`` (under way) or ``unsent`` where the load was ended before it.
    """

    due: float = 0.0
    sent: float = math.nan
    chunks: list[float] = field(default_factory=list)
    ended: float = math.nan
    prompt_tokens: int = 0
    output_tokens: int = 0
    cached_tokens: int = 0
    outcome: str = "unsent"
    error: str = ""

    def take(self, answer: Answer, start: float) -> None:
        """Note an answer; ``start`` is the beginning of the load by the same clock."""
        self.outcome, self.error = outcome(answer), answer.error or _message(answer.body)
        self.chunks = [when - start for when in answer.chunks]
        self.ended = answer.ended - start
        usage = answer.usage
        self.prompt_tokens = usage.get("prompt_tokens") or 0
        self.output_tokens = usage.get("completion_tokens") or len(answer.chunks)
        self.cached_tokens = (usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0

    @property
    def ttft(self) -> float:
        """Seconds to the first text."""
        return self.chunks[0] - self.due

    @property
    def e2e(self) -> float:
        """Seconds to the last text."""
        return self.chunks[-1] - self.due

    @property
    def tpot(self) -> float | None:
        """Seconds for each token after the first; None: there is none."""
        return (self.chunks[-1] - self.chunks[0]) / (self.output_tokens - 1) if self.output_tokens > 1 else None

    @property
    def itl(self) -> list[float]:
        """Seconds from each text to the next."""
        return [after - before for before, after in pairwise(self.chunks)]

    def good(self, objective: Objective) -> bool:
        """Whether it is whole and meets every objective."""
        limits = ((objective.ttft_ms, self.ttft), (objective.tpot_ms, self.tpot), (objective.e2e_ms, self.e2e))
        return all(most is None or value is None or value * _MS <= most for most, value in limits)


def _message(body: bytes) -> str:
    """Of an answer that is an error."""
    try:
        return str(json.loads(body)["error"]["message"])[:300]
    except (ValueError, LookupError, TypeError):
        return body[:100].decode(errors="replace")


def outcome(answer: Answer) -> str:
    """``ok``, or in one word what failed."""
    if answer.error == "timeout":
        return "timeout"
    if answer.status == 0:
        return "connection"
    if answer.status != 200:
        return str(answer.status)
    return "ok" if answer.finished and not answer.error and answer.chunks else "stream"


def spread(values: Sequence[float]) -> dict[str, float] | None:
    """Mean and percentiles (between two values by a straight line) in milliseconds; None: there is no value."""
    if not values:
        return None
    own = np.asarray(values) * _MS
    found = {"mean": float(own.mean()), "max": float(own.max())}
    return found | {f"p{share}": float(np.percentile(own, share)) for share in PERCENTILES}


def summary(records: Sequence[Record], objective: Objective, elapsed_s: float, cpu_s: float) -> dict[str, Any]:
    """The numbers of a load.

    Args:
        records: of every request that was planned.
        objective: what a good answer is.
        elapsed_s: from the beginning to the end of the last answer.
        cpu_s: that this program used.
    """
    done = [record for record in records if record.outcome == "ok"]
    sent = [record for record in records if not math.isnan(record.sent)]
    good = sum(record.good(objective) for record in done)
    seconds = max(elapsed_s, 1e-9)
    output, prompt = sum(r.output_tokens for r in done), sum(r.prompt_tokens for r in done)
    tokens = sum(max(r.output_tokens, len(r.chunks)) for r in records)
    return {
        "planned": len(records),
        "outcomes": dict(sorted(Counter(record.outcome for record in records).items())),
        "errors": _errors(records),
        "duration_s": elapsed_s,
        "requests_per_s": len(done) / seconds,
        "output_tokens_per_s": output / seconds,
        "total_tokens_per_s": (output + prompt) / seconds,
        "goodput_per_s": good / seconds,
        "good_share": good / len(sent) if sent else None,
        "prompt_tokens": prompt,
        "cached_tokens": sum(r.cached_tokens for r in done),
        "output_tokens": output,
        "ttft_ms": spread([r.ttft for r in done]),
        "tpot_ms": spread([value for r in done if (value := r.tpot) is not None]),
        "itl_ms": spread([value for r in done for value in r.itl]),
        "e2e_ms": spread([r.e2e for r in done]),
        "sent_late_ms": spread([r.sent - r.due for r in sent]),
        "client_cpu_share": cpu_s / seconds,
        "client_cpu_us_per_token": 1e6 * cpu_s / tokens if tokens else None,
    }


def _errors(records: Sequence[Record]) -> dict[str, str]:
    """One message for each kind of failure."""
    found: dict[str, str] = {}
    for record in records:
        if record.error:
            found.setdefault(record.outcome, record.error)
    return found
