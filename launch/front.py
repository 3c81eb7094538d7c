"""The process that answers clients: it listens, keeps the engines alive, and ends in good order."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import errno
import gc
import os
import secrets
import signal
import socket
import sys
import tempfile
import time
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Protocol

import uvicorn
from starlette.applications import Starlette

from infer.audit import Stats
from infer.build import load_text
from infer.chat import ChatTemplate
from infer.documents import Documents
from infer.limits import Limits
from infer.sentences import read_sentences, text_tokenizer
from infer.server.admin import create_admin_app
from infer.server.app import create_app
from infer.server.client import RemoteEngine
from infer.server.codec import Codec
from infer.server.config import ServerConfig
from infer.server.edge import AT_ONCE, EdgeConfig, Listener, edge, room
from infer.server.engine import ModelInfo
from infer.server.router import Router
from infer.server.wire import KEY_BYTES
from launch.env import Placement
from launch.keepers import Board, Distant, Keeper, Seat, agree, beat, node_name, own_address, visible_devices
from launch.meeting import meet
from launch.ports import holder
from launch.supervise import Life, LocalProcess, Supervisor
from launch.worker import identity, read_key
from parallel.errors import ConfigError, ModelFolderError
from parallel.hf import read_config
from parallel.mesh import Layout

__all__ = ["Front", "serve"]

_GRACE_S = 5.0
"""For engines to end by themselves once their channel is closed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Front:
    """What is answered, where, by engines of which layout.

    Attributes:
        host, port: to listen on.
        drain_s: how long requests in flight may take after SIGTERM.
        folder: of the model.
        names: by which clients ask for it; none: the name of its folder.
        http, edge: limits.
        admin_port: of what only those who run the server may do, on 127.0.0.1; 0: there is none.
        admin_key: that they need.
        context: most tokens of a text; 0: what the model was made for.
        generates: else it makes vectors only.
        sizes: to which vectors may be cut.
        layout: of all engines together; ``dp`` is how many there are.
        key_file: a secret that all machines share; empty: engines are on this one.
        alike: the options that all ranks must have the same, by name.
    """

    host: str
    port: int
    drain_s: float
    folder: Path
    names: tuple[str, ...]
    http: ServerConfig
    edge: EdgeConfig
    admin_port: int
    admin_key: str
    context: int
    generates: bool
    sizes: Sequence[int]
    layout: Layout
    key_file: str
    alike: Mapping[str, str]

    @property
    def size(self) -> int:
        """Ranks of an engine."""
        return self.layout.world // self.layout.dp


async def serve(front: Front, arguments: Sequence[str], place: Placement | None, environ: Mapping[str, str]) -> int:
    """Serve until a signal; returns the exit code.

    Args:
        front: what and where.
        arguments: of the command, for engine processes.
        place: of this rank, if a starter has started ranks; rank 0 answers clients.
        environ: for engine processes.

    Raises:
        ConfigError: ranks were started differently, or the address cannot be listened on.
        RankError: ranks do not find one another.
    """
    signals: asyncio.Queue[str] = asyncio.Queue()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, signals.put_nowait, signal.Signals(number).name)
    command = [sys.executable, "-m", "launch", *arguments]
    with tempfile.TemporaryDirectory(prefix="lockstep-") as name:
        if place is None:
            return await _Desk(front, signals).open(_Here(front, command, environ, Path(name)))
        board = Board(await asyncio.to_thread(meet, place))
        mine = {"version": version("lockstep"), "model": identity(front.folder)[:16], **front.alike}
        await agree(board, place.rank, place.world, mine)
        seat = Seat.of(place, front.size, await board.all("node/{}", place.rank, place.world, node_name()))
        keeper = Keeper(board, place, seat, [*command, "--ranks-here", str(place.local_world)], environ, _say)
        if place.rank == 0:
            return await _Desk(front, signals).open(_Ranks(front, board, place, seat.nodes, keeper, Path(name)))
        return await keeper.follow(signals)


class _Hosting(Protocol):
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


