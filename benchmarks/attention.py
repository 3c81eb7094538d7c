"""Paged attention on the CPU: our kernel against what torch offers for the same pages, one layer at a time.

    python benchmarks/attention.py [--rounds 40 --threads 2 --precision fp32,bf16 --json FILE]

Heads and sizes are those of the 32M-parameter Llama: 8 query heads, 4 key-value heads of 64; pages of 16 tokens lie at
random. Every contender writes the new keys and values into their pages and attends. They take turns, each turn over the
pages of another of 8 layers, as a model does, so that the pages come from memory. The peers:

* gather + SDPA: the pages of all requests side by side, padded to the longest, and one fused attention with a mask;
* gather + SDPA each: the same request by request, without padding;
* nested tensors: keys and values of all requests as one jagged tensor; decoding only, as it knows no mask;
* our version in plain torch, which gathers 256 tokens at a time.

Besides: what it costs to build the inputs of a step of 256 requests.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from report import Claim, add_report_options, finish, table
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from infer.attention import BACKENDS, Pages
from infer.attention.quantize import write
from infer.batch import StepBatch

HEADS, KV_HEADS, SIZE, PAGE, LAYERS = 8, 4, 64, 16, 8
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
TARGETS = {"decode": 3.0, "mixed": 1.5, "chunk": 1.0, "long chunk": 1.0}
BUILD_MICROSECONDS = 100.0


@dataclass
class Work:
    """One step, and the pages of each layer."""

    q: Tensor
    k: Tensor
    v: Tensor
    layers: list[Pages]
    step: StepBatch
    runs: list[tuple[int, int]]


def cases() -> dict[str, list[tuple[int, int]]]:
    """(tokens in the cache after the step, new ones) of each request."""
    draw = np.random.default_rng(0)
    decode = [(int(n), 1) for n in draw.integers(16, 331, 32)]
    return {
        "decode": decode,
        "mixed": [*decode[:28], (200, 200), (120, 120), (300, 44), (180, 100)],
        "chunk": [(200, 200), (150, 150), (60, 60), (102, 102)],
        "long chunk": [(1024, 512)],
    }


def make(runs: list[tuple[int, int]], dtype: torch.dtype) -> Work:
    """Random numbers on pages in random order."""
    counts = [-(-context // PAGE) for context, _ in runs]
    order = np.random.default_rng(1).permutation(sum(counts))
    tables = np.zeros((len(runs), max(counts)), np.int32)
    for row, (count, end) in enumerate(zip(counts, np.cumsum(counts), strict=True)):
        tables[row, :count] = order[end - count : end]
    stop = np.array([context for context, _ in runs])
    start = stop - np.array([new for _, new in runs])
    step = StepBatch.build(np.zeros((len(runs), stop.max()), np.int64), [tables], start, stop, page_size=PAGE)
    fused = torch.randn(len(step), HEADS + 2 * KV_HEADS, SIZE).to(dtype)
    shape = (sum(counts), LAYERS, 2, KV_HEADS, PAGE, SIZE)
    pages = torch.randn(shape).to(dtype)
    layers = [Pages(pages[:, layer, 0], pages[:, layer, 1]) for layer in range(LAYERS)]
    q, k, v = fused.split([HEADS, KV_HEADS, KV_HEADS], 1)
    return Work(q, k, v, layers, step, runs)


def contenders(work: Work) -> dict[str, Callable[[Pages], Tensor]]:
    """Ours first."""
    step, mask = work.step, padded_mask(work)

    def backend(name: str) -> Callable[[Pages], Tensor]:
        own = BACKENDS[name]()
        if reason := own.refusal(torch.device("cpu"), work.q.dtype):
            sys.exit(f"error: {reason}")
        return lambda pages: own(work.q, work.k, work.v, pages, step, 0, None)

    def gather(pages: Pages) -> Tensor:
        write(pages, work.k, work.v, step.slots_T[0])
        chosen = step.table[0].long()
        k, v = (x[chosen].transpose(1, 2).flatten(2, 3) for x in (pages.k_PKSH, pages.v_PKSH))
        q = padded(work)
        out = scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True).transpose(1, 2)
        return torch.cat([out[row, :new] for row, (_, new) in enumerate(work.runs)])

    def each(pages: Pages) -> Tensor:
        write(pages, work.k, work.v, step.slots_T[0])
        outputs = []
        for row, (start, stop) in enumerate(pairwise(step.boundaries)):
            k, v = history(pages, work, row)
            q = work.q[start:stop].transpose(0, 1)[None]
            own = None if stop - start == 1 else mask[row, :, : stop - start, : k.shape[0]]
            k, v = (x.transpose(0, 1)[None] for x in (k, v))
            outputs.append(scaled_dot_product_attention(q, k, v, attn_mask=own, enable_gqa=True)[0].transpose(0, 1))
        return torch.cat(outputs)

    def nested(pages: Pages) -> Tensor:
        write(pages, work.k, work.v, step.slots_T[0])
        rows = [history(pages, work, row) for row in range(len(work.runs))]
        k, v = (torch.nested.as_nested_tensor([pair[i] for pair in rows], layout=torch.jagged) for i in (0, 1))
        shared = work.q.unflatten(1, (KV_HEADS, -1)).transpose(1, 2)  # query heads that share keys, as if tokens
        q = torch.nested.as_nested_tensor(list(shared), layout=torch.jagged)
        out = scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2).values()
        return out.unflatten(0, (len(rows), -1)).transpose(1, 2).flatten(1, 2)

    found = {"ours": backend("cpu"), "gather + SDPA": gather, "gather + SDPA each": each}
    if step.widest == 1:
        found["nested tensors"] = nested
    return {**found, "ours in torch": backend("torch")}


def history(pages: Pages, work: Work, row: int) -> tuple[Tensor, Tensor]:
    """Keys and values of one request, (tokens, K, H)."""
    context = work.runs[row][0]
    chosen = work.step.table[0][row, : -(-context // PAGE)].long()
    k, v = (x[chosen].transpose(1, 2).flatten(0, 1)[:context] for x in (pages.k_PKSH, pages.v_PKSH))
    return k, v


def padded(work: Work) -> Tensor:
    """Queries (R, N, most new tokens, H)."""
    if work.step.widest == 1:
        return work.q.unsqueeze(2)
    q = work.q.new_zeros(len(work.runs), work.step.widest, HEADS, SIZE)
    for row, (start, stop) in enumerate(pairwise(work.step.boundaries)):
        q[row, : stop - start] = work.q[start:stop]
    return q.transpose(1, 2)


def padded_mask(work: Work) -> Tensor:
    """What each query sees: (R, 1, most new tokens, most tokens)."""
    context = torch.tensor([run[0] for run in work.runs])[:, None]
    new = torch.tensor([run[1] for run in work.runs])[:, None]
    at = (context - new + torch.arange(work.step.widest)).minimum(context - 1)
    return (torch.arange(work.step.table[0].shape[1] * PAGE) <= at[..., None])[:, None]


def race(work: Work, rounds: int, clock: Callable[[], float]) -> dict[str, list[float]]:
    """Milliseconds of each contender, a list each; they must agree."""
    given, times = contenders(work), {}
    want = given["ours"](work.layers[0]).float()
    for name, run in given.items():
        error = float((run(work.layers[0]).float() - want).abs().max())
        if error > (1e-4 if work.q.dtype == torch.float32 else 3e-2):
            sys.exit(f"error: {name} differs from ours by {error}")
        times[name] = []
    for turn in range(rounds):
        for name, run in given.items():
            pages = work.layers[turn % LAYERS]
            started = clock()
            run(pages)
            times[name].append((clock() - started) * 1e3)
    return times


def build_time(rounds: int) -> float:
    """Median microseconds of building the inputs of 256 decoding requests."""
    draw = np.random.default_rng(2)
    tokens = draw.integers(0, 8192, (512, 4096))
    tables = draw.integers(0, 99_999, (512, 256), np.int32)
    rows, start = draw.permutation(512)[:256], draw.integers(0, 400, 256)
    found = []
    for _ in range(rounds * 10):
        started = time.perf_counter()
        StepBatch.build(tokens, [tables], start, start + 1, page_size=PAGE, rows_R=rows)
        found.append((time.perf_counter() - started) * 1e6)
    return statistics.median(found)


@torch.inference_mode()
def main() -> int:
    """Race, print, and return 0 if all went well."""
    assert __doc__ is not None
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--precision", type=lambda text: text.split(","), default=list(DTYPES))
    parser.add_argument("--cpu-time", action="store_true", help="one thread, and its own time: for a busy machine")
    add_report_options(parser)
    args = parser.parse_args()
    args.threads = 1 if args.cpu_time else args.threads
    clock = time.thread_time if args.cpu_time else time.perf_counter
    torch.set_num_threads(args.threads)
    warnings.filterwarnings("ignore", "The PyTorch API of nested tensors")
    claims: list[Claim] = []
    details: list[dict[str, Any]] = []
    for precision in args.precision:
        for name, runs in cases().items():
            times = race(make(runs, DTYPES[precision]), args.rounds, clock)
            medians = {who: statistics.median(found) for who, found in times.items()}
            rows = [(who, f"{ms:.3f}", f"{ms / medians['ours']:.2f}") for who, ms in medians.items()]
            print(f"\n{name}, {precision}\n{table(('', 'ms a layer', 'times ours'), rows)}", flush=True)
            peers = {who: ms for who, ms in medians.items() if not who.startswith("ours")}
            best = min(peers, key=lambda who: peers[who])
            ratio, target = peers[best] / medians["ours"], TARGETS[name]
            text = f"{name} {precision}: time of {best} / ours"
            claims.append(Claim(text, ratio, f">= {target}", ratio >= target, f"ours {medians['ours']:.3f} ms"))
            details.append({"case": name, "precision": precision, "milliseconds": times})
    microseconds = build_time(args.rounds)
    text = "microseconds to build the inputs of 256 requests"
    claims.append(Claim(text, microseconds, f"< {BUILD_MICROSECONDS:.0f}", microseconds < BUILD_MICROSECONDS))
    return finish(args, claims, details)


if __name__ == "__main__":
    sys.exit(main())
