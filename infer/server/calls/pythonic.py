"""Calls as a list of calls of Python, ``[f(a=1), g(b="x")]``, at the beginning of a text; nothing is executed."""

from __future__ import annotations

import json
import re
from collections.abc import Collection
from typing import Any

from infer.server.calls.piece import SPACE, Parser, Piece, joined
from infer.server.calls.scan import DEEPEST

__all__ = ["PythonicParser"]

_BEGIN = re.compile(r"[ \t\r\n]*\[[ \t\r\n]*([A-Za-z_]\w*)[ \t\r\n]*\(")
_PREFIX = re.compile(r"[ \t\r\n]*(\[[ \t\r\n]*([A-Za-z_]\w*[ \t\r\n]*)?)?")
_TOKEN = re.compile(
    r"""[ \t\r\n]*(?:
    (?P<text>"(?:[^"\\\n]|\\[^\n])*"|'(?:[^'\\\n]|\\[^\n])*')
    |(?P<number>-?(?:0|[1-9]\d*)(?:\.\d+)?(?:[eE][+-]?\d+)?)(?![\w.])
    |(?P<name>[A-Za-z_]\w*)
    |(?P<mark>[\[\](){},:=])
    )""",
    re.VERBOSE,
)
_ESCAPE = re.compile(r"\\(?:x([0-9a-fA-F]{2})|u([0-9a-fA-F]{4})|(.))", re.DOTALL)
_ESCAPES = {"n": "\n", "t": "\t", "r": "\r", "\\": "\\", "'": "'", '"': '"', "b": "\b", "f": "\f", "0": "\0"}
_WORDS: dict[str, Any] = {"True": True, "False": False, "None": None, "true": True, "false": False, "null": None}
_RUN = re.compile(r"""[^"'\\\[\](){}\n]+""")
_PAIRS = {")": "(", "]": "[", "}": "{"}


class PythonicParser(Parser):
    """Takes such a list off the beginning of a text; what is none is content.

    Args:
        names: of the functions that there are.
    """

    def __init__(self, names: Collection[str]) -> None:
        self.names = frozenset(names)
        self._state = "start"
        self._raw: list[str] = []
        self._stack: list[str] = []
        self._quote, self._escaped = "", False

    def push(self, text: str) -> list[Piece]:
        if self._state == "start":
            self._raw.append(text)
            whole = "".join(self._raw)
            if found := _BEGIN.match(whole):
                self._raw, self._state = [], "list" if found[1] in self.names else "content"
            elif _PREFIX.fullmatch(whole) and len(whole) < 1000:
                return []
            else:
                self._raw, self._state = [], "content"
            text = whole
        if self._state == "list":
            return joined(self._follow(text))
        if self._state == "after":
            text = text.lstrip(SPACE)
            self._state = "content" if text else "after"
        return joined([Piece("content", text)])

    def flush(self) -> list[Piece]:
        whole, self._raw = "".join(self._raw), []
        return joined([Piece("content", whole)])

    def _follow(self, text: str) -> list[Piece]:
        """Look for the end of the list."""
        at = 0
        while at < len(text):
            if self._escaped:
                self._escaped = False
                at += 1
                continue
            run = _RUN.match(text, at)
            at = run.end() if run else at
            if at == len(text):
                break
            ended = self._mark(text[at])
            at += 1
            if ended is not None:
                whole = "".join(self._raw) + text[:at]
                calls = _calls(whole, self.names) if ended else None
                self._raw = []
                self._state = "content" if calls is None else "after"
                if calls is None:
                    return [Piece("content", whole + text[at:])]
                return [*_told(calls), *self.push(text[at:])]
        self._raw.append(text)
        return []

    def _mark(self, char: str) -> bool | None:
        """Take what is no run: True: the list has ended; False: it is none."""
        if self._quote:
            if char == "\\":
                self._escaped = True
            elif char == self._quote:
                self._quote = ""
            return False if char == "\n" else None
        if char in "\"'":
            self._quote = char
        elif char in "([{":
            self._stack.append(char)
            return False if len(self._stack) > DEEPEST else None
        elif char in _PAIRS:
            if not self._stack or self._stack.pop() != _PAIRS[char]:
                return False
            return None if self._stack else True
        return False if char == "\\" else None


