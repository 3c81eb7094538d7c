"""Two data-parallel ranks: our training step against DistributedDataParallel.

    python benchmarks/train_dp.py [--steps 10 --threads 1 --json FILE]

Both train the same 32M-parameter Llama on 2 gloo ranks of 1,024 tokens each, from the same weights. The peer is
plain_llama.py under DistributedDataParallel (in bfloat16 under autocast) with clip_grad_norm_ and AdamW; the fastest
counts. Then both race once more beside themselves without reduction (DDP: ``no_sync``; ours: a mesh that does not
communicate): the difference is the communication that the computation did not hide.

By default ours sets glibc's allocator as ``python -m launch train`` does, and the peer is what users run; with
``--allocator tuned`` all contenders have that setting.
"""

from __future__ import annotations

import argparse
import sys
from typing import Any

import contest
from report import Claim, finish

TARGET = 1.0
RANKS = 2


def specs(args: argparse.Namespace, precision: str, weights: str) -> dict[str, dict[str, Any]]:
    """The contenders of one precision, ours first."""
    ours = contest.specification(args, "ours", precision, world=RANKS, layout={"dp": RANKS})
    found = {f"ours dp={RANKS} {precision}": ours}
    kind = "fp32" if precision == "fp32" else "autocast"
    for adamw in args.adamw:
        name = f"DDP {kind}" + ", fused AdamW" * (adamw == "fused")
        found[name] = contest.specification(args, "ddp", kind, world=RANKS, weights=weights, adamw=adamw)
    return found


def exposed(args: argparse.Namespace, pair: list[contest.Result]) -> tuple[list[contest.Result], dict[str, float]]:
    """Race the two beside themselves without reduction; the results, and the seconds of exposed communication."""
    names: dict[str, dict[str, Any]] = {}
    for result in pair:
        names[result.name] = result.spec
        names[f"{result.name}, no reduction"] = {**result.spec, "reduce": False}
    results = contest.race(args, names)
    return results, {
        with_.name: with_.median - without.median for with_, without in zip(results[::2], results[1::2], strict=True)
    }


def main() -> int:
    """Race, print, and return 0 if all went well."""
    assert __doc__ is not None
    parser = contest.options(__doc__.splitlines()[0], threads=1, adamw="default,fused")
    parser.add_argument("--no-exposed", action="store_true", help="skip the race without reduction")
    args = parser.parse_args()
    claims: list[Claim] = []
    details: list[dict[str, Any]] = []
    with contest.terminable(), contest.weights(args.layers) as weights:
        for precision in args.precision:
            results = contest.race(args, specs(args, precision, weights))
            contest.show(results)
            contest.check_same_work(results, 1e-4 if precision == "fp32" else 5e-3)
            peer = contest.fastest(results[1:])
            ratio, spread = contest.paired(results[0], peer)
            text = f"step time, ours dp={RANKS} {precision} / {peer.name}"
            claims.append(Claim(text, ratio, f"<= {TARGET}", ratio <= TARGET, spread))
            details += contest.details(results)
            if args.no_exposed:
                continue
            results, seconds = exposed(args, [results[0], peer])
            contest.show(results)
            for name, value in seconds.items():
                print(f"exposed communication, {name}: {value * 1e3:.0f} ms a step")
            print(flush=True)
            details += [*contest.details(results), {"exposed_s": seconds}]
    return finish(args, claims, details)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except contest.ContestError as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit(130)
