"""Who may ask: API keys, and what separates their prefix caches."""

from __future__ import annotations

import base64
import hashlib
import hmac
import ipaddress
import re
from collections.abc import Collection, Sequence

from starlette.types import ASGIApp, Receive, Scope, Send

from infer.server.errors import ApiError
from infer.server.exchange import refuse_socket, send_error

__all__ = ["OPEN", "PAGE", "Keys", "RequireKey", "known"]

OPEN = "/health/live"
"""The one path that needs no key."""
PAGE = "/"
"""The page to look at; it needs one like the rest, unless a server is told to show it to everybody."""
_HOST = re.compile(r"(?:\[([0-9a-f:.]+)\]|([^:\[\]]+))(?::\d*)?")
_STRANGE = "this server has no keys, and answers under its address or localhost only; http.hosts: under other names too"
SUBPROTOCOL = "lockstep"
_KEY = f"{SUBPROTOCOL}.key."
"""A web page cannot set headers of a WebSocket: it offers this and its key in base64url as a second subprotocol."""


class Keys:
    """API keys, known by their hashes.

    Args:
        keys: none: everybody may ask.

    Attributes:
        any: there are keys.
    """

    def __init__(self, keys: Sequence[str]) -> None:
        self.any = bool(keys)
        self._known = [(_hash(key.encode()), _salt(key)) for key in keys]

    def salt(self, headers: Sequence[tuple[bytes, bytes]], offered: Sequence[str] | None = None) -> bytes | None:
        """What separates the caches of who asks so, a function of the key alone; None: no known key is given.

        It takes as long for a key that is nearly right as for any other.

        Args:
            headers: of the request.
            offered: subprotocols, of a WebSocket.
        """
        if not self._known:
            return b""
        given = [value for name, value in headers if name.lower() == b"authorization"]
        scheme, _, key = given[0].partition(b" ") if len(given) == 1 else (b"", b"", b"")
        if not given and offered is not None:
            scheme, key = b"bearer", _offered_key(offered)
        own, found = _hash(key.strip()), None
        for known, salt in self._known:
            if hmac.compare_digest(own, known):
                found = salt
        return found if scheme.lower() == b"bearer" else None


class RequireKey:
    """Answers 401 to whoever has no key, whatever is asked for, but for what is open; others get a ``salt``.

    Args:
        app: what is behind.
        keys: that open it.
        page: :data:`PAGE` is open as well.
        hosts: names under which a server without keys answers, besides addresses and ``localhost``; see :func:`known`.
    """

    def __init__(self, app: ASGIApp, keys: Keys, *, page: bool = False, hosts: Sequence[str] = ()) -> None:
        self.app, self.keys, self.hosts = app, keys, frozenset(name.lower().rstrip(".") for name in hosts)
        self._open = (OPEN, PAGE) if page else (OPEN,)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer, or let through."""
        if scope["type"] not in ("http", "websocket"):
            await self.app(scope, receive, send)
            return
        salt = self.keys.salt(scope["headers"], scope.get("subprotocols"))
        error = None
        if salt is None:
            headers = {"www-authenticate": "Bearer"}
            error = ApiError(401, "a known API key is needed: Authorization: Bearer KEY", headers=headers)
        elif not self.keys.any and not known(scope["headers"], self.hosts):
            error = ApiError(403, _STRANGE, code="unknown_host")
        if error is not None and not any(_is(path, scope) for path in self._open):
            if scope["type"] == "websocket":
                await refuse_socket(scope, send, error)
            else:
                await send_error(send, error)
            return
        scope.setdefault("state", {})["salt"] = salt or b""
        await self.app(scope, receive, send)


def known(headers: Sequence[tuple[bytes, bytes]], hosts: Collection[str]) -> bool:
    """Whether the Host that was asked for cannot be a stranger's name.

    A page of another site may have its own name point to this machine, and then speak to a server that has no keys as
    if it were its own (DNS rebinding). The name that it asks for gives it away. An address can be pointed nowhere.
    """
    given = [value for name, value in headers if name.lower() == b"host"]
    if not given or "*" in hosts:  # HTTP/1.0 may do without; no browser does
        return True
    match = _HOST.fullmatch(given[0].decode("latin-1").strip().lower())
    if match is None or len(given) > 1:
        return False
    name = match[1] or match[2].removesuffix(".")
    if name in hosts or name == "localhost" or name.endswith(".localhost"):
        return True
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


def _offered_key(offered: Sequence[str]) -> bytes:
    """The key that is among subprotocols, or nothing."""
    found = [name.removeprefix(_KEY) for name in offered if name.startswith(_KEY)]
    if len(found) != 1 or not found[0].isascii():
        return b""
    try:
        return base64.urlsafe_b64decode(found[0] + "=" * (-len(found[0]) % 4))
    except ValueError:
        return b""


def _is(path: str, scope: Scope) -> bool:
    raw = scope.get("raw_path")
    same = raw is None or raw.partition(b"?")[0] == path.encode()
    return scope["type"] == "http" and scope["path"] == path and same and not scope.get("root_path")


def _hash(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()


def _salt(key: str) -> bytes:
    return hmac.new(key.encode(), b"lockstep prefix cache", hashlib.sha256).digest()[:16]
