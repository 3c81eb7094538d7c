"""Chat templates in jinja2's sandbox; and the program that renders them where it may be killed.

Run as a program, it reads frames as :mod:`infer.apart` writes them: first ``{parent, bytes, sources, special}``, then
conversations ``{name, variables}``; each is answered by ``{text}`` or ``{problem}``. It imports nothing of ours.
"""

from __future__ import annotations

import ctypes
import json
import os
import resource
import signal
import struct
import sys
from collections.abc import Mapping
from datetime import datetime
from typing import Any

from jinja2 import TemplateError, nodes
from jinja2.compiler import CodeGenerator
from jinja2.ext import Extension, loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

__all__ = ["LONGEST", "TemplateError", "Templates", "main"]

LONGEST = 4 << 20
"""Characters of a text that a template may make."""
_REFUSALS = (TemplateError, TypeError, ValueError, KeyError, AttributeError, OverflowError, RecursionError)
_FRAME = struct.Struct("<I")


class _Generator(CodeGenerator):
    def _output_child_to_const(self, node: nodes.Expr, frame: Any, finalize: Any) -> str:
        if isinstance(node, nodes.TemplateData):
            return super()._output_child_to_const(node, frame, finalize)
        raise nodes.Impossible  # what a template computes is computed when it is rendered, not when it is read


class _Limited(ImmutableSandboxedEnvironment):
    intercepted_binops = frozenset({"*", "**", "%"})
    code_generator_class = _Generator

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        if operator == "%":
            return left % right
        if not isinstance(left, int | float) or not isinstance(right, int | float) or operator == "**":
            raise TemplateError(f"a chat template may not use {operator} on {left!r:.40} and {right!r:.40}")
        return left * right


class Templates:
    """Of a model, with the same variables and filters as `transformers` gives them.

    Args:
        sources: by name.
        special: tokens, by the names of their variables.

    Raises:
        TemplateError: one cannot be read.
    """

    def __init__(self, sources: Mapping[str, str], special: Mapping[str, str]) -> None:
        extensions: list[str | type[Extension]] = [loopcontrols]
        environment = _Limited(trim_blocks=True, lstrip_blocks=True, optimized=False, extensions=extensions)
        environment.filters["tojson"] = _to_json
        environment.globals["raise_exception"] = _raise
        environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
        try:
            self._templates = {name: environment.from_string(source) for name, source in sources.items()}
        except (RecursionError, MemoryError, SyntaxError, ValueError) as error:
            raise TemplateError(f"it cannot be read: {type(error).__name__}") from None
        self._special = dict(special)

    def render(self, name: str, variables: Mapping[str, Any]) -> str:
        """The text of a conversation.

        Raises:
            TemplateError: the template refuses it, or makes more than :data:`LONGEST` characters of it.
        """
        try:
            text = self._templates[name].render(**self._special, **variables)
        except _REFUSALS as error:
            raise TemplateError(f"the chat template says: {str(error)[:1000]}") from None
        if len(text) > LONGEST:
            raise TemplateError(f"the chat template made {len(text):,} characters; {LONGEST:,} are allowed")
        return text


def main() -> None:
    """The child."""
    about = _read()
    if about is None:
        return
    _confine(about["parent"], about["bytes"])
    try:
        templates = Templates(about["sources"], about["special"])
    except TemplateError as error:
        _write({"problem": str(error)})
        return
    _write({})
    while (asked := _read()) is not None:
        try:
            _write({"text": templates.render(asked["name"], asked["variables"])})
        except TemplateError as error:
            _write({"problem": str(error)})
        except MemoryError:
            _write({"problem": "the chat template needs too much memory"})
        del asked


def _confine(parent: int, memory: int) -> None:
    """Die with the parent, leave no core, and take no more memory than that."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, int(signal.SIGKILL))
        with open("/proc/self/statm") as file:
            most = int(file.read().split()[0]) * resource.getpagesize() + memory
        resource.setrlimit(resource.RLIMIT_AS, (most, most))
    if os.getppid() != parent:
        os._exit(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def _read() -> Any:
    """The next frame; None: there is none."""
    size = sys.stdin.buffer.read(_FRAME.size)
    return json.loads(sys.stdin.buffer.read(*_FRAME.unpack(size))) if len(size) == _FRAME.size else None


def _write(value: Mapping[str, Any]) -> None:
    data = json.dumps(value).encode()
    sys.stdout.buffer.write(_FRAME.pack(len(data)) + data)
    sys.stdout.buffer.flush()


def _raise(message: str) -> None:
    raise TemplateError(message)


def _to_json(value: Any, ensure_ascii: bool = False, indent: int | None = None, **more: Any) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, **more)


if __name__ == "__main__":
    main()
