"""A server in processes of its own, on a model that takes no time, and everything that can be counted about it."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from serving_faults.suite import Failed, must
from serving_faults.wire import Answer, Client

__all__ = ["GREEDY", "LONG", "Census", "House", "alive", "wait_for"]

ROOT = Path(__file__).parent.parent.parent
SITE = Path(__file__).parent / "site"
LIMITS = ("--engine.cache.memory-gib", "0.02")
GREEDY: dict[str, Any] = {"model": "tiny", "prompt": "tea at noon", "max_tokens": 24, "temperature": 0, "logprobs": 0}
LONG: dict[str, Any] = {"model": "tiny", "prompt": [7, 8, 9], "max_tokens": 250, "ignore_eos": True}


def wait_for(condition: Callable[[], Any], seconds: float, what: str) -> float:
    """Until it is true; how long it took."""
    began = time.monotonic()
    while not condition():
        must(time.monotonic() - began < seconds, f"{what}: not within {seconds:g} s")
        time.sleep(0.02)
    return time.monotonic() - began


def alive(pid: int) -> bool:
    """Whether there is such a process, and it is no zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@dataclass
class Census:
    """What a server holds: of each of its processes, files, threads and memory; files of its own."""

    files: dict[int, int] = field(default_factory=dict)
    threads: dict[int, int] = field(default_factory=dict)
    rss: dict[int, int] = field(default_factory=dict)
    temporary: set[str] = field(default_factory=set)
    shared: set[str] = field(default_factory=set)


