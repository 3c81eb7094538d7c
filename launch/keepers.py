"""An engine whose ranks were started by torchrun, MPI or SLURM, on one machine or many.

Every rank that the starter knows is a *keeper*: it holds its rank of an engine in a child process. The rank 0 also
answers clients. Through the store where all ranks meet they tell one another which incarnation of an engine is to live,
where its ranks meet, and that one has ended; so an engine that dies is started again on all machines while clients are
still answered, and the starter, which would end everything, never notices.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import json
import os
import re
import socket
import struct
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch.distributed import Store

from launch.env import Placement
from launch.local import FOREIGN
from launch.supervise import LocalProcess
from parallel.errors import ConfigError, refuse

__all__ = ["Board", "Distant", "Keeper", "Seat", "agree", "beat", "node_name", "own_address", "visible_devices"]

_POLL_S = 0.2
_BEAT_S, _SILENCE_S, _GRACE_S = 1.0, 15.0, 5.0
_SIOCGIFADDR = 0x8915


class Board:
    """Small values that all keepers can read.

    Args:
        store: where all ranks meet.
    """

    def __init__(self, store: Store) -> None:
        self._store = store

    async def post(self, name: str, value: Any) -> None:
        """Set a value, which is anything that JSON knows.

        Raises:
            RuntimeError: the store is gone; so all of these.
        """
        await asyncio.to_thread(self._store.set, name, json.dumps(value))

    async def read(self, name: str) -> Any:
        """A value; None: there is none."""

        def work() -> Any:
            return json.loads(self._store.get(name)) if self._store.check([name]) else None

        return await asyncio.to_thread(work)

    async def awaited(self, name: str) -> Any:
        """A value, once there is one."""
        while (value := await self.read(name)) is None:
            await asyncio.sleep(_POLL_S)
        return value

    async def all(self, name: str, rank: int, world: int, mine: Any) -> list[Any]:
        """What every rank posts under ``name``, which holds ``{}`` for the rank."""
        await self.post(name.format(rank), mine)
        return [await self.awaited(name.format(other)) for other in range(world)]

    async def gone(self, rank: int, world: int) -> None:
        """Say that this rank reads no more; on rank 0, which may hold the store, wait a while until nobody does."""
        await asyncio.to_thread(self._store.add, "gone", 1)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_GRACE_S):
                while rank == 0 and await asyncio.to_thread(self._store.add, "gone", 0) < world:
                    await asyncio.sleep(_POLL_S)


async def agree(board: Board, rank: int, world: int, mine: Mapping[str, str]) -> None:
    """Make sure that all ranks were started alike.

    Args:
        board: of all ranks.
        rank, world: among all.
        mine: what must be the same everywhere, by name: version, options, hash of the model.

    Raises:
        ConfigError: what differs, by rank; the same on all ranks.
    """
    told = await board.all("who/{}", rank, world, dict(mine))
    problems = []
    for name in dict.fromkeys(name for own in told for name in own):
        values: dict[str, list[int]] = {}
        for other, own in enumerate(told):
            values.setdefault(str(own.get(name)), []).append(other)
        if len(values) > 1:
            what = "; ".join(f"{value} on rank {', '.join(map(str, ranks[:8]))}" for value, ranks in values.items())
            problems.append(f"{name} differs: {what}")
    if problems:
        await board.gone(rank, world)
        refuse(ConfigError, problems)


@dataclass(frozen=True, slots=True)
class Seat:
    """Where a rank of the starter sits: consecutive ranks form an engine.

    Attributes:
        replica: which engine.
        rank, size: among its ranks.
        first_local, local: which of the ranks on this machine are its, in their order: from where on, and how many.
        nodes: the machine of every rank of the starter.
    """

    replica: int
    rank: int
    size: int
    first_local: int
    local: int
    nodes: tuple[str, ...]

    @staticmethod
    def of(place: Placement, size: int, nodes: Sequence[str]) -> Seat:
        """The seat of a rank, ``size`` of which make an engine."""
        here = [rank for rank, node in enumerate(nodes) if node == nodes[place.rank]]
        engine = place.rank // size
        own = [index for index, rank in enumerate(here) if rank // size == engine]
        return Seat(engine, place.rank % size, size, own[0], len(own), tuple(nodes))


def node_name() -> str:
    """What tells this machine from others."""
    boot = Path("/proc/sys/kernel/random/boot_id")
    return f"{socket.gethostname()} {boot.read_text().strip() if boot.exists() else ''}"


class Distant:
    """An engine that keepers hold; a :class:`~launch.supervise.Life`.

    Args:
        board: of all ranks.
        replica: which engine.
    """

    def __init__(self, board: Board, replica: int) -> None:
        self._board, self._replica, self._number = board, replica, 0
        self._errands: set[asyncio.Task[None]] = set()

    async def start(self) -> None:
        self._number += 1
        await self._board.post(f"start/{self._replica}", self._number)

    async def wait(self) -> int:
        name = f"ended/{self._replica}/{self._number}"
        while (code := await self._board.read(name)) is None:
            await asyncio.sleep(_POLL_S)
        await asyncio.sleep(2 * _POLL_S)  # a rank that refused its input says more than those that missed it
        refused = await self._board.read(f"{name}/refused")
        return int(code if refused is None else refused)

    def ask_to_end(self) -> None:
        """Nothing: its ranks end when the channel is closed."""

    def kill(self) -> None:
        errand = asyncio.create_task(self._board.post(f"kill/{self._replica}", self._number))
        self._errands.add(errand)
        errand.add_done_callback(self._errands.discard)


class Keeper:
    """Holds one rank of an engine in a child process, as often as it is told.

    Args:
        board: of all ranks.
        place: of this rank, as the starter says.
        seat: of this rank.
        command: of the child; options that say where the engine's channel is are added to it.
        environ: what the child inherits, apart from the starter's variables.
        say: takes one line about what happened.
    """

    def __init__(
        self,
        board: Board,
        place: Placement,
        seat: Seat,
        command: Sequence[str],
        environ: Mapping[str, str],
        say: Callable[[str], None],
    ) -> None:
        self._board, self._place, self._seat, self._say = board, place, seat, say
        self._command, self._environ = list(command), environ
        self._child: LocalProcess | None = None
        self._number = 0
        self._ended: asyncio.Task[int] | None = None
        self._beat, self._heard = -1, time.monotonic()

    async def run(self) -> int:
        """Until all is over, or rank 0 is silent; the exit code."""
        try:
            while (over := await self._board.read("over")) is None:
                await self._look()
                if not await self._is_led():
                    self._say(f"rank {self._place.rank}: rank 0 has been silent for {_SILENCE_S:g} s")
                    return 1
                await asyncio.sleep(_POLL_S)
            await self._let_go()
            await self._board.gone(self._place.rank, self._place.world)
            return int(over)
        except RuntimeError:  # the store went with rank 0
            self._say(f"rank {self._place.rank}: the store at {self._place.host}:{self._place.port} is gone")
            return 1
        finally:
            if self._child is not None:
                self._child.kill()

    async def follow(self, signals: asyncio.Queue[str]) -> int:
        """On every rank but 0: :meth:`run`; a signal is passed on to rank 0, which ends all."""

        async def pass_on() -> None:
            await signals.get()
            await self._board.post("leave", self._place.rank)

        passing = asyncio.create_task(pass_on())
        try:
            return await self.run()
        finally:
            passing.cancel()

    async def _look(self) -> None:
        """Do what the board says, and say what happened."""
        replica, child = self._seat.replica, self._child
        if child is not None and self._ended is not None and self._ended.done():
            code, name = self._ended.result(), f"ended/{replica}/{self._number}"
            child.kill()
            self._child = None
            await self._board.post(f"{name}/refused" if code == 2 else name, code)
            if code == 2:
                await self._board.post(name, code)
        killed = await self._board.read(f"kill/{replica}") or 0
        if self._child is not None and self._number <= killed:
            self._child.kill()
        wanted = await self._board.read(f"start/{replica}") or 0
        if self._child is None and wanted > max(self._number, killed):
            await self._start(wanted)

    async def _start(self, number: int) -> None:
        """Begin an incarnation, if its first rank has said where it meets."""
        seat, name = self._seat, f"meet/{self._seat.replica}/{number}"
        with contextlib.ExitStack() as stack:
            files: list[int] = []
            if seat.rank == 0:
                host = own_address(self._place)
                listener = stack.enter_context(socket.create_server((host, 0), family=_family(host), backlog=1024))
                files = [listener.fileno()]
                meeting = [host, listener.getsockname()[1]]
                await self._board.post(name, meeting)
            else:
                meeting = await self._board.read(name)
                if meeting is None:
                    return
            address, key_file = await self._board.awaited(f"engine/{seat.replica}")
            command = [*self._command, "--channel", address]
            if key_file:
                command += ["--channel-key", key_file]
            self._number = number
            self._child = LocalProcess(command, self._child_environ(number, meeting, files), files)
            await self._child.start()
            self._ended = asyncio.create_task(self._child.wait())

    def _child_environ(self, number: int, meeting: Sequence[Any], files: Sequence[int]) -> dict[str, str]:
        """As if we had started it ourselves; GPUs are counted from the first that is its engine's."""
        seat, place = self._seat, self._place
        environ = {name: value for name, value in self._environ.items() if not FOREIGN.fullmatch(name)}
        environ |= {
            "LOCKSTEP_RANK": str(seat.rank),
            "LOCKSTEP_WORLD": str(seat.size),
            "LOCKSTEP_LOCAL_RANK": str(place.local_rank - seat.first_local),
            "LOCKSTEP_LOCAL_WORLD": str(seat.local),
            "LOCKSTEP_HOST": str(meeting[0]),
            "LOCKSTEP_PORT": str(meeting[1]),
            "LOCKSTEP_ROUND": str(number),
        }
        if files:
            environ["LOCKSTEP_LISTEN_FD"] = str(files[0])
        cores = len(os.sched_getaffinity(0))
        environ.setdefault("OMP_NUM_THREADS", str(max(1, cores // place.local_world)))
        interface = "lo" if place.local_world == place.world else interface_of(own_address(place))
        if interface:  # gloo would ask what the host's name means
            environ.setdefault("GLOO_SOCKET_IFNAME", interface)
        return {**environ, **visible_devices(environ, seat.first_local, seat.local, place.local_world)}

    async def _is_led(self) -> bool:
        """Rank 0 says every second that it is there."""
        beat = await self._board.read("beat")
        if beat != self._beat:
            self._beat, self._heard = beat, time.monotonic()
        return time.monotonic() - self._heard < _SILENCE_S

    async def _let_go(self) -> None:
        """The child ends by itself when its channel is closed; if it does not, it is killed."""
        if self._child is not None and self._ended is not None:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_GRACE_S):
                    await asyncio.shield(self._ended)


async def beat(board: Board) -> None:
    """Say every second that rank 0 is there; never returns."""
    number = 0
    while True:
        number += 1
        await board.post("beat", number)
        await asyncio.sleep(_BEAT_S)


def own_address(place: Placement) -> str:
    """The address by which other ranks reach this machine: the one by which it reaches rank 0.

    Raises:
        ConfigError: there is no way to rank 0.
    """
    if place.local_world == place.world:
        return "127.0.0.1"
    try:
        for family, kind, _, _, address in socket.getaddrinfo(place.host, place.port, type=socket.SOCK_DGRAM):
            with socket.socket(family, kind) as probe:
                probe.connect(address)
                return str(probe.getsockname()[0])
    except OSError as error:
        raise ConfigError(f"no way to rank 0 at {place.host}: {error.strerror or error}") from None
    raise ConfigError(f"no way to rank 0 at {place.host}")


def interface_of(address: str) -> str | None:
    """The name of the network interface with this IPv4 address."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for _, name in socket.if_nameindex():
            with contextlib.suppress(OSError):
                answer = fcntl.ioctl(probe.fileno(), _SIOCGIFADDR, struct.pack("256s", name[:15].encode()))
                if socket.inet_ntoa(answer[20:24]) == address:
                    return name
    return None


def visible_devices(environ: Mapping[str, str], first: int, count: int, of: int) -> dict[str, str]:
    """The variable that leaves an engine its own GPUs, where several engines share a machine."""
    if count == of:
        return {}
    given = environ.get("CUDA_VISIBLE_DEVICES")
    names = [str(index) for index in range(of)] if given is None else re.split(r"\s*,\s*", given.strip())
    return {"CUDA_VISIBLE_DEVICES": ",".join(names[first : first + count])}


def _family(host: str) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in host else socket.AF_INET
