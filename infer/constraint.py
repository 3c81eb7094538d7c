"""What a completion must be, as plain text: the seam between those who ask for a form and those who keep it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

__all__ = ["KINDS", "Constraint"]

Kind = Literal["json", "regex", "grammar", "choice"]
KINDS: tuple[str, ...] = get_args(Kind)


@dataclass(frozen=True, slots=True)
class Constraint:
    """The form of a completion.

    Attributes:
        kind: what ``text`` is.
        text: a JSON schema; a regular expression, which the whole completion matches; a grammar in the Lark of
            llguidance; or a JSON list of texts, one of which the completion is.
    """

    kind: Kind
    text: str

    def to_json(self) -> dict[str, Any]:
        """As plain values."""
        return {"kind": self.kind, "text": self.text}

    @staticmethod
    def from_json(values: Mapping[str, Any]) -> Constraint:
        """What :meth:`to_json` gave."""
        return Constraint(kind=values["kind"], text=values["text"])
