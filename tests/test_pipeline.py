"""Pipelines: under every schedule the loss, gradients and weights of one device; nothing is kept longer than due."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import gc
import itertools
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
from parallel.errors import ConfigError
from parallel.hf import load_model, save_model
from parallel.holders import holders
from parallel.mesh import Layout, Mesh
from parallel.models.batch import IGNORE, Batch
from parallel.models.build import Build
from parallel.models.config import DecoderConfig
from parallel.models.decoder import build_model
from parallel.models.pipelined import PipelinedModel
from parallel.pp import SCHEDULES, Action, PipelineConfig, lower, make_schedule
from parallel.pp import run as executor
from parallel.pp.action import KINDS
from parallel.pp.links import Links
from parallel.pp.run import Pipeline
from parallel.pp.simulate import simulate
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
    table = pipeline.table(mesh.pp.size, count, config.layers)
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
        expect = lambda flag, of, whole: last.append(flag)  # noqa: E731
        total = stages.train(parts(count), expect, scale=SCALE, label_smoothing=smoothing, z_loss=z_loss)
        assert float(comm.sum_(total, mesh.pp)) == pytest.approx(loss, rel=1e-12), what
        check_gradients(stages, gradients, what)
        assert any(last), what


def counts(ranks: int) -> list[int]:
    """Microbatches: fewer than the ranks, as many, a few more, many."""
    return sorted({1, ranks - 1, ranks, ranks + 1, 3 * ranks + 1})


@pytest.mark.parametrize("schedule", TRAINING)
@pytest.mark.parametrize("world", [2, 4])
def test_every_schedule_gives_the_gradients_of_one_device(ranks: Ranks, schedule: str, world: int) -> None:
    config, depth = {0: "qwen3", 1: "gpt2"}, 2 * world if schedule in TWO_STAGES else world + 1
    cases = [
        {"schedule": schedule, "count": count, "config": config[(n + more) % 2], "depth": depth}
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
    names = ["1f1b", "zb-h1", "dualpipe"] if "layers" in options else ["zb-h2", "zb-v", "dualpipe"]
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
    depth: int = 4,
    count: int = 3,
    frozen: str = "",
    folder: Path | None = None,
    validation: int = 0,
) -> Trainer:
    """A trainer of microbatches of different sizes; its clipping is active, its buckets are small."""
    pipeline, decoder = PipelineConfig(schedule=schedule), dataclasses.replace(CONFIGS[config], layers=depth)
    data, each = mesh.data, count // mesh.data.size
    cuts = held_cuts(decoder, pipeline, mesh, each)
    model = build_model(decoder, Build(mesh=mesh, dtype=torch.float64, seed=5, cuts=cuts), seed=3)
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
        f"{name}|{kind}": gather_whole(piece, shards[name], trainer.mesh).clone()
        for kind in ([what] if what else ["master", "exp_avg", "exp_avg_sq"])
        for name, piece in trainer.optimizer.pieces(kind)
    }


@functools.cache
def trained(
    config: str, depth: int, count: int, frozen: str
) -> tuple[list[tuple[float, float]], dict[str, Tensor], Any]:
    """Three steps on one device: losses and norms, first gradients, last weights."""
    trainer = trainer_on(Mesh.single(), config=config, depth=depth, count=count, frozen=frozen)
    assert trainer.data is not None
    curve, gradients = [], {}
    for step in range(3):
        loss, _ = trainer.accumulate(trainer.data(step))
        if step == 0:
            trainer.optimizer.reduce()
            gradients = {name: view.clone() for name, view in trainer.optimizer.pieces("gradient")}
        curve.append((loss, trainer.update()[0]))
    return curve, gradients, state(trainer, "master")


def check_training(cases: list[tuple[str, str, str]], depth: int, count: int, **layout: Any) -> None:
    """On the ranks: three steps, compared with the same on one device; and whether reductions began in time."""
    mesh = Mesh.build(Layout(**layout))
    for schedule, config, frozen in cases:
        what = f"{schedule}, {config}, {frozen}, {layout}"
        curve, gradients, weights = trained(config, depth, count, frozen)
        trainer = trainer_on(mesh, schedule, config, depth=depth, count=count, frozen=frozen)
        assert trainer.data is not None
        buckets, shards = trainer.optimizer.buckets, trainer.optimizer.buckets.shards
        assert len(buckets.buckets) > 4 or frozen
        for step in range(3):
            loss, _ = trainer.accumulate(trainer.data(step))
            early = sum(bucket.pending is not None for bucket in buckets.buckets)
            late = int(CONFIGS[config].tied)  # of two stages of one rank
            late = len(buckets.buckets) if schedule.endswith(".txt") else late
            assert early >= len(buckets.buckets) - late, f"{what}: {early} of {len(buckets.buckets)} on their way"
            if step == 0:
                trainer.optimizer.reduce()
                for name, view in trainer.optimizer.pieces("gradient"):
                    close(gather_whole(view, shards[name], mesh), gradients[name], f"{what}: gradient of {name}")
            norm, _ = trainer.update()
            assert (loss, norm) == pytest.approx(curve[step], rel=1e-11), what
            assert norm > 0.1, "clipping is active"
        for key, value in state(trainer, "master").items():
            torch.testing.assert_close(value, weights[key], rtol=1e-9, atol=1e-11, msg=lambda m: f"{what} {key} {m}")


@pytest.mark.parametrize("config", ["qwen3", "tied"])
def test_training_beside_data_parallelism(ranks: Ranks, config: str) -> None:
    """Weights after three steps, with clipping; buckets are reduced while the pipeline runs, and not too early."""
    ranks.run(check_training, world=4, cases=[(name, config, "") for name in TRAINING], depth=4, count=6, pp=2, dp=2)


LATE = """
0F0 0F1 0F2 0I0 0B1 0B2 0W0
1F0 1I0 1F1 1B1 1F2 1B2 1W0
"""


def test_a_weight_that_comes_after_the_last_b_is_not_reduced_too_early(ranks: Ranks, tmp_path: Path) -> None:
    (tmp_path / "late.txt").write_text(LATE)
    cases = [(str(tmp_path / "late.txt"), "qwen3", "")]
    ranks.run(check_training, world=4, cases=cases, depth=4, count=6, pp=2, dp=2)


def test_an_embedding_that_two_stages_of_a_rank_share_is_not_reduced_too_early(ranks: Ranks) -> None:
    cases = [(name, "tied", "-embedding") for name in ("zb-v", "dualpipe", "dualpipev")]
    ranks.run(check_training, world=4, cases=cases, depth=4, count=6, pp=2, dp=2)


def test_training_over_four_stages(ranks: Ranks) -> None:
    cases = [(name, config, "") for name in ("zb-v", "dualpipe", "interleaved") for config in ("tied", "gpt2")]
    ranks.run(check_training, world=4, cases=cases, depth=8, count=6, pp=4)


def test_training_with_frozen_parameters(ranks: Ranks) -> None:
    frozen = ["-head", "layers.0 layers.1 layers.2 embedding"]
    cases = [(name, "qwen3", words) for name in ("zb-h1", "dualpipe", "zb-v") for words in frozen]
    ranks.run(check_training, world=4, cases=cases, depth=8, count=6, pp=4)


class Constant(nn.Module):
    """Does not hear its input."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.value = nn.Parameter(torch.linspace(1, 2, width, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        """The same for every row."""
        return self.value.expand(x.shape[0], -1)


class Toy:
    """Plain layers as stages, all of them on every rank; ``kinds`` names those that are no linear layers."""

    def __init__(self, stages: int, kinds: dict[int, str] | None = None, *, even: bool = False) -> None:
        torch.manual_seed(1)
        kinds, widths = kinds or {}, [4]
        self.stages = nn.ModuleList()
        for stage in range(stages):
            into, kind = widths[-1], kinds.get(stage, "")
            out = into if kind == "same" or even else 3 + (2 * stage) % 5
            linear = nn.Sequential(nn.Linear(into, out, dtype=torch.float64), nn.Tanh())
            made = {"same": nn.Identity(), "constant": Constant(out)}
            self.stages.append(made.get(kind, linear))
            widths.append(out)
        self.widths = widths

    def __call__(self, stage: int, x: Tensor | None, rows: Tensor) -> Tensor:
        y = self.stages[stage](rows if x is None else x)
        return y.square().sum() if stage == len(self.stages) - 1 else y

    def shape(self, stage: int, rows: Tensor) -> tuple[int, int]:
        """Of the input of a stage."""
        return rows.shape[0], self.widths[stage]

    def gradients(self) -> Tensor:
        """Of all stages, one after the other."""
        found = [torch.zeros_like(p) if p.grad is None else p.grad for p in self.stages.parameters()]
        return torch.cat([gradient.reshape(-1) for gradient in found])

    def alone(self, microbatches: list[Tensor]) -> list[float]:
        """Forward and backward through all stages, on this rank."""
        losses = []
        for rows in microbatches:
            x = None
            for stage in range(len(self.stages)):
                x = self(stage, x, rows)
            assert x is not None
            x.backward()
            losses.append(float(x))
        return losses


def rows_of(count: int, even: bool = False) -> list[Tensor]:
    """Microbatches of a toy."""
    generator = torch.Generator().manual_seed(2)
    return [torch.randn(3 if even else 1 + n % 4, 4, dtype=torch.float64, generator=generator) for n in range(count)]


KINDS_OF_TOYS: list[dict[int, str]] = [{}, {0: "same", 2: "same"}, {1: "same", 2: "constant", 3: "same"}]


def check_toys(schedules: list[str]) -> None:
    """On the ranks: stages that put nothing off, of different widths, or that pass their input on."""
    mesh = Mesh.build(Layout(pp=dist.get_world_size()))
    for number, name in enumerate(schedules):
        for kinds in (KINDS_OF_TOYS[0], KINDS_OF_TOYS[1 + number % 2]):
            table, microbatches = make_schedule(name, mesh.pp.size, 5, 2 if name == "interleaved" else 1), rows_of(5)
            toy, alone = Toy(table.stages, kinds), Toy(table.stages, kinds)
            losses = alone.alone(microbatches)
            pipeline = Pipeline(mesh, toy, toy.shape, torch.float64)
            for run in (1, 2):
                outputs = pipeline.run(table, microbatches)
                assert sorted(n for row in comm.gather_json(list(outputs), mesh.pp) for n in row) == list(range(5))
                assert all(float(y) == pytest.approx(losses[n], rel=1e-12) for n, y in outputs.items())
                assert not any(y.requires_grad for y in outputs.values())
                close(comm.sum_(toy.gradients(), mesh.pp), run * alone.gradients(), f"{name}, {kinds}")


def test_stages_of_other_models(ranks: Ranks) -> None:
    ranks.run(check_toys, world=4, schedules=TRAINING)
    ranks.run(check_toys, world=2, schedules=["zb-h1", "zb-v", "dualpipe"])


def check_against_torch() -> None:
    """On the ranks: torch's own pipelines over the same stages."""
    mesh, microbatches = Mesh.build(Layout(pp=4)), rows_of(8, even=True)
    own: dict[str, tuple[Any, Callable[[int], list[int]]]] = {
        "gpipe": (theirs.ScheduleGPipe, lambda rank: [rank]),
        "1f1b": (theirs.Schedule1F1B, lambda rank: [rank]),
        "interleaved": (theirs.ScheduleInterleaved1F1B, lambda rank: [rank, rank + 4]),
        "zb-v": (ScheduleZBVZeroBubble, lambda rank: [rank, 7 - rank]),
        "dualpipev": (ScheduleDualPipeV, lambda rank: [rank, 7 - rank]),
    }
    zero = theirs.ScheduleInterleavedZeroBubble
    for name, (kind, held) in [*own.items(), ("interleaved", (zero, own["interleaved"][1]))]:
        table = make_schedule(name, 4, 8, 2 if name == "interleaved" else 1)
        assert table.stages_of(mesh.rank) == held(mesh.rank)
        toy, other = Toy(table.stages, even=True), Toy(table.stages, even=True)
        outputs = Pipeline(mesh, toy, toy.shape, torch.float64).run(table, microbatches)
        stages = [
            theirs.PipelineStage(other.stages[stage], stage, table.stages, torch.device("cpu"))
            for stage in held(mesh.rank)
        ]
        several = issubclass(kind, theirs.schedules.PipelineScheduleMulti)
        step = kind(stages if several else stages[0], 8, loss_fn=lambda y, _: y.square().sum(), scale_grads=False)
        losses: list[Tensor] = []
        ends = {"target": torch.cat(microbatches), "losses": losses} if table.stages - 1 in held(mesh.rank) else {}
        step.step(*([torch.cat(microbatches)] if mesh.rank == 0 else []), **ends)
        assert [float(outputs[n]) for n in sorted(outputs)] == pytest.approx([float(x) for x in losses], rel=1e-12)
        assert float(toy.gradients().abs().max()) > 0.01
        close(toy.gradients(), other.gradients(), f"{name} and {kind.__name__}")


