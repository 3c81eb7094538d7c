"""``train RECIPE``: real text in, a trained model's checkpoints out."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from launch.cli import help_text, positionals
from launch.ranks import first_of_all, on_ranks, stop_signals
from launch.recipe import Recipe, load_recipe, recipes
from parallel import comm
from parallel.config import options, parse_flags, to_table, to_toml
from parallel.errors import ConfigError, refuse
from parallel.hf import load_model, read_config
from parallel.mesh import Mesh
from parallel.models.build import Build
from parallel.models.config import DecoderConfig
from parallel.models.decoder import Decoder, build_model
from zero.data import Prepared, prepare
from zero.loader import Loader, validation_batches
from zero.metrics import Metrics
from zero.optimizer import ZeroOptimizer
from zero.run import RunFolder
from zero.trainer import Trainer

__all__ = ["main"]

USAGE = "lockstep train RECIPE [--OPTION VALUE ...]"

FREE = ("out", "layout", "steps", "device", "recompute", "batch.microbatches", "trainer", "optimizer.bucket_mb")
"""Options that may change when a run is continued."""

VALIDATION_WINDOWS = 64


def main(arguments: Sequence[str]) -> int:
    """Run the command; see :data:`launch.cli.USAGE`."""
    given, overrides, problems = parse_flags(arguments)
    if "help" in overrides:
        print(help_text(f"{USAGE}\nrecipes: {', '.join(recipes())}", options(Recipe())))
        return 0
    (name,) = positionals(["RECIPE"], given, problems)
    recipe = load_recipe(name, overrides, problems)
    if first_of_all():
        _check_before_ranks(recipe)
    return on_ranks(
        ["train", *arguments], recipe.layout, recipe.device, lambda mesh: _train(recipe, mesh), grace_s=120.0
    )


def _check_before_ranks(recipe: Recipe) -> None:
    """Everything that can be refused, and the packed data, before any rank starts."""
    if recipe.init:
        model = read_config(Path(recipe.init))
        refuse(ConfigError, [*model.problems(), *model.layout_problems(recipe.layout.tp)])
    folder = RunFolder(Path(recipe.out))
    folder.hold()
    try:
        folder.adopt(to_toml(recipe), to_table(recipe), FREE)
        prepared = prepare(recipe.data, recipe.data_folder, _announce)
        Loader(prepared.open("train"), sequence=recipe.batch.sequence, sequences=1)
        _model_config(recipe, prepared)
    finally:
        folder.release()


def _announce(what: str, share: float) -> None:
    end = "\r" if sys.stderr.isatty() and share < 1 else "\n"
    if sys.stderr.isatty() or share in (0.0, 1.0):
        print(f"{what}: {share:.0%}", end=end, file=sys.stderr, flush=True)


def _model_config(recipe: Recipe, prepared: Prepared) -> DecoderConfig:
    """The model with the tokenizer's vocabulary.

    Raises:
        ConfigError: the tokenizer has more tokens than the model.
    """
    config = read_config(Path(recipe.init)) if recipe.init else recipe.model
    if not config.vocabulary:
        config = dataclasses.replace(config, vocabulary=prepared.vocabulary)
    if config.vocabulary < prepared.vocabulary:
        raise ConfigError(f"model.vocabulary = {config.vocabulary} is less than the tokenizer's {prepared.vocabulary}")
    return config


def _train(recipe: Recipe, mesh: Mesh) -> int:
    first = mesh.rank == 0
    folder = RunFolder(Path(recipe.out))
    if first:
        folder.hold()
        print(to_toml(recipe), flush=True)
    comm.barrier(mesh.world)
    prepared = Prepared.load(recipe.data_folder)
    model = _model(recipe, mesh, prepared)
    with stop_signals() as stop:
        trainer = Trainer(
            model,
            ZeroOptimizer(model, mesh, recipe.optimizer),
            mesh,
            steps=recipe.steps,
            config=recipe.trainer,
            schedule=recipe.schedule,
            data=_loader(recipe, prepared, mesh).step,
            validation=lambda: validation_batches(
                prepared.open("validation"),
                sequence=recipe.batch.sequence,
                sequences=recipe.batch.sequences,
                rank=mesh.data.rank,
                size=mesh.data.size,
                limit=VALIDATION_WINDOWS,
            ),
            bytes_per_token=prepared.bytes_per_token("validation"),
            folder=folder,
            report=_reporter(recipe.steps),
            stop=stop,
        )
        if trainer.resume() and first:
            print(f"continuing {recipe.out} after step {trainer.done}", flush=True)
        finished = trainer.run()
    if first:
        folder.release()
        how = "done" if finished else "stopped on request: start it again to continue"
        print(f"{recipe.out}: {trainer.done} of {recipe.steps} steps, {how}", flush=True)
    return 0


def _model(recipe: Recipe, mesh: Mesh, prepared: Prepared) -> Decoder:
    build = Build(mesh=mesh, dtype=recipe.dtype, seed=recipe.seed, recompute=recipe.recompute)
    if recipe.init:
        return load_model(Path(recipe.init), build)
    return build_model(_model_config(recipe, prepared), build, recipe.seed)


def _loader(recipe: Recipe, prepared: Prepared, mesh: Mesh) -> Loader:
    return Loader(
        prepared.open("train"),
        sequence=recipe.batch.sequence,
        sequences=recipe.batch.sequences,
        microbatches=recipe.batch.microbatches,
        rank=mesh.data.rank,
        size=mesh.data.size,
        seed=recipe.seed,
    )


def _reporter(steps: int) -> Callable[[Metrics], None]:
    """Prints a line a step on a terminal, and about fifty a run elsewhere."""
    every = 1 if sys.stdout.isatty() else max(1, steps // 50)

    def report(m: Metrics) -> None:
        if m.step % every and m.step != steps and m.validation_loss is None:
            return
        line = (
            f"step {m.step:>{len(str(steps))}}/{steps}  loss {m.loss:.4f}  grad_norm {m.grad_norm:.3f}  lr {m.lr:.2e}  "
            f"{m.tokens_per_second:,.0f} tokens/s  mfu {m.mfu:.0%}  {m.peak_memory / 2**20:,.0f} MiB"
        )
        if m.validation_loss is not None:
            line += f"  validation {m.validation_loss:.4f} ({m.bits_per_byte:.3f} bits/byte)"
        print(line + ("  SKIPPED: gradients not finite" if m.skipped else ""), flush=True)

    return report
