"""Time to make, lower, validate and simulate every pipeline schedule.

python benchmarks/schedules.py [--stages 64 --microbatches 512 --virtual 2 --names zb-v,1f1b --json FILE]
"""

from __future__ import annotations

import argparse
import sys
from itertools import pairwise
from time import process_time
from typing import Any

from report import Claim, add_report_options, finish, table

from parallel.errors import ConfigError
from parallel.pp.lower import lower
from parallel.pp.schedules import SCHEDULES
from parallel.pp.simulate import simulate
from parallel.pp.validate import validate

TARGET_SECONDS = 2.0


def measure(name: str, ranks: int, microbatches: int, virtual: int) -> dict[str, Any]:
    """Seconds of processor time of each part for one schedule."""
    times = [process_time()]
    try:
        schedule = SCHEDULES[name](ranks, microbatches, virtual)
    except ConfigError:
        schedule = SCHEDULES[name](ranks, microbatches, 1)
    times.append(process_time())
    lowered = lower(schedule)
    times.append(process_time())
    validate(lowered)
    times.append(process_time())
    simulate(lowered)
    times.append(process_time())
    make, low, valid, simulated = (end - start for start, end in pairwise(times))
    actions = sum(map(len, lowered.rows))
    return {"name": name, "actions": actions, "make": make, "lower": low, "validate": valid, "simulate": simulated}


def main() -> int:
    """Measure, print."""
    assert __doc__ is not None
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--stages", type=int, default=64, metavar="P", help="ranks of the pipeline")
    parser.add_argument("--microbatches", type=int, default=512, metavar="M")
    parser.add_argument("--virtual", type=int, default=2, metavar="V", help="stages a rank, where that is open")
    parser.add_argument("--names", default="", help="of schedules; all of them if empty")
    add_report_options(parser)
    args = parser.parse_args()
    names = args.names.split(",") if args.names else [name for name in SCHEDULES if name != "auto"]
    rows = [measure(name, args.stages, args.microbatches, args.virtual) for name in names]
    parts = ("make", "lower", "validate", "simulate")
    cells = [
        (
            row["name"],
            f"{row['actions']:,}",
            *(f"{row[part]:.2f}" for part in parts),
            f"{1e6 * (row['lower'] + row['validate']) / row['actions']:.2f}",
        )
        for row in rows
    ]
    print(f"p = {args.stages}, m = {args.microbatches}; seconds of processor time\n")
    print(table(("schedule", "actions", *parts, "us an action, lower + validate"), cells))
    worst = max(row["lower"] + row["validate"] for row in rows)
    claim = "lowering and validating, the slowest schedule, seconds"
    return finish(args, [Claim(claim, worst, f"< {TARGET_SECONDS:g}", worst < TARGET_SECONDS)], rows)


if __name__ == "__main__":
    sys.exit(main())
