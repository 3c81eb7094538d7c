"""From the text of a form to a matcher of llguidance; and the program that tries this where it may be killed.

Run as a program, it reads frames from its standard input: first what there is to know about the model, then one form
after the other; it answers each with a frame. It imports nothing of ours, so that it starts within a tenth of a second.
"""

from __future__ import annotations

import ctypes
import functools
import json
import os
import random
import re
import resource
import signal
import struct
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from decimal import Decimal
from typing import Any, BinaryIO

import llguidance
from llguidance import LLMatcher, LLParserLimits, LLTokenizer

__all__ = ["LONGEST", "FormError", "compile_form", "llg_tokenizer", "main", "read_frame", "write_frame"]

LONGEST = 1 << 18
"""Characters of a form."""
DEEPEST = 64
WALKED = 24
"""Tokens that the child goes into a form: what is cheap to compile may be costly to follow."""
WHITESPACE = "( |\n {0,32})"
"""Between two tokens of JSON: nothing, a space, or a new line with an indentation; never twice."""
_JSON = {
    "whitespace_flexible": True,
    "whitespace_pattern": WHITESPACE,
    "lenient": False,
    "coerce_one_of": False,
    "item_separator": ",",
    "key_separator": ":",
}
_OTHERS = (
    "disallow",
    "divisibleBy",
    "extends",
    "formatExclusiveMaximum",
    "formatExclusiveMinimum",
    "formatMaximum",
    "formatMinimum",
    "patternRequired",
)
"""Keywords of other drafts and dialects that restrict, and that llguidance would pass over."""
_BOUNDS = ("minimum", "exclusiveMinimum", "maximum", "exclusiveMaximum")
_INSIDE = ("additionalItems", "additionalProperties", "contains", "else", "if", "not", "propertyNames", "then")
_LISTS = ("allOf", "anyOf", "oneOf", "prefixItems")
_MAPS = ("$defs", "definitions", "patternProperties", "properties")
_LIMITS = {
    "max_items_in_row": 2000,
    "initial_lexer_fuel": 1_000_000,
    "step_lexer_fuel": 200_000,
    "step_max_items": 50_000,
    "max_lexer_states": 50_000,
    "max_grammar_size": 500_000,
    "verbose_errors": False,
}
_SPACING = ("whitespace_flexible", "whitespace_pattern", "item_separator", "key_separator")
_LARK = re.compile(r'"(?:\\.|[^"\\\n])*"|//[^\n]*|/(?:\\.|[^/\\\n])+/|(%json)\s*')
"""What of a grammar may hold anything, and where a schema begins."""
_TEMPERATURE = re.compile(r"^[ \t]*[\w.-]+[ \t]*\[[^\]]*\btemperature\b", re.MULTILINE)
_FRAME = struct.Struct("<I")


class FormError(Exception):
    """A form that cannot be kept; the message says why."""


def llg_tokenizer(text: str, vocabulary: int, ends: Sequence[int]) -> LLTokenizer:
    """A tokenizer as llguidance wants it.

    Args:
        text: of tokenizer.json.
        vocabulary: of the model.
        ends: its end-of-text tokens; at least one.

    Raises:
        FormError: it is of a kind that llguidance does not read.
    """
    value = json.loads(text)
    value["padding"] = value["truncation"] = None
    try:
        return LLTokenizer(json.dumps(value), n_vocab=vocabulary, eos_token=list(ends))
    except ValueError as error:
        raise FormError(f"the model's tokenizer: {_line(str(error))}") from None


def compile_form(kind: str, text: str, tokenizer: LLTokenizer) -> LLMatcher:
    """A matcher that stands at the beginning.

    Args:
        kind, text: of :class:`infer.constraint.Constraint`.
        tokenizer: of the model.

    Raises:
        FormError: with the reason.
    """
    if len(text) > LONGEST:
        raise FormError(f"{len(text)} characters; at most {LONGEST} are compiled")
    try:
        text.encode()
    except UnicodeEncodeError:
        raise FormError("half a character (a lone surrogate) in it") from None
    matcher = _matcher(_grammar(kind, text, tokenizer), tokenizer)
    if matcher.is_error():
        raise FormError(_line(matcher.get_error()))
    if warnings := matcher.get_grammar_warnings():
        raise FormError(_line("; ".join(warnings)))
    return matcher


