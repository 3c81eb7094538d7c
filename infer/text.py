"""Text of a request as its tokens come: whole characters only, stop strings across tokens, and why it ended.

The work for a token does not grow with what came before it.
"""

from __future__ import annotations

import codecs
import dataclasses
from collections.abc import Iterable, Sequence
from typing import Literal, Protocol

from tokenizers import Tokenizer, decoders

from infer.params import SamplingParams

__all__ = ["Detokenizer", "StopStrings", "TextStream", "encode_bad_words"]

BROKEN = "\ufffd"
CONTEXT = 8  # tokens of the prompt that may change how the first generated token reads
LONGEST_HELD = 8  # tokens that a character may be spread over, and more than that


class _Stream(Protocol):
    """Text of one request: ``push`` gives what is certain, ``flush`` what is left when no token follows."""

    def push(self, token: int) -> str: ...

    def flush(self) -> str: ...


class Detokenizer:
    """A tokenizer's way back to text, shared by the requests of a model.

    Args:
        tokenizer: of the model.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self.special = {i for i, token in tokenizer.get_added_tokens_decoder().items() if token.special}
        self._bytes: dict[int, bytes] = {}
        self._alphabet = _byte_alphabet() if isinstance(tokenizer.decoder, decoders.ByteLevel) else None

    def stream(self, *, skip_special_tokens: bool = True, context: Sequence[int] = ()) -> _Stream:
        """A stream for one request; its whole text is that of ``tokenizer.decode`` of all its tokens.

        Where a tokenizer spells characters by byte tokens (Llama 2), bytes that form no character may differ from it:
        such tokenizers read all bytes in a row at once, which no stream can.

        Args:
            skip_special_tokens: give them no text.
            context: the prompt's tokens, if the text is to be what follows the prompt's: many tokenizers drop the
                space before the first word.
        """
        skipped = self.special if skip_special_tokens else set[int]()
        if self._alphabet is not None:
            return _Bytes(self, skipped)
        return _Window(self.tokenizer, skipped, context)

    def bytes_of(self, token: int) -> bytes:
        """What a token of a byte-level tokenizer stands for; nothing if there is no such token."""
        found = self._bytes.get(token)
        if found is None:
            assert self._alphabet is not None
            text = self.tokenizer.id_to_token(token) or ""
            try:
                found = bytes(self._alphabet[char] for char in text)
            except KeyError:  # an added token that is plain text
                found = text.encode()
            self._bytes[token] = found
        return found


def _byte_alphabet() -> dict[str, int]:
    """The characters by which byte-level tokenizers write bytes (GPT-2)."""
    printed = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printed]
    return {chr(byte): byte for byte in printed} | {chr(256 + i): byte for i, byte in enumerate(others)}


class _Bytes:
    """Tokens are bytes: the decoder of UTF-8 keeps what is incomplete."""

    def __init__(self, detokenizer: Detokenizer, skipped: set[int]) -> None:
        self._of, self._skipped = detokenizer.bytes_of, skipped
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token: int) -> str:
        return "" if token in self._skipped else self._decoder.decode(self._of(token))

    def flush(self) -> str:
        return self._decoder.decode(b"", True)


class _Window:
    """Any tokenizer: a token's text is what it adds to that of the few tokens before it."""

    def __init__(self, tokenizer: Tokenizer, skipped: set[int], context: Sequence[int]) -> None:
        self._tokenizer, self._skipped = tokenizer, skipped
        self._window = [token for token in context[-2 * CONTEXT :] if token not in skipped][-CONTEXT:]
        self._given = len(self._window)  # tokens of the window whose text was given away
        self._before = self._decode(self._window)  # that text

    def push(self, token: int) -> str:
        if token in self._skipped or self._tokenizer.id_to_token(token) is None:
            return ""
        self._window.append(token)
        text = self._decode(self._window)
        held = len(self._window) - self._given
        if held > LONGEST_HELD:
            return self.flush()
        if text.endswith(BROKEN) or not text.startswith(self._before):
            return ""
        return self._give(text)

    def flush(self) -> str:
        if len(self._window) == self._given:
            return ""
        text = self._decode(self._window)
        if text.startswith(self._before):
            return self._give(text)
        self._window, self._before = self._window[self._given :], ""  # what is held broke what was given
        self._given = 0
        return self._give(self._decode(self._window))

    def _give(self, text: str) -> str:
        new = text[len(self._before) :]
        if new or len(self._window) > CONTEXT + LONGEST_HELD:  # else its tokens may still matter to the next
            self._window = self._window[self._given :]
            text = self._decode(self._window)
        self._given, self._before = len(self._window), text
        return new

    def _decode(self, tokens: list[int]) -> str:
        return self._tokenizer.decode(tokens, skip_special_tokens=False)


