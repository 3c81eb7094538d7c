"""``serve MODEL_DIR``: an OpenAI-compatible server. This process speaks HTTP, and engines have their own."""

from __future__ import annotations

import asyncio
import dataclasses
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from infer import EngineConfig
from infer.server.config import ServerConfig
from infer.vectors import Task, makes_vectors, trained_sizes
from launch.cli import command_line, help_text, missing_folder, positionals
from launch.ranks import check_world, on_ranks
from launch.recipe import NOT_YET, PRECISIONS, Precision, layout_refusals
from parallel.config import option, options, resolve
from parallel.errors import ConfigError, ModelFolderError, refuse
from parallel.hf import check_folder, read_config
from parallel.mesh import Layout
from parallel.models.config import DecoderConfig
from parallel.pp import partition

try:
    from infer.server.edge import EdgeConfig
    from launch.front import Front, serve
    from launch.worker import read_key, read_secret, run_engine
except ModuleNotFoundError as missing:
    raise ConfigError(f"serve: {missing.name} is not installed; pip install 'lockstep[serve]'") from None

__all__ = ["main"]

USAGE = "lockstep serve MODEL_DIR [--host 127.0.0.1 --port 8000 --layout.tp 2 ...]"
_REFUSED = {
    "http.keys": "whoever may list processes would read them: give --keys-file FILE",
    "model": "the folder comes first, without an option: lockstep serve MODEL_DIR",
}
_HIDDEN = (*_REFUSED, *NOT_YET, "channel", "channel_key", "ranks_here")


@dataclass(frozen=True, slots=True, kw_only=True)
class ServeConfig:
    """What to serve, where and how."""

    host: str = option("127.0.0.1", "address to listen on")
    port: int = option(8000, "port to listen on; 0: one that is free")
    drain_s: float = option(30.0, "how long requests in flight may take after SIGTERM")
    stall_s: float = option(20.0, "an engine that has not made a step for so long, though asked to, is started again")
    precision: Precision = option("fp32", "of weights and activations")
    device: Literal["auto", "cpu", "cuda"] = option("auto", "where to compute")
    task: Task = option(
        "auto", "generate; embed: vectors only, without a cache; auto: for encoders and sentence-transformers folders"
    )
    sizes: tuple[int, ...] = option((), "to which vectors may be cut for clients (none: those that config.json names)")
    layout: Layout = option(Layout(sequence_parallel=False), "degrees of parallelism: tp, pp; dp: as many engines")
    engine: EngineConfig = option(EngineConfig(), "memory, scheduling")
    http: ServerConfig = option(ServerConfig(), "limits")
    edge: EdgeConfig = option(EdgeConfig(), "connections")
    names: tuple[str, ...] = option((), "by which clients ask for the model (none: the name of its folder)")
    keys_file: str = option(
        "", "a file with an API key a line, and lines that begin with #; every route but /health/live asks for one then"
    )
    admin_port: int = option(0, "port on 127.0.0.1 for /metrics, /engines and more; 0: none")
    admin_key_file: str = option("", "a file with the key that admin_port asks for")
    channel_key_file: str = option("", "a file with the same secret on every machine; needed by engines on several")
    channel: str = option("", "set for engine processes by the server itself, as the next two")
    channel_key: str = option("", "file with the key of the channel")
    ranks_here: int = option(0, "ranks of all engines on this machine")

    def problems(self) -> Iterator[str]:
        """Why these options do not go together."""
        if not 0 <= self.port < 65536:
            yield f"port = {self.port}: must be at least 0 and below 65536"
        if not 0 <= self.admin_port < 65536 or 0 < self.admin_port == self.port:
            yield f"admin_port = {self.admin_port}: must be at least 0, below 65536, and not that of clients"
        if bool(self.admin_port) != bool(self.admin_key_file):
            yield "admin_port and admin_key_file: give both or none"
        if not self.stall_s > 0:
            yield f"stall_s = {self.stall_s}: must be more than 0"
        if self.drain_s < 0:
            yield f"drain_s = {self.drain_s}: must not be negative"
        yield from layout_refusals(self.layout)
        if any(size < 1 for size in self.sizes):
            yield f"sizes = {','.join(map(str, self.sizes))}: must be at least 1"


