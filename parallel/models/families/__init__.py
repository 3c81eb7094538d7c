"""Model families: how each Hugging Face architecture is read, written and named."""

from __future__ import annotations

from parallel.models.families.bert import EncoderFamily
from parallel.models.families.family import Family, Stored
from parallel.registry import Registry

__all__ = ["ENCODERS", "FAMILIES", "EncoderFamily", "Family", "Stored"]

FAMILIES: Registry[Family] = Registry(
    "model family",
    {
        "llama": "parallel.models.families.llama:FAMILY",
        "mistral": "parallel.models.families.mistral:FAMILY",
        "qwen2": "parallel.models.families.qwen2:FAMILY",
        "qwen3": "parallel.models.families.qwen3:FAMILY",
        "gpt2": "parallel.models.families.gpt2:FAMILY",
    },
)

ENCODERS: Registry[EncoderFamily] = Registry(
    "encoder family",
    {
        "bert": "parallel.models.families.bert:BERT",
        "roberta": "parallel.models.families.bert:ROBERTA",
        "xlm-roberta": "parallel.models.families.bert:XLM_ROBERTA",
        "camembert": "parallel.models.families.bert:CAMEMBERT",
    },
)
