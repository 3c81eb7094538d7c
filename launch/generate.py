"""``generate MODEL_DIR --prompt TEXT``: continue prompts."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from infer import LLM, Completion, EngineConfig, Event, SamplingParams
from infer.limits import Limits
from launch.cli import command_line, help_text, missing_folder, positionals
from launch.ranks import on_ranks
from launch.recipe import NOT_YET, PRECISIONS, Precision, layout_refusals
from parallel.config import option, options, resolve
from parallel.errors import ConfigError, DataError, ModelFolderError, refuse
from parallel.hf import check_folder, read_config
from parallel.mesh import Layout, Mesh
from parallel.pp import partition
from parallel.tokenizer import load_tokenizer

__all__ = ["main"]

USAGE = "lockstep generate MODEL_DIR --prompt TEXT [--OPTION VALUE ...]"
_SAMPLING = (
    *("max_tokens", "min_tokens", "temperature", "top_k", "top_p", "min_p", "typical_p", "repetition_penalty"),
    *("presence_penalty", "frequency_penalty", "seed", "n", "beams", "length_penalty", "stop", "ignore_eos"),
)

_REFUSED = {
    "model": "the folder comes first, without an option: lockstep generate MODEL_DIR",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerateConfig:
    """What to continue, and how."""

    prompt: str = option("", "the text to continue")
    prompts: str = option("", "a file with one prompt a line, instead")
    max_tokens: int = option(128, "most tokens to generate for each prompt")
    min_tokens: int = option(0, "tokens to generate before the text may end")
    temperature: float = option(0.0, "logits are divided by it; 0: the likeliest token, always")
    top_k: int = option(0, "only the k likeliest tokens; 0: all")
    top_p: float = option(1.0, "only the fewest likeliest tokens whose probabilities add up to at least this")
    min_p: float = option(0.0, "only tokens that are at least this many times as probable as the likeliest")
    typical_p: float = option(1.0, "only tokens whose surprise is nearest to the entropy, that add up to this")
    repetition_penalty: float = option(1.0, "of tokens that are in the prompt or were generated")
    presence_penalty: float = option(0.0, "subtracted once from tokens that were generated before")
    frequency_penalty: float = option(0.0, "subtracted from a token as often as it was generated before")
    seed: int = option(-1, "the same seed gives the same text at every layout; -1: one is drawn")
    n: int = option(1, "texts for each prompt")
    beams: int = option(1, "beams of a beam search; 1: none")
    length_penalty: float = option(1.0, "beam search: above 0 favours long texts")
    stop: tuple[str, ...] = option((), "texts that end the request, separated by commas")
    ignore_eos: bool = option(False, "go on after the end-of-text token")
    json: bool = option(False, "one JSON object a prompt instead of text")
    precision: Precision = option("fp32", "of weights and activations")
    device: Literal["auto", "cpu", "cuda"] = option("auto", "where to compute")
    layout: Layout = option(Layout(sequence_parallel=False), "degrees of parallelism: tp, pp, dp")
    engine: EngineConfig = option(EngineConfig(), "memory, scheduling")

    def problems(self) -> Iterator[str]:
        """Why these options do not go together."""
        if bool(self.prompt) == bool(self.prompts):
            yield "give --prompt TEXT or --prompts FILE" + (", not both" if self.prompt else "")
        yield from layout_refusals(self.layout)
        yield from self.sampling.problems()

    @property
    def sampling(self) -> SamplingParams:
        """The part that concerns each request."""
        values = {name: getattr(self, name) for name in _SAMPLING}
        return SamplingParams(**{**values, "seed": None if self.seed == -1 else self.seed})


def main(arguments: Sequence[str]) -> int:
    """Run the command; see :data:`launch.cli.USAGE`."""
    given, overrides, problems = command_line(arguments, GenerateConfig(), _REFUSED)
    if "help" in overrides:
        print(help_text(USAGE, options(GenerateConfig()), (*_REFUSED, *NOT_YET)))
        return 0
    (folder,) = positionals(["MODEL_DIR"], given, problems)
    problems += missing_folder(folder)
    config = resolve(GenerateConfig(), overrides, extra=problems)
    prompts = _prompts(config)
    refuse(ModelFolderError, check_folder(Path(folder)))
    model = read_config(Path(folder)).resolved()
    refuse(ConfigError, model.layout_problems(config.layout.tp))
    partition(model.layers, config.layout.pp)
    tokenizer = load_tokenizer(folder)
    limits = Limits.of(Path(folder), model, context=config.engine.context, text=True)
    problems = [limits.problems(tokenizer.encode(prompt).ids, config.sampling) for prompt in prompts]
    if all(problems):  # others are refused alone
        refuse(DataError, [f"prompt {place}: {one}" for place, found in enumerate(problems) for one in found])
    return on_ranks(
        ["generate", *arguments], config.layout, config.device, lambda mesh: _generate(config, folder, prompts, mesh)
    )


def _prompts(config: GenerateConfig) -> list[str]:
    if config.prompt:
        return [config.prompt]
    try:
        lines = Path(config.prompts).read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{config.prompts}: {getattr(error, 'strerror', None) or error}") from None
    refuse(DataError, [] if any(lines) else [f"{config.prompts}: no prompt in it"])
    return [line for line in lines if line]


def _generate(config: GenerateConfig, folder: str, prompts: list[str], mesh: Mesh) -> int:
    local = config.layout.world if mesh.device.type == "cpu" else 1
    llm = LLM(folder, mesh=mesh, dtype=PRECISIONS[config.precision], config=config.engine, ranks=local)
    first = mesh.rank == 0
    progress = _Progress(len(prompts), mesh.dp.size) if first else None
    if first and len(prompts) > 1:
        print("\n".join(llm.notes), file=sys.stderr)
    completions = llm.generate(prompts, config.sampling, watch=progress)
    llm.engine.close()
    if progress is not None:
        progress.finish(completions)
        for prompt, completion in zip(prompts, completions, strict=True):
            _print(config, prompt, completion)
        sys.stdout.flush()
    return int(any(completion.error for completion in completions))


def _print(config: GenerateConfig, prompt: str, completion: Completion) -> None:
    if completion.error:
        print(f"{prompt!r}: {completion.error}", file=sys.stderr)
    for choice in completion.choices:
        if config.json:
            values = {"prompt": prompt, "index": choice.index, "text": choice.text, "tokens": list(choice.tokens)}
            error = {"error": completion.error} if completion.error else {}
            print(json.dumps({**values, "finish_reason": choice.finish_reason, **error}))
        elif choice.tokens or not completion.error:
            print(prompt + choice.text)


class _Progress:
    """A line on a terminal while texts are generated, and the throughput at the end."""

    def __init__(self, prompts: int, replicas: int) -> None:
        self._prompts, self._replicas = prompts, replicas
        self._done = self._tokens = 0
        self._began = self._told = time.monotonic()

    def __call__(self, event: Event) -> None:
        self._tokens += len(event.tokens)
        self._done += event.completion is not None
        now = time.monotonic()
        if sys.stderr.isatty() and now - self._told > 0.2:
            self._told = now
            rate = self._tokens / (now - self._began)
            share = "" if self._replicas == 1 else f" on the first of {self._replicas} replicas"
            line = f"{self._done} of {-(-self._prompts // self._replicas)} prompts, {rate:,.0f} tokens/s{share}"
            print(f"\r{line}\033[K", end="", file=sys.stderr, flush=True)

    def finish(self, completions: Sequence[Completion]) -> None:
        """The last word."""
        seconds = time.monotonic() - self._began
        tokens = sum(len(choice.tokens) for completion in completions for choice in completion.choices)
        if sys.stderr.isatty():
            print("\r\033[K", end="", file=sys.stderr)
        if self._prompts > 1:
            said = f"{self._prompts} prompts, {tokens:,} tokens in {seconds:.1f} s: {tokens / seconds:,.0f} tokens/s"
            print(said, file=sys.stderr, flush=True)