def test_equal_to_the_pipelines_of_torch(ranks: Ranks) -> None:
    ranks.run(check_against_torch, world=4)


@contextlib.contextmanager
def watched(after: Callable[[Any, Action, float], None]) -> Iterator[None]:
    """Tell ``after`` of every action that the executor has carried out, with its time."""

    def wrap(handler: Callable[[Any, Action], None]) -> Callable[[Any, Action], None]:
        def handle(step: Any, action: Action) -> None:
            started = time.perf_counter()
            handler(step, action)
            after(step, action, time.perf_counter() - started)

        return handle

    handlers = executor.HANDLERS
    executor.HANDLERS = {op: wrap(handler) for op, handler in handlers.items()}
    gc.collect()
    gc.disable()  # what is let go must be free at once
    try:
        yield
    finally:
        gc.enable()
        executor.HANDLERS = handlers


def check_put_off(schedules: list[str]) -> None:
    """On the ranks: what changes the gradients of matrices, and of the rest."""
    mesh = Mesh.build(Layout(pp=dist.get_world_size()))
    for name in schedules:
        stages = stages_on(mesh, CONFIGS["gpt2"], PipelineConfig(schedule=name), 8)
        blocks = {
            cut.stage: dict(stages.model.layers[str(cut.layers[0])].named_parameters()) for cut in stages.model.cuts
        }
        before: dict[Tensor, float] = {}
        forms: dict[tuple[int, int], list[weakref.ref[Any]]] = {}
        seen: dict[str, int] = {}

        def size(parameter: Tensor) -> float:
            return 0.0 if parameter.grad is None else float(parameter.grad.abs().sum())

        def after(step: Any, action: Action, _: float) -> None:
            block, key = blocks[action.stage], (action.stage, action.microbatch)
            changed = {n.rpartition(".")[2] == "weight" and p.ndim > 1: 0 for n, p in block.items()}
            for p in block.values():
                changed[p.ndim > 1] += size(p) != before.get(p, 0.0)
                before[p] = size(p)
            matrices = sum(p.ndim > 1 for p in block.values())
            rest = len(block) - matrices
            assert matrices == 4
            expected = {"I": (0, rest), "W": (matrices, 0), "B": (matrices, rest)}
            assert (changed[True], changed[False]) == expected.get(action.op, (0, 0)), f"{name}, {action}"
            if action.op == "I":
                forms[key] = [weakref.ref(form) for _, form in step.kept[key]]
                cut = stages.cuts[action.stage]
                assert len(forms[key]) == 4 * len(cut.layers) + cut.last
            if action.op == "W":
                assert not any(form() for form in forms.pop(key)), f"{action} lets go of what was kept for it"
            assert step.kept.keys() == forms.keys()
            seen[action.op] = seen.get(action.op, 0) + 1

        with watched(after):
            stages.train(parts(8), lambda last, of, whole: None, scale=SCALE)
        assert seen["I"] == seen["W"] > 0
        assert not forms


