"""Two tensor-parallel ranks: our training step against torch DTensor's published recipe.

    python benchmarks/train_tp.py [--steps 10 --threads 1 --json FILE]

Both cut the same 32M-parameter Llama over 2 gloo ranks with sequence parallelism and a loss over cut logits, from the
same weights, on the same 2,048 tokens. The peer is plain_llama.py under parallelize_module and loss_parallel; in
bfloat16 it runs under autocast and purely, each with the asked AdamW, and the fastest counts.

By default ours sets glibc's allocator as ``python -m launch train`` does, and the peer is what users run; with
``--allocator tuned`` all contenders have that setting.
"""

from __future__ import annotations

import argparse
import sys
from typing import Any

import contest
from report import Claim, finish

TARGET = 0.9
RANKS = 2


def specs(args: argparse.Namespace, precision: str, weights: str) -> dict[str, dict[str, Any]]:
    """The contenders of one precision, ours first."""
    ours = contest.specification(args, "ours", precision, world=RANKS, layout={"tp": RANKS, "sequence_parallel": True})
    found = {f"ours tp={RANKS} {precision}": ours}
    for kind in [precision] if precision == "fp32" else ["autocast", "bf16"]:
        for adamw in args.adamw:
            name = f"DTensor tp={RANKS} {kind}" + ", fused AdamW" * (adamw == "fused")
            found[name] = contest.specification(args, "dtensor", kind, world=RANKS, weights=weights, adamw=adamw)
    return found


def main() -> int:
    """Race, print, and return 0 if all went well."""
    assert __doc__ is not None
    args = contest.options(__doc__.splitlines()[0], threads=1, adamw="default,fused").parse_args()
    claims: list[Claim] = []
    details: list[dict[str, Any]] = []
    with contest.terminable(), contest.weights(args.layers) as weights:
        for precision in args.precision:
            results = contest.race(args, specs(args, precision, weights))
            contest.show(results)
            contest.check_same_work(results, 1e-4 if precision == "fp32" else 5e-3)
            peer = contest.fastest(results[1:])
            ratio, spread = contest.paired(results[0], peer)
            text = f"step time, ours tp={RANKS} {precision} / {peer.name}"
            claims.append(Claim(text, ratio, f"<= {TARGET}", ratio <= TARGET, spread))
            details += contest.details(results)
    return finish(args, claims, details)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except contest.ContestError as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit(130)
