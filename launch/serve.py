"""``serve MODEL_DIR``: an OpenAI-compatible server. This process speaks HTTP, and the engine has its own."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import hashlib
import os
import secrets
import signal
import socket
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

from infer import EngineConfig
from infer.aio import AsyncEngine
from infer.build import build_engine, load_text
from infer.chat import ChatTemplate
from infer.limits import Limits
from infer.lockstep import Replica
from infer.server.config import ServerConfig
from infer.server.engine import ModelInfo
from launch.cli import help_text, positionals
from launch.ranks import on_ranks
from launch.recipe import PRECISIONS, Precision, layout_refusals
from launch.supervise import Supervisor
from parallel.config import option, options, parse_flags, resolve
from parallel.errors import ConfigError, ModelFolderError, refuse
from parallel.hf import check_folder, read_config
from parallel.mesh import Layout, Mesh
from parallel.pp import partition

try:
    import uvicorn
    from starlette.applications import Starlette

    from infer.server.app import create_app
    from infer.server.client import RemoteEngine
    from infer.server.codec import Codec
    from infer.server.wire import KEY_BYTES, Channel, Hello
    from infer.server.worker import Worker
except ModuleNotFoundError as missing:
    raise ConfigError(f"serve: {missing.name} is not installed; pip install 'lockstep[serve]'") from None

__all__ = ["main"]

USAGE = "lockstep serve MODEL_DIR [--host 127.0.0.1 --port 8000 --layout.tp 2 ...]"
_SOCKET, _KEY = "engine.sock", "key"


@dataclass(frozen=True, slots=True, kw_only=True)
class ServeConfig:
    """What to serve, where and how."""

    host: str = option("127.0.0.1", "address to listen on")
    port: int = option(8000, "port to listen on; 0: one that is free")
    drain_s: float = option(30.0, "how long requests in flight may take after SIGTERM")
    precision: Precision = option("fp32", "of weights and activations")
    device: Literal["auto", "cpu", "cuda"] = option("auto", "where to compute")
    layout: Layout = option(Layout(sequence_parallel=False), "degrees of parallelism: tp, pp")
    engine: EngineConfig = option(EngineConfig(), "memory, scheduling")
    http: ServerConfig = option(ServerConfig(), "limits")
    names: tuple[str, ...] = option((), "by which clients ask for the model (none: the name of its folder)")
    keys_file: str = option("", "a file with an API key a line; with any, every route but /health/live asks for one")
    channel: str = option("", "set for engine processes by the server itself")

    def problems(self) -> Iterator[str]:
        """Why these options do not go together."""
        if not 0 <= self.port < 65536:
            yield f"port = {self.port}: must be at least 0 and below 65536"
        if self.drain_s < 0:
            yield f"drain_s = {self.drain_s}: must not be negative"
        if self.layout.dp > 1:
            yield f"layout.dp = {self.layout.dp}: replicas are not served yet; start a server for each"
        yield from layout_refusals(self.layout, "cp", "ep", "etp")
        yield from self.engine.problems()
        yield from self.http.problems()
        if self.http.keys:
            yield "http.keys: whoever may list processes would read them: give --keys-file FILE"


def main(arguments: Sequence[str]) -> int:
    """Run the command; see :data:`launch.cli.USAGE`."""
    given, overrides, problems = parse_flags(arguments)
    if "help" in overrides:
        print(help_text(USAGE, [leaf for leaf in options(ServeConfig()) if leaf.name != "channel"]))
        return 0
    (folder,) = positionals(["MODEL_DIR"], given, problems)
    config = resolve(ServeConfig(), overrides, extra=problems)
    config = dataclasses.replace(config, layout=dataclasses.replace(config.layout, sequence_parallel=False))
    if config.channel:
        return on_ranks(
            ["serve", *arguments], config.layout, config.device, lambda mesh: _engine(config, Path(folder), mesh)
        )
    config = dataclasses.replace(config, http=_with_keys(config))
    refuse(ModelFolderError, check_folder(Path(folder)))
    model = read_config(Path(folder)).resolved()
    refuse(ConfigError, model.layout_problems(config.layout.tp))
    partition(model.layers, config.layout.pp)
    return asyncio.run(_serve(config, Path(folder), ["serve", *arguments]))


def _with_keys(config: ServeConfig) -> ServerConfig:
    """The limits, with the keys of the file."""
    if not config.keys_file:
        return config.http
    try:
        lines = Path(config.keys_file).read_text().split()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"keys_file = {config.keys_file!r}: {getattr(error, 'strerror', None) or error}") from None
    refuse(ConfigError, [] if lines else [f"keys_file = {config.keys_file!r}: no key in it"])
    http = dataclasses.replace(config.http, keys=tuple(lines))
    refuse(ConfigError, http.problems())
    return http


def _engine(config: ServeConfig, folder: Path, mesh: Mesh) -> int:
    """One rank of the engine; the first speaks with the HTTP process."""
    local = config.layout.world if mesh.device.type == "cpu" else 1
    dtype = PRECISIONS[config.precision]
    engine, sizing = build_engine(folder, mesh, dtype, config.engine, tokenizer=load_text(folder), ranks=local)
    replica = Replica(engine, mesh)
    if not replica.first:
        replica.follow()
        return 0
    limits = engine.limits
    hello = Hello(version("lockstep"), _identity(folder), limits.context, limits.vocabulary, list(sizing.lines))
    asyncio.run(_work(Path(config.channel), replica if config.layout.world > 1 else engine, hello))
    return 0


async def _work(place: Path, engine: Any, hello: Hello) -> None:
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, lambda: None)  # the server says when: it closes the channel
    reader, writer = await asyncio.open_unix_connection(str(place / _SOCKET))
    channel = await Channel.open(reader, writer, (place / _KEY).read_bytes(), listens=False)
    async with AsyncEngine(engine) as running:
        await Worker(channel, running, hello, lambda: engine.stats).run()


def _identity(folder: Path) -> str:
    """Hash of what says which model it is, and how it becomes text."""
    digest = hashlib.sha256()
    for name in ("config.json", "tokenizer.json", "model.safetensors.index.json"):
        path = folder / name
        digest.update(name.encode() + (path.read_bytes() if path.exists() else b""))
    return digest.hexdigest()


def _template(folder: Path) -> ChatTemplate | None:
    """The model's chat template, if it has one that can be used."""
    try:
        return ChatTemplate(folder)
    except ModelFolderError:
        return None


