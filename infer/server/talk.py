"""From a conversation to work for the engine, and back to what is read off its text."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from infer.constraint import Constraint
from infer.params import SamplingParams
from infer.server.answer import Form, Work, answer
from infer.server.calls.formats import PLAIN, Format
from infer.server.calls.grammar import Signature, answer_after, grammar
from infer.server.calls.thinking import CLOSE, OPEN, Thinking
from infer.server.codec import Codec
from infer.server.dialect import Dialect
from infer.server.errors import invalid
from infer.server.exchange import Exchange
from infer.server.messages import NamedTool, Tool, ToolChoice
from infer.server.prompts import check_length, check_tokens
from infer.server.reading import Reading
from infer.server.server import Server

__all__ = ["Conversation", "Talk", "prepare"]

_NOTHING: dict[str, Any] = {"type": "object", "properties": {}, "additionalProperties": False}


@dataclass(frozen=True, slots=True, kw_only=True)
class Conversation:
    """What is to be answered.

    Attributes:
        messages: as chat templates want them.
        tools: that may be called.
        choice: which of them, or whether.
        parallel: several calls in one answer.
        begin: end the prompt where the answer begins.
        variables: of the template.
        param: the field that the messages come from.
        form_field: the one that the form of the answer comes from.
    """

    messages: Sequence[Mapping[str, Any]]
    tools: Sequence[Tool] = ()
    choice: ToolChoice | None = None
    parallel: bool = True
    begin: bool = True
    variables: Mapping[str, Any] | None = None
    param: str = "messages"
    form_field: str = "response_format"

    @property
    def required(self) -> bool:
        """The answer must be a call."""
        return self.choice not in (None, "auto", "none")


@dataclass(frozen=True, slots=True)
class Talk:
    """A conversation that can be answered.

    Attributes:
        work: for the engine.
        names: of the functions that may be called.
        form: how they are written; None: there are none.
        eager: the answer is made to have the form of calls, if it has any.
        required: it is calls and nothing else.
        thought: reasoning comes first: ``opened`` by the prompt, ``possible``, or ``none``.
        form_field: the field that the form of the answer comes from.
    """

    work: Work
    names: tuple[str, ...]
    form: Format | None
    eager: bool
    required: bool
    thought: str
    form_field: str

    def reading(self) -> Reading:
        """Of one choice."""
        calls = self.form.parser(self.names, eager=self.eager) if self.form and self.names else None
        thinking = None if self.thought == "none" else Thinking(opened=self.thought == "opened", rest=calls)
        return Reading(calls, thinking, (self.form or PLAIN).new_id, required=self.required)

    @property
    def plain(self) -> bool:
        """The text is the content."""
        return self.thought == "none" and not self.names

    def reasoned(self, codec: Codec, tokens: Sequence[int], reading: Reading) -> int:
        """How many of the tokens of a choice are reasoning, with its tags."""
        thinking = reading.thinking
        if thinking is None or not thinking.length:
            return 0
        if thinking.inside:
            return len(tokens)
        mark = codec.token(CLOSE)
        if mark in tokens:
            return tokens.index(mark) + 1
        reader = codec.reader(self.work.prompts[0], skip=self.work.params[0].skip_special_tokens)
        if reader is None:
            return 0
        return next(
            (place for place, token in enumerate(tokens) if reader.place(token) >= thinking.length), len(tokens)
        )

    async def answer(self, server: Server, exchange: Exchange, form: Form, *, stream: bool) -> None:
        """Have the engine answer, and tell the client; see :func:`~infer.server.answer.answer`."""
        exchange.names = {"constraint": self.form_field}
        await answer(server, exchange, self.work, form, stream=stream)


async def prepare(
    server: Server, conversation: Conversation, most: int | None, params: Callable[[int], SamplingParams]
) -> Talk:
    """Render a conversation, and say what its answer may be.

    Args:
        server: that answers.
        conversation: to answer.
        most: tokens to generate; None: as many as fit.
        params: for so many tokens.

    Raises:
        ApiError: it cannot be honoured.
        RequestError: the template refuses it.
    """
    dialect, codec = server.dialect, server.codec
    tools = () if conversation.choice == "none" else tuple(conversation.tools)
    _check_tools(tools, conversation, dialect)
    prompt, tail = await codec.converse(
        conversation.messages,
        tools=[tool.plain() for tool in tools] or None,
        answer=conversation.begin,
        variables=conversation.variables,
        param=conversation.param,
    )
    if not prompt:
        raise invalid(f"{conversation.param}: the conversation has no tokens", conversation.param)
    check_tokens(prompt, server.model, conversation.param, conversation.param)
    most = max(1, server.model.context - len(prompt)) if most is None else most
    check_length(len(prompt), most, server.model, conversation.param)
    thought = "none"
    if dialect.thinks and conversation.begin and not tail.endswith(CLOSE):
        thought = "opened" if tail.endswith(OPEN) else "possible"
    asked, form, eager = params(most), dialect.form, False
    if tools and (constraint := _calls(tools, conversation, dialect, asked.constraint, thought, codec)):
        asked, eager = dataclasses.replace(asked, constraint=constraint), True
        form = PLAIN if form is None or form.syntax is None else form
    elif asked.constraint is not None:
        if thought != "none":
            asked = dataclasses.replace(asked, constraint=_plain(asked.constraint, conversation.form_field))
            assert asked.constraint is not None
        after = answer_after(asked.constraint, thought, codec.token)
        thought = "none" if after is None else thought
        asked = dataclasses.replace(asked, constraint=after or asked.constraint)
    if any(codec.special(mark) for mark in _marks(form if tools else None, thought)):
        asked = dataclasses.replace(asked, skip_special_tokens=False)
    names = tuple(tool.function.name for tool in tools)
    work = Work([prompt], [asked], conversation.param)
    field = "tools" if eager else conversation.form_field
    return Talk(work, names, form if names else None, eager, eager and conversation.required, thought, field)


def _check_tools(tools: Sequence[Tool], conversation: Conversation, dialect: Dialect) -> None:
    if not tools:
        return
    if not dialect.tools:
        raise invalid("tools: the chat template of this model shows none to it", "tools", "unsupported_parameter")
    if dialect.form is None and conversation.choice in (None, "auto"):
        told = "tool_choice: how this model writes calls is not known; require one, or give the server a tool_parser"
        raise invalid(told, "tool_choice", "unsupported_parameter")


def _calls(
    tools: Sequence[Tool],
    conversation: Conversation,
    dialect: Dialect,
    own: Constraint | None,
    thought: str,
    codec: Codec,
) -> Constraint | None:
    """What the answer must be for the sake of its calls; None: anything."""
    choice = conversation.choice
    required = conversation.required
    strict = any(tool.function.strict for tool in tools)
    if not required and not strict and conversation.parallel and own is None:
        return None
    if own is not None and (required or own.kind != "json"):
        field = conversation.form_field
        raise invalid(f"{field}: what must be a call, or a text of this form, cannot be both", field)
    own = None if own is None else _plain(own, conversation.form_field)
    form = dialect.form
    if form is None or form.syntax is None:
        if not required:
            raise invalid("tools: calls of this model cannot be made to keep a form (strict, parallel)", "tools")
        form = PLAIN
    wanted = [tool for tool in tools if not isinstance(choice, NamedTool) or tool.function.name == choice.function.name]
    functions = [
        Signature(
            tool.function.name,
            (tool.function.parameters or _NOTHING) if required or tool.function.strict else {"type": "object"},
        )
        for tool in wanted
    ]
    return grammar(
        form,
        functions,
        token=codec.token,
        required=required,
        parallel=conversation.parallel and not isinstance(choice, NamedTool),
        thought=thought,
        named=dialect.named,
        schema=None if own is None else own.text,
    )


def _plain(constraint: Constraint, field: str) -> Constraint:
    """The same, with its JSON written anew: what else is in the text would become a part of a grammar."""
    if constraint.kind not in ("json", "choice"):
        return constraint
    try:
        return Constraint(constraint.kind, json.dumps(json.loads(constraint.text)))
    except (ValueError, RecursionError):
        raise invalid(f"{field}: is not JSON", field) from None


def _marks(form: Format | None, thought: str) -> list[str]:
    marks = [] if thought == "none" else [OPEN, CLOSE]
    if form is not None and form.syntax is not None:
        marks += [text for text in (form.syntax.begin, form.syntax.closing) if len(text) > 1]
    return marks
