"""A rank of a served engine; the first one speaks with the process that answers clients."""

from __future__ import annotations

import asyncio
import hashlib
import signal
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

import msgspec
import torch

from infer import EngineConfig
from infer.aio import AsyncEngine
from infer.build import build_engine, load_text
from infer.engine import Engine
from infer.lockstep import Replica
from infer.sentences import read_sentences
from infer.server.wire import KEY_BYTES, Channel, Hello, connected
from infer.server.worker import Worker
from infer.vectors import Task, VectorEngine, build_vectors, makes_vectors
from launch.memory import keep_what_is_there
from launch.priority import give_way
from parallel.errors import ConfigError
from parallel.mesh import Mesh

__all__ = ["identity", "read_key", "read_secret", "run_engine"]


def run_engine(
    folder: Path,
    mesh: Mesh,
    dtype: torch.dtype,
    config: EngineConfig,
    *,
    task: Task,
    ranks_here: int,
    address: str,
    key_file: Path,
) -> int:
    """Build this rank's part and serve until the channel is closed; returns the exit code.

    Args:
        folder: of the model.
        mesh: of the engine.
        dtype: of weights and activations.
        config: of the engine.
        task: what for.
        ranks_here: that share this machine's memory.
        address: of the channel, see :func:`~infer.server.wire.connected`.
        key_file: with its key.
    """
    if mesh.device.type == "cpu":
        give_way()  # to the process that speaks with clients
    notes: Sequence[str] = ()
    if makes_vectors(folder, task):
        engine = build_vectors(
            folder, mesh, dtype, tokenizer=None, context=config.context, budget=config.scheduler.budget
        )
    else:
        engine, sizing = build_engine(folder, mesh, dtype, config, tokenizer=load_text(folder), ranks=ranks_here)
        notes = sizing.lines
    replica = Replica(engine, mesh)
    keep_what_is_there()
    if not replica.first:
        replica.follow()
        return 0
    limits = engine.limits
    hello = Hello(version("lockstep"), identity(folder), limits.context, limits.vocabulary, list(notes))
    if isinstance(engine, VectorEngine):
        hello = msgspec.structs.replace(hello, generates=False, probe=engine.probe)
    one = mesh.world.size == 1
    used = engine if one else replica
    asyncio.run(_work(address, read_key(key_file), used, hello, config.scheduler.budget))
    return 0


async def _work(address: str, key: bytes, engine: Engine | Replica | VectorEngine, hello: Hello, budget: int) -> None:
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, lambda: None)  # the server says when: it closes the channel
    channel = await Channel.open(*await connected(address), key, listens=False)
    async with AsyncEngine(engine, budget=budget) as running:
        await Worker(channel, running, hello, lambda: running.stats).run()


def read_secret(option: str, path: Path, least: int = 16) -> str:
    """The content of a file that only its owner may read, without white space around it.

    Args:
        option: where it is named.
        path: of the file.
        least: characters.

    Raises:
        ConfigError: there is none, others may read it, it is too short or no plain text.
    """
    try:
        mode, content = path.stat().st_mode, path.read_text("ascii").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{option} = {str(path)!r}: {getattr(error, 'strerror', None) or error}") from None
    if mode & 0o077:
        raise ConfigError(f"{option} = {str(path)!r}: others may read it; chmod 600")
    if len(content) < least or not content.isprintable() or " " in content:
        raise ConfigError(f"{option} = {str(path)!r}: at least {least} printable characters without spaces are needed")
    return content


def read_key(path: Path) -> bytes:
    """The key of a channel: from a secret of at least 32 characters.

    Raises:
        ConfigError: as :func:`read_secret`.
    """
    return hashlib.sha256(read_secret("channel_key_file", path, KEY_BYTES).encode()).digest()


def identity(folder: Path) -> str:
    """Hash of which model it is and what it makes of texts: its small files, headers and sizes of its weights."""
    digest = hashlib.sha256()
    for name in ("config.json", "generation_config.json", "tokenizer.json", "model.safetensors.index.json"):
        path = folder / name
        digest.update(name.encode() + (path.read_bytes() if path.exists() else b""))
    digest.update(repr(read_sentences(folder)).encode())
    for path in sorted(folder.glob("*.safetensors")):
        with path.open("rb") as file:
            size = int.from_bytes(file.read(8), "little")
            header = file.read(min(size, 1 << 26))
        digest.update(f"{path.name} {path.stat().st_size}".encode() + header)
    return digest.hexdigest()
