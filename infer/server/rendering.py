"""Conversations as texts, made where the chat template may be killed."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from infer.apart import Apart, Died
from infer.chat import ChatTemplate
from infer.request import RequestError
from infer.server.errors import ApiError

__all__ = ["Renderer"]

_PROGRAM = Path(__file__).parent.parent / "template.py"
_PATIENCE_S = 10.0


class Renderer:
    """A chat template in a process of its own, which is killed where a conversation takes too long or too much memory.

    Args:
        template: of the model; its ``seconds`` are those of a conversation.
        memory: bytes that one may take.
    """

    def __init__(self, template: ChatTemplate, *, memory: int = 512 << 20) -> None:
        self.template = template
        self._apart = Apart(_PROGRAM, lambda: {"sources": template.sources, "special": template.special}, memory=memory)

    @property
    def starts(self) -> int:
        """How often its process was started."""
        return self._apart.starts

    @property
    def pid(self) -> int | None:
        """Of the process, if there is one."""
        return self._apart.pid

    async def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        answer: bool = True,
        **more: Any,
    ) -> str:
        """As :meth:`~infer.chat.ChatTemplate.render`, one conversation at a time, off the event loop.

        Raises:
            RequestError: no conversation, the template refuses it, or takes too long or too much.
            ApiError: 503, those before it took too long.
        """
        name, variables = self.template.asked(messages, tools=tools, answer=answer, **more)
        asked, late = {"name": name, "variables": variables}, time.monotonic() + _PATIENCE_S
        return await self._apart.turn(self._rendered, asked, late)

    def _rendered(self, asked: Mapping[str, Any], late: float) -> str:
        if time.monotonic() > late:
            raise ApiError(503, "other conversations take the chat template too long; try again later")
        try:
            told = self._apart.ask(asked, self.template.seconds)
        except Died as died:
            told = {"problem": f"the chat template took longer than {self.template.seconds:g} s"}
            if died.why != "late":
                told = {"problem": "the chat template needs too much memory"}
        if "text" not in told:
            raise RequestError(f"messages: {told['problem']}")
        return str(told["text"])
