"""What is wrong with a body, in plain words: where, what is allowed, and what was given."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from pydantic import ValidationError

__all__ = ["Problem", "problems_of", "shown"]

_MOST = 64
"""Errors of pydantic's that are looked at."""
_LONGEST = 40
_KINDS = {
    "string_type": "a text",
    "int_type": "a whole number",
    "float_type": "a number",
    "finite_number": "a finite number",
    "bool_type": "true or false",
    "list_type": "a list",
    "dict_type": "an object",
    "model_type": "an object",
    "model_attributes_type": "an object",
    "none_required": "null",
}
"""Errors that say that a value is of another type."""
_PATTERNS = {"^[a-zA-Z0-9_-]{1,64}$": "be 1 to 64 letters, digits, _ and -"}


class Problem(NamedTuple):
    """One field that is wrong.

    Attributes:
        param: its name, without places in lists.
        message: for people.
        code: for programs; None: the usual one.
    """

    param: str
    message: str
    code: str | None = None


class _Found(NamedTuple):
    place: tuple[str | int, ...]
    kind: str
    context: Mapping[str, Any]
    given: Any


def problems_of(error: ValidationError, body: Any, unknown: Callable[[str], str]) -> Iterator[Problem]:
    """What pydantic says of a body, each field once.

    Args:
        error: of it.
        body: that was looked at.
        unknown: what to say of a field that is not known, by its name with dots.
    """
    entries = error.errors(include_url=False)[:_MOST]
    found = [
        _Found(_place(entry["loc"], entry["type"], body), entry["type"], entry.get("ctx", {}), entry["input"])
        for entry in entries
    ]
    places: dict[tuple[str | int, ...], list[_Found]] = {}
    other = {one.place[:-1] for one in found if one.kind == "literal_error" and one.place[-1:] == ("type",)}
    for one in found:
        if one.kind in ("missing", "extra_forbidden") and one.place[:-1] in other:
            continue  # what belongs to another type
        if not any(len(other.place) > len(one.place) and other.place[: len(one.place)] == one.place for other in found):
            places.setdefault(one.place, []).append(one)  # else another way of reading it came further
    for place, own in places.items():
        param, where = _param(place), _written(place)
        if own[0].kind == "extra_forbidden":
            name = ".".join(part for part in place if isinstance(part, str))
            yield Problem(param, f"{where}: {unknown(name)}", "unknown_parameter")
        elif own[0].kind == "missing":
            yield Problem(param, f"{where}: is required", "missing_required_parameter")
        elif own[0].kind in ("union_tag_invalid", "union_tag_not_found"):
            given = own[0].given.get("type") if isinstance(own[0].given, Mapping) else own[0].given
            kinds = " or ".join(own[0].context.get("expected_tags", "a known type").replace("'", '"').split(", "))
            yield Problem(
                _param((*place, "type")), f"{_written((*place, 'type'))}: must be {kinds}, not {shown(given)}"
            )
        else:
            yield Problem(param, f"{where or 'the body'}: {_demand(own)}")


def shown(value: Any) -> str:
    """A value as JSON, or what it is if that is long."""
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False) if len(value) <= _LONGEST else f"a text of {len(value)} characters"
    if isinstance(value, Sequence):
        return "a list" if value else "an empty list"
    if isinstance(value, Mapping):
        return "an object" if value else "an empty object"
    if isinstance(value, int) and abs(value) >= 2**64:
        return "a number of more than 19 digits"
    return json.dumps(value) if value is None or isinstance(value, bool | int | float) else "that"


def _place(loc: Sequence[str | int], kind: str, body: Any) -> tuple[str | int, ...]:
    """Where it is in the body: what pydantic calls the members of a union is not."""
    place: list[str | int] = []
    for depth, part in enumerate(loc):
        if isinstance(part, int):
            body = body[part] if isinstance(body, list) and part < len(body) else None
        elif isinstance(body, dict) and part in body:
            body = body[part]
        elif kind != "missing" or depth < len(loc) - 1:
            continue
        place.append(part)
    return tuple(place)


def _param(place: Sequence[str | int]) -> str:
    return ".".join(part[:64] for part in place if isinstance(part, str) and not part.isdigit())[:100]


def _written(place: Sequence[str | int]) -> str:
    text = "".join(f"[{part}]" if isinstance(part, int) else f".{part[:64]}" for part in place)
    return text.removeprefix(".")[:100]


def _demand(found: Sequence[_Found]) -> str:
    """What is allowed, and what was given; if one way of reading it took the type, the others do not count."""
    typed = [own for own in found if own.kind not in _KINDS and own.kind != "literal_error"]
    if typed:
        return " or ".join(dict.fromkeys(map(_limit, typed)))
    kinds = [own.context["expected"] if own.kind == "literal_error" else _KINDS[own.kind] for own in found]
    kinds = [kind for kind in dict.fromkeys(kinds) if kind != "a whole number" or "a number" not in kinds]
    allowed = " or ".join(kinds).replace("'", '"').replace("False", "false").replace("True", "true")
    return f"must be {allowed}, not {shown(found[0].given)}"


def _limit(found: _Found) -> str:
    kind, context, given = found.kind, found.context, found.given
    most, least = context.get("max_length"), context.get("min_length")
    if kind in ("too_short", "string_too_short"):
        return "must not be empty" if least == 1 else f"must be longer: at least {least}"
    if kind in ("too_long", "string_too_long"):
        unit = "characters" if kind == "string_too_long" else "entries"
        return f"must have at most {most} {unit}, not {len(given)}"
    demands = {
        "greater_than_equal": f"be at least {context.get('ge')}",
        "less_than_equal": f"be at most {context.get('le')}",
        "string_pattern_mismatch": _PATTERNS.get(context.get("pattern", ""), f"match {context.get('pattern')}"),
    }
    return f"must {demands.get(kind, 'be another value')}, not {shown(given)}"
