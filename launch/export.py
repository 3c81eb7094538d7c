"""``export RUN MODEL_DIR``: a run's latest checkpoint as a Hugging Face folder."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from launch.cli import command_line, help_text, positionals
from launch.recipe import PRECISIONS, Recipe
from parallel.config import option, options, read_toml, resolve
from parallel.errors import CheckpointError, refuse
from parallel.hf import write_folder
from parallel.tokenizer import end_of_text, load_tokenizer
from zero.checkpoint import Checkpoint, latest

__all__ = ["main"]

USAGE = "lockstep export RUN MODEL_DIR [--OPTION VALUE ...]"


@dataclass(frozen=True, slots=True, kw_only=True)
class ExportConfig:
    """How to write the folder."""

    precision: Literal["master", "fp32", "bf16", "fp64"] = option("master", "of the weights; master: as trained")
    overwrite: bool = option(False, "replace a folder that is there")


def main(arguments: Sequence[str]) -> int:
    """Run the command; see :data:`launch.cli.USAGE`."""
    given, overrides, problems = command_line(arguments, ExportConfig())
    if "help" in overrides:
        print(help_text(USAGE, options(ExportConfig())))
        return 0
    run, target = positionals(["RUN", "MODEL_DIR"], given, problems)
    if run and not (Path(run) / "config.toml").is_file():
        problems.append(f"{run}: not a run folder (no config.toml)")
    config = resolve(ExportConfig(), overrides, extra=problems)
    recipe = resolve(Recipe(), read_toml(Path(run) / "config.toml"))
    found = latest(Path(run) / "checkpoints")
    if found is None:
        raise CheckpointError(f"{run}: has no checkpoint yet")
    checkpoint = Checkpoint.open(found)
    refuse(CheckpointError, checkpoint.problems())
    tokenizer = Path(run) / "tokenizer"
    end = end_of_text(load_tokenizer(tokenizer), tokenizer)
    trained = torch.float64 if recipe.precision == "fp64" else torch.float32
    write_folder(
        recipe.model.resolved(),
        checkpoint.whole,
        Path(target),
        dtype=trained if config.precision == "master" else PRECISIONS[config.precision],
        tokenizer=tokenizer,
        bos=end,
        eos=end,
        overwrite=config.overwrite,
    )
    print(f"{target}: step {checkpoint.step} of {run}")
    return 0
