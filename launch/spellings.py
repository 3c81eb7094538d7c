"""What other programs call the options that ours have under another name."""

from __future__ import annotations

from typing import Any

from parallel.config import options

__all__ = ["foreign_spellings", "take"]

# Names of vLLM, SGLang, Megatron-LM, torchtitan and transformers; ours, in the order in which a program is asked
# for them; what else there is to know.
_SPELLINGS: tuple[tuple[str, str, str], ...] = (
    ("tensor_parallel_size tensor_model_parallel_size tp_size tp", "layout.tp", ""),
    ("parallelism.tensor_parallel_degree", "layout.tp", ""),
    ("pipeline_parallel_size pipeline_model_parallel_size pp_size", "layout.pp", ""),
    ("parallelism.pipeline_parallel_degree", "layout.pp", ""),
    ("data_parallel_size dp_size dp parallelism.data_parallel_replicate_degree", "layout.dp", ""),
    ("parallelism.data_parallel_shard_degree", "layout.dp", "with --zero.stage 3"),
    ("max_model_len context_length max_seq_len max_position_embeddings", "engine.context model.max_positions", ""),
    ("gpu_memory_utilization mem_fraction_static", "engine.cache.share", "a share of what is free, not of all memory"),
    ("max_num_seqs max_running_requests", "engine.scheduler.requests", ""),
    ("max_num_batched_tokens max_prefill_tokens", "engine.scheduler.budget", ""),
    ("chunked_prefill_size", "engine.scheduler.chunk", ""),
    ("kv_cache_dtype", "engine.cache.precision", ""),
    ("block_size page_size", "engine.scheduler.page_size", ""),
    ("enable_prefix_caching", "engine.scheduler.prefix_cache", "which is on"),
    ("no_enable_prefix_caching disable_radix_cache", "engine.scheduler.prefix_cache", "give it the value false"),
    ("attention_backend", "engine.cache.attention", ""),
    ("swap_space", "engine.cache.host_gib", ""),
    ("served_model_name", "names", ""),
    ("api_key", "keys_file key_file", "the name of a file, as whoever may list processes would read a key"),
    ("tool_call_parser", "http.tool_parser", ""),
    ("reasoning_parser", "http.reasoning_parser", ""),
    ("dtype torch_dtype bf16 fp16", "precision", "fp32 or bf16"),
    ("max_new_tokens", "max_tokens", ""),
    ("micro_batch_size training.local_batch_size", "batch.microbatches", "how many there are, not their size"),
    ("global_batch_size training.global_batch_size", "batch.sequences", ""),
    ("seq_length seq_len training.seq_len", "batch.sequence", ""),
    ("train_iters training.steps max_steps", "steps", ""),
    ("lr learning_rate", "optimizer.lr", ""),
    ("weight_decay", "optimizer.weight_decay", ""),
    ("clip_grad training.max_norm", "optimizer.clip", ""),
    ("lr_warmup_iters lr_scheduler.warmup_steps warmup_steps", "schedule.warmup", ""),
    ("save_interval checkpoint.interval", "trainer.save_every", ""),
    ("save output_dir", "out", ""),
    ("load", "init", "a Hugging Face folder; a run is continued by starting it again"),
    ("num_prompts", "requests", ""),
    ("request_rate", "rates", ""),
    ("max_concurrency", "concurrencies", ""),
    ("random_input_len", "shape.input", ""),
    ("random_output_len", "shape.output", ""),
)


def foreign_spellings(table: dict[str, Any], config: Any) -> list[str]:
    """Take options of other programs out of the overrides; what each of them is called by the one with ``config``."""
    ours = {leaf.name for leaf in options(config)}
    groups = {name.partition(".")[0] for name in ours}
    problems: list[str] = []
    for theirs, candidates, note in _SPELLINGS:
        known = next((name for name in candidates.split() if name in ours), None)
        for name in theirs.split():
            if known is None or name in ours or name in groups or take(table, name) is None:
                continue
            spelt, here = name.replace("_", "-"), known.replace("_", "-")
            problems.append(f"--{spelt} is --{here} here" + (f": {note}" if note else ""))
    return problems


def take(table: dict[str, Any], name: str) -> Any:
    """Remove a dotted name, or a group, from nested overrides and return what it was; None: it is not there."""
    first, dot, rest = name.partition(".")
    if not dot:
        return table.pop(first, None)
    inner = table.get(first)
    found = take(inner, rest) if isinstance(inner, dict) else None
    if found is not None and not inner:
        del table[first]
    return found