def _told(calls: list[tuple[str, dict[str, Any]]]) -> list[Piece]:
    pieces = []
    for place, (name, arguments) in enumerate(calls):
        pieces += [
            Piece("call", name, place),
            Piece("arguments", json.dumps(arguments, ensure_ascii=False), place),
        ]
    return pieces


class _Wrong(Exception):
    """It is no list of calls."""


def _calls(text: str, names: frozenset[str]) -> list[tuple[str, dict[str, Any]]] | None:
    tokens: list[tuple[str, str]] = []
    at = 0
    while at < len(text):
        found = _TOKEN.match(text, at)
        if found is None:
            return None
        tokens.append((found.lastgroup or "", found[found.lastgroup or 0]))
        at = found.end()
    try:
        return _Reader(tokens).calls(names)
    except _Wrong:
        return None


class _Reader:
    """Reads literals; as deep as the brackets were found to be."""

    def __init__(self, tokens: list[tuple[str, str]]) -> None:
        self._tokens, self._at = [*tokens, ("end", "")], 0

    def calls(self, names: frozenset[str]) -> list[tuple[str, dict[str, Any]]]:
        found = []
        self._need("[")
        while not self._skips("]"):
            name = self._name()
            if name not in names:
                raise _Wrong
            self._need("(")
            arguments: dict[str, Any] = {}
            while not self._skips(")"):
                field = self._name()
                self._need("=")
                if field in arguments:
                    raise _Wrong
                arguments[field] = self._value()
                self._comma(")")
            found.append((name, arguments))
            self._comma("]")
        if not found or self._tokens[self._at][0] != "end":
            raise _Wrong
        return found

    def _value(self) -> Any:
        kind, text = self._tokens[self._at]
        self._at += 1
        if kind == "text":
            return _ESCAPE.sub(_unescaped, text[1:-1])
        if kind == "number":
            if len(text) > 300:  # Python refuses to read whole numbers of thousands of digits
                raise _Wrong
            value = float(text) if any(char in text for char in ".eE") else int(text)
            if value in (float("inf"), float("-inf")):
                raise _Wrong
            return value
        if kind == "name" and text in _WORDS:
            return _WORDS[text]
        if text == "[":
            items = []
            while not self._skips("]"):
                items.append(self._value())
                self._comma("]")
            return items
        if text == "{":
            fields: dict[str, Any] = {}
            while not self._skips("}"):
                key = self._value()
                self._need(":")
                if not isinstance(key, str) or key in fields:
                    raise _Wrong
                fields[key] = self._value()
                self._comma("}")
            return fields
        raise _Wrong

    def _name(self) -> str:
        kind, text = self._tokens[self._at]
        self._at += 1
        if kind != "name":
            raise _Wrong
        return text

    def _need(self, mark: str) -> None:
        if not self._skips(mark):
            raise _Wrong

    def _skips(self, mark: str) -> bool:
        found = self._tokens[self._at] == ("mark", mark)
        self._at += found
        return found

    def _comma(self, end: str) -> None:
        """One, unless the end follows."""
        if not self._skips(",") and self._tokens[self._at] != ("mark", end):
            raise _Wrong


def _unescaped(found: re.Match[str]) -> str:
    code = found[1] or found[2]
    if code:
        char = chr(int(code, 16))
        if char.isascii() or not 0xD800 <= ord(char) <= 0xDFFF:
            return char
        raise _Wrong
    if found[3] not in _ESCAPES:
        raise _Wrong
    return _ESCAPES[found[3]]
