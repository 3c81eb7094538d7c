"""Zero-bubble schedules against 1F1B where messages take time: measured and simulated, on two ranks.

    python benchmarks/zero_bubble.py [--delays 0,0.5,1,2 --steps 6 --json FILE]

The model is equal transformer blocks without embedding and head, cut into equal stages on 2 gloo ranks, with the sum of
squares of the residual stream as its loss. Every message leaves later by a delay, given in times of one F of 1F1B. All
schedules step in turn. ``auto`` is the search, given the measured times of F, I, W and B, the delay, and the memory of
ZB-H2. Each schedule is also simulated, with its own measured times and the delay.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from statistics import median
from typing import Any

import contest
from on_ranks import add_rank_options, on_ranks
from report import Claim, add_report_options, finish, table

SCHEDULES = ("1f1b", "zb-h1", "zb-h2", "zb-v", "dualpipev", "auto")
BASE = "1f1b"
RANKS = 2


class Blocks:
    """Equal blocks, run by any schedule with any delay: one model for each way to place its stages.

    Args:
        mesh: of the pipeline.
        layers: blocks in all.
        tokens: of a microbatch.
        microbatches: of a step.
    """

    def __init__(self, mesh: Any, layers: int, tokens: int, microbatches: int) -> None:
        import torch
        import workload

        self.mesh, self.layers = mesh, layers
        self.batches = [workload.batch(row) for row in workload.documents(microbatches, tokens).split(1)]
        # Leaves that ask for a gradient: I of the first stage is as much work as that of any other.
        shape = (tokens, workload.CONFIG.hidden)
        self.inputs = [torch.randn(shape, requires_grad=True) for _ in self.batches]
        self._built: dict[tuple[int, ...], Any] = {}

    def _model(self, stages: int, held: Sequence[int]) -> tuple[Any, dict[int, Any]]:
        """A model without ends, and its cuts: those of a model with two more stages, which hold no block."""
        import workload

        from parallel.models.build import Build
        from parallel.models.decoder import build_model
        from parallel.pp import partition

        key = (stages, *held)
        if key not in self._built:
            whole = partition(self.layers, stages + 2, (0, *[self.layers // stages] * stages, 0))
            cuts = {stage: whole[stage + 1] for stage in held}
            build = Build(mesh=self.mesh, cuts=tuple(cuts.values()))
            self._built[key] = build_model(workload.config(self.layers), build, workload.WEIGHT_SEED), cuts
        return self._built[key]

    def pipeline(self, schedule: Any, delay_s: float) -> Any:
        """An executor of the stages of a schedule; every rank makes one."""
        from parallel.pp.run import Pipeline

        model, cuts = self._model(schedule.stages, schedule.stages_of(self.mesh.pp.rank))
        last, shape = schedule.stages - 1, self.inputs[0].shape

        def forward(stage: int, x_TD: Any, index: int) -> Any:
            y_TD = model.hidden(self.batches[index], self.inputs[index] if x_TD is None else x_TD, cuts[stage])
            return y_TD.square().sum() if stage == last else y_TD

        return Pipeline(self.mesh, forward, lambda stage, index: shape, deferral=model.deferral, delay_s=delay_s)


def measure(args: argparse.Namespace) -> list[dict[str, Any]]:
    """On a rank: one row for each delay and schedule."""
    import pipeline_model
    from plan import ping_pong

    from parallel.mesh import Layout, Mesh
    from parallel.pp import make_schedule
    from parallel.pp.measured import measured_costs

    mesh = Mesh.build(Layout(pp=RANKS))
    blocks = Blocks(mesh, args.layers, args.tokens, pipeline_model.MICROBATCHES)
    latency = ping_pong(mesh, args.tokens)
    fixed = {n: make_schedule(n, RANKS, len(blocks.batches)) for n in (*args.names, BASE, "zb-h1") if n != "auto"}
    first = in_turn(args, blocks, {name: fixed[name] for name in (BASE, "zb-h1")}, 0.0)
    whole, split = (measured_costs(*first[name]).compute for name in (BASE, "zb-h1"))
    unit = median([*whole["F"], *split["F"]])
    costs = {"F": split["F"], "I": split["I"], "W": split["W"], "B": whole["B"]}
    rows: list[dict[str, Any]] = []
    for delay in args.delay_list:
        wait = latency + delay * unit
        chosen = {name: fixed[name] if name != "auto" else searched(args, costs, wait) for name in args.names}
        for name, timelines in in_turn(args, blocks, chosen, delay * unit).items():
            row = {"schedule": name, "delay": delay, "F": unit, "name": chosen[name].name}
            rows.append(row | result(chosen[name], timelines, wait))
    return rows


def searched(args: argparse.Namespace, costs: dict[str, Any], latency: float) -> Any:
    """The schedule that the search finds with the memory of ZB-H2."""
    import pipeline_model

    from parallel.pp import Costs
    from parallel.pp.schedules.auto import search

    given = Costs(compute=costs, latency=latency, kept=1.0)
    virtuals = (1, 2) if args.layers % (2 * RANKS) == 0 else (1,)
    return search(RANKS, pipeline_model.MICROBATCHES, given, 2.0 * RANKS - 1, virtuals=virtuals)


def in_turn(args: argparse.Namespace, blocks: Blocks, schedules: dict[str, Any], delay_s: float) -> dict[str, Any]:
    """The timelines of every schedule, which step one after the other."""
    pipelines = {name: blocks.pipeline(schedule, delay_s) for name, schedule in schedules.items()}
    found: dict[str, list[Any]] = {name: [] for name in schedules}
    for turn in range(args.warmup + args.steps):
        for name, pipeline in pipelines.items():
            pipeline.run(schedules[name], range(len(blocks.batches)), trace=True)
            timeline = pipeline.timeline()
            found[name] += [timeline] if turn >= args.warmup else []
    return found


def result(schedule: Any, timelines: list[Any], latency: float) -> dict[str, Any]:
    """Measured and simulated."""
    from parallel.pp import simulate
    from parallel.pp.measured import measured_costs

    costs = replace(measured_costs(*timelines, latency=latency), kept=1.0)
    plan = simulate(schedule, costs)
    return {
        "steps": [timeline.step for timeline in timelines],
        "measured": median(timeline.step for timeline in timelines),
        "simulated": plan.step,
        "bubble": median(timeline.bubble_fraction for timeline in timelines),
        "peak": max(plan.peaks) * RANKS / schedule.stages,
    }


def claims_of(rows: list[dict[str, Any]]) -> tuple[list[tuple[str, ...]], list[Claim]]:
    """The table's rows, and one claim for each delay and way to find out."""
    cells: list[tuple[str, ...]] = []
    claims: list[Claim] = []
    for delay in dict.fromkeys(row["delay"] for row in rows):
        group = {row["schedule"]: row for row in rows if row["delay"] == delay}
        base = group[BASE]
        for name, row in group.items():
            cells.append(
                (
                    f"{delay:g} F, {name}" + (f" = {row['name']}" if name != row["name"] else ""),
                    f"{row['measured'] * 1e3:.0f}",
                    f"{row['simulated'] * 1e3:.0f}",
                    f"{row['measured'] / row['simulated']:.3f}",
                    f"{row['measured'] / base['measured']:.3f}",
                    f"{row['simulated'] / base['simulated']:.3f}",
                    f"{row['bubble']:.1%}",
                    f"{row['peak']:g}",
                )
            )
        for way in ("measured", "simulated") if delay else ():
            best = min((row for name, row in group.items() if name != BASE), key=lambda row: row[way])
            ratio = best[way] / base[way]
            text = f"best zero-bubble schedule / {BASE}, delay {delay:g} F, {way}"
            claims.append(Claim(text, ratio, "< 1", ratio < 1, best["schedule"]))
    return cells, claims


