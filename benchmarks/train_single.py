"""One process: our training step against Hugging Face transformers in a plain torch loop.

    python benchmarks/train_single.py [--steps 10 --threads 2 --allocator tuned --json FILE]

Both train the same 32M-parameter Llama from the same weights on the same 2,048 tokens with AdamW and clipping. The
peer in bfloat16 runs once under autocast over float32 weights and once purely in bfloat16 (giving up the float32
weights, which ours keeps); the faster one counts.

By default ours sets glibc's allocator as ``python -m launch train`` does, and the peer is what users run; with
``--allocator tuned`` all contenders have that setting.
"""

from __future__ import annotations

import argparse
import sys
from typing import Any

import contest
from report import Claim, finish

TARGET = 1.5


def specs(args: argparse.Namespace, precision: str, weights: str) -> dict[str, dict[str, Any]]:
    """The contenders of one precision, ours first."""
    ours = contest.specification(args, "ours", precision)
    found = {f"ours {precision}": ours}
    for kind in [precision] if precision == "fp32" else ["autocast", "bf16"]:
        for adamw in args.adamw:
            name = f"transformers {kind}" + ", fused AdamW" * (adamw == "fused")
            found[name] = contest.specification(args, "transformers", kind, weights=weights, adamw=adamw)
    return found


def main() -> int:
    """Race, print, and return 0 if all went well."""
    assert __doc__ is not None
    args = contest.options(__doc__.splitlines()[0], threads=2, adamw="default").parse_args()
    claims: list[Claim] = []
    details: list[dict[str, Any]] = []
    with contest.terminable(), contest.weights(args.layers) as weights:
        for precision in args.precision:
            results = contest.race(args, specs(args, precision, weights))
            contest.show(results)
            contest.check_same_work(results, 1e-4 if precision == "fp32" else 5e-3)
            peer = contest.fastest(results[1:])
            ratio, spread = contest.paired(peer, results[0])
            text = f"tokens/s, ours {precision} / {peer.name}"
            claims.append(Claim(text, ratio, f">= {TARGET}", ratio >= TARGET, spread))
            details += contest.details(results)
    return finish(args, claims, details)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except contest.ContestError as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit(130)