def _listening(host: str, port: int, unread_s: float) -> socket.socket:
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        listener = socket.create_server((host, port), family=family, backlog=1024)
    except OSError as error:
        raise ConfigError(f"host = {host!r}, port = {port}: {error.strerror or error}") from None
    if hasattr(socket, "TCP_USER_TIMEOUT"):  # connections have it from here: who does not read for so long is gone
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, int(1000 * unread_s))
    return listener


async def _serve(config: ServeConfig, folder: Path, arguments: list[str]) -> int:
    """Speak HTTP until a signal, with an engine that is kept alive."""
    key = secrets.token_bytes(KEY_BYTES)
    remote = RemoteEngine(key, version("lockstep"))
    remote.refused = lambda reason: _say(f"an engine was refused: {reason}")
    with (
        tempfile.TemporaryDirectory(prefix="lockstep-") as name,
        _listening(config.host, config.port, config.http.write_s) as listener,
    ):
        place = Path(name)
        with os.fdopen(os.open(place / _KEY, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
            file.write(key)
        channels = await asyncio.start_unix_server(remote.accept, path=str(place / _SOCKET))
        command = [sys.executable, "-m", "launch", *arguments, "--channel", name]
        supervisor = Supervisor(command, os.environ, lambda: _works(remote), _say)
        async with channels:
            return await _until_told(config, folder, remote, supervisor, listener)


async def _works(remote: RemoteEngine) -> bool | None:
    return None if remote.hello is None else await remote.ping(10.0)


def _app(config: ServeConfig, folder: Path, remote: RemoteEngine) -> Starlette:
    """What answers clients."""
    limits = Limits.of(folder, read_config(folder).resolved(), context=config.engine.context, text=True)
    info = ModelInfo(
        names=config.names or (folder.resolve().name,),
        context=limits.context,
        vocabulary=limits.vocabulary,
        created=int((folder / "config.json").stat().st_mtime),
        version=version("lockstep"),
    )
    app = create_app(remote, info, Codec(load_text(folder), _template(folder)), config.http)
    app.state.server.failed = _unexpected
    return app


async def _until_told(
    config: ServeConfig, folder: Path, remote: RemoteEngine, supervisor: Supervisor, listener: socket.socket
) -> int:
    """Serve until a signal, or until the engine refuses to be."""
    signals: asyncio.Queue[int] = asyncio.Queue()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, signals.put_nowait, number)
    app = _app(config, folder, remote)
    options = {"log_level": "warning", "access_log": False, "lifespan": "off", "http": "h11", "ws": "none"}
    server = uvicorn.Server(uvicorn.Config(app, timeout_keep_alive=5, **options))
    server.capture_signals = contextlib.nullcontext  # pyright: ignore[reportAttributeAccessIssue]
    serving = asyncio.create_task(server.serve(sockets=[listener]))
    engine = asyncio.create_task(supervisor.run())
    told = asyncio.create_task(signals.get())
    announcing = asyncio.create_task(_announce(remote, listener))
    await asyncio.wait([serving, engine, told], return_when=asyncio.FIRST_COMPLETED)
    code = engine.result() if engine.done() else 0
    if told.done():
        _say(f"{signal.Signals(told.result()).name}: requests in flight may finish, for {config.drain_s:g} s")
        await _drained(app, asyncio.create_task(signals.get()), config.drain_s)
    for task in (announcing, told):
        task.cancel()
    server.should_exit = True
    remote.close()
    await supervisor.stop(grace_s=5.0)
    await asyncio.wait([serving, engine], timeout=5.0)
    return code


async def _announce(remote: RemoteEngine, listener: socket.socket) -> None:
    """Say where the server is, once there is an engine."""
    began = time.monotonic()
    hello = await remote.ready()
    for line in hello.notes:
        _say(line)
    host, port = listener.getsockname()[:2]
    _say(f"http://{f'[{host}]' if ':' in host else host}:{port} is ready after {time.monotonic() - began:.1f} s")


async def _drained(app: Starlette, again: asyncio.Task[int], seconds: float) -> None:
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
