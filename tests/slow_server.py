"""A server of OpenAI's interface that says nothing, but when it is told to: what a measuring client is measured by."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from dataclasses import dataclass, field
from typing import Any

__all__ = ["Seen", "SlowServer"]


@dataclass
class Seen:
    """A request that came: its route and body, when it did, and when each of its pieces was written."""

    path: str
    body: dict[str, Any]
    came: float
    wrote: list[float] = field(default_factory=list)


class SlowServer:
    """Answers with its first piece after ``first_s``, and with the others ``each_s`` after one another.

    Args:
        first_s, each_s: seconds.
        one_by_one: it answers one request at a time, the others wait.
        kinds: of answers, in turn: ``ok``, ``429``, ``500``, ``cut``, ``error``, ``hang``, ``bytewise``, ``leaves``.
    """

    def __init__(
        self, first_s: float = 0.0, each_s: float = 0.0, *, one_by_one: bool = False, kinds: tuple[str, ...] = ("ok",)
    ) -> None:
        self.first_s, self.each_s, self.kinds = first_s, each_s, kinds
        self.seen: list[Seen] = []
        self._lock = asyncio.Lock() if one_by_one else None
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever)

    def __enter__(self) -> SlowServer:
        self._thread.start()
        self._server = asyncio.run_coroutine_threadsafe(
            asyncio.start_server(self._talk, "127.0.0.1", 0), self._loop
        ).result(5)
        self.url = f"http://127.0.0.1:{self._server.sockets[0].getsockname()[1]}"
        return self

    def __exit__(self, *error: object) -> None:
        async def end() -> None:
            self._server.close()
            tasks = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

        asyncio.run_coroutine_threadsafe(end(), self._loop).result(5)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(5)
        self._loop.close()

    async def _talk(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).decode()
                length = next((int(v[15:]) for v in head.split("\r\n") if v.lower().startswith("content-length:")), 0)
                body = json.loads(await reader.readexactly(length)) if length else {}
                path = head.split(" ")[1]
                if path == "/v1/models":
                    card = {"id": "slow", "owned_by": "someone", "max_model_len": 1000}
                    self._whole(writer, 200, {"data": [card]})
                    continue
                seen = Seen(path, body, time.perf_counter())
                kind = self.kinds[len(self.seen) % len(self.kinds)]
                self.seen.append(seen)
                if self._lock is None:
                    await self._answer(writer, seen, kind)
                else:
                    async with self._lock:
                        await self._answer(writer, seen, kind)
                if kind in ("cut", "leaves"):
                    break
        except (asyncio.IncompleteReadError, ConnectionError, asyncio.CancelledError):
            pass
        finally:
            writer.close()

    async def _answer(self, writer: asyncio.StreamWriter, seen: Seen, kind: str) -> None:
        if kind in ("429", "500"):
            self._whole(writer, int(kind), {"error": {"message": f"a {kind}"}})
            return
        due = time.perf_counter() + self.first_s
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n")
        count = seen.body["max_tokens"]
        for index in range(count):
            await asyncio.sleep(due - time.perf_counter())
            due += self.each_s
            seen.wrote.append(time.perf_counter())
            if index == 1 and kind == "cut":
                return
            if index == 1 and kind == "error":
                await self._event(writer, {"error": {"message": "it broke"}}, kind)
                writer.write(b"0\r\n\r\n")
                return
            if kind == "hang":
                await asyncio.sleep(60)
            choice = {"text": "a"} if seen.path == "/v1/completions" else {"delta": {"content": "a"}}
            await self._event(writer, {"choices": [{"index": 0, **choice}]}, kind)
        await self._event(writer, {"choices": [{"index": 0, "text": "", "finish_reason": "length"}]}, kind)
        usage = {"prompt_tokens": 7, "completion_tokens": count, "prompt_tokens_details": {"cached_tokens": 3}}
        await self._event(writer, {"choices": [], "usage": usage}, kind)
        await self._send(writer, b"data: [DONE]\n\n", kind)
        writer.write(b"0\r\n\r\n")

    async def _event(self, writer: asyncio.StreamWriter, value: Any, kind: str) -> None:
        await self._send(writer, b"data: " + json.dumps(value).encode() + b"\n\n", kind)

    async def _send(self, writer: asyncio.StreamWriter, data: bytes, kind: str) -> None:
        framed = b"%x\r\n%b\r\n" % (len(data), data)
        for part in [bytes([byte]) for byte in framed] if kind == "bytewise" else [framed]:
            writer.write(part)
            await writer.drain()

    @staticmethod
    def _whole(writer: asyncio.StreamWriter, status: int, value: Any) -> None:
        body = json.dumps(value).encode()
        head = f"HTTP/1.1 {status} X\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
        writer.write(head.encode() + body)
