"""A picture in a file; the suffix says which form."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable
from pathlib import Path

from parallel.errors import ConfigError, refuse
from parallel.pp.timeline import Timeline
from parallel.registry import Registry

__all__ = ["FORMS", "Form", "draw", "path_problems"]

Form = Callable[[Timeline], bytes]
"""A timeline -> the file that shows it."""

FORMS: Registry[Form] = Registry(
    "form of picture",
    {
        ".txt": "parallel.pp.draw.text:document",
        ".svg": "parallel.pp.draw.svg:render",
        ".png": "parallel.pp.draw.png:render",
        ".json": "parallel.pp.draw.perfetto:render",
    },
)


def draw(timeline: Timeline, path: Path) -> None:
    """Write the picture of a timeline.

    ``.txt`` holds the grid as comments and below it the schedule, so that it can be edited and read back; ``.svg`` and
    ``.png`` a picture to scale; ``.json`` a trace that Perfetto and Chrome open.

    Args:
        timeline: what every rank did when, simulated or measured.
        path: of the file; one that is there is replaced.

    Raises:
        ConfigError: what :func:`path_problems` finds, or the file cannot be written.
    """
    refuse(ConfigError, path_problems(path))
    content = FORMS[path.suffix](timeline)
    try:
        path.write_bytes(content)
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror or error}") from None


def path_problems(path: Path) -> list[str]:
    """Why no picture can be written to ``path``, as far as can be said before there is one."""
    problems = []
    try:
        if path.suffix not in FORMS:
            FORMS[path.suffix]
    except ConfigError as error:
        problems += [f"{path}: {problem}" for problem in error.problems]
    if path.suffix == ".png" and importlib.util.find_spec("matplotlib") is None:
        problems.append(f"{path}: PNG pictures need matplotlib (pip install matplotlib); .svg needs nothing")
    if not path.parent.is_dir():
        problems.append(f"{path}: there is no folder {path.parent}")
    elif path.is_dir():
        problems.append(f"{path}: is a folder")
    elif not os.access(path if path.exists() else path.parent, os.W_OK):
        problems.append(f"{path}: may not be written")
    return problems
