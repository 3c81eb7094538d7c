"""The channel between the HTTP process and the engine: who may speak, what is refused, and that nothing is lost."""

from __future__ import annotations

import asyncio
import contextlib
import pickle
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest
import torch
from test_llm import config_of, folders, work  # noqa: F401 - a fixture

from infer import LLM, RequestError, SamplingParams
from infer.aio import AsyncEngine
from infer.completion import Event
from infer.sampling import TokenLogProb
from infer.server.client import RemoteEngine, _Mail
from infer.server.engine import EngineGone
from infer.server.wire import Abort, Add, Channel, ChannelError, Hello, ToEngine, pack, unpack
from infer.server.worker import Worker

KEY = bytes(range(32))
OPEN: list[asyncio.StreamWriter] = []
Streams = tuple[asyncio.StreamReader, asyncio.StreamWriter]


def together(main: Callable[[], Awaitable[None]]) -> None:
    async def closing() -> None:
        try:
            await main()
        finally:
            while OPEN:
                OPEN.pop().close()
            await asyncio.sleep(0)

    asyncio.run(asyncio.wait_for(closing(), 60))


async def pair(place: Path) -> tuple[Streams, Streams]:
    """Both ends of a connection."""
    came: asyncio.Future[Streams] = asyncio.get_running_loop().create_future()
    server = await asyncio.start_unix_server(lambda r, w: came.set_result((r, w)), path=str(place / "s"))
    connected = await asyncio.open_unix_connection(str(place / "s"))
    accepted = await came
    server.close()
    OPEN.extend((connected[1], accepted[1]))
    return accepted, connected


async def channels(place: Path, keys: tuple[bytes, bytes] = (KEY, KEY)) -> list[Channel | BaseException]:
    (r1, w1), (r2, w2) = await pair(place)
    ends = Channel.open(r1, w1, keys[0], listens=True), Channel.open(r2, w2, keys[1], listens=False)
    return await asyncio.gather(*ends, return_exceptions=True)


def test_frames_arrive_as_they_were_sent(tmp_path: Path) -> None:
    async def main() -> None:
        one, other = await channels(tmp_path)
        for size in (0, 1, 1000, 3 << 20):
            one.send(b"x" * size)
            other.send(b"y" * size)
            got = await asyncio.gather(other.receive(), one.receive(), one.drain(), other.drain())
            assert got[:2] == [b"x" * size, b"y" * size]
        one.close()
        with pytest.raises(ChannelError, match="lost"):
            await other.receive()

    together(main)


def test_messages_of_a_round_are_one_frame(tmp_path: Path) -> None:
    async def main() -> None:
        one, other = await channels(tmp_path)
        written: list[bytes] = []
        write, one._writer.write = one._writer.write, written.append  # type: ignore[method-assign]
        sent = [b"a" * size for size in (5, 0, 1 << 19, 1 << 19, 1 << 19, 7)]
        for data in sent:
            one.send(data)
        await asyncio.sleep(0)
        one.send(b"later")
        await asyncio.sleep(0)
        half = 4 + (1 << 19)
        assert [len(frame) - 20 for frame in written] == [9 + 4 + half, half, half + 11, 9]
        for frame in written:
            write(frame)
        assert [await other.receive() for _ in range(len(sent) + 1)] == [*sent, b"later"]
        other.send(b"what is sent before the end arrives")
        other.close()
        assert await one.receive() == b"what is sent before the end arrives"

    together(main)


@pytest.mark.parametrize("frame", [b"\x01", b"\x05\0\0\0four", b"\0\0\0\0\xff\xff\xff\xff1"])
def test_a_frame_that_ends_too_early_closes_the_channel(tmp_path: Path, frame: bytes) -> None:
    async def main() -> None:
        one, other = await channels(tmp_path)
        one._write(frame)
        with pytest.raises(ChannelError, match="ends too early"):
            await other.receive()
        assert other._writer.is_closing()

    together(main)


def test_who_does_not_know_the_key_is_not_heard(tmp_path: Path) -> None:
    async def main() -> None:
        assert all(isinstance(end, ChannelError) for end in await channels(tmp_path, (KEY, KEY[::-1])))

    together(main)


@pytest.mark.parametrize(
    "sent",
    [
        b"\x00" * 200,
        pickle.dumps({"a": 1}) * 9,
        b"lockstep serve 3" + b"n" * 32 + b"\xff" * 4 + b"m" * 16,
        b"GET / HTTP/1.1\r\n\r\n" * 9,
    ],
    ids=["zeros", "pickle", "giant frame", "http"],
)
def test_strangers_are_dropped(tmp_path: Path, sent: bytes) -> None:
    async def main() -> None:
        (r1, w1), (_, w2) = await pair(tmp_path)
        w2.write(sent)
        with pytest.raises(ChannelError):
            await Channel.open(r1, w1, KEY, listens=True)

    together(main)