def main() -> int:
    """Measure, print."""
    assert __doc__ is not None
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--delays", default="0,0.5,1,2", help="of a message, in times of F")
    parser.add_argument("--schedules", default=",".join(SCHEDULES), help=f"to compare, {BASE} among them")
    parser.add_argument("--steps", type=int, default=6, help="measured steps of each schedule")
    parser.add_argument("--warmup", type=int, default=2, help="steps before them")
    parser.add_argument("--layers", type=int, default=4, help="blocks of the model, a multiple of 4")
    parser.add_argument("--tokens", type=int, default=256, help="of a microbatch")
    add_rank_options(parser)
    add_report_options(parser)
    args = parser.parse_args()
    args.names, args.delay_list = args.schedules.split(","), [float(delay) for delay in args.delays.split(",")]
    if BASE not in args.names or len(args.names) < 2:
        parser.error(f"--schedules: {BASE} and at least one other")
    rows = on_ranks(args, RANKS, lambda: measure(args))
    cells, claims = claims_of(rows)
    print(f"F of 1F1B: {rows[0]['F'] * 1e3:.1f} ms\n")
    header = ("delay, schedule", "measured ms", "simulated ms", "ratio", f"/ {BASE}", "simulated", "bubble", "peak")
    print(table(header, cells))
    return finish(args, claims, rows)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except contest.ContestError as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit(130)
