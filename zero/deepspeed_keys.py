"""What each key of DeepSpeed's configuration is here: an option, nothing that changes a result, or refused."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

__all__ = ["HARMLESS", "KEYS", "SPEED", "SWITCHED", "Only", "Rule", "Takes", "number", "whole"]


def number(value: Any) -> float:
    """A finite number.

    Raises:
        ValueError: it is none.
    """
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ValueError("must be a number")
    return float(value)


def whole(value: Any) -> int:
    """A whole number, which DeepSpeed also takes in the form 5e8.

    Raises:
        ValueError: it is none.
    """
    if number(value) != int(value):
        raise ValueError("must be a whole number")
    return int(value)


def _mebibytes(elements: Any) -> float:
    """Of so many gradients, which are summed in fp32."""
    return whole(elements) * 4 / (1 << 20)


def _switch(value: Any) -> bool:
    if not isinstance(value, bool):
        raise ValueError("must be true or false")
    return value


@dataclass(frozen=True, slots=True)
class Takes:
    """The key is honoured by an option of ours."""

    option: str
    convert: Callable[[Any], Any]


@dataclass(frozen=True, slots=True)
class Only:
    """The key may have these values, which are what happens here; with another one it is refused."""

    values: tuple[Any, ...]
    instead: str


@dataclass(frozen=True, slots=True)
class _Harmless:
    """The key changes no result."""

    why: str


Rule = Takes | Only | _Harmless

SPEED = _Harmless("it changes speed or memory, no result")
"""Left to DeepSpeed's engine where that trains."""
_SHOWN = _Harmless("it changes what is shown or written, no result")
_SAVED = _Harmless("checkpoints here have a form of their own")
_OFF = (False, None)

_ZERO: dict[str, Rule] = (
    {
        "stage": Takes("zero.stage", whole),
        "reduce_bucket_size": Takes("optimizer.bucket_mb", _mebibytes),
        "mics_shard_size": Takes("zero.shard_size", lambda value: max(0, whole(value))),
        "zero_hpz_partition_size": Takes("zero.secondary", lambda value: whole(value) if whole(value) > 1 else 0),
        "zero_quantized_weights": Takes("zero.quantize_weights", _switch),
        "zero_quantized_gradients": Takes("zero.gradient_bits", lambda value: 4 if _switch(value) else 0),
        "zero_quantized_nontrainable_weights": Only(_OFF, "weights that are not trained stay as they are"),
        "zeropp_loco_param": Only((None,), "quantized gradients are sent without error feedback"),
        "cpu_offload": Only(_OFF, "the nearest is offload_optimizer"),
        "cpu_offload_param": Only(_OFF, "the nearest is offload_param"),
        "zenflow": Only((None,), "every step updates every weight"),
        "ignore_unused_parameters": Only((True,), "a parameter without a gradient counts as one with gradient 0"),
        "compute_grad_norm": Only((True,), "the norm is what a step that is not finite is told by"),
    }
    | dict.fromkeys(
        (
            "contiguous_gradients",
            "reduce_scatter",
            "use_multi_rank_bucket_allreduce",
            "allgather_partitions",
            "allgather_bucket_size",
            "overlap_comm",
            "sub_group_size",
            "cpu_offload_use_pin_memory",
            "stage3_prefetch_bucket_size",
            "stage3_param_persistence_threshold",
            "stage3_model_persistence_threshold",
            "stage3_max_live_parameters",
            "stage3_max_reuse_distance",
            "stage3_module_granularity_threshold",
            "stage3_use_all_reduce_for_fetch_params",
            "stage3_allgather_sequential",
            "legacy_stage1",
            "round_robin_gradients",
            "parameter_alignment",
            "memory_efficient_linear",
            "override_module_apply",
            "mics_hierarchical_params_gather",
            "log_trace_cache_warnings",
            "enable_sanity_checks",
        ),
        SPEED,
    )
    | dict.fromkeys(
        (
            "load_from_fp32_weights",
            "elastic_checkpoint",
            "stage3_gather_16bit_weights_on_model_save",
            "stage3_gather_fp16_weights_on_model_save",
            "pipeline_loading_checkpoint",
        ),
        _SAVED,
    )
)

