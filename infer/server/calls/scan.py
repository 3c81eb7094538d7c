"""One JSON object (RFC 8259) in a text that comes in pieces: where it ends, and where it stops being JSON."""

from __future__ import annotations

import re

__all__ = ["DEEPEST", "ObjectScanner"]

DEEPEST = 64
_RUN = re.compile(r'[^"\\\x00-\x1f]+')
_WORDS = {"t": "rue", "f": "alse", "n": "ull"}
_DIGITS, _HEX, _SPACE = frozenset("0123456789"), frozenset("0123456789abcdefABCDEF"), frozenset(" \t\r\n")
_NUMBERS = {
    "minus": {"0": "zero", **dict.fromkeys("123456789", "whole")},
    "zero": {".": "point", "e": "e", "E": "e"},
    "whole": {**dict.fromkeys(_DIGITS, "whole"), ".": "point", "e": "e", "E": "e"},
    "point": dict.fromkeys(_DIGITS, "fraction"),
    "fraction": {**dict.fromkeys(_DIGITS, "fraction"), "e": "e", "E": "e"},
    "e": {**dict.fromkeys(_DIGITS, "power"), "+": "sign", "-": "sign"},
    "sign": dict.fromkeys(_DIGITS, "power"),
    "power": dict.fromkeys(_DIGITS, "power"),
}
"""A number: what was read, and what it becomes by the next character."""
_WHOLE = ("zero", "whole", "fraction", "power")


class ObjectScanner:
    """Follows an object character by character; the work for each does not grow.

    Attributes:
        done, failed: the object is whole; it is no JSON, deeper than :data:`DEEPEST`, or names a field twice.
        taken: characters of it so far.
        fields: of the outermost object: where each value begins and ends in its text.
        opened: the field whose value is being read, and where it began.
    """

    def __init__(self) -> None:
        self.done = self.failed = False
        self.taken = 0
        self.fields: dict[str, tuple[int, int]] = {}
        self.opened: tuple[str, int] | None = None
        self._stack: list[str] = []
        self._wants, self._left, self._key_ends = "object", "", False
        self._key: list[str] = []

    def feed(self, text: str, at: int) -> int:
        """Follow the text from ``at``; where that ends: at its end, after the object, or at what cannot follow."""
        while at < len(text) and not self.done:
            if self._wants == "string" and (run := _RUN.match(text, at)):
                self._note(run[0])
                self.taken += run.end() - at
                at = run.end()
            elif self._take(text[at]):
                self.taken += 1
                at += 1
            else:
                self.failed = True
                break
        return at

    def _take(self, char: str) -> bool:
        wants = self._wants
        if wants == "string":
            return self._in_string(char)
        if wants == "escape":
            self._note(char)
            self._wants, self._left = ("hex", "1234") if char == "u" else ("string", "")
            return char in '"\\/bfnrtu'
        if wants == "hex":
            self._note(char)
            self._left = self._left[1:]
            self._wants = "hex" if self._left else "string"
            return char in _HEX
        if wants == "word":
            fits, self._left = char == self._left[0], self._left[1:]
            if not self._left:
                self._ended(self.taken + 1)
            return fits
        if wants in _NUMBERS:
            if (then := _NUMBERS[wants].get(char)) is not None:
                self._wants = then
                return True
            if wants not in _WHOLE:
                return False
            self._ended(self.taken)
        return (char in _SPACE and self._wants != "object") or self._between(char)

    def _in_string(self, char: str) -> bool:
        if char == "\\":
            self._note(char)
            self._wants = "escape"
            return True
        if char != '"':
            return False
        if not self._key_ends:
            self._ended(self.taken + 1)
            return True
        self._wants, self._key_ends = "colon", False
        return len(self._stack) > 1 or "".join(self._key) not in self.fields

    def _between(self, char: str) -> bool:
        """What stands between strings, numbers and words."""
        wants, inner = self._wants, self._stack[-1:] == ["{"]
        if wants == "colon":
            self._wants = "value"
            return char == ":"
        if wants == "after":
            self._wants = "key" if inner else "value"
            return char == "," or self._closes(char)
        if wants in ("key", "key or end"):
            self._wants, self._key_ends = "string", True
            self._key.clear()
            return char == '"' or (wants == "key or end" and self._closes(char))
        if wants == "value or end" and char == "]":
            return self._closes(char)
        return self._begins(char)

    def _begins(self, char: str) -> bool:
        if self._wants == "object" and char != "{":
            return False
        if len(self._stack) == 1:
            self.opened = ("".join(self._key), self.taken)
        if char in ("{", "["):
            self._stack.append(char)
            self._wants = "key or end" if char == "{" else "value or end"
            return len(self._stack) <= DEEPEST
        if char == '"':
            self._wants = "string"
        elif char in _WORDS:
            self._wants, self._left = "word", _WORDS[char]
        elif char in _DIGITS or char == "-":
            self._wants = "minus" if char == "-" else "zero" if char == "0" else "whole"
        else:
            return False
        return True

    def _closes(self, char: str) -> bool:
        if char != {"{": "}", "[": "]"}[self._stack[-1]]:
            return False
        self._stack.pop()
        self._key_ends = False
        if self._stack:
            self._ended(self.taken + 1)
        else:
            self.done = True
        return True

    def _ended(self, place: int) -> None:
        """A value has."""
        self._wants = "after"
        if len(self._stack) == 1 and self.opened is not None:
            name, start = self.opened
            self.fields[name], self.opened = (start, place), None

    def _note(self, text: str) -> None:
        if self._key_ends and len(self._stack) == 1:
            self._key.append(text)
