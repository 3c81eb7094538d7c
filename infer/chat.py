"""Chat templates: a conversation as the text that the model was taught to continue."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

from infer.request import RequestError
from parallel.errors import ModelFolderError

__all__ = ["ChatTemplate"]


class ChatTemplate:
    """The template of a model folder (``chat_template.jinja``, or ``chat_template`` of tokenizer_config.json).

    It is rendered in jinja2's sandbox as `transformers` does: same variables and same filters; and in limited time, as
    far as it is Python that takes it. What may harm nobody is rendered by :class:`~infer.server.rendering.Renderer`.

    Args:
        folder: of the model.
        seconds: longest time that a conversation may take.

    Attributes:
        source: of the template; of that for tools, if there are two.
        sources: by name: ``default`` and perhaps ``tool_use``.
        special: tokens that it may use.

    Raises:
        ModelFolderError: there is no template, it cannot be read, or jinja2 is not installed.
    """

    def __init__(self, folder: Path | str, *, seconds: float = 2.0) -> None:
        try:
            from infer.template import TemplateError, Templates
        except ImportError as error:
            raise ModelFolderError(f"chat templates need jinja2: pip install 'lockstep[serve]' ({error})") from None
        folder, self.seconds, self._failure = Path(folder), seconds, TemplateError
        self.sources, self.special = _read(folder)
        self.source = self.sources.get("tool_use", self.sources["default"])
        try:
            self._templates = Templates(self.sources, self.special)
        except TemplateError as error:
            raise ModelFolderError(f"{folder}: chat template: {error}") from None

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        answer: bool = True,
        **more: Any,
    ) -> str:
        """The text of a conversation.

        Args:
            messages: each with ``role`` and ``content``.
            tools: descriptions of functions that the model may call.
            answer: end where the model's answer begins.
            more: other variables of the template.

        Raises:
            RequestError: no conversation, the template refuses it, or takes too long.
        """
        name, variables = self.asked(messages, tools=tools, answer=answer, **more)
        try:
            with _Deadline(self.seconds):
                return self._templates.render(name, variables)
        except TimeoutError:
            raise RequestError(f"messages: the chat template took longer than {self.seconds:g} s") from None
        except self._failure as error:
            raise RequestError(f"messages: {error}") from None

    def asked(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        answer: bool = True,
        **more: Any,
    ) -> tuple[str, dict[str, Any]]:
        """Which of the sources is for a conversation, and its variables; see :meth:`render`.

        Raises:
            RequestError: no conversation.
        """
        if not messages:
            raise RequestError("messages: a conversation needs at least one")
        variables = {"messages": list(messages), "tools": tools, "add_generation_prompt": answer, **more}
        return "tool_use" if tools and "tool_use" in self.sources else "default", variables


def _read(folder: Path) -> tuple[dict[str, str], dict[str, str]]:
    """The template, with one for tools if there is one, and the special tokens that it may use."""
    path, file = folder / "tokenizer_config.json", folder / "chat_template.jinja"
    try:
        config = json.loads(path.read_text()) if path.exists() else {}
        source = file.read_text() if file.exists() else config.get("chat_template")
    except (OSError, ValueError) as error:
        raise ModelFolderError(f"{folder}: {error}") from None
    named = [("default", source)]
    if isinstance(source, list):
        named = [(entry["name"], entry["template"]) for entry in source]
    sources = {name: text for name, text in named if name in ("default", "tool_use") and isinstance(text, str)}
    if "default" not in sources:
        raise ModelFolderError(f"{folder}: the model has no chat template")
    special = {}
    for name, value in config.items():
        if name.endswith("_token") and value is not None:
            special[name] = value["content"] if isinstance(value, dict) else str(value)
    return sources, special


class _Deadline:
    """Ends Python code of this thread that runs for too long."""

    def __init__(self, seconds: float) -> None:
        self._until = time.monotonic() + seconds

    def __enter__(self) -> None:
        self._before = sys.gettrace()
        sys.settrace(self._trace)

    def __exit__(self, *error: object) -> None:
        sys.settrace(self._before)

    def _trace(self, frame: FrameType, event: str, argument: Any) -> Any:
        if time.monotonic() > self._until:
            raise TimeoutError
        return self._trace
