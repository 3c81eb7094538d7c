"""What clients send, and what it means to the engine."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from itertools import islice
from typing import Annotated, Any, Literal, TypeVar

from pydantic import Field, ValidationError, WithJsonSchema, field_validator, model_validator

from infer.params import SamplingParams
from infer.server import foreign
from infer.server.body import Body
from infer.server.errors import MOST, ApiError, invalid, told
from infer.server.forms import ResponseFormat, StructuredOutputs, constraint_of
from infer.server.messages import Message, Messages, Part, ToolChoice, Tools, check_calls, check_tools
from infer.server.response_body import ResponsesBody
from infer.server.wording import Problem, problems_of, shown

__all__ = [
    "Body",
    "ChatBody",
    "CompletionBody",
    "DetokenizeBody",
    "EmbeddingBody",
    "Message",
    "Part",
    "SamplingBody",
    "StreamOptions",
    "TokenizeBody",
    "parse",
]

Whole = Annotated[int, Field(ge=-(2**63), le=2**64 - 1)]
Number = Annotated[float, Field(allow_inf_nan=False)]
Token = Annotated[int, Field(ge=0, le=2**31 - 1)]
Word = Annotated[str, Field(min_length=1, max_length=1024)]
_IDS: dict[str, Any] = {"type": "array", "items": {"type": "integer", "minimum": 0}, "minItems": 1}
_TEXTS: dict[str, Any] = {"type": "array", "items": {"type": "string", "minLength": 1}, "minItems": 1}
Prompts = Annotated[
    Any,
    WithJsonSchema(
        {"anyOf": [{"type": "string", "minLength": 1}, _TEXTS, _IDS, {"type": "array", "items": _IDS, "minItems": 1}]}
    ),
]
"""A text, texts, token ids, or lists of token ids; looked at by :mod:`infer.server.prompts`, as there may be many."""

_BOTH: dict[str, tuple[Any, ...]] = {"store": (False,), "service_tier": ("auto", "default")}
_LABELS = frozenset(("user", "metadata", "safety_identifier", "prompt_cache_key"))
"""Fields that say who asks and why, and ask for nothing: they are taken, and change no answer."""


class StreamOptions(Body):
    """Of a stream: whether its last chunk tells the number of tokens."""

    include_usage: bool | None = None
    include_obfuscation: Literal[False] | None = None


class SamplingBody(Body):
    """How the model is sampled; the names are those of :class:`~infer.params.SamplingParams`."""

    model: Annotated[str, Field(max_length=512)]
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    max_tokens: Whole | None = None
    min_tokens: Whole | None = None
    temperature: Number | None = None
    top_k: Whole | None = None
    top_p: Number | None = None
    min_p: Number | None = None
    typical_p: Number | None = None
    presence_penalty: Number | None = None
    frequency_penalty: Number | None = None
    repetition_penalty: Number | None = None
    logit_bias: Annotated[dict[str, Number], Field(max_length=4096)] | None = None
    allowed_tokens: Annotated[list[Token], Field(fail_fast=True, max_length=1 << 16)] | None = None
    banned_tokens: Annotated[list[Token], Field(fail_fast=True, max_length=1 << 16)] | None = None
    bad_words: (
        Annotated[list[Word | Annotated[list[Token], Field(fail_fast=True)]], Field(fail_fast=True, max_length=256)]
        | None
    ) = None
    seed: Whole | None = None
    stop: Word | Annotated[list[Word], Field(max_length=16)] | None = None
    stop_tokens: Annotated[list[Token], Field(max_length=256)] | None = None
    include_stop: bool | None = None
    ignore_eos: bool | None = None
    n: Whole | None = None
    best_of: Whole | None = None
    beams: Whole | None = None
    length_penalty: Number | None = None
    early_stopping: bool | Literal["never"] | None = None
    logprobs_of: Literal["raw", "processed"] | None = None
    skip_special_tokens: bool | None = None
    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None

    @model_validator(mode="after")
    def _usage_is_of_a_stream(self) -> SamplingBody:
        if self.stream_options is not None and not self.stream:
            raise invalid("stream_options: only a stream has any; set stream", "stream_options")
        constraint_of(self.response_format, self.structured_outputs)
        return self

    @property
    def form_field(self) -> str:
        """The field that asks for a form, if any does."""
        return "response_format" if self.structured_outputs is None else "structured_outputs"

    def params(self, max_tokens: int, logprobs: int | None, prompt_logprobs: int | None = None) -> SamplingParams:
        """The same for the engine; temperature 1 unless it is given, or there are beams.

        Args:
            max_tokens: to generate.
            logprobs, prompt_logprobs: to report.

        Raises:
            ApiError: a bias of something that is no token.
        """
        given: dict[str, Any] = {}
        for name in _SAME:
            value = getattr(self, name)
            if value is not None and not (value == -1 and name in _NONE_AS_WITH_VLLM):
                given[name] = tuple(value) if isinstance(value, list) else value
        if self.bad_words is not None:
            given["bad_words"] = tuple(word if isinstance(word, str) else tuple(word) for word in self.bad_words)
        if self.stop is not None:
            given["stop"] = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)
        if self.logit_bias:
            given["logit_bias"] = {_token(name): value for name, value in self.logit_bias.items()}
        given["constraint"] = constraint_of(self.response_format, self.structured_outputs)
        if (self.beams or 1) == 1:
            given.setdefault("temperature", 1.0)
        return SamplingParams(max_tokens=max_tokens, logprobs=logprobs, prompt_logprobs=prompt_logprobs, **given)


_FORMS = {"response_format", "structured_outputs"}
_ELSEWHERE = {"model", "stream", "stream_options", "max_tokens", "stop", "logit_bias", "bad_words"} | _FORMS
_NONE_AS_WITH_VLLM = ("top_k", "seed")
"""With vLLM -1 stands for all tokens, and for a seed of its own choice."""
_SAME = [name for name in SamplingBody.model_fields if name not in _ELSEWHERE]


class CompletionBody(SamplingBody):
    """POST /v1/completions."""

    prompt: Prompts
    echo: bool | None = None
    logprobs: Whole | None = None
    add_special_tokens: bool | None = None


Scalar = str | bool | int | float | None
_TAKEN = {"chat_template", "messages", "tools", "answer", "self", "add_generation_prompt"}


class ChatBody(SamplingBody):
    """POST /v1/chat/completions."""

    messages: Messages
    tools: Tools | None = None
    tool_choice: ToolChoice | None = None
    parallel_tool_calls: bool | None = None
    logprobs: bool | None = None
    top_logprobs: Whole | None = None
    max_completion_tokens: Whole | None = None
    add_generation_prompt: bool | None = None
    chat_template_kwargs: Annotated[dict[str, Scalar], Field(max_length=16)] | None = None

    @field_validator("chat_template_kwargs")
    @classmethod
    def _free_names(cls, value: dict[str, Scalar] | None) -> dict[str, Scalar] | None:
        for name in value or {}:
            if name in _TAKEN or name.endswith("_token") or not name.isidentifier():
                raise invalid("chat_template_kwargs: a name that the server gives itself", "chat_template_kwargs")
        return value

    @model_validator(mode="after")
    def _agree(self) -> ChatBody:
        if self.top_logprobs is not None and not self.logprobs:
            raise invalid("top_logprobs: set logprobs as well", "top_logprobs")
        if None not in (self.max_tokens, self.max_completion_tokens) and self.max_tokens != self.max_completion_tokens:
            raise invalid("max_tokens and max_completion_tokens contradict each other", "max_completion_tokens")
        check_tools(self.tools, self.tool_choice)
        check_calls(self.messages)
        return self


class EmbeddingBody(Body):
    """POST /v1/embeddings."""

    model: Annotated[str, Field(max_length=512)]
    input: Prompts
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: Whole | None = None
    prompt_name: Annotated[str, Field(max_length=512)] | None = None
    truncate: bool | None = None


class TokenizeBody(Body):
    """POST /tokenize: a text, or a conversation."""

    model: Annotated[str, Field(max_length=512)] | None = None
    prompt: str | None = None
    messages: Messages | None = None
    add_special_tokens: bool | None = None
    add_generation_prompt: bool | None = None

    @model_validator(mode="after")
    def _one(self) -> TokenizeBody:
        if (self.prompt is None) == (self.messages is None):
            raise invalid("give either prompt or messages", "prompt")
        if self.messages is not None and self.add_special_tokens is not None:
            raise invalid("add_special_tokens: a chat template says itself which it adds", "add_special_tokens")
        if self.messages is None and self.add_generation_prompt is not None:
            raise invalid("add_generation_prompt: only a conversation has one", "add_generation_prompt")
        return self


class DetokenizeBody(Body):
    """POST /detokenize."""

    model: Annotated[str, Field(max_length=512)] | None = None
    tokens: Annotated[list[Token], Field(fail_fast=True, max_length=1 << 20)]


_NEUTRAL: dict[type[Body], Mapping[str, tuple[Any, ...]]] = {
    CompletionBody: {**_BOTH, "suffix": ("",)},
    ChatBody: {
        **_BOTH,
        "functions": ([],),
        "function_call": ("none", "auto"),
        "modalities": (["text"],),
        "audio": (),
        "prediction": (),
        "reasoning_effort": (),
        "verbosity": (),
        "web_search_options": (),
        "moderation": (),
        "prompt_cache_options": (),
        "prompt_cache_retention": (),
    },
}
"""Fields of OpenAI's that this server does not honour, and with which values they ask for nothing (as null does)."""


