"""What clients send to /v1/responses."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Discriminator, Field, Tag, model_validator

from infer.constraint import Constraint
from infer.params import SamplingParams
from infer.server.body import Body, Lenient
from infer.server.errors import invalid
from infer.server.forms import of_schema
from infer.server.messages import (
    CallId,
    Function,
    FunctionName,
    NamedFunction,
    NamedTool,
    Tool,
    ToolChoice,
    check_arguments,
    check_tools,
    read_arguments,
)

__all__ = ["ResponsesBody"]

Whole = Annotated[int, Field(ge=-(2**63), le=2**63 - 1)]
Number = Annotated[float, Field(allow_inf_nan=False)]
Id = Annotated[str, Field(max_length=128)] | None
Status = Literal["in_progress", "completed", "incomplete"] | None


class TextPart(Body):
    """A part of a message; what an answer of ours has besides its text may come back."""

    type: Literal["input_text", "output_text"]
    text: str
    annotations: Annotated[list[Any], Field(max_length=0)] | None = None
    logprobs: Annotated[list[Any], Field(max_length=0)] | None = None


Texts = str | Annotated[list[TextPart], Field(fail_fast=True, max_length=1024)]


class MessageItem(Body):
    """A message."""

    type: Literal["message"] = "message"
    role: Literal["system", "developer", "user", "assistant"]
    content: Texts
    id: Id = None
    status: Status = None
    phase: str | None = None


class CallItem(Lenient):
    """A call that the model made."""

    type: Literal["function_call"]
    call_id: CallId
    name: FunctionName
    arguments: str
    id: Id = None
    status: Status = None

    unset = ("async", "caller", "namespace")


class ResultItem(Body):
    """What a function gave back."""

    type: Literal["function_call_output"]
    call_id: CallId
    output: Texts
    id: Id = None
    status: Status = None


class ThoughtPart(Body):
    """A part of reasoning."""

    type: Literal["reasoning_text"]
    text: str


class ThoughtItem(Body):
    """Reasoning of the model."""

    type: Literal["reasoning"]
    id: Id = None
    summary: Annotated[list[Any], Field(max_length=0)] | None = None
    content: Annotated[list[ThoughtPart], Field(fail_fast=True, max_length=1024)] | None = None
    encrypted_content: None = None
    status: Status = None


def _kind(value: Any) -> str:
    found = value.get("type", "message") if isinstance(value, dict) else getattr(value, "type", "message")
    return found if isinstance(found, str) else ""


Item = Annotated[
    Annotated[MessageItem, Tag("message")]
    | Annotated[CallItem, Tag("function_call")]
    | Annotated[ResultItem, Tag("function_call_output")]
    | Annotated[ThoughtItem, Tag("reasoning")],
    Discriminator(_kind),
]


class FlatTool(Function, Lenient):
    """A function that the model may call."""

    type: Literal["function"]

    unset = ("async", "allowed_callers", "defer_loading", "output_schema")


class FlatChoice(NamedFunction):
    """The function that must be called."""

    type: Literal["function"]


class Format(Body):
    """The form of a text."""

    type: Literal["text", "json_object", "json_schema"] = "text"
    name: Annotated[str, Field(max_length=64)] | None = None
    description: str | None = None
    schema_: Annotated[dict[str, Any] | None, Field(alias="schema")] = None
    strict: bool | None = None

    @model_validator(mode="after")
    def _has_a_schema(self) -> Format:
        if (self.schema_ is not None) != (self.type == "json_schema"):
            raise invalid("text.format.schema: json_schema has one, the others none", "text.format.schema")
        return self

    def constraint(self) -> Constraint | None:
        """For the engine."""
        if self.type == "text":
            return None
        return of_schema({"type": "object"} if self.schema_ is None else self.schema_, "text.format")


class Text(Lenient):
    """What is said of the text of the answer."""

    format: Format = Format()

    unset = ("verbosity", "format")


class Options(Body):
    """Of a stream."""

    include_obfuscation: Literal[False] | None = None


class ResponsesBody(Body):
    """POST /v1/responses."""

    model: Annotated[str, Field(max_length=512)]
    input: (
        Annotated[str, Field(min_length=1)]
        | Annotated[list[Item], Field(fail_fast=True, min_length=1, max_length=4096)]
    )
    instructions: str | None = None
    tools: Annotated[list[FlatTool], Field(fail_fast=True, max_length=128)] | None = None
    tool_choice: Literal["none", "auto", "required"] | FlatChoice | None = None
    parallel_tool_calls: bool | None = None
    text: Text | None = None
    max_output_tokens: Whole | None = None
    temperature: Number | None = None
    top_p: Number | None = None
    stream: bool | None = None
    stream_options: Options | None = None
    metadata: Annotated[dict[str, Annotated[str, Field(max_length=512)]], Field(max_length=16)] | None = None

    neutral: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        "store": (False,),
        "background": (False,),
        "previous_response_id": (),
        "conversation": (),
        "prompt": (),
        "include": ([],),
        "truncation": ("disabled",),
        "reasoning": ({},),
        "top_logprobs": (0,),
        "max_tool_calls": (),
        "context_management": (),
        "user": (),
        "service_tier": ("auto", "default"),
        "safety_identifier": (),
        "prompt_cache_key": (),
        "prompt_cache_retention": (),
        "moderation": (),
        "access_programs": (),
        "background_options": (),
        "image": (),
        "prompt_cache_options": (),
    }

    @model_validator(mode="after")
    def _agree(self) -> ResponsesBody:
        if self.max_output_tokens is not None and self.max_output_tokens < 1:
            raise invalid("max_output_tokens: must be at least 1", "max_output_tokens")
        check_tools(self.functions(), self.choice(), "tools")
        items = self.input if isinstance(self.input, list) else []
        check_arguments([item.arguments for item in items if isinstance(item, CallItem)], "input.arguments")
        made: set[str] = set()
        for place, item in enumerate(items):
            if isinstance(item, CallItem):
                made.add(item.call_id)
            elif isinstance(item, ResultItem) and item.call_id not in made:
                raise invalid(f"input[{place}].call_id: there is no such call before it", "input.call_id")
        return self

    def functions(self) -> list[Tool]:
        """The tools."""
        return [
            Tool(type="function", function=Function(**own.model_dump(exclude={"type"}))) for own in self.tools or ()
        ]

    def choice(self) -> ToolChoice | None:
        """Which of them."""
        if isinstance(self.tool_choice, FlatChoice):
            return NamedTool(type="function", function=NamedFunction(name=self.tool_choice.name))
        return self.tool_choice

    def params(self, most: int) -> SamplingParams:
        """For the engine."""
        return SamplingParams(
            max_tokens=most,
            temperature=1.0 if self.temperature is None else self.temperature,
            top_p=1.0 if self.top_p is None else self.top_p,
            constraint=None if self.text is None else self.text.format.constraint(),
        )

    def messages(self) -> list[dict[str, Any]]:
        """As chat templates want them: what the assistant thinks, says and calls in a row is one message.

        Raises:
            ApiError: arguments of a call that are no JSON object.
        """
        out: list[dict[str, Any]] = []
        if self.instructions is not None:
            out.append({"role": "system", "content": self.instructions})
        if isinstance(self.input, str):
            return [*out, {"role": "user", "content": self.input}]
        for item in self.input:
            if isinstance(item, ResultItem):
                out.append({"role": "tool", "content": _text(item.output), "tool_call_id": item.call_id})
            elif isinstance(item, MessageItem) and item.role != "assistant":
                out.append({"role": item.role, "content": _text(item.content)})
            else:
                own = _of_assistant(item)
                last = out[-1] if out and out[-1]["role"] == "assistant" else None
                if last is None or set(own) & set(last) - {"tool_calls"} or "tool_calls" in set(last) - set(own):
                    out.append({"role": "assistant"})
                calls = [*out[-1].get("tool_calls", ()), *own.pop("tool_calls", ())]
                out[-1] |= {**own, **({"tool_calls": calls} if calls else {})}
        return [{"content": "", **message} for message in out]


def _of_assistant(item: MessageItem | CallItem | ThoughtItem) -> dict[str, Any]:
    if isinstance(item, ThoughtItem):
        return {"reasoning_content": "".join(part.text for part in item.content or ())}
    if isinstance(item, MessageItem):
        return {"content": _text(item.content)}
    function = {"name": item.name, "arguments": read_arguments(item.arguments, "input.arguments")}
    return {"tool_calls": [{"id": item.call_id, "type": "function", "function": function}]}


def _text(texts: Texts) -> str:
    return texts if isinstance(texts, str) else "".join(part.text for part in texts)
