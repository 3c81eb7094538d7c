"""What an encoder is made of, for every family."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from parallel.config import option
from parallel.models.config import DecoderConfig

__all__ = ["EncoderConfig"]


@dataclass(frozen=True, slots=True, kw_only=True)
class EncoderConfig:
    """A transformer whose tokens see their whole document: learned positions, biases, norms behind the sums."""

    family: str = option("bert", "which Hugging Face architecture it is read and written as")
    vocabulary: int = option(0, "tokens")
    hidden: int = option(256, "size of the residual stream")
    layers: int = option(4, "blocks")
    heads: int = option(4, "attention heads")
    feed_forward: int = option(0, "inner size of the MLP (0: 4 hidden)")
    activation: Literal["silu", "gelu", "gelu_tanh"] = option("gelu", "of the MLP")
    norm_eps: float = option(1e-12, "added to the variance")
    max_positions: int = option(512, "longest text")
    first_position: int = option(0, "row of the table of positions that a text's first token takes")
    token_types: int = option(2, "kinds of tokens that are told apart")
    dropout: float = option(0.0, "dropout of the embedding, and of what each block adds")
    attention_dropout: float = option(0.0, "dropout of attention probabilities")
    std: float = option(0.02, "of the initial weights; layers that add to the residual: divided by sqrt(2 layers)")

    @property
    def head_size(self) -> int:
        """Size of a head."""
        return self.hidden // self.heads

    def resolved(self) -> EncoderConfig:
        """The same with every 0 that stands for a default replaced by what it stands for."""
        return dataclasses.replace(self, feed_forward=self.feed_forward or 4 * self.hidden)

    def shared(self) -> DecoderConfig:
        """The same in the words of the layers that encoders share with decoders."""
        return DecoderConfig(
            vocabulary=self.vocabulary,
            hidden=self.hidden,
            layers=self.layers,
            heads=self.heads,
            feed_forward=self.feed_forward,
            activation=self.activation,
            gated=False,
            norm="layer",
            norm_eps=self.norm_eps,
            qkv_bias=True,
            out_bias=True,
            mlp_bias=True,
            positions="learned",
            max_positions=self.max_positions,
            embedding_dropout=self.dropout,
            residual_dropout=self.dropout,
            attention_dropout=self.attention_dropout,
            std=self.std,
        )

    def problems(self) -> Iterator[str]:
        """Why such a model cannot be."""
        for name in ("vocabulary", "token_types", "heads"):
            if getattr(self, name) < 1:
                yield f"{name} = {getattr(self, name)}: must be at least 1"
        if self.first_position < 0:
            yield f"first_position = {self.first_position}: must not be negative"
        if not 0 <= self.dropout < 1:
            yield f"dropout = {self.dropout}: a probability below 1"
        elif self.heads >= 1:
            yield from self.shared().problems()

    def layout_problems(self, tp: int) -> Iterator[str]:
        """Why ``tp`` ranks cannot share this model; each with the nearest degree that can."""
        return self.shared().layout_problems(tp)