def test_gradients_of_weights_are_put_off_until_w(ranks: Ranks) -> None:
    ranks.run(check_put_off, world=2, schedules=SPLIT)


class Held(torch.autograd.Function):
    """Copies into a tensor whose end can be seen, and holds what can be seen for backward."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, out: Tensor, until: Any) -> Tensor:
        """Both ``out`` and ``until`` are let go with the last who knows them."""
        ctx.until = until
        ctx.mark_dirty(out)
        return out.copy_(y)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        """Of ``y`` alone."""
        return grads[0], None, None


class Until:
    """Something that a weak reference can point to."""


def eventually(true: Callable[[], bool]) -> bool:
    """Whether it becomes true within a second: messages leave by themselves."""
    deadline = time.monotonic() + 1
    while not true() and time.monotonic() < deadline:
        time.sleep(0.002)
    return true()


def check_memory(schedules: list[str]) -> None:
    """On the ranks: activations live from F to B or I, outputs no longer than their backward, and all end."""
    mesh, microbatches = Mesh.build(Layout(pp=dist.get_world_size())), rows_of(9)
    for name in schedules:
        table = make_schedule(name, mesh.pp.size, 9)
        toy = Toy(table.stages)
        graphs, arrays, inputs = (dict[tuple[int, int], weakref.ref[Any]]() for _ in range(3))
        number = {id(rows): n for n, rows in enumerate(microbatches)}

        def forward(stage: int, x: Tensor | None, rows: Tensor) -> Tensor:
            y, until, key = toy(stage, x, rows), Until(), (stage, number[id(rows)])
            array = numpy.empty(tuple(y.shape))
            graphs[key], arrays[key] = weakref.ref(until), weakref.ref(array)
            if x is not None:
                inputs[key] = weakref.ref(x)
            return Held.apply(y, torch.from_numpy(array), until)

        held: set[tuple[int, int]] = set()
        most = [0]

        def after(step: Any, action: Action, _: float) -> None:
            key = action.stage, action.microbatch
            if action.op == "F":
                held.add(key)
            if action.op in "BI":
                held.remove(key)
                assert key not in inputs or inputs[key]() is None, f"{name}: {action} frees its input"
                last = action.stage == table.stages - 1
                assert last or eventually(lambda: arrays[key]() is None), f"{name}: the output that {action} is of"
            alive = {key for key, until in graphs.items() if until() is not None}
            assert alive == held, f"{name}: {action} leaves {alive}"
            most[0] = max(most[0], len(alive))

        pipeline = Pipeline(mesh, forward, toy.shape, torch.float64)
        with watched(after):
            outputs = pipeline.run(table, microbatches, trace=True)
        assert most[0] == pipeline.timeline().peak(mesh.pp.rank) == simulate(table).peak(mesh.pp.rank)
        ends = {(table.stages - 1, n) for n in outputs}
        assert eventually(lambda: {key for key, array in arrays.items() if array() is not None} <= ends), name


def test_activations_live_as_long_as_they_must(ranks: Ranks) -> None:
    ranks.run(check_memory, world=4, schedules=TRAINING)


DELAY_S = 0.03


def check_trace(schedules: list[str]) -> None:
    """On the ranks: the record of a step over slow links."""
    mesh, microbatches = Mesh.build(Layout(pp=2)), rows_of(3)
    for name in schedules:
        table = make_schedule(name, 2, 3, 2 if name == "interleaved" else 1)
        toy, blocking = Toy(table.stages), list[Action]()
        pipeline = Pipeline(mesh, toy, toy.shape, torch.float64, delay_s=DELAY_S)
        with pytest.raises(ConfigError, match="not traced"):
            pipeline.timeline()

        def after(step: Any, action: Action, seconds: float) -> None:
            if KINDS[action.op].stream != "compute" and seconds > DELAY_S / 2:
                blocking.append(action)

        with watched(after):
            pipeline.run(table, microbatches, trace=True)
        assert pipeline.links.leaving() == [], "a step ends when its messages have left"
        assert len(blocking) < 2, f"{name}: {blocking} wait"
        timeline = pipeline.timeline()
        assert [[span.action for span in row] for row in timeline.rows] == [list(row) for row in table.rows]
        ends = {span.action: (rank, span.end) for rank, row in enumerate(timeline.rows) for span in row}
        crossed = 0
        for rank, row in enumerate(timeline.rows):
            assert all(0 <= span.start <= span.end for span in row)
            assert all(one.end <= two.start for one, two in itertools.pairwise(row))
            for span in row:
                stage, op, microbatch = span.action
                need = [Action(stage + 1, "B", microbatch), Action(stage + 1, "I", microbatch)] if op in "BI" else []
                need += [Action(stage - 1, "F", microbatch)] if op == "F" else []
                for action in need:
                    if action in ends and ends[action][0] != rank:
                        assert span.start >= ends[action][1] + DELAY_S / 2, f"{name}: {span} after {action}"
                        crossed += 1
        assert crossed >= 6
        pipeline.run(table, microbatches)
        with pytest.raises(ConfigError, match="not traced"):
            pipeline.timeline()


def test_traces(ranks: Ranks) -> None:
    ranks.run(check_trace, world=2, schedules=TRAINING)


def check_posting() -> None:
    """On the ranks: receives are posted while something else is computed."""
    mesh, microbatches = Mesh.build(Layout(pp=4)), rows_of(8)
    for name in ("1f1b", "zb-h1", "zb-v"):
        table = make_schedule(name, 4, 8)
        toy, order = Toy(table.stages), list[Action]()
        with watched(lambda step, action, _: order.append(action)):
            Pipeline(mesh, toy, toy.shape, torch.float64).run(table, microbatches)
        assert tuple(order) == lower(table).rows[mesh.pp.rank]
        late = 0
        for at, (stage, op, microbatch) in enumerate(order):
            users = ("F",) if op == "RF" else ("B", "I") if op == "RB" else ()
            for user in users:
                if (action := Action(stage, user, microbatch)) in order:
                    between = order[at : order.index(action)]
                    late += not any(KINDS[other.op].stream == "compute" for other in between)
        assert late <= 2, f"{name}: {late} receives are posted when they are needed"


def test_receives_are_posted_before_they_are_needed(ranks: Ranks) -> None:
    ranks.run(check_posting, world=4)


def test_links_of_streams_forget_what_has_left() -> None:
    """With NCCL there is no thread that lets messages go."""
    links = Links(Mesh.fake(Layout(pp=2), 0))
    links.streams = True
    tensor = torch.ones(3)
    alive = weakref.ref(tensor)
    links.send(tensor, 1, 0)
    del tensor
    assert all(message.there(0.0) for message in links.leaving())
    assert links.leaving() == []
    assert alive() is None


def check_validation(cases: list[tuple[str, int, int]]) -> None:
    """On the ranks: forward passes alone, after steps of as many or other microbatches."""
    mesh = Mesh.build(Layout(pp=dist.get_world_size()))
    for schedule, count, validation in cases:
        alone = trainer_on(Mesh.single(), config="gpt2", depth=8, validation=validation)
        trainer = trainer_on(mesh, schedule, "dropout", depth=8, count=count, validation=validation)
        expected, got = alone.validate(), trainer.validate()
        assert expected is not None
        assert got is not None
        assert got[0] == pytest.approx(expected[0], rel=1e-12), f"{schedule}, {count}, {validation}"
        assert all(parameter.grad is None for parameter in trainer.model.parameters())


@pytest.mark.parametrize("world", [2, 4])
def test_validation(ranks: Ranks, world: int) -> None:
    cases = [(name, 3, validation) for name in ("1f1b", "interleaved", "zb-v", "dualpipe") for validation in (1, 5)]
    cases += [("1f1b", 1, 4), ("dualpipev", 1, 4), ("dualpipe", 1, 4)]
    ranks.run(check_validation, world=world, cases=cases)


def save_at(folder: str, schedule: str, config: str, frozen: str, layout: dict[str, int]) -> list[float]:
    """On the ranks: two steps, a checkpoint that holds them bit for bit, two more."""
    mesh = Mesh.build(Layout(**layout))
    trainer = trainer_on(mesh, schedule, config, count=4, frozen=frozen, folder=Path(folder))
    assert trainer.data is not None
    for step in (0, 1):
        trainer.step(trainer.data(step))
    trainer.save()
    saved = checkpoint.Checkpoint.open(Path(folder) / "checkpoints" / "step-00000002")
    for key, value in state(trainer).items():
        name, _, what = key.partition("|")
        assert torch.equal(value, saved.whole(name, what)), key
    return [trainer.step(trainer.data(step)).loss for step in (2, 3)]


def continue_at(folder: str, schedule: str, config: str, frozen: str, layout: dict[str, int]) -> list[float]:
    """On the ranks: somebody's checkpoint, bit for bit, and two more steps."""
    mesh = Mesh.build(Layout(**layout))
    trainer = trainer_on(mesh, schedule, config, count=4, frozen=frozen, folder=Path(folder))
    assert trainer.data is not None
    assert trainer.resume()
    assert trainer.done == 2
    saved = checkpoint.Checkpoint.open(Path(folder) / "checkpoints" / "step-00000002")
    assert saved.shards.keys() == trainer.optimizer.buckets.holders.keys()
    mine = state(trainer)
    assert not any(torch.equal(v, torch.zeros_like(v)) for k, v in mine.items() if k.endswith("exp_avg_sq"))
    for key, value in mine.items():
        name, _, what = key.partition("|")
        assert torch.equal(value, saved.whole(name, what)), key
    return [trainer.step(trainer.data(step)).loss for step in (2, 3)]


