"""Mistral: Llama with a sliding window in every layer (arXiv 2310.06825)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from parallel.models.config import DecoderConfig
from parallel.models.families import gated
from parallel.models.families.family import Family
from parallel.models.families.keys import Keys

__all__ = ["FAMILY"]


def _read(keys: Keys) -> dict[str, Any]:
    fields = gated.read_fields(keys, max_positions=4096 * 32, kv_heads=8)
    window = 0 if keys.config.get("sliding_window", 0) is None else keys.integer("sliding_window", 4096)
    kind = "sliding_attention" if window else "full_attention"
    types = keys.config.get("layer_types")
    if types is not None and types != [kind] * fields["layers"]:
        keys.add(f"layer_types = {types!r}: must be {kind} for each layer")
    return fields | {"window": window}


def _write(config: DecoderConfig) -> dict[str, Any]:
    return gated.write_fields(config) | {"sliding_window": config.window or None}


def _misfits(config: DecoderConfig) -> Iterator[str]:
    yield from gated.misfits(config)
    if config.qkv_bias or config.out_bias or config.mlp_bias:
        yield "has no biases (llama and qwen2 have)"
    if config.qk_norm:
        yield "has no qk_norm (qwen3 has)"
    if config.window and any(config.window_of(layer) is None for layer in range(config.layers)):
        yield "has its window in every layer, not in window_layers alone (qwen2 has)"


FAMILY = Family(
    model_type="mistral",
    architecture="MistralForCausalLM",
    prefix="model.",
    reader=_read,
    writer=_write,
    misfits=_misfits,
    names=gated.names,
    ignored=gated.IGNORED,
)