@pytest.mark.parametrize("how", ["changed", "twice", "reflected", "swapped"])
def test_frames_that_were_tampered_with_close_the_channel(tmp_path: Path, how: str) -> None:
    async def main() -> None:
        one, other = await channels(tmp_path)
        written: list[bytes] = []
        write, one._writer.write = one._writer.write, written.append  # type: ignore[method-assign]
        for data in (b"first", b"other"):
            one.send(data)
            await asyncio.sleep(0)
        first, second = written
        if how == "changed":
            write(first[:-1] + b"X")
        elif how == "twice":
            write(first + first)
            assert await other.receive() == b"first"
        elif how == "swapped":
            write(second + first)
        else:
            other.send(b"mine")
            write(await one._reader.readexactly(4 + 16 + 4 + 4))
        with pytest.raises(ChannelError, match="wrong MAC"):
            await other.receive()
        assert other._writer.is_closing()

    together(main)


@pytest.mark.parametrize("data", [b"", b"\xc1", pickle.dumps(3), b"\x91" * 5000, pack({"type": "Shutdown"})])
def test_messages_that_are_none(data: bytes) -> None:
    with pytest.raises(ChannelError, match="a message that is none"):
        unpack(data, ToEngine)
    assert unpack(pack(Abort(3)), ToEngine) == Abort(3)


@contextlib.asynccontextmanager
async def served(place: Path, llm: LLM, model: str = "m"):
    """An engine at the other end of a socket, and its client."""
    remote = RemoteEngine(KEY, "1")
    server = await asyncio.start_unix_server(remote.accept, path=str(place / "s"))
    channel = await Channel.open(*await asyncio.open_unix_connection(str(place / "s")), KEY, listens=False)
    async with AsyncEngine(llm.engine) as running:
        worker = Worker(channel, running, Hello("1", model, 128, 211, []), lambda: llm.engine.stats)
        task = asyncio.create_task(worker.run())
        await asyncio.wait([asyncio.create_task(remote.ready()), task], return_when=asyncio.FIRST_COMPLETED)
        yield remote, task
        remote.close()
        await task
        server.close()


async def completed(remote: RemoteEngine, prompt: list[int], params: SamplingParams) -> tuple:
    tokens: list[int] = []
    async for event in remote.stream(prompt, params):
        tokens += event.tokens
        if event.completion is not None:
            assert list(event.completion.tokens) == tokens
            return event.completion.choices, event.completion.prompt
    raise AssertionError


def test_completions_are_those_of_the_engine(folders: dict[str, Path], tmp_path: Path) -> None:  # noqa: F811
    prompts, params = work(60)
    more = {"temperature": 0.7, "seed": 5, "logprobs": 2, "logit_bias": {7: 1.5}, "bad_words": ((3, 4),)}
    params = [SamplingParams(max_tokens=p.max_tokens, **(more if i % 3 == 0 else {})) for i, p in enumerate(params)]
    want = [(c.choices, c.prompt) for c in LLM(folders["llama"], config=config_of()).generate(prompts, params)]
    llm = LLM(folders["llama"], config=config_of())

    async def main() -> None:
        async with served(tmp_path, llm) as (remote, _):
            got = await asyncio.gather(*(completed(remote, p, own) for p, own in zip(prompts, params, strict=True)))
            assert got == want
            with pytest.raises(RequestError, match="the prompt is empty"):
                await completed(remote, [], SamplingParams())
            assert await remote.ping(5.0)
            documents = [[7, 8, 9], [10], [11] * 30]
            vectors, _ = await asyncio.gather(
                remote.embed(documents), completed(remote, [5], SamplingParams(max_tokens=5))
            )
            assert torch.tensor(vectors).allclose(llm.embed(documents))
            with pytest.raises(RequestError, match="empty"):
                await remote.embed([[1], []])
            for _ in range(40):
                await asyncio.sleep(0.05)
                if (stats := remote.stats()) is not None and stats == llm.engine.stats:
                    break
            assert remote.stats() == llm.engine.stats

    together(main)


def test_who_stops_listening_ends_the_request(folders: dict[str, Path], tmp_path: Path) -> None:  # noqa: F811
    llm = LLM(folders["llama"], config=config_of())

    async def main() -> None:
        async with served(tmp_path, llm) as (remote, _):
            async with contextlib.aclosing(
                remote.stream([7, 8], SamplingParams(max_tokens=120, ignore_eos=True))
            ) as events:
                async for _event in events:
                    break
            for _ in range(100):
                await asyncio.sleep(0.02)
                if not llm.engine.busy:
                    break
            assert not llm.engine.busy
            assert llm.engine.stats.used == (0,)

    together(main)
    llm.engine.scheduler.check()


