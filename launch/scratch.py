"""A folder for the sockets and keys of a server, which is gone when the server is, however that ends."""

from __future__ import annotations

import contextlib
import os
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

__all__ = ["scratch"]

_SWEEP = 'read -r _; exec rm -rf -- "$0"'
"""Reads until the other end of its input is closed, which the system does for a process that was killed."""


@contextlib.contextmanager
def scratch() -> Iterator[Path]:
    """A folder in the temporary directory that nobody else may enter; after SIGKILL a shell that waits removes it."""
    with tempfile.TemporaryDirectory(prefix="lockstep-") as name:
        command = ["/bin/sh", "-c", _SWEEP, name]
        quiet = subprocess.DEVNULL
        with subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=quiet,
            stderr=quiet,
            cwd="/",
            env={"PATH": os.defpath},
            start_new_session=True,
        ):
            yield Path(name)
