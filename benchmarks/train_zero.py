"""ZeRO stages 1, 2 and 3 on two ranks: our training step against FSDP2 and DeepSpeed.

    python benchmarks/train_zero.py [--steps 10 --threads 1 --json FILE]

All train the same 32M-parameter Llama on 2 gloo ranks of 1,024 tokens each, from the same weights, with AdamW and
clipping. The peers have plain_llama.py: FSDP2 (``fully_shard`` a block) with ``reshard_after_forward`` as stage 3 and
without as stage 2, and DeepSpeed at stages 1, 2 and 3 where it can be imported (``lockstep[deepspeed]``).
In bf16 all compute in bf16 from fp32 master weights: FSDP2 by its MixedPrecisionPolicy with fp32 reduction, DeepSpeed
by ``bf16.enabled``. Where there are several settings of AdamW, the fastest peer counts.

By default ours sets glibc's allocator as ``python -m launch train`` does, and the peers are what users run; with
``--allocator tuned`` all contenders have that setting.
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
from typing import Any

import contest
from report import Claim, finish

TARGET = 1.0
OVER_STAGE_1 = 1.15
RANKS = 2


def specs(args: argparse.Namespace, precision: str, weights: str) -> dict[str, dict[str, Any]]:
    """The contenders of one precision, our stage 3 first."""

    def of(kind: str, stage: int, **more: Any) -> dict[str, Any]:
        return contest.specification(args, kind, precision, world=RANKS, stage=stage, **more)

    found = {f"ours stage {stage} {precision}": of("ours", stage, layout={"dp": RANKS}) for stage in (3, 1, 2)}
    peers = [("FSDP2", "fsdp", (3, 2))]
    if importlib.util.find_spec("deepspeed") is not None:
        peers.append(("DeepSpeed", "deepspeed", (3, 2, 1)))
    for label, kind, stages in peers:
        for stage in stages:
            for adamw in args.adamw:
                name = f"{label} stage {stage} {precision}" + ", fused AdamW" * (adamw == "fused")
                found[name] = of(kind, stage, weights=weights, adamw=adamw)
    return found


def claims(results: list[contest.Result]) -> list[Claim]:
    """Our stage 3 against theirs, and against our stage 1."""
    three, one = results[0], results[1]
    found: list[Claim] = []

    def claim(below: contest.Result, limit: float) -> None:
        ratio, spread = contest.paired(three, below)
        found.append(Claim(f"step time, {three.name} / {below.name}", ratio, f"<= {limit}", ratio <= limit, spread))

    for kind in ("fsdp", "deepspeed"):
        if peers := [result for result in results if result.spec["kind"] == kind and result.spec["stage"] == 3]:
            claim(contest.fastest(peers), TARGET)
    claim(one, OVER_STAGE_1)
    return found


def main() -> int:
    """Race, print, and return 0 if all went well."""
    assert __doc__ is not None
    parser = contest.options(__doc__.splitlines()[0], threads=1, adamw="fused")
    args = parser.parse_args()
    made: list[Claim] = []
    details: list[dict[str, Any]] = []
    with contest.terminable(), contest.weights(args.layers) as weights:
        for precision in args.precision:
            results = contest.race(args, specs(args, precision, weights))
            contest.show(results)
            contest.check_same_work(results, 1e-4 if precision == "fp32" else 5e-3)
            made += claims(results)
            details += contest.details(results)
    return finish(args, made, details)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except contest.ContestError as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit(130)
