"""The server against its own engine: throughput, time to the first token, many streams, overload, and its start.

    python benchmarks/serve_http.py [--rounds 5 --threads 2 --overload-s 60 --json FILE]

One model throughout, the 32M-parameter Llama of the other benchmarks with random weights in float32, greedy and without
an end. *Throughput*: 32 streams at once of ``benchmarks/serving.py``'s prompts over HTTP, against ``LLM.generate`` of
the same prompts, in turn, with the server and the engine on the same cores; both keep freed memory. *First token*: one
request at a time, through HTTP against ``AsyncEngine`` in this process, in turn, each once the other is at rest; the
median of the differences.
*Streams*: 256 at once, each of which must be the text of an undisturbed run. *Overload*: three times as many new
requests as can be served, at a steady rate, with a short queue: those that are admitted must finish, the others must
be told 429 within 100 ms. *Start*: from the command to the first token.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import msgspec
import torch
import workload
from report import Claim, add_report_options, finish
from serving import TOTAL, requests

from infer import LLM, EngineConfig, SamplingParams
from infer.aio import AsyncEngine
from infer.cache import CacheConfig
from infer.policy import SchedulerConfig
from launch.memory import keep_freed_memory
from parallel.hf import save_model
from parallel.mesh import Mesh
from parallel.models.build import Build
from parallel.models.decoder import build_model

STREAMS = 256
CACHE = CacheConfig(memory_gib=0.5)
ROOT = Path(__file__).parent.parent


class Server:
    """``lockstep serve`` of a folder, on a port of its own."""

    def __init__(self, folder: Path, threads: int, *options: str) -> None:
        flags = ["--port", "0", "--engine.cache.memory-gib", str(CACHE.memory_gib), *options]
        environ = {**os.environ, "OMP_NUM_THREADS": str(threads)}
        self.began = time.perf_counter()
        command = [sys.executable, "-m", "launch", "serve", str(folder), *flags]
        self.process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environ, cwd=ROOT)
        assert self.process.stderr is not None
        for line in self.process.stderr:
            if found := re.search(r"http://\S+?:(\d+) is ready", line):
                self.port = int(found[1])
                return
        raise RuntimeError("the server did not start")

    def stop(self) -> None:
        """End it, in good order."""
        self.process.send_signal(signal.SIGTERM)
        self.process.communicate()


@contextlib.contextmanager
def serving(folder: Path, threads: int, *options: str) -> Iterator[Server]:
    """A server for the length of a block."""
    server = Server(folder, threads, *options)
    try:
        yield server
    finally:
        server.stop()


class Choice(msgspec.Struct):
    """Of an event."""

    text: str
    finish_reason: str | None


class Told(msgspec.Struct):
    """An event of a streamed completion."""

    choices: list[Choice] = []


class Reply(asyncio.Protocol):
    """A streamed completion, read with as little work as can be: it is done on the cores of the server.

    Attributes:
        began: by the clock.
        status: of the answer.
        first: seconds to the first event, or to the refusal.
        ended: it came to its end.
        over: the connection is.
    """

    told = msgspec.json.Decoder(Told)

    def __init__(self, port: int, prompt: Sequence[int], tokens: int) -> None:
        body = {"model": "model", "prompt": list(prompt), "max_tokens": tokens, "temperature": 0, "ignore_eos": True}
        data = json.dumps({**body, "stream": True}).encode()
        head = f"POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nContent-Type: application/json\r\n"
        self._request = f"{head}Content-Length: {len(data)}\r\nConnection: close\r\n\r\n".encode() + data
        self.began, self.status, self.first, self.ended = time.perf_counter(), 0, 0.0, False
        self.over: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._pieces: list[str] = []
        self._left = b""

    @property
    def text(self) -> str:
        """All of it."""
        return "".join(self._pieces)

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Ask."""
        assert isinstance(transport, asyncio.WriteTransport)
        transport.write(self._request)

    def data_received(self, data: bytes) -> None:
        """Read the events that are there."""
        *lines, self._left = (self._left + data).split(b"\n")
        if not self.status and lines:
            self.status = int(lines[0].split()[1])
            self.first = 0.0 if self.status == 200 else time.perf_counter() - self.began
        for line in lines:
            if line.startswith(b"data: {"):
                self.first = self.first or time.perf_counter() - self.began
                for choice in self.told.decode(line[6:]).choices:
                    self._pieces.append(choice.text)
                    self.ended = self.ended or choice.finish_reason is not None

    def connection_lost(self, exc: Exception | None) -> None:
        """Nothing follows."""
        if not self.over.done():
            self.over.set_result(None)


