"""Who may ask: API keys, and what separates their prefix caches."""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Sequence

from starlette.types import ASGIApp, Receive, Scope, Send

from infer.server.errors import ApiError
from infer.server.exchange import send_error

__all__ = ["OPEN", "Keys", "RequireKey"]

OPEN = "/health/live"
"""The one path that needs no key."""


class Keys:
    """API keys, known by their hashes.

    Args:
        keys: none: everybody may ask.
    """

    def __init__(self, keys: Sequence[str]) -> None:
        self._known = [(_hash(key.encode()), _salt(key)) for key in keys]

    def salt(self, headers: Sequence[tuple[bytes, bytes]]) -> bytes | None:
        """What separates the caches of who asks so, a function of the key alone; None: no known key is given.

        It takes as long for a key that is nearly right as for any other.
        """
        if not self._known:
            return b""
        given = [value for name, value in headers if name.lower() == b"authorization"]
        scheme, _, key = given[0].partition(b" ") if len(given) == 1 else (b"", b"", b"")
        own, found = _hash(key.strip()), None
        for known, salt in self._known:
            if hmac.compare_digest(own, known):
                found = salt
        return found if scheme.lower() == b"bearer" else None


class RequireKey:
    """Answers 401 to whoever has no key, whatever is asked for, but for :data:`OPEN`; others get a ``salt``.

    Args:
        app: what is behind.
        keys: that open it.
    """

    def __init__(self, app: ASGIApp, keys: Keys) -> None:
        self.app, self.keys = app, keys

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer, or let through."""
        if scope["type"] not in ("http", "websocket"):
            await self.app(scope, receive, send)
            return
        salt = self.keys.salt(scope["headers"])
        if salt is None and not _is_open(scope):
            if scope["type"] == "websocket":
                await send({"type": "websocket.close", "code": 1008})
                return
            headers = {"www-authenticate": "Bearer"}
            await send_error(
                send, ApiError(401, "a known API key is needed: Authorization: Bearer KEY", headers=headers)
            )
            return
        scope.setdefault("state", {})["salt"] = salt or b""
        await self.app(scope, receive, send)


def _is_open(scope: Scope) -> bool:
    raw = scope.get("raw_path")
    same = raw is None or raw.partition(b"?")[0] == OPEN.encode()
    return scope["type"] == "http" and scope["path"] == OPEN and same and not scope.get("root_path")


def _hash(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()


def _salt(key: str) -> bytes:
    return hmac.new(key.encode(), b"lockstep prefix cache", hashlib.sha256).digest()[:16]
