"""Stage 3 of ZeRO over a slow link: time that a step waits for parameters, with prefetch against without.

    python benchmarks/gathers.py [--delays 0.5,1,2 --ahead 0,1,2 --steps 8 --json FILE]

The 32M-parameter Llama trains on 2 gloo ranks. What a gathering brings is there no sooner than a delay after it was
begun; delays are given in times of one block's forward (a third of a step without delay, over the blocks). Exposed is
what the host waits for gatherings in a step; with nothing gathered ahead (``ahead`` 0) that is all of them. The model
steps with each setting in turn; beside a delay of 0 stands what the machine itself takes.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from statistics import median
from typing import Any

import contest
from on_ranks import add_rank_options, on_ranks
from report import Claim, add_report_options, finish, table

RANKS = 2
TOKENS = 1024
TARGET = 0.5
"""Of the exposed time without prefetch, where one block computes as long as a gathering takes."""


class Link:
    """Makes every gathering arrive late, and measures how long it is waited for.

    Attributes:
        delay_s: from the beginning of a gathering to its arrival.
        waited_s: so far.
    """

    def __init__(self) -> None:
        self.delay_s = self.waited_s = 0.0

    def attach(self) -> None:
        """From here on every bucket's gatherings go over this link."""
        from zero.bucket import Bucket

        gather = Bucket.gather

        def slowly(bucket: Any) -> None:
            before = bucket._gathering
            gather(bucket)
            if bucket._gathering is not before:
                bucket._gathering = Late(bucket._gathering, time.perf_counter() + self.delay_s, self)

        Bucket.gather = slowly


class Late:
    """A message under way that is there when it has arrived, and no sooner than it is due."""

    def __init__(self, arrival: Any, due: float, link: Link) -> None:
        self.arrival, self.due, self.link = arrival, due, link

    def there(self, seconds: float) -> bool:
        """Whether it is, within so many seconds."""
        began = time.perf_counter()
        arrived = self.arrival.there(seconds)
        time.sleep(max(0.0, min(self.due, began + seconds) - time.perf_counter()))
        now = time.perf_counter()
        self.link.waited_s += now - began
        return arrived and now >= self.due

    def wait(self) -> Any:
        """What arrived."""
        began = time.perf_counter()
        result = self.arrival.wait()
        time.sleep(max(0.0, self.due - time.perf_counter()))
        self.link.waited_s += time.perf_counter() - began
        return result


def trainers(args: argparse.Namespace) -> dict[int, Any]:
    """The same training with every number of blocks that are gathered ahead."""
    import workload

    from parallel.mesh import Mesh
    from parallel.models.build import Build
    from parallel.models.decoder import build_model
    from zero import Trainer, ZeroConfig, ZeroOptimizer

    found, mesh = {}, Mesh.build()
    for ahead in args.ahead_list:
        build = Build(mesh=mesh, dtype=workload.DTYPES[args.precision])
        model = build_model(workload.config(args.layers), build, workload.WEIGHT_SEED)
        optimizer = ZeroOptimizer(model, mesh, zero=ZeroConfig(stage=3, ahead=ahead))
        found[ahead] = Trainer(model, optimizer, mesh, steps=1000)
    return found


def measure(args: argparse.Namespace) -> list[dict[str, Any]]:
    """On a rank: one row for each delay and setting."""
    import workload

    link, rows = Link(), []
    link.attach()
    contenders = trainers(args)
    rank = next(iter(contenders.values())).mesh.rank
    batch = workload.batch(workload.documents(RANKS * TOKENS // 256).chunk(RANKS)[rank])
    unit = 0.0
    for delay in (0.0, *args.delay_list):
        link.delay_s = delay * unit
        found = in_turn(args, link, contenders, batch)
        for ahead, (steps, exposed) in found.items():
            row = {"delay": delay, "ahead": ahead, "steps": steps, "step": median(steps), "exposed": median(exposed)}
            rows.append(row)
        unit = unit or min(row["step"] for row in rows) / 3 / args.layers
    return [row | {"unit": unit} for row in rows]


def in_turn(
    args: argparse.Namespace, link: Link, contenders: dict[int, Any], batch: Any
) -> dict[int, tuple[list[float], list[float]]]:
    """Seconds of every step, and of them those that were waited for gatherings."""
    found: dict[int, tuple[list[float], list[float]]] = {ahead: ([], []) for ahead in contenders}
    for turn in range(args.warmup + args.steps):
        for ahead, trainer in contenders.items():
            link.waited_s = 0.0
            seconds = trainer.step([batch]).seconds
            if turn >= args.warmup:
                found[ahead][0].append(seconds)
                found[ahead][1].append(link.waited_s)
    return found


def claims_of(rows: Sequence[dict[str, Any]]) -> list[Claim]:
    """For each delay: the exposed time with prefetch over that without."""
    claims = []
    for delay in dict.fromkeys(row["delay"] for row in rows if row["delay"]):
        group = {row["ahead"]: row for row in rows if row["delay"] == delay}
        for ahead, row in group.items():
            if ahead == 0:
                continue
            ratio = row["exposed"] / group[0]["exposed"]
            limit = TARGET if delay <= ahead else 1.0
            note = f"{row['exposed'] * 1e3:.0f} ms of {group[0]['exposed'] * 1e3:.0f} ms"
            text = f"exposed gather time, ahead {ahead} / none, delay {delay:g} F"
            claims.append(Claim(text, ratio, f"<= {limit:g}", ratio <= limit, note))
    return claims


def main() -> int:
    """Measure, print."""
    assert __doc__ is not None
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--delays", default="0.5,1,2", help="of a gathering, in times of one block's forward")
    parser.add_argument("--ahead", default="0,1,2", help="blocks gathered ahead, 0 among them")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32", help="of the weights")
    parser.add_argument("--steps", type=int, default=8, help="measured steps of each setting and delay")
    parser.add_argument("--warmup", type=int, default=2, help="steps before them")
    parser.add_argument("--layers", type=int, default=8, help="blocks of the model")
    add_rank_options(parser)
    add_report_options(parser)
    args = parser.parse_args()
    args.delay_list = [float(delay) for delay in args.delays.split(",")]
    args.ahead_list = [int(ahead) for ahead in args.ahead.split(",")]
    if 0 not in args.ahead_list or len(args.ahead_list) < 2:
        parser.error("--ahead: 0 and at least one other")
    rows = on_ranks(args, RANKS, lambda: measure(args))
    cells = []
    for row in rows:
        base = next(r for r in rows if r["delay"] == row["delay"] and r["ahead"] == 0)
        name = f"{row['delay']:g} F, ahead {row['ahead']}"
        times = (f"{row[what] * 1e3:.0f}" for what in ("step", "exposed"))
        ratios = (f"{row[what] / base[what]:.3f}" for what in ("step", "exposed"))
        cells.append((name, *times, *ratios))
    print(f"F, the forward of one block: {rows[0]['unit'] * 1e3:.1f} ms\n")
    print(table(("delay, prefetch", "step ms", "exposed ms", "step / ahead 0", "exposed / ahead 0"), cells))
    return finish(args, claims_of(rows), rows)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except contest.ContestError as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit(130)
