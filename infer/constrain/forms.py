"""Compiled forms within a bound of memory, and how far a request has come in its own."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from tokenizers import Tokenizer

from infer.constraint import Constraint

if TYPE_CHECKING:
    from llguidance import LLExecutor, LLMatcher, LLTokenizer

__all__ = ["Form", "Forms"]

KEPT_BYTES = 128 << 20
_BASE, _EACH_CHARACTER, _EACH_TOKEN = 160 << 10, 400, 1 << 10
"""Bytes that a compiled form is taken to cost, as measured: at once, and for each token that was matched against it."""


@dataclass(slots=True, eq=False)
class _Compiled:
    """A form as it is kept; what its matchers find out of its words is shared, and grows.

    Attributes:
        matcher: at the beginning.
        cost: bytes, about.
    """

    matcher: LLMatcher
    cost: int


@dataclass(slots=True, eq=False)
class Form:
    """How far one request has come.

    Attributes:
        constraint: that it keeps.
        matcher: after ``seen`` tokens.
        seen: generated tokens that it has taken in.
        tokens: them.
        error: why it cannot go on.
    """

    constraint: Constraint
    compiled: _Compiled
    matcher: LLMatcher
    tokens: list[int] = field(default_factory=list)
    error: str = ""

    @property
    def seen(self) -> int:
        """How many generated tokens it has taken in."""
        return len(self.tokens)

    def copy(self) -> Form:
        """Another one that has come as far."""
        return Form(self.constraint, self.compiled, self.matcher.deep_copy(), list(self.tokens), self.error)


class Forms:
    """Compiles forms, keeps those that were used last, and fills masks.

    What it says depends on the forms and tokens alone: every rank that is asked the same comes to the same.

    Args:
        tokenizer: of the model; None: there is no text, so every form is refused.
        vocabulary: of the model; tokens that the tokenizer does not have are never allowed.
        ends: the model's end-of-text tokens.
        kept_bytes: that compiled forms may take, by estimate.
    """

    def __init__(
        self, tokenizer: Tokenizer | None, vocabulary: int, ends: Sequence[int], *, kept_bytes: int = KEPT_BYTES
    ) -> None:
        self.vocabulary, self.words = vocabulary, -(-vocabulary // 32)
        self._text, self._kept_bytes = tokenizer, kept_bytes
        self._ends = sorted({end for end in ends if 0 <= end < vocabulary})
        self._compiled: OrderedDict[Constraint, _Compiled] = OrderedDict()
        self._lock = threading.Lock()
        self._tokenizer: LLTokenizer | None = None
        self._executor: LLExecutor | None = None
        self._known = np.zeros(0, np.int32)
        self._end_bits = np.zeros(0, np.int32)

    @property
    def kept(self) -> int:
        """Bytes of the compiled forms, by estimate."""
        with self._lock:
            return sum(own.cost for own in self._compiled.values())

    def problems(self, constraint: Constraint) -> list[str]:
        """Why a form cannot be kept; if there is no reason, it is compiled now."""
        try:
            self._look_up(constraint)
        except ValueError as error:
            return [f"constraint: {error}"]
        return []

    def begin(self, constraint: Constraint) -> Form:
        """A form of which nothing is generated yet.

        Raises:
            ValueError: :meth:`problems` says why.
        """
        compiled = self._look_up(constraint)
        return Form(constraint, compiled, compiled.matcher.deep_copy())

    def advance(self, form: Form, tokens: Sequence[int]) -> None:
        """Take in tokens that were generated; a form that fails has ``error`` from then on."""
        form.compiled.cost += _EACH_TOKEN * len(tokens)
        form.tokens += tokens
        if not form.error and not form.matcher.consume_tokens(list(tokens)) and not self._again(form):
            form.error = _why(form.matcher)

    def fill(self, forms: Sequence[Form], holding: Sequence[bool]) -> NDArray[np.int32]:
        """Which tokens may follow, as bits: (R, W), the lowest bit of the first word is token 0.

        A form that fails has ``error`` from then on.

        Args:
            forms: R of them.
            holding: whether the end-of-text tokens are held back as long as something else may follow.
        """
        bits_RW = np.zeros((len(forms), self.words), np.int32)
        live = [(form.matcher, row) for row, form in enumerate(forms) if not form.error]
        threads = torch.get_num_threads()
        if threads > 1 and len(live) > 1:
            if self._executor is None:
                from llguidance import LLExecutor

                self._executor = LLExecutor(threads)
            self._executor.unsafe_compute_mask_ptr(live, bits_RW.ctypes.data, 4 * self.words, len(forms))
        else:
            for matcher, row in live:
                matcher.unsafe_compute_mask_ptr(bits_RW[row].ctypes.data, 4 * self.words)
        for row, form in enumerate(forms):
            if not form.error and form.matcher.is_error():
                if self._again(form):
                    form.matcher.unsafe_compute_mask_ptr(bits_RW[row].ctypes.data, 4 * self.words)
                if form.matcher.is_error():
                    form.error = _why(form.matcher)
        bits_RW &= self._known
        for row, held in enumerate(holding):
            if held:
                others = bits_RW[row] & ~self._end_bits
                if others.any():
                    bits_RW[row] = others
        return bits_RW

    def _again(self, form: Form) -> bool:
        """Whether a form can go on when nothing is shared with those that were matched before; if so, it does."""
        from infer.constrain.compile import compile_form

        assert self._tokenizer is not None
        with self._lock:
            if self._compiled.get(form.constraint) is form.compiled:
                del self._compiled[form.constraint]
        matcher = compile_form(form.constraint.kind, form.constraint.text, self._tokenizer)
        form.compiled = _Compiled(matcher, form.compiled.cost)
        if form.tokens and not matcher.consume_tokens(form.tokens):
            return False
        form.matcher = matcher
        return True

    def _look_up(self, constraint: Constraint) -> _Compiled:
        with self._lock:
            found = self._compiled.get(constraint)
            if found is not None and found.cost <= self._kept_bytes // 8:
                self._compiled.move_to_end(constraint)
                return found
            found = self._compile(constraint)
            self._compiled[constraint] = found
            self._compiled.move_to_end(constraint)
            while sum(own.cost for own in self._compiled.values()) > self._kept_bytes and len(self._compiled) > 1:
                self._compiled.popitem(last=False)
            return found

    def _compile(self, constraint: Constraint) -> _Compiled:
        try:
            from infer.constrain.compile import FormError, compile_form
        except ModuleNotFoundError as missing:
            raise ValueError(f"{missing.name} is not installed; pip install 'lockstep[serve]'") from None
        try:
            if self._tokenizer is None:
                self._tokenizer = self._open()
            matcher = compile_form(constraint.kind, constraint.text, self._tokenizer)
        except FormError as error:
            raise ValueError(str(error)) from None
        return _Compiled(matcher, _BASE + _EACH_CHARACTER * len(constraint.text))

    def _open(self) -> LLTokenizer:
        from infer.constrain.compile import llg_tokenizer

        if self._text is None:
            raise ValueError("there is no tokenizer, so there is no text")
        known = np.zeros(32 * self.words, np.uint8)
        ids = [own for own in self._text.get_vocab(with_added_tokens=True).values() if own < self.vocabulary]
        known[ids] = 1
        ends = [end for end in self._ends if known[end]]
        if not ends:
            raise ValueError("the model has no end-of-text token, so no completion can end where its form does")
        bits = np.zeros_like(known)
        bits[ends] = 1
        self._known, self._end_bits = (np.packbits(own, bitorder="little").view(np.int32) for own in (known, bits))
        return llg_tokenizer(self._text.to_str(), self.vocabulary, ends)


def _why(matcher: LLMatcher) -> str:
    lines = matcher.get_error().replace("<non-verbose/>", "").split("\n")
    return "the form of the completion cannot be kept: " + " ".join(line.strip() for line in lines if line.strip())
