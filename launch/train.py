"""``train RECIPE``: real text in, a trained model's checkpoints out."""

from __future__ import annotations

import dataclasses
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from launch.cli import command_line, help_text, positionals
from launch.deepspeed import check_deepspeed, deepspeed_optimizer
from launch.ranks import check_world, first_alone, on_ranks, stop_signals
from launch.recipe import NOT_YET, Recipe, deepspeed_reading, load_recipe, recipes
from parallel.config import options, to_table, to_toml
from parallel.errors import ModelFolderError, refuse
from parallel.hf import check_folder, load_model
from parallel.mesh import Mesh
from parallel.models.balance import measured_ends
from parallel.models.build import Build
from parallel.models.decoder import Decoder, build_model
from parallel.pp import Cut, Schedule, Timeline, simulate
from parallel.pp.draw import draw
from parallel.pp.measured import measured_costs
from parallel.tokenizer import load_tokenizer, write_tokenizer
from zero.data import Prepared, prepare
from zero.engine import Optimizer
from zero.loader import Loader, Sample, validation_batches
from zero.metrics import Metrics
from zero.optimizer import ZeroOptimizer
from zero.run import RunFolder
from zero.trainer import Trainer

__all__ = ["check_recipe", "loader", "main", "model_of"]

USAGE = "lockstep train RECIPE [--OPTION VALUE ...]"

FREE = (
    "out",
    "trace",
    "layout",
    "pp",
    "zero",
    "steps",
    "device",
    "recompute",
    "batch.microbatches",
    "optimizer.bucket_mb",
    "trainer.validate_every",
    "trainer.save_every",
    "trainer.save_async",
    "trainer.keep",
    "trainer.fall_back",
    "trainer.on_not_finite",
    "trainer.spike",
    "trainer.rewind",
    "trainer.slow",
    "trainer.fault",
)
"""Options that may change when a run is continued."""

VALIDATION_WINDOWS = 64


def main(arguments: Sequence[str]) -> int:
    """Run the command; see :data:`launch.cli.USAGE`."""
    given, overrides, problems = command_line(arguments, Recipe())
    if "help" in overrides:
        print(help_text(f"{USAGE}\nrecipes: {', '.join(recipes())}", options(Recipe()), NOT_YET))
        return 0
    (name,) = positionals(["RECIPE"], given, problems)
    recipe = load_recipe(name, overrides, problems)
    if recipe.zero.backend == "deepspeed":
        check_deepspeed(recipe)
    if check_world(recipe.layout, recipe.device) is None:
        folder = RunFolder(Path(recipe.out))
        folder.hold()
        try:
            _check(recipe, folder)
        finally:
            folder.release()
    return on_ranks(
        ["train", *arguments], recipe.layout, recipe.device, lambda mesh: _train(recipe, mesh), grace_s=120.0
    )


def check_recipe(recipe: Recipe) -> Recipe:
    """Refuse what can be refused, make the packed data, and return the effective recipe."""
    if recipe.init:
        refuse(ModelFolderError, check_folder(Path(recipe.init)))
    prepared = prepare(recipe.text, recipe.data_folder, _announce)
    Loader(prepared.open("train"), sequence=recipe.batch.sequence, sequences=1)
    return recipe.with_model(prepared)


def _check(recipe: Recipe, folder: RunFolder) -> Recipe:
    folder.check(to_table(recipe), (*FREE, "model"))
    whole = check_recipe(recipe)
    folder.check(to_table(whole), FREE)
    return whole


def _announce(what: str, share: float) -> None:
    if sys.stderr.isatty() or share in (0.0, 1.0):
        end = "\r" if sys.stderr.isatty() and share < 1 else "\n"
        print(f"{what}: {share:.0%}", end=end, file=sys.stderr, flush=True)


def _train(recipe: Recipe, mesh: Mesh) -> int:
    folder = RunFolder(Path(recipe.out))
    first_alone(mesh, lambda: _begin(recipe, folder))
    try:
        return _run(recipe, mesh, folder)
    finally:
        folder.release()


