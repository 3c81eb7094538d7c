"""Two pipeline ranks: our training step against torch.distributed.pipelining, schedule by schedule.

    python benchmarks/pipeline.py [--schedules 1f1b,zb-v --steps 8 --threads 1 --json FILE]

Both cut the same 32M-parameter Llama into the same stages on 2 gloo ranks and train it on 8 microbatches of 256 tokens,
from the same weights. Ours is Trainer. The peer is plain_llama.py in PipelineStages under the schedule of the same name
(ZB-H1 is its interleaved zero-bubble schedule with one stage a rank), cross entropy on the last stage, fused AdamW; it
clips by the norm of each rank's own gradients, which spares it a reduction that ours does. In bfloat16 it runs purely.

Then the executors alone: the same plain torch modules, optimizer and loop, driven by our executor and by theirs.

By default ours sets glibc's allocator as ``python -m launch train`` does, and the peer is what users run; with
``--allocator tuned`` all contenders have that setting. Of the executors alone, neither has it by default.
"""

from __future__ import annotations

import argparse
import sys
from typing import Any

import contest
from pipeline_model import PEERS, RANKS
from report import Claim, finish

TARGET = 1.0
ALONE = ("gpipe", "1f1b")


def race(
    args: argparse.Namespace, title: str, ours: dict[str, Any], theirs: list[dict[str, Any]], tolerance: float
) -> tuple[Claim, list[dict[str, Any]]]:
    """One race of ours against the peer; its claim and details."""
    specs = {f"ours {title}": ours}
    for spec in theirs:
        specs[f"torch.distributed.pipelining {title}, {spec['adamw']} AdamW"] = spec
    results = contest.race(args, specs)
    contest.show(results)
    contest.check_same_work(results, tolerance)
    ratio, spread = contest.paired(results[0], contest.fastest(results[1:]))
    claim = Claim(
        f"step time, ours / torch.distributed.pipelining, {title}", ratio, f"<= {TARGET}", ratio <= TARGET, spread
    )
    return claim, contest.details(results)


def main() -> int:
    """Race, print, and return 0 if all went well."""
    assert __doc__ is not None
    parser = contest.options(__doc__.splitlines()[0], threads=1, adamw="fused")
    parser.set_defaults(steps=8)
    parser.add_argument("--schedules", default=",".join(PEERS), help="to race; empty: none")
    parser.add_argument("--alone", default=",".join(ALONE), help="schedules of the executors alone; empty: none")
    args = parser.parse_args()
    schedules, alone = ([name for name in text.split(",") if name] for text in (args.schedules, args.alone))
    if unknown := [name for name in (*schedules, *alone) if name not in PEERS]:
        parser.error(f"{unknown[0]!r} is none of {', '.join(PEERS)}")
    if split := [name for name in alone if name not in ALONE]:
        parser.error(f"--alone: {split[0]!r} is none of {', '.join(ALONE)}: plain modules put no W off for ours")
    claims: list[Claim] = []
    details: list[dict[str, Any]] = []

    def add(title: str, kind: str, schedule: str, precision: str, weights: str) -> None:
        def spec(kind: str, **more: Any) -> dict[str, Any]:
            return contest.specification(args, kind, precision, world=RANKS, pipeline=schedule, weights=weights, **more)

        theirs = [spec("torch_pipeline", adamw=adamw) for adamw in args.adamw]
        tolerance = 1e-4 if precision == "fp32" else 5e-3
        claim, found = race(args, title, spec(kind, layout={"pp": RANKS}), theirs, tolerance)
        claims.append(claim)
        details.extend(found)

    with contest.terminable(), contest.weights(args.layers) as weights:
        for schedule in schedules:
            for precision in args.precision:
                add(f"{schedule} {precision}", "ours", schedule, precision, weights)
        for schedule in alone:
            add(f"{schedule} fp32, executors alone", "our_executor", schedule, "fp32", weights)
    return finish(args, claims, details)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except contest.ContestError as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit(130)