def _matcher(grammar: str, tokenizer: LLTokenizer) -> LLMatcher:
    return LLMatcher(tokenizer, grammar, limits=LLParserLimits(**_LIMITS), log_level=0)


def _grammar(kind: str, text: str, tokenizer: LLTokenizer) -> str:
    if kind == "json":
        schema = _parsed(text)
        if "x-guidance" in _checked(schema, tokenizer):
            raise FormError("x-guidance: is not honoured")
        try:
            return LLMatcher.grammar_from_json_schema(text, overrides=_JSON)  # pyright: ignore[reportArgumentType]
        except ValueError as error:
            raise FormError(_line(str(error))) from None
    if kind == "choice":
        choices = _parsed(text)
        if not isinstance(choices, list) or not choices or not all(isinstance(own, str) and own for own in choices):
            raise FormError("a choice must be a list of texts, none of them empty")
        return LLMatcher.grammar_from_lark("start: " + " | ".join(map(json.dumps, dict.fromkeys(choices))))
    if kind == "regex":
        try:
            return LLMatcher.grammar_from_lark(f"start: /{llguidance.regex_to_lark(text, 'dw')}/")
        except ValueError as error:
            raise FormError(_line(str(error))) from None
    if kind != "grammar":
        raise FormError(f"no such kind of form: {kind!r}")
    if _TEMPERATURE.search(text):
        raise FormError("temperature in a grammar is not honoured; it is a parameter of the request")
    return LLMatcher.grammar_from_lark(_with_options(text, tokenizer))


def _checked(schema: Any, tokenizer: LLTokenizer) -> dict[str, Any]:
    """A schema that is honoured, as far as llguidance would not say so itself."""
    if not isinstance(schema, dict):
        raise FormError("a JSON schema must be an object")
    for problem in _refused(schema, "", DEEPEST, tokenizer):
        raise FormError(problem)
    return schema


def _with_options(text: str, tokenizer: LLTokenizer) -> str:
    """A grammar in which each schema says how much white space there may be."""
    parts, place = [], 0
    for match in _LARK.finditer(text):
        if match[1] is None or match.start() < place:
            continue
        try:
            schema, end = json.JSONDecoder().raw_decode(text, match.end())
        except (ValueError, RecursionError) as error:
            raise FormError(f"%json: not JSON: {error}") from None
        options = _checked(schema, tokenizer).pop("x-guidance", {})
        if not isinstance(options, dict) or not set(options) <= set(_SPACING):
            raise FormError(f"x-guidance: other than {', '.join(_SPACING)} is not honoured")
        own = {**_JSON, **options}
        if not own["whitespace_flexible"]:
            own.pop("whitespace_pattern")
        parts += [text[place : match.end()], json.dumps({**schema, "x-guidance": own})]
        place = end
    return "".join([*parts, text[place:]])


def _parsed(text: str) -> Any:
    def constant(name: str) -> None:
        raise FormError(f"{name} is no JSON")

    try:
        return json.loads(text, parse_constant=constant)
    except (ValueError, RecursionError) as error:
        raise FormError(f"not JSON: {error}") from None


def _refused(schema: Any, path: str, depth: int, tokenizer: LLTokenizer) -> Iterator[str]:
    """Why llguidance would not honour a schema, where it does not say so itself."""
    if not isinstance(schema, dict):
        return
    if not depth:
        yield f"{path or 'the schema'}: deeper than {DEEPEST}"
        return
    for name in _OTHERS:
        if name in schema:
            yield f"{path}{name}: is not honoured"
    if path and "x-guidance" in schema:
        yield f"{path}x-guidance: is not honoured"
    yield from _refused_bounds(schema, path, tokenizer)
    for name in _INSIDE:
        yield from _refused(schema.get(name), f"{path}{name}.", depth - 1, tokenizer)
    items = schema.get("items")
    yield from _refused(items, f"{path}items.", depth - 1, tokenizer)
    for name in (*_LISTS, "items"):
        if isinstance(schema.get(name), list):
            for place, own in enumerate(schema[name]):
                yield from _refused(own, f"{path}{name}[{place}].", depth - 1, tokenizer)
    for name in _MAPS:
        if isinstance(schema.get(name), dict):
            for key, own in schema[name].items():
                yield from _refused(own, f"{path}{name}.{key[:40]}.", depth - 1, tokenizer)


