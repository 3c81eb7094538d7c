"""One engine, kept alive: started, watched, ended where it is dead or stands still, and started again."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Protocol

from launch.failures import Failure, read_account, tail
from launch.local import report_environ, report_file, tethered

__all__ = ["Life", "LocalProcess", "Supervisor"]

_REFUSED = 2
_SHORTEST_S, _LONGEST_S = 0.2, 30.0
"""Pauses before an engine that fails at once is started again."""


class Life(Protocol):
    """An engine that can be started again once it has ended; here, or on other machines."""

    async def start(self) -> None:
        """Begin."""
        ...

    async def wait(self) -> int:
        """Until it has ended; its exit code, 128 + n if signal n killed it."""
        ...

    def ask_to_end(self) -> None:
        """SIGTERM or the like; fine if it has ended."""
        ...

    def kill(self) -> None:
        """SIGKILL, to all that belongs to it; fine if it has ended."""
        ...


class LocalProcess:
    """A process of this machine and all that it starts; it dies with us.

    Args:
        command: an argument vector.
        environ: that it inherits.
        files: open files that it inherits.
        tell: takes what it says of its own failure; None: it says so itself, on stderr.
    """

    def __init__(
        self,
        command: Sequence[str],
        environ: Mapping[str, str],
        files: Sequence[int] = (),
        tell: Callable[[Failure], None] | None = None,
    ) -> None:
        self._command, self._environ, self._files = list(command), dict(environ), tuple(files)
        self._process: asyncio.subprocess.Process | None = None
        self._tell, self._report = tell, None

    async def start(self) -> None:
        environ, files = self._environ, self._files
        if self._tell is not None:
            self._report = report_file()
            environ, files = environ | report_environ(self._report), (*files, self._report.fileno())
        self._process = await asyncio.create_subprocess_exec(
            *tethered(self._command),
            stdin=asyncio.subprocess.DEVNULL,
            stdout=sys.stderr,
            env=environ,
            pass_fds=files,
            start_new_session=True,
        )

    async def wait(self) -> int:
        assert self._process is not None, "not started"
        code = await self._process.wait()
        if self._tell is not None and self._report is not None:
            report, self._report = self._report, None
            with report:
                if failure := read_account(0, tail(report)):
                    self._tell(failure)
        return code if code >= 0 else 128 - code

    def ask_to_end(self) -> None:
        if self._process is not None and self._process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                self._process.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        if self._process is not None:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self._process.pid, signal.SIGKILL)


class Supervisor:
    """Keeps an engine running for as long as the server lives.

    Args:
        life: of the engine.
        ping: whether the engine works; None while it is not expected to yet.
        say: takes one line about what happened.
        name: what the engine is called in it.
        every_s: how often it is asked.
        stands_still_s: an engine that has not worked for so long is killed.
        loads_s: so is one that is not there after so long.

    Attributes:
        restarts: how often it was started again.
        forced: it had to be killed in the end.
    """

    def __init__(
        self,
        life: Life,
        ping: Callable[[], Awaitable[bool | None]],
        say: Callable[[str], None],
        *,
        name: str = "the engine",
        every_s: float = 2.0,
        stands_still_s: float = 20.0,
        loads_s: float = 1800.0,
    ) -> None:
        self._life, self._ping, self._say, self._name = life, ping, say, name
        self._every_s, self._stands_still_s, self._loads_s = every_s, stands_still_s, loads_s
        self._stopping = self._runs = False
        self.restarts = 0
        self.forced = False

    async def run(self) -> int:
        """Keep it running until :meth:`stop`; the exit code: of an engine that refused its input, else 0."""
        pause = _SHORTEST_S
        while not self._stopping:
            began = time.monotonic()
            code = await self._once()
            if self._stopping or code == _REFUSED:
                return code if code == _REFUSED else 0
            lived = time.monotonic() - began
            pause = _SHORTEST_S if lived > _LONGEST_S else min(2 * pause, _LONGEST_S)
            self._say(f"{self._name} ended with exit code {code} after {lived:.0f} s; it is started again")
            self.restarts += 1
            await asyncio.sleep(pause)
        return 0

    async def stop(self, grace_s: float, *, leaving: bool = False) -> None:
        """End the engine, by force after ``grace_s``.

        Args:
            grace_s: for it to end by itself.
            leaving: it is ending already, and is only asked to after half of that time: ranks that die of a signal
                while others say goodbye to them end in tracebacks.
        """
        self._stopping = True
        if not self._runs or (leaving and await self._ends_within(grace_s / 2)):
            return
        self._life.ask_to_end()
        if not await self._ends_within(grace_s / 2 if leaving else grace_s):
            self._say(f"{self._name} has not ended within {grace_s:g} s; it is killed")
            self.forced = True
            self._life.kill()
            await self._life.wait()

    async def _ends_within(self, seconds: float) -> bool:
        try:
            async with asyncio.timeout(seconds):
                await self._life.wait()
        except TimeoutError:
            return False
        return True

    async def _once(self) -> int:
        await self._life.start()
        self._runs = True
        watching = asyncio.create_task(self._watch())
        try:
            return await self._life.wait()
        finally:
            self._runs = False
            watching.cancel()
            self._life.kill()  # and what is left of it

    async def _watch(self) -> None:
        """Kill an engine that does not work any more."""
        began = worked = time.monotonic()
        there = False
        while True:
            await asyncio.sleep(self._every_s)
            verdict = await self._ping()
            if verdict and not there and self.restarts:
                self._say(f"{self._name} works again")
            there = there or verdict is not None
            now = time.monotonic()
            if verdict is not False:
                worked = now
            if now - worked > self._stands_still_s:
                self._say(f"{self._name} has not made a step for {self._stands_still_s:g} s; it is killed")
                self._life.kill()
            elif not there and now - began > self._loads_s:
                self._say(f"{self._name} is not there after {self._loads_s:g} s; it is killed")
                self._life.kill()
