"""One engine, kept alive: started, watched, ended where it is dead or stands still, and started again."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence

from launch.local import tethered

__all__ = ["Supervisor"]

_REFUSED = 2
_SHORTEST_S, _LONGEST_S = 0.2, 30.0
"""Pauses before an engine that fails at once is started again."""


class Supervisor:
    """Runs a command for as long as the server lives.

    Args:
        command: of the engine.
        environ: that it inherits.
        ping: whether the engine works; None while it is not expected to yet.
        say: takes one line about what happened.
        every_s: how often it is asked.
        stands_still_s: an engine that has not worked for so long is killed.

    Attributes:
        restarts: how often it was started again.
    """

    def __init__(
        self,
        command: Sequence[str],
        environ: Mapping[str, str],
        ping: Callable[[], Awaitable[bool | None]],
        say: Callable[[str], None],
        *,
        every_s: float = 2.0,
        stands_still_s: float = 20.0,
    ) -> None:
        self._command, self._environ, self._ping, self._say = list(command), dict(environ), ping, say
        self._every_s, self._stands_still_s = every_s, stands_still_s
        self._process: asyncio.subprocess.Process | None = None
        self._stopping = False
        self.restarts = 0

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
            self._say(f"the engine ended with exit code {code} after {lived:.0f} s; it is started again")
            self.restarts += 1
            await asyncio.sleep(pause)
        return 0

    async def stop(self, grace_s: float) -> None:
        """End the engine: SIGTERM, and SIGKILL after ``grace_s``."""
        self._stopping = True
        process = self._process
        if process is None or process.returncode is not None:
            return
        with contextlib.suppress(ProcessLookupError):
            process.send_signal(signal.SIGTERM)
        try:
            await asyncio.wait_for(process.wait(), grace_s)
        except TimeoutError:
            self._kill(process)
            await process.wait()

    async def _once(self) -> int:
        self._process = process = await asyncio.create_subprocess_exec(
            *tethered(self._command),
            stdin=asyncio.subprocess.DEVNULL,
            stdout=sys.stderr,
            env=self._environ,
            start_new_session=True,
        )
        watching = asyncio.create_task(self._watch(process))
        try:
            code = await process.wait()
        finally:
            watching.cancel()
            self._kill(process)  # and what is left of its group
        return code if code >= 0 else 128 - code

    async def _watch(self, process: asyncio.subprocess.Process) -> None:
        """Kill an engine that does not work any more."""
        worked = time.monotonic()
        while process.returncode is None:
            await asyncio.sleep(self._every_s)
            if await self._ping() is not False:
                worked = time.monotonic()
            elif time.monotonic() - worked > self._stands_still_s:
                self._say(f"the engine has not made a step for {self._stands_still_s:g} s; it is killed")
                self._kill(process)

    @staticmethod
    def _kill(process: asyncio.subprocess.Process) -> None:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)
