"""Messages between the HTTP process and an engine: msgpack in authenticated frames, over a local or a TCP socket.

Both ends know a key. Each begins with 32 random bytes; from these and the key both derive the key of the session, and
every frame carries a MAC over its direction, its number and its content. What has a wrong MAC, comes twice, out of
order or too large closes the channel; nothing of it is decoded. A frame holds the messages of one round of the event
loop, each behind its length: a step of an engine is one frame, however many requests have a token more.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import hashlib
import hmac
import secrets
import struct
from collections import deque
from collections.abc import Iterator
from typing import Any

import msgspec

from infer.completion import Event
from infer.scheduler import Stats
from parallel.errors import LockstepError

__all__ = [
    "Abort",
    "Add",
    "Channel",
    "ChannelError",
    "Embed",
    "Given",
    "Hello",
    "Refused",
    "Stats",
    "ToApi",
    "ToEngine",
    "Told",
    "Vectors",
    "connected",
    "pack",
    "unpack",
]

KEY_BYTES = 32
LARGEST = 64 << 20
"""Bytes of a frame."""
_MAGIC = b"lockstep serve 3"
_HEAD = struct.Struct("<I16s")
_LENGTH = struct.Struct("<I")
_FULL = 1 << 20
"""Bytes of messages that wait for the end of a round."""


class ChannelError(LockstepError):
    """The other end is gone, is not who it should be, or sent what it may not."""


class Add(msgspec.Struct, tag=True, frozen=True):
    """Continue a prompt; ``params`` are the fields of a :class:`~infer.params.SamplingParams`."""

    number: int
    prompt: list[int]
    params: dict[str, Any]
    priority: int
    salt: bytes


class Abort(msgspec.Struct, tag=True, frozen=True):
    """End a prompt that is being continued."""

    number: int


class Embed(msgspec.Struct, tag=True, frozen=True):
    """Make vectors of documents; ``urgent``: before all that wait."""

    number: int
    documents: list[list[int]]
    urgent: bool = False


class Hello(msgspec.Struct, tag=True, frozen=True):
    """The engine is ready.

    Attributes:
        version: of the program; both ends must be of the same.
        model: hash of the model's configuration.
        context: most tokens of a text.
        vocabulary: of the model.
        notes: how memory was divided.
        generates: it continues prompts; else it only makes vectors.
        probe: a token that it can do so with, to see whether it works.
    """

    version: str
    model: str
    context: int
    vocabulary: int
    notes: list[str]
    generates: bool = True
    probe: int = 0


class Given(msgspec.Struct, tag=True, frozen=True):
    """What a step added to prompts; the ``id`` of an event is the ``number`` of its :class:`Add`."""

    events: list[Event]


class Vectors(msgspec.Struct, tag=True, frozen=True):
    """One for each document."""

    number: int
    values: list[list[float]]


class Refused(msgspec.Struct, tag=True, frozen=True):
    """A prompt cannot be continued as asked."""

    number: int
    problems: list[str]


class Told(msgspec.Struct, tag=True, frozen=True):
    """What the scheduler holds."""

    stats: Stats


ToEngine = Add | Abort | Embed
ToApi = Hello | Given | Vectors | Refused | Told

pack = msgspec.msgpack.Encoder().encode


@functools.cache
def _decoder(kind: Any) -> msgspec.msgpack.Decoder[Any]:
    return msgspec.msgpack.Decoder(kind)


def unpack(data: bytes, kind: Any) -> Any:
    """A message of this kind.

    Raises:
        ChannelError: it is none.
    """
    try:
        return _decoder(kind).decode(data)
    except (msgspec.DecodeError, RecursionError) as error:
        raise ChannelError(f"a message that is none: {type(error).__name__}") from None


async def connected(address: str) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """A connection to ``/path/of/a/socket`` or ``host:port``.

    Raises:
        ChannelError: nobody listens there.
    """
    try:
        if address.startswith("/"):
            return await asyncio.open_unix_connection(address)
        host, _, port = address.rpartition(":")
        return await asyncio.open_connection(host.strip("[]"), int(port))
    except (OSError, ValueError) as error:
        raise ChannelError(f"no channel at {address}: {error}") from None


class Channel:
    """One end of a connection, after :meth:`open`.

    Args:
        reader, writer: of the socket.
    """

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader, self._writer = reader, writer
        self._key = b""
        self._sent = self._received = 0
        self._side = b""
        self._waiting = bytearray()
        self._arrived = deque[bytes]()

    @staticmethod
    async def open(
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        key: bytes,
        *,
        listens: bool,
        timeout_s: float = 10.0,
    ) -> Channel:
        """Prove to the other end that we know the key, and have it prove the same.

        Args:
            reader, writer: of the socket.
            key: 32 bytes.
            listens: whether this is the end that was connected to.
            timeout_s: how long the other end may take.

        Raises:
            ChannelError: it does not know the key, or is silent.
        """
        channel = Channel(reader, writer)
        own = secrets.token_bytes(KEY_BYTES)
        writer.write(_MAGIC + own)
        try:
            async with asyncio.timeout(timeout_s):
                greeting = await reader.readexactly(len(_MAGIC) + KEY_BYTES)
                theirs = greeting[len(_MAGIC) :]
                both = own + theirs if listens else theirs + own
                channel._key = hashlib.blake2b(both, key=key, digest_size=KEY_BYTES, person=b"session").digest()
                channel._side = b"listens" if listens else b"connects"
                if not greeting.startswith(_MAGIC) or own == theirs:
                    raise ChannelError("the other end speaks something else")
                channel._write(b"")
                await channel._receive(0)  # nothing before we know who it is
        except ChannelError:
            writer.close()
            raise
        except (OSError, TimeoutError, asyncio.IncompleteReadError) as error:
            writer.close()
            raise ChannelError(f"no handshake: {type(error).__name__}") from None
        return channel

    def send(self, data: bytes) -> None:
        """Queue a message; see :meth:`drain`."""
        assert len(data) <= LARGEST, f"{len(data)} bytes in a message"
        if len(self._waiting) + len(data) > _FULL:
            self._flush()
        if not self._waiting:
            asyncio.get_running_loop().call_soon(self._flush)
        self._waiting += _LENGTH.pack(len(data))
        self._waiting += data

    def _flush(self) -> None:
        if self._waiting:
            waiting, self._waiting = self._waiting, bytearray()
            self._write(waiting)

    def _write(self, data: bytes | bytearray) -> None:
        mac = self._mac(self._side, self._sent, data)
        self._sent += 1
        self._writer.write(_HEAD.pack(len(data), mac) + data)

    async def drain(self) -> None:
        """Wait while the other end is far behind."""
        with contextlib.suppress(ConnectionError):
            await self._writer.drain()

    @property
    def behind(self) -> bool:
        """Whether more has come than was received."""
        return bool(self._arrived or self._reader._buffer)  # type: ignore[attr-defined]

    async def receive(self) -> bytes:
        """The next message.

        Raises:
            ChannelError: the channel is closed now.
        """
        try:
            while not self._arrived:
                self._arrived.extend(_parts(await self._receive()))
            return self._arrived.popleft()
        except (OSError, asyncio.IncompleteReadError) as error:
            raise ChannelError(f"the connection is lost: {type(error).__name__}") from None
        except ChannelError:
            self.close()
            raise

    def close(self) -> None:
        """Let go of the socket, once what was sent is written."""
        self._flush()
        self._writer.close()

    async def _receive(self, most: int = LARGEST + _LENGTH.size) -> bytes:
        length, mac = _HEAD.unpack(await self._reader.readexactly(_HEAD.size))
        if length > most:
            raise ChannelError(f"a frame of {length} bytes")
        data = await self._reader.readexactly(length)
        side = b"connects" if self._side == b"listens" else b"listens"
        if not hmac.compare_digest(mac, self._mac(side, self._received, data)):
            raise ChannelError("a frame with a wrong MAC")
        self._received += 1
        return data

    def _mac(self, side: bytes, number: int, data: bytes | bytearray) -> bytes:
        digest = hashlib.blake2b(key=self._key, digest_size=16, person=side)
        digest.update(number.to_bytes(8, "little"))
        digest.update(data)
        return digest.digest()


def _parts(frame: bytes) -> Iterator[bytes]:
    """Its messages.

    Raises:
        ChannelError: it ends in the middle of one.
    """
    at = 0
    while at < len(frame):
        if len(frame) - at < _LENGTH.size:
            raise ChannelError("a frame that ends too early")
        end = at + _LENGTH.size + _LENGTH.unpack_from(frame, at)[0]
        if end > len(frame):
            raise ChannelError("a frame that ends too early")
        yield frame[at + _LENGTH.size : end]
        at = end
