"""GPT-2: learned positions, LayerNorm, biases everywhere; linear weights are stored (in, out), q, k and v as one."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from parallel.models.config import DecoderConfig
from parallel.models.families.family import Family, Stored
from parallel.models.families.keys import Keys, activation_name

__all__ = ["FAMILY"]


def _read(keys: Keys) -> dict[str, Any]:
    keys.neutral("scale_attn_weights", None, True)
    keys.neutral("scale_attn_by_inverse_layer_idx", None, False)
    hidden, heads = keys.integer("n_embd"), keys.integer("n_head")
    return {
        "vocabulary": keys.integer("vocab_size"),
        "hidden": hidden,
        "layers": keys.integer("n_layer"),
        "heads": heads,
        "feed_forward": keys.integer("n_inner", 4 * hidden),
        "activation": keys.activation("activation_function", "gelu_new"),
        "gated": False,
        "norm": "layer",
        "norm_eps": keys.number("layer_norm_epsilon", 1e-5, above=0),
        "qkv_bias": True,
        "out_bias": True,
        "mlp_bias": True,
        "positions": "learned",
        "max_positions": keys.integer("n_positions", 1024),
        "tied": keys.flag("tie_word_embeddings", True),
        "embedding_dropout": keys.probability("embd_pdrop", 0.1),
        "residual_dropout": keys.probability("resid_pdrop", 0.1),
        "attention_dropout": keys.probability("attn_pdrop", 0.1),
        "std": keys.number("initializer_range", 0.02, above=0),
    }


def _write(config: DecoderConfig) -> dict[str, Any]:
    return {
        "vocab_size": config.vocabulary,
        "n_embd": config.hidden,
        "n_layer": config.layers,
        "n_head": config.heads,
        "n_inner": config.feed_forward,
        "activation_function": activation_name(config.activation),
        "layer_norm_epsilon": config.norm_eps,
        "n_positions": config.max_positions,
        "tie_word_embeddings": config.tied,
        "embd_pdrop": config.embedding_dropout,
        "resid_pdrop": config.residual_dropout,
        "attn_pdrop": config.attention_dropout,
        "initializer_range": config.std,
    }


def _misfits(config: DecoderConfig) -> Iterator[str]:
    wanted = {
        "positions": "learned",
        "norm": "layer",
        "gated": False,
        "qkv_bias": True,
        "out_bias": True,
        "mlp_bias": True,
        "qk_norm": False,
        "window": 0,
    }
    for name, value in wanted.items():
        if getattr(config, name) != value:
            yield f"has {name} = {value!r}, not {getattr(config, name)!r}"
    if config.kv_heads != config.heads:
        yield f"has as many key-value heads as heads, not kv_heads = {config.kv_heads}"
    if config.head_size * config.heads != config.hidden:
        yield f"has heads of size hidden / heads, not head_size = {config.head_size}"


def _names(config: DecoderConfig) -> dict[str, Stored]:
    table = {
        "embedding.weight": Stored(("transformer.wte.weight",)),
        "positions.weight": Stored(("transformer.wpe.weight",)),
    }
    modules = {
        "attention_norm": "ln_1",
        "attention.qkv": "attn.c_attn",
        "attention.out": "attn.c_proj",
        "mlp_norm": "ln_2",
        "mlp.up": "mlp.c_fc",
        "mlp.down": "mlp.c_proj",
    }
    for layer in range(config.layers):
        for ours, theirs in modules.items():
            linear = not ours.endswith("norm")
            for value in ("weight", "bias"):
                name = f"transformer.h.{layer}.{theirs}.{value}"
                table[f"layers.{layer}.{ours}.{value}"] = Stored((name,), transposed=linear and value == "weight")
    table["norm.weight"] = Stored(("transformer.ln_f.weight",))
    table["norm.bias"] = Stored(("transformer.ln_f.bias",))
    table["head.weight"] = Stored(("lm_head.weight",))
    return table


FAMILY = Family(
    model_type="gpt2",
    architecture="GPT2LMHeadModel",
    prefix="transformer.",
    reader=_read,
    writer=_write,
    misfits=_misfits,
    names=_names,
    ignored=(r"(^|\.)h\.\d+\.attn\.(bias|masked_bias)$",),
)
