"""Llama 1, 2 and 3, and the many models that took their shape (arXiv 2302.13971, 2307.09288, 2407.21783)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from parallel.models.config import DecoderConfig
from parallel.models.families import gated
from parallel.models.families.family import Family
from parallel.models.families.keys import Keys

__all__ = ["FAMILY"]


def _read(keys: Keys) -> dict[str, Any]:
    keys.neutral("sliding_window", None)
    biased = keys.flag("attention_bias", False)
    return gated.read_fields(keys, max_positions=2048) | {
        "qkv_bias": biased,
        "out_bias": biased,
        "mlp_bias": keys.flag("mlp_bias", False),
    }


def _write(config: DecoderConfig) -> dict[str, Any]:
    return gated.write_fields(config) | {"attention_bias": config.qkv_bias, "mlp_bias": config.mlp_bias}


def _misfits(config: DecoderConfig) -> Iterator[str]:
    yield from gated.misfits(config)
    if config.qkv_bias != config.out_bias:
        yield "has one switch for qkv_bias and out_bias: set both or neither"
    if config.qk_norm:
        yield "has no qk_norm (qwen3 has)"
    if config.window:
        yield "has no sliding window (mistral has)"
    if config.hidden % config.heads:
        yield f"needs hidden = {config.hidden} to be divisible by heads = {config.heads}"


FAMILY = Family(
    model_type="llama",
    architecture="LlamaForCausalLM",
    prefix="model.",
    reader=_read,
    writer=_write,
    misfits=_misfits,
    names=gated.names,
    ignored=gated.IGNORED,
)
