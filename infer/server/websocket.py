"""GET /v1/stream: many requests on one WebSocket; the protocol is in docs/server.md."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Iterable, Mapping
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

from pydantic import Field
from starlette.types import Message, Receive, Scope, Send

from infer.server.auth import SUBPROTOCOL
from infer.server.bodies import parse
from infer.server.body import Body
from infer.server.errors import ApiError, invalid
from infer.server.exchange import Exchange, Left, encode, read_large, refuse_socket
from infer.server.server import Endpoint, Server

__all__ = ["WebSockets"]

TOO_LARGE, GOING, IDLE = 1009, 1001, 1000


class Frame(Body):
    """What a client sends."""

    id: Annotated[str, Field(min_length=1, max_length=64)]
    type: Literal["completions", "chat.completions", "responses", "cancel"]
    body: dict[str, Any] | None = None


class WebSockets:
    """The route: one connection each.

    Args:
        server: that answers.
        endpoints: that requests of each type go to.
    """

    def __init__(self, server: Server, endpoints: Mapping[str, Endpoint]) -> None:
        self.server, self.endpoints = server, endpoints

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one connection until its end."""
        await receive()  # that it wants to connect
        error = None
        if not _same_site(scope["headers"], self.server.config.origins):
            error = ApiError(403, "web pages of other sites may not connect", code="other_origin")
        elif self.server.draining:
            error = self.server.unavailable("the server is shutting down", "draining")
        if error is not None:
            await refuse_socket(scope, send, error)
            return
        spoken = SUBPROTOCOL if SUBPROTOCOL in scope.get("subprotocols", ()) else None
        await send({"type": "websocket.accept", "subprotocol": spoken})
        await _Connection(self.server, self.endpoints, scope, receive, send).run()


class _Connection:
    """One that is open."""

    def __init__(
        self, server: Server, endpoints: Mapping[str, Endpoint], scope: Scope, receive: Receive, send: Send
    ) -> None:
        self.server, self.endpoints, self.scope = server, endpoints, scope
        self._receive, self._send = receive, send
        self._open: dict[str, _SocketExchange] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._writing = asyncio.Lock()
        self._scope = asyncio.timeout(None)
        self._code, self._live = IDLE, True

    async def run(self) -> None:
        """Until the client leaves, does not read, or has nothing under way for too long."""
        try:
            async with self._scope:
                self._rest()
                while (message := await self._receive())["type"] != "websocket.disconnect":
                    await self._take(message)
                return
        except (TimeoutError, Left):
            pass
        finally:
            self._live = False
            for exchange in self._open.values():
                exchange.ended.set()
            if self._tasks:
                await asyncio.wait(self._tasks)
        try:
            async with asyncio.timeout(1.0):
                await self._send({"type": "websocket.close", "code": self._code})
        except (TimeoutError, OSError):
            pass  # it does not read

    async def tell(self, value: Mapping[str, Any]) -> None:
        """Send a message.

        Raises:
            Left: the client is gone, or does not read.
        """
        try:
            async with asyncio.timeout(self.server.config.write_s), self._writing:
                await self._send({"type": "websocket.send", "text": encode(value).decode()})
        except (TimeoutError, OSError):
            self._stop(GOING)
            raise Left from None

    def _stop(self, code: int) -> None:
        if self._live and not self._scope.expired():
            self._code = code
            self._scope.reschedule(asyncio.get_running_loop().time())

    def _rest(self) -> None:
        """Wait for the client only so long, while nothing is under way."""
        if not self._live or self._scope.expired() or self._code != IDLE:
            return
        now = asyncio.get_running_loop().time()
        self._scope.reschedule(None if self._open else now + self.server.config.socket_idle_s)

    async def _take(self, message: Message) -> None:
        """What a client has sent; nothing of it is waited for."""
        self._rest()
        data, id = message.get("bytes") or (message.get("text") or "").encode("utf-8", "replace"), None
        try:
            if len(data) > self.server.config.body_bytes:
                self._code = TOO_LARGE
                raise ApiError(413, f"the message is larger than {self.server.config.body_bytes} bytes")
            value = await read_large(bytearray(data), "message")
            given = value.get("id")
            id = given if isinstance(given, str) and len(given) <= 64 else None
            frame = parse(Frame, value)
            self._cancel(frame) if frame.type == "cancel" else self._begin(frame)
        except ApiError as error:
            await self.tell({"id": id, "type": "refused", "status": error.status, **error.body()})
            if self._code == TOO_LARGE:
                raise Left from None

    def _cancel(self, frame: Frame) -> None:
        if frame.id not in self._open:
            raise ApiError(404, "id: nothing of this id is under way", param="id", code="unknown_id")
        if frame.body is not None:
            raise invalid("body: a request is cancelled without one", "body")
        self._open[frame.id].ended.set()

    def _begin(self, frame: Frame) -> None:
        if frame.id in self._open:
            raise ApiError(409, "id: a request of this id is under way", param="id", code="duplicate_id")
        if frame.body is None:
            raise invalid("body: is required", "body", "missing_required_parameter")
        most = self.server.config.socket_requests
        if len(self._open) >= most:
            raise ApiError(429, f"{most} requests are under way on this connection", code="too_many_requests")
        exchange = _SocketExchange(self, frame.id, frame.body)
        self._open[frame.id] = exchange
        task = asyncio.create_task(self._serve(frame, exchange))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _serve(self, frame: Frame, exchange: _SocketExchange) -> None:
        try:
            await self.endpoints[frame.type].serve(exchange)
        finally:
            del self._open[frame.id]
            self._rest()
        try:
            if not exchange.over and self._live:
                await self.tell({"id": frame.id, "type": "cancelled"})
        except Left:
            pass


