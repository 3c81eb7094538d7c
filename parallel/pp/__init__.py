"""Pipeline parallelism: schedules as data, without torch; the executor is in :mod:`parallel.pp.run`."""

from __future__ import annotations

from parallel.pp.action import Action
from parallel.pp.config import PipelineConfig
from parallel.pp.lower import lower
from parallel.pp.partition import Cut, partition
from parallel.pp.schedule import Schedule, parse_schedule
from parallel.pp.schedules import SCHEDULES, make_schedule
from parallel.pp.simulate import Costs, simulate
from parallel.pp.timeline import Span, Timeline
from parallel.pp.validate import validate

__all__ = [
    "SCHEDULES",
    "Action",
    "Costs",
    "Cut",
    "PipelineConfig",
    "Schedule",
    "Span",
    "Timeline",
    "lower",
    "make_schedule",
    "parse_schedule",
    "partition",
    "simulate",
    "validate",
]
