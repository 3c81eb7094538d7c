"""How a checkpoint comes to be: written beside, made durable, named, pointed to; only then older ones go.

::

    DRAFT    .step-00000100.tmp, files being written       -> NAMED, ABANDONED
    NAMED    step-00000100, durable; latest is older       -> LATEST, ABANDONED
    LATEST   ``latest`` names it, durably                  -> DONE
    DONE     older ones beyond ``keep`` have no name of a checkpoint
    ABANDONED  the draft is gone, ``latest`` is as it was

Whatever kills the process, and wherever, ``latest`` names a whole checkpoint; the leftovers of a dead process
(``.step-*``) go with the next save.
"""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
from enum import Enum
from pathlib import Path

from parallel.errors import CheckpointError
from zero.checkpoint.writer import write_durably
from zero.faults import Injector

__all__ = ["MOVES", "Publication", "State", "latest", "name_of"]


class State(Enum):
    """Where the publication of a checkpoint stands."""

    DRAFT = "draft"
    NAMED = "named"
    LATEST = "latest"
    DONE = "done"
    ABANDONED = "abandoned"


MOVES = {
    State.DRAFT: (State.NAMED, State.ABANDONED),
    State.NAMED: (State.LATEST, State.ABANDONED),
    State.LATEST: (State.DONE,),
    State.DONE: (),
    State.ABANDONED: (),
}
"""The legal moves."""


def name_of(step: int) -> str:
    """The folder of a step's checkpoint."""
    return f"step-{step:08d}"


class Publication:
    """One checkpoint on its way to ``latest``.

    Args:
        folder: of all checkpoints of a run.
        step: of this one.
        faults: for tests.
    """

    def __init__(self, folder: Path, step: int, faults: Injector) -> None:
        self.folder, self.step, self.faults = folder, step, faults
        self.final = folder / name_of(step)
        self.draft = folder / f".{self.final.name}.tmp"
        self.state = State.DRAFT
        self._gone: list[Path] = []

    def begin(self) -> None:
        """Sweep up after dead processes, and make the folder of the draft.

        Raises:
            OSError: the disk does not allow it.
        """
        self._at("save.begin")
        for leftover in (*self.folder.glob(".step-*.tmp"), *self.folder.glob(".step-*.gone")):
            shutil.rmtree(leftover, ignore_errors=True)
        self.draft.mkdir(parents=True)

    def publish(self, manifest: bytes, keep: int) -> None:
        """Complete the draft, whose other files are durable already, make it the latest, and take older ones out.

        :meth:`sweep` removes those.

        Args:
            manifest: text of ``manifest.json``.
            keep: how many checkpoints stay.

        Raises:
            OSError: the disk does not allow it; ``latest`` names a whole checkpoint all the same.
        """
        self._at("save.manifest")
        write_durably(self.draft / "manifest.json", manifest, lambda: self._at("save.manifest.fsync"))
        self._at("save.folder.fsync")
        _sync_folder(self.draft)
        self._name()
        self._point()
        self._prune(keep)
        self._at("save.end")

    def abandon(self) -> None:
        """Give up what is not published yet."""
        if State.ABANDONED in MOVES[self.state]:
            shutil.rmtree(self.draft, ignore_errors=True)
            with contextlib.suppress(OSError):
                (self.folder / ".latest.tmp").unlink(missing_ok=True)
            self._move(State.ABANDONED)

    def _name(self) -> None:
        """A checkpoint of the same step gives way; until the new one has the name, :func:`latest` knows the old one."""
        old = _displaced(self.final)
        if self.final.exists():
            self._at("save.displace")
            shutil.rmtree(old, ignore_errors=True)
            os.rename(self.final, old)
        self._at("save.rename")
        os.rename(self.draft, self.final)
        self._at("save.rename.fsync")
        _sync_folder(self.folder)
        self._move(State.NAMED)

    def _point(self) -> None:
        temporary = self.folder / ".latest.tmp"
        self._at("save.pointer")
        write_durably(temporary, f"{self.final.name}\n".encode(), lambda: self._at("save.pointer.fsync"))
        self._at("save.pointer.rename")
        os.replace(temporary, self.folder / "latest")
        self._at("save.pointer.folder")
        _sync_folder(self.folder)
        self._move(State.LATEST)

    def _prune(self, keep: int) -> None:
        """Remove all but the ``keep`` newest; those beyond this one are of a past that was left."""
        there = sorted(self.folder.glob("step-*"))
        older = [path for path in there if path.name < self.final.name]
        newer = [path for path in there if path.name > self.final.name]
        self._at("save.prune")
        self._gone += self.folder.glob(".step-*.old")
        for path in older[: max(0, len(older) - keep + 1)] + newer:
            gone = path.with_name(f".{path.name}.gone")
            os.rename(path, gone)  # at once: a folder that is half removed never bears the name of a whole one
            self._gone.append(gone)
        if self._gone:
            self._at("save.prune.remove")
        self._move(State.DONE)

    def sweep(self) -> None:
        """Remove what was taken out, for which a disk may need as long as for a good part of the save."""
        for gone in self._gone:
            shutil.rmtree(gone, ignore_errors=True)

    def _move(self, state: State) -> None:
        assert state in MOVES[self.state], f"{self.state} -> {state}"
        self.state = state

    def _at(self, point: str) -> None:
        self.faults.at(point, self.step)


def latest(folder: Path) -> Path | None:
    """The newest published checkpoint under ``folder``, or None if none was ever published.

    Raises:
        CheckpointError: the pointer cannot be read, or names one that is not there.
    """
    pointer = folder / "latest"
    try:
        name = pointer.read_text().strip()
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{pointer}: cannot be read ({error})") from None
    if not name.startswith("step-") or "/" in name:
        raise CheckpointError(f"{pointer}: names no checkpoint: {name[:80]!r}")
    for target in (folder / name, _displaced(folder / name)):
        if (target / "manifest.json").is_file():
            return target
    raise CheckpointError(f"{pointer} names {name}, which has no manifest.json")


def _displaced(final: Path) -> Path:
    return final.with_name(f".{final.name}.old")


def _sync_folder(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # some file systems cannot, and need not
            raise
    finally:
        os.close(descriptor)
