"""Grammars (the Lark of llguidance) of answers that are calls, or may be."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from infer.constraint import Constraint
from infer.server.calls.formats import Format
from infer.server.calls.thinking import CLOSE, OPEN

__all__ = ["Signature", "answer_after", "grammar"]

_ANY = r"/(.|\n)*/"
_WHITE = r"WHITE: /[ \t\r\n]{0,4}/"
_SPACED = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}


@dataclass(frozen=True, slots=True)
class Signature:
    """A function as a grammar sees it: its name, and the JSON schema of its arguments."""

    name: str
    schema: Mapping[str, Any]


def grammar(
    form: Format,
    functions: Sequence[Signature],
    *,
    token: Callable[[str], int | None],
    required: bool,
    parallel: bool,
    thought: str,
    named: bool = False,
    schema: str | None = None,
) -> Constraint:
    """Of an answer with calls of these functions.

    Args:
        form: how they are written; with JSON.
        functions: that may be called.
        token: the id of a mark that is one token, or None.
        required: the answer is calls and nothing else; otherwise text is allowed around them.
        parallel: there may be more than one.
        thought: reasoning comes first: ``opened`` by the prompt, ``possible``, or ``none``.
        named: the family writes ``begin name[ARGS]{arguments}``.
        schema: of the answer where it is no call, as JSON text; None: any text.
    """
    syntax = form.syntax
    assert syntax is not None, "calls that are not JSON have no grammar"
    named = named and syntax.named
    rules = []
    ways = []
    for place, function in enumerate(functions):
        inner = {"type": "object", **function.schema, "x-guidance": _SPACED}
        rules.append(f"args_{place}: %json {json.dumps(inner)}")
        head = f'{{"name": {json.dumps(function.name)}, "{syntax.arguments[0]}": '
        way = f'{_text(head)} args_{place} "}}"'
        ways.append(f"{_text(function.name)} {_mark('[ARGS]', token)} args_{place}" if named else way)
    rest, between = _rest(form, token, named=named, parallel=parallel)
    again = between is not None and parallel
    begin = _mark(syntax.begin, token) if syntax.begin and not syntax.bare else ""
    calls = f"{begin} rest ({between} {begin} rest)*" if again else f"{begin} rest"
    rules += ["call: " + " | ".join(ways), f"rest: {rest}", f"calls: {calls}"]
    if required:
        body = "calls"
    elif schema is not None:
        rules.append(f"other: %json {schema}")
        body = "(calls | other)"
    elif syntax.bare:
        without = f" & ~/(.|\\n)*{_escaped(syntax.begin)}(.|\\n)*/" if syntax.begin else ""
        rules.append(f"OTHER: {_ANY} & ~/[ \\t\\r\\n]*{_escaped(syntax.opening or '{')}(.|\\n)*/{without}")
        body = "(calls | OTHER)"
    else:
        until, more = _until("text", syntax.begin, token)
        rules += dict.fromkeys([*more, _without("TEXT", syntax.begin)])
        body = f"({until} rest){'*' if again else '?'} TEXT"
    before, more = _thinking(thought, token)
    return Constraint("grammar", "\n".join([f"start: {before} {body}", *more, *rules]) + "\n")


def _rest(form: Format, token: Callable[[str], int | None], *, named: bool, parallel: bool) -> tuple[str, str | None]:
    """What follows ``begin``: one call, or several in one list, and what stands before the next; None: there is one."""
    syntax = form.syntax
    assert syntax is not None
    if named:
        return "call", ""
    if syntax.separator:
        calls = f"call ({_text(syntax.separator + ' ')} call)*" if parallel else "call"
        if not syntax.opening:
            return calls, None
        gap = "" if syntax.bare else '" "?'
        return f"{gap} {_text(syntax.opening)} {calls} {_text(syntax.closing)}", None
    pad = _text(form.pad) if form.pad else ""
    return f"{pad} call {pad} {_mark(syntax.closing, token)}", pad


def _until(name: str, mark: str, token: Callable[[str], int | None]) -> tuple[str, list[str]]:
    """Any text and the mark after it."""
    if token(mark) is None:
        return f"{name}_until", [f"{name}_until[suffix={_text(mark)}]: {_ANY}"]
    return f"{name.upper()} {_mark(mark, token)}", [_without(name.upper(), mark)]


def _without(name: str, mark: str) -> str:
    return f"{name}: {_ANY} & ~/(.|\\n)*{_escaped(mark)}(.|\\n)*/"


def answer_after(constraint: Constraint, thought: str, token: Callable[[str], int | None]) -> Constraint | None:
    """The same form, of what comes after the reasoning; None: it cannot be said of this kind."""
    if thought == "none":
        return constraint
    if constraint.kind == "json":
        answer = f"answer: %json {constraint.text}"
    elif constraint.kind == "choice":
        answer = "answer: " + " | ".join(_text(text) for text in json.loads(constraint.text))
    elif constraint.kind == "regex":
        answer = "answer: ANSWER\nANSWER: /" + _slashed(constraint.text) + "/"
    else:
        return None
    before, more = _thinking(thought, token)
    return Constraint("grammar", "\n".join([f"start: {before} answer", *more, answer]) + "\n")


def _thinking(thought: str, token: Callable[[str], int | None]) -> tuple[str, list[str]]:
    if thought == "none":
        return "", []
    until, more = _until("thought", CLOSE, token)
    if thought == "opened":
        return f"{until} WHITE", [*more, _WHITE]
    return f"({_mark(OPEN, token)} {until} WHITE)?", [*more, _WHITE]


def _mark(text: str, token: Callable[[str], int | None]) -> str:
    found = token(text)
    return _text(text) if found is None else f"<[{found}]>"


def _text(text: str) -> str:
    return json.dumps(text)


def _escaped(text: str) -> str:
    """As itself in a regular expression between slashes."""
    return "".join(f"\\{char}" if char in "\\.^$*+?()[]{}|/" else char for char in text)


def _slashed(pattern: str) -> str:
    """A regular expression as it is written between slashes."""
    out, escaped = [], False
    for char in pattern:
        out.append("\\/" if char == "/" and not escaped else "\\n" if char == "\n" else char)
        escaped = char == "\\" and not escaped
    return "".join(out)
