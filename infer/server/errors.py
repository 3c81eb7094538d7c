"""Errors in the shape that clients of OpenAI's interface know."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from parallel.errors import LockstepError

__all__ = ["MOST", "ApiError", "invalid", "of_problems", "told"]

LONGEST = 1000
MOST = 5
"""Problems that are told."""
_INNER = re.compile(r"\b0x[0-9a-fA-F]{6,}\b|(?<![\w/.])(?:/[\w.@+~-]+){2,}/?")
_FIELD = re.compile(r"^([a-z_]+(?:\.[a-z_]+)*)(?:\[[^\]]*\])?(?:\.\w+)* ?[=:]")
_TYPES = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}
_CODES = {
    400: "invalid_value",
    401: "invalid_api_key",
    404: "not_found",
    405: "method_not_allowed",
    408: "body_timeout",
    413: "body_too_large",
    429: "queue_full",
    500: "internal_error",
    503: "unavailable",
    504: "deadline",
}


class ApiError(LockstepError):
    """An answer that is an error.

    Args:
        status: of HTTP.
        message: for people; what looks like a path or an address is left out.
        param: the field of the request that is wrong.
        code: for programs; None: what the status stands for.
        headers: of the answer.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.param = status, clean(message), param
        self.code = code or _CODES.get(status, "error")
        self.headers = dict(headers or {})

    def body(self) -> dict[str, Any]:
        """What is sent."""
        default = "server_error" if self.status >= 500 else "invalid_request_error"
        kind = _TYPES.get(self.status, default)
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}


def invalid(message: str, param: str | None = None, code: str | None = None) -> ApiError:
    """A request that is wrong (400)."""
    return ApiError(400, message, param=param, code=code)


def of_problems(problems: Iterable[str], names: Mapping[str, str] | None = None) -> ApiError:
    """What the engine says of a request; the first problem names the field.

    Args:
        problems: one sentence each.
        names: of fields that clients call otherwise.
    """
    found = list(dict.fromkeys(problems))
    match = _FIELD.match(found[0]) if found else None
    param = match[1] if match else None
    if param and (theirs := (names or {}).get(param)):
        found[0], param = theirs + found[0].removeprefix(param), theirs
    return invalid(told(found), param)


def told(problems: Iterable[str]) -> str:
    """Problems as one sentence: each once, and not more than anybody reads."""
    found = [*dict.fromkeys(problems)]
    return "; ".join([*found[:MOST], *(["and more"] if len(found) > MOST else [])])


def clean(message: str) -> str:
    """The message without what looks like a path or an address, and not longer than anybody reads."""
    text = _INNER.sub("...", message[: 4 * LONGEST])
    return text if len(text) <= LONGEST else text[:LONGEST] + "..."
