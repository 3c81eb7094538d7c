"""One request and its answer: reading a body within limits, writing JSON or a stream of events."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import msgspec
from starlette.types import Message, Receive, Scope, Send

from infer.server.errors import ApiError, invalid

__all__ = [
    "DEEPEST",
    "Exchange",
    "Left",
    "check_parts",
    "encode",
    "read_large",
    "read_object",
    "refuse_socket",
    "send_error",
    "send_json",
]

encode = msgspec.json.Encoder().encode
DEEPEST, MOST_FIELDS, MOST_PARTS, MOST_TEXTS, MOST_VALUES = 64, 8192, 1 << 14, 1 << 17, 1 << 19
_PLAIN = frozenset({str, int, float, bool, type(None)})
_JSON = b"application/json"
_LARGE = 1 << 18
"""Bytes of JSON that take milliseconds to read."""


class Left(Exception):
    """The client is gone, or does not read."""


async def send_json(send: Send, status: int, body: bytes, headers: Mapping[str, str], kind: bytes = _JSON) -> None:
    """A whole answer."""
    named = [(name.encode("latin-1"), value.encode("latin-1")) for name, value in headers.items()]
    fixed = [(b"content-type", kind), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": status, "headers": [*fixed, *named]})
    await send({"type": "http.response.body", "body": body})


async def send_error(send: Send, error: ApiError, headers: Mapping[str, str] | None = None) -> None:
    """A whole answer that is an error."""
    await send_json(send, error.status, encode(error.body()), {**error.headers, **(headers or {})})


async def refuse_socket(scope: Scope, send: Send, error: ApiError) -> None:
    """Answer a handshake with an error, where the HTTP server can do so."""
    if "websocket.http.response" not in scope.get("extensions", {}):
        await send({"type": "websocket.close", "code": 1008})
        return

    async def renamed(message: Message) -> None:
        await send({**message, "type": f"websocket.{message['type']}"})

    await send_error(renamed, error)


class Exchange:
    """A request that is being answered.

    Args:
        scope, receive, send: of ASGI.
        id: of the answer.
        write_s: longest wait for the client to read.

    Attributes:
        arrived: when all of it was there, by the monotonic clock.
        status: that was sent; 0: none yet.
        outcome: for statistics, where the status does not say it.
        began: whether the answer has begun.
        failing: what to tell of an error once a stream has begun.
        names: of fields that the client calls otherwise than the engine.
    """

    def __init__(self, scope: Scope, receive: Receive, send: Send, *, id: str, write_s: float) -> None:
        self.scope, self.receive, self.id = scope, receive, id
        self.arrived, self.status, self.outcome = time.monotonic(), 0, ""
        self.names: dict[str, str] = {}
        self.failing: Callable[[ApiError], Iterable[dict[str, Any]]] = lambda error: (error.body(),)
        self._send, self._write_s = send, write_s
        self._line: Callable[[], Any] = scope.get("state", {}).get("line", _no_line)
        self._headers = {"x-request-id": id, "cache-control": "no-store"}

    @property
    def began(self) -> bool:
        """Whether anything was sent."""
        return self.status != 0

    @property
    def salt(self) -> bytes:
        """What separates the caches of who asks."""
        return self.scope.get("state", {}).get("salt", b"")

    def header(self, name: bytes) -> bytes:
        """The only header of this name, or nothing."""
        found = [value for own, value in self.scope["headers"] if own.lower() == name]
        return found[0] if len(found) == 1 else b""

    async def body(self, most: int, seconds: float) -> dict[str, Any]:
        """The JSON object that was sent.

        Args:
            most: bytes.
            seconds: in which it must arrive.

        Raises:
            ApiError: it is too large, too slow, or no JSON object.
            Left: the client is gone.
        """
        if self.header(b"content-type").partition(b";")[0].strip().lower() != _JSON:
            raise invalid("the body must be JSON: Content-Type: application/json")
        length = self.header(b"content-length")
        if length.isdigit() and (len(length) > 18 or int(length) > most):
            raise _too_large(most)
        data = bytearray()
        try:
            async with asyncio.timeout(seconds * random.uniform(0.9, 1.0)):  # those of a crowd end one by one
                more = True
                while more:
                    message = await self.receive()
                    if message["type"] == "http.disconnect":
                        raise Left
                    data += message.get("body", b"")
                    more = message.get("more_body", False)
                    if len(data) > most:
                        raise _too_large(most)
        except TimeoutError:
            late = f"the body did not arrive within {seconds:g} s"
            raise ApiError(408, late, headers={"connection": "close"}) from None
        self.arrived = time.monotonic()
        return await read_large(data, "body")

    async def write(self, message: Message) -> None:
        """Send a part of the answer.

        Raises:
            Left: the client does not read, or is gone.
        """
        try:
            async with asyncio.timeout(self._write_s):
                await self._send(message)
        except (TimeoutError, OSError):
            self.outcome = "gone"
            raise Left from None

    async def json(self, value: Any, status: int = 200, headers: Mapping[str, str] | None = None) -> None:
        """Answer with a value."""
        body = encode(value)
        self.status = status
        await send_json(self.write, status, body, {**self._headers, **(headers or {})})

    async def text(self, text: str, kind: str) -> None:
        """Answer with a text."""
        self.status = 200
        await send_json(self.write, 200, text.encode(), self._headers, kind.encode())

    async def event(self, value: Any, *, named: bool = False) -> None:
        """Answer with one event more; ``named`` by its type."""
        if not self.began:
            self.status = 200
            kind = {**self._headers, "content-type": "text/event-stream; charset=utf-8", "x-accel-buffering": "no"}
            headers = [(name.encode(), text.encode()) for name, text in kind.items()]
            await self.write({"type": "http.response.start", "status": 200, "headers": headers})
        body = _event(value, named)
        await self.write({"type": "http.response.body", "body": body, "more_body": True})

    @property
    def flows(self) -> bool:
        """Whether :meth:`pour` will do."""
        line = self._line()
        return line is not None and line.flows

    def pour(self, values: Iterable[Any], *, named: bool = False) -> None:
        """Answer with some events more, at once; the answer has begun, and :attr:`flows`."""
        self._line().chunk(b"".join(_event(value, named) for value in values))

    async def done(self, *, mark: bool = True) -> None:
        """No event follows, which a last one says if there is a mark."""
        await self.write({"type": "http.response.body", "body": b"data: [DONE]\n\n" if mark else b""})

    async def fail(self, error: ApiError) -> None:
        """Answer with an error; if the answer has begun, as its last event."""
        if self.began:
            for value in self.failing(error):
                await self.event(value, named="type" in value)
            await self.done(mark=False)
            return
        self.status = error.status
        await send_error(self.write, error, self._headers)


def _event(value: Any, named: bool) -> bytes:
    name = b"event: %b\n" % value["type"].encode() if named else b""
    return b"%bdata: %b\n\n" % (name, encode(value))


def _no_line() -> None:
    """The HTTP server is not ours (``infer/server/edge.py``)."""


def _too_large(most: int) -> ApiError:
    return ApiError(413, f"the body is larger than {most} bytes", headers={"connection": "close"})


async def read_large(data: bytearray, what: str) -> dict[str, Any]:
    """As :func:`read_object`, but others may go on between reading and looking at what was read."""
    value = _decoded(data, what)
    if len(data) > _LARGE:
        await asyncio.sleep(0)
    _check(value, what)
    if len(data) > _LARGE:
        await asyncio.sleep(0)
    return value


def read_object(data: bytearray, what: str) -> dict[str, Any]:
    """The JSON object that these bytes are; it is read while everybody waits.

    Raises:
        ApiError: they are none, or one that is too deep or has too many parts.
    """
    value = _decoded(data, what)
    _check(value, what)
    return value


def _decoded(data: bytearray, what: str) -> Any:
    check_parts(data, f"the {what}")
    try:
        return msgspec.json.decode(data)
    except RecursionError:
        raise invalid(f"the {what} is nested too deeply") from None
    except UnicodeDecodeError:
        raise invalid(f"the {what} is not JSON: it is not UTF-8") from None
    except msgspec.DecodeError as error:
        raise invalid(f"the {what} is not JSON: {_reason(str(error)) if data else 'it is empty'}") from None


def _check(value: Any, what: str) -> None:
    if not isinstance(value, dict):
        raise invalid(f"the {what} must be a JSON object")
    if problem := _problem(value):
        raise invalid(f"the {what} {problem}")


def _reason(told: str) -> str:
    """What the reader of JSON says, without its name for the place of a value."""
    if told.startswith("Input data was truncated"):
        return "it ends too early"
    return told.removeprefix("JSON is malformed: ").partition(" - at ")[0].lower()


def check_parts(data: bytes | bytearray, what: str) -> None:
    """Refuse JSON that would take long to read (400), without reading it: signs are counted, first those in texts too.

    Args:
        data: the JSON.
        what: it is.
    """
    signs = (b"[", b"{", b'"', b",")
    lists, objects, marks, commas = (data.count(sign) for sign in signs)
    if lists + objects > MOST_PARTS or marks > 2 * MOST_TEXTS or commas > MOST_VALUES:
        plain = data.replace(rb"\\", b"").replace(rb"\"", b"")
        marks = plain.count(b'"')
        if marks <= 2 * MOST_TEXTS:
            plain = b"".join(plain.split(b'"')[::2])
        lists, objects, _, commas = (plain.count(sign) for sign in signs)
    if marks > 2 * MOST_TEXTS:
        raise invalid(f"{what} has more than {MOST_TEXTS} texts and names of fields")
    if lists + objects > MOST_PARTS:
        raise invalid(f"{what} has more than {MOST_PARTS} lists and objects")
    if commas > MOST_VALUES:
        raise invalid(f"{what} has more than {MOST_VALUES} values")


def _problem(value: dict[str, Any]) -> str | None:
    """Whether it is deeper than :data:`DEEPEST`, or an object in it has more than :data:`MOST_FIELDS`."""
    level: list[Any] = [value]
    for _ in range(DEEPEST):
        deeper: list[Any] = []
        for item in level:
            if isinstance(item, dict):
                if len(item) > MOST_FIELDS:
                    return f"has an object with more than {MOST_FIELDS} fields"
                item = item.values()
            if not _PLAIN.issuperset(map(type, item)):
                deeper += [inner for inner in item if isinstance(inner, dict | list)]
        level = deeper
        if not level:
            return None
    return "is nested too deeply"
