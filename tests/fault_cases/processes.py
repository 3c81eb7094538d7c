"""Processes that are forked from this one, and programs that are started as a user starts them."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any, NoReturn

import torch.distributed as dist

__all__ = ["Program", "below", "ended", "forked", "lockstep", "ran", "stopped", "timed", "told", "torchrun", "world"]

ROOT = Path(__file__).parent.parent.parent


def forked(work: Callable[[], int | None]) -> int:
    """Start ``work`` in a process; returns its id. Exit codes: what it returns, 1 if it raises."""
    sys.stdout.flush()
    sys.stderr.flush()
    if pid := os.fork():
        return pid
    return _become(work)


def _become(work: Callable[[], int | None]) -> NoReturn:
    code = 1
    try:
        code = work() or 0
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else 1
    except BaseException:  # noqa: BLE001 - there is nobody else to tell
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def ended(pid: int, limit_s: float = 30.0) -> int:
    """Wait for a process: its exit code, or minus the signal that killed it."""
    deadline = time.monotonic() + limit_s
    while time.monotonic() < deadline:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.005)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    raise AssertionError(f"a process did not end within {limit_s:g} s")


def ran(work: Callable[[], int | None]) -> int:
    """Run in a process and wait for it."""
    return ended(forked(work))


def stopped(pid: int, limit_s: float = 30.0) -> None:
    """Wait until a process, whoever's child, has stopped itself."""
    deadline = time.monotonic() + limit_s
    while time.monotonic() < deadline:
        state = _stat(pid)[0]
        if state == "T":
            return
        assert state not in ("Z", "X"), "it ended instead"
        time.sleep(0.005)
    raise AssertionError("it did not come to the point")


def told(pid: int, number: int, limit_s: float = 10.0) -> None:
    """Wait until a stopped process has got a signal, which it will see when it goes on."""
    deadline = time.monotonic() + limit_s
    while time.monotonic() < deadline:
        fields = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
        if (int(fields["SigPnd"], 16) | int(fields["ShdPnd"], 16)) >> (number - 1) & 1:
            return
        time.sleep(0.005)
    raise AssertionError(f"signal {number} did not reach process {pid}")


def world(size: int, folder: Path, work: Callable[[], Any]) -> list[int]:
    """``work`` on ranks of a gloo world; how each ended."""
    return timed(size, folder, work)[0]


def timed(size: int, folder: Path, work: Callable[[], Any]) -> tuple[list[int], float]:
    """``work`` on ranks of a gloo world; how each ended, and seconds from the first that failed to the last.

    Ranks that do not notice within five seconds that another one failed are killed.
    """
    store = folder / f"store-{time.monotonic_ns()}"

    def be(rank: int) -> int:
        dist.init_process_group(
            "gloo", init_method=f"file://{store}", rank=rank, world_size=size, timeout=timedelta(seconds=20)
        )
        work()
        return 0

    pids = [forked(lambda rank=rank: be(rank)) for rank in range(size)]
    codes: dict[int, int] = {}
    deadline, failed_at = time.monotonic() + 40, float("inf")
    while len(codes) < size:
        for rank, pid in enumerate(pids):
            if rank not in codes and (status := os.waitpid(pid, os.WNOHANG)) != (0, 0):
                codes[rank] = os.waitstatus_to_exitcode(status[1])
                if codes[rank]:
                    failed_at = min(failed_at, time.monotonic())
                    deadline = min(deadline, failed_at + 5)
        if time.monotonic() > deadline:
            for rank, pid in enumerate(pids):
                if rank not in codes:
                    os.kill(pid, signal.SIGKILL)
            deadline = float("inf")
        time.sleep(0.005)
    return [codes[rank] for rank in range(size)], max(0.0, time.monotonic() - failed_at)


class Program:
    """A program with ranks of its own, started from a shell; what it says goes to a file.

    Args:
        command: its words.
        folder: where to say it.
    """

    def __init__(self, command: list[str], folder: Path) -> None:
        self._shown = folder / f"shown-{time.monotonic_ns()}"
        environment = {name: value for name, value in os.environ.items() if not name.startswith("LOCKSTEP_")}
        environment |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "GLOO_SOCKET_IFNAME": "lo"}
        with self._shown.open("w") as file:
            self.process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=file, stderr=file, env=environment, cwd=ROOT
            )

    @property
    def shown(self) -> str:
        """What it has said so far."""
        return self._shown.read_text()

    def ranks(self) -> dict[int, int]:
        """Rank -> process id, of those that are there."""
        found: dict[int, int] = {}
        for pid in below(self.process.pid):
            with contextlib.suppress(OSError):
                pairs = Path(f"/proc/{pid}/environ").read_bytes().decode(errors="replace").split("\0")
                own = dict(pair.split("=", 1) for pair in pairs if "=" in pair)
                rank = own.get("LOCKSTEP_RANK", own.get("RANK"))
                if rank is not None and int(rank) not in found:
                    found[int(rank)] = pid
        return found

    def rank(self, number: int, limit_s: float = 100.0) -> int:
        """The process id of a rank, once it has stopped itself."""
        deadline = time.monotonic() + limit_s
        while time.monotonic() < deadline:
            pid = self.ranks().get(number)
            if pid is not None and _stat(pid)[0] == "T":
                return pid
            assert self.process.poll() is None, self.shown
            time.sleep(0.02)
        raise AssertionError(f"rank {number} did not come to the point: {self.shown}")

    def end(self, limit_s: float = 100.0) -> int:
        """Wait for it: its exit code, or minus the signal that killed it. No rank is left then."""
        ranks = self.ranks().values()
        try:
            code = self.process.wait(limit_s)
        except subprocess.TimeoutExpired:
            for pid in (self.process.pid, *self.ranks().values()):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            raise AssertionError(f"it did not end within {limit_s:g} s: {self.shown}") from None
        deadline = time.monotonic() + 2
        while (left := [pid for pid in ranks if _stat(pid)[0] not in "ZX"]) and time.monotonic() < deadline:
            time.sleep(0.02)
        assert not left, f"ranks {left} outlive it"
        return code


def lockstep(folder: Path, *words: str | Path) -> Program:
    """``python -m launch WORDS``."""
    return Program([sys.executable, "-m", "launch", *map(str, words)], folder)


def torchrun(folder: Path, size: int, *words: str | Path) -> Program:
    """The same, one process a rank, under torchrun; each leaves its exit code in a file ``exit-RANK``."""
    script = folder / "noted.py"
    script.write_text(_NOTED)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={size}", str(script)]
    return Program([*command, *map(str, words)], folder)


_NOTED = """
import os, pathlib, sys
leave = os._exit
def note(code):
    pathlib.Path(__file__).with_name(f"exit-{os.environ['RANK']}").write_text(str(code))
    leave(code)
os._exit = note
from launch.cli import main
note(main(sys.argv[1:]))
"""


def _stat(pid: int) -> tuple[str, int]:
    """State and parent of a process; ``X`` where it is gone."""
    try:
        state, parent = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[:2]
    except OSError:
        return "X", 0
    return state, int(parent)


def below(pid: int) -> list[int]:
    """Children of a process, and theirs."""
    parents: dict[int, list[int]] = {}
    for entry in Path("/proc").glob("[0-9]*"):
        parents.setdefault(_stat(int(entry.name))[1], []).append(int(entry.name))
    found = parents.get(pid, [])
    for child in found:
        found += parents.get(child, [])
    return found
