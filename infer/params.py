"""What a caller may ask of one request: how it is continued, when it stops, and what is reported. No tensors here.

Logits pass through these stages, in this order, which is that of `transformers` (and of vLLM, where the two agree):

1. ``logit_bias`` is added;
2. ``repetition_penalty``, then ``frequency_penalty``, then ``presence_penalty``;
3. ``allowed_tokens``, ``banned_tokens``, ``bad_words``, and the tokens that stop while ``min_tokens`` is not reached;
4. ``logits_processors``; 5. ``constraint``, which leaves only what its form allows;
6. ``temperature``; 7. ``top_k``; 8. ``top_p``, of what top-k left; 9. ``min_p``; 10. ``typical_p``, of what is left.

At temperature 0 the likeliest token after stage 5 is taken. vLLM agrees, but for calling its processors before the
penalties and taking min-p before top-k and top-p.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from infer.constraint import KINDS, Constraint
from parallel.config import option

__all__ = ["LogitsProcessor", "SamplingParams"]

LogitsProcessor = Callable[[Sequence[int], Sequence[int], Any], Any]


class Bound(NamedTuple):
    """The numbers that a field may hold.

    Attributes:
        field: its name.
        low, high: both allowed, unless ``above`` excludes ``low``.
        above: only what is greater than ``low``.
        whole: whole numbers only.
        optional: None is allowed.
        hint: added to the message.
    """

    field: str
    low: float
    high: float = math.inf
    above: bool = False
    whole: bool = False
    optional: bool = False
    hint: str = ""

    def problem(self, value: Any) -> str:
        """Why the value is not within the bound, or an empty string."""
        if value is None and self.optional:
            return ""
        kinds = (int,) if self.whole else (int, float)
        if not isinstance(value, kinds) or isinstance(value, bool):
            kind = "whole number" if self.whole else "number"
            return f"{self.field} = {value!r}: must be a {kind}{' or None' if self.optional else ''}"
        short = value <= self.low if self.above else value < self.low
        if not short and value <= self.high:  # false of NaN
            return ""
        least = f"more than {self.low:g}" if self.above else f"at least {self.low:g}"
        most = f" and at most {self.high:g}" if math.isfinite(self.high) else ""
        return f"{self.field} = {value!r}: must be {least}{most}{self.hint}"


BOUNDS = (
    Bound("max_tokens", 1, whole=True),
    Bound("min_tokens", 0, whole=True),
    Bound("temperature", 0, 100, hint=" (0: the likeliest token, always)"),
    Bound("top_k", 0, whole=True, hint=" (0: all tokens)"),
    Bound("top_p", 0, 1, above=True),
    Bound("min_p", 0, 1),
    Bound("typical_p", 0, 1, above=True),
    Bound("presence_penalty", -2, 2),
    Bound("frequency_penalty", -2, 2),
    Bound("repetition_penalty", 0, 100, above=True),
    Bound("seed", 0, 2**64 - 1, whole=True, optional=True),
    Bound("n", 1, whole=True),
    Bound("best_of", 1, whole=True, optional=True),
    Bound("beams", 1, whole=True),
    Bound("length_penalty", -100, 100),
    Bound("logprobs", 0, whole=True, optional=True),
    Bound("prompt_logprobs", 0, whole=True, optional=True),
)
FLAGS = ("ignore_eos", "include_stop", "skip_special_tokens")
COLDEST = 0.001
STRONGEST_BIAS = 100.0
NEUTRAL_IN_BEAM_SEARCH = ("temperature", "top_k", "top_p", "min_p", "typical_p", "seed", "best_of")


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """How to continue a prompt; the stages through which the logits pass are listed at the top of this module."""

    max_tokens: int = option(128, "most tokens to generate")
    min_tokens: int = option(0, "tokens to generate before one may stop the request, or a stop string may end")
    temperature: float = option(0.0, "logits are divided by it; 0: the likeliest token, always")
    top_k: int = option(
        0, "only the k likeliest tokens, and what is as likely as the last of them (32 such or more); 0: all"
    )
    top_p: float = option(1.0, "only the fewest likeliest tokens whose probabilities add up to at least this")
    min_p: float = option(0.0, "only tokens that are at least this many times as probable as the likeliest")
    typical_p: float = option(
        1.0, "only the fewest tokens that add up to at least this, those first whose surprise is nearest to the entropy"
    )
    presence_penalty: float = option(0.0, "subtracted once from tokens that were generated before")
    frequency_penalty: float = option(0.0, "subtracted from a token as often as it was generated before")
    repetition_penalty: float = option(
        1.0, "tokens of the prompt and of what was generated: positive logits are divided by it, negative multiplied"
    )
    logit_bias: Mapping[int, float] | None = option(None, "token to number that is added to its logit, -100 to 100")
    allowed_tokens: tuple[int, ...] | None = option(None, "only these tokens; None: all")
    banned_tokens: tuple[int, ...] = option((), "never these tokens")
    bad_words: tuple[str | tuple[int, ...], ...] = option(
        (), "never these sequences of tokens; a text stands for its tokens with and without a space before it"
    )
    seed: int | None = option(
        None, "the same seed gives the same tokens, whatever else is computed; None: one is drawn for each request"
    )
    stop: tuple[str, ...] = option((), "texts that end the request as soon as one has been generated")
    stop_tokens: tuple[int, ...] = option((), "tokens that end the request, besides end-of-text")
    include_stop: bool = option(False, "the text or token that ended the request is part of the completion")
    ignore_eos: bool = option(False, "go on after the end-of-text token")
    n: int = option(1, "completions of the prompt")
    best_of: int | None = option(None, "completions to generate, of which the n likeliest are returned; None: n")
    beams: int = option(1, "beams of a beam search; 1: none")
    length_penalty: float = option(
        1.0, "beam search: scores are divided by the length raised to this power; above 0 it favours long ones"
    )
    early_stopping: bool | Literal["never"] = option(
        False,
        "beam search ends, true: at as many finished as beams; false: once a better one is unlikely; 'never': "
        "impossible",
    )
    logprobs: int | None = option(None, "report log-probabilities: of each token and of this many likeliest")
    prompt_logprobs: int | None = option(None, "the same for the tokens of the prompt, always raw")
    logprobs_of: Literal["raw", "processed"] = option(
        "raw", "log-probabilities of the logits as the model gave them, or of what was sampled from"
    )
    skip_special_tokens: bool = option(True, "leave special tokens out of the text")
    constraint: Constraint | None = option(None, "the form that the completion must have: JSON, regex, grammar, choice")
    logits_processors: tuple[LogitsProcessor, ...] = option(
        (), "functions of prompt tokens, generated tokens and logits (V,), float32, which return new logits"
    )

    def to_json(self) -> dict[str, Any]:
        """As plain values; ``logits_processors`` are left out, as functions cannot travel."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        del values["logits_processors"]
        bias = self.logit_bias
        form = self.constraint
        return {
            **values,
            "logit_bias": None if bias is None else list(bias.items()),
            "constraint": None if form is None else form.to_json(),
        }

    @staticmethod
    def from_json(values: Mapping[str, Any]) -> SamplingParams:
        """What :meth:`to_json` gave, whose tuples may have become lists on the way."""

        def frozen(value: Any) -> Any:
            return tuple(frozen(item) for item in value) if isinstance(value, list) else value

        bias, form = values["logit_bias"], values["constraint"]
        given = {name: frozen(value) for name, value in values.items()}
        given["logit_bias"] = None if bias is None else dict(bias)
        given["constraint"] = None if form is None else Constraint.from_json(form)
        return SamplingParams(**given)

    def problems(self, *, vocabulary: int | None = None, ends: Sequence[int] = (), text: bool = True) -> Iterator[str]:
        """Why these cannot be honoured, every reason.

        Args:
            vocabulary: of the model; None: token ids are not held against it.
            ends: the model's end-of-text tokens.
            text: whether there is a tokenizer.
        """
        wrong = {bound.field: problem for bound in BOUNDS if (problem := bound.problem(getattr(self, bound.field)))}
        for name in FLAGS:
            if not isinstance(getattr(self, name), bool):
                wrong[name] = f"{name} = {getattr(self, name)!r}: must be true or false"
        wrong.update(_choices(self))
        wrong.update(_texts(self, text))
        wrong.update(_tokens(self, vocabulary))
        yield from wrong.values()
        yield from _contradictions(self, wrong)
        if not {"allowed_tokens", "banned_tokens", "bad_words", "stop_tokens", "min_tokens"} & set(wrong):
            yield from _nothing_left(self, vocabulary, ends)

    @property
    def samples(self) -> int:
        """Completions that are generated for one prompt, beams aside."""
        return self.n if self.best_of is None else self.best_of

    @property
    def sequences(self) -> tuple[tuple[int, ...], ...]:
        """``bad_words`` that are given as tokens."""
        return tuple(tuple(word) for word in self.bad_words if not isinstance(word, str))

    def stops(self, ends: Sequence[int]) -> tuple[int, ...]:
        """Every token that ends the request, in ascending order; ``ends`` are the model's, which always end a form."""
        ignored = self.ignore_eos and self.constraint is None
        return tuple(sorted({*self.stop_tokens, *(() if ignored else ends)}))


