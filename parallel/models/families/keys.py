"""Reading a config.json: every key is checked, every problem kept."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

from parallel.errors import nearest

__all__ = ["ACTIVATIONS", "Keys", "activation_name"]

ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_python": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_python_tanh": "gelu_tanh",
}
"""Hugging Face's name of an activation -> ours; the first name for each is the one that is written."""

# Keys that change the function of a model of any family, and the values at which they do not.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "quantization_config": (None,),
    "auto_map": (None, {}),
    "partial_rotary_factor": (None, 1),
    "is_encoder_decoder": (None, False),
    "add_cross_attention": (None, False),
    "pruned_heads": (None, {}),
    "attn_logit_softcapping": (None,),
    "final_logit_softcapping": (None,),
    "query_pre_attn_scalar": (None,),
    "embedding_multiplier": (None, 1),
    "residual_multiplier": (None, 1),
    "attention_multiplier": (None,),
    "logits_scaling": (None, 1),
    "logit_scale": (None, 1),
    "num_local_experts": (None, 0, 1),
    "num_experts": (None, 0, 1),
    "no_rope_layers": (None, []),
    "attention_chunk_size": (None,),
    "use_qk_norm": (None, False),
}
_REASONS = {
    "quantization_config": "quantized weights are not read",
    "auto_map": "code that comes with a model is never run",
}
_REQUIRED: Any = object()


def activation_name(activation: str) -> str:
    """Hugging Face's name of one of our activations."""
    return next(name for name, ours in ACTIVATIONS.items() if ours == activation)


class Keys:
    """A config.json, and the problems found in it so far.

    A key that is absent has its default; without a default, or with a value of the wrong kind, it is a problem,
    and the value that is returned only lets the reading go on.
    """

    def __init__(self, config: Mapping[str, Any], where: str = "") -> None:
        self.config = config
        self.where = where
        self.problems: list[str] = []

    def integer(self, key: str, default: Any = _REQUIRED, least: int = 1) -> Any:
        """A whole number of at least ``least``; ``default`` also where the value is null."""
        value = self._get(key, default)
        if value is default or (isinstance(value, int) and not isinstance(value, bool) and value >= least):
            return 1 if value is _REQUIRED else value
        self._wrong(key, f"must be a whole number of at least {least}")
        return 1

    def number(self, key: str, default: Any = _REQUIRED, *, above: float = -math.inf) -> Any:
        """A finite number greater than ``above``; ``default`` also where the value is null."""
        value = self._get(key, default)
        if value is default:
            return 1.0 if value is _REQUIRED else value
        if isinstance(value, int | float) and not isinstance(value, bool) and above < value < 1e300:
            return float(value)
        self._wrong(key, "must be a number" if above == -math.inf else f"must be a number above {above:g}")
        return 1.0

    def probability(self, key: str, default: float) -> float:
        """A number from 0 to below 1."""
        value = self.number(key, default)
        if 0 <= value < 1:
            return value
        self._wrong(key, "must be a probability below 1")
        return default

    def flag(self, key: str, default: bool) -> bool:
        """True or false."""
        value = self._get(key, default)
        if isinstance(value, bool):
            return value
        self._wrong(key, "must be true or false")
        return default

    def choice(self, key: str, known: Iterable[str], default: str) -> str:
        """One of the ``known`` names."""
        known = tuple(known)
        value = self._get(key, default)
        if value in known:
            return value
        self._wrong(key, f"is not one of {', '.join(known)}{nearest(str(value), known)}")
        return default

    def activation(self, key: str, default: str) -> str:
        """Our name of the activation."""
        return ACTIVATIONS[self.choice(key, ACTIVATIONS, default)]

    def neutral(self, key: str, *values: Any, reason: str = "is not supported") -> None:
        """A key that must be absent or have one of ``values``."""
        value = self.config.get(key)
        if not any(value == neutral and isinstance(value, bool) == isinstance(neutral, bool) for neutral in values):
            self._wrong(key, reason)

    def refuse_unsupported(self, architecture: str, *others: str) -> None:
        """The keys that no family here honours, and an architecture that is neither the family's nor of ``others``."""
        for key, values in _NEUTRAL.items():
            self.neutral(key, None, *values, reason=_REASONS.get(key, "is not supported"))
        given = self._get("architectures", None)
        names = {architecture.lower(), architecture.replace("ForCausalLM", "Model").replace("LMHead", "").lower()}
        names |= {other.lower() for other in others}
        if given not in (None, []) and not (
            isinstance(given, list) and any(str(name).lower() in names for name in given)
        ):
            self._wrong("architectures", f"must name {architecture}")

    def add(self, problem: str) -> None:
        """One more problem."""
        self.problems.append(self.where + problem)

    def _get(self, key: str, default: Any) -> Any:
        value = self.config.get(key)
        if value is None and default is _REQUIRED:
            self.add(f"{key} is missing")
        return default if value is None else value

    def _wrong(self, key: str, reason: str) -> None:
        text = repr(self.config.get(key))
        self.add(f"{key} = {text if len(text) < 80 else text[:77] + '...'}: {reason}")
