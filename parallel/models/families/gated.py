"""What Llama, Mistral and Qwen share: rotary positions, RMSNorm, a gated MLP, and the names of their tensors."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from parallel.models.config import DecoderConfig
from parallel.models.families.family import Stored
from parallel.models.families.keys import Keys, activation_name
from parallel.models.families.scaling import read_rope, write_rope

__all__ = ["IGNORED", "layer_types", "misfits", "names", "read_fields", "read_window_layers", "write_fields"]

IGNORED = (r"\.rotary_emb\.inv_freq$",)
"""Frequencies that old releases saved; they follow from the configuration."""


def read_fields(keys: Keys, *, max_positions: int, kv_heads: Any = None) -> dict[str, Any]:
    """The fields that all of them have; the arguments are the family's defaults."""
    heads = keys.integer("num_attention_heads")
    limit = keys.integer("max_position_embeddings", max_positions)
    kv = heads if keys.config.get("num_key_value_heads", kv_heads) is None else kv_heads
    return {
        "vocabulary": keys.integer("vocab_size"),
        "hidden": keys.integer("hidden_size"),
        "layers": keys.integer("num_hidden_layers"),
        "heads": heads,
        "kv_heads": keys.integer("num_key_value_heads", kv),
        "head_size": keys.integer("head_dim", 0),
        "feed_forward": keys.integer("intermediate_size"),
        "activation": keys.activation("hidden_act", "silu"),
        "norm_eps": keys.number("rms_norm_eps", 1e-6, above=0),
        "max_positions": limit,
        "rope": read_rope(keys, limit),
        "tied": keys.flag("tie_word_embeddings", False),
        "attention_dropout": keys.probability("attention_dropout", 0.0),
        "std": keys.number("initializer_range", 0.02, above=0),
    }


def write_fields(config: DecoderConfig) -> dict[str, Any]:
    """The keys that all of them have."""
    return {
        "vocab_size": config.vocabulary,
        "hidden_size": config.hidden,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.head_size,
        "intermediate_size": config.feed_forward,
        "hidden_act": activation_name(config.activation),
        "rms_norm_eps": config.norm_eps,
        "max_position_embeddings": config.max_positions,
        **write_rope(config),
        "tie_word_embeddings": config.tied,
        "attention_dropout": config.attention_dropout,
        "initializer_range": config.std,
    }


def misfits(config: DecoderConfig) -> Iterator[str]:
    """What none of them has a place for."""
    if config.positions != "rotary":
        yield f"has rotary positions, not positions = {config.positions!r}"
    if config.norm != "rms":
        yield f"has norm = 'rms', not {config.norm!r}"
    if not config.gated:
        yield "has a gated MLP, not gated = false"
    if config.rope.scaling in ("linear", "dynamic") and config.rope.original != config.max_positions:
        yield (
            f"measures {config.rope.scaling} scaling from max_positions = {config.max_positions}, not from "
            f"rope.original = {config.rope.original}"
        )


def read_window_layers(keys: Keys, fields: dict[str, Any]) -> dict[str, Any]:
    """``window`` and ``window_layers`` from Qwen's keys."""
    layers, used = fields["layers"], keys.flag("use_sliding_window", False)
    window = keys.integer("sliding_window", 4096) if used and _present(keys, "sliding_window") else 0
    types = keys.config.get("layer_types")
    if types is None:
        first = keys.integer("max_window_layers", 28, least=0)
        windowed = tuple(range(first, layers)) if window else ()
    elif not isinstance(types, list) or any(kind not in ("full_attention", "sliding_attention") for kind in types):
        keys.add(f"layer_types = {types!r}: must list full_attention or sliding_attention for each layer")
        windowed = ()
    else:
        windowed = tuple(layer for layer, kind in enumerate(types) if kind == "sliding_attention")
        if len(types) != layers:
            keys.add(f"layer_types names {len(types)} layers, num_hidden_layers = {layers}")
        if windowed and not window:
            keys.add("layer_types asks for sliding_attention, but use_sliding_window or sliding_window is not set")
    return {
        "window": window if windowed else 0,
        "window_layers": () if len(windowed) == layers else windowed,
    }


def _present(keys: Keys, key: str) -> bool:
    """False where the key is there and null."""
    return keys.config.get(key, 0) is not None


def layer_types(config: DecoderConfig) -> dict[str, Any]:
    """Qwen's keys for ``window`` and ``window_layers``."""
    windowed = [config.window_of(layer) is not None for layer in range(config.layers)]
    return {
        "use_sliding_window": any(windowed),
        "sliding_window": config.window or None,
        "max_window_layers": windowed.index(True) if any(windowed) else config.layers,
        "layer_types": ["sliding_attention" if window else "full_attention" for window in windowed],
    }


def names(config: DecoderConfig) -> dict[str, Stored]:
    """Our parameter name -> where it is stored."""
    table = {"embedding.weight": Stored(("model.embed_tokens.weight",))}
    for layer in range(config.layers):
        table |= _block_names(config, f"layers.{layer}.", f"model.layers.{layer}.")
    table["norm.weight"] = Stored(("model.norm.weight",))
    table["head.weight"] = Stored(("lm_head.weight",))
    return table


def _block_names(config: DecoderConfig, ours: str, theirs: str) -> dict[str, Stored]:
    attention, mlp = theirs + "self_attn.", theirs + "mlp."
    linears = {
        "attention.qkv": (config.qkv_bias, [attention + part for part in ("q_proj", "k_proj", "v_proj")]),
        "attention.out": (config.out_bias, [attention + "o_proj"]),
        "mlp.gate_up": (config.mlp_bias, [mlp + "gate_proj", mlp + "up_proj"]),
        "mlp.down": (config.mlp_bias, [mlp + "down_proj"]),
    }
    table = {
        ours + "attention_norm.weight": Stored((theirs + "input_layernorm.weight",)),
        ours + "mlp_norm.weight": Stored((theirs + "post_attention_layernorm.weight",)),
    }
    for name, (biased, parts) in linears.items():
        for value in ("weight", "bias") if biased else ("weight",):
            table[f"{ours}{name}.{value}"] = Stored(tuple(f"{part}.{value}" for part in parts))
    if config.qk_norm:
        for norm in ("q_norm", "k_norm"):
            table[f"{ours}attention.{norm}.weight"] = Stored((f"{attention}{norm}.weight",))
    return table