SAVED: list[tuple[str, str, str, str, dict[str, int]]] = [
    ("1f1b", "tied", "", "zb-h1", {"pp": 4}),
    ("dualpipe", "tied", "", "dualpipe", {"dp": 2, "pp": 2}),
    ("zb-v", "gpt2", "", "1f1b", {"tp": 2}),
    ("interleaved", "qwen3", "-head layers.3", "dualpipe", {"pp": 4}),
]
"""How a checkpoint is written, by pp=2 and tp=2, and how it is read, beside by those and by one device."""


@pytest.mark.parametrize(("schedule", "config", "frozen", "other", "layout"), SAVED)
def test_checkpoints_are_read_at_any_layout(
    ranks: Ranks, tmp_path: Path, schedule: str, config: str, frozen: str, other: str, layout: dict[str, int]
) -> None:
    same: dict[str, Any] = {"folder": str(tmp_path), "config": config, "frozen": frozen}
    here = {"pp": 2, "tp": 2}
    rest = ranks.run(save_at, world=4, schedule=schedule, layout=here, **same)[0]
    assert ranks.run(continue_at, world=4, schedule=schedule, layout=here, **same)[0] == rest
    world = Layout(**layout).world
    elsewhere = ranks.run(continue_at, world=world, schedule=other, layout=layout, **same)[0]
    alone = continue_at(schedule="1f1b", layout={}, **same)
    for again in (elsewhere, alone):
        torch.testing.assert_close(again, rest, rtol=1e-11, atol=0)
    assert rest[0] != rest[1]


