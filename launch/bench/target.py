"""The server that is measured: one that is there, or one that is started for it."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import signal
import sys
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from launch.bench.client import Client
from launch.local import tethered
from parallel.errors import ConfigError, LockstepError

__all__ = ["Target", "known_to", "started", "vocabulary_of"]

_KNOW_IGNORE_EOS = ("lockstep", "vllm", "sglang")


@dataclass(frozen=True, slots=True)
class Target:
    """What a server says of itself.

    Attributes:
        model: name to ask for.
        context: most tokens of a text; None: it does not say.
        ignores_eos: it knows the field ``ignore_eos``.
    """

    model: str
    context: int | None
    ignores_eos: bool


async def known_to(client: Client, model: str) -> Target:
    """What the server says of its models.

    Args:
        client: of it.
        model: that is wanted; empty: its first.

    Raises:
        ConfigError: there is no such server, or no such model.
    """
    answer = await client.send(client.request("GET", "/v1/models"))
    if answer.status != 200:
        why = answer.error or f"status {answer.status}: {answer.body[:200].decode(errors='replace')}"
        raise ConfigError(f"GET /v1/models: {why}")
    try:
        cards = [dict(card) for card in json.loads(answer.body)["data"]]
        names = [str(card["id"]) for card in cards]
    except (ValueError, LookupError, TypeError):
        raise ConfigError("GET /v1/models: is not of OpenAI's interface") from None
    if not names or (model and model not in names):
        raise ConfigError(f"model = {model!r}: the server has {', '.join(names) or 'none'}")
    card = cards[names.index(model)] if model else cards[0]
    context = card.get("max_model_len")
    known = str(card.get("owned_by", "")).lower() in _KNOW_IGNORE_EOS
    return Target(model or names[0], context if isinstance(context, int) else None, known)


def vocabulary_of(folder: Path) -> list[int]:
    """Token ids of a model that are no special ones.

    Raises:
        ConfigError: its folder does not say.
    """
    special: set[int] = set()
    try:
        size = json.loads((folder / "config.json").read_text())["vocab_size"]
        with contextlib.suppress(FileNotFoundError):
            own = json.loads((folder / "tokenizer.json").read_text())
            special = {token["id"] for token in own.get("added_tokens", ()) if token.get("special")}
    except (OSError, ValueError, LookupError, TypeError):
        raise ConfigError(f"{folder}: its config.json does not tell the vocabulary; give --shape.vocabulary") from None
    return [token for token in range(size) if token not in special]


@contextlib.asynccontextmanager
async def started(folder: Path, options: Sequence[str], environ: Mapping[str, str]) -> AsyncIterator[str]:
    """A server of a model on a free port of this machine, for as long as the context lasts; its address.

    Raises:
        ConfigError: it refuses the model or an option.
        LockstepError: it ended by itself.
    """
    command = [sys.executable, "-m", "launch", "serve", str(folder), "--port", "0", *options]
    process = await asyncio.create_subprocess_exec(
        *tethered(command), stderr=asyncio.subprocess.PIPE, env=dict(environ), start_new_session=True
    )
    reading: asyncio.Task[None] | None = None
    try:
        address = await _address(process)
        reading = asyncio.create_task(_forward(process))
        yield address
    finally:
        await _ended(process)
        if reading is not None:
            await reading


async def _address(process: asyncio.subprocess.Process) -> str:
    """Where it listens, once it is ready; what it says goes on to stderr."""
    assert process.stderr is not None
    said: list[str] = []
    while line := (await process.stderr.readline()).decode(errors="replace"):
        if found := re.match(r"(http://\S+) is ready", line):
            print(line, end="", file=sys.stderr, flush=True)
            return found[1]
        said.append(line.rstrip())
    code = await process.wait()
    if code == 2:
        raise ConfigError(said or ["the server refuses to start"])
    raise LockstepError("\n".join([*said[-20:], f"the server ended with exit code {code}"]))


async def _forward(process: asyncio.subprocess.Process) -> None:
    assert process.stderr is not None
    while line := await process.stderr.readline():
        print(line.decode(errors="replace"), end="", file=sys.stderr, flush=True)


async def _ended(process: asyncio.subprocess.Process) -> None:
    for number, grace_s in ((signal.SIGTERM, 5.0), (signal.SIGTERM, 10.0), (signal.SIGKILL, 10.0)):
        if process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, number) if number == signal.SIGKILL else process.send_signal(number)
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(process.wait(), grace_s)