KEYS: dict[str, Rule] = {
    "gradient_clipping": Takes("optimizer.clip", number),
    "tensor_parallel.autotp_size": Takes("layout.tp", lambda value: max(1, whole(value))),
    "bf16.check_grad_overflow": Only((True,), "a step whose gradients are not finite changes nothing"),
    "bf16.bf16_master_weights_and_grads": Only(_OFF, "master weights are fp32"),
    "bf16.bf16_optimizer_states": Only(_OFF, "the state of the optimizer is fp32"),
    "bf16.immediate_grad_update": SPEED,
    "communication_data_type": Only(("fp32", None), "gradients are summed in fp32"),
    "seq_parallel_communication_data_type": Only(("fp32", None), "gradients are summed in fp32"),
    "data_types.grad_accum_dtype": Only(("fp32", None), "gradients are summed in fp32"),
    "gradient_allreduce_op": Only(("mean",), "losses are divided by the global number of tokens"),
    "managed_gradient_accumulation": Only((True,), "a step is as many microbatches as it says"),
    "sequence_parallel_size": Only((1,), "layout.cp cuts sequences"),
    "sparse_attention": Only((None,), "attention is over all tokens of a document"),
    "dataloader_drop_last": _Harmless("the order of the data has no end"),
    "prescale_gradients": _Harmless("it changes rounding only"),
    "gradient_predivide_factor": _Harmless("it changes rounding only"),
    "checkpoint": _SAVED,
    "use_data_before_expert_parallelism": SPEED,
    "disable_allgather": SPEED,
    "disable_python_gc": SPEED,
    "sparse_gradients": SPEED,
    "graph_harvesting": SPEED,
    "zero_allow_untested_optimizer": _Harmless("every elementwise optimizer is allowed"),
    "zero_force_ds_cpu_optimizer": SPEED,
    "steps_per_print": _SHOWN,
    "wall_clock_breakdown": _SHOWN,
    "memory_breakdown": _SHOWN,
    "dump_state": _SHOWN,
    "log_level": _SHOWN,
    "timers": _SHOWN,
} | {f"zero_optimization.{key}": rule for key, rule in _ZERO.items()}
"""Of single keys, dotted."""

HARMLESS: dict[str, _Harmless] = {
    "activation_checkpointing": _Harmless("the model, by option recompute, decides what is formed again"),
    "aio": SPEED,
    "checkpoint": _SAVED,
    "comms_logger": _SHOWN,
    "compile": SPEED,
    "csv_monitor": _SHOWN,
    "comet": _SHOWN,
    "flops_profiler": _SHOWN,
    "monitor_config": _SHOWN,
    "tensorboard": _SHOWN,
    "wandb": _SHOWN,
    "timers": _SHOWN,
    "zero_optimization.offload_optimizer": SPEED,
    "zero_optimization.offload_param": SPEED,
    "zero_optimization.leaf_module": SPEED,
}
"""Of whole sections, where a key has no rule of its own."""

SWITCHED: dict[str, str] = {
    "amp": "precision is fp32, bf16 or fp64",
    "autotuning": "nothing is tuned by itself",
    "compression_training": "there is no compression of the model",
    "curriculum_learning": "all steps have sequences of one length",
    "data_efficiency": "all steps have sequences of one length",
    "eigenvalue": "it serves quantized training, which is not there",
    "elasticity": "the batch is the same at every number of ranks as it is",
    "fp16": "there is no loss scaling; the nearest is bf16",
    "hybrid_engine": "what is trained is exported, and then served",
    "nebula": "checkpoints are files",
    "progressive_layer_drop": "all layers take part in every step",
    "quantize_training": "there is no quantized training",
    "torch_autocast": "weights are of the type that is computed in; the nearest is bf16",
}
"""Sections that are honoured while they are off, which they are without ``enabled``; and why not when on."""
