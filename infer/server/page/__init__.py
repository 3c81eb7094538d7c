"""The page at ``/``: a chat and live pictures, in one file that asks for nothing but this server's own routes."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.resources import files

__all__ = ["Page", "render"]


@dataclass(frozen=True, slots=True)
class Page:
    """A document and the headers that go with it."""

    body: bytes
    headers: Mapping[str, str]


def render(*, keys: bool, pictures: bool) -> Page:
    """The page; the same for everybody, and nothing of it is secret.

    Its one script and its one style are known by their hashes: a browser runs no other, whatever a model writes.

    Args:
        keys: whether the server asks for API keys, so that the page asks its reader for one.
        pictures: whether /metrics is there to be drawn.
    """
    own = files(__name__)
    script = (own / "pictures.js").read_text() + (own / "chat.js").read_text()
    style = (own / "page.css").read_text()
    html = (own / "page.html").read_text()
    for name, value in (("keys", _word(keys)), ("pictures", _word(pictures)), ("style", style), ("script", script)):
        html = html.replace(f"{{{{{name}}}}}", value)
    policy = (
        "default-src 'none'",
        f"script-src '{_hash(script)}'",
        f"style-src '{_hash(style)}'",
        "connect-src 'self'",
        "img-src data:",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
        "require-trusted-types-for 'script'",
        "trusted-types 'none'",
    )
    headers = {
        "content-security-policy": "; ".join(policy),
        "x-content-type-options": "nosniff",
        "x-frame-options": "DENY",
        "referrer-policy": "no-referrer",
        "cross-origin-opener-policy": "same-origin",
        "cross-origin-resource-policy": "same-origin",
        "cache-control": "no-store",
    }
    return Page(html.encode(), headers)


def _word(value: bool) -> str:
    return "yes" if value else "no"


def _hash(text: str) -> str:
    return f"sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}"
