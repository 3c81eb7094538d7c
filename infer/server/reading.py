"""What a model wrote, taken apart: content, reasoning, and calls of functions."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from infer.server.calls.piece import Parser, Piece, joined
from infer.server.calls.thinking import Thinking

__all__ = ["Called", "Reading"]


@dataclass(slots=True)
class Called:
    """A call of a function as far as it is known."""

    id: str
    name: str
    pieces: list[str] = field(default_factory=list)

    @property
    def arguments(self) -> str:
        """As text."""
        return "".join(self.pieces)


class Reading:
    """Of one choice.

    Args:
        calls: takes calls out of what is no reasoning; None: there are none.
        thinking: takes the reasoning off, and gives the rest to ``calls``; None: there is none.
        new_id: of a call.
        required: the text is made to be calls; what is left at its end was cut off, and is no content.

    Attributes:
        calls: so far.
        ended: nothing follows.
    """

    def __init__(
        self, calls: Parser | None, thinking: Thinking | None, new_id: Callable[[], str], *, required: bool = False
    ) -> None:
        self._parser, self.thinking, self._new_id = thinking or calls, thinking, new_id
        self._required = required
        self._content: list[str] = []
        self._reasoning: list[str] = []
        self.calls: list[Called] = []
        self.ended = False

    @property
    def content(self) -> str:
        """What is neither reasoning nor a call."""
        return "".join(self._content)

    @property
    def reasoning(self) -> str:
        """What comes before the answer."""
        return "".join(self._reasoning)

    def take(self, text: str) -> list[Piece]:
        """What is certain after more text."""
        return self._kept(self._parser.push(text) if self._parser else joined([Piece("content", text)]))

    def end(self) -> list[Piece]:
        """What was held back, as nothing follows."""
        if self.ended:
            return []
        self.ended = True
        left = self._parser.flush() if self._parser else []
        return self._kept([piece for piece in left if not (self._required and piece.kind == "content")])

    def _kept(self, pieces: list[Piece]) -> list[Piece]:
        for piece in pieces:
            if piece.kind == "call":
                self.calls.append(Called(self._new_id(), piece.text))
            elif piece.kind == "arguments":
                self.calls[piece.call].pieces.append(piece.text)
            else:
                (self._content if piece.kind == "content" else self._reasoning).append(piece.text)
        return pieces
