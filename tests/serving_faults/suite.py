"""Cases, how they are registered and judged; without ``assert``, as the suite also runs under ``python -O``."""

from __future__ import annotations

import re
import traceback
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

__all__ = ["CASES", "Case", "Failed", "Lost", "NotRun", "Outcome", "Seen", "case", "must"]


class Failed(Exception):
    """A fault was not survived."""


class Lost(Failed):
    """The fault was survived, and something was lost by it."""


class NotRun(Exception):
    """What a case is about is not there yet."""


def must(condition: object, message: str) -> None:
    """Fail unless it holds."""
    if not condition:
        raise Failed(message)


@dataclass
class Seen:
    """What a case has seen.

    Attributes:
        notes: for its line.
        detect_s, recover_s: from the fault until it was seen, and until all was well again.
        inputs: bad ones that were tried.
        bodies: answers of the server that were errors.
    """

    notes: list[str] = field(default_factory=list)
    detect_s: float | None = None
    recover_s: float | None = None
    inputs: int = 0
    bodies: set[str] = field(default_factory=set)

    def note(self, text: str) -> None:
        self.notes.append(text)

    def detected(self, seconds: float, most: float, what: str) -> None:
        """A fault was seen after so long; fail if that is too long."""
        self.detect_s = max(self.detect_s or 0.0, seconds)
        must(seconds <= most, f"{what} after {seconds:.2f} s, allowed are {most:g} s")

    def recovered(self, seconds: float, most: float, what: str) -> None:
        """All was well again after so long; fail if that is too long."""
        self.recover_s = max(self.recover_s or 0.0, seconds)
        must(seconds <= most, f"{what} after {seconds:.2f} s, allowed are {most:g} s")


@dataclass(frozen=True)
class Case:
    """A fault: its name, what drives it, whether it is in the short form, and whether it is about security."""

    name: str
    drive: Callable[..., None]
    short: bool
    secure: bool

    @property
    def number(self) -> str:
        return self.name.split()[0]


@dataclass
class Outcome:
    """How a case went."""

    case: Case
    seconds: float
    seen: Seen
    verdict: str
    problem: str = ""
    lost: bool = False

    def row(self) -> str:
        """One line."""
        shown = "; ".join(self.seen.notes)
        return f"{self.verdict:<7} {self.case.name:<58} {self.seconds:6.1f} s  {shown}".rstrip()


CASES: list[Case] = []
_LAST = ("S22", "S34", "S36", "S39")
"""They look at what the others have left behind."""


def case(name: str, *, short: bool = True, secure: bool = False) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Register ``function(stage, seen)`` as a case; it is survived if it returns.

    Args:
        name: begins with the number of the fault.
        short: it is in the short form of the suite.
        secure: it is run under ``python -O`` as well.
    """

    def register(function: Callable[..., Any]) -> Callable[..., Any]:
        CASES.append(Case(name, function, short, secure))
        return function

    return register


def reason(error: BaseException) -> str:
    """Why a case failed."""
    if isinstance(error, Failed):
        where = traceback.extract_tb(error.__traceback__)
        places = [f"{frame.name}:{frame.lineno}" for frame in where if "serving_faults" in frame.filename]
        return f"{error} ({' > '.join(places[-4:])})"
    return "".join(traceback.format_exception(error))


def chosen(words: Iterable[str], *, short: bool) -> list[Case]:
    """The cases of these numbers (none: all, or those of the short form)."""
    wanted = {word.upper() for word in words}
    found = [one for one in CASES if one.number.upper() in wanted or (not wanted and (one.short or not short))]
    return sorted(
        found,
        key=lambda one: (one.number in _LAST, one.number[0] != "S", int(re.sub(r"\D", "", one.number)), one.number),
    )
