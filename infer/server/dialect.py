"""How a model writes what is no plain text: calls of functions, and reasoning."""

from __future__ import annotations

import re
from dataclasses import dataclass

from infer.chat import ChatTemplate
from infer.server.calls.formats import FORMATS, Format, detect
from infer.server.calls.thinking import CLOSE, OPEN

__all__ = ["Dialect"]

_TOOLS = re.compile(r"\btools\b")


@dataclass(frozen=True, slots=True)
class Dialect:
    """What is known of it.

    Attributes:
        form: of calls; None: not known.
        named: it writes the name of a function in front of its arguments (Mistral since v11).
        tools: its chat template shows functions to the model.
        thinks: an answer may begin with reasoning.
    """

    form: Format | None = None
    named: bool = False
    tools: bool = False
    thinks: bool = False

    @staticmethod
    def of(template: ChatTemplate | None, tools: str, reasoning: str) -> Dialect:
        """Of a model.

        Args:
            template: of its conversations.
            tools: ``auto``: the template says; ``none``, or a name among the formats.
            reasoning: ``auto``: the template says; ``none`` or ``think``.
        """
        source = "" if template is None else template.source
        form = detect(source) if tools == "auto" else None if tools == "none" else FORMATS[tools]
        tags = OPEN in source or CLOSE in source
        thinks = reasoning == "think" or (reasoning == "auto" and tags)
        return Dialect(form, "[ARGS]" in source, bool(_TOOLS.search(source)), thinks)
