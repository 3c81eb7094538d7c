"""Fields that other servers have: what to write here instead, or that there is no such thing."""

from __future__ import annotations

import difflib
import re
from collections.abc import Collection, Mapping

__all__ = ["told"]

_LENGTH = ("max_tokens", "max_output_tokens")
_OURS: dict[str, tuple[str, ...]] = {
    # sampling
    "stop_token_ids": ("stop_tokens",),
    "stop_sequences": ("stop",),
    "include_stop_str_in_output": ("include_stop",),
    "no_stop_trim": ("include_stop",),
    "allowed_token_ids": ("allowed_tokens",),
    "repeat_penalty": ("repetition_penalty",),
    "typ_p": ("typical_p",),
    "typical": ("typical_p",),
    "do_sample": ("temperature (0: always the likeliest token)",),
    "random_seed": ("seed",),
    "num_return_sequences": ("n",),
    "use_beam_search": ("beams, the number of beams",),
    "num_beams": ("beams",),
    "beam_width": ("beams",),
    # lengths
    **dict.fromkeys(("max_tokens", "max_completion_tokens", "max_output_tokens", "max_new_tokens"), _LENGTH),
    **dict.fromkeys(("n_predict", "num_predict", "max_tokens_to_sample", "max_length"), _LENGTH),
    "min_new_tokens": ("min_tokens",),
    # forms
    "guided_json": ('structured_outputs: {"json": ...}', "text.format"),
    "json_schema": ('structured_outputs: {"json": ...}', "text.format"),
    "guided_regex": ('structured_outputs: {"regex": ...}',),
    "regex": ('structured_outputs: {"regex": ...}',),
    "guided_choice": ('structured_outputs: {"choice": [...]}',),
    "guided_grammar": ('structured_outputs: {"grammar": ...}',),
    "grammar": ('structured_outputs: {"grammar": ...}',),
    "ebnf": ('structured_outputs: {"grammar": ...}',),
    "structured_outputs.json_object": ('structured_outputs: {"json": {"type": "object"}}',),
    "response_format.schema": ('response_format: {"type": "json_schema", "json_schema": {...}}',),
    **dict.fromkeys(("response_format", "structured_outputs", "format"), ("response_format", "text.format")),
    "text": ("prompt", "response_format"),
    # what is reported
    "top_logprobs": ("logprobs",),
    "n_probs": ("top_logprobs", "logprobs"),
    "top_n_tokens": ("top_logprobs", "logprobs"),
    "prompt_logprobs": ("echo and logprobs",),
    "return_full_text": ("echo",),
    # what is to be continued
    "inputs": ("prompt", "messages", "input"),
    "input": ("prompt", "messages"),
    "input_ids": ("prompt",),
    "content": ("prompt",),
    "messages": ("input",),
    "system": ("instructions", "messages"),
    "instructions": ("messages",),
    "token_ids": ("tokens", "prompt"),
    "add_bos": ("add_special_tokens",),
    "add_bos_token": ("add_special_tokens",),
    "truncate_prompt_tokens": ("truncate",),
    "instruction": ("prompt_name",),
    "input_type": ("prompt_name",),
    # tools and reasoning
    "functions": ("tools",),
    "function_call": ("tool_choice",),
    "enable_thinking": ("chat_template_kwargs, where the model's template knows it",),
    "reasoning_effort": ("chat_template_kwargs, where the model's template knows it",),
}
"""What is written instead: the first whose field the body has."""

_WHY = {
    "chat_template": "it comes from the model's folder",
    "cache_salt": "prefixes are shared by requests with the same API key only",
    "guided_decoding_backend": "there is one",
    "request_id": "answers have ids of the server's own",
    "previous_response_id": "nothing is stored; send the items as input",
    "conversation": "nothing is stored; send the items as input",
    "store": "nothing is stored",
    "background": "nothing is stored",
    "lora_path": "a server has one model",
}
_ABSENT = (
    *("priority", "spaces_between_special_tokens", "logits_processors", "custom_logit_processor"),
    *("structural_tag", "kv_transfer_params", "vllm_xargs", "mm_processor_kwargs", "truncate_prompt_tokens"),
    *("truncate", "return_tokens_as_token_ids", "return_token_ids", "continue_final_message"),
    *("include_reasoning", "separate_reasoning", "thinking", "thinking_token_budget", "prompt_embeds"),
    *("guided_whitespace_pattern", "structured_outputs.whitespace_pattern"),
    *("structured_outputs.structural_tag", "stream_options.continuous_usage_stats", "detokenize"),
    *("no_repeat_ngram_size", "repeat_last_n", "mirostat", "mirostat_tau", "mirostat_eta", "tfs_z", "top_a"),
    *("dry_multiplier", "xtc_probability", "xtc_threshold", "dynatemp_range", "watermark", "keep_alive"),
    *("num_ctx", "options", "normalize", "documents", "text.verbosity"),
)


def told(name: str, fields: Collection[str], elsewhere: Mapping[str, Collection[str]], *, known: bool = False) -> str:
    """What to say of a field that a body does not have.

    Args:
        name: of the field, with dots.
        fields: that the body has.
        elsewhere: names of other routes, and the fields of their bodies.
        known: it is one of OpenAI's.
    """
    for ours in _OURS.get(name, ()):
        if _first(ours) in fields and _first(ours) != name:
            return f"not supported; write {ours}"
    others = [route for route, own in elsewhere.items() if name in own]
    if others:
        return f"not supported on this route; {' and '.join(others[:2])} have it"
    if name in _WHY:
        return f"not supported: {_WHY[name]}"
    if known or name in _OURS or name in _ABSENT:
        return "not supported"
    near = difflib.get_close_matches(name[:64], fields, 1, 0.8) if "." not in name else []
    return "this server knows no such field" + (f"; is {near[0]} meant?" if near else "")


def _first(text: str) -> str:
    found = re.match(r"\w+", text)
    return found[0] if found else ""