async def reply(port: int, prompt: Sequence[int], tokens: int) -> Reply:
    """All of a streamed completion."""
    own = Reply(port, prompt, tokens)
    transport, _ = await asyncio.get_running_loop().create_connection(lambda: own, "127.0.0.1", port)
    try:
        await own.over
    finally:
        transport.close()
    return own


def throughput(folder: Path, threads: int, rounds: int) -> tuple[list[Claim], dict[str, Any]]:
    """32 streams against the same prompts offline."""
    prompts, lengths = requests()
    config = EngineConfig(cache=CACHE, scheduler=SchedulerConfig(prefix_cache=False))
    llm = LLM(folder, config=config)
    params = [SamplingParams(max_tokens=n, ignore_eos=True) for n in lengths]

    def offline() -> tuple[float, list[str]]:
        began = time.perf_counter()
        found = llm.generate(prompts, params)
        return time.perf_counter() - began, [one.text for one in found]

    async def online(port: int) -> tuple[float, list[str]]:
        began = time.perf_counter()
        found = await asyncio.gather(*(reply(port, p, n) for p, n in zip(prompts, lengths, strict=True)))
        return time.perf_counter() - began, [one.text for one in found]

    with serving(folder, threads, "--names", "model", "--engine.scheduler.prefix-cache", "false") as server:
        expected, texts = offline()[1], asyncio.run(online(server.port))[1]
        same = sum(a == b for a, b in zip(texts, expected, strict=True))
        seconds = [(offline()[0], asyncio.run(online(server.port))[0]) for _ in range(rounds)]
    ratios = [ours / http for ours, http in seconds]
    ratio = statistics.median(ratios)
    rates = [TOTAL / statistics.median(column) for column in zip(*seconds, strict=True)]
    note = f"{rates[1]:.0f} and {rates[0]:.0f} tokens/s, rounds {min(ratios):.2f} .. {max(ratios):.2f}"
    claims = [
        Claim("throughput of 32 streams, server / engine", ratio, ">= 0.9", ratio >= 0.9, note),
        Claim("texts that are the engine's, of 32", same, "32", same == len(texts)),
    ]
    return claims, {"throughput_s": seconds}


def first_token(folder: Path, threads: int, rounds: int) -> tuple[list[Claim], dict[str, Any]]:
    """What HTTP adds to the time of a first token."""
    prompts = requests()[0][:8]
    llm = LLM(folder, config=EngineConfig(cache=CACHE, scheduler=SchedulerConfig(prefix_cache=False)))

    async def here(engine: AsyncEngine, prompt: Sequence[int]) -> float:
        began = time.perf_counter()
        async with contextlib.aclosing(engine.stream(prompt, SamplingParams(max_tokens=4, ignore_eos=True))) as events:
            async for event in events:
                if event.tokens:
                    return time.perf_counter() - began
        raise AssertionError

    async def there(port: int, prompt: Sequence[int]) -> float:
        return (await reply(port, prompt, 4)).first

    async def run(port: int) -> list[tuple[float, float]]:
        pairs = []
        async with AsyncEngine(llm.engine) as engine:
            for number in range(rounds + 1):
                for prompt in prompts:
                    pair = []
                    for way in (here(engine, prompt), there(port, prompt)):
                        pair.append(await way)
                        await asyncio.sleep(0.05)  # what was under way, and threads that look out for more
                    if number:
                        pairs.append(tuple(pair))
        return pairs

    with serving(folder, threads, "--names", "model", "--engine.scheduler.prefix-cache", "false") as server:
        pairs = asyncio.run(run(server.port))
    medians = [1000 * statistics.median(column) for column in zip(*pairs, strict=True)]
    quarter, added, most = (1000 * q for q in statistics.quantiles((http - own for own, http in pairs), n=4))
    note = f"quartiles {quarter:.1f} and {most:.1f}, medians {medians[1]:.1f} and {medians[0]:.1f} ms, of {len(pairs)}"
    claim = Claim("time to the first token beyond the engine's, ms", added, "< 5", added < 5, note)
    return [claim], {"first_token_s": pairs}


