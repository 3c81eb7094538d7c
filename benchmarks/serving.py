"""Offline throughput: our engine against transformers, on 32 requests of mixed lengths.

    python benchmarks/serving.py [--rounds 5 --threads 2 --precision fp32,bf16 --json FILE]

The 32M-parameter Llama with random weights continues 32 prompts of 16 to 200 tokens by 16 to 128 tokens each, 2,239 in
all, greedily and without an end. The peers: ``generate_batch`` as it comes and with the settings that were the best
here (pages of 32 tokens, no prefix sharing, no asynchronous batching), one left-padded ``generate`` for all up to the
longest request, and ``generate`` one request at a time; and, where one is on the PATH, llama.cpp's ``llama-server``
with the same weights (matrices in float16 where the others have bfloat16), a slot for each request. All run in turn,
each once to warm up; tokens beyond what a request asked for do not count. Managers of ``generate_batch`` are started
before the clock, with a cache that holds all requests: by themselves they take nearly all memory.
"""

from __future__ import annotations

import argparse
import random
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import llama_cpp
import torch
import workload
from report import Claim, add_report_options, finish, table

from infer import LLM, EngineConfig, SamplingParams
from infer.cache import CacheConfig
from infer.policy import SchedulerConfig
from launch.memory import keep_freed_memory
from parallel.hf import save_model
from parallel.mesh import Mesh
from parallel.models.build import Build
from parallel.models.decoder import build_model

REQUESTS, TOTAL = 32, 2239
TARGETS = {
    "generate_batch": 5.0,
    "generate_batch, best settings": 4.0,
    "generate, padded": 4.0,
    "generate, one by one": 15.0,
}
BEST = {
    "page_size": 32,
    "allow_block_sharing": False,
    "use_async_batching": False,
    "max_batch_tokens": 512,
    "num_blocks": 512,
}

Contender = Callable[[], tuple[list[list[int]], float]]
"""Gives the tokens of every request, and the seconds that they took."""


def requests() -> tuple[list[list[int]], list[int]]:
    """Prompts, and how many tokens each is continued by."""
    draw = random.Random(0)
    prompts = [
        [draw.randrange(workload.CONFIG.vocabulary) for _ in range(draw.randint(16, 200))] for _ in range(REQUESTS)
    ]
    lengths = [draw.randint(16, 128) for _ in range(REQUESTS)]
    while sum(lengths) != TOTAL:
        place, by = draw.randrange(REQUESTS), 1 if sum(lengths) < TOTAL else -1
        lengths[place] = min(128, max(16, lengths[place] + by))
    return prompts, lengths


def ours(folder: Path, dtype: torch.dtype) -> Contender:
    """Our engine."""
    prompts, lengths = requests()
    llm = LLM(
        folder,
        dtype=dtype,
        config=EngineConfig(cache=CacheConfig(memory_gib=0.5), scheduler=SchedulerConfig(prefix_cache=False)),
    )
    params = [SamplingParams(max_tokens=n, ignore_eos=True) for n in lengths]
    return timed(lambda: [list(completion.tokens) for completion in llm.generate(prompts, params)])


def padded(model: Any) -> Contender:
    """One batch, padded on the left."""
    prompts, lengths = requests()
    longest = max(map(len, prompts))
    ids = torch.tensor([[0] * (longest - len(p)) + p for p in prompts])
    mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts])

    def run() -> list[list[int]]:
        with torch.inference_mode():
            out = model.generate(ids, attention_mask=mask, **_greedy(max(lengths)))
        return [row[longest : longest + n].tolist() for row, n in zip(out, lengths, strict=True)]

    return timed(run)


def one_by_one(model: Any) -> Contender:
    """A call a request."""
    prompts, lengths = requests()

    def run() -> list[list[int]]:
        with torch.inference_mode():
            return [
                model.generate(torch.tensor([p]), attention_mask=torch.ones(1, len(p), dtype=torch.long), **_greedy(n))[
                    0, len(p) :
                ].tolist()
                for p, n in zip(prompts, lengths, strict=True)
            ]

    return timed(run)