def _refused_bounds(schema: dict[str, Any], path: str, tokenizer: LLTokenizer) -> Iterator[str]:
    """Bounds that do not exclude themselves, as some of narrow ranges do not in llguidance 1.9."""
    bounds = {name: schema[name] for name in _BOUNDS if isinstance(schema.get(name), int | float)}
    if len(bounds) < 2:
        return
    for name in ("exclusiveMinimum", "exclusiveMaximum"):
        if isinstance(value := bounds.get(name), bool) or value is None:
            continue
        plain = format(Decimal(repr(value)), "f")
        spelled = {plain, f"{plain}.0"} if "." not in plain else {plain, plain.removesuffix(".0")}
        if not value:
            spelled |= {f"-{one}" for one in spelled}
        grammar = LLMatcher.grammar_from_json_schema({"type": "number", **bounds})
        for one in sorted(spelled):
            matcher = _matcher(grammar, tokenizer)
            if matcher.consume_tokens(tokenizer.greedy_tokenize(one)) and matcher.is_accepting():
                yield f"{path}{name}: together with the other bound it would allow {one}; give wider bounds"
                break


def _line(message: str) -> str:
    """The first lines of what llguidance says, as one."""
    lines = [line.strip() for line in message.replace("<non-verbose/>", "").splitlines()]
    text = " ".join(line for line in lines if line)
    return text if len(text) <= 300 else text[:300] + "..."


def read_frame(source: BinaryIO) -> bytes | None:
    """The next frame; None: there will be none."""
    head = source.read(_FRAME.size)
    if len(head) < _FRAME.size:
        return None
    size = _FRAME.unpack(head)[0]
    data = source.read(size)
    return data if len(data) == size else None


def write_frame(target: BinaryIO, value: Any) -> None:
    """Send a value of JSON."""
    data = json.dumps(value).encode()
    target.write(_FRAME.pack(len(data)) + data)
    target.flush()


def _follow(matcher: LLMatcher, vocabulary: int) -> None:
    """Go some tokens into a form, by any way.

    Raises:
        FormError: it became too complex.
    """
    draw = random.Random(0)
    for _ in range(WALKED):
        mask = int.from_bytes(matcher.compute_bitmask(), "little")
        if matcher.is_error():
            raise FormError(_line(matcher.get_error()))
        if matcher.is_stopped() or not mask:
            return
        start = draw.randrange(vocabulary)
        above = mask >> start
        rest, base = (above, start) if above else (mask, 0)
        matcher.consume_token(base + (rest & -rest).bit_length() - 1)
        if matcher.is_error():
            raise FormError(_line(matcher.get_error()))
        if matcher.is_stopped():
            return


def _tether(parent: int) -> None:
    """Die with the parent, and leave no core."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, int(signal.SIGKILL))
    if os.getppid() != parent:
        os._exit(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def _size() -> int:
    """Bytes of this process's address space."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[0]) * resource.getpagesize()


def _returns_memory() -> Callable[[], object]:
    """Gives the system back what a large form took and freed again, where the allocator can (glibc's)."""
    try:
        return functools.partial(ctypes.CDLL(None).malloc_trim, 0)
    except (AttributeError, OSError):
        return lambda: None


def main() -> None:
    """The child: ``{parent, tokenizer, vocabulary, ends, bytes}``, then forms ``{kind, text}``; each is answered by
    ``{problem, cpu_s}``."""
    source, target = sys.stdin.buffer, sys.stdout.buffer
    first = read_frame(source)
    if first is None:
        return
    about = json.loads(first)
    _tether(about["parent"])
    try:
        tokenizer, problem = llg_tokenizer(about["tokenizer"], about["vocabulary"], about["ends"]), ""
    except FormError as error:
        tokenizer, problem = None, str(error)
    if sys.platform == "linux":
        most = _size() + about["bytes"]
        resource.setrlimit(resource.RLIMIT_AS, (most, most))
    write_frame(target, {"problem": problem, "version": llguidance.get_version()})
    give_back = _returns_memory()
    while tokenizer is not None and (data := read_frame(source)) is not None:
        form, began = json.loads(data), time.process_time()
        try:
            _follow(compile_form(form["kind"], form["text"], tokenizer), about["vocabulary"])
            problem = ""
        except FormError as error:
            problem = str(error)
        except MemoryError:
            problem = "needs too much memory"
        write_frame(target, {"problem": problem, "cpu_s": time.process_time() - began})
        give_back()


if __name__ == "__main__":
    main()