def _choices(params: SamplingParams) -> dict[str, str]:
    found = {}
    if params.logprobs_of not in ("raw", "processed"):
        found["logprobs_of"] = f"logprobs_of = {params.logprobs_of!r}: must be 'raw' or 'processed'"
    if not (isinstance(params.early_stopping, bool) or params.early_stopping == "never"):
        found["early_stopping"] = f"early_stopping = {params.early_stopping!r}: must be true, false or 'never'"
    processors = params.logits_processors
    if not isinstance(processors, tuple | list) or not all(callable(item) for item in processors):
        found["logits_processors"] = f"logits_processors = {processors!r}: must be a sequence of functions"
    form = params.constraint
    if form is not None and not isinstance(form, Constraint):
        found["constraint"] = f"constraint = {form!r}: must be a Constraint or None"
    elif form is not None and (form.kind not in KINDS or not isinstance(form.text, str)):
        found["constraint"] = f"constraint: kind {form.kind!r}: must be a text, and one of {', '.join(KINDS)}"
    return found


def _texts(params: SamplingParams, text: bool) -> dict[str, str]:
    found = {}
    stop, words = params.stop, params.bad_words
    if not isinstance(stop, tuple | list) or not all(isinstance(item, str) for item in stop):
        found["stop"] = f"stop = {stop!r}: must be a sequence of texts"
    elif "" in stop:
        found["stop"] = f"stop = {stop!r}: an empty text is everywhere"
    elif stop and not text:
        found["stop"] = f"stop = {stop!r}: there is no tokenizer, so there is no text; use stop_tokens"
    if not isinstance(words, tuple | list) or not all(isinstance(word, str | tuple | list) for word in words):
        found["bad_words"] = f"bad_words = {words!r}: must be a sequence of texts and of sequences of tokens"
    elif any(len(word.strip() if isinstance(word, str) else word) == 0 for word in words):
        found["bad_words"] = f"bad_words = {words!r}: an empty word is everywhere"
    elif not text and any(isinstance(word, str) for word in words):
        found["bad_words"] = f"bad_words = {words!r}: there is no tokenizer; give words as sequences of tokens"
    return found


