"""A small HTTP/1.1 client for streams of events, cheap enough not to be what is measured."""

from __future__ import annotations

import asyncio
import json
import ssl
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal
from urllib.parse import urlsplit

from parallel.errors import ConfigError

__all__ = ["Answer", "Client", "clock"]

clock = time.perf_counter
_LARGEST_HEAD = 1 << 16
_LARGEST_ERROR = 1 << 16


@dataclass(slots=True)
class Answer:
    """What came back.

    Attributes:
        status: of HTTP; 0: none came.
        chunks: when each piece of text came, by :func:`time.perf_counter`.
        usage: the last that was told.
        finished: the stream told that it was whole.
        error: of an event, of a body that is no stream, or of the connection.
        ended: when it was over.
        body: of an answer that is no stream.
    """

    status: int = 0
    chunks: list[float] = field(default_factory=list)
    usage: dict[str, Any] = field(default_factory=dict)
    finished: bool = False
    error: str = ""
    ended: float = 0.0
    body: bytes = b""

    def event(self, data: bytes, now: float) -> None:
        """One event of the stream."""
        if data == b"[DONE]":
            self.finished = True
            return
        try:
            value = json.loads(data)
            if error := value.get("error"):
                self.error = str(error.get("message", error) if isinstance(error, dict) else error)[:300]
            self.usage = value.get("usage") or self.usage
            choices = value.get("choices")
            if choices and (_says(choices[0]) or (choices[0].get("finish_reason") and not self.chunks)):
                self.chunks.append(now)
        except (ValueError, AttributeError, LookupError, TypeError):
            self.error = "an event that is not of OpenAI's interface"


def _says(choice: dict[str, Any]) -> bool:
    if choice.get("text"):
        return True
    delta = choice.get("delta")
    return bool(delta) and any(delta.get(name) for name in ("content", "reasoning_content", "tool_calls"))


class _Connection(asyncio.Protocol):
    """One at a time: a request, and what is read of its answer."""

    def __init__(self) -> None:
        self.buffer = bytearray()
        self.done: asyncio.Future[None] | None = None
        self.reusable = False
        self.heard = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport

    def ask(self, request: bytes, answer: Answer) -> asyncio.Future[None]:
        self.answer, self.heard, self.reusable = answer, False, False
        self.buffer.clear()
        self._read: Callable[[float], bool] = self._head
        self._left, self._events, self._keep, self._rest = 0, False, False, bytearray()
        self.done = asyncio.get_running_loop().create_future()
        self.transport.write(request)
        return self.done

    def data_received(self, data: bytes) -> None:
        now = clock()
        self.heard = True
        self.buffer += data
        if self.done is None or self.done.done():
            self.reusable = False  # nobody asked for this
            self.transport.close()
            return
        try:
            while self._read(now):
                pass
        except ValueError:
            self._end(now, "an answer that is no HTTP/1.1")

    def connection_lost(self, exc: Exception | None) -> None:
        if self.done is not None and not self.done.done():
            whole = self._left == -1 and self._read == self._until_closed
            self._end(clock(), "" if whole else "the connection was closed")
        self.reusable = False

    def _end(self, now: float, error: str = "") -> None:
        self.answer.ended, self.reusable = now, self._keep and not error
        self.answer.error = self.answer.error or error
        if not self._events:
            self.answer.body = bytes(self._rest)
        assert self.done is not None
        if not self.done.done():
            self.done.set_result(None)

    def _head(self, now: float) -> bool:
        end = self.buffer.find(b"\r\n\r\n")
        if end < 0:
            if len(self.buffer) > _LARGEST_HEAD:
                raise ValueError
            return False
        first, *lines = bytes(self.buffer[:end]).decode("latin-1").split("\r\n")
        del self.buffer[: end + 4]
        version, status, *_ = first.split(" ", 2)
        headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
        if int(status) < 200:
            return True
        self.answer.status = int(status)
        self._keep = version == "HTTP/1.1" and "close" not in headers.get("connection", "").lower()
        self._events = headers.get("content-type", "").startswith("text/event-stream")
        if "chunked" in headers.get("transfer-encoding", "").lower():
            self._read = self._size
        elif "content-length" in headers:
            self._left, self._read = int(headers["content-length"]), self._sized
        else:
            self._left, self._read, self._keep = -1, self._until_closed, False
        return True

    def _size(self, now: float) -> bool:
        end = self.buffer.find(b"\r\n")
        if end < 0:
            return False
        self._left = int(self.buffer[:end].partition(b";")[0], 16)
        del self.buffer[: end + 2]
        self._read = self._chunk if self._left else self._trailer
        return True

    def _chunk(self, now: float) -> bool:
        if len(self.buffer) < self._left + 2:
            return False
        self._take(self.buffer[: self._left], now)
        del self.buffer[: self._left + 2]
        self._read = self._size
        return True

    def _trailer(self, now: float) -> bool:
        end = self.buffer.find(b"\r\n")
        if end < 0:
            return False
        line = bytes(self.buffer[:end])
        del self.buffer[: end + 2]
        if line:
            return True
        self._end(now)
        return False

    def _sized(self, now: float) -> bool:
        part = self.buffer[: self._left]
        self._left -= len(part)
        self._take(part, now)
        del self.buffer[: len(part)]
        if not self._left:
            self._end(now)
        return False

    def _until_closed(self, now: float) -> bool:
        self._take(self.buffer, now)
        self.buffer.clear()
        return False

    def _take(self, data: bytes | bytearray, now: float) -> None:
        rest = self._rest
        rest += data
        if not self._events:
            del rest[_LARGEST_ERROR:]
            return
        if (end := rest.rfind(b"\n")) >= 0:
            for line in bytes(rest[:end]).split(b"\n"):
                if line.startswith(b"data:"):
                    self.answer.event(line[5:].strip(), now)
            del rest[: end + 1]