class House:
    """A server that is running.

    Args:
        place: an empty folder for what it writes.
        folder: of the model.
        options: of the command.
        environ: more of it.
        wait: until it is ready.
    """

    def __init__(
        self, place: Path, folder: Path, *options: str, environ: dict[str, str] | None = None, wait: bool = True
    ) -> None:
        self.place, self.folder = place, folder
        self.temporary = place / "tmp"
        self.temporary.mkdir(parents=True)
        self.log = place / "log"
        self.key = ""
        command = [sys.executable, "-m", "launch", "serve", str(folder), "--port", "0", *options]
        command += () if LIMITS[0] in options else LIMITS
        self.environ = {**os.environ, **self._own_environ(), **(environ or {})}
        with self.log.open("wb") as file:
            self.process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=file, stderr=file, env=self.environ, cwd=ROOT
            )
        self.port = 0
        self.bystander: list[Any] | None = None
        if wait:
            self.await_ready()

    def _own_environ(self) -> dict[str, str]:
        return {
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": f"{SITE}:{ROOT}",
            "PYTHONDONTWRITEBYTECODE": "1",
            "SERVE_FAULTS": str(self.place),
            "TMPDIR": str(self.temporary),
            **({"PYTHONOPTIMIZE": "1"} if sys.flags.optimize else {}),
        }

    @property
    def lines(self) -> str:
        return self.log.read_text(errors="replace")

    def said(self, pattern: str, seconds: float = 60.0, after: int = 0) -> re.Match[str]:
        """A line that it writes."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            if found := re.search(pattern, self.lines[after:]):
                return found
            if self.process.poll() is not None:
                break
            time.sleep(0.02)
        raise Failed(f"{pattern!r} was not said: {self.lines[-1500:]}")

    def await_ready(self, seconds: float = 60.0) -> None:
        self.port = int(self.said(r"http://\S+:(\d+) is ready", seconds)[1])

    # what it is asked

    def client(self, timeout: float = 30.0) -> Client:
        return Client(self.port, timeout)

    def ask(self, method: str, path: str, body: Any = None, headers: dict[str, str] | None = None) -> Answer:
        """A request on a connection of its own."""
        own = {"Authorization": f"Bearer {self.key}"} if self.key else {}
        with self.client() as client:
            return client.ask(method, path, body, {**own, "Connection": "close", **(headers or {})})

    def complete(self, **more: Any) -> Answer:
        return self.ask("POST", "/v1/completions", {**GREEDY, **more})

    def tokens(self, **more: Any) -> list[Any]:
        """What it continues a prompt with, exactly."""
        answer = self.complete(**more)
        must(answer.status == 200, f"{answer.status}: {answer.body[:300]!r}")
        choice = answer.json()["choices"][0]
        return [choice["logprobs"]["tokens"], choice["text"], choice["finish_reason"]]

    def ready(self) -> int:
        """The status of /health/ready; 0: no answer."""
        try:
            return self.ask("GET", "/health/ready").status
        except OSError:
            return 0

    def metrics(self) -> dict[str, float]:
        """What /metrics tells."""
        answer = self.ask("GET", "/metrics")
        must(answer.status == 200, f"/metrics: {answer.status}")
        lines = [line for line in answer.body.decode().splitlines() if line and not line.startswith("#")]
        return {name.removeprefix("lockstep_"): float(value) for name, _, value in (x.rpartition(" ") for x in lines)}

    def answered(self) -> float:
        """Requests that it has counted."""
        return sum(value for name, value in self.metrics().items() if name.startswith("requests_total"))

    # what is done to it

    def write(self, name: str, text: str) -> None:
        """A file that its processes look at; see ``site/sitecustomize.py``."""
        (self.place / f"{name}~").write_text(text)
        (self.place / f"{name}~").rename(self.place / name)

    def fault(self, text: str) -> None:
        """``kind@rank,step,point``."""
        self.write("fault", text)

    @contextlib.contextmanager
    def slowly(self, seconds: float) -> Any:
        """Every step takes so much longer."""
        self.write("slow", str(seconds))
        try:
            yield
        finally:
            (self.place / "slow").unlink(missing_ok=True)

    def stop(self, seconds: float = 40.0, number: int = signal.SIGTERM) -> int:
        """End it; its exit code. Nothing of it may be left."""
        own = self.processes()
        self.process.send_signal(number)
        try:
            code = self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            self.end()
            raise Failed(f"it did not end within {seconds:g} s: {self.lines[-1500:]}") from None
        self.check_gone(own)
        return code

    def check_gone(self, own: list[int], seconds: float = 0.5) -> float:
        """None of its processes and files is left; how long that took."""
        took = wait_for(lambda: not [pid for pid in own if alive(pid)], seconds, "processes are left behind")
        return took

    def end(self) -> None:
        """Whatever it does."""
        own = self.processes()
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        for pid in own:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    # what it holds

    def engines(self) -> list[int]:
        """The processes of its engines: all but those that try forms, render templates, and remove its folder."""
        return [pid for pid in self.processes() if not _HELPERS.search(_command(pid))]

    def helper(self, program: str) -> int | None:
        """The process that runs a program of its own, if there is one."""
        return next((pid for pid in self.processes() if program.encode() in _command(pid)), None)

    def processes(self) -> list[int]:
        """All that it has started, and what they have."""
        found, todo = [], [self.process.pid]
        while todo:
            parent = todo.pop()
            with contextlib.suppress(OSError):
                for task in Path(f"/proc/{parent}/task").iterdir():
                    children = [int(child) for child in (task / "children").read_text().split()]
                    found += children
                    todo += children
        return found

    def rss(self) -> int:
        """Bytes of the HTTP process."""
        return _status(self.process.pid, "VmRSS") << 10

    def census(self) -> Census:
        found = Census()
        for pid in (self.process.pid, *self.processes()):
            with contextlib.suppress(OSError):
                found.files[pid] = len(os.listdir(f"/proc/{pid}/fd"))
                found.threads[pid] = _status(pid, "Threads")
                found.rss[pid] = _status(pid, "VmRSS") << 10
        found.temporary = {str(path.relative_to(self.temporary)) for path in self.temporary.rglob("*")}
        found.shared = set(os.listdir("/dev/shm"))
        return found

    def stalls(self, since: int) -> tuple[float, float]:
        """The longest time that the event loop stood still, and the longest that it computed in one go (seconds)."""
        path = self.place / "stalls"
        lines = path.read_text()[since:].splitlines() if path.exists() else []
        own = [line.split() for line in lines if line.startswith(f"{self.process.pid} ")]
        return max((float(line[1]) for line in own), default=0.0), max((float(line[2]) for line in own), default=0.0)

    def stalls_so_far(self) -> int:
        path = self.place / "stalls"
        return path.stat().st_size if path.exists() else 0


class Repeating:
    """Does something again and again, in a thread, until it is told to stop."""

    def __init__(self, work: Callable[[], None], pause: float) -> None:
        self._work, self._pause, self._over = work, pause, threading.Event()
        self.errors: list[BaseException] = []
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        while not self._over.is_set():
            try:
                self._work()
            except Exception as error:  # noqa: BLE001 - told at the end
                self.errors.append(error)
            self._over.wait(self._pause)

    def stop(self) -> None:
        self._over.set()
        self._thread.join(30)


_HELPERS = re.compile(rb"/(compile|template)\.py|^/bin/sh\0")


def _command(pid: int) -> bytes:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""


def _status(pid: int, name: str) -> int:
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1])
    return 0
