"""What is sent, and when: functions of the seed."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from launch.bench.config import BenchConfig, Shape, span
from parallel.errors import ConfigError, refuse

__all__ = ["Ask", "arrivals", "asks", "draw_lengths", "longest", "read_file"]

_WARMUP = 1 << 30
_TEXT = """
the of and to in is that it was for on are with as be at one have this from by hot but some what there we can
out other were all your when up use word how said an each she which do their time if will way about many then
them would write like so these her long make thing see him two has look more day could go come did my sound no
most number who over know water than call first people may down side been now find any new work part take get
place
"""
_WORDS = _TEXT.split()


@dataclass(frozen=True, slots=True)
class Ask:
    """One request: what it continues (ids, a text, or messages), and by how many tokens."""

    prompt: Any
    output: int


def arrivals(config: BenchConfig, rate: float, load: int) -> list[float]:
    """When requests arrive, in seconds from the beginning of a load; the first one at 0 or after one gap.

    Gaps of ``gamma`` have the mean 1 / rate and the variance 1 / (burstiness rate^2), as in vLLM's benchmark;
    ``poisson`` is gamma with a burstiness of 1.
    """
    if math.isinf(rate):
        return [0.0] * config.requests
    if config.arrivals == "constant":
        return [index / rate for index in range(config.requests)]
    shape = config.burstiness if config.arrivals == "gamma" else 1.0
    draw = np.random.default_rng([config.seed, 1, load])
    return np.cumsum(draw.gamma(shape, 1 / (rate * shape), config.requests)).tolist()


def draw_lengths(draw: np.random.Generator, text: str, kind: str, count: int) -> list[int]:
    """Lengths within LOW:HIGH; lognormal: the median is their geometric mean, and the ends are two deviations away."""
    ends = span(text)
    assert ends is not None
    low, high = ends
    if kind == "uniform" or low == high:
        return draw.integers(low, high + 1, count).tolist()
    middle, deviation = (math.log(low) + math.log(high)) / 2, (math.log(high) - math.log(low)) / 4
    return np.clip(np.rint(draw.lognormal(middle, deviation, count)), low, high).astype(int).tolist()


def asks(config: BenchConfig, load: int | None, vocabulary: Sequence[int] | None) -> list[Ask]:
    """The requests of a load; no two loads have a prompt, or a prefix, in common.

    Args:
        config: as given.
        load: its place in the sweep; None: those before all.
        vocabulary: token ids to draw from; None: prompts are texts, and lengths count words.

    Raises:
        ConfigError: the file of prompts cannot be read.
    """
    shape, count = config.shape, config.warmup if load is None else config.requests
    draw = np.random.default_rng([config.seed, 2, _WARMUP if load is None else load])
    outputs = draw_lengths(draw, shape.output, shape.lengths, count)
    if shape.file:
        given = read_file(Path(shape.file))
        found = [given[index % len(given)] for index in range(count)]
        return [Ask(ask.prompt, ask.output or output) for ask, output in zip(found, outputs, strict=True)]
    inputs = draw_lengths(draw, shape.input, shape.lengths, count)
    source = np.arange(len(_WORDS)) if vocabulary is None else np.asarray(vocabulary)
    prefixes = draw.choice(source, (shape.prefixes, shape.prefix_tokens))
    made = []
    for size, output in zip(inputs, outputs, strict=True):
        pieces = [draw.choice(source, size)]
        if shape.prefixes:
            pieces.insert(0, prefixes[draw.integers(shape.prefixes)])
        ids: list[int] = np.concatenate(pieces).tolist()
        made.append(Ask(ids if vocabulary is not None else " ".join(_WORDS[place] for place in ids), output))
    return [_conversation(ask) for ask in made] if config.endpoint == "chat" else made


def longest(shape: Shape) -> int:
    """Most tokens of a request that is drawn, its answer included."""
    ends = [span(shape.input) or (0, 0), span(shape.output) or (0, 0)]
    return sum(high for _, high in ends) + (shape.prefix_tokens if shape.prefixes else 0)


def read_file(path: Path) -> list[Ask]:
    """Prompts from JSON lines; an output of 0: not said.

    Raises:
        ConfigError: with every line that is none.
    """
    found, problems = [], []
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: {getattr(error, 'strerror', None) or 'is not UTF-8'}") from None
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            found.append(_ask(json.loads(line)))
        except ValueError as error:
            problems.append(f"{path}, line {number}: {error}")
    refuse(ConfigError, problems[:20] or ([] if found else [f"{path}: no prompt in it"]))
    return found


def _ask(value: Any) -> Ask:
    if not isinstance(value, dict) or ("prompt" in value) == ("messages" in value):
        raise ValueError('must be an object with "prompt" or "messages"')
    output = value.get("output", 0)
    if not isinstance(output, int) or isinstance(output, bool) or output < 0:
        raise ValueError('"output" must be a number of tokens')
    if "messages" in value:
        if not isinstance(value["messages"], list) or not value["messages"]:
            raise ValueError('"messages" must be a list')
        return Ask({"messages": value["messages"]}, output)
    prompt = value["prompt"]
    ids = isinstance(prompt, list) and all(isinstance(item, int) and not isinstance(item, bool) for item in prompt)
    if not prompt or not (isinstance(prompt, str) or ids):
        raise ValueError('"prompt" must be a text or token ids')
    return Ask(prompt, output)


def _conversation(ask: Ask) -> Ask:
    return Ask({"messages": [{"role": "user", "content": ask.prompt}]}, ask.output)
