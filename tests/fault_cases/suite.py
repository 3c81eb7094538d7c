"""Cases, each in a process of its own, and what must be true behind every one of them."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

from fault_cases.processes import ended, forked

__all__ = ["CASES", "Case", "Outcome", "case", "run_cases"]

LIMIT_S = 180.0


@dataclass
class Outcome:
    """How a case went: what is wrong (empty: survived), and seconds until the fault was seen and made good."""

    problem: str = ""
    detect_s: float | None = None
    recover_s: float | None = None

    def row(self, name: str) -> str:
        """One line."""
        seconds = [
            f"{what} {s:.2f} s" for what in ("detect", "recover") if (s := getattr(self, f"{what}_s")) is not None
        ]
        return f"{'FAILED' if self.problem else 'ok':<6} {name:<58} {'  '.join(seconds)}".rstrip()


@dataclass(frozen=True)
class Case:
    """A fault: its name, what drives it, and its arguments; it is survived if ``drive`` returns."""

    name: str
    drive: Callable[..., dict[str, float] | None]
    arguments: tuple[Any, ...] = ()
    short: bool = True


CASES: list[Case] = []


def case(
    name: str, *variants: tuple[Any, ...], every: int = 1, short: bool = True
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Register a function as one case a variant; its first argument is an empty folder.

    It returns None, or seconds: ``detect`` from the fault to its being seen, ``recover`` until training went on.

    Args:
        every: of so many variants one is in the short form of the suite.
        short: whether any is.
    """

    def register(function: Callable[..., Any]) -> Callable[..., Any]:
        for number, variant in enumerate(variants or ((),)):
            words = [str(word) for word in variant if not isinstance(word, bool)] + [
                "async" for word in variant if word is True
            ]
            CASES.append(Case(" ".join([name, *words]), function, variant, short and number % every == 0))
        return function

    return register


def run_cases(cases: list[Case], show: Callable[[str, Outcome], None]) -> dict[str, Outcome]:
    """Run cases one after the other, each in a process of its own."""
    outcomes: dict[str, Outcome] = {}
    with tempfile.TemporaryDirectory(prefix="faults-") as root:
        for number, one in enumerate(cases):
            place = Path(root) / f"{number:03d}"
            place.mkdir()
            outcomes[one.name] = _run(one, place)
            show(one.name, outcomes[one.name])
            shutil.rmtree(place, ignore_errors=True)
    return outcomes


def _run(one: Case, place: Path) -> Outcome:
    output, report = place / "output", place / "report.json"
    inside = place.parent / f"case-{place.name}"
    inside.mkdir()

    def work() -> None:
        os.setsid()
        with output.open("w") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        with mock.patch("zero.trainer.measured_peak", return_value=1e9):  # a tenth of a second in every run
            report.write_text(json.dumps(one.drive(inside, *one.arguments) or {}))

    pid, problem = forked(work), ""
    try:
        code = ended(pid, LIMIT_S)
    except AssertionError as error:
        code, problem = -1, str(error)
    left = _left(pid, inside)
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(pid, signal.SIGKILL)
    for other in left:
        with contextlib.suppress(ProcessLookupError):
            os.kill(other, signal.SIGKILL)
    if code == 0 and left:
        problem = f"processes were left behind: {left}"
    if code == 0 and not problem:
        seconds = json.loads(report.read_text())
        shutil.rmtree(inside, ignore_errors=True)
        return Outcome("", seconds.get("detect"), seconds.get("recover"))
    return Outcome(f"{problem or f'exit code {code}'}\n{output.read_text()[-3000:] if output.exists() else ''}")


def _left(session: int, folder: Path) -> list[int]:
    """Processes of the case that are still there: of its session, or with its folder among their words."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError, IndexError, ValueError):
            state, _, _, own = (entry / "stat").read_text().rpartition(")")[2].split()[:4]
            words = (entry / "cmdline").read_bytes().decode(errors="replace")
            if state != "Z" and (int(own) == session or str(folder) in words):
                found.append(int(entry.name))
    return found
