"""Qwen 2 and 2.5: biases of query, key and value, and a sliding window in some layers (arXiv 2407.10671)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from parallel.models.config import DecoderConfig
from parallel.models.families import gated
from parallel.models.families.family import Family
from parallel.models.families.keys import Keys

__all__ = ["FAMILY"]


def _read(keys: Keys) -> dict[str, Any]:
    fields = gated.read_fields(keys, max_positions=32768, kv_heads=32)
    return fields | gated.read_window_layers(keys, fields) | {"qkv_bias": True}


def _write(config: DecoderConfig) -> dict[str, Any]:
    return gated.write_fields(config) | gated.layer_types(config)


def _misfits(config: DecoderConfig) -> Iterator[str]:
    yield from gated.misfits(config)
    if not config.qkv_bias:
        yield "has biases of query, key and value: set qkv_bias"
    if config.out_bias or config.mlp_bias:
        yield "has no out_bias and no mlp_bias (llama has)"
    if config.qk_norm:
        yield "has no qk_norm (qwen3 has)"


FAMILY = Family(
    model_type="qwen2",
    architecture="Qwen2ForCausalLM",
    prefix="model.",
    reader=_read,
    writer=_write,
    misfits=_misfits,
    names=gated.names,
    ignored=gated.IGNORED,
)