def check_folders(folder: str, schedules: list[str], config: str) -> None:
    """On the ranks: Hugging Face folders written and read by a pipeline."""
    mesh = Mesh.build(Layout(pp=2, tp=2))
    for name in schedules:
        pipeline = PipelineConfig(schedule=name)
        stages = stages_on(mesh, CONFIGS[config], pipeline, 4)
        save_model(stages.model, mesh, Path(folder) / name)
        comm.barrier(mesh.world)
        build = Build(mesh=mesh, dtype=torch.float64, cuts=stages.model.cuts)
        loaded = load_model(Path(folder) / name, build)
        assert loaded.state_dict().keys() == stages.model.state_dict().keys()
        for key, value in loaded.state_dict().items():
            assert torch.equal(value, stages.model.state_dict()[key]), key


@pytest.mark.parametrize("config", ["tied", "qwen3"])
def test_model_folders_are_those_of_one_device(ranks: Ranks, tmp_path: Path, config: str) -> None:
    names = ["1f1b", "dualpipe", "zb-v"]
    model = build_model(CONFIGS[config], Build(mesh=Mesh.single(), dtype=torch.float64), seed=3)
    save_model(model, Mesh.single(), tmp_path / "alone")
    ranks.run(check_folders, world=4, folder=str(tmp_path), schedules=names, config=config)
    files = {path.name: path.read_bytes() for path in (tmp_path / "alone").iterdir()}
    for name in names:
        assert {path.name: path.read_bytes() for path in (tmp_path / name).iterdir()} == files
