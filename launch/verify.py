"""``verify MODEL_DIR_OR_RECIPE --layout...``: is this layout equal to one device?

Both train the same few steps from the same weights on the same tokens. Compared are every step's loss, every gradient
of the first step, and every weight after the last.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from launch.cli import command_line, help_text, positionals
from launch.ranks import check_world, first_alone, on_ranks
from launch.recipe import NOT_YET, Recipe, load_recipe, recipes
from launch.train import check_recipe, loader, model_of
from parallel import comm, rng
from parallel.config import options, resolve
from parallel.errors import ConfigError, ModelFolderError, refuse
from parallel.hf import check_folder, read_config
from parallel.hf.table import whole_shards
from parallel.mesh import Mesh
from parallel.models.batch import IGNORE, Batch
from parallel.models.config import DecoderConfig
from parallel.shard import gather_whole
from zero.data import Prepared
from zero.optimizer import ZeroConfig, ZeroOptimizer
from zero.trainer import Trainer

__all__ = ["main"]

USAGE = "lockstep verify MODEL_DIR_OR_RECIPE [--layout.tp 2 --layout.dp 2 --precision fp64 --steps 3 ...]"

TOLERANCE = {"fp64": (1e-10, 1e-9), "fp32": (2e-3, None), "bf16": (0.25, None)}
"""Largest relative difference of loss and gradients, and of weights after the steps. Below fp64 the weights are shown
and not judged: Adam divides by the gradient's size, so that where a gradient is all rounding, so is its update."""

_OF_RUNS = ("validate_every", "save_every", "save_async", "keep", "fall_back", "spike", "rewind", "slow", "fault")
_REFUSED = {"trace": "verify draws nothing", "init": "verify takes the folder itself: lockstep verify MODEL_DIR"} | {
    f"trainer.{name}": "of a run's life; verify makes a few steps and keeps nothing" for name in _OF_RUNS
}


@dataclass(frozen=True, slots=True)
class _Trace:
    """What a run of a few steps left: losses, whole gradients of the first step, whole weights after the last."""

    losses: list[float]
    gradients: dict[str, Tensor]
    weights: dict[str, Tensor]


def main(arguments: Sequence[str]) -> int:
    """Run the command; see :data:`launch.cli.USAGE`. Exit code 1 where the layout is not equal."""
    given, overrides, problems = command_line(arguments, Recipe(), _REFUSED)
    if "help" in overrides:
        print(help_text(f"{USAGE}\nrecipes: {', '.join(recipes())}", options(Recipe()), (*NOT_YET, *_REFUSED)))
        return 0
    (name,) = positionals(["MODEL_DIR_OR_RECIPE"], given, problems)
    overrides = {"steps": 3} | overrides
    if Path(name).is_dir():
        recipe = resolve(Recipe(init=name), {"batch": {"sequence": 64}}, overrides, extra=problems)
        refuse(ModelFolderError, check_folder(Path(name)))
        recipe = dataclasses.replace(recipe, model=read_config(Path(name)))
        refuse(ConfigError, recipe.model_problems())
    else:
        recipe = load_recipe(name, overrides, problems)
    place = check_world(recipe.layout, recipe.device)
    if place is None and not Path(name).is_dir():
        check_recipe(recipe)
    random = Path(name).is_dir()
    return on_ranks(["verify", *arguments], recipe.layout, recipe.device, lambda mesh: _verify(recipe, mesh, random))


def _verify(recipe: Recipe, mesh: Mesh, random: bool) -> int:
    """``random``: the tokens are random ones, not those of the recipe's data."""
    if not random:
        first_alone(mesh, lambda: check_recipe(recipe) and None)
        recipe = recipe.with_model(Prepared.load(recipe.data_folder))
    asked = _trace(recipe, mesh, random)
    differs = torch.zeros(1, dtype=torch.int64, device=mesh.device)
    if mesh.rank == 0:
        alone = dataclasses.replace(recipe, zero=ZeroConfig())
        differs += _report(recipe, _trace(alone, Mesh.single(mesh.device), random), asked)
    return int(comm.sum_(differs, mesh.world))


def _random_batches(recipe: Recipe, mesh: Mesh, step: int) -> list[Batch]:
    """Random tokens: a function of the seed, the step and global indices, cut over the data axis as training data."""
    batch, size = recipe.batch, mesh.data.size
    each = batch.sequences // (size * recipe.microbatches)
    batches = []
    for microbatch in range(recipe.microbatches):
        first = (microbatch * size + mesh.data.rank) * each * batch.sequence
        index = torch.arange(first, first + each * batch.sequence + 1)
        draws = rng.uniform(rng.key(recipe.seed, "verify", step), index)
        tokens = (draws * recipe.model.vocabulary).long()
        labels = tokens[1:].clone()
        labels[batch.sequence - 1 :: batch.sequence] = IGNORE
        rows, targets = tokens[:-1].split(batch.sequence), labels.split(batch.sequence)
        batches.append(Batch.pack(list(rows), list(targets), first_index=first, key=step))
    return batches


def _trace(recipe: Recipe, mesh: Mesh, random: bool) -> _Trace:
    model = model_of(recipe, mesh)
    optimizer = ZeroOptimizer(model, mesh, recipe.optimizer, zero=recipe.zero)
    trainer = Trainer(
        model,
        optimizer,
        mesh,
        steps=recipe.steps,
        config=recipe.trainer,
        schedule=recipe.schedule,
        pipeline=recipe.pp,
    )
    packed = None if random else loader(recipe, Prepared.load(recipe.data_folder), mesh)
    losses: list[float] = []
    gradients: dict[str, Tensor] = {}
    for step in range(recipe.steps):
        batches = _random_batches(recipe, mesh, step) if packed is None else packed.step(step)
        losses.append(trainer.accumulate(batches)[0])
        optimizer.reduce()
        if step == 0:
            gradients = _whole(dict(optimizer.pieces("gradient")), model.config, optimizer, mesh)
        trainer.update()
    weights = _whole(dict(optimizer.pieces("master")), model.config, optimizer, mesh)
    return _Trace(losses, gradients, weights)


def _whole(
    views: Mapping[str, Tensor], config: DecoderConfig, optimizer: ZeroOptimizer, mesh: Mesh
) -> dict[str, Tensor]:
    """Whole tensors, on the first rank of the pipeline all of them, from the first holder of each."""
    found: dict[str, Tensor] = {}
    shapes = {name: shard.shape for name, shard in whole_shards(config).items()}
    dtype = next(iter(views.values())).dtype
    for name, (first, *_) in sorted(optimizer.buckets.holders.items()):
        if mesh.pp.rank == first:
            whole = gather_whole(views[name], optimizer.buckets.shards[name], mesh)
            found[name] = whole.cpu().clone()
            if first:
                comm.send(whole, mesh.pp, 0)
        elif mesh.pp.rank == 0:
            whole = torch.empty(shapes[name], dtype=dtype, device=mesh.device)
            found[name] = comm.receive_(whole, mesh.pp, first).cpu()
    return found


def _report(recipe: Recipe, alone: _Trace, asked: _Trace) -> int:
    """Print the differences, the largest first; 1 if one is too large."""
    limit, weight_limit = TOLERANCE[recipe.precision]
    layout = recipe.layout
    print(
        f"layout pp={layout.pp} dp={layout.dp} cp={layout.cp} tp={layout.tp} "
        f"sequence_parallel={str(layout.sequence_parallel).lower()} zero={recipe.zero.stage} against one device, "
        f"{recipe.precision}, {recipe.steps} steps"
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
