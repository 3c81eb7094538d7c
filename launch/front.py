"""The process that answers clients: it listens, keeps the engines alive, and ends in good order."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import errno
import signal
import socket
import sys
import time
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import uvicorn
from starlette.applications import Starlette

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
from launch.env import Placement
from launch.hosting import GRACE_S, Engine, Here, Hosting, Ranks, say
from launch.keepers import Board, Keeper, Seat, agree, node_name
from launch.meeting import meet
from launch.memory import keep_what_is_there
from launch.ports import holder
from launch.scratch import scratch
from launch.worker import identity
from parallel.errors import ConfigError, ModelFolderError
from parallel.hf import read_config
from parallel.mesh import Layout

__all__ = ["Front", "serve"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Front:
    """What is answered, where, by engines of which layout.

    Attributes:
        host, port: to listen on.
        drain_s: how long requests in flight may take after SIGTERM.
        stall_s: after which an engine that makes no step is started again.
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
    stall_s: float
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

    def name_of(self, replica: int) -> str:
        """What an engine is called in lines about it."""
        return f"engine {replica}" if self.layout.dp > 1 else "the engine"

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
    with scratch() as folder:
        if place is None:
            return await _Desk(front, signals).open(Here(front.layout, front.key_file, command, environ, folder))
        board = Board(await asyncio.to_thread(meet, place))
        mine = {"version": version("lockstep"), "model": identity(front.folder)[:16], **front.alike}
        await agree(board, place.rank, place.world, mine)
        seat = Seat.of(place, front.size, await board.all("node/{}", place.rank, place.world, node_name()))
        keeper = Keeper(board, place, seat, [*command, "--ranks-here", str(place.local_world)], environ, say)
        if place.rank == 0:
            return await _Desk(front, signals).open(Ranks(front.key_file, board, place, seat, keeper, folder))
        return await keeper.follow(signals)


class _Desk:
    """Answers clients from engines that are kept alive.

    Args:
        front: what and where.
        signals: names of those that arrive.
    """

    def __init__(self, front: Front, signals: asyncio.Queue[str]) -> None:
        self._front, self._signals = front, signals

    async def open(self, hosting: Hosting) -> int:
        """Serve until a signal, or until an engine refuses to be; the exit code."""
        front = self._front
        with contextlib.ExitStack() as stack:
            listener = stack.enter_context(_listening(front.host, front.port, front.http.write_s))
            engines = [
                Engine(*await hosting.engine(replica), front.stall_s, front.name_of(replica))
                for replica in range(front.layout.dp)
            ]
            app = _app(front, Router([engine.remote for engine in engines]))
            servers = [(_uvicorn(app, front), listener)]
            if front.admin_port:
                leave = lambda: self._signals.put_nowait("POST /drain")  # noqa: E731
                admin = create_admin_app(app.state.server, engines, front.admin_key, leave)
                place = stack.enter_context(_listening("127.0.0.1", front.admin_port, front.http.write_s))
                servers.append((_uvicorn(admin, front), place))
            if not front.http.keys and front.host not in ("127.0.0.1", "::1", "localhost"):
                say(f"whoever reaches {front.host} may ask without a key: give --keys-file, or listen on 127.0.0.1")
            keep_what_is_there()
            return await self._until_told(hosting, app, servers, engines)

    async def _until_told(
        self,
        hosting: Hosting,
        app: Starlette,
        servers: Sequence[tuple[uvicorn.Server, socket.socket]],
        engines: Sequence[Engine],
    ) -> int:
        front = self._front
        serving = [asyncio.create_task(server.serve(sockets=[listener])) for server, listener in servers]
        running = [asyncio.create_task(engine.supervisor.run()) for engine in engines]
        told = [asyncio.create_task(self._signals.get()), asyncio.create_task(hosting.leaves())]
        announcing = asyncio.create_task(_announce([engine.remote for engine in engines], servers[0][1]))
        await asyncio.wait([*serving, *running, *told], return_when=asyncio.FIRST_COMPLETED)
        code = max([task.result() for task in running if task.done()], default=0)
        for reason in (task.result() for task in told if task.done()):
            say(f"{reason}: requests in flight may finish, for {front.drain_s:g} s")
            await _drained(app, asyncio.create_task(self._signals.get()), front.drain_s)
        for task in (announcing, *told):
            task.cancel()
        for server, _ in servers:
            server.should_exit = True
        for engine in engines:
            engine.leave()
        await asyncio.gather(*(engine.end() for engine in engines))
        code = code or (128 + signal.SIGKILL if any(engine.supervisor.forced for engine in engines) else 0)
        await hosting.over(code)
        await asyncio.wait([*serving, *running], timeout=GRACE_S)
        return code


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
        say(line)
    host, port = listener.getsockname()[:2]
    say(f"http://{f'[{host}]' if ':' in host else host}:{port} is ready after {time.monotonic() - began:.1f} s")


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
    say(f"unexpected {type(error).__name__} at " + ", ".join(f"{Path(p.filename).name}:{p.lineno}" for p in places))
