"""Faults on purpose: ``kill@1,3,save.fsync`` ends rank 1 in step 3 where a checkpoint is about to be made durable.

For tests of what a run survives. The points stand in the code as ``faults.at("save.fsync")``, which does nothing
unless the injector that was passed down holds a fault for that rank, step and point.
"""

from __future__ import annotations

import errno
import os
import signal
import time
from collections.abc import Container, Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from parallel.errors import ConfigError, nearest, refuse

__all__ = ["KINDS", "POINTS", "Fault", "InjectedFault", "Injector", "fault_problems"]

KINDS = {
    "kill": "SIGKILL to this process",
    "stop": "SIGSTOP to this process",
    "exit": "leave at once with code 70, nothing cleaned up",
    "raise": "an InjectedFault",
    "enospc": "no space left on the device",
    "eio": "an input/output error",
    "erofs": "a read-only file system",
    "oom": "out of memory",
    "nan": "the first gradient is not a number (at step.backward)",
    "inf": "the first gradient is infinite (at step.backward)",
    "spike": "loss and gradients of this rank are ten times as large (at step.forward)",
    "slow": "from this step on every step takes three times as long (at step.backward or step.update)",
}
"""What each does; ``nan``, ``inf`` and ``spike`` strike once, also where the step is made again."""
POINTS = (
    "step.data",
    "step.forward",
    "step.backward",
    "step.update",
    "save.begin",
    "save.write",
    "save.fsync",
    "save.manifest",
    "save.manifest.fsync",
    "save.folder.fsync",
    "save.displace",
    "save.rename",
    "save.rename.fsync",
    "save.pointer",
    "save.pointer.fsync",
    "save.pointer.rename",
    "save.pointer.folder",
    "save.prune",
    "save.prune.remove",
    "save.end",
)
"""In the order in which a step passes them; each stands before what it is named after."""

_ERRNO = {"enospc": errno.ENOSPC, "eio": errno.EIO, "erofs": errno.EROFS}
_SPOILED = {"nan": float("nan"), "inf": float("inf")}
_PLACES = {
    "nan": ("step.backward",),
    "inf": ("step.backward",),
    "spike": ("step.forward",),
    "slow": ("step.backward", "step.update"),
}
_SPIKE = 10.0
_ONCE = (*_SPOILED, "spike")
_LASTING = ("slow",)
EXIT_CODE = 70


class InjectedFault(Exception):
    """What the kind ``raise`` raises."""


@dataclass(frozen=True, slots=True)
class Fault:
    """One fault: what happens, to which rank, in which step (from 1), and where."""

    kind: str
    rank: int
    step: int
    point: str

    @staticmethod
    def parse(text: str) -> Fault:
        """``kind@rank,step,point``.

        Raises:
            ConfigError: it is not of that form, or kind or point are unknown.
        """
        kind, _, rest = text.strip().partition("@")
        fields = [field.strip() for field in rest.split(",")]
        problems: list[str] = []
        if len(fields) != 3 or not all(field.isdecimal() for field in fields[:2]):
            raise ConfigError(f"fault {text!r}: must be kind@rank,step,point")
        if kind not in KINDS:
            problems.append(f"fault {text!r}: unknown kind{nearest(kind, KINDS)}; there are {', '.join(KINDS)}")
        if fields[2] not in POINTS:
            near = nearest(fields[2], POINTS)
            problems.append(f"fault {text!r}: unknown point{near}; there are {', '.join(POINTS)}")
        elif fields[2] not in _PLACES.get(kind, POINTS):
            problems.append(f"fault {text!r}: {kind} strikes at {' or '.join(_PLACES[kind])}")
        refuse(ConfigError, problems)
        return Fault(kind, int(fields[0]), int(fields[1]), fields[2])


def fault_problems(text: str) -> Iterator[str]:
    """Why ``text`` is not a list of faults, separated by semicolons."""
    for part in filter(None, text.split(";")):
        try:
            Fault.parse(part)
        except ConfigError as error:
            yield from error.problems


class Injector:
    """The faults of one rank; without any, it does nothing.

    Args:
        text: faults separated by semicolons.
        rank: of this process.

    Raises:
        ConfigError: ``text`` is not a list of faults.
    """

    def __init__(self, text: str = "", rank: int = 0) -> None:
        refuse(ConfigError, fault_problems(text))
        faults = [Fault.parse(part) for part in text.split(";") if part]
        self.faults = [fault for fault in faults if fault.rank == rank]
        self.step = 0
        self._struck: set[Fault] = set()
        self._began = time.monotonic()

    def begin(self, step: int) -> None:
        """A step begins; ``step`` counts from 1."""
        self.step, self._began = step, time.monotonic()

    def at(self, point: str, step: int | None = None) -> None:
        """Do what is due here.

        Args:
            point: one of :data:`POINTS`.
            step: that the work belongs to, where it is not the one that has begun.

        Raises:
            InjectedFault, OSError, torch.OutOfMemoryError: if that is due.
        """
        for fault in self._due(point, self.step if step is None else step):
            self._strike(fault)

    @property
    def spoils(self) -> bool:
        """Whether any gradient is to be made worthless."""
        return any(fault.kind in _SPOILED for fault in self.faults)

    def spoil(self, point: str, gradients: Iterable[Tensor]) -> None:
        """Make the first value of the first of ``gradients`` that has any NaN or infinite, if that is due here."""
        first = next((gradient for gradient in gradients if gradient.numel()), None)
        if first is not None:
            for fault in self._due(point, self.step, _SPOILED):
                with torch.no_grad():
                    first.reshape(-1)[:1].fill_(_SPOILED[fault.kind])

    def factor(self, point: str) -> float:
        """By what to multiply the loss of this rank."""
        return _SPIKE if self._due(point, self.step, ("spike",)) else 1.0

    def _due(self, point: str, step: int, kinds: Container[str] | None = None) -> list[Fault]:
        """The faults that strike here and now, of ``kinds``; None: of those that :meth:`at` is for."""
        if not self.faults:
            return []
        due = [
            fault
            for fault in self.faults
            if fault.point == point
            and (fault.step == step or (fault.kind in _LASTING and step > fault.step))
            and (fault.kind not in _ONCE if kinds is None else fault.kind in kinds)
            and fault not in self._struck
        ]
        self._struck.update(fault for fault in due if fault.kind in _ONCE)
        return due

    def _strike(self, fault: Fault) -> None:
        if fault.kind in ("kill", "stop"):
            os.kill(os.getpid(), signal.SIGKILL if fault.kind == "kill" else signal.SIGSTOP)
        elif fault.kind == "exit":
            os._exit(EXIT_CODE)
        elif fault.kind == "oom":
            raise torch.OutOfMemoryError(f"injected at {fault.point} of step {fault.step}")
        elif fault.kind == "raise":
            raise InjectedFault(f"injected at {fault.point} of step {fault.step}")
        elif fault.kind in _ERRNO:
            number = _ERRNO[fault.kind]
            raise OSError(number, f"{os.strerror(number)} (injected at {fault.point} of step {fault.step})")
        elif fault.kind == "slow":
            time.sleep(2 * (time.monotonic() - self._began))