class Client:
    """Connections to one server; those that are idle are used again.

    Args:
        url: of the server, with or without ``/v1``.
        key: of the API; empty: none.
        timeout_s: longest wait for an answer.

    Raises:
        ConfigError: no such address can be.
    """

    def __init__(self, url: str, key: str = "", timeout_s: float = 600.0) -> None:
        try:
            parts = urlsplit(url)
            port = parts.port
        except ValueError:
            raise ConfigError(f"{url}: is no address") from None
        if parts.scheme not in ("http", "https") or not parts.hostname or parts.username or parts.query:
            raise ConfigError(f"{url}: must be http://HOST:PORT or https://HOST:PORT, with a path if need be")
        self._tls = ssl.create_default_context() if parts.scheme == "https" else None
        self._host, self._port = parts.hostname, port or (443 if self._tls else 80)
        self._path = parts.path.rstrip("/").removesuffix("/v1")
        self._fixed = f"Host: {parts.netloc}\r\nAccept: */*\r\n" + f"Authorization: Bearer {key}\r\n" * bool(key)
        self._timeout_s = timeout_s
        self._idle: list[_Connection] = []

    def request(self, method: Literal["GET", "POST"], path: str, body: Any = None) -> bytes:
        """A request, as it is sent."""
        data = b"" if body is None else json.dumps(body).encode()
        kind = "" if body is None else f"Content-Type: application/json\r\nContent-Length: {len(data)}\r\n"
        return f"{method} {self._path}{path} HTTP/1.1\r\n{self._fixed}{kind}\r\n".encode() + data

    async def send(self, request: bytes) -> Answer:
        """The answer; what goes wrong is in it. Whoever cancels this leaves the server at once."""
        answer, connection = Answer(), None
        try:
            async with asyncio.timeout(self._timeout_s):
                while True:
                    connection = self._used()
                    used = connection is not None
                    connection = connection or await self._connect()
                    await connection.ask(request, answer)
                    if not (used and answer.error and not connection.heard):  # else it was closed just then
                        break
                    answer = Answer()
        except TimeoutError:
            answer.error = answer.error or "timeout"
        except OSError as error:
            answer.error = f"cannot connect: {error.strerror or type(error).__name__}"
        finally:
            if connection is not None:
                if connection.reusable:
                    self._idle.append(connection)
                else:
                    connection.transport.abort()
        answer.ended = answer.ended or clock()
        return answer

    def _used(self) -> _Connection | None:
        """A connection that is idle and open."""
        while self._idle:
            connection = self._idle.pop()
            if not connection.transport.is_closing():
                return connection
        return None

    async def _connect(self) -> _Connection:
        loop = asyncio.get_running_loop()
        return (await loop.create_connection(_Connection, self._host, self._port, ssl=self._tls))[1]

    def close(self) -> None:
        """Let go of what is idle."""
        for connection in self._idle:
            connection.transport.close()
        self._idle.clear()
