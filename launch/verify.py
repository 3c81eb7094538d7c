"""``verify MODEL_DIR_OR_RECIPE --layout...``: is this layout equal to one device?

Both train the same few steps from the same weights on the same tokens. Compared are every step's loss, every gradient
of the first step, and every weight after the last.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from launch.cli import help_text, positionals
from launch.ranks import first_of_all, on_ranks
from launch.recipe import Recipe, load_recipe, recipes
from parallel import comm, rng
from parallel.config import options, parse_flags, resolve
from parallel.errors import ConfigError, ModelFolderError, refuse
from parallel.hf import check_folder, load_model, read_config
from parallel.mesh import Mesh
from parallel.models.batch import IGNORE, Batch
from parallel.models.build import Build
from parallel.models.config import DecoderConfig
from parallel.models.decoder import Decoder, build_model
from parallel.shard import gather_whole
from zero.data import Prepared, prepare
from zero.loader import Loader
from zero.optimizer import ZeroOptimizer

__all__ = ["main"]

USAGE = "lockstep verify MODEL_DIR_OR_RECIPE [--layout.tp 2 --layout.dp 2 --precision fp64 --steps 3 ...]"

TOLERANCE = {"fp64": (1e-10, 1e-9), "fp32": (2e-3, None), "bf16": (0.25, None)}
"""Largest relative difference of loss and gradients, and of weights after the steps. Below fp64 the weights are shown
and not judged: Adam divides by the gradient's size, so that where a gradient is all rounding, so is its update."""


@dataclass(frozen=True, slots=True)
class _Trace:
    """What a run of a few steps left: losses, whole gradients of the first step, whole weights after the last."""

    losses: list[float]
    gradients: dict[str, Tensor]
    weights: dict[str, Tensor]


def main(arguments: Sequence[str]) -> int:
    """Run the command; see :data:`launch.cli.USAGE`. Exit code 1 where the layout is not equal."""
    given, overrides, problems = parse_flags(arguments)
    if "help" in overrides:
        print(help_text(f"{USAGE}\nrecipes: {', '.join(recipes())}", options(Recipe())))
        return 0
    (name,) = positionals(["MODEL_DIR_OR_RECIPE"], given, problems)
    overrides = {"steps": 3} | overrides
    if Path(name).is_dir():
        recipe = resolve(Recipe(init=name), {"batch": {"sequence": 64}}, overrides, extra=problems)
        refuse(ModelFolderError, check_folder(Path(name)))
    else:
        recipe = load_recipe(name, overrides, problems)
        if first_of_all():
            prepare(recipe.data, recipe.data_folder)
    config = read_config(Path(recipe.init)) if recipe.init else recipe.model
    refuse(ConfigError, config.layout_problems(recipe.layout.tp))
    return on_ranks(["verify", *arguments], recipe.layout, recipe.device, lambda mesh: _verify(recipe, mesh))


def _verify(recipe: Recipe, mesh: Mesh) -> int:
    model, data = _subject(recipe, mesh)
    asked = _trace(recipe, mesh, model, data)
    differs = torch.zeros(1, dtype=torch.int64, device=mesh.device)
    if mesh.rank == 0:
        alone = Mesh.single(mesh.device)
        model, data = _subject(recipe, alone)
        differs += _report(recipe, _trace(recipe, alone, model, data), asked)
    return int(comm.sum_(differs, mesh.world))


def _subject(recipe: Recipe, mesh: Mesh) -> tuple[Decoder, Callable[[int], list[Batch]]]:
    build = Build(mesh=mesh, dtype=recipe.dtype, seed=recipe.seed, recompute=recipe.recompute)
    if recipe.init:
        model = load_model(Path(recipe.init), build)
        return model, lambda step: _random_batches(recipe, model.config, mesh, step)
    prepared = Prepared.load(recipe.data_folder)
    config = dataclasses.replace(recipe.model, vocabulary=recipe.model.vocabulary or prepared.vocabulary)
    batch = recipe.batch
    loader = Loader(
        prepared.open("train"),
        sequence=batch.sequence,
        sequences=batch.sequences,
        microbatches=batch.microbatches,
        rank=mesh.data.rank,
        size=mesh.data.size,
        seed=recipe.seed,
    )
    return build_model(config, build, recipe.seed), loader.step


