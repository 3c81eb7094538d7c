"""BERT (arXiv 1810.04805), RoBERTa (1907.11692), XLM-RoBERTa (1911.02116) and CamemBERT: one encoder, four names."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from parallel.errors import ConfigError, ModelFolderError, refuse
from parallel.models.encoder_config import EncoderConfig
from parallel.models.families.family import Stored
from parallel.models.families.keys import Keys, activation_name

__all__ = ["BERT", "CAMEMBERT", "ROBERTA", "XLM_ROBERTA", "EncoderFamily"]


@dataclass(frozen=True, slots=True, kw_only=True)
class EncoderFamily:
    """One Hugging Face architecture of an encoder.

    Attributes:
        model_type: its name in config.json, and ``EncoderConfig.family``.
        architecture: the class that ``transformers`` has for it.
        headed: classes that add heads, which are not read.
        prefix: what the names of all tensors but the heads' begin with; folders saved without a head lack it.
        padded: positions are counted from behind the id of the padding token.
        ignored: regular expressions of tensors that hidden states do not depend on (poolers, heads, indices).
        renamed: endings of names that old releases wrote, and those that stand for them.
    """

    model_type: str
    architecture: str
    headed: tuple[str, ...]
    prefix: str
    padded: bool
    ignored: tuple[str, ...]
    renamed: tuple[tuple[str, str], ...] = (
        (".LayerNorm.gamma", ".LayerNorm.weight"),
        (".LayerNorm.beta", ".LayerNorm.bias"),
    )

    def read(self, config: Mapping[str, Any]) -> EncoderConfig:
        """The (resolved) configuration that a config.json stands for; missing keys mean what they mean to transformers.

        Raises:
            ModelFolderError: with every key that is missing, malformed, or asks for what we do not do.
        """
        keys = Keys(config)
        keys.refuse_unsupported(self.architecture, *self.headed)
        keys.neutral("is_decoder", None, False, reason="only encoders are read as this family")
        keys.neutral("position_embedding_type", None, "absolute")
        keys.neutral("cross_attention_hidden_size", None)
        keys.neutral("directionality", None, "bidi")
        rows = keys.integer("max_position_embeddings", 512)
        first = keys.integer("pad_token_id", 1, least=0) + 1 if self.padded else 0
        if rows <= first:
            keys.add(f"max_position_embeddings = {rows}: the first position is {first}")
        fields = {
            "vocabulary": keys.integer("vocab_size"),
            "hidden": keys.integer("hidden_size"),
            "layers": keys.integer("num_hidden_layers"),
            "heads": keys.integer("num_attention_heads"),
            "feed_forward": keys.integer("intermediate_size"),
            "activation": keys.activation("hidden_act", "gelu"),
            "norm_eps": keys.number("layer_norm_eps", 1e-12, above=0),
            "max_positions": max(rows - first, 1),
            "first_position": first,
            "token_types": keys.integer("type_vocab_size", 2),
            "dropout": keys.probability("hidden_dropout_prob", 0.1),
            "attention_dropout": keys.probability("attention_probs_dropout_prob", 0.1),
            "std": keys.number("initializer_range", 0.02, above=0),
        }
        refuse(ModelFolderError, keys.problems)
        encoder = EncoderConfig(family=self.model_type, **fields).resolved()
        refuse(ModelFolderError, encoder.problems())
        return encoder

    def problems(self, config: EncoderConfig) -> Iterator[str]:
        """Why the family cannot express a configuration."""
        if self.padded and config.first_position < 1:
            yield f"family {self.model_type!r} has a padding token before first_position, which is 0"
        if not self.padded and config.first_position:
            yield f"family {self.model_type!r} has first_position = 0, not {config.first_position}"

    def write(self, config: EncoderConfig) -> dict[str, Any]:
        """The config.json that transformers, and :meth:`read`, take for the same function.

        Raises:
            ConfigError: the family cannot express it.
        """
        refuse(ConfigError, config.problems())
        refuse(ConfigError, self.problems(config))
        config = config.resolved()
        return {
            "architectures": [self.architecture],
            "model_type": self.model_type,
            "vocab_size": config.vocabulary,
            "hidden_size": config.hidden,
            "num_hidden_layers": config.layers,
            "num_attention_heads": config.heads,
            "intermediate_size": config.feed_forward,
            "hidden_act": activation_name(config.activation),
            "layer_norm_eps": config.norm_eps,
            "max_position_embeddings": config.first_position + config.max_positions,
            "position_embedding_type": "absolute",
            "type_vocab_size": config.token_types,
            "hidden_dropout_prob": config.dropout,
            "attention_probs_dropout_prob": config.attention_dropout,
            "initializer_range": config.std,
            "bos_token_id": None,
            "eos_token_id": None,
            "pad_token_id": config.first_position - 1 if self.padded else None,
        }

    def stored(self, config: EncoderConfig) -> dict[str, Stored]:
        """Our parameter name -> where a folder holds it."""
        embeddings = self.prefix + "embeddings."
        table = {
            "embedding.weight": Stored((embeddings + "word_embeddings.weight",)),
            "positions.weight": Stored((embeddings + "position_embeddings.weight",)),
            "types.weight": Stored((embeddings + "token_type_embeddings.weight",)),
            "norm.weight": Stored((embeddings + "LayerNorm.weight",)),
            "norm.bias": Stored((embeddings + "LayerNorm.bias",)),
        }
        modules = {
            "attention.qkv": [f"attention.self.{part}" for part in ("query", "key", "value")],
            "attention.out": ["attention.output.dense"],
            "attention_norm": ["attention.output.LayerNorm"],
            "mlp.up": ["intermediate.dense"],
            "mlp.down": ["output.dense"],
            "mlp_norm": ["output.LayerNorm"],
        }
        for layer in range(config.layers):
            theirs = f"{self.prefix}encoder.layer.{layer}."
            for ours, parts in modules.items():
                for value in ("weight", "bias"):
                    table[f"layers.{layer}.{ours}.{value}"] = Stored(tuple(f"{theirs}{p}.{value}" for p in parts))
        return table


BERT = EncoderFamily(
    model_type="bert",
    architecture="BertModel",
    headed=("BertForMaskedLM", "BertForPreTraining"),
    prefix="bert.",
    padded=False,
    ignored=(
        r"^bert\.pooler\.dense\.(weight|bias)$",
        r"^bert\.embeddings\.position_ids$",
        r"^cls\.predictions\.(bias|transform\.(dense|LayerNorm)\.(weight|bias)|decoder\.(weight|bias))$",
        r"^cls\.seq_relationship\.(weight|bias)$",
    ),
)


def _roberta(model_type: str, stem: str) -> EncoderFamily:
    return EncoderFamily(
        model_type=model_type,
        architecture=f"{stem}Model",
        headed=(f"{stem}ForMaskedLM",),
        prefix="roberta.",
        padded=True,
        ignored=(
            r"^roberta\.pooler\.dense\.(weight|bias)$",
            r"^roberta\.embeddings\.position_ids$",
            r"^lm_head\.(bias|(dense|layer_norm|decoder)\.(weight|bias))$",
        ),
    )


ROBERTA = _roberta("roberta", "Roberta")
XLM_ROBERTA = _roberta("xlm-roberta", "XLMRoberta")
CAMEMBERT = _roberta("camembert", "Camembert")
