"""The configuration that DeepSpeed's engine is given: what its file says, and our options for all that is ours."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch

from zero.deepspeed_keys import SWITCHED
from zero.optimizer import OptimizerConfig, ZeroConfig

__all__ = ["engine_document", "engine_misfits", "on_disk"]

_OURS = frozenset(
    (
        *(
            "optimizer",
            "scheduler",
            "gradient_clipping",
            "tensor_parallel",
            "bf16",
            "bfloat16",
            "communication_data_type",
        ),
        *("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps"),
    )
)
"""Sections and keys whose values our options have, whatever the file says; the file was laid under them."""
_ALONE = {
    "shard_size": 0,
    "ahead": 1,
    "secondary": 0,
    "quantize_weights": False,
    "gradient_bits": 0,
    "top_k": 0.0,
}
"""Options of :class:`ZeroConfig` that only our engine has, and what they are without it."""
_PARTS = {"offload_optimizer": ("optimizer", "parameters"), "offload_param": ("parameters",)}


def engine_misfits(zero: ZeroConfig, dtype: torch.dtype, pp: int, traced: bool) -> Iterator[str]:
    """Why DeepSpeed's engine cannot train like this.

    Args:
        zero: options.
        dtype: of the weights.
        pp: pipeline stages.
        traced: a step is to be measured.
    """
    if traced:
        yield "trace: DeepSpeed's engine measures no timeline"
    if pp > 1:
        yield f"layout.pp = {pp}: DeepSpeed's engine is not given a pipeline; the nearest is layout.pp = 1"
    if dtype == torch.float64:
        yield "precision = fp64: DeepSpeed's master weights are fp32; the nearest is precision = fp32"
    if zero.stage == 0 and (dtype == torch.bfloat16 or zero.offload != "none"):
        what = "bf16" if dtype == torch.bfloat16 else "offload"
        yield f"zero.stage = 0 with {what}: DeepSpeed would sum gradients in bf16, or cannot; the nearest is stage 1"
    for name, neutral in _ALONE.items():
        if getattr(zero, name) != neutral:
            given = getattr(zero, name)
            yield f"zero.{name} = {given}: only our own engine has that; the nearest under DeepSpeed's is {neutral}"


def on_disk(document: Mapping[str, Any], part: str) -> bool:
    """Whether ``offload_optimizer`` or ``offload_param`` goes to nvme."""
    section = document.get("zero_optimization", {}).get(part)
    return isinstance(section, Mapping) and section.get("device") == "nvme"


def engine_document(
    document: Mapping[str, Any], zero: ZeroConfig, optimizer: OptimizerConfig, dtype: torch.dtype
) -> dict[str, Any]:
    """DeepSpeed's configuration for a run of ours.

    Args:
        document: of the file; what our options do not decide is passed on, ``auto`` and sections that are off are not.
        zero, optimizer, dtype: decide the rest.
    """
    settings = {key: value for key, value in document.items() if key not in _OURS and key not in SWITCHED}
    settings = _without_auto(settings)
    cut = settings.setdefault("zero_optimization", {})
    cut["stage"] = zero.stage
    cut["reduce_bucket_size"] = max(1, round(optimizer.bucket_mb * (1 << 20) / 4))
    for key in ("cpu_offload", "cpu_offload_param"):
        cut.pop(key, None)
    for part, asked in _PARTS.items():
        if on_disk(document, part):
            continue
        given = cut.pop(part, None)
        if zero.offload in asked:
            cut[part] = {**(given if isinstance(given, Mapping) else {}), "device": "cpu"}
    settings["gradient_clipping"] = optimizer.clip
    if dtype == torch.bfloat16:
        settings["bf16"] = {"enabled": True, "check_grad_overflow": True}
        settings["data_types"] = {"grad_accum_dtype": "fp32"}
        settings["communication_data_type"] = "fp32"
    return settings


def _without_auto(table: Mapping[str, Any]) -> dict[str, Any]:
    found = {k: _without_auto(v) if isinstance(v, Mapping) else v for k, v in table.items() if v != "auto"}
    return {k: v for k, v in found.items() if v != {} or k == "zero_optimization"}