_ROUTES: dict[str, type[Body]] = {
    "completions": CompletionBody,
    "chat completions": ChatBody,
    "responses": ResponsesBody,
    "embeddings": EmbeddingBody,
    "tokenize": TokenizeBody,
    "detokenize": DetokenizeBody,
}

B = TypeVar("B", bound=Body)


def parse(kind: type[B], value: dict[str, Any]) -> B:
    """A body, looked at in full.

    Raises:
        ApiError: 400, with the name of what is wrong or not honoured.
    """
    neutral = _NEUTRAL.get(kind, kind.neutral)
    left, problems = {}, list[Problem]()
    for name, given in value.items():
        if name in _LABELS and name not in kind.model_fields:
            problems += _of_label(name, given)
        elif name not in neutral:
            left[name] = given
        elif not _asks_for_nothing(given, neutral[name]):
            message = f"{name}: {_unknown(kind, name, known=True)}"
            if "; " not in message:
                message += "; leave it out" + "".join(f", or give {shown(own)}" for own in neutral[name][-1:])
            problems.append(Problem(name, message, "unsupported_parameter"))
    body = None
    try:
        body = kind.model_validate(left)
    except ValidationError as error:
        problems += islice(problems_of(error, left, partial(_unknown, kind)), 2 * MOST)
    except ApiError as error:
        if not problems:
            raise
        problems.append(Problem(error.param or "", error.message))
    if body is None or problems:
        raise invalid(told(problem.message for problem in problems), problems[0].param or None, problems[0].code)
    return body