def main(arguments: Sequence[str]) -> int:
    """Run the command; see :data:`launch.cli.USAGE`."""
    given, overrides, problems = command_line(arguments, ServeConfig(), _REFUSED)
    if "help" in overrides:
        print(help_text(USAGE, options(ServeConfig()), _HIDDEN))
        return 0
    (name,) = positionals(["MODEL_DIR"], given, problems)
    problems += missing_folder(name)
    config, folder = resolve(ServeConfig(), overrides, extra=problems), Path(name)
    if config.channel:
        return _engine(config, folder, arguments)
    config = dataclasses.replace(config, http=_with_keys(config))
    place = check_world(config.layout, config.device)
    refuse(ModelFolderError, check_folder(folder, encoders=True))
    refuse(ConfigError, _model_problems(config, folder))
    if config.channel_key_file:
        read_key(Path(config.channel_key_file))
    elif place is not None and place.local_world < place.world and config.layout.dp > 1:
        raise ConfigError("layout.dp: engines on several machines need --channel-key-file, the same secret on each")
    front = Front(
        host=config.host,
        port=config.port,
        drain_s=config.drain_s,
        stall_s=config.stall_s,
        folder=folder,
        names=config.names,
        http=config.http,
        edge=config.edge,
        admin_port=config.admin_port,
        admin_key=read_secret("admin_key_file", Path(config.admin_key_file)) if config.admin_port else "",
        context=config.engine.context,
        generates=not makes_vectors(folder, config.task),
        sizes=config.sizes or trained_sizes(folder),
        layout=config.layout,
        key_file=config.channel_key_file,
        alike=_alike(config),
    )
    return asyncio.run(serve(front, ["serve", *arguments], place, os.environ))


def _engine(config: ServeConfig, folder: Path, arguments: Sequence[str]) -> int:
    """A process of one engine."""
    layout = dataclasses.replace(config.layout, dp=1)
    ranks_here = config.ranks_here or layout.world
    return on_ranks(
        ["serve", *arguments],
        layout,
        config.device,
        lambda mesh: run_engine(
            folder,
            mesh,
            PRECISIONS[config.precision],
            config.engine,
            task=config.task,
            ranks_here=ranks_here if mesh.device.type == "cpu" else 1,
            address=config.channel,
            key_file=Path(config.channel_key or config.channel_key_file),
        ),
    )


def _alike(config: ServeConfig) -> dict[str, str]:
    """The options that must be the same on every rank, by name."""
    return {leaf.name: str(leaf.default) for leaf in options(config) if leaf.name.split(".")[0] in _ALIKE}


_ALIKE = ("precision", "device", "layout", "engine", "task")
_OF_VECTORS = ("context", "scheduler.budget")


def _model_problems(config: ServeConfig, folder: Path) -> Iterator[str]:
    """Why this model cannot be served so."""
    model = read_config(folder, encoders=True).resolved()
    yield from model.layout_problems(config.layout.tp)
    grows = isinstance(model, DecoderConfig) and model.positions == "rotary" and model.rope.scaling == "dynamic"
    if config.engine.context > model.max_positions and not grows:
        yield f"engine.context = {config.engine.context}: the model was made for {model.max_positions} positions"
    for size in config.sizes:
        if size > model.hidden:
            yield f"sizes = {size}: the model's vectors have {model.hidden} numbers"
    if not makes_vectors(folder, config.task):
        partition(model.layers, config.layout.pp)
        return
    if config.layout.pp > 1:
        yield f"layout.pp = {config.layout.pp}: vectors need the whole model on each rank; use layout.tp or layout.dp"
    for given, plain in zip(options(config.engine), options(EngineConfig()), strict=True):
        if given.default != plain.default and given.name not in _OF_VECTORS:
            yield f"engine.{given.name} = {given.default}: of what generates; {folder} is served for vectors only"


def _with_keys(config: ServeConfig) -> ServerConfig:
    """The limits, with the keys of the file."""
    if not config.keys_file:
        return config.http
    where, seen, problems = f"keys_file = {config.keys_file!r}", dict[str, int](), list[str]()
    try:
        lines = Path(config.keys_file).read_text("utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{where}: {getattr(error, 'strerror', None) or 'is no text'}") from None
    for number, line in enumerate(lines, 1):
        key = line.strip()
        if not key or key.startswith("#"):
            continue
        if key in seen:
            problems.append(f"{where}: line {number}: the key of line {seen[key]} once more")
        seen.setdefault(key, number)
        for problem in ServerConfig(keys=(key,)).problems():
            problems.append(f"{where}: line {number}: {problem.partition(': ')[2]}")
    refuse(ConfigError, problems or ([] if seen else [f"{where}: no key in it"]))
    return dataclasses.replace(config.http, keys=tuple(seen))
