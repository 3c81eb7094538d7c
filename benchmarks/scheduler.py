"""Time that the scheduler takes a step, how it grows, and how much of the cache is unused.

python benchmarks/scheduler.py [--running 256,4096 --steps 400 --json FILE]
"""

from __future__ import annotations

import argparse
import random
import statistics
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from time import process_time

import numpy as np
from report import Claim, add_report_options, finish, table

from infer.policy import PageGroup
from infer.request import Request
from infer.scheduler import Scheduler, SchedulerConfig

PAGE = 16
BLOCK = 20  # steps that are timed together: reading the clock takes long on some machines
TARGETS = {256: 100.0, 4096: 1000.0}


@dataclass(frozen=True)
class Timing:
    """Microseconds of processor time a step, in blocks of steps: what half of them stay under, and their mean."""

    median: float
    mean: float


def tokens_for(step_samples: int) -> np.ndarray:
    """What a sampler would give."""
    return np.full(step_samples, 1234)


def steady(running: int, windows: Sequence[int | None], generated: int) -> tuple[Scheduler, list[Request]]:
    """So many requests that all decode, at staggered positions, each with about ``generated`` tokens behind it."""
    longest = generated + 65_536
    pages = running * (generated // PAGE + 200)
    config = SchedulerConfig(page_size=PAGE, budget=512 * running, requests=running, prefix_cache=False)
    scheduler = Scheduler(config, [PageGroup(window, pages) for window in windows])
    requests = [Request(n, list(range(n, n + generated + n % PAGE + 1)), 1, None, most=longest) for n in range(running)]
    for request in requests:
        scheduler.add(request)
    while True:
        step = scheduler.plan()
        scheduler.commit(step, tokens_for(step.samples))
        if step.decoding == running:
            return scheduler, requests


def timed(scheduler: Scheduler, steps: int, asynchronous: bool) -> Timing:
    """Plan and commit so many steps, all requests decoding, after half as many that do not count."""
    before = scheduler.plan() if asynchronous else None
    count = scheduler.running.decoding.count
    tokens = tokens_for(count)
    times = []
    blocks = max(1, steps // BLOCK)
    for _ in range(blocks // 2 + blocks):
        start = process_time()
        for _ in range(BLOCK):
            step = scheduler.plan()
            last, before = (before, step) if before is not None else (step, None)
            scheduler.commit(last, tokens)
        times.append((process_time() - start) / BLOCK)
    del times[: blocks // 2]
    return Timing(1e6 * statistics.median(times), 1e6 * statistics.fmean(times))


def grown(running: int, steps: int) -> float:
    """Time a step with 2,000 tokens each over that with 100, the two measured in turn."""
    schedulers = [steady(running, [None], generated)[0] for generated in (100, 2000)]
    times: list[list[float]] = [[], []]
    for _ in range(max(5, steps // BLOCK)):
        for scheduler, own in zip(schedulers, times, strict=True):
            own.append(timed(scheduler, BLOCK, False).mean)
    return statistics.median(times[1]) / statistics.median(times[0])


def trace(count: int) -> list[Request]:
    """Requests of all lengths."""
    chance = random.Random(1)
    prompts = [[chance.randrange(32_000) for _ in range(chance.randrange(16, 200))] for _ in range(count)]
    return [
        Request(n, prompt, len(prompt), None, most=len(prompt) + chance.randrange(16, 256))
        for n, prompt in enumerate(prompts)
    ]


def churn(running: int, steps: int, prefix_cache: bool) -> dict[str, float]:
    """A mixed trace: requests come and go, ``running`` at a time; what is timed includes adding and finishing them.

    Returns:
        mean time a step; tokens a step; unused places in the pages of a running request, in pages; the same if each had
        reserved the longest of the trace.
    """
    config = SchedulerConfig(page_size=PAGE, budget=max(2048, 2 * running), requests=running, prefix_cache=prefix_cache)
    scheduler = Scheduler(config, [PageGroup(None, running * 40)])
    blocks = max(1, steps // BLOCK)
    waiting = trace(running * 2 + (blocks + 10) * BLOCK * max(4, running // 50))
    longest = max(request.most for request in waiting)
    waiting.reverse()
    times, unused, reserved, tokens = [], [], [], 0
    for block in range(blocks + 10):
        before, start = scheduler.stats.computed, process_time()
        for _ in range(BLOCK):
            while len(scheduler.queue) < 4:
                scheduler.add(waiting.pop())
            step = scheduler.plan()
            scheduler.commit(step, tokens_for(step.samples))
            for request in step.requests[: step.samples]:
                if len(request.tokens) == request.most:
                    scheduler.finish(request, "length")
        if block >= 10:
            times.append((process_time() - start) / BLOCK)
            stats, rows = scheduler.stats, scheduler.running.rows
            tokens += stats.computed - before
            kept = int(rows.computed[[request is not None for request in rows.request]].sum())
            unused.append((stats.used[0] * PAGE - kept) / stats.running / PAGE)
            reserved.append((stats.running * longest - kept) / stats.running / PAGE)
    return {
        "mean": 1e6 * statistics.fmean(times),
        "tokens": tokens / len(times) / BLOCK,
        "unused": statistics.fmean(unused),
        "reserved": statistics.fmean(reserved),
    }


def main() -> int:
    """Measure, print."""
    assert __doc__ is not None
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--running", default="256,4096", metavar="N,N", help="requests that run at a time")
    parser.add_argument("--steps", type=int, default=400, help="that are timed, of each kind")
    add_report_options(parser)
    args = parser.parse_args()
    claims, details, rows = [], [], []
    for running in (int(part) for part in args.running.split(",")):
        target = TARGETS.get(running, running * 0.25)
        for name, windows, generated, asynchronous in (
            ("decoding", [None], 100, False),
            ("decoding, planned ahead", [None], 100, True),
            ("decoding, windows of 1,024 beside", [None, 1024], 2000, False),
            ("decoding, 2,000 tokens each", [None], 2000, False),
        ):
            timing = timed(steady(running, windows, generated)[0], args.steps, asynchronous)
            rows.append((f"{running:,} {name}", f"{timing.median:.0f}", f"{timing.mean:.0f}", "", ""))
            details.append({"running": running, "what": name, **asdict(timing)})
            if windows == [None]:
                claim = f"{running:,} requests {name}: microseconds a step"
                claims.append(Claim(claim, timing.median, f"< {target:g}", timing.median < target, "median"))
        ratio = grown(running, args.steps)
        claims.append(Claim(f"{running:,} requests: 2,000 tokens each against 100", ratio, "< 1.2", ratio < 1.2))
        for cache in (True, False):
            found = churn(running, args.steps, cache)
            name = f"{running:,} come and go{'' if cache else ', no prefix cache'}"
            waste = f"{found['unused']:.2f} / {found['reserved']:.0f}"
            rows.append((name, "", f"{found['mean']:.0f}", f"{found['mean'] / found['tokens']:.2f}", waste))
            details.append({"running": running, "what": name, **found})
            if cache:
                claim = f"{running:,} come and go: unused pages a request"
                note = f"{found['reserved']:.0f} if the longest were reserved"
                claims.append(Claim(claim, found["unused"], "< 1", found["unused"] < 1, note))
    header = ("requests", "us a step, median", "mean", "us a token", "unused pages a request / if all were reserved")
    print(table(header, rows))
    return finish(args, claims, details)


if __name__ == "__main__":
    sys.exit(main())
