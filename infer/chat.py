"""Chat templates: a conversation as the text that the model was taught to continue."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from types import FrameType
from typing import Any

from infer.request import RequestError
from parallel.errors import ModelFolderError

__all__ = ["ChatTemplate"]

_LONGEST = 4 << 20
"""Characters of a text that a template may make."""


class ChatTemplate:
    """The template of a model folder (``chat_template.jinja``, or ``chat_template`` of tokenizer_config.json).

    It is rendered in jinja2's sandbox, in limited time, and as `transformers` does: same variables and same filters.

    Args:
        folder: of the model.
        seconds: longest time that a conversation may take.

    Attributes:
        source: of the template; of that for tools, if there are two.

    Raises:
        ModelFolderError: there is no template, it cannot be read, or jinja2 is not installed.
    """

    def __init__(self, folder: Path | str, *, seconds: float = 2.0) -> None:
        try:
            from jinja2 import TemplateError
            from jinja2.ext import Extension, loopcontrols
            from jinja2.sandbox import ImmutableSandboxedEnvironment
        except ImportError as error:
            raise ModelFolderError(f"chat templates need jinja2: pip install 'lockstep[serve]' ({error})") from None
        folder, self.seconds, self._failure = Path(folder), seconds, TemplateError
        sources, self._special = _read(folder)
        self.source = sources.get("tool_use", sources["default"])

        class Limited(ImmutableSandboxedEnvironment):
            intercepted_binops = frozenset({"*", "**"})

            def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
                if not isinstance(left, int | float) or not isinstance(right, int | float) or operator == "**":
                    raise TemplateError(f"a chat template may not use {operator} on {left!r:.40} and {right!r:.40}")
                return left * right

        extensions: list[str | type[Extension]] = [loopcontrols]
        environment = Limited(trim_blocks=True, lstrip_blocks=True, extensions=extensions)
        environment.filters["tojson"] = _to_json
        environment.globals["raise_exception"] = self._raise
        environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
        try:
            self._templates = {name: environment.from_string(source) for name, source in sources.items()}
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
        if not messages:
            raise RequestError("messages: a conversation needs at least one")
        variables = {"messages": list(messages), "tools": tools, "add_generation_prompt": answer}
        try:
            with _Deadline(self.seconds):
                name = "tool_use" if tools and "tool_use" in self._templates else "default"
                text = self._templates[name].render(**self._special, **variables, **more)
        except TimeoutError:
            raise RequestError(f"messages: the chat template took longer than {self.seconds:g} s") from None
        except (self._failure, TypeError, ValueError, KeyError, AttributeError, OverflowError, RecursionError) as error:
            raise RequestError(f"messages: the chat template says: {error}") from None
        if len(text) > _LONGEST:
            raise RequestError(f"messages: the chat template made {len(text):,} characters; {_LONGEST:,} are allowed")
        return text

    def _raise(self, message: str) -> None:
        raise self._failure(message)


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


def _to_json(value: Any, ensure_ascii: bool = False, indent: int | None = None, **more: Any) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, **more)


class _Deadline:
    """Ends Python code of this thread that runs for too long; a template has no other way to be endless."""

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