class _Here:
    """On this machine, as processes that we start."""

    def __init__(self, front: Front, command: Sequence[str], environ: Mapping[str, str], folder: Path) -> None:
        self._front, self._command, self._environ, self._folder = front, list(command), dict(environ), folder
        self._key_file = _key_file(front, folder)

    async def engine(self, replica: int) -> tuple[RemoteEngine, Life]:
        front, address = self._front, str(self._folder / f"{replica}.sock")
        remote = _remote(self._key_file)
        await asyncio.start_unix_server(remote.accept, path=address)
        options = ["--channel", address, "--channel-key", self._key_file, "--ranks-here", str(front.layout.world)]
        environ = self._environ | visible_devices(self._environ, replica * front.size, front.size, front.layout.world)
        if front.layout.dp > 1:
            cores = len(os.sched_getaffinity(0))
            environ.setdefault("OMP_NUM_THREADS", str(max(1, cores // front.layout.world)))
        return remote, LocalProcess([*self._command, *options], environ)

    async def leaves(self) -> str:
        await asyncio.Event().wait()
        raise AssertionError

    async def over(self, code: int) -> None: ...


class _Ranks:
    """Where a starter has started ranks, each of which is a keeper; so are we."""

    def __init__(
        self, front: Front, board: Board, place: Placement, nodes: Sequence[str], keeper: Keeper, folder: Path
    ) -> None:
        self._front, self._board, self._place, self._nodes, self._folder = front, board, place, nodes, folder
        self._key_file = _key_file(front, folder)
        self._tasks = [asyncio.create_task(keeper.run()), asyncio.create_task(beat(board))]

    async def engine(self, replica: int) -> tuple[RemoteEngine, Life]:
        remote = _remote(self._key_file)
        if self._nodes[replica * self._front.size] == self._nodes[0]:
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
        await asyncio.wait([self._tasks[0]], timeout=3 * _GRACE_S)
        for task in self._tasks:
            task.cancel()


def _key_file(front: Front, folder: Path) -> str:
    """The secret of the channels: the one that all machines share, or a new one."""
    if front.key_file:
        return front.key_file
    path = folder / "key"
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
        file.write(secrets.token_hex(KEY_BYTES))
    return str(path)


def _remote(key_file: str) -> RemoteEngine:
    remote = RemoteEngine(read_key(Path(key_file)), version("lockstep"))
    remote.refused = lambda reason: _say(f"an engine was refused: {reason}")
    return remote


class _Desk:
    """Answers clients from engines that are kept alive.

    Args:
        front: what and where.
        signals: names of those that arrive.
    """

    def __init__(self, front: Front, signals: asyncio.Queue[str]) -> None:
        self._front, self._signals = front, signals

    async def open(self, hosting: _Hosting) -> int:
        """Serve until a signal, or until an engine refuses to be; the exit code."""
        front = self._front
        with contextlib.ExitStack() as stack:
            listener = stack.enter_context(_listening(front.host, front.port, front.http.write_s))
            engines = [_Engine(*await hosting.engine(replica)) for replica in range(front.layout.dp)]
            app = _app(front, Router([engine.remote for engine in engines]))
            servers = [(_uvicorn(app, front), listener)]
            if front.admin_port:
                leave = lambda: self._signals.put_nowait("POST /drain")  # noqa: E731
                admin = create_admin_app(app.state.server, engines, front.admin_key, leave)
                place = stack.enter_context(_listening("127.0.0.1", front.admin_port, front.http.write_s))
                servers.append((_uvicorn(admin, front), place))
            gc.collect()
            gc.freeze()  # looking through all that is imported would take a tenth of a second each time
            return await self._until_told(hosting, app, servers, engines)

    async def _until_told(
        self,
        hosting: _Hosting,
        app: Starlette,
        servers: Sequence[tuple[uvicorn.Server, socket.socket]],
        engines: Sequence[_Engine],
    ) -> int:
        front = self._front
        serving = [asyncio.create_task(server.serve(sockets=[listener])) for server, listener in servers]
        running = [asyncio.create_task(engine.supervisor.run()) for engine in engines]
        told = [asyncio.create_task(self._signals.get()), asyncio.create_task(hosting.leaves())]
        announcing = asyncio.create_task(_announce([engine.remote for engine in engines], servers[0][1]))
        await asyncio.wait([*serving, *running, *told], return_when=asyncio.FIRST_COMPLETED)
        code = max([task.result() for task in running if task.done()], default=0)
        for reason in (task.result() for task in told if task.done()):
            _say(f"{reason}: requests in flight may finish, for {front.drain_s:g} s")
            await _drained(app, asyncio.create_task(self._signals.get()), front.drain_s)
        for task in (announcing, *told):
            task.cancel()
        for server, _ in servers:
            server.should_exit = True
        for engine in engines:
            engine.remote.close()
        await asyncio.gather(*(engine.supervisor.stop(grace_s=_GRACE_S) for engine in engines))
        code = code or (128 + signal.SIGKILL if any(engine.supervisor.forced for engine in engines) else 0)
        await hosting.over(code)
        await asyncio.wait([*serving, *running], timeout=_GRACE_S)
        return code


class _Engine:
    """An engine, its channel and who keeps it alive; a :class:`~infer.server.admin.Kept`."""

    def __init__(self, remote: RemoteEngine, life: Life) -> None:
        self.remote, self._life = remote, life
        self.supervisor = Supervisor(life, self._asked, _say)

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

    async def _asked(self) -> bool | None:
        return await self.remote.ping(10.0) if self.remote.there else None


def _app(front: Front, engine: Router) -> Starlette:
    """What answers clients."""
    folder = front.folder
    model, how, tokenizer = read_config(folder, encoders=True), read_sentences(folder), load_text(folder)
    limits = Limits.of(folder, model, context=front.context, text=True)
    context, template, documents = limits.context, _template(folder), None
    if not front.generates:
        context, template = min(context, how.max_tokens or context) if how else context, None
    if tokenizer is not None:
        documents = Documents(tokenizer, how, context)
        tokenizer = tokenizer if front.generates else text_tokenizer(tokenizer, how)
    info = ModelInfo(
        names=front.names or (folder.resolve().name,),
        context=context,
        vocabulary=limits.vocabulary,
        created=int((folder / "config.json").stat().st_mtime),
        version=version("lockstep"),
        generates=front.generates,
        width=model.hidden,
        sizes=front.sizes,
        unit=how is not None and how.normalize,
    )
    app = create_app(engine, info, Codec(tokenizer, template, documents=documents), front.http)
    app.state.server.failed = _unexpected
    return app


def _template(folder: Path) -> ChatTemplate | None:
    """The model's chat template, if it has one that can be used."""
    try:
        return ChatTemplate(folder)
    except ModelFolderError:
        return None


def _uvicorn(app: Starlette, front: Front) -> uvicorn.Server:
    options = {"log_level": "warning", "access_log": False, "lifespan": "off", "ws": "websockets-sansio"}
    options |= {"ws_max_size": front.http.body_bytes, "ws_per_message_deflate": False, "backlog": AT_ONCE}
    limits = dataclasses.replace(front.edge, connections=room(front.edge.connections))
    server = uvicorn.Server(uvicorn.Config(app, http=edge(limits), **options))
    server.capture_signals = contextlib.nullcontext  # pyright: ignore[reportAttributeAccessIssue]
    return server


def _listening(host: str, port: int, unread_s: float) -> socket.socket:
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        listener = Listener(fileno=socket.create_server((host, port), family=family).detach())
    except OSError as error:
        who = f" by {found}" if error.errno == errno.EADDRINUSE and (found := holder(port)) else ""
        raise ConfigError(f"host = {host!r}, port = {port}: {error.strerror or error}{who}") from None
    if hasattr(socket, "TCP_USER_TIMEOUT"):  # connections have it from here: who does not read for so long is gone
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, int(1000 * unread_s))
    return listener


async def _announce(remotes: Sequence[RemoteEngine], listener: socket.socket) -> None:
    """Say where the server is, once there are all engines."""
    began = time.monotonic()
    hellos = [await remote.ready() for remote in remotes]
    for line in hellos[0].notes:
        _say(line)
    host, port = listener.getsockname()[:2]
    _say(f"http://{f'[{host}]' if ':' in host else host}:{port} is ready after {time.monotonic() - began:.1f} s")


async def _drained(app: Starlette, again: asyncio.Task[str], seconds: float) -> None:
    """Requests in flight have ended: by themselves, or because of a second signal or the time."""
    app.state.drain()
    drained = asyncio.create_task(app.state.drained())
    await asyncio.wait([drained, again], timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
    app.state.abort()
    await asyncio.wait([drained], timeout=2.0)
    again.cancel()


def _unexpected(error: BaseException) -> None:
    """Where it was raised, and what it is; its message may hold what a client sent."""
    places = traceback.extract_tb(error.__traceback__)[-3:]
    _say(f"unexpected {type(error).__name__} at " + ", ".join(f"{Path(p.filename).name}:{p.lineno}" for p in places))


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
