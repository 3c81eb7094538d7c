"""``bench serve URL|MODEL_DIR``: latency and throughput of a server under load."""

from __future__ import annotations

import asyncio
import contextlib
import math
import os
import signal
import sys
from collections.abc import AsyncIterator, Coroutine, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from launch.bench.client import Client
from launch.bench.config import BenchConfig
from launch.bench.measure import Record, summary
from launch.bench.report import as_json, paint, row, table_head
from launch.bench.run import closed_loop, open_loop
from launch.bench.target import Target, known_to, started, vocabulary_of
from launch.bench.workload import Ask, arrivals, asks, longest
from launch.cli import command_line, help_text, positionals
from parallel.config import options, resolve
from parallel.errors import ConfigError, nearest, refuse

__all__ = ["main"]

USAGE = """lockstep bench serve URL|MODEL_DIR [--rates 1,2,4 | --concurrencies 1,8,32] [--OPTION VALUE ...]

URL: any server of OpenAI's interface (http://127.0.0.1:8000). MODEL_DIR: one is started for it, and stopped; its own
options are given as --server.OPTION (--server.layout.tp 2)."""
_P = TypeVar("_P")


def main(arguments: Sequence[str]) -> int:
    """Run the command; see :data:`launch.cli.USAGE`."""
    given, overrides, problems = command_line(arguments, BenchConfig())
    if "help" in overrides or not given:
        print(help_text(USAGE, options(BenchConfig())))
        return 0 if "help" in overrides else 2
    if given[0] != "serve":
        raise ConfigError(f"bench {given[0]}: there is only bench serve{nearest(given[0], ['serve'])}")
    own = overrides.pop("server", {})
    if not isinstance(own, Mapping):
        problems.append("server is a group of options of lockstep serve (--server.layout.tp 2), not a value")
        own = {}
    (target,) = positionals(["URL|MODEL_DIR"], given[1:], problems)
    if target and "://" not in target and not Path(target).is_dir():
        problems.append(f"{target}: is neither an address (http://...) nor a folder")
    elif "://" in target and own:
        problems.append("server: these options are of a server that is started; this one is there already")
    elif "://" in target:
        try:
            Client(target)
        except ConfigError as error:
            problems += error.problems
    config = resolve(BenchConfig(), overrides, extra=problems)
    return asyncio.run(_bench(target, config, list(_flags(own))))


def _flags(table: Mapping[str, Any], prefix: str = "--") -> list[str]:
    """A table of options as they were given."""
    found: list[str] = []
    for name, value in table.items():
        if isinstance(value, Mapping):
            found += _flags(value, f"{prefix}{name}.")
        else:
            found.append(f"{prefix}{name}" + ("" if value.bare else f"={value}"))
    return found


async def _bench(target: str, config: BenchConfig, flags: Sequence[str]) -> int:
    """Measure every load; what there is is printed and written, however it ends."""
    stop, signals = asyncio.Event(), list[int]()

    def note(number: int) -> None:
        signals.append(number)
        stop.set()

    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, note, number)
    key = Path(config.key_file).read_text().strip() if config.key_file else ""
    async with contextlib.AsyncExitStack() as stack:
        url = await _unless(stop, stack.enter_async_context(_address(target, flags)))
        if url is None:
            return 128 + signals[0]
        client = Client(url, key, config.timeout_s)
        try:
            about = await _unless(stop, known_to(client, config.model))
            if about is None:
                return 128 + signals[0]
            vocabulary = _vocabulary(target, config)
            refuse(ConfigError, _fits(config, about))
            loads = await _sweep(client, config, about, vocabulary, stop)
        finally:
            client.close()
    if config.out:
        Path(config.out).write_text(as_json(target, about.model, config, loads, interrupted=stop.is_set()))
        print(f"{config.out}: written")
    if config.png and loads:
        paint(loads, config, Path(config.png), f"{about.model} · {_words(config)}")
        print(f"{config.png}: written")
    if signals:
        return 128 + signals[0]
    return 0 if all("ok" in load["outcomes"] for load in loads) else 1


async def _unless(stop: asyncio.Event, work: Coroutine[Any, Any, _P]) -> _P | None:
    """What ``work`` returns; None: ``stop`` came first, and it was cancelled."""
    doing, stopped = asyncio.create_task(work), asyncio.create_task(stop.wait())
    await asyncio.wait([doing, stopped], return_when=asyncio.FIRST_COMPLETED)
    stopped.cancel()
    if doing.done():
        return doing.result()
    doing.cancel()
    await asyncio.wait([doing])
    return None