def batched(model: Any, **settings: Any) -> Contender:
    """``generate_batch``'s manager; each request has its own length."""
    from transformers import ContinuousBatchingConfig, GenerationConfig

    prompts, lengths = requests()
    config = GenerationConfig(do_sample=False, eos_token_id=-1, pad_token_id=0, max_new_tokens=max(lengths))

    def results(manager: Any, names: list[str]) -> list[list[int]]:
        found: dict[str, list[int]] = {}
        while len(found) < len(names):
            result = manager.get_result(timeout=1)
            if result is not None and result.is_finished():
                found[result.request_id] = list(result.generated_tokens)
            elif result is None and not manager.is_running():
                raise RuntimeError("generate_batch stopped")
        return [found[name] for name in names]

    def run() -> tuple[list[list[int]], float]:
        cb = ContinuousBatchingConfig(**settings)
        started = model.continuous_batching_context_manager(generation_config=config, continuous_batching_config=cb)
        with started as manager:
            results(manager, [manager.add_request(prompts[0], max_new_tokens=2)])
            began = time.perf_counter()
            names = [manager.add_request(p, max_new_tokens=n) for p, n in zip(prompts, lengths, strict=True)]
            return results(manager, names), time.perf_counter() - began

    return run


def llama_server(folder: Path, dtype: torch.dtype) -> Contender:
    """llama.cpp's server, started for each turn: idle threads of it would take time from the others."""
    prompts, lengths = requests()
    path = folder / f"{dtype}.gguf"
    llama_cpp.write_gguf(folder, workload.CONFIG, path, half=dtype != torch.float32)

    def run() -> tuple[list[list[int]], float]:
        with llama_cpp.serving(path, REQUESTS, 512) as ask:
            ask(prompts[:1], [2])
            began = time.perf_counter()
            return ask(prompts, lengths), time.perf_counter() - began

    return run


def timed(run: Callable[[], list[list[int]]]) -> Contender:
    """With its seconds."""

    def measured() -> tuple[list[list[int]], float]:
        began = time.perf_counter()
        tokens = run()
        return tokens, time.perf_counter() - began

    return measured


def _greedy(tokens: int) -> dict[str, Any]:
    return {"max_new_tokens": tokens, "min_new_tokens": tokens, "do_sample": False, "pad_token_id": 0}


def agreement(got: list[list[int]], expected: list[list[int]]) -> float:
    """Share of the tokens before the first that differs, over all requests."""
    same = 0
    for a, b in zip(got, expected, strict=True):
        same += next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
    return same / TOTAL


def race(folder: Path, precision: str, rounds: int, batching: bool) -> tuple[list[Claim], list[dict[str, Any]]]:
    """All contenders in turn."""
    from transformers import AutoModelForCausalLM

    dtype = workload.DTYPES[precision]
    load: Callable[[], Any] = lambda: AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()  # noqa: E731
    model = load()
    entrants = {"ours": ours(folder, dtype)}
    if batching:
        entrants["generate_batch"] = batched(load(), num_blocks=128)
        entrants["generate_batch, best settings"] = batched(load(), **BEST)
    entrants |= {"generate, padded": padded(model), "generate, one by one": one_by_one(model)}
    if llama_cpp.find():
        entrants["llama-server"] = llama_server(folder, dtype)
    texts = {name: run()[0] for name, run in entrants.items()}
    seconds: dict[str, list[float]] = {name: [] for name in entrants}
    for _ in range(rounds):
        for name, run in entrants.items():
            seconds[name].append(run()[1])
    reference = texts["generate, one by one"]
    details, rows, claims = [], [], []
    for name, times in seconds.items():
        ratios = [theirs / own for theirs, own in zip(times, seconds["ours"], strict=True)]
        ratio, same = statistics.median(ratios), agreement(texts[name], reference)
        rows.append((f"{name} {precision}", f"{TOTAL / statistics.median(times):.0f}", f"{ratio:.2f}", f"{same:.1%}"))
        details.append({"name": f"{name} {precision}", "seconds": times, "same_tokens": same})
        if name in TARGETS:
            target, note = TARGETS[name], f"rounds {min(ratios):.2f} .. {max(ratios):.2f}"
            claims.append(
                Claim(f"throughput, ours / {name}, {precision}", ratio, f">= {target}", ratio >= target, note)
            )
    print(table(("contender", "tokens/s", "time / ours", "same tokens"), rows), flush=True)
    return claims, details


def main() -> int:
    """Race, print, and return 0 if all went well."""
    assert __doc__ is not None
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--precision", default="fp32,bf16", help="fp32, bf16 or both")
    parser.add_argument("--without-batching", action="store_true", help="leave generate_batch out")
    add_report_options(parser)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    keep_freed_memory()
    warnings.filterwarnings("ignore")
    claims: list[Claim] = []
    details: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as name:
        mesh = Mesh.single()
        save_model(build_model(workload.CONFIG, Build(mesh=mesh), workload.WEIGHT_SEED), mesh, Path(name))
        for precision in args.precision.split(","):
            found, more = race(Path(name), precision, args.rounds, not args.without_batching)
            claims += found
            details += more
    return finish(args, claims, details)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
