"""A run folder: the effective configuration, the metrics and the checkpoints of one run, held by one process."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import IO, Any

from parallel.config import read_toml
from parallel.errors import RunFolderError, refuse

__all__ = ["RunFolder"]


class RunFolder:
    """``config.toml``, ``metrics.jsonl``, ``checkpoints/`` and a lock.

    Args:
        path: the folder; it need not exist.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config = path / "config.toml"
        self.metrics = path / "metrics.jsonl"
        self.checkpoints = path / "checkpoints"
        self._lock: IO[str] | None = None

    def hold(self) -> None:
        """Create the folder and keep others out until this process ends or :meth:`release`.

        Raises:
            RunFolderError: another process holds it, or it cannot be written.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            lock = (self.path / "lock").open("a+")
        except OSError as error:
            raise RunFolderError(f"{self.path}: cannot be written ({error.strerror})") from None
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            lock.seek(0)
            holder = lock.read().strip() or "unknown"
            lock.close()
            raise RunFolderError(f"{self.path}: another run holds this folder (process {holder})") from None
        lock.truncate(0)
        lock.write(f"{os.getpid()}\n")
        lock.flush()
        self._lock = lock

    def release(self) -> None:
        """Let others in."""
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    @property
    def begun(self) -> bool:
        """Whether a run has left something here that another must not continue."""
        return self.config.exists() and (self.metrics.exists() or self.checkpoints.exists())

    def check(self, table: Mapping[str, Any], free: Iterable[str]) -> None:
        """Compare a configuration with the one that the run in this folder began with, if one has begun.

        Args:
            table: the configuration as nested values.
            free: dotted options, or groups, that may change between starts of one run.

        Raises:
            RunFolderError: an option that makes another run of it has changed; all are listed.
        """
        if self.begun:
            before, after, may = _flat(read_toml(self.config)), _flat(table), tuple(free)
            changed = [
                f"{self.path}: {name} was {before.get(name, 'not set')!r}, now {after.get(name, 'not set')!r}; "
                f"give another --out, or remove the folder"
                for name in sorted(before.keys() | after.keys())
                if before.get(name) != after.get(name) and not any(name == f or name.startswith(f + ".") for f in may)
            ]
            refuse(RunFolderError, changed)

    def write_config(self, toml: str) -> None:
        """Write the effective configuration."""
        temporary = self.config.with_name(".config.tmp")
        temporary.write_text(toml)
        os.replace(temporary, self.config)


def _flat(table: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    leaves: dict[str, Any] = {}
    for key, value in table.items():
        leaves |= _flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {prefix + key: value}
    return leaves
