"""``reshard RUN NEW_RUN --layout...``: a run's latest checkpoint as the ranks of another layout write it."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Sequence
from pathlib import Path

from launch.cli import command_line, help_text, in_groups, positionals
from launch.compare import opened
from launch.ranks import check_world, first_alone, on_ranks
from launch.recipe import NOT_YET, Recipe
from launch.train import FREE, model_of
from parallel.config import options, read_toml, resolve, to_table, to_toml
from parallel.errors import RunFolderError, refuse
from parallel.mesh import Mesh
from zero import checkpoint
from zero.optimizer import ZeroOptimizer
from zero.run import RunFolder

__all__ = ["main"]

USAGE = "lockstep reshard RUN NEW_RUN [--layout.tp 1 --layout.dp 4 --zero.stage 3 ...]"
_REFUSED = {"out": "the new run is the second folder: lockstep reshard RUN NEW_RUN"}


def main(arguments: Sequence[str]) -> int:
    """Run the command; see :data:`launch.cli.USAGE`."""
    given, overrides, problems = command_line(arguments, Recipe(), _REFUSED)
    if "help" in overrides:
        print(
            help_text(USAGE, [leaf for leaf in options(Recipe()) if in_groups(leaf.name, FREE)], (*NOT_YET, *_REFUSED))
        )
        return 0
    source, target = map(Path, positionals(["RUN", "NEW_RUN"], given, problems))
    if not (source / "config.toml").is_file():
        raise RunFolderError([*problems, f"{source}: not a run folder (no config.toml)"])
    overrides["out"] = str(target)
    recipe = resolve(Recipe(), read_toml(source / "config.toml"), overrides, extra=problems)
    RunFolder(source).check(to_table(recipe), FREE)
    if check_world(recipe.layout, recipe.device) is None:
        _check(source, target)
    return on_ranks(
        ["reshard", *arguments], recipe.layout, recipe.device, lambda mesh: _reshard(recipe, source, target, mesh)
    )


def _check(source: Path, target: Path) -> None:
    """Refuse before anything is written."""
    opened(source)
    taken = target.exists() and (not target.is_dir() or any(target.iterdir()))
    refuse(RunFolderError, [f"{target}: exists and is not empty"] if taken else [])


def _reshard(recipe: Recipe, source: Path, target: Path, mesh: Mesh) -> int:
    folder = RunFolder(target)

    def begin() -> None:
        _check(source, target)
        folder.hold()
        folder.write_config(to_toml(recipe))
        for name, copy in (("tokenizer", shutil.copytree), ("metrics.jsonl", shutil.copyfile)):
            if (source / name).exists():
                copy(source / name, target / name)

    first_alone(mesh, begin)
    try:
        model = model_of(dataclasses.replace(recipe, init=""), mesh)
        optimizer = ZeroOptimizer(model, mesh, recipe.optimizer, zero=recipe.zero)
        read = checkpoint.load(opened(source).folder, mesh, optimizer)
        saver = checkpoint.Saver(folder.checkpoints, mesh, optimizer, keep=recipe.trainer.keep, about=to_table(recipe))
        saver.save(step=read.step, tokens=read.tokens, past=read.manifest.past)
        saver.close()
    finally:
        folder.release()
    if mesh.rank == 0:
        print(f"{target}: step {read.step} of {source}")
    return 0
