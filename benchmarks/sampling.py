"""Microseconds to sample one step, against the same done with sorts in plain torch.

    python benchmarks/sampling.py [--rows 32,256 --vocabularies 8192,131072 --rounds 5 --threads 2 --json FILE]

Logits are normal with the given spread (3: the nucleus of 0.9 holds hundreds of 8,192 tokens). ``greedy``: the
likeliest token; ``top-p``: temperature 0.8 and top-p 0.9; ``all``: bias, three penalties, bans, bad words, temperature,
top-k 50, top-p, min-p and the log-probabilities of five tokens. Both run in this process in turn, round by round, and
the least time of each counts: the machine's other work only ever adds to it. The plain contender sorts the vocabulary,
softmaxes, draws with ``torch.multinomial``, counts the generated tokens anew in each step and knows no bad words, all
rows at once; where that would take more than ``--patience`` seconds for a step it is measured on fewer rows and scaled.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from time import perf_counter
from typing import Any

import torch
from report import Claim, add_report_options, finish, table
from torch import Tensor

from infer.params import SamplingParams
from infer.sampling import Row, Sampler, request_seed

PROMPT, GENERATED = 200, 100
NUCLEUS: dict[str, Any] = {"temperature": 0.8, "top_p": 0.9}
ALL: dict[str, Any] = {
    **NUCLEUS,
    "top_k": 50,
    "min_p": 0.01,
    "repetition_penalty": 1.1,
    "presence_penalty": 0.3,
    "frequency_penalty": 0.2,
    "logit_bias": {7: 1.0, 11: -2.0},
    "banned_tokens": (1, 2),
    "bad_words": ((3, 4), (5, 6, 7)),
    "min_tokens": 4,
    "stop_tokens": (9,),
    "logprobs": 5,
    "max_tokens": 1 << 20,
}
WORKLOADS: dict[str, dict[str, Any]] = {"greedy": {}, "top-p": NUCLEUS, "all": ALL}
TARGETS = {"greedy": 1.0, "top-p": 10.0, "all": 5.0}


def ours(logits_RV: Tensor, given: dict[str, Any]) -> Callable[[], Any]:
    """A step of the sampler; each call is the next token of every request."""
    rows, vocabulary = logits_RV.shape
    sampler, params, step = Sampler(vocabulary), SamplingParams(**given), [GENERATED]
    seeds = [request_seed(0, row) for row in range(rows)]
    tokens = [[(row + 13 * i) % vocabulary for i in range(PROMPT + GENERATED)] for row in range(rows)]

    def run() -> Any:
        step[0] += 1
        count = step[0] - 1
        return sampler(logits_RV, [Row(i, params, tokens[i], PROMPT, count, seeds[i]) for i in range(rows)])

    return run


def plain(logits_RV: Tensor, given: dict[str, Any]) -> Callable[[], Any]:
    """The same by sorting, without any state."""
    rows, vocabulary = logits_RV.shape
    tokens = (torch.arange(rows)[:, None] + 13 * torch.arange(PROMPT + GENERATED)) % vocabulary
    if not given:
        return lambda: logits_RV.argmax(-1)

    def run() -> Any:
        x_RV = logits_RV.clone()
        if "top_k" in given:
            x_RV[:, [7, 11]] += torch.tensor([1.0, -2.0])
            counts = torch.zeros(rows, vocabulary).scatter_add_(1, tokens[:, PROMPT:], torch.ones(rows, GENERATED))
            seen = (counts > 0).scatter_(1, tokens[:, :PROMPT], True)
            penalized = torch.where(x_RV < 0, x_RV * given["repetition_penalty"], x_RV / given["repetition_penalty"])
            x_RV = torch.where(seen, penalized, x_RV)
            x_RV = x_RV - given["frequency_penalty"] * counts - given["presence_penalty"] * (counts > 0)
            x_RV[:, [1, 2]] = -torch.inf
        x_RV = x_RV / given["temperature"]
        values, places = x_RV.sort(-1, descending=True)
        if "top_k" in given:
            values[:, given["top_k"] :] = -torch.inf
        chances = values.softmax(-1)
        out = chances.cumsum(-1) - chances >= given["top_p"]
        if "min_p" in given:
            out |= chances < given["min_p"] * chances[:, :1]
        chances = chances.masked_fill(out, 0)
        drawn = places.gather(1, torch.multinomial(chances, 1))
        if "logprobs" in given:
            logprobs = logits_RV.log_softmax(-1)
            return drawn, logprobs.gather(1, drawn), logprobs.topk(given["logprobs"], -1)
        return drawn

    return run


def least(run: Callable[[], Any], rounds: int) -> float:
    """Seconds of the fastest of so many steps."""
    times = []
    for _ in range(rounds):
        start = perf_counter()
        run()
        times.append(perf_counter() - start)
    return min(times)


def measure(args: argparse.Namespace, name: str, rows: int, vocabulary: int) -> dict[str, Any]:
    """Both contenders, in turn."""
    logits_RV = torch.randn(rows, vocabulary, generator=torch.Generator().manual_seed(0)) * args.spread
    given = WORKLOADS[name]
    mine, few = ours(logits_RV, given), max(1, rows // 16)
    guess = least(plain(logits_RV[:few], given), 1) * rows / few
    share = few if guess > args.patience else rows
    theirs = plain(logits_RV[:share], given)
    mine()
    theirs()
    pairs = [(least(mine, 3), least(theirs, 1 if guess > 0.1 else 3)) for _ in range(args.rounds)]
    ours_s, plain_s = (min(column) for column in zip(*pairs, strict=True))
    plain_s *= rows / share
    return {
        "name": name,
        "rows": rows,
        "vocabulary": vocabulary,
        "ours_s": ours_s,
        "plain_s": plain_s,
        "measured": share,
    }


def main() -> int:
    """Measure, print."""
    assert __doc__ is not None
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--rows", default="32,256", help="requests a step")
    parser.add_argument("--vocabularies", default="8192,131072")
    parser.add_argument("--names", default=",".join(WORKLOADS), help="what to measure")
    parser.add_argument("--spread", type=float, default=3.0, help="standard deviation of the logits")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--patience", type=float, default=2.0, help="longest step of the plain contender, seconds")
    add_report_options(parser)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    found, claims = [], []
    for name in args.names.split(","):
        for vocabulary in map(int, args.vocabularies.split(",")):
            for rows in map(int, args.rows.split(",")):
                found.append(measure(args, name, rows, vocabulary))
                ratio = found[-1]["plain_s"] / found[-1]["ours_s"]
                claim = f"{name}, {rows} rows, V = {vocabulary}: plain / ours"
                claims.append(Claim(claim, ratio, f">= {TARGETS[name]:g}", ratio >= TARGETS[name]))
    cells = [
        (row["name"], row["rows"], row["vocabulary"], f"{1e6 * row['ours_s']:,.0f}", f"{1e6 * row['plain_s']:,.0f}")
        for row in found
    ]
    print(f"microseconds a step, {args.threads} threads, logits of spread {args.spread:g}\n")
    print(table(("sampling", "rows", "vocabulary", "ours", "plain torch"), cells))
    return finish(args, claims, found)


if __name__ == "__main__":
    sys.exit(main())
