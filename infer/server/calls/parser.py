"""Calls as JSON objects between marks: one machine, and what differs from family to family as data."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Collection
from dataclasses import dataclass

from infer.server.calls.piece import SPACE, Parser, Piece, held, joined
from infer.server.calls.scan import ObjectScanner

__all__ = ["CallParser", "Syntax"]

_NAMED = re.compile(r"[ \t\r\n]{0,8}([a-zA-Z0-9_-]{1,64})(?:\[CALL_ID\][a-zA-Z0-9]{1,32})?(?:\[ARGS\])?(?=\{)")
_LONGEST_NAMED = 128
_IGNORED = ("id", "type")


@dataclass(frozen=True, slots=True, kw_only=True)
class Syntax:
    """How a family writes calls: ``begin opening {..} separator {..} closing``.

    Attributes:
        begin: comes before calls.
        bare: a text may also begin with a call, without ``begin``.
        opening, separator, closing: around and between objects; empty: nothing, or no second object.
        arguments: the names that the field of the arguments may have; the first is the usual one.
        named: ``begin name[ARGS]{arguments}`` is a call too.
    """

    begin: str = ""
    bare: bool = False
    opening: str = ""
    separator: str = ""
    closing: str = ""
    arguments: tuple[str, ...] = ("arguments", "parameters")
    named: bool = False


class CallParser(Parser):
    """Takes calls out of a text; the rest is content.

    What only looks like a call is content, all of it: no JSON, another field, a function that was not given. White
    space next to a call belongs to it. Each character is looked at a bounded number of times.

    Args:
        syntax: of the calls.
        names: of the functions that there are.
        eager: tell arguments as they come, before the call is known to be whole; for texts that are made to be calls.
    """

    def __init__(self, syntax: Syntax, names: Collection[str], *, eager: bool = False) -> None:
        self.syntax, self.names, self.eager = syntax, frozenset(names), eager
        self._out: list[Piece] = []
        self._state: Callable[[str, int], int] = self._content
        self._over = ""  # of the text so far, not looked at yet
        self._white: list[str] = []  # after content, whose fate depends on what follows
        self._raw: list[str] = []  # since something began that may be a call
        self._fresh, self._after_call = True, False
        self._count = 0
        self._name, self._told = "", False  # of the call that is being read; its name has been told
        self._scanner, self._start = ObjectScanner(), 0

    def push(self, text: str) -> list[Piece]:
        text, self._over = self._over + text, ""
        at = 0
        while at < len(text):
            at = self._state(text, at)
        return self._given()

    def flush(self) -> list[Piece]:
        if not self._told:
            self._say("".join(self._raw))
        self._say(self._over)
        self._raw, self._over = [], ""
        if not self._after_call:
            self._out.append(Piece("content", "".join(self._white)))
        self._white, self._state = [], self._content
        return self._given()

    def _given(self) -> list[Piece]:
        out, self._out = self._out, []
        return joined(out)

    def _say(self, text: str) -> None:
        if self._after_call:
            text = text.lstrip(SPACE)
        body = text.rstrip(SPACE)
        if body:
            self._out.append(Piece("content", "".join(self._white) + body))
            self._white = []
            self._fresh = self._after_call = False
        if len(text) > len(body):
            self._white.append(text[len(body) :])

    def _content(self, text: str, at: int) -> int:
        if self._fresh and self.syntax.bare:
            start = at
            while at < len(text) and text[at] in SPACE:
                at += 1
            self._say(text[start:at])
            if at == len(text):
                return at
            if text[at] == (self.syntax.opening or "{"):
                self._fresh, self._state = False, self._opening
                return at
        marker = self.syntax.begin
        place = text.find(marker, at) if marker else -1
        if place >= 0:
            self._say(text[at:place])
            self._raw, self._state = [marker], self._opening
            return place + len(marker)
        end = len(text) - (held(text, marker, at) if marker else 0)
        self._say(text[at:end])
        self._over = text[end:]
        return len(text)

    def _fail(self, at: int) -> int:
        if not self._told:
            self._say("".join(self._raw))
        self._raw, self._told, self._state = [], False, self._content
        return at

    def _opening(self, text: str, at: int) -> int:
        at = self._skip(text, at)
        if at == len(text):
            return at
        if text[at] == self.syntax.opening:
            self._raw.append(text[at])
            self._state = self._before
            return at + 1
        if self.syntax.named:
            self._state = self._named
        elif self.syntax.opening:
            return self._fail(at)
        else:
            self._state = self._before
        return at

    def _named(self, text: str, at: int) -> int:
        found = _NAMED.match(text, at)
        if found is None:
            if len(text) - at > _LONGEST_NAMED:
                return self._fail(at)
            self._over = text[at:]
            return len(text)
        if found[1] not in self.names:
            return self._fail(at)
        self._raw.append(found[0])
        self._begin(found[1])
        return found.end()

    def _before(self, text: str, at: int) -> int:
        at = self._skip(text, at)
        if at == len(text):
            return at
        if text[at] != "{":
            return self._fail(at)
        self._begin("")
        return at

    def _begin(self, name: str) -> None:
        self._name, self._told, self._scanner, self._start = name, False, ObjectScanner(), len(self._raw)
        self._state = self._object

    def _object(self, text: str, at: int) -> int:
        scanner, before = self._scanner, self._scanner.taken
        end = scanner.feed(text, at)
        if self._told:
            self._tell(before, text[at:end])
        else:
            self._raw.append(text[at:end])
            if self.eager and not (scanner.done or scanner.failed):
                self._tell_early()
        if scanner.done and self._finish():
            self._raw, self._told, self._state = [], False, self._after
        elif scanner.done or scanner.failed:
            return self._fail(end)
        return end

    def _after(self, text: str, at: int) -> int:
        while at < len(text) and text[at] in SPACE:
            at += 1
        if at == len(text):
            return at
        for own, then in ((self.syntax.separator, self._before), (self.syntax.closing, self._content)):
            part = text[at : at + len(own)]
            if own and part == own:
                self._raw, self._state = [own] if then == self._before else [], then
                return at + len(own)
            if own and own.startswith(part):
                self._over = part
                return len(text)
        self._state = self._content
        return at

    def _skip(self, text: str, at: int) -> int:
        start = at
        while at < len(text) and text[at] in SPACE:
            at += 1
        self._raw.append(text[start:at])
        return at

    def _arguments(self) -> str:
        """The name of the field that has them, as far as it is known."""
        scanner = self._scanner
        known = {*scanner.fields, *([scanner.opened[0]] if scanner.opened else [])}
        return next((name for name in self.syntax.arguments if name in known), "")

    def _known_name(self, whole: str) -> str:
        """The function, if it is one of those given."""
        if self._name:
            return self._name
        start, end = self._scanner.fields.get("name", (0, 0))
        text = whole[start:end]
        name = json.loads(text) if text.startswith('"') else None
        return name if name in self.names else ""

    def _call(self, name: str) -> None:
        self._out += [Piece("content", ""), Piece("call", name, self._count)]
        self._white, self._after_call, self._fresh = [], True, False
        self._count += 1

    def _tell_early(self) -> None:
        """The name and what there is of the arguments, once both have begun."""
        scanner = self._scanner
        if self._name:
            start = 0
        elif scanner.opened and scanner.opened[0] == self._arguments() and "name" in scanner.fields:
            start = scanner.opened[1]
        else:
            return
        whole = "".join(self._raw[self._start :])
        name = self._known_name(whole)
        if name and whole[start : start + 1] == "{":
            self._told, self._raw = True, []
            self._call(name)
            self._out.append(Piece("arguments", whole[start:], self._count - 1))

    def _tell(self, before: int, text: str) -> None:
        """More of the arguments of a call that has been told."""
        if self._name:
            self._out.append(Piece("arguments", text, self._count - 1))
            return
        _, end = self._scanner.fields.get(self._arguments(), (0, before + len(text)))
        self._out.append(Piece("arguments", text[: max(0, end - before)], self._count - 1))

    def _finish(self) -> bool:
        """Whether the object, which is whole, is a call; tell it."""
        if self._told:
            return True
        whole = "".join(self._raw[self._start :])
        name, field = self._known_name(whole), self._arguments()
        if not name:
            return False
        if self._name:
            arguments = whole
        elif set(self._scanner.fields) - {"name", field, *_IGNORED}:
            return False
        else:
            start, end = self._scanner.fields.get(field, (0, 0))
            arguments = whole[start:end] if field else "{}"
        if not arguments.startswith("{"):
            return False
        self._call(name)
        self._out.append(Piece("arguments", arguments, self._count - 1))
        return True
