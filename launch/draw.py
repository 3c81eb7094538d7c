"""``draw SCHEDULE``: what a pipeline schedule does when, in the terminal or in a file."""

from __future__ import annotations

import itertools
import math
import os
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from launch.cli import command_line, help_text, positionals
from parallel.config import option, options, resolve
from parallel.errors import ConfigError, ScheduleError
from parallel.pp.draw import draw, grid, path_problems, summary
from parallel.pp.schedule import Schedule, parse_schedule
from parallel.pp.schedules import SCHEDULES, make_schedule
from parallel.pp.simulate import parse_costs, simulate

__all__ = ["DrawConfig", "main"]

USAGE = "lockstep draw SCHEDULE [--OPTION VALUE ...]"
_RANKS, _MICROBATCHES = 4, 8


@dataclass(frozen=True, slots=True, kw_only=True)
class DrawConfig:
    """What to draw, and where."""

    stages: int | None = option(None, f"ranks of the pipeline; none: {_RANKS}, of a file: as many as it has")
    microbatches: int | None = option(None, f"of a step; none: {_MICROBATCHES}, of a file: as many as it has")
    virtual: int | None = option(None, "stages a rank; none: as the schedule has it")
    costs: str = option("", "F=1,I=1,W=1,latency=0.2 (the default: 1, 1, 1, 0; B = I + W); for each stage: F=1:1:2:1")
    out: str = option("", "file: x.txt (a schedule that can be read back), x.svg, x.png, x.json (Perfetto)")

    def problems(self) -> list[str]:
        """Why this cannot be drawn."""
        sizes = {"stages": self.stages, "microbatches": self.microbatches, "virtual": self.virtual}
        found = [
            f"{name} = {size}: must be at least 1" for name, size in sizes.items() if size is not None and size < 1
        ]
        try:
            costs = parse_costs(self.costs)
            numbers = itertools.chain(*costs.compute.values(), (costs.latency, costs.transfer, costs.kept))
            found += ["costs must be finite numbers"] * (not all(map(math.isfinite, numbers)))
        except ConfigError as error:
            found += [f"costs: {problem}" for problem in error.problems]
        return found + (path_problems(Path(self.out)) if self.out else [])


def main(arguments: Sequence[str]) -> int:
    """Run the command; see :data:`launch.cli.USAGE`."""
    given, overrides, problems = command_line(arguments, DrawConfig())
    if "help" in overrides:
        schedules = f"SCHEDULE is a file in the schedules' text form (x.txt) or one of: {', '.join(SCHEDULES)}"
        print(help_text(f"{USAGE}\n{schedules}", options(DrawConfig())))
        return 0
    (name,) = positionals(["SCHEDULE"], given, problems)
    if name and not _is_file(name):
        try:
            SCHEDULES[name]
        except ConfigError as error:
            problems += error.problems
    config = resolve(DrawConfig(), overrides, extra=problems)
    timeline = simulate(_schedule(name, config), parse_costs(config.costs))
    if config.out:
        draw(timeline, Path(config.out))
        print(f"{summary(timeline)}\n{config.out}: written")
        return 0
    terminal = sys.stdout.isatty()
    width = shutil.get_terminal_size().columns if terminal else None
    colour = terminal and "NO_COLOR" not in os.environ and os.environ.get("TERM") != "dumb"
    print(f"{grid(timeline, colour, width)}\n\n{summary(timeline)}")
    return 0


def _is_file(name: str) -> bool:
    return name not in SCHEDULES and Path(name).suffix == ".txt"


def _schedule(name: str, config: DrawConfig) -> Schedule:
    """The schedule that the options ask for.

    Raises:
        ConfigError: there is none, or it has another number of stages a rank.
        ScheduleError: the file holds no valid schedule.
    """
    ranks, microbatches = _RANKS, _MICROBATCHES
    if _is_file(name):
        ranks, microbatches = _sizes(Path(name))
    ranks, microbatches = config.stages or ranks, config.microbatches or microbatches
    schedule = make_schedule(name, ranks, microbatches, config.virtual or 1)
    most = max(len(schedule.stages_of(rank)) for rank in range(schedule.ranks))
    if config.virtual is not None and config.virtual != most:
        raise ConfigError(f"virtual = {config.virtual}: {name} has {most} stage{'s' * (most > 1)} a rank")
    return schedule


def _sizes(path: Path) -> tuple[int, int]:
    """Ranks and microbatches of a schedule file; 1 and 1 of one that :func:`make_schedule` will refuse."""
    try:
        schedule = parse_schedule(path.read_text())
    except (OSError, UnicodeDecodeError, ScheduleError):
        return 1, 1
    return schedule.ranks, schedule.microbatches
