"""Plan and reality: the measured step of our executor against the simulator fed with measured costs, on two ranks.

    python benchmarks/plan.py [--schedules 1f1b,zb-v --steps 12 --json FILE]

The 32M-parameter Llama is cut into stages on 2 gloo ranks and its gradients are formed from 8 microbatches of 256
tokens, without an optimizer; every action is timed. The costs are the medians, over the even steps, of each kind of
action on each stage; the latency of a message is half a round trip of one between the ranks. With them the schedule is
simulated, and the result is held against the median of the odd steps.
"""

from __future__ import annotations

import argparse
import sys
import time
from statistics import median
from typing import Any

import contest
from on_ranks import add_rank_options, on_ranks
from report import Claim, add_report_options, finish, table

SCHEDULES = ("gpipe", "1f1b", "zb-h1", "zb-v", "interleaved", "dualpipev")
TOLERANCE = 0.10


def measure(args: argparse.Namespace) -> list[dict[str, Any]]:
    """On a rank: one row for each schedule."""
    import pipeline_model

    from parallel.mesh import Layout, Mesh

    mesh = Mesh.build(Layout(pp=pipeline_model.RANKS))
    latency = ping_pong(mesh)
    return [
        {"schedule": name, "precision": precision, "latency": latency, **one(args, mesh, name, precision, latency)}
        for precision in args.precision.split(",")
        for name in args.schedules.split(",")
    ]


def ping_pong(mesh: Any, tokens: int = 256, repeats: int = 100) -> float:
    """Median seconds of one message of a residual stream, from rank 0 to rank 1 or back."""
    import torch
    import workload

    from parallel import comm

    x_TD = torch.zeros(tokens, workload.CONFIG.hidden)
    found: list[float] = []
    for _ in range(repeats):
        comm.barrier(mesh.pp)
        started = time.perf_counter()
        for sender in (0, 1):
            if mesh.pp.rank == sender:
                comm.send(x_TD, mesh.pp, 1 - sender)
            else:
                comm.receive_(x_TD, mesh.pp, 1 - mesh.pp.rank)
        found.append((time.perf_counter() - started) / 2)
    return max(comm.gather_json(median(found), mesh.pp))


def one(args: argparse.Namespace, mesh: Any, schedule: str, precision: str, latency: float) -> dict[str, Any]:
    """Measure the steps of a schedule, and simulate it."""
    import pipeline_model
    import workload

    from parallel.models.build import Build
    from parallel.models.decoder import build_model
    from parallel.models.pipelined import PipelinedModel
    from parallel.pp import simulate
    from parallel.pp.measured import measured_costs

    options = pipeline_model.options(schedule)
    cuts = pipeline_model.cuts(options, args.layers, mesh.pp.rank)
    build = Build(mesh=mesh, dtype=workload.DTYPES[precision], cuts=cuts)
    stages = PipelinedModel(build_model(workload.config(args.layers), build, workload.WEIGHT_SEED), mesh, options)
    batches = pipeline_model.microbatches()
    scale = 1 / sum(len(batch) - 1 for batch in batches)
    timelines = []
    for turn in range(args.warmup + args.steps):
        stages.train(batches, lambda last, of, whole: None, trace=True, scale=scale)
        timeline = stages.timeline()
        timelines += [timeline] if turn >= args.warmup else []
    costs = measured_costs(*timelines[::2], latency=latency)
    plan = simulate(stages.table(len(batches)), costs)
    return {
        "costs": costs.compute,
        "steps": [timeline.step for timeline in timelines],
        "measured": median(timeline.step for timeline in timelines[1::2]),
        "simulated": plan.step,
        "measured_bubble": median(timeline.bubble_fraction for timeline in timelines[1::2]),
        "simulated_bubble": plan.bubble_fraction,
    }


def main() -> int:
    """Measure, print."""
    assert __doc__ is not None
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--schedules", default=",".join(SCHEDULES), help="to measure")
    parser.add_argument("--steps", type=int, default=12, help="measured steps, at least 2")
    parser.add_argument("--warmup", type=int, default=2, help="steps before them")
    parser.add_argument("--precision", default="fp32", help="fp32, bf16 or both")
    parser.add_argument("--layers", type=int, default=8, help="of the model")
    add_rank_options(parser)
    add_report_options(parser)
    args = parser.parse_args()
    if args.steps < 2:
        parser.error("--steps: there must be an even and an odd one")
    rows = on_ranks(args, 2, lambda: measure(args))
    cells = [
        (
            f"{row['schedule']} {row['precision']}",
            f"{row['measured'] * 1e3:.0f}",
            f"{row['simulated'] * 1e3:.0f}",
            f"{row['measured'] / row['simulated']:.3f}",
            f"{row['measured_bubble']:.1%}",
            f"{row['simulated_bubble']:.1%}",
        )
        for row in rows
    ]
    print(f"latency of a message: {rows[0]['latency'] * 1e3:.2f} ms\n")
    print(table(("schedule", "measured ms", "simulated ms", "ratio", "bubble", "simulated"), cells))
    claims = []
    for row in rows:
        ratio = row["measured"] / row["simulated"]
        text = f"measured step / simulated step, {row['schedule']} {row['precision']}"
        claims.append(Claim(text, ratio, f"1 +- {TOLERANCE}", abs(ratio - 1) <= TOLERANCE))
    return finish(args, claims, rows)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except contest.ContestError as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit(130)
