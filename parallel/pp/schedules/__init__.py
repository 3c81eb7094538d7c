"""Every pipeline schedule, one a file."""

from __future__ import annotations

from parallel.pp.schedules.registry import SCHEDULES, Maker, make_schedule

__all__ = ["SCHEDULES", "Maker", "make_schedule"]
