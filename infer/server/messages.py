"""Messages of a conversation, and the functions that it may call."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from infer.server.body import Body, Lenient
from infer.server.errors import ApiError, invalid
from infer.server.exchange import DEEPEST, check_parts, read_object

__all__ = [
    "Call",
    "CallId",
    "Function",
    "FunctionName",
    "Message",
    "Messages",
    "NamedFunction",
    "NamedTool",
    "Part",
    "Tool",
    "ToolChoice",
    "Tools",
    "check_arguments",
    "check_calls",
    "check_tools",
    "read_arguments",
]

FunctionName = Annotated[str, Field(pattern=r"^[a-zA-Z0-9_-]{1,64}$")]
CallId = Annotated[str, Field(min_length=1, max_length=128)]


class Part(Body):
    """A part of a message."""

    type: Literal["text"]
    text: str


class NamedFunction(Body):
    """A function by its name."""

    name: FunctionName


class Function(NamedFunction):
    """A function that the model may call."""

    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(Body):
    """Something that the model may use: a function."""

    type: Literal["function"]
    function: Function

    def plain(self) -> dict[str, Any]:
        """As chat templates want it."""
        return {"type": "function", "function": self.function.model_dump(exclude_none=True, exclude={"strict"})}


class NamedTool(Body):
    """The tool that must be used."""

    type: Literal["function"]
    function: NamedFunction


class Arguments(NamedFunction):
    """Which function was called with what."""

    arguments: str


class Call(Body):
    """A call that the model made before."""

    id: CallId
    type: Literal["function"] = "function"
    function: Arguments


Tools = Annotated[list[Tool], Field(fail_fast=True, max_length=128)]
ToolChoice = Literal["none", "auto", "required"] | NamedTool
Content = str | Annotated[list[Part], Field(fail_fast=True, min_length=1, max_length=1024)]


class Message(Lenient):
    """A message of a conversation."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Content | None = None
    name: Annotated[str, Field(max_length=64)] | None = None
    reasoning_content: str | None = None
    tool_calls: Annotated[list[Call], Field(fail_fast=True, max_length=128)] | None = None
    tool_call_id: CallId | None = None

    unset = ("refusal", "audio", "function_call", "annotations")

    @model_validator(mode="after")
    def _of_its_role(self) -> Message:
        if self.content is None and not (self.role == "assistant" and self.tool_calls):
            raise invalid(
                "messages.content: is required, except of an assistant that calls functions", "messages.content"
            )
        for name in ("tool_calls", "reasoning_content"):
            if self.role != "assistant" and getattr(self, name) is not None:
                raise invalid(f"messages.{name}: only an assistant has any", f"messages.{name}")
        if (self.role == "tool") != (self.tool_call_id is not None):
            raise invalid("messages.tool_call_id: messages of a tool have one, others none", "messages.tool_call_id")
        return self

    @property
    def text(self) -> str:
        """The texts of the parts one after the other."""
        content = self.content or ""
        return content if isinstance(content, str) else "".join(part.text for part in content)

    def plain(self) -> dict[str, Any]:
        """As chat templates want it: a text, and the arguments of calls as values.

        Raises:
            ApiError: arguments that are no JSON object.
        """
        more: dict[str, Any] = {}
        for name in ("name", "reasoning_content", "tool_call_id"):
            if getattr(self, name) is not None:
                more[name] = getattr(self, name)
        if self.tool_calls:
            more["tool_calls"] = [
                {
                    "id": call.id,
                    "type": "function",
                    "function": {"name": call.function.name, "arguments": read_arguments(call.function.arguments)},
                }
                for call in self.tool_calls
            ]
        return {"role": self.role, "content": self.text, **more}


Messages = Annotated[list[Message], Field(fail_fast=True, min_length=1, max_length=4096)]


def check_arguments(texts: Sequence[str], param: str = "messages.tool_calls") -> None:
    """Refuse arguments of calls that would take long to read (400), all together."""
    check_parts("".join(texts).encode(), f"{param}: what they have as arguments")


def read_arguments(text: str, param: str = "messages.tool_calls") -> dict[str, Any]:
    """Arguments of a call, which travel as a text.

    Raises:
        ApiError: they are no JSON object.
    """
    try:
        return read_object(bytearray(text.encode()) or bytearray(b"{}"), "arguments")
    except ApiError:
        told = f"{param}: arguments must be a JSON object, not deeper than {DEEPEST}"
        raise invalid(told, param) from None


def check_calls(messages: Sequence[Message]) -> None:
    """Refuse answers of tools to calls that were not made (400)."""
    check_arguments([call.function.arguments for message in messages for call in message.tool_calls or ()])
    made: set[str] = set()
    for place, message in enumerate(messages):
        made |= {call.id for call in message.tool_calls or ()}
        if message.tool_call_id is not None and message.tool_call_id not in made:
            told = f"messages[{place}].tool_call_id: no assistant before it made this call"
            raise invalid(told, "messages.tool_call_id")


def check_tools(tools: Sequence[Tool] | None, choice: ToolChoice | None, param: str = "tools.function") -> None:
    """Refuse tools that are not one of each name, and a choice of what is not there (400)."""
    names = [tool.function.name for tool in tools or ()]
    if len(set(names)) < len(names):
        raise invalid("tools: two functions have the same name", "tools")
    for tool in tools or ():
        parameters = tool.function.parameters or {}
        if parameters.get("type", "object") != "object":
            raise invalid("tools: the parameters of a function are the schema of an object", f"{param}.parameters")
    if isinstance(choice, NamedTool) and choice.function.name not in names:
        raise invalid("tool_choice: there is no tool of this name", "tool_choice")
    if choice == "required" and not names:
        raise invalid("tool_choice: there are no tools", "tool_choice")
