"""What a decoder is made of, for every family."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from parallel.config import option

__all__ = ["DecoderConfig", "RopeConfig"]


@dataclass(frozen=True, slots=True, kw_only=True)
class RopeConfig:
    """Rotary positions and their published scalings."""

    theta: float = option(10000.0, "base of the frequencies")
    scaling: Literal["default", "linear", "dynamic", "llama3", "yarn"] = option("default", "how long texts are reached")
    factor: float = option(1.0, "how much longer than the original length")
    original: int = option(0, "positions the model was first trained on (0: max_positions)")
    low_frequency: float = option(1.0, "llama3: wavelengths above original / this are scaled fully")
    high_frequency: float = option(4.0, "llama3: wavelengths below original / this are left alone")
    beta_fast: float = option(32.0, "yarn: rotations above which a frequency is left alone")
    beta_slow: float = option(1.0, "yarn: rotations below which a frequency is scaled fully")
    attention: float = option(0.0, "yarn: factor of cos and sin (0: 0.1 ln(factor) + 1)")
    truncate: bool = option(True, "yarn: round the bounds of the ramp to whole dims")

    def scaling_problems(self, head_size: int) -> Iterator[str]:
        """Why heads of ``head_size`` cannot have such positions."""
        for name in ("theta", "factor", "low_frequency", "high_frequency", "beta_fast", "beta_slow"):
            if not getattr(self, name) > 0:
                yield f"rope.{name} = {getattr(self, name)}: must be above 0"
        if self.original < 0 or self.attention < 0:
            yield f"rope.original = {self.original} and rope.attention = {self.attention}: must not be negative"
        if self.scaling == "llama3" and self.low_frequency >= self.high_frequency:
            yield f"rope.low_frequency = {self.low_frequency} must be below rope.high_frequency = {self.high_frequency}"
        if self.scaling == "dynamic" and head_size == 2:
            yield "rope.scaling = 'dynamic' needs heads of more than 2 dims"
        if self.scaling == "yarn" and self.theta == 1:
            yield "rope.scaling = 'yarn' needs rope.theta other than 1"


@dataclass(frozen=True, slots=True, kw_only=True)
class DecoderConfig:
    """A decoder-only transformer."""

    family: str = option("llama", "which Hugging Face architecture it is read and written as")
    vocabulary: int = option(0, "tokens (0: as many as the tokenizer has)")
    hidden: int = option(256, "size of the residual stream")
    layers: int = option(4, "blocks")
    heads: int = option(4, "query heads")
    kv_heads: int = option(0, "key-value heads (0: as many as query heads)")
    head_size: int = option(0, "size of a head (0: hidden / heads)")
    feed_forward: int = option(0, "inner size of the MLP (0: 8/3 hidden if gated, else 4 hidden)")
    activation: Literal["silu", "gelu", "gelu_tanh"] = option("silu", "of the MLP")
    gated: bool = option(True, "whether the MLP has a gate")
    norm: Literal["rms", "layer"] = option("rms", "RMSNorm, or LayerNorm with bias")
    norm_eps: float = option(1e-6, "added to the variance")
    qkv_bias: bool = option(False, "bias of the query, key and value projections")
    out_bias: bool = option(False, "bias of the attention's output projection")
    mlp_bias: bool = option(False, "biases of the MLP")
    qk_norm: bool = option(False, "RMSNorm of each query and key head")
    positions: Literal["rotary", "learned"] = option("rotary", "how positions enter")
    max_positions: int = option(2048, "longest text; a hard limit where positions are learned")
    rope: RopeConfig = option(RopeConfig(), "rotary positions")
    window: int = option(0, "sliding window: tokens seen, the token itself included (0: all)")
    window_layers: tuple[int, ...] = option((), "layers with the sliding window (none given: all)")
    tied: bool = option(False, "the head is the embedding")
    embedding_dropout: float = option(0.0, "dropout after the embedding")
    residual_dropout: float = option(0.0, "dropout of what each block adds")
    attention_dropout: float = option(0.0, "dropout of attention probabilities")
    std: float = option(0.02, "of the initial weights; layers that add to the residual: divided by sqrt(2 layers)")

    def resolved(self) -> DecoderConfig:
        """The same with every 0 that stands for a default replaced by what it stands for."""
        hidden = self.hidden
        inner = -(-8 * hidden // 3 // 64) * 64 if self.gated else 4 * hidden
        rope = dataclasses.replace(self.rope, original=self.rope.original or self.max_positions)
        return dataclasses.replace(
            self,
            kv_heads=self.kv_heads or self.heads,
            head_size=self.head_size or hidden // self.heads,
            feed_forward=self.feed_forward or inner,
            rope=rope,
        )

    def window_of(self, layer: int) -> int | None:
        """The sliding window of a layer, or None."""
        return self.window if self.window and (not self.window_layers or layer in self.window_layers) else None

    def problems(self) -> Iterator[str]:
        """Why such a model cannot be."""
        for name in ("hidden", "layers", "heads", "max_positions"):
            if getattr(self, name) < 1:
                yield f"{name} = {getattr(self, name)}: must be at least 1"
                return
        for name in ("vocabulary", "kv_heads", "head_size", "feed_forward", "window"):
            if getattr(self, name) < 0:
                yield f"{name} = {getattr(self, name)}: must not be negative"
                return
        for name in ("std", "norm_eps"):
            if getattr(self, name) < 0:
                yield f"{name} = {getattr(self, name)}: must not be negative"
        config = self.resolved()
        if config.head_size < 1:
            yield f"hidden = {self.hidden} is less than heads = {self.heads}, and head_size is not given"
            return
        if not self.head_size and self.hidden % self.heads:
            yield f"hidden = {self.hidden} is not divisible by heads = {self.heads}, and head_size is not given"
        if config.heads % config.kv_heads:
            yield f"heads = {config.heads} is not divisible by kv_heads = {config.kv_heads}"
        if config.positions == "rotary" and config.head_size % 2:
            yield f"head_size = {config.head_size} is odd: rotary positions need pairs"
        if config.positions == "rotary":
            yield from self.rope.scaling_problems(config.head_size)
        if wrong := [layer for layer in self.window_layers if not 0 <= layer < self.layers]:
            yield f"window_layers names layers {wrong} of a model of {self.layers}"
        for name in ("embedding_dropout", "residual_dropout", "attention_dropout"):
            if not 0 <= getattr(self, name) < 1:
                yield f"{name} = {getattr(self, name)}: a probability below 1"

    def layout_problems(self, tp: int) -> Iterator[str]:
        """Why ``tp`` ranks cannot share this model; each with the nearest degree that can."""
        config = self.resolved()
        heads, kv = config.heads, config.kv_heads
        works = [d for d in range(1, heads + 1) if self._shares(d)]
        near = min(works, key=lambda d: (abs(d - tp), d))
        if heads % tp:
            yield f"layout.tp = {tp} does not divide the {heads} heads; the nearest degree that works is {near}"
        elif kv % tp and tp % kv:
            yield (
                f"layout.tp = {tp} neither divides the {kv} key-value heads nor is a multiple of them; the nearest "
                f"degree that works is {near}"
            )
        elif config.feed_forward % tp:
            yield (
                f"layout.tp = {tp} does not divide feed_forward = {config.feed_forward}; the nearest degree that "
                f"works is {near}"
            )

    def _shares(self, tp: int) -> bool:
        config = self.resolved()
        kv = config.kv_heads
        return config.heads % tp == 0 and (kv % tp == 0 or tp % kv == 0) and config.feed_forward % tp == 0
