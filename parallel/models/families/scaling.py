"""Rotary positions in config.json: ``rope_theta`` and ``rope_scaling`` (release 4), ``rope_parameters`` (release 5)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from parallel.models.config import DecoderConfig, RopeConfig
from parallel.models.families.keys import Keys

__all__ = ["read_rope", "write_rope"]

_KINDS = ("default", "linear", "dynamic", "llama3", "yarn")
_KNOWN = {
    "type",
    "rope_type",
    "rope_theta",
    "partial_rotary_factor",
    "factor",
    "original_max_position_embeddings",
    "low_freq_factor",
    "high_freq_factor",
    "beta_fast",
    "beta_slow",
    "attention_factor",
    "mscale",
    "mscale_all_dim",
    "truncate",
    "finetuned",
}


def read_rope(keys: Keys, max_positions: int) -> RopeConfig:
    """The rotary positions that a config.json asks for; problems are left with ``keys``."""
    table = _table(keys)
    rope = Keys(table, where="rope_parameters: " if keys.config.get("rope_parameters") else "rope_scaling: ")
    for key in sorted(set(table) - _KNOWN):
        rope.add(f"{key} is not supported")
    rope.neutral("partial_rotary_factor", None, 1)
    theta = rope.number("rope_theta", keys.number("rope_theta", 10000.0, above=0), above=0)
    kind = rope.choice("rope_type" if "rope_type" in table else "type", _KINDS, "default")
    read = RopeConfig(theta=theta, original=max_positions)
    if kind != "default":
        read = _read_scaling(keys, rope, kind, theta, max_positions)
    keys.problems += rope.problems
    return read


def _table(keys: Keys) -> Mapping[str, Any]:
    """The one table of parameters; like transformers, ``rope_scaling`` counts first, but it may not contradict."""
    tables = []
    for key in ("rope_scaling", "rope_parameters"):
        table = keys.config.get(key)
        if table is not None and not isinstance(table, Mapping):
            keys.add(f"{key} = {table!r}: must be an object")
        elif table:
            tables.append(dict(table))
    if len(tables) == 2:
        both = set(tables[0]) & set(tables[1])
        if different := sorted(key for key in both if tables[0][key] != tables[1][key]):
            keys.add(f"rope_scaling and rope_parameters contradict each other in {', '.join(different)}")
        return tables[1] | tables[0]
    return tables[0] if tables else {}


def _read_scaling(keys: Keys, rope: Keys, kind: Any, theta: float, max_positions: int) -> RopeConfig:
    original = max_positions
    if kind in ("llama3", "yarn"):
        original = rope.integer("original_max_position_embeddings", max_positions)
        original = keys.integer("original_max_position_embeddings", original)
    factor = rope.number("factor", original and max_positions / original if kind == "yarn" else None, above=0)
    if factor is None:
        rope.add("factor is missing")
        factor = 1.0
    if kind == "llama3":
        low, high = rope.number("low_freq_factor", above=0), rope.number("high_freq_factor", above=0)
        if low >= high and not rope.problems:
            rope.add(f"high_freq_factor = {high:g} must be above low_freq_factor = {low:g}")
        return RopeConfig(
            theta=theta, scaling=kind, factor=factor, original=original, low_frequency=low, high_frequency=high
        )
    if kind == "yarn":
        return RopeConfig(
            theta=theta,
            scaling=kind,
            factor=factor,
            original=original,
            beta_fast=rope.number("beta_fast", 32.0, above=0),
            beta_slow=rope.number("beta_slow", 1.0, above=0),
            attention=_attention(rope, factor),
            truncate=rope.flag("truncate", True),
        )
    return RopeConfig(theta=theta, scaling=kind, factor=factor, original=original)


def _attention(rope: Keys, factor: float) -> float:
    """The factor of cos and sin that YaRN's keys ask for; 0 for the default."""
    if (given := rope.number("attention_factor", None, above=0)) is not None:
        return given
    top, bottom = rope.number("mscale", None), rope.number("mscale_all_dim", None)
    if not (top and bottom):
        return 0.0
    log = 0.1 * math.log(factor) if factor > 1 else 0.0
    return (log * top + 1.0) / (log * bottom + 1.0)


def write_rope(config: DecoderConfig) -> dict[str, Any]:
    """The keys of both releases for a resolved configuration."""
    rope = config.rope
    table: dict[str, Any] = {"rope_type": rope.scaling}
    if rope.scaling != "default":
        table["factor"] = rope.factor
    if rope.scaling in ("llama3", "yarn"):
        table["original_max_position_embeddings"] = rope.original
    if rope.scaling == "llama3":
        table |= {"low_freq_factor": rope.low_frequency, "high_freq_factor": rope.high_frequency}
    if rope.scaling == "yarn":
        table |= {"beta_fast": rope.beta_fast, "beta_slow": rope.beta_slow, "truncate": rope.truncate}
        if rope.attention:
            table["attention_factor"] = rope.attention
    scaling = None if rope.scaling == "default" else table
    return {
        "rope_theta": rope.theta,
        "rope_scaling": scaling,
        "rope_parameters": table | {"rope_theta": rope.theta},
    }
