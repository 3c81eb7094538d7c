"""What requests are held against, before anything is computed."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from infer.params import SamplingParams
from parallel.models.config import DecoderConfig
from parallel.models.encoder_config import EncoderConfig

__all__ = ["Limits", "end_tokens"]


@dataclass(frozen=True, slots=True)
class Limits:
    """Of a model and its engine.

    Attributes:
        vocabulary: of the model.
        context: most tokens of a text, prompt included.
        ends: the model's end-of-text tokens.
        text: whether there is a tokenizer.
    """

    vocabulary: int
    context: int
    ends: tuple[int, ...]
    text: bool

    @staticmethod
    def of(folder: Path, model: DecoderConfig | EncoderConfig, *, context: int, text: bool) -> Limits:
        """Of a model folder; ``context`` 0: what the model was made for."""
        return Limits(model.vocabulary, context or model.max_positions, end_tokens(folder), text)

    def problems(self, prompt: Sequence[int], params: SamplingParams) -> list[str]:
        """Why a prompt cannot be continued so, every reason."""
        found = list(params.problems(vocabulary=self.vocabulary, ends=self.ends, text=self.text))
        if isinstance(params.beams, int) and params.beams > 1:
            for name in ("logprobs", "prompt_logprobs"):
                if getattr(params, name) is not None:
                    found.append(
                        f"{name} = {getattr(params, name)}: beam search (beams = {params.beams}) reports scores only"
                    )
        if not prompt:
            return [*found, "the prompt is empty"]
        if bad := [token for token in prompt if not 0 <= token < self.vocabulary]:
            found.append(f"token id {bad[0]} of the prompt is outside the vocabulary of {self.vocabulary}")
        if isinstance(params.max_tokens, int) and len(prompt) + params.max_tokens > self.context:
            found.append(
                f"{len(prompt)} tokens of the prompt and max_tokens = {params.max_tokens} exceed the context of "
                f"{self.context}"
            )
        return found


def end_tokens(folder: Path) -> tuple[int, ...]:
    """The ids that end a text: of generation_config.json, else of config.json."""
    for name in ("generation_config.json", "config.json"):
        path = folder / name
        given = json.loads(path.read_text()).get("eos_token_id") if path.exists() else None
        if given is not None:
            return tuple(given) if isinstance(given, list) else (given,)
    return ()
