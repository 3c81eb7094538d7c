"""Ranks of ``lockstep serve`` as torchrun starts them, without torchrun: on this machine or in network namespaces."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

__all__ = ["Ranks", "children", "serves", "started"]

LIMITS = ("--engine.cache.memory-gib", "0.02")


def children(pid: int) -> list[int]:
    """All processes below one."""
    found, todo = [], [pid]
    while todo:
        with contextlib.suppress(OSError):
            for task in Path(f"/proc/{todo.pop()}/task").iterdir():
                own = [int(child) for child in (task / "children").read_text().split()]
                found += own
                todo += own
    return found


def serves(pid: int) -> bool:
    """Whether a process is one of an engine."""
    with contextlib.suppress(OSError):
        return b"--channel" in Path(f"/proc/{pid}/cmdline").read_bytes()
    return False


class Ranks:
    """Processes with torchrun's variables; those of rank 0 answer clients.

    Args:
        world: how many.
        options: of each rank; a list of lists.
        prefixes: put before the command of each rank, ``ip netns exec NAME`` for one.
        host: of rank 0.
        here: ranks on each machine.
    """

    def __init__(
        self,
        options: Sequence[Sequence[str]],
        *,
        prefixes: Sequence[Sequence[str]] = (),
        host: str = "127.0.0.1",
        here: int = 0,
        environ: Sequence[dict[str, str]] = (),
    ) -> None:
        world = len(options)
        here = here or world
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        self.lines: list[str] = []
        self.processes = []
        for rank, own in enumerate(options):
            place = {"RANK": rank, "WORLD_SIZE": world, "LOCAL_RANK": rank % here, "LOCAL_WORLD_SIZE": here}
            variables = {name: str(value) for name, value in place.items()}
            variables |= {"MASTER_ADDR": host, "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
            variables |= environ[rank] if environ else {}
            command = [*(prefixes[rank] if prefixes else ()), sys.executable, "-m", "launch", "serve", *own]
            process = subprocess.Popen(
                command, stderr=subprocess.PIPE, text=True, env={**os.environ, **variables}, start_new_session=True
            )
            threading.Thread(target=self._read, args=(process,), daemon=True).start()
            self.processes.append(process)

    def _read(self, process: subprocess.Popen[str]) -> None:
        assert process.stderr is not None
        for line in process.stderr:
            self.lines.append(line)

    def awaited(self, pattern: str, seconds: float = 60.0, after: int = 0) -> re.Match[str]:
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            for line in self.lines[after:]:
                if found := re.search(pattern, line):
                    return found
            time.sleep(0.02)
        raise AssertionError(f"{pattern!r} did not come: {''.join(self.lines)}")

    def below(self, rank: int) -> list[int]:
        """The engine processes of a rank."""
        return [pid for pid in children(self.processes[rank].pid) if serves(pid)]

    def stop(self, rank: int = 0) -> list[int]:
        """SIGTERM to one rank; the exit codes of all."""
        everyone = [pid for process in self.processes for pid in children(process.pid)]
        self.processes[rank].send_signal(signal.SIGTERM)
        codes = self.codes()
        assert not [pid for pid in everyone if Path(f"/proc/{pid}").exists()], "a process is left"
        return codes

    def codes(self, seconds: float = 40.0) -> list[int]:
        """Of all ranks, once they have ended."""
        end = time.monotonic() + seconds
        return [process.wait(max(end - time.monotonic(), 0.1)) for process in self.processes]


@contextlib.contextmanager
def started(options: Sequence[Sequence[str]], **more: object) -> Iterator[Ranks]:
    """Ranks that are killed at the end, if they live then."""
    ranks = Ranks(options, **more)  # type: ignore[arg-type]
    try:
        yield ranks
    finally:
        for process in ranks.processes:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
