"""How families write calls; one line each in the registry."""

from __future__ import annotations

import secrets
import string
from collections.abc import Collection
from dataclasses import dataclass

from infer.server.calls.parser import CallParser, Syntax
from infer.server.calls.piece import Parser
from infer.server.calls.pythonic import PythonicParser
from parallel.registry import Registry

__all__ = ["FORMATS", "PLAIN", "Format", "detect"]

_LETTERS = string.ascii_letters + string.digits


@dataclass(frozen=True, slots=True, kw_only=True)
class Format:
    """How a family writes calls.

    Attributes:
        signs: a chat template that has one of these texts is of the family.
        unlike: unless it has one of these.
        syntax: of calls as JSON; None: they are written as in Python.
        pad: white space that the family puts inside of ``begin`` and ``closing``.
        short_ids: its templates want the ids of calls to be nine letters and digits.
    """

    signs: tuple[str, ...] = ()
    unlike: tuple[str, ...] = ()
    syntax: Syntax | None
    pad: str = ""
    short_ids: bool = False

    def parser(self, names: Collection[str], *, eager: bool) -> Parser:
        """For one answer; see :class:`~infer.server.calls.parser.CallParser`."""
        return PythonicParser(names) if self.syntax is None else CallParser(self.syntax, names, eager=eager)

    def new_id(self) -> str:
        """Of a call."""
        if self.short_ids:
            return "".join(secrets.choice(_LETTERS) for _ in range(9))
        return f"call_{secrets.token_hex(12)}"


HERMES = Format(
    signs=("<tool_call>",),
    unlike=("<function=", "<arg_key>"),
    syntax=Syntax(begin="<tool_call>", closing="</tool_call>"),
    pad="\n",
)
LLAMA = Format(
    signs=("<|python_tag|>", '"parameters": dictionary of argument name and its value'),
    syntax=Syntax(begin="<|python_tag|>", bare=True, separator=";", arguments=("parameters", "arguments")),
)
MISTRAL = Format(
    signs=("[TOOL_CALLS]",),
    syntax=Syntax(begin="[TOOL_CALLS]", opening="[", separator=",", closing="]", named=True),
    short_ids=True,
)
PYTHONIC = Format(syntax=None)
PLAIN = Format(syntax=Syntax(bare=True, opening="[", separator=",", closing="]"))
"""Of answers that are made to be calls, for models that have no format of their own."""

FORMATS: Registry[Format] = Registry(
    "tool parser",
    {
        "hermes": "infer.server.calls.formats:HERMES",
        "llama": "infer.server.calls.formats:LLAMA",
        "mistral": "infer.server.calls.formats:MISTRAL",
        "pythonic": "infer.server.calls.formats:PYTHONIC",
    },
)


def detect(template: str) -> Format | None:
    """The format that a chat template teaches, if it is one of ours."""
    for name in FORMATS:
        found = FORMATS[name]
        if any(sign in template for sign in found.signs) and not any(text in template for text in found.unlike):
            return found
    return None
