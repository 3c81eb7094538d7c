"""``generate MODEL_DIR --prompt TEXT``: continue prompts."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from infer import LLM, SamplingParams
from infer.request import prompt_problems
from launch.cli import help_text, positionals
from launch.ranks import on_ranks
from launch.recipe import PRECISIONS, Precision, layout_refusals
from parallel.config import option, options, parse_flags, resolve
from parallel.errors import ConfigError, DataError, ModelFolderError, refuse
from parallel.hf import check_folder, read_config
from parallel.mesh import Layout, Mesh
from parallel.tokenizer import load_tokenizer

__all__ = ["main"]

USAGE = "lockstep generate MODEL_DIR --prompt TEXT [--OPTION VALUE ...]"


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerateConfig:
    """What to continue, and how."""

    prompt: str = option("", "the text to continue")
    prompts: str = option("", "a file with one prompt a line, instead")
    max_tokens: int = option(128, "most tokens to generate for each prompt")
    ignore_eos: bool = option(False, "go on after the end-of-text token")
    json: bool = option(False, "one JSON object a prompt instead of text")
    precision: Precision = option("fp32", "of weights and activations")
    device: Literal["auto", "cpu", "cuda"] = option("auto", "where to compute")
    layout: Layout = option(Layout(sequence_parallel=False), "degrees of parallelism; tp only")

    def problems(self) -> Iterator[str]:
        """Why these options do not go together."""
        if bool(self.prompt) == bool(self.prompts):
            yield "give --prompt TEXT or --prompts FILE" + (", not both" if self.prompt else "")
        yield from layout_refusals(self.layout, "pp", "cp", "ep", "etp")
        if self.layout.dp > 1:
            yield f"layout.dp = {self.layout.dp}: generate uses one replica; the nearest layout that works has dp = 1"
        yield from self.sampling.problems()

    @property
    def sampling(self) -> SamplingParams:
        """The part that concerns each request."""
        return SamplingParams(max_tokens=self.max_tokens, ignore_eos=self.ignore_eos)


def main(arguments: Sequence[str]) -> int:
    """Run the command; see :data:`launch.cli.USAGE`."""
    given, overrides, problems = parse_flags(arguments)
    if "help" in overrides:
        print(help_text(USAGE, options(GenerateConfig())))
        return 0
    (folder,) = positionals(["MODEL_DIR"], given, problems)
    config = resolve(GenerateConfig(), overrides, extra=problems)
    config = dataclasses.replace(config, layout=dataclasses.replace(config.layout, sequence_parallel=False))
    prompts = _prompts(config)
    refuse(ModelFolderError, check_folder(Path(folder)))
    model = read_config(Path(folder))
    refuse(ConfigError, model.layout_problems(config.layout.tp))
    tokenizer = load_tokenizer(folder)
    longest = model.max_positions if model.positions == "learned" else None
    encoded = [tokenizer.encode(prompt).ids for prompt in prompts]
    refuse(DataError, prompt_problems(encoded, config.sampling, vocabulary=model.vocabulary, longest=longest))
    return on_ranks(
        ["generate", *arguments], config.layout, config.device, lambda mesh: _generate(config, folder, prompts, mesh)
    )


def _prompts(config: GenerateConfig) -> list[str]:
    if config.prompt:
        return [config.prompt]
    try:
        lines = Path(config.prompts).read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{config.prompts}: {error}") from None
    refuse(DataError, [] if any(lines) else [f"{config.prompts}: no prompt in it"])
    return [line for line in lines if line]


def _generate(config: GenerateConfig, folder: str, prompts: list[str], mesh: Mesh) -> int:
    llm = LLM(folder, mesh=mesh, dtype=PRECISIONS[config.precision])
    completions = llm.generate(prompts, config.sampling)
    if mesh.rank == 0:
        for prompt, completion in zip(prompts, completions, strict=True):
            if config.json:
                values = {"prompt": prompt, "text": completion.text, "tokens": list(completion.tokens)}
                print(json.dumps({**values, "finish_reason": completion.finish_reason}))
            else:
                print(prompt + completion.text)
        sys.stdout.flush()
    return 0
