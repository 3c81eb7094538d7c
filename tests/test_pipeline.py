"""Pipelines: under every schedule the loss, gradients and weights of one device, and what is kept only as long as due."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import gc
import random
import time
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
import torch.distributed as dist
import torch.distributed.pipelining as theirs
from ranks import Ranks
from torch import Tensor, nn
from torch.distributed.pipelining.schedules import ScheduleDualPipeV, ScheduleZBVZeroBubble

from parallel import comm
from parallel.deferral import Deferral
from parallel.errors import ConfigError, ScheduleError
from parallel.hf import load_model, save_model
from parallel.holders import holders
from parallel.mesh import Layout, Mesh
from parallel.models.batch import IGNORE, Batch
from parallel.models.build import Build
from parallel.models.config import DecoderConfig
from parallel.models.decoder import Decoder, build_model
from parallel.models.pipelined import PipelinedModel
from parallel.pp import SCHEDULES, Action, PipelineConfig, Schedule, lower, make_schedule, parse_schedule
from parallel.pp import run as executor
from parallel.pp.action import KINDS
from parallel.pp.links import Links
from parallel.pp.run import Pipeline
from parallel.shard import finalize_gradients, gather_whole, param_shards
from zero import checkpoint
from zero.optimizer import OptimizerConfig, ZeroOptimizer
from zero.run import RunFolder
from zero.trainer import Trainer

QWEN3 = DecoderConfig(
    family="qwen3", vocabulary=31, hidden=16, layers=8, heads=4, kv_heads=2, feed_forward=24, qk_norm=True, std=0.2
)
GPT2 = DecoderConfig(
    family="gpt2",
    vocabulary=31,
    hidden=16,
    layers=8,
    heads=4,
    feed_forward=24,
    activation="gelu_tanh",
    gated=False,
    norm="layer",
    qkv_bias=True,
    out_bias=True,
    mlp_bias=True,
    positions="learned",
    max_positions=16,
    tied=True,
    std=0.2,
)
CONFIGS = {
    "qwen3": QWEN3,
    "gpt2": GPT2,
    "tied": dataclasses.replace(QWEN3, tied=True),
    "dropout": dataclasses.replace(GPT2, embedding_dropout=0.1, residual_dropout=0.1, attention_dropout=0.1),
}
SCALE = 1 / 37
DOCUMENTS = ((5,), (7, 6), (1,), (3, 5), (2, 1, 1), (9, 2, 4), (11,))
"""Lengths of the documents of microbatches: 5, 13, 1, 8, 4, 15, 11 tokens, and again."""


def trains(name: str) -> bool:
    """Whether a schedule forms gradients; all that do stand for themselves in these tests."""
    return make_schedule(name, 2, 2).trains


TRAINING = [name for name in SCHEDULES if trains(name)]
SPLIT = [name for name in TRAINING if any(a.op == "W" for row in make_schedule(name, 4, 8).rows for a in row)]
TWO_STAGES = [name for name in TRAINING if make_schedule(name, 4, 4).stages == 8]


def parts(count: int, rank: int = 0, size: int = 1, step: int = 0) -> list[Batch]:
    """The microbatches of a data-parallel rank; those of all ranks, in turn, are those of one device."""
    generator = torch.Generator().manual_seed(step)
    found, first = [], 0
    for index in range(count * size):
        lengths = DOCUMENTS[(index + step) % len(DOCUMENTS)]
        tokens = [torch.randint(31, (length,), generator=generator) for length in lengths]
        labels = [torch.randint(31, (length,), generator=generator) for length in lengths]
        if len(lengths) > 1:
            labels[0][0] = IGNORE
        found.append(Batch.pack(tokens, labels, first_index=first, key=step))
        first += sum(lengths)
    return found[rank::size]


def freeze(model: nn.Module, frozen: str) -> None:
    """Exclude parameters from training, by the words that their names begin with; ``-x``: all but those."""
    words = tuple(frozen.removeprefix("-").split())
    for name, parameter in model.named_parameters():
        if frozen and name.startswith(words) != frozen.startswith("-"):
            parameter.requires_grad_(False)


@functools.cache
def reference(
    config: DecoderConfig, count: int, frozen: str = "", smoothing: float = 0.0, z_loss: float = 0.0
) -> tuple[float, dict[str, Tensor]]:
    """Loss and gradients of the undivided model on one device, microbatch after microbatch."""
    model = build_model(config, Build(mesh=Mesh.single(), dtype=torch.float64, seed=5), seed=3)
    freeze(model, frozen)
    total = 0.0
    for batch in parts(count):
        loss = model.loss(batch, scale=SCALE, label_smoothing=smoothing, z_loss=z_loss)
        loss.total.backward()
        total += float(loss.losses_T.sum())
    return total, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def held_cuts(config: DecoderConfig, pipeline: PipelineConfig, mesh: Mesh, count: int) -> tuple[Any, ...]:
    table = pipeline.table(mesh.pp.size, count)
    cuts = pipeline.cuts(config.layers, table.stages)
    return tuple(cuts[stage] for stage in table.stages_of(mesh.pp.rank))


def stages_on(
    mesh: Mesh, config: DecoderConfig, pipeline: PipelineConfig, count: int, frozen: str = "", **options: Any
) -> PipelinedModel:
    """The stages of this rank, with the weights of the undivided model."""
    cuts = held_cuts(config, pipeline, mesh, count)
    model = build_model(config, Build(mesh=mesh, dtype=torch.float64, seed=5, cuts=cuts, **options), seed=3)
    freeze(model, frozen)
    return PipelinedModel(model, mesh, pipeline)


def close(got: Tensor, expected: Tensor, what: str, limit: float = 1e-12) -> None:
    assert got.shape == expected.shape, what
    difference = float((got - expected).abs().max() / expected.abs().max().clamp_min(1e-30))
    assert difference <= limit, f"{what} differs by {difference:.1e}"


def check_gradients(stages: PipelinedModel, expected: dict[str, Tensor], what: str) -> None:
    """Complete the gradients of this rank's parameters, and compare them."""
    model, mesh = stages.model, stages.mesh
    finalize_gradients(model, mesh)
    shards, parameters = param_shards(model), dict(model.named_parameters())
    held = holders(parameters, mesh)
    assert held.keys() >= expected.keys(), what
    for name in sorted(parameters):
        gradient = parameters[name].grad
        if name not in expected:
            assert gradient is None, f"{what}: {name} is frozen"
            continue
        gradient = torch.zeros_like(parameters[name]) if gradient is None else gradient
        if len(held[name]) > 1:
            comm.sum_(gradient, mesh.among("pp", held[name]))
        close(gather_whole(gradient, shards[name], mesh), expected[name], f"{what}: gradient of {name}")


