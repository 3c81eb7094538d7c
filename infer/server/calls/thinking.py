"""Reasoning between tags at the beginning of an answer."""

from __future__ import annotations

from infer.server.calls.piece import SPACE, Parser, Piece, held, joined

__all__ = ["CLOSE", "OPEN", "Thinking"]

OPEN, CLOSE = "<think>", "</think>"


class Thinking(Parser):
    """Takes the reasoning off the beginning of a text; white space next to the tags belongs to them.

    Args:
        opened: the prompt ends with the tag that opens it.
        rest: takes what follows it apart; None: it is content.

    Attributes:
        length: characters of the text that belong to the reasoning so far, with its tags.
    """

    def __init__(self, *, opened: bool, rest: Parser | None = None) -> None:
        self._rest, self._state = rest, "inside" if opened else "before"
        self._over, self._white = "", list[str]()
        self._quiet = True  # nothing but white space since the tag
        self._seen = self.length = 0

    @property
    def inside(self) -> bool:
        """Whether the reasoning goes on."""
        return self._state == "inside"

    def push(self, text: str) -> list[Piece]:
        self._seen += len(text)
        text, self._over = self._over + text, ""
        out: list[Piece] = []
        at = 0
        if self._state == "before":
            at = self._before(text, out)
        if self._state == "inside":
            at = self._inside(text, at, out)
        if self._state == "after" and at < len(text):
            out += self._following(text[at:])
        return joined(out)

    def flush(self) -> list[Piece]:
        over, self._over = self._over, ""
        out: list[Piece] = []
        if self._state == "inside":
            self._think(over, out)
            self.length = self._seen
        elif self._state == "before":
            out += self._follow("".join(self._white) + over)
        return joined([*out, *(self._rest.flush() if self._rest else ())])

    def _before(self, text: str, out: list[Piece]) -> int:
        body = text.lstrip(SPACE)
        at = len(text) - len(body)
        if OPEN.startswith(body[: len(OPEN)]):
            if len(body) >= len(OPEN):
                self._white, self._state = [], "inside"
                return at + len(OPEN)
            if at:
                self._white.append(text[:at])
            self._over = body
            return len(text)
        self._state, self._quiet = "after", False
        out += self._follow("".join(self._white) + text)
        return len(text)

    def _inside(self, text: str, at: int, out: list[Piece]) -> int:
        place = text.find(CLOSE, at)
        if place >= 0:
            self._think(text[at:place], out)
            self._white, self._quiet, self._state = [], True, "after"
            self.length = self._seen - len(text) + place + len(CLOSE)
            return place + len(CLOSE)
        end = len(text) - held(text, CLOSE, at)
        self._think(text[at:end], out)
        self._over = text[end:]
        self.length = self._seen
        return len(text)

    def _think(self, text: str, out: list[Piece]) -> None:
        text = text.lstrip(SPACE) if self._quiet else text
        body = text.rstrip(SPACE)
        if body:
            out.append(Piece("reasoning", "".join(self._white) + body))
            self._white, self._quiet = [], False
        if len(text) > len(body):
            self._white.append(text[len(body) :])

    def _following(self, text: str) -> list[Piece]:
        text = text.lstrip(SPACE) if self._quiet else text
        self._quiet = self._quiet and not text
        return self._follow(text)

    def _follow(self, text: str) -> list[Piece]:
        return self._rest.push(text) if self._rest else [Piece("content", text)]