def _random_batches(recipe: Recipe, config: DecoderConfig, mesh: Mesh, step: int) -> list[Batch]:
    """Random tokens: a function of the seed, the step and global indices, cut over the data axis as training data."""
    batch, size = recipe.batch, mesh.data.size
    each = batch.sequences // (size * batch.microbatches)
    batches = []
    for microbatch in range(batch.microbatches):
        first = (microbatch * size + mesh.data.rank) * each * batch.sequence
        index = torch.arange(first, first + each * batch.sequence + 1)
        draws = rng.uniform(rng.key(recipe.seed, "verify", step), index)
        tokens = (draws * config.vocabulary).long()
        labels = tokens[1:].clone()
        labels[batch.sequence - 1 :: batch.sequence] = IGNORE
        rows, targets = tokens[:-1].split(batch.sequence), labels.split(batch.sequence)
        batches.append(Batch.pack(list(rows), list(targets), first_index=first, key=step))
    return batches


def _trace(recipe: Recipe, mesh: Mesh, model: Decoder, data: Callable[[int], list[Batch]]) -> _Trace:
    optimizer = ZeroOptimizer(model, mesh, recipe.optimizer)
    shards = optimizer.buckets.shards
    losses: list[float] = []
    gradients: dict[str, Tensor] = {}
    model.train()
    for step in range(recipe.steps):
        batches = [batch.to(mesh.device) for batch in data(step)]
        count = sum(int((batch.labels_T != IGNORE).sum()) for batch in batches if batch.labels_T is not None)
        total = int(comm.sum_(torch.tensor(count, device=mesh.device), mesh.data))
        optimizer.begin()
        loss = torch.zeros((), dtype=torch.float64, device=mesh.device)
        for index, batch in enumerate(batches):
            optimizer.expect_last(index == len(batches) - 1)
            result = model.loss(batch, scale=1 / total)
            result.total.backward()
            loss += result.losses_T.sum()
        for name, view in optimizer.reduce():
            if step == 0:
                gradients[name] = gather_whole(view, shards[name], mesh).cpu().clone()
        optimizer.step()
        losses.append(float(comm.sum_(loss, mesh.data)) / total)
    weights = {
        name: gather_whole(view, shards[name], mesh).cpu().clone()
        for name, what, view in optimizer.state()
        if what == "master"
    }
    return _Trace(losses, gradients, weights)


def _report(recipe: Recipe, alone: _Trace, asked: _Trace) -> int:
    """Print the differences, the largest first; 1 if one is too large."""
    limit, weight_limit = TOLERANCE[recipe.precision]
    layout = recipe.layout
    print(
        f"layout pp={layout.pp} dp={layout.dp} cp={layout.cp} tp={layout.tp} "
        f"sequence_parallel={str(layout.sequence_parallel).lower()} against one device, {recipe.precision}, "
        f"{recipe.steps} steps"
    )
    for step, (one, many) in enumerate(zip(alone.losses, asked.losses, strict=True), start=1):
        print(f"loss of step {step}: {one:.12g} and {many:.12g}, relative difference {abs(many - one) / abs(one):.1e}")
    worst_loss = max(abs(b - a) / abs(a) for a, b in zip(alone.losses, asked.losses, strict=True))
    rows = sorted(_rows(alone, asked), key=lambda row: -max(row[1:]))
    print(f"{'parameter':<44}{'gradient':>12}{'weight after':>14}   (largest difference / largest value)")
    for name, gradient, weight in rows[:20]:
        print(f"{name:<44}{gradient:>12.1e}{weight:>14.1e}")
    if len(rows) > 20:
        print(f"... and {len(rows) - 20} more, all smaller")
    worst_gradient, worst_weight = max(row[1] for row in rows), max(row[2] for row in rows)
    equal = max(worst_loss, worst_gradient) <= limit and (weight_limit is None or worst_weight <= weight_limit)
    judged = f"limit {weight_limit:.0e}" if weight_limit else "not judged"
    print(
        f"{'EQUAL' if equal else 'NOT EQUAL'}: loss {worst_loss:.1e}, gradients {worst_gradient:.1e} "
        f"(limit {limit:.0e}), weights {worst_weight:.1e} ({judged})"
    )
    return 0 if equal else 1


def _rows(alone: _Trace, asked: _Trace) -> Iterator[tuple[str, float, float]]:
    for name, one in alone.gradients.items():
        yield name, _relative(one, asked.gradients[name]), _relative(alone.weights[name], asked.weights[name])


def _relative(one: Tensor, many: Tensor) -> float:
    return float((many - one).abs().max() / one.abs().max().clamp_min(1e-300))