def check_steps(cases: list[dict[str, Any]], **layout: Any) -> None:
    """On the ranks: a step for each case, compared with the undivided model."""
    mesh = Mesh.build(Layout(**layout))
    for case in cases:
        options, what = dict(case), str(case | layout)
        config = dataclasses.replace(CONFIGS[options.pop("config")], layers=options.pop("depth", 8))
        frozen, count, recompute = (options.pop(n, v) for n, v in (("frozen", ""), ("count", 3), ("recompute", "none")))
        smoothing, z_loss = options.pop("smoothing", 0.0), options.pop("z_loss", 0.0)
        pipeline = PipelineConfig(**options | {"layers": tuple(options.get("layers", ()))})
        loss, gradients = reference(config, count, frozen, smoothing, z_loss)
        stages = stages_on(mesh, config, pipeline, count, frozen, recompute=recompute)
        last: list[bool] = []
        expect = lambda flag, of: last.append(flag)  # noqa: E731
        total = stages.train(parts(count), expect, scale=SCALE, label_smoothing=smoothing, z_loss=z_loss)
        assert float(comm.sum_(total, mesh.pp)) == pytest.approx(loss, rel=1e-12), what
        check_gradients(stages, gradients, what)
        assert any(last), what


def counts(ranks: int) -> list[int]:
    """Microbatches: fewer than the ranks, as many, a few more, many."""
    return sorted({1, ranks - 1, ranks, ranks + 1, 2 * ranks, 3 * ranks + 1})


