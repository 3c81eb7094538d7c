"""Prompts as clients give them: a text, texts, token ids, or lists of token ids."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from infer.server.codec import Codec
from infer.server.engine import ModelInfo
from infer.server.errors import ApiError, invalid

__all__ = ["check_length", "check_tokens", "read_prompts", "split_prompts"]


def split_prompts(value: Any, *, model: ModelInfo, most: int, param: str) -> list[str | list[int]]:
    """One or many prompts as a list, before anything of them is copied.

    Raises:
        ApiError: 400, with the place of what is wrong.
    """
    if isinstance(value, str):
        value = [value]
    if not isinstance(value, list):
        raise invalid(f"{param}: must be a text, texts, token ids, or lists of token ids", param)
    if not value:
        raise invalid(f"{param}: is empty", param)
    if _is_id(value[0]):
        value = [value]
    if len(value) > most:
        raise invalid(f"{param}: {len(value)} of them; at most {most} are allowed", param)
    kind = type(value[0])
    for place, prompt in enumerate(value):
        if not isinstance(prompt, str | list) or type(prompt) is not kind:
            raise invalid(f"{param}[{place}]: must be a text or token ids, all of one kind", param)
        if not prompt:
            raise invalid(f"{param}[{place}]: is empty", param)
        if isinstance(prompt, list):
            check_length(len(prompt), 0, model, param)
            check_tokens(prompt, model, f"{param}[{place}]", param)
    return value


async def read_prompts(
    value: Any, codec: Codec, *, model: ModelInfo, most: int, special: bool = True, param: str = "prompt"
) -> tuple[list[list[int]], list[str | None]]:
    """The token ids of each prompt, and its text if it was given as one.

    Raises:
        ApiError: 400, with the place of what is wrong.
    """
    given = split_prompts(value, model=model, most=most, param=param)
    texts = [prompt for prompt in given if isinstance(prompt, str)]
    if not texts:
        return [prompt for prompt in given if isinstance(prompt, list)], [None] * len(given)
    encoded = await codec.encode(texts, special=special, param=param)
    for ids in encoded:
        if not ids:
            raise invalid(f"{param}: a text has no tokens", param)
        check_tokens(ids, model, param, param)
    return encoded, [*texts]


def check_tokens(tokens: Sequence[Any], model: ModelInfo, where: str, param: str) -> None:
    """Refuse what is no token id of the model (400)."""
    for place, token in enumerate(tokens):
        if not _is_id(token):
            raise invalid(f"{where}[{place}]: is not a token id", param)
        if not 0 <= token < model.vocabulary:
            shown = token if abs(token) < 2**63 else "a token id"
            raise invalid(f"{where}[{place}]: {shown} is outside the vocabulary of {model.vocabulary}", param)


def check_length(prompt: int, generated: int, model: ModelInfo, param: str) -> None:
    """Refuse what does not fit the context (400), with the numbers."""
    if prompt + generated > model.context:
        asked = f"n_prompt = {prompt}, max_tokens = {generated}" if generated else f"n_prompt = {prompt}"
        message = f"{param}: {asked}, n_ctx = {model.context}: does not fit the context"
        raise ApiError(400, message, param=param, code="context_length_exceeded")


def _is_id(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
