"""HTTP/1.1 as it comes in: what is no well-formed request, too large, too slow or too much ends before the application.

uvicorn's protocol on h11, made strict. A head is read once it is whole, and refused where another server on the way may
have read it otherwise: bare line feeds, folded lines, two lengths. Every wait for a client has an end.
"""

from __future__ import annotations

import asyncio
import random
import re
import resource
import socket
import weakref
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import h11
from h11._receivebuffer import ReceiveBuffer
from h11._writers import ChunkedWriter
from uvicorn.protocols.http.h11_impl import H11Protocol

from infer.server.errors import ApiError
from infer.server.exchange import encode
from parallel.config import option

__all__ = ["AT_ONCE", "EdgeConfig", "Listener", "edge", "room"]

AT_ONCE = 64
"""Connections that are taken before anything else is done: uvicorn's ``backlog``."""
_QUEUE = 1024
"""Connections that the system keeps until they are taken."""

_SPARE_FILES = 64
"""That are open besides connections."""
_LINGER_S = 3.0
_BEHIND = 64 << 10
"""Bytes that may come while a request is answered; beyond them nothing is read, and a client's leaving is not seen."""
_CRLF2 = b"\r\n\r\n"
_LOOSE = re.compile(rb"(?<!\r)\n|\r(?!\n|\Z)|\0")
_FOLDED = re.compile(rb"\n[ \t]")
_LENGTHS = re.compile(rb"(?i)\ncontent-length[ \t]*:([^\r]*)")
_VERSION = re.compile(rb"[^\r]* HTTP/1\.([01])\r")
_CODINGS = re.compile(rb"(?i)\ntransfer-encoding[ \t]*:")


@dataclass(frozen=True, slots=True, kw_only=True)
class EdgeConfig:
    """How much of a connection is borne."""

    connections: int = option(4096, "open at a time; when there are more, idle ones are closed, else new ones refused")
    header_bytes: int = option(32768, "most bytes of a request's head; more are answered 431")
    headers: int = option(100, "most header fields; more are answered 431")
    header_s: float = option(10.0, "longest time until the head of a request is there")
    idle_s: float = option(5.0, "longest wait for the next request of a connection")
    rest_s: float = option(10.0, "longest time in which a body that nobody wants any more may go on arriving")

    unread_bytes: int = option(1 << 18, "that the system keeps for a client who does not read")

    def problems(self) -> Iterator[str]:
        """Why there can be no such limits."""
        leasts = (("connections", 1), ("header_bytes", 1024), ("headers", 8), ("unread_bytes", 4096))
        for name, least in leasts:
            if getattr(self, name) < least:
                yield f"{name} = {getattr(self, name)}: must be at least {least}"
        for name in ("header_s", "idle_s", "rest_s"):
            if not getattr(self, name) > 0:
                yield f"{name} = {getattr(self, name):g}: must be more than 0"