def _tokens(params: SamplingParams, vocabulary: int | None) -> dict[str, str]:
    """Token ids that are none, and biases that are no numbers."""
    found = {}
    for name in ("logprobs", "prompt_logprobs"):
        if vocabulary is not None and isinstance(value := getattr(params, name), int) and value > vocabulary:
            found[name] = f"{name} = {value}: more than the vocabulary of {vocabulary}"
    given: dict[str, Any] = {
        "logit_bias": params.logit_bias or {},
        "allowed_tokens": () if params.allowed_tokens is None else params.allowed_tokens,
        "banned_tokens": params.banned_tokens,
        "stop_tokens": params.stop_tokens,
    }
    for name, tokens in given.items():
        if isinstance(tokens, str) or not isinstance(tokens, Mapping if name == "logit_bias" else Sequence):
            kind = "a mapping from tokens to numbers" if name == "logit_bias" else "a sequence of token ids"
            found[name] = f"{name} = {tokens!r}: must be {kind}"
        elif problem := _outside(tokens, vocabulary):
            found[name] = f"{name}: {problem}"
    bias = Bound("", -STRONGEST_BIAS, STRONGEST_BIAS)
    if "logit_bias" not in found:
        for token, value in (params.logit_bias or {}).items():
            if problem := bias.problem(value):
                found["logit_bias"] = f"logit_bias[{token}]{problem}"
                break
    words = params.bad_words if isinstance(params.bad_words, tuple | list) else ()
    for word in words:
        if isinstance(word, tuple | list) and (problem := _outside(word, vocabulary)):
            found["bad_words"] = f"bad_words: {problem}"
    return found