def _begin(recipe: Recipe, folder: RunFolder) -> None:
    """On rank 0: hold the folder, check everything, and write down what this run is."""
    folder.hold()
    whole = _check(recipe, folder)
    prepared = Prepared.load(whole.data_folder)
    folder.write_config(to_toml(whole))
    tokenizer = load_tokenizer(prepared.folder)
    (folder.path / "tokenizer").mkdir(exist_ok=True)
    write_tokenizer(tokenizer, folder.path / "tokenizer", end=prepared.end_of_text)
    if recipe.zero.deepspeed:
        print(f"{recipe.zero.deepspeed}, where no option beside it says otherwise:", flush=True)
        print(*(f"  {line}" for line in deepspeed_reading(recipe).lines()), sep="\n", end="\n\n", flush=True)
    print(to_toml(whole), flush=True)


def _run(recipe: Recipe, mesh: Mesh, folder: RunFolder) -> int:
    first = mesh.rank == 0
    prepared = Prepared.load(recipe.data_folder)
    recipe = recipe.with_model(prepared)
    model, source = model_of(recipe, mesh), loader(recipe, prepared, mesh)
    with stop_signals() as stop:
        trainer = Trainer(
            model,
            optimizer_of(recipe, model, mesh),
            mesh,
            steps=recipe.steps,
            config=recipe.trainer,
            schedule=recipe.schedule,
            data=source.step,
            samples=source.samples,
            validation=lambda: validation_batches(
                prepared.open("validation"),
                sequence=recipe.batch.sequence,
                sequences=recipe.batch.sequences,
                rank=mesh.data.rank,
                size=mesh.data.size,
                limit=VALIDATION_WINDOWS,
            ),
            pipeline=recipe.pp,
            traced=(lambda timeline, table: _draw(Path(recipe.trace), timeline, table)) if recipe.trace else None,
            bytes_per_token=prepared.bytes_per_token("validation"),
            folder=folder,
            about=to_table(recipe),
            report=_reporter(recipe.steps),
            stop=stop,
        )
        if trainer.resume() and first:
            for problem in trainer.passed_over:
                print(f"NOT CONTINUED FROM: {problem}", file=sys.stderr, flush=True)
            print(f"continuing {recipe.out} after step {trainer.done}", flush=True)
        finished = trainer.run()
    if first:
        how = "done" if finished else "stopped on request: start it again to continue"
        print(f"{recipe.out}: {trainer.done} of {recipe.steps} steps, {how}", flush=True)
    return 0


def model_of(recipe: Recipe, mesh: Mesh) -> Decoder:
    """The model of an effective recipe, with the weights that training starts from."""
    build = Build(mesh=mesh, dtype=recipe.dtype, seed=recipe.seed, recompute=recipe.recompute)
    build = dataclasses.replace(build, cuts=_cuts(recipe, build))
    if recipe.init:
        return load_model(Path(recipe.init), build)
    return build_model(recipe.model, build, recipe.seed)


def optimizer_of(recipe: Recipe, model: Decoder, mesh: Mesh) -> Optimizer:
    """What changes the weights of a recipe's model: ours, or DeepSpeed's engine."""
    if recipe.zero.backend == "deepspeed":
        return deepspeed_optimizer(recipe, model, mesh)
    return ZeroOptimizer(model, mesh, recipe.optimizer, zero=recipe.zero)


def _cuts(recipe: Recipe, build: Build) -> tuple[Cut, ...]:
    """The stages of this rank; rank 0 says what all of them hold."""
    mesh, model, batch = build.mesh, recipe.model.resolved(), recipe.batch
    table, ends = recipe.pp.table(mesh.pp.size, recipe.microbatches, model.layers), (0.0, 0.0)
    if recipe.pp.balance == "measured" and mesh.pp.size > 1:
        tokens = batch.sequence * batch.sequences // (recipe.layout.dp * recipe.microbatches)
        ends = measured_ends(model, build, tokens)
    cuts = recipe.pp.cuts(model.layers, table.stages, ends)
    if mesh.pp.size > 1 and mesh.rank == 0:
        held = " | ".join(str(len(cut.layers)) for cut in cuts)
        bubble = simulate(table).bubble_fraction
        print(
            f"pipeline {table.name}: {table.ranks} ranks, {table.microbatches} microbatches, layers of the stages "
            f"{held}, bubble {bubble:.1%} if F, I and W take equally long",
            flush=True,
        )
    return tuple(cuts[stage] for stage in table.stages_of(mesh.pp.rank))


