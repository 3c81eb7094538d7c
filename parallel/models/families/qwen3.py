"""Qwen 3: RMSNorm of each query and key head, and heads of their own size (arXiv 2505.09388)."""

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
    biased = keys.flag("attention_bias", False)
    return (
        fields
        | gated.read_window_layers(keys, fields)
        | {"head_size": fields["head_size"] or 128, "qk_norm": True, "qkv_bias": biased, "out_bias": biased}
    )


def _write(config: DecoderConfig) -> dict[str, Any]:
    return gated.write_fields(config) | gated.layer_types(config) | {"attention_bias": config.qkv_bias}


def _misfits(config: DecoderConfig) -> Iterator[str]:
    yield from gated.misfits(config)
    if not config.qk_norm:
        yield "norms each query and key head: set qk_norm"
    if config.qkv_bias != config.out_bias:
        yield "has one switch for qkv_bias and out_bias: set both or neither"
    if config.mlp_bias:
        yield "has no mlp_bias (llama has)"


FAMILY = Family(
    model_type="qwen3",
    architecture="Qwen3ForCausalLM",
    prefix="model.",
    reader=_read,
    writer=_write,
    misfits=_misfits,
    names=gated.names,
    ignored=gated.IGNORED,
)