def room(most: int) -> int:
    """Allow this process as many open files as it may have; how many connections fit, at most ``most``."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard == resource.RLIM_INFINITY or soft < hard:
        wanted = most + 2 * _SPARE_FILES if hard == resource.RLIM_INFINITY else hard
        soft = max(soft, wanted)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    return max(1, min(most, soft - _SPARE_FILES))


def edge(config: EdgeConfig) -> type[asyncio.Protocol]:
    """A class for ``uvicorn.Config(http=...)``; its connections are counted together."""
    waiting: dict[_Edge, None] = {}

    class Edge(_Edge):
        limits, open = config, waiting

    return Edge


class Listener(socket.socket):
    """A listening socket that keeps more connections waiting than the event loop, which names one number, takes."""

    def listen(self, backlog: int = _QUEUE, /) -> None:
        """Let as many wait as we want."""
        super().listen(max(backlog, _QUEUE))


class _Head(ReceiveBuffer):
    """Gives out heads (and trailers) that mean the same to everybody.

    Args:
        limits: of size and number.

    Attributes:
        trailers: it is these that are read, not a head.
    """

    def __init__(self, limits: EdgeConfig) -> None:
        super().__init__()
        self._limits, self._looked, self.trailers = limits, 0, False

    def maybe_extract_lines(self) -> list[bytearray] | None:
        """All lines up to an empty one, or None as long as that is not there."""
        data = self._data
        if data[:2] != b"\r\n":
            end = data.find(_CRLF2, max(0, self._looked - 3))
            whole = data[: len(data) if end < 0 else end + len(_CRLF2)]
            if len(whole) > self._limits.header_bytes:
                raise h11.LocalProtocolError("the head of the request is too large", error_status_hint=431)
            if whole.count(b"\n") > self._limits.headers + 2:
                raise h11.LocalProtocolError("the request has too many header fields", error_status_hint=431)
            if _LOOSE.search(whole, max(0, self._looked - 2)):
                raise h11.LocalProtocolError("a line of the head does not end with CR LF")
            if end < 0:
                self._looked = len(data)
                return None
            problem = "a header field is folded over several lines" if _FOLDED.search(whole) else None
            if problem := problem or (None if self.trailers else _framing(whole)):
                raise h11.LocalProtocolError(problem)
        self._looked = 0
        return super().maybe_extract_lines()


def _framing(head: bytearray) -> str | None:
    """Why two servers might not agree where a request with this head ends."""
    version = _VERSION.match(head)
    if version is None:
        return "this is not HTTP/1.1"
    lengths, codings = _LENGTHS.findall(head), len(_CODINGS.findall(head))
    if len(lengths) > 1 or any(b"," in value for value in lengths):
        return "the request has several Content-Length"
    if codings and lengths:
        return "the request has Content-Length and Transfer-Encoding"
    if codings and version[1] == b"0":
        return "a request of HTTP/1.0 has no Transfer-Encoding"
    return None


class _Connection(h11.Connection):
    """h11 with a strict head; ``refused`` is the status that what it could not read deserves."""

    _writer: object  # of the answer that is being sent

    def __init__(self, limits: EdgeConfig) -> None:
        super().__init__(h11.SERVER, limits.header_bytes)
        self._receive_buffer = self._head = _Head(limits)
        self.refused, self.why = 400, "this is no HTTP request"

    def next_event(self) -> Any:
        self._head.trailers = self.their_state is h11.SEND_BODY
        try:
            return super().next_event()
        except h11.RemoteProtocolError as error:
            self.refused = error.error_status_hint if error.error_status_hint in (431, 501) else 400
            if self.refused != 501 and not error.args[0].startswith(("illegal", "Illegal", "Bad", "bad")):
                self.why = str(error.args[0])
            raise


class _Line:
    """A transport whose ``close`` is ours."""

    def __init__(self, inner: asyncio.Transport, owner: _Edge) -> None:
        self.inner, self._owner = inner, owner

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    def is_closing(self) -> bool:
        return self._owner.lingers or self.inner.is_closing()

    def write(self, data: bytes) -> None:
        if not self.is_closing():
            self.inner.write(data)

    def close(self) -> None:
        self._owner.leave()


class _Edge(H11Protocol):
    """One connection, of which a request finds a weak reference as ``line`` in the state of its scope.

    Attributes:
        limits: of each.
        open: connections that have asked for nothing that is whole, the oldest first.
        lingers: nothing is answered any more, and what still comes is thrown away.
    """

    limits: EdgeConfig
    open: dict[_Edge, None]

    def __init__(self, *given: Any, **named: Any) -> None:
        super().__init__(*given, **named)
        self.conn = _Connection(self.limits)
        self.app_state = {**self.app_state, "line": weakref.ref(self)}
        self.timeout_keep_alive = self.limits.idle_s  # type: ignore[assignment]
        self.lingers = False
        self._timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Take it, in the place of an idle one if need be."""
        super().connection_made(_Line(transport, self))  # type: ignore[arg-type]
        own = transport.get_extra_info("socket")
        if own is not None:
            own.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, self.limits.unread_bytes // 2)  # Linux doubles it
        if len(self.connections) > self.limits.connections:
            if not self.open:
                self.refuse(ApiError(503, "too many connections", code="too_many_connections"))
                return
            next(iter(self.open)).drop()
        self.open[self] = None
        self._within(self.limits.header_s)

    def connection_lost(self, exc: Exception | None) -> None:
        """It is gone."""
        self._within(None)
        self._unset_keepalive_if_required()
        self.open.pop(self, None)
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """A part of a request, or what nobody wants any more."""
        if self.lingers:
            return
        super().data_received(data)
        self._settle()

    @property
    def flows(self) -> bool:
        """Whether an answer is being sent in chunks, and its client is not behind: then :meth:`chunk` will do."""
        sends = self.conn.our_state is h11.SEND_BODY and isinstance(self.conn._writer, ChunkedWriter)
        return sends and not self.flow.write_paused

    def chunk(self, data: bytes) -> None:
        """Send a part of the answer, without the layers in between."""
        if data:
            self.transport.write(b"%x\r\n%b\r\n" % (len(data), data))

    def on_response_complete(self) -> None:
        """Wait for the next request, or for the rest of this one."""
        super().on_response_complete()
        self._settle()

    def handle_websocket_upgrade(self, event: h11.Request) -> None:
        """The connection belongs to another protocol from now on."""
        self._within(None)
        self.open.pop(self, None)
        self.transport = self.transport.inner  # type: ignore[attr-defined]
        super().handle_websocket_upgrade(event)

    def send_400_response(self, msg: str) -> None:
        """Refuse what is no request."""
        self.refuse(ApiError(self.conn.refused, self.conn.why, code="bad_request"))  # type: ignore[attr-defined]

    def refuse(self, error: ApiError) -> None:
        """Answer with an error, if nothing has been answered, and close."""
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            body = encode(error.body())
            headers = [("content-type", "application/json"), ("content-length", str(len(body)))]
            reply = h11.Response(status_code=error.status, headers=[*headers, ("connection", "close")])
            for event in (reply, h11.Data(data=body), h11.EndOfMessage()):
                self.transport.write(self.conn.send(event) or b"")
            if self.cycle is not None and not self.cycle.response_complete:  # nobody may answer this a second time
                self.cycle.disconnected = True
                self.cycle.message_event.set()
        self.transport.close()

    def leave(self) -> None:
        """Close, once what was answered can have been read: a reset would take it from who is still sending."""
        inner: asyncio.Transport = self.transport.inner  # type: ignore[attr-defined]
        if self.lingers or inner.is_closing():
            return
        self._unset_keepalive_if_required()
        cut = self.cycle is not None and self.cycle.response_started and not self.cycle.response_complete
        self.open.pop(self, None)
        if cut or self.conn.their_state not in (h11.SEND_BODY, h11.ERROR) or not inner.can_write_eof():
            inner.close()
            if cut and inner.get_write_buffer_size():
                self._within(_LINGER_S, inner.abort)  # who has not read so far
            return
        self.lingers = True
        inner.write_eof()
        inner.resume_reading()
        self._within(_LINGER_S, inner.abort)

    def drop(self) -> None:
        """Close at once, for others."""
        self.open.pop(self, None)
        self.transport.inner.abort()  # type: ignore[attr-defined]

    def _settle(self) -> None:
        """Which wait this is, and whether others may have the place."""
        if self.transport.is_closing():
            return
        if not isinstance(self.transport, _Line):
            return
        answering = self.cycle is not None and not self.cycle.response_complete
        theirs = self.conn.their_state
        if answering and theirs is not h11.SEND_BODY:
            self._within(None)
            self.open.pop(self, None)
            if self.flow.read_paused and len(self.conn.trailing_data[0]) < _BEHIND:
                self.flow.resume_reading()  # to see a client leave
            return
        if self not in self.open:
            self.open[self] = None
        if answering:
            self._within(None)  # the application waits for the body, for as long as it likes
        elif theirs is h11.SEND_BODY:
            if self._timer is None:
                self._within(self.limits.rest_s)
        elif self.timeout_keep_alive_task is None and self._timer is None:
            self._within(self.limits.header_s)
        elif self.timeout_keep_alive_task is not None:
            self._within(None)

    def _within(self, seconds: float | None, then: Any = None) -> None:
        """What happens unless something else does; None: nothing."""
        if self._timer is not None:
            self._timer.cancel()
        if seconds is None:
            self._timer = None
        else:  # those of a crowd end one by one
            self._timer = self.loop.call_later(seconds * random.uniform(0.9, 1.0), then or self._late)

    def _late(self) -> None:
        self._timer = None
        begun = self.conn.their_state is h11.IDLE and self.conn.trailing_data[0]
        if begun and self.conn.our_state is h11.IDLE:
            late = f"the head of the request was not there within {self.limits.header_s:g} s"
            self.refuse(ApiError(408, late, code="head_timeout"))
        else:
            self.transport.inner.close()  # type: ignore[attr-defined]
