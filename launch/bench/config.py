"""What ``bench serve`` is asked for."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from parallel.config import option

__all__ = ["BenchConfig", "Objective", "Shape", "span"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """What the requests are like."""

    input: str = option("64:256", "tokens of a prompt: a number, or LOW:HIGH")
    output: str = option("32:128", "tokens to generate: a number, or LOW:HIGH")
    lengths: Literal["uniform", "lognormal"] = option("uniform", "how lengths are spread over LOW:HIGH")
    prefixes: int = option(0, "prompts begin with one of so many shared prefixes")
    prefix_tokens: int = option(128, "tokens of each of these, on top of the input")
    file: str = option("", 'prompts instead: JSON lines with "prompt" (text or ids) or "messages", and "output"')
    tokens: Literal["auto", "ids", "texts"] = option("auto", "what prompts are; auto: ids if the vocabulary is known")
    vocabulary: int | None = option(None, "of the model, for prompts of ids; none: as the model's folder says")

    def problems(self) -> Iterator[str]:
        """Why there can be no such requests."""
        for name in ("input", "output"):
            if span(getattr(self, name)) is None:
                yield f"{name} = {getattr(self, name)!r}: must be a number from 1, or LOW:HIGH with LOW <= HIGH"
        if self.prefixes < 0:
            yield f"prefixes = {self.prefixes}: must not be negative"
        if self.prefix_tokens < 1:
            yield f"prefix_tokens = {self.prefix_tokens}: must be at least 1"
        if self.vocabulary is not None and self.vocabulary < 2:
            yield f"vocabulary = {self.vocabulary}: must be at least 2"
        if self.file and self.prefixes:
            yield "prefixes: the prompts of a file are sent as they are"
        if self.file and not Path(self.file).is_file():
            yield f"file = {self.file!r}: no such file"


@dataclass(frozen=True, slots=True, kw_only=True)
class Objective:
    """What a good answer is; none of them: every whole answer is good."""

    ttft_ms: float | None = option(None, "longest time to the first token")
    tpot_ms: float | None = option(None, "longest mean time per further token")
    e2e_ms: float | None = option(None, "longest time to the last token")

    def problems(self) -> Iterator[str]:
        """Objectives that nothing could meet."""
        for name in ("ttft_ms", "tpot_ms", "e2e_ms"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                yield f"{name} = {value:g}: must be more than 0"


@dataclass(frozen=True, slots=True, kw_only=True)
class BenchConfig:
    """Loads, requests, and what to write."""

    rates: tuple[float, ...] = option((), "open loop: requests that arrive a second; several: one load after another")
    concurrencies: tuple[int, ...] = option((), "closed loop: requests at a time (neither this nor rates: 8)")
    arrivals: Literal["poisson", "gamma", "constant", "at_once"] = option(
        "poisson", "open loop: gaps between arrivals; at_once: all at the beginning, without a rate"
    )
    burstiness: float = option(1.0, "shape of gamma: 1 is Poisson, below it comes in bursts, above it is more even")
    most_in_flight: int | None = option(None, "open loop: requests at a time; who waits here is late, and it counts")
    requests: int = option(100, "of each load")
    seconds: float | None = option(None, "a load ends after so long, if it has not by then; what is under way finishes")
    warmup: int = option(4, "requests before all, which do not count")
    pause_s: float = option(0.0, "between loads")
    timeout_s: float = option(600.0, "longest wait for an answer")
    seed: int = option(0, "of lengths, prompts and arrivals")
    endpoint: Literal["completions", "chat"] = option("completions", "of OpenAI's interface")
    model: str = option("", "name of the model (none: the first that the server has)")
    temperature: float = option(0.0, "of the answers")
    ignore_eos: Literal["auto", "true", "false"] = option(
        "auto", "generate as many tokens as asked for; no standard field: auto sends it to servers that know it"
    )
    key_file: str = option("", "a file with an API key in it")
    shape: Shape = option(Shape(), "requests")
    objective: Objective = option(Objective(), "what a good answer is")
    details: bool = option(False, "each request by itself in the JSON as well")
    out: str = option("", "file: x.json, all numbers")
    png: str = option("", "file: x.png, latency against load")

    def problems(self) -> Iterator[str]:
        """Why this cannot be measured."""
        if self.rates and self.concurrencies:
            yield "rates, concurrencies: an open loop has rates, a closed loop concurrencies; give one of them"
        if self.arrivals == "at_once" and (self.rates or self.concurrencies):
            yield "arrivals = at_once: has neither rates nor concurrencies"
        if self.arrivals in ("gamma", "constant") and not self.rates:
            yield f"arrivals = {self.arrivals}: needs rates"
        if not all(rate > 0 for rate in self.rates):
            yield f"rates = {','.join(f'{rate:g}' for rate in self.rates)}: each must be more than 0"
        if not all(many > 0 for many in self.concurrencies):
            yield f"concurrencies = {','.join(map(str, self.concurrencies))}: each must be at least 1"
        if self.most_in_flight is not None and (not self.open or self.most_in_flight < 1):
            yield f"most_in_flight = {self.most_in_flight}: of an open loop, and at least 1"
        if self.burstiness != 1.0 and self.arrivals != "gamma":
            yield f"burstiness = {self.burstiness:g}: only arrivals = gamma have one"
        for name, least in (("requests", 1), ("warmup", 0), ("seed", 0)):
            if getattr(self, name) < least:
                yield f"{name} = {getattr(self, name)}: must be at least {least}"
        for name in ("burstiness", "timeout_s", "seconds"):
            value = getattr(self, name)
            if value is not None and not (value > 0 and math.isfinite(value)):
                yield f"{name} = {value:g}: must be more than 0"
        for name in ("pause_s", "temperature"):
            if getattr(self, name) < 0:
                yield f"{name} = {getattr(self, name):g}: must not be negative"
        if self.endpoint == "chat" and self.shape.tokens == "ids":
            yield "shape.tokens = ids: conversations are texts"
        yield from self._file_problems()

    def _file_problems(self) -> Iterator[str]:
        for name, kind in (("out", ".json"), ("png", ".png")):
            path = Path(getattr(self, name))
            if getattr(self, name) and path.suffix != kind:
                yield f"{name} = {str(path)!r}: must end in {kind}"
            elif getattr(self, name) and not path.parent.is_dir():
                yield f"{name} = {str(path)!r}: there is no folder {str(path.parent)!r}"
        if self.png and importlib.util.find_spec("matplotlib") is None:
            yield "png: needs matplotlib (pip install matplotlib)"
        if self.key_file and not Path(self.key_file).is_file():
            yield f"key_file = {self.key_file!r}: no such file"

    @property
    def open(self) -> bool:
        """Whether requests arrive by a schedule, however many are under way."""
        return bool(self.rates) or self.arrivals == "at_once"

    @property
    def loads(self) -> tuple[float, ...]:
        """Rates, concurrencies, or the one load of all at once (infinite)."""
        if self.arrivals == "at_once":
            return (math.inf,)
        return self.rates or self.concurrencies or (8,)


def span(text: str) -> tuple[int, int] | None:
    """LOW and HIGH of a range of lengths; None: it is none."""
    low, colon, high = text.partition(":")
    if not low.isdecimal() or (colon and not high.isdecimal()):
        return None
    ends = int(low), int(high or low)
    return ends if 1 <= ends[0] <= ends[1] else None
