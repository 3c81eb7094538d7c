"""Texts of which vectors are made, as token ids: in front of an engine that takes only these."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from functools import cached_property

from tokenizers import Tokenizer

from infer.request import RequestError
from infer.sentences import Sentences, encode_texts, text_tokenizer
from parallel.errors import ConfigError

__all__ = ["Documents"]


class Documents:
    """Reads texts as a model folder wants it.

    Args:
        tokenizer: of the model.
        how: what the folder says about its texts; None: nothing.
        context: most tokens of a text.
    """

    def __init__(self, tokenizer: Tokenizer, how: Sentences | None, context: int) -> None:
        self._given = tokenizer
        self._how = dataclasses.replace(how or Sentences(), max_tokens=context)

    def __call__(self, texts: Sequence[str], *, prompt: str | None = None, truncate: bool = False) -> list[list[int]]:
        """Token ids, special tokens included; too many of them unless ``truncate``.

        Args:
            texts: one for each document.
            prompt: name of what to put before each; None: the folder's default.
            truncate: cut texts that are too long.

        Raises:
            RequestError: a prompt that the folder does not have.
        """
        how = self._how if truncate else dataclasses.replace(self._how, max_tokens=None)
        try:
            return encode_texts(self._cutting if truncate else self._whole, texts, how, prompt=prompt)
        except ConfigError as error:
            raise RequestError(f"prompt_name: {problem}" for problem in error.problems) from None

    @cached_property
    def _whole(self) -> Tokenizer:
        return text_tokenizer(self._given, self._how)

    @cached_property
    def _cutting(self) -> Tokenizer:
        return text_tokenizer(self._given, self._how, truncate=True)