class StopStrings:
    """Looks for several texts in a text that comes in pieces (Knuth, Morris and Pratt, 1977).

    The one that is complete first is found; of those complete at the same character, the longest. How the text is cut
    into pieces changes nothing.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stops)
        self._borders = [_borders(stop) for stop in stops]
        self._matched = [0] * len(stops)
        self._held = ""

    def push(self, text: str, *, armed: bool = True) -> tuple[str, str | None]:
        """Text that cannot be part of a stop string any more, or all text before the stop string that was found.

        Args:
            text: what follows.
            armed: whether a stop string may end in it.
        """
        if not self._stops:
            return text, None
        whole = self._held + text
        for place, char in enumerate(text, len(self._held) + 1):
            found = self._step(char)
            if found and armed:
                self._held = ""
                return whole[: place - len(found)], found
        held = max(
            borders[-1] if matched == len(borders) else matched
            for borders, matched in zip(self._borders, self._matched, strict=True)
        )
        self._held = whole[len(whole) - held :]
        return whole[: len(whole) - held], None

    def flush(self) -> str:
        """What was held back, as nothing follows."""
        held, self._held = self._held, ""
        return held

    def _step(self, char: str) -> str:
        longest = ""
        for i, stop in enumerate(self._stops):
            matched = self._matched[i]
            while matched and (matched == len(stop) or stop[matched] != char):
                matched = self._borders[i][matched - 1]
            self._matched[i] = matched = matched + (stop[matched] == char)
            if matched == len(stop) > len(longest):
                longest = stop
        return longest


def _borders(text: str) -> list[int]:
    """For each beginning of a text, the length of its longest proper beginning that is also its end."""
    borders, length = [0] * len(text), 0
    for place in range(1, len(text)):
        while length and text[place] != text[length]:
            length = borders[length - 1]
        length += text[place] == text[length]
        borders[place] = length
    return borders


class TextStream:
    """The completion of one request as it grows.

    Attributes:
        tokens: of the completion so far.
        finish_reason: None while it goes on.
        stop_reason: the stop string or token that ended it.

    Args:
        params: of the request.
        detokenizer: None: there is no text.
        ends: the model's end-of-text tokens.
        context: the prompt's tokens, if text is to follow the prompt's.
    """

    def __init__(
        self,
        params: SamplingParams,
        detokenizer: Detokenizer | None = None,
        *,
        ends: Sequence[int] = (),
        context: Sequence[int] = (),
    ) -> None:
        self.params = params
        self.tokens: list[int] = []
        self.finish_reason: Literal["stop", "length"] | None = None
        self.stop_reason: int | str | None = None
        self._ends = frozenset(params.stops(ends))
        self._stream = None
        if detokenizer is not None:
            self._stream = detokenizer.stream(skip_special_tokens=params.skip_special_tokens, context=context)
        self._stops = StopStrings(params.stop)
        self._pieces: list[str] = []

    @property
    def text(self) -> str:
        """All text given so far."""
        return "".join(self._pieces)

    def push(self, tokens: Iterable[int]) -> str:
        """Take the tokens that were sampled next, and give the text that is certain now.

        Tokens after the one that ends the request are ignored.
        """
        given = len(self._pieces)
        for token in tokens:
            if self.finish_reason is not None:
                break
            self._take(token)
        return "".join(self._pieces[given:])

    def close(self) -> str:
        """Give what is held back, because the request is ended by somebody else."""
        given = len(self._pieces)
        self._end_text(armed=False)
        return "".join(self._pieces[given:])

    def _take(self, token: int) -> None:
        armed = len(self.tokens) >= self.params.min_tokens
        formed = self.params.constraint is not None  # then an end comes early only where nothing else may
        stops = token in self._ends and (armed or formed)
        if not stops or self.params.include_stop:
            self.tokens.append(token)
            if self._stream is not None:
                self._search(self._stream.push(token), armed)
        if self.finish_reason is not None:
            return
        if stops or len(self.tokens) >= self.params.max_tokens:
            self._end_text(armed)
            if self.finish_reason is None:
                self.finish_reason = "stop" if stops else "length"
                self.stop_reason = token if stops else None

    def _search(self, text: str, armed: bool) -> None:
        released, found = self._stops.push(text, armed=armed)
        if found is not None:
            self.finish_reason, self.stop_reason = "stop", found
            released += found if self.params.include_stop else ""
        if released:
            self._pieces.append(released)

    def _end_text(self, armed: bool) -> None:
        if self._stream is not None:
            self._search(self._stream.flush(), armed)
        if self.finish_reason is None and (held := self._stops.flush()):
            self._pieces.append(held)


def encode_bad_words(params: SamplingParams, tokenizer: Tokenizer | None) -> SamplingParams:
    """The parameters with bad words that are texts turned into sequences of tokens, as vLLM does it.

    Each text becomes its tokens with and without a space before it. Other ways to spell it by tokens stay possible.
    """
    words: list[tuple[int, ...]] = []
    for word in params.bad_words:
        if not isinstance(word, str):
            words.append(tuple(word))
            continue
        assert tokenizer is not None, "problems(text=False) names bad words that are texts"
        bare = word.lstrip()
        words += [tuple(tokenizer.encode(text, add_special_tokens=False).ids) for text in (bare, " " + bare)]
    return dataclasses.replace(params, bad_words=tuple(dict.fromkeys(word for word in words if word)))