def streams(folder: Path, threads: int) -> tuple[list[Claim], dict[str, Any]]:
    """256 at once."""
    prompts, _ = requests()
    many = [[*prompts[i % len(prompts)][:24], i] for i in range(STREAMS)]

    async def all_of(port: int) -> list[Reply]:
        return await asyncio.gather(*(reply(port, prompt, 16) for prompt in many))

    async def one_by_one(port: int) -> list[str]:
        return [(await reply(port, prompt, 16)).text for prompt in many]

    with serving(folder, threads, "--names", "model") as server:
        began = time.perf_counter()
        found = asyncio.run(all_of(server.port))
        seconds = time.perf_counter() - began
        expected = asyncio.run(one_by_one(server.port))
    lost = sum(one.status != 200 or not one.ended for one in found)
    mixed = sum(one.text != want for one, want in zip(found, expected, strict=True))
    note = f"{STREAMS * 16 / seconds:.0f} tokens/s"
    return [Claim(f"of {STREAMS} streams at once, lost or mixed", lost + mixed, "0", lost + mixed == 0, note)], {}


def overload(folder: Path, threads: int, seconds: float) -> tuple[list[Claim], dict[str, Any]]:
    """Three times what can be served."""
    prompts, _ = requests()
    options = ("--names", "model", "--http.queue-requests", "16", "--http.most-prompts", "16")

    async def capacity(port: int) -> float:
        began = time.perf_counter()
        await asyncio.gather(*(reply(port, prompts[i % 32], 32) for i in range(16)))
        return 16 / (time.perf_counter() - began)

    async def run(port: int) -> list[Reply]:
        await capacity(port)
        rate = 3 * await capacity(port)
        tasks, began = list[asyncio.Task[Reply]](), time.perf_counter()
        while (now := time.perf_counter() - began) < seconds:
            while len(tasks) < now * rate:
                tasks.append(asyncio.create_task(reply(port, prompts[len(tasks) % 32], 32)))
            await asyncio.sleep(0.005)
        return await asyncio.gather(*tasks)

    with serving(folder, threads, *options) as server:
        found = asyncio.run(run(server.port))
    counts = Counter(one.status for one in found)
    refused = sorted(one.first for one in found if one.status == 429)
    slow = 1000 * refused[int(0.99 * len(refused))] if refused else 0.0
    unfinished = sum(one.status == 200 and not one.ended for one in found)
    others = len(found) - counts[200] - counts[429]
    note = (
        f"{counts[200]} served, {counts[429]} refused in {seconds:.0f} s, slowest {1000 * max(refused, default=0):.0f}"
    )
    return [
        Claim(
            "overload: admitted and not finished, or other answers", unfinished + others, "0", not unfinished + others
        ),
        Claim("overload: time of a 429, 99th percentile, ms", slow, "<= 100", bool(refused) and slow <= 100, note),
    ], {"overload": dict(counts)}


def start(folder: Path, threads: int) -> tuple[list[Claim], dict[str, Any]]:
    """From the command to a token."""

    took = []
    for _ in range(3):
        with serving(folder, threads, "--names", "model") as server:
            first = asyncio.run(reply(server.port, [1, 2, 3], 2))
            took.append(first.began + first.first - server.began)
    best = statistics.median(took)
    return [Claim("from the start to the first token, s", best, "< 6", best < 6)], {"start_s": took}


def words(folder: Path) -> None:
    """A tokenizer with a word for each token, so that a text says which tokens it has."""
    from tokenizers import Tokenizer, models

    vocabulary = {f"w{token}": token for token in range(workload.CONFIG.vocabulary)}
    Tokenizer(models.WordLevel(vocabulary, unk_token="w0")).save(str(folder / "tokenizer.json"))


def main() -> int:
    """Measure, print, and return 0 if all went well."""
    assert __doc__ is not None
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--overload-s", type=float, default=60.0)
    add_report_options(parser)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    keep_freed_memory()
    claims: list[Claim] = []
    details: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as name:
        mesh, folder = Mesh.single(), Path(name)
        save_model(build_model(workload.CONFIG, Build(mesh=mesh), workload.WEIGHT_SEED), mesh, folder)
        words(folder)
        for found, more in (
            throughput(folder, args.threads, args.rounds),
            first_token(folder, args.threads, 2 * args.rounds),
            streams(folder, args.threads),
            overload(folder, args.threads, args.overload_s),
            start(folder, args.threads),
        ):
            claims += found
            details |= more
    return finish(args, claims, [details])


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