def _outside(tokens: Any, vocabulary: int | None) -> str:
    for token in tokens:
        if not isinstance(token, int) or isinstance(token, bool):
            return f"{token!r} is not a token id"
        if token < 0 or (vocabulary is not None and token >= vocabulary):
            where = "" if vocabulary is None else f" of {vocabulary}"
            return f"token id {token} is outside the vocabulary{where}"
    return ""


def _contradictions(params: SamplingParams, wrong: Mapping[str, str]) -> Iterator[str]:
    """Values that are right by themselves, but not together."""
    fine = wrong.keys().isdisjoint
    if fine(("temperature",)) and 0 < params.temperature < COLDEST:
        cold = f"below {COLDEST} only rounding would decide; 0 takes the likeliest token"
        yield f"temperature = {params.temperature}: {cold}"
    if fine(("min_tokens", "max_tokens")) and params.min_tokens > params.max_tokens:
        yield f"min_tokens = {params.min_tokens}: more than max_tokens = {params.max_tokens}"
    if fine(("n", "best_of")) and params.best_of is not None and params.best_of < params.n:
        yield f"best_of = {params.best_of}: fewer than n = {params.n}"
    if not fine(("beams",)):
        return
    if params.beams > 1:
        if fine(("n",)) and params.n > params.beams:
            yield f"n = {params.n}: more than beams = {params.beams}"
        for name in NEUTRAL_IN_BEAM_SEARCH:
            if fine((name,)) and (value := getattr(params, name)) != _default(name):
                yield f"{name} = {value!r}: beam search (beams = {params.beams}) draws nothing at random"
        if params.logprobs_of == "processed":
            yield f"logprobs_of = 'processed': beam search (beams = {params.beams}) reports raw log-probabilities"
        return
    for name in ("length_penalty", "early_stopping"):
        if fine((name,)) and (value := getattr(params, name)) != _default(name):
            yield f"{name} = {value!r}: only beam search has it, and beams = 1"
    if fine(("n", "best_of", "temperature")) and params.samples > 1 and params.temperature == 0:
        name = "best_of" if params.n == 1 else "n"
        yield f"{name} = {getattr(params, name)}: at temperature = 0 every completion would be the same"


def _default(name: str) -> Any:
    return SamplingParams.__dataclass_fields__[name].default


def _nothing_left(params: SamplingParams, vocabulary: int | None, ends: Sequence[int]) -> Iterator[str]:
    """Bans that leave no token at all, at any time or before ``min_tokens``."""
    if params.allowed_tokens is None:
        if vocabulary is None:
            return
        left = set(range(vocabulary)) if len(params.banned_tokens) + len(params.bad_words) >= vocabulary else {-1}
    else:
        left = set(params.allowed_tokens)
    left -= {*params.banned_tokens, *(word[0] for word in params.sequences if len(word) == 1)}
    if not left:
        yield "allowed_tokens, banned_tokens and bad_words together leave no token"
    elif params.min_tokens and left <= set(params.stops(ends)):
        yield f"min_tokens = {params.min_tokens}: every token that is allowed would stop the request"