def test_an_engine_that_goes_is_told_to_everybody_and_may_come_again(
    folders: dict[str, Path],  # noqa: F811
    tmp_path: Path,
) -> None:
    async def main() -> None:
        async with served(tmp_path, LLM(folders["llama"], config=config_of())) as (remote, task):
            stream = remote.stream([7, 8], SamplingParams(max_tokens=120, ignore_eos=True))
            await anext(stream)
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
            with pytest.raises(EngineGone):
                async for _ in stream:
                    pass
            assert not await remote.ping(1.0)
            with pytest.raises(EngineGone, match="not there"):
                await anext(remote.stream([7]))

    with contextlib.suppress(asyncio.CancelledError):
        together(main)


def test_another_model_or_version_is_refused(folders: dict[str, Path], tmp_path: Path) -> None:  # noqa: F811
    async def main() -> None:
        (r1, w1), (r2, w2) = await pair(tmp_path)
        remote = RemoteEngine(KEY, "2")
        accepting = asyncio.create_task(remote.accept(r1, w1))
        channel = await Channel.open(r2, w2, KEY, listens=False)
        channel.send(pack(Hello("1", "m", 128, 211, [])))
        await accepting
        assert remote.hello is None
        channel.send(pack(Add(1, [1], {}, 0, b"")))
        with pytest.raises(ChannelError):
            await channel.receive()

    together(main)


def test_events_that_wait_are_taken_as_one_and_none_is_lost() -> None:
    async def main() -> None:
        mail, error = _Mail(None), EngineGone("gone")
        logprob = TokenLogProb(1, -0.5, ())
        one = [Event(3, 0, "a", (1,), (logprob,)), Event(3, 0, "", (2,), ()), Event(3, 0, "bc", (3, 4), (logprob,))]
        other = [Event(3, 1, "x", (5,)), Event(3, 0, "d", (6,), (), "stop"), Event(3, 0, "never after the end", (7,))]
        waiting = asyncio.create_task(mail.take())
        await asyncio.sleep(0)
        assert not waiting.done()
        mail.put(one[0])
        assert await waiting is one[0]
        for event in (*one, *other, error):
            mail.put(event)
        assert await mail.take() == Event(3, 0, "abc", (1, 2, 3, 4), (logprob, logprob))
        assert await mail.take() is other[0]
        assert await mail.take() is other[1]
        assert await mail.take() is other[2]
        assert await mail.take() is error

    together(main)


def test_events_that_are_waited_for_are_dealt_with_at_once_and_in_order() -> None:
    async def main() -> None:
        takes, taken, got = True, list[str](), list[str]()

        def at_once(event: Event) -> bool:
            if event.text == "bad":
                raise ValueError("bad")
            if takes:
                taken.append(event.text)
            return takes

        mail = _Mail(at_once)

        async def reader() -> None:
            while True:
                event = await mail.take()
                if isinstance(event, BaseException):
                    raise event
                got.append(event.text)

        task = asyncio.create_task(reader())
        await asyncio.sleep(0)
        for text in ("first", "behind it"):  # the first is always given, and so is what comes before it was taken
            mail.put(Event(1, 0, text, (1,)))
        await asyncio.sleep(0)
        assert (got, taken) == (["firstbehind it"], []) or (got, taken) == (["first", "behind it"], [])
        mail.put(Event(1, 0, "a", (1,)))
        mail.put(Event(1, 0, "b", (1,)))
        assert taken == ["a", "b"]
        takes = False
        mail.put(Event(1, 0, "c", (1,)))
        takes = True
        mail.put(Event(1, 0, "d", (1,)))  # "c" is before it
        assert taken == ["a", "b"]
        await asyncio.sleep(0)
        assert "".join(got) == "firstbehind itcd"
        await asyncio.sleep(0)
        mail.put(Event(1, 0, "e", (1,)), behind=True)
        mail.put(Event(1, 0, "f", (1,)))
        await asyncio.sleep(0)
        assert taken == ["a", "b"] and got[-1] == "ef"
        await asyncio.sleep(0)
        mail.put(Event(1, 0, "bad", (1,)))
        with pytest.raises(ValueError, match="bad"):
            await task
        mail.put(Event(1, 0, "nobody waits", (1,)))
        assert taken == ["a", "b"]

    together(main)