@pytest.mark.parametrize("schedule", TRAINING)
@pytest.mark.parametrize("world", [2, 4])
def test_every_schedule_gives_the_gradients_of_one_device(ranks: Ranks, schedule: str, world: int) -> None:
    config = {0: "qwen3", 1: "gpt2"}
    cases = [
        {"schedule": schedule, "count": count, "config": config[(n + more) % 2], "depth": 2 * world}
        for n, count in enumerate(counts(world))
        for more in (0, 1)
        if not more or count == world + 1
    ]
    ranks.run(check_steps, world=world, cases=cases, pp=world)


def test_stages_a_rank(ranks: Ranks) -> None:
    for world, deep in ((2, 7), (4, 12)):
        cases = [
            {"schedule": "interleaved", "virtual": virtual, "count": count, "config": "tied", "depth": deep}
            for virtual in (1, 2, 3)
            for count in (1, world + 1)
        ]
        ranks.run(check_steps, world=world, cases=cases, pp=world)


VARIANTS: dict[str, dict[str, Any]] = {
    "uneven": {"layers": [2, 1, 5, 0], "config": "gpt2"},
    "only ends empty": {"layers": [0, 7, 1, 0], "config": "tied"},
    "dropout": {"config": "dropout"},
    "full": {"recompute": "full", "config": "dropout", "count": 3},
    "selective": {"recompute": "selective", "config": "dropout", "count": 3},
    "loss": {"smoothing": 0.1, "z_loss": 0.01, "config": "qwen3"},
    "embedding and first blocks frozen": {"frozen": "embedding layers.0 layers.1 layers.2.norm", "config": "qwen3"},
    "blocks frozen": {"frozen": "layers", "config": "gpt2"},
    "all but the head frozen": {"frozen": "-head", "config": "qwen3"},
    "only the embedding trains": {"frozen": "-embedding", "config": "tied"},
    "a stage in the middle frozen": {"frozen": "layers.3 layers.4 layers.5", "config": "qwen3"},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_variants(ranks: Ranks, variant: str) -> None:
    options = VARIANTS[variant]
    names = ["1f1b", "zb-h1", "dualpipe"] if "layers" in options else ["1f1b", "zb-h2", "zb-v", "dualpipe", "dualpipev"]
    ranks.run(check_steps, world=4, cases=[{"schedule": name, "count": 4} | options for name in names], pp=4)


@pytest.mark.parametrize("sequence_parallel", [True, False])
def test_beside_tensor_parallelism(ranks: Ranks, sequence_parallel: bool) -> None:
    """Token counts are odd, and one is 1: of some microbatches the second rank has no token at all."""
    cases = [
        {"schedule": name, "count": 3, "config": ("qwen3", "gpt2")[n % 2], "depth": 4}
        for n, name in enumerate(TRAINING)
    ]
    cases += [
        {"schedule": name, "count": 3, "config": "dropout", "recompute": "full", "depth": 4}
        for name in ("zb-v", "dualpipe")
    ]
    ranks.run(check_steps, world=4, cases=cases, pp=2, tp=2, sequence_parallel=sequence_parallel)


def trainer_on(
    mesh: Mesh,
    schedule: str = "1f1b",
    config: str = "qwen3",
    *,
    count: int = 3,
    frozen: str = "",
    folder: Path | None = None,
    validation: int = 0,
) -> Trainer:
    """A trainer of microbatches of different sizes; its clipping is active, its buckets are small."""
    pipeline = PipelineConfig(schedule=schedule)
    data, each = mesh.data, count // mesh.data.size
    model = build_model(
        CONFIGS[config],
        Build(mesh=mesh, dtype=torch.float64, seed=5, cuts=held_cuts(CONFIGS[config], pipeline, mesh, each)),
        seed=3,
    )
    freeze(model, frozen)
    return Trainer(
        model,
        ZeroOptimizer(model, mesh, OptimizerConfig(lr=3e-3, clip=0.1, bucket_mb=0.004)),
        mesh,
        steps=9,
        data=lambda step: parts(each, data.rank, data.size, step),
        validation=(lambda: parts(validation // data.size, data.rank, data.size, 99)) if validation else None,
        pipeline=pipeline,
        folder=RunFolder(folder) if folder else None,
    )


def state(trainer: Trainer, what: str = "") -> dict[str, Tensor]:
    """Whole master weights and optimizer state of this rank's parameters, by ``name|what``."""
    shards = trainer.optimizer.buckets.shards
    return {
        f"{name}|{kind}": gather_whole(view, shards[name], trainer.mesh).clone()
        for name, kind, view in trainer.optimizer.state()
        if what in ("", kind)
    }


@functools.cache
def trained(config: str, count: int, frozen: str = "") -> tuple[list[tuple[float, float]], dict[str, Tensor], Any]:
    """Three steps on one device: losses and norms, first gradients, last weights."""
    trainer = trainer_on(Mesh.single(), config=config, count=count, frozen=frozen)
    assert trainer.data is not None
    curve, gradients = [], {}
    for step in range(3):
        loss, _ = trainer.accumulate(trainer.data(step))
        if step == 0:
            gradients = {name: view.clone() for name, view in trainer.optimizer.reduce()}
        curve.append((loss, trainer.update()[0]))
    return curve, gradients, state(trainer, "master")


def check_training(cases: list[tuple[str, str, str]], count: int, **layout: Any) -> None:
    """On the ranks: three steps, compared with the same on one device; and whether reductions began in time."""
    mesh = Mesh.build(Layout(**layout))
    for schedule, config, frozen in cases:
        what = f"{schedule}, {config}, {frozen}, {layout}"
        curve, gradients, weights = trained(config, count, frozen)
        trainer = trainer_on(mesh, schedule, config, count=count, frozen=frozen)
        assert trainer.data is not None
        buckets, shards = trainer.optimizer.buckets, trainer.optimizer.buckets.shards
        assert len(buckets.buckets) > 4 or frozen
        for step in range(3):
            loss, _ = trainer.accumulate(trainer.data(step))
            early = sum(bucket.pending is not None for bucket in buckets.buckets)
            late = int(CONFIGS[config].tied)  # of two stages of one rank
            assert early >= len(buckets.buckets) - late, f"{what}: {early} of {len(buckets.buckets)} on their way"
            if step == 0:
                for name, view in trainer.optimizer.reduce():
                    close(gather_whole(view, shards[name], mesh), gradients[name], f"{what}: gradient of {name}")
            norm, _ = trainer.update()
            assert (loss, norm) == pytest.approx(curve[step], rel=1e-11), what
            assert norm > 0.1, "clipping is active"
        for key, value in state(trainer, "master").items():
            torch.testing.assert_close(value, weights[key], rtol=1e-9, atol=1e-11, msg=lambda m: f"{what} {key} {m}")


@pytest.mark.parametrize("config", ["qwen3", "tied"])
def test_training_beside_data_parallelism(ranks: Ranks, config: str) -> None:
    """Weights after three steps, with clipping; buckets are reduced while the pipeline still runs, and not too early."""
    ranks.run(check_training, world=4, cases=[(name, config, "") for name in TRAINING], count=6, pp=2, dp=2)


def test_training_over_four_stages(ranks: Ranks) -> None:
    cases = [(name, config, "") for name in ("zb-v", "dualpipe", "interleaved") for config in ("tied", "gpt2")]
    ranks.run(check_training, world=4, cases=cases, count=6, pp=4)


def test_training_with_frozen_parameters(ranks: Ranks) -> None:
    frozen = ["embedding layers.0 layers.1", "-head", "layers.0 layers.1 layers.2 embedding"]
    cases = [(name, "qwen3", words) for name in ("1f1b", "zb-h1", "dualpipe", "zb-v") for words in frozen]
    ranks.run(check_training, world=4, cases=cases, count=6, pp=4)