def _draw(path: Path, measured: Timeline, table: Schedule) -> None:
    """Draw a measured step, and beside it the plan: the same schedule simulated with the measured costs."""
    plan = simulate(table, measured_costs(measured))
    draw(measured, path)
    draw(plan, path.with_suffix(f".plan{path.suffix}"))
    print(
        f"{path}: step {measured.step * 1e3:.1f} ms, bubble {measured.bubble_fraction:.1%}; planned "
        f"{plan.step * 1e3:.1f} ms, {plan.bubble_fraction:.1%}",
        flush=True,
    )


def loader(recipe: Recipe, prepared: Prepared, mesh: Mesh) -> Loader:
    """This rank's part of the data of a recipe."""
    return Loader(
        prepared.open("train"),
        sequence=recipe.batch.sequence,
        sequences=recipe.batch.sequences,
        microbatches=recipe.microbatches,
        rank=mesh.data.rank,
        size=mesh.data.size,
        seed=recipe.seed,
    )


def _reporter(steps: int) -> Callable[[Metrics], None]:
    """Prints a line a step on a terminal; elsewhere about fifty a run, and at least one in ten seconds."""
    every = 1 if sys.stdout.isatty() else max(1, steps // 50)
    printed, slow = time.monotonic(), set[int]()

    def report(m: Metrics) -> None:
        nonlocal printed
        for line in _alarms(m, slow):
            print(line, file=sys.stderr, flush=True)
        due = m.step % every == 0 or m.step == steps or m.skipped or m.validation_loss is not None
        if not due and time.monotonic() - printed < 10:
            return
        printed = time.monotonic()
        line = (
            f"step {m.step:>{len(str(steps))}}/{steps}  loss {m.loss:.4f}  grad_norm {m.grad_norm:.3f}  lr {m.lr:.2e}  "
            f"{m.tokens_per_second:,.0f} tokens/s  mfu {m.mfu:.0%}  {m.peak_memory / 2**20:,.0f} MiB"
        )
        if m.validation_loss is not None:
            line += f"  validation {m.validation_loss:.4f} ({m.bits_per_byte:.3f} bits/byte)"
        print(line + (f"  SKIPPED: gradients not finite ({m.not_finite})" if m.skipped else ""), flush=True)

    return report


def _alarms(m: Metrics, slow: set[int]) -> Iterator[str]:
    """What of a step must not be overlooked; ``slow``: ranks of which it has been said."""
    if m.save_failed:
        yield f"SAVE FAILED: {m.save_failed}"
    if (r := m.rewound) is not None:
        yield (
            f"SPIKE: the loss of step {r.from_step} was {r.loss:.4f}, {r.spike:.1f} times the median of those before. "
            f"Back at step {r.to_step}; share {r.share} of the data is passed over from now on: {_told(r.samples)}"
        )
    if m.spike is not None:
        yield f"SPIKE: the loss of step {m.step} is {m.spike:.1f} times the median of those before: {_told(m.samples)}"
    for rank, times in (m.slow_ranks or {}).items():
        if rank not in slow:
            yield f"SLOW: rank {rank} computes {times:.1f} times as long as ranks like it (step {m.step})"
            slow.add(rank)


def _told(samples: Sequence[Sample] | None) -> str:
    """Some of the samples of a step, as window (documents)."""
    shown = [f"{s.window} ({s.first_document}-{s.last_document})" for s in samples or ()]
    more = f" and {len(shown) - 8} more" if len(shown) > 8 else ""
    return f"windows (documents) {', '.join(shown[:8])}{more}" if shown else "samples unknown"