@contextlib.asynccontextmanager
async def _address(target: str, flags: Sequence[str]) -> AsyncIterator[str]:
    if "://" in target:
        yield target
    else:
        async with started(Path(target), flags, os.environ) as url:
            yield url


def _vocabulary(target: str, config: BenchConfig) -> list[int] | None:
    """Token ids that prompts are drawn from; None: they are texts."""
    shape = config.shape
    if shape.file or shape.tokens == "texts" or config.endpoint == "chat":
        return None
    if shape.vocabulary is not None:
        return list(range(shape.vocabulary))
    if "://" not in target:
        return vocabulary_of(Path(target))
    if shape.tokens == "ids":
        raise ConfigError("shape.tokens = ids: the vocabulary is not known; give --shape.vocabulary")
    return None


def _fits(config: BenchConfig, about: Target) -> list[str]:
    most = longest(config.shape)
    if config.shape.file or about.context is None or most <= about.context:
        return []
    return [f"shape: prefix, input and output may be {most} tokens; the context of {about.model} is {about.context}"]


def _body(ask: Ask, config: BenchConfig, about: Target) -> tuple[str, dict[str, Any]]:
    """Route and body of a request."""
    body: dict[str, Any] = {"model": about.model, "max_tokens": ask.output, "temperature": config.temperature}
    body |= {"stream": True, "stream_options": {"include_usage": True}}
    if config.ignore_eos == "true" or (config.ignore_eos == "auto" and about.ignores_eos):
        body["ignore_eos"] = True
    if isinstance(ask.prompt, dict):
        return "/v1/chat/completions", body | ask.prompt
    return "/v1/completions", body | {"prompt": ask.prompt}


async def _sweep(
    client: Client, config: BenchConfig, about: Target, vocabulary: Sequence[int] | None, stop: asyncio.Event
) -> list[dict[str, Any]]:
    """The numbers of each load, printed as they come."""

    def requests(load: int | None) -> list[bytes]:
        found = asks(config, load, vocabulary)
        return [client.request("POST", *_body(ask, config, about)) for ask in found]

    before, _, _ = await closed_loop(client, requests(None), 4, stop)
    failed = [record for record in before if record.outcome not in ("ok", "cut", "unsent")]
    if before and len(failed) == len(before):
        raise ConfigError(f"no request was answered: {failed[0].outcome}: {failed[0].error or 'no message'}")
    found: list[dict[str, Any]] = []
    for number, load in enumerate(config.loads):
        if stop.is_set():
            break
        if number and config.pause_s:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(stop.wait(), config.pause_s)
        records, seconds, cpu = await _load(client, config, load, number, requests(number), stop)
        numbers = {"load": None if math.isinf(load) else load, **summary(records, config.objective, seconds, cpu)}
        if config.details:
            numbers["requests"] = [_detail(record) for record in records]
        print(*([] if found else table_head(config)), row(numbers, config), sep="\n", flush=True)
        found.append(numbers)
    _warn(found)
    return found


async def _load(
    client: Client, config: BenchConfig, load: float, number: int, requests: Sequence[bytes], stop: asyncio.Event
) -> tuple[list[Record], float, float]:
    if not config.open:
        return await closed_loop(client, requests, int(load), stop, config.seconds)
    most = math.inf if config.seconds is None else config.seconds
    dues = [due if due < most else math.inf for due in arrivals(config, load, number)]
    return await open_loop(client, requests, dues, stop, config.most_in_flight)


def _detail(record: Record) -> dict[str, Any]:
    names = ("due", "sent", "ended", "prompt_tokens", "output_tokens", "cached_tokens", "outcome", "error", "chunks")
    values = {name: getattr(record, name) for name in names}
    return {name: None if isinstance(v, float) and not math.isfinite(v) else v for name, v in values.items()}


def _warn(loads: Sequence[Mapping[str, Any]]) -> None:
    """Say where this program may be what was measured, or where answers failed."""
    for load in loads:
        for outcome, message in load["errors"].items():
            print(f"load {load['load']}: {load['outcomes'][outcome]} x {outcome}: {message}", file=sys.stderr)
        if load["client_cpu_share"] > 0.7:
            share = f"{100 * load['client_cpu_share']:.0f}%"
            print(
                f"load {load['load']}: this program used {share} of a core; it may be the bottleneck", file=sys.stderr
            )


def _words(config: BenchConfig) -> str:
    shape = config.shape
    if shape.file:
        return f"prompts of {Path(shape.file).name}"
    prefix = f"{shape.prefix_tokens} shared of {shape.prefixes} + " if shape.prefixes else ""
    return f"{prefix}{shape.input} tokens in, {shape.output} out"