def _asks_for_nothing(given: Any, neutral: tuple[Any, ...]) -> bool:
    if isinstance(given, dict) and {} in neutral:
        return all(own is None for own in given.values())
    return given is None or any(type(own) is type(given) and own == given for own in neutral)


def _unknown(kind: type[Body], name: str, *, known: bool = False) -> str:
    """What to say of a field that a body does not have."""
    routes = {} if "." in name or kind not in _ROUTES.values() else _ROUTES
    elsewhere = {route: own.model_fields for route, own in routes.items() if own is not kind}
    return foreign.told(name, kind.model_fields, elsewhere, known=known)


def _of_label(name: str, value: Any) -> Iterator[Problem]:
    """A text of at most 512 characters; ``metadata``: 16 of them, by name."""
    texts = list(value.values()) if name == "metadata" and isinstance(value, dict) else [value]
    if value is not None and (len(texts) > 16 or not all(isinstance(one, str) and len(one) <= 512 for one in texts)):
        kind = "at most 16 texts by name" if name == "metadata" else "a text"
        yield Problem(name, f"{name}: must be {kind}, of at most 512 characters each")


def _token(name: str) -> int:
    if not name.isascii() or not name.isdigit() or len(name) > 9:
        raise ApiError(400, f"logit_bias: {shown(name)} is not a token id", param="logit_bias")
    return int(name)
