"""The registry of schedules, and how one is made from its name or its file."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from parallel.errors import ConfigError, ScheduleError, refuse
from parallel.pp.schedule import Schedule, parse_schedule
from parallel.pp.validate import validate
from parallel.registry import Registry

__all__ = ["SCHEDULES", "Maker", "make_schedule"]

Maker = Callable[[int, int, int], Schedule]
"""(ranks, microbatches, stages a rank) -> a valid schedule.

Raises ConfigError where there is none, naming the nearest combination that works.
"""

SCHEDULES: Registry[Maker] = Registry(
    "pipeline schedule",
    {
        "gpipe": "parallel.pp.schedules.gpipe:make",
        "1f1b": "parallel.pp.schedules.one_f_one_b:make",
        "interleaved": "parallel.pp.schedules.interleaved:make",
        "zb-h1": "parallel.pp.schedules.zb_h1:make",
        "zb-h2": "parallel.pp.schedules.zb_h2:make",
        "zb-v": "parallel.pp.schedules.zb_v:make",
        "v-half": "parallel.pp.schedules.v_half:make",
        "v-min": "parallel.pp.schedules.v_min:make",
        "dualpipe": "parallel.pp.schedules.dualpipe:make",
        "dualpipev": "parallel.pp.schedules.dualpipev:make",
        "forward": "parallel.pp.schedules.forward:make",
        "auto": "parallel.pp.schedules.auto:make",
    },
)


def make_schedule(name: str, ranks: int, microbatches: int, virtual: int = 1) -> Schedule:
    """The schedule of a registered name, or of a file (``x.txt``), validated.

    Args:
        name: one of :data:`SCHEDULES`, or the path of a file in the form of :func:`parse_schedule`.
        ranks: of the pipeline.
        microbatches: of a step.
        virtual: stages a rank, where the schedule leaves that open.

    Raises:
        ConfigError: no such name, or an impossible combination.
        ScheduleError: the file holds no valid schedule.
    """
    if name not in SCHEDULES and Path(name).suffix == ".txt":
        return _from_file(Path(name), ranks, microbatches)
    counts = {"ranks": ranks, "microbatches": microbatches, "stages a rank": virtual}
    refuse(ConfigError, (f"a schedule needs at least 1 of {what}, not {n}" for what, n in counts.items() if n < 1))
    return validate(SCHEDULES[name](ranks, microbatches, virtual))


def _from_file(path: Path, ranks: int, microbatches: int) -> Schedule:
    try:
        text = path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise ScheduleError(f"{path}: {error}") from None
    try:
        schedule = validate(parse_schedule(text, path.stem))
    except ScheduleError as error:
        raise ScheduleError(f"{path}: {problem}" for problem in error.problems) from None
    if (schedule.ranks, schedule.microbatches) != (ranks, microbatches):
        raise ConfigError(
            f"{path} is for {schedule.ranks} ranks and {schedule.microbatches} microbatches, "
            f"not for {ranks} and {microbatches}"
        )
    return schedule
