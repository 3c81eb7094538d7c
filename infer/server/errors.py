"""Errors in the shape that clients of OpenAI's interface know."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from pydantic import ValidationError

from parallel.errors import LockstepError

__all__ = ["ApiError", "invalid", "of_problems", "of_validation"]

LONGEST = 1000
MOST = 5
_INNER = re.compile(r"\b0x[0-9a-fA-F]{6,}\b|(?<![\w/.])(?:/[\w.@+~-]+){2,}/?")
_FIELD = re.compile(r"^([a-z_]+(?:\.[a-z_]+)*)(?:\[[^\]]*\])?(?:\.\w+)* ?[=:]")
_UNION = re.compile(r"(constrained-)?(str|int|float|bool)|.*[\[\]'].*")
"""What pydantic calls the members of a union, which is no place in a body."""
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
    found = list(problems)
    match = _FIELD.match(found[0]) if found else None
    param = match[1] if match else None
    return invalid("; ".join(found[:MOST]), (names or {}).get(param, param) if param else None)


def of_validation(error: ValidationError) -> ApiError:
    """What pydantic says of a body, without the body."""
    found = error.errors(include_url=False, include_input=False, include_context=False)
    lines = []
    for entry in found[:MOST]:
        where = ".".join(_places(entry["loc"]))[:100]
        kinds = {"extra_forbidden": "this server knows no such field", "missing": "is required"}
        lines.append(f"{where}: {kinds.get(entry['type'], entry['msg'])}")
    first = found[0]
    param = ".".join(part for part in _places(first["loc"]) if not part.isdigit())[:100] or None
    codes = {"extra_forbidden": "unknown_parameter", "missing": "missing_required_parameter"}
    return invalid("; ".join(lines), param, codes.get(first["type"]))


def _places(loc: Sequence[str | int]) -> list[str]:
    return [str(part) for part in loc if isinstance(part, int) or not _UNION.fullmatch(part)]


def clean(message: str) -> str:
    """The message without what looks like a path or an address, and not longer than anybody reads."""
    text = _INNER.sub("...", message[: 4 * LONGEST])
    return text if len(text) <= LONGEST else text[:LONGEST] + "..."