class _SocketExchange(Exchange):
    """A request of a connection, as the handlers know it.

    Attributes:
        ended: set: its client has cancelled it, or left.
        over: the last message of it was sent.
    """

    def __init__(self, connection: _Connection, key: str, value: dict[str, Any]) -> None:
        self.ended, self.over = asyncio.Event(), False
        super().__init__(connection.scope, self._left, _nowhere, id=secrets.token_hex(12), write_s=1.0)
        self._connection, self._key, self._value = connection, key, value

    async def _left(self) -> Message:
        await self.ended.wait()
        return {"type": "http.disconnect"}

    async def body(self, most: int, seconds: float) -> dict[str, Any]:
        return self._value

    async def json(self, value: Any, status: int = 200, headers: Mapping[str, str] | None = None) -> None:
        self.status = status
        await self._tell("answer", last=True, data=value)

    async def event(self, value: Any, *, named: bool = False) -> None:
        self.status = 200
        await self._tell("event", data=value)

    async def done(self, *, mark: bool = True) -> None:
        await self._tell("done", last=True)

    async def fail(self, error: ApiError) -> None:
        values = list(self.failing(error)) if self.began else []
        if values and all("type" in value for value in values):
            for value in values:
                await self.event(value)
            await self.done()
            return
        self.status = self.status or error.status
        wait = {"retry_after": int(error.headers["retry-after"])} if "retry-after" in error.headers else {}
        await self._tell("error", last=True, status=error.status, **wait, **error.body())

    async def _tell(self, type: str, *, last: bool = False, **more: Any) -> None:
        if self.ended.is_set():
            raise Left
        self.over = self.over or last
        try:
            await self._connection.tell({"id": self._key, "type": type, **more})
        except Left:
            self.outcome = "gone"
            raise


async def _nowhere(message: Message) -> None:
    raise AssertionError("what goes over a WebSocket is told by its connection")


def _same_site(headers: Iterable[tuple[bytes, bytes]], allowed: tuple[str, ...]) -> bool:
    """Whether who connects is no web page, or one of this very address, or one that is allowed."""
    found = {name.lower(): value.decode("latin-1") for name, value in headers}
    origin = found.get(b"origin")
    if origin is None or "*" in allowed or origin in allowed:
        return True
    return urlsplit(origin).netloc.lower() == found.get(b"host", "").lower() != ""
