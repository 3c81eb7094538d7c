"""What the prefix cache saves where prompts begin alike, and what it costs where none do.

    python benchmarks/prefix.py [--rounds 9 --shared 1000 --threads 2 --json FILE]

- Two prompts that share their first 1,000 tokens, one after the other, on the 32M-parameter Llama: seconds until the
  first token of the second over those of the first; in each round the shared tokens are others.
- 64 prompts of 16 to 400 tokens that share nothing, each continued by 16: processor time spent planning (keys of pages,
  and all else) with the cache over that without, as a share of the whole time. The whole times, with and without, are
  printed too; they tell one percent from none only on a very quiet machine.
"""

from __future__ import annotations

import argparse
import random
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import workload
from report import Claim, add_report_options, finish, table

from infer import LLM, EngineConfig, SamplingParams
from infer.cache import CacheConfig
from infer.policy import SchedulerConfig
from parallel.hf import save_model
from parallel.mesh import Mesh
from parallel.models.build import Build
from parallel.models.decoder import build_model

TENTH, PERCENT = 0.1, 0.01
TAIL, PROMPTS, NEW = 16, 64, 16


class Planning:
    """Processor time that an engine's scheduler takes."""

    def __init__(self, llm: LLM) -> None:
        self.seconds = 0.0
        scheduler = llm.engine.scheduler
        for name in ("add", "plan", "commit", "finish"):
            setattr(scheduler, name, self._counted(getattr(scheduler, name)))

    def _counted(self, work: Any) -> Any:
        def counted(*args: Any, **options: Any) -> Any:
            began = time.thread_time()
            try:
                return work(*args, **options)
            finally:
                self.seconds += time.thread_time() - began

        return counted


def engine(folder: Path, cache: bool) -> LLM:
    """The model of the benchmarks."""
    config = EngineConfig(cache=CacheConfig(memory_gib=0.5), scheduler=SchedulerConfig(prefix_cache=cache))
    return LLM(folder, config=config)


def first_token(llm: LLM, prompt: list[int]) -> float:
    """Seconds until there is one."""
    began = time.perf_counter()
    llm.generate([prompt], SamplingParams(max_tokens=1, ignore_eos=True))
    return time.perf_counter() - began


def shared(llm: LLM, draw: random.Random, tokens: int) -> tuple[float, float]:
    """Seconds until the first token of two prompts that begin alike."""

    def some(count: int) -> list[int]:
        return [draw.randrange(workload.CONFIG.vocabulary) for _ in range(count)]

    prefix = some(tokens)
    return first_token(llm, prefix + some(TAIL)), first_token(llm, prefix + some(TAIL))


def unshared(llm: LLM, draw: random.Random) -> float:
    """Seconds for prompts that have nothing in common."""
    prompts = [
        [draw.randrange(workload.CONFIG.vocabulary) for _ in range(draw.randint(16, 400))] for _ in range(PROMPTS)
    ]
    began = time.perf_counter()
    llm.generate(prompts, SamplingParams(max_tokens=NEW, ignore_eos=True))
    return time.perf_counter() - began


def main() -> int:
    """Measure, print, and return 0 if all went well."""
    assert __doc__ is not None
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--shared", type=int, default=1000, help="tokens that two prompts begin with")
    parser.add_argument("--threads", type=int, default=2)
    add_report_options(parser)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    draw = random.Random(0)
    with tempfile.TemporaryDirectory() as name:
        mesh = Mesh.single()
        save_model(build_model(workload.CONFIG, Build(mesh=mesh), workload.WEIGHT_SEED), mesh, Path(name))
        engines = {"with": engine(Path(name), True), "without": engine(Path(name), False)}
        for llm in engines.values():
            shared(llm, draw, args.shared)
        pairs = [shared(engines["with"], draw, args.shared) for _ in range(args.rounds)]
        planning = {kind: Planning(llm) for kind, llm in engines.items()}
        whole: dict[str, list[float]] = {kind: [] for kind in engines}
        for turn in range(args.rounds):
            for kind, llm in engines.items():
                whole[kind].append(unshared(llm, random.Random(1 + turn)))
    hits = engines["with"].engine.stats.hits
    first, second = (statistics.median(times) for times in zip(*pairs, strict=True))
    ratios = [b / a for a, b in pairs]
    more = (planning["with"].seconds - planning["without"].seconds) / sum(whole["without"])
    times = {kind: statistics.median(values) for kind, values in whole.items()}
    rows = [
        ("until the first token, the first prompt, ms", f"{1e3 * first:.1f}"),
        ("until the first token, the second, ms", f"{1e3 * second:.1f}"),
        ("prompts that share nothing, with the cache, s", f"{times['with']:.3f}"),
        ("the same without, s", f"{times['without']:.3f}"),
        *((f"planning {kind}, ms in all", f"{1e3 * one.seconds:.1f}") for kind, one in planning.items()),
        ("tokens found in the cache", f"{hits}"),
    ]
    print(table(("", ""), rows))
    ratio = statistics.median(ratios)
    note = f"rounds {min(ratios):.3f} .. {max(ratios):.3f}"
    overall = f"whole time with / without {times['with'] / times['without']:.3f}"
    claims = [
        Claim(
            f"first token, {args.shared:,} tokens shared, second / first", ratio, f"<= {TENTH}", ratio <= TENTH, note
        ),
        Claim("prefix cache without a hit, share of the time", more, f"< {PERCENT}", more < PERCENT, overall),
    ]
    return finish(args, claims, {"pairs": pairs, "whole": whole})


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
