"""Where a server's engines live: on this machine, or on ranks that a starter has started."""

from __future__ import annotations

import asyncio
import os
import secrets
import sys
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Protocol

from infer.audit import Stats
from infer.server.client import RemoteEngine
from infer.server.wire import KEY_BYTES
from launch.env import Placement
from launch.failures import Failure
from launch.keepers import Board, Distant, Keeper, Seat, beat, own_address, visible_devices
from launch.supervise import Life, LocalProcess, Supervisor
from launch.worker import read_key
from parallel.mesh import Layout

__all__ = ["GRACE_S", "Engine", "Here", "Hosting", "Ranks", "say"]

GRACE_S = 5.0
"""For engines to end by themselves once their channel is closed."""


class Engine:
    """An engine, its channel and who keeps it alive; a :class:`~infer.server.admin.Kept`."""

    def __init__(self, remote: RemoteEngine, life: Life, stall_s: float, name: str) -> None:
        self.remote, self._life, self._patience_s, self._leaving = remote, life, min(10.0, stall_s), False
        self.supervisor = Supervisor(
            life, self._asked, say, name=name, every_s=min(2.0, stall_s / 4), stands_still_s=stall_s
        )

    @property
    def there(self) -> bool:
        return self.remote.there

    @property
    def works(self) -> bool:
        return self.remote.works

    @property
    def restarts(self) -> int:
        return self.supervisor.restarts

    def stats(self) -> Stats | None:
        return self.remote.stats()

    def restart(self) -> None:
        self._life.kill()

    def leave(self) -> None:
        """Close its channel, upon which it ends."""
        self._leaving = self.remote.there
        self.remote.close()

    async def end(self) -> None:
        """Wait until it has ended, by force if need be."""
        await self.supervisor.stop(grace_s=GRACE_S, leaving=self._leaving)

    async def _asked(self) -> bool | None:
        return await self.remote.ping(self._patience_s) if self.remote.there else None


class Hosting(Protocol):
    """Where engines live."""

    async def engine(self, replica: int) -> tuple[RemoteEngine, Life]:
        """The channel of an engine, which is listened on now, and its life, which is not begun."""
        ...

    async def leaves(self) -> str:
        """Until others than us want all to end; who."""
        ...

    async def over(self, code: int) -> None:
        """All engines have ended."""
        ...


class Here:
    """On this machine, as processes that we start.

    Args:
        layout: of all engines together.
        key_file: of the secret of their channels; empty: a new one.
        command, environ: of an engine.
        folder: that only we can enter, for sockets and the key.
    """

    def __init__(
        self, layout: Layout, key_file: str, command: Sequence[str], environ: Mapping[str, str], folder: Path
    ) -> None:
        self._layout, self._command, self._environ, self._folder = layout, list(command), dict(environ), folder
        self._key_file = key_file or _new_key(folder)
        self._told: set[str] = set()

    async def engine(self, replica: int) -> tuple[RemoteEngine, Life]:
        world, address = self._layout.world, str(self._folder / f"{replica}.sock")
        remote = _remote(self._key_file)
        await asyncio.start_unix_server(remote.accept, path=address)
        size = world // self._layout.dp
        options = ["--channel", address, "--channel-key", self._key_file, "--ranks-here", str(world)]
        environ = self._environ | visible_devices(self._environ, replica * size, size, world)
        if self._layout.dp > 1:
            cores = len(os.sched_getaffinity(0))
            environ.setdefault("OMP_NUM_THREADS", str(max(1, cores // world)))
        return remote, LocalProcess([*self._command, *options], environ, tell=self._tell)

    def _tell(self, failure: Failure) -> None:
        """What an engine says of its failure; why it refuses its input, once for all of them."""
        for line in failure.problems or failure.text.splitlines():
            if not (failure.problems and line in self._told):
                say(line)
        self._told.update(failure.problems)

    async def leaves(self) -> str:
        await asyncio.Event().wait()
        raise AssertionError

    async def over(self, code: int) -> None: ...


class Ranks:
    """Where a starter has started ranks, each of which is a keeper; so are we.

    Args:
        key_file: of the secret of the channels, on every machine; empty: a new one, as all first ranks are on this one.
        board, place, seat, keeper: of this rank, which is 0.
        folder: that only we can enter.
    """

    def __init__(self, key_file: str, board: Board, place: Placement, seat: Seat, keeper: Keeper, folder: Path) -> None:
        self._board, self._place, self._seat, self._folder = board, place, seat, folder
        self._key_file = key_file or _new_key(folder)
        self._tasks = [asyncio.create_task(keeper.run()), asyncio.create_task(beat(board))]

    async def engine(self, replica: int) -> tuple[RemoteEngine, Life]:
        remote = _remote(self._key_file)
        if self._seat.nodes[replica * self._seat.size] == self._seat.nodes[0]:
            address = str(self._folder / f"{replica}.sock")
            await asyncio.start_unix_server(remote.accept, path=address)
            await self._board.post(f"engine/{replica}", [address, self._key_file])
        else:
            host = own_address(self._place)
            listening = await asyncio.start_server(remote.accept, host, 0)
            port = listening.sockets[0].getsockname()[1]
            await self._board.post(f"engine/{replica}", [f"{host}:{port}", ""])
        return remote, Distant(self._board, replica)

    async def leaves(self) -> str:
        return f"rank {await self._board.awaited('leave')}"

    async def over(self, code: int) -> None:
        await self._board.post("over", code)
        await asyncio.wait([self._tasks[0]], timeout=3 * GRACE_S)
        for task in self._tasks:
            task.cancel()


def _new_key(folder: Path) -> str:
    path = folder / "key"
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
        file.write(secrets.token_hex(KEY_BYTES))
    return str(path)


def _remote(key_file: str) -> RemoteEngine:
    remote = RemoteEngine(read_key(Path(key_file)), version("lockstep"))
    remote.refused = lambda reason: say(f"an engine was refused: {reason}")
    return remote


def say(line: str) -> None:
    """Tell whoever started the server."""
    print(line, file=sys.stderr, flush=True)
