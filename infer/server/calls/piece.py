"""What a model's text is made of."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable
from typing import Literal, NamedTuple

__all__ = ["SPACE", "Kind", "Parser", "Piece", "held", "joined"]

Kind = Literal["content", "reasoning", "call", "arguments"]
SPACE = " \t\r\n"


class Piece(NamedTuple):
    """A part of it.

    Attributes:
        kind: what it belongs to; ``call`` begins one.
        text: of ``call``: the name of the function.
        call: which one it belongs to, counted from 0.
    """

    kind: Kind
    text: str
    call: int = -1


class Parser(ABC):
    """Takes a text apart as it comes. The pieces of the whole do not depend on how it is cut, once they are joined."""

    @abstractmethod
    def push(self, text: str) -> list[Piece]:
        """What is certain now."""

    @abstractmethod
    def flush(self) -> list[Piece]:
        """What was held back, as nothing follows."""


def joined(pieces: Iterable[Piece]) -> list[Piece]:
    """The same with neighbours that belong together as one."""
    groups: list[tuple[Piece, list[str]]] = []
    for piece in pieces:
        if groups and piece.kind != "call" and groups[-1][0][::2] == piece[::2]:
            groups[-1][1].append(piece.text)
        elif piece.text:
            groups.append((piece, [piece.text]))
    return [piece._replace(text="".join(texts)) for piece, texts in groups]


def held(text: str, marker: str, start: int = 0) -> int:
    """How many characters at the end of ``text[start:]`` may be the beginning of the marker."""
    for length in range(min(len(marker) - 1, len(text) - start), 0, -1):
        if text.endswith(marker[:length]):
            return length
    return 0
