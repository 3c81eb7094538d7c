"""The training loop: equal to a plain torch loop, equal at every layout, and exact when it is continued."""

from __future__ import annotations

import json
import math
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from parallel.errors import CheckpointError, RunFolderError
from parallel.mesh import Layout, Mesh
from parallel.models.batch import IGNORE, Batch
from parallel.models.build import Build
from parallel.models.config import DecoderConfig
from parallel.models.decoder import Decoder, build_model
from parallel.shard import gather_whole
from zero import checkpoint
from zero.metrics import MetricsLog, training_flops
from zero.optimizer import OptimizerConfig, ZeroOptimizer
from zero.run import RunFolder
from zero.schedule import ScheduleConfig
from zero.trainer import Trainer, TrainerConfig

CONFIG = DecoderConfig(
    vocabulary=97, hidden=24, layers=2, heads=4, kv_heads=2, head_size=6, feed_forward=36, qk_norm=True, family="qwen3"
)
OPTIMIZER = OptimizerConfig(lr=3e-3, clip=0.5, bucket_mb=0.004)


def batches(step: int, rank: int = 0, size: int = 1, microbatches: int = 1) -> list[Batch]:
    """Eight odd documents a step, the same whatever the layout, cut into equal parts."""
    generator = torch.Generator().manual_seed(100 + step)
    ids = torch.randint(0, 97, (8, 12), generator=generator)
    lengths = [11, 4, 7, 11, 3, 9, 5, 8]
    each = 8 // (size * microbatches)
    parts = []
    for microbatch in range(microbatches):
        first = (microbatch * size + rank) * each
        rows = range(first, first + each)
        labels = [ids[row, 1 : lengths[row] + 1].clone() for row in rows]
        for label in labels:
            label[0] = IGNORE
        parts.append(Batch.pack([ids[row, : lengths[row]] for row in rows], labels, first_index=first * 12, key=step))
    return parts


def trainer_on(
    mesh: Mesh, *, dtype: torch.dtype = torch.float64, config: DecoderConfig = CONFIG, **options: Any
) -> Trainer:
    """A trainer of the small model."""
    microbatches = options.pop("microbatches", 1)
    model = build_model(config, Build(mesh=mesh, dtype=dtype, seed=5), seed=3)
    return Trainer(
        model,
        ZeroOptimizer(model, mesh, options.pop("optimizer", OPTIMIZER)),
        mesh,
        steps=options.pop("steps", 5),
        config=options.pop("loop", None),
        data=lambda step: batches(step, mesh.data.rank, mesh.data.size, microbatches),
        **options,
    )


def weights(trainer: Trainer) -> dict[str, Tensor]:
    """The whole master weights."""
    shards = trainer.optimizer.buckets.shards
    return {
        name: gather_whole(piece, shards[name], trainer.mesh).clone()
        for name, piece in trainer.optimizer.pieces("master")
    }


def plain_loop(steps: int) -> tuple[list[float], list[float], dict[str, Tensor]]:
    """The same training written with torch alone: mean loss, clip_grad_norm_, AdamW."""
    model = build_model(CONFIG, Build(mesh=Mesh.single(), dtype=torch.float64), seed=3)
    matrices = [p for p in model.parameters() if p.ndim > 1]
    vectors = [p for p in model.parameters() if p.ndim <= 1]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}],
        lr=3e-3,
        betas=(0.9, 0.95),
    )
    losses, norms = [], []
    for step in range(steps):
        (batch,) = batches(step)
        assert batch.labels_T is not None
        loss = nn.functional.cross_entropy(model(batch), batch.labels_T, ignore_index=IGNORE)
        optimizer.zero_grad()
        loss.backward()
        norms.append(float(nn.utils.clip_grad_norm_(model.parameters(), 0.5)))
        optimizer.step()
        losses.append(loss.item())
    return losses, norms, {name: p.detach().clone() for name, p in model.named_parameters()}


def check_against_plain(tp: int, dp: int, sequence_parallel: bool, microbatches: int, reference: str) -> float:
    """On the ranks: train five steps at a layout, and compare with what the plain loop left in a file."""
    layout = Layout(tp=tp, dp=dp, sequence_parallel=sequence_parallel)
    trainer = trainer_on(Mesh.build(layout), microbatches=microbatches)
    expected = load_file(reference)
    for step in range(5):
        metrics = trainer.step(trainer.data(step) if trainer.data else [])
        torch.testing.assert_close(metrics.loss, float(expected["losses"][step]), rtol=1e-11, atol=0)
        torch.testing.assert_close(metrics.grad_norm, float(expected["norms"][step]), rtol=1e-8, atol=0)
    for name, weight in weights(trainer).items():
        torch.testing.assert_close(weight, expected[name], rtol=1e-9, atol=1e-11)
    for parameter in trainer.model.parameters():
        assert parameter.grad is None
    return metrics.tokens


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> str:
    """What five steps of the plain loop leave."""
    path = tmp_path_factory.mktemp("plain") / "reference.safetensors"
    losses, norms, values = plain_loop(5)
    curves = {"losses": torch.tensor(losses, dtype=torch.float64), "norms": torch.tensor(norms, dtype=torch.float64)}
    save_file({**curves, **values}, path)
    return str(path)


@pytest.mark.parametrize(
    ("tp", "dp", "sequence_parallel", "microbatches"),
    [
        (1, 1, True, 1),
        (1, 1, True, 4),
        (2, 1, True, 1),
        (2, 1, False, 2),
        (1, 2, True, 2),
        (2, 2, True, 2),
        (4, 1, True, 1),
    ],
)
def test_equal_to_a_plain_loop(
    ranks: Any, reference: str, tp: int, dp: int, sequence_parallel: bool, microbatches: int
) -> None:
    results = ranks.run(
        check_against_plain,
        world=tp * dp,
        tp=tp,
        dp=dp,
        sequence_parallel=sequence_parallel,
        microbatches=microbatches,
        reference=reference,
    )
    assert results == [5 * (11 + 4 + 7 + 11 + 3 + 9 + 5 + 8 - 8)] * (tp * dp)


def count_early_reductions() -> int:
    """On the ranks: how many buckets were on their way when backward of the last microbatch ended."""
    trainer = trainer_on(Mesh.build(Layout(dp=2)))
    optimizer = trainer.optimizer
    optimizer.begin()
    optimizer.expect_last(False)
    first, last = batches(0, trainer.mesh.dp.rank, 2, microbatches=2)
    trainer.model.loss(first).total.backward()
    assert all(bucket.pending is None for bucket in optimizer.buckets.buckets)
    optimizer.expect_last(True)
    trainer.model.loss(last).total.backward()
    early = sum(bucket.pending is not None for bucket in optimizer.buckets.buckets)
    optimizer.step()
    return early - len(optimizer.buckets.buckets)


def test_buckets_are_reduced_while_backward_goes_on(ranks: Any) -> None:
    assert ranks.run(count_early_reductions, world=2) == [0, 0]


def test_bucket_size_changes_nothing() -> None:
    results = []
    for size in (0.001, 100.0):
        trainer = trainer_on(Mesh.single(), optimizer=OptimizerConfig(bucket_mb=size, clip=0))
        trainer.step(batches(0))
        results.append((len(trainer.optimizer.buckets.buckets), weights(trainer)))
    assert results[0][0] > results[1][0] == 1
    for name, weight in results[0][1].items():
        assert torch.equal(weight, results[1][1][name])


def test_gradients_that_are_not_finite_change_nothing() -> None:
    trainer = trainer_on(Mesh.single())
    before = weights(trainer)
    trainer.optimizer.begin()
    trainer.optimizer.expect_last(True)
    (trainer.model.loss(batches(0)[0]).total * float("inf")).backward()
    assert not math.isfinite(trainer.optimizer.step())
    assert all(torch.equal(before[name], weight) for name, weight in weights(trainer).items())
    assert trainer.step(batches(0)).skipped is False


def deterministic(path: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl without what a clock says."""
    timed = {"seconds", "tokens_per_second", "mfu", "peak_memory"}
    return [{k: v for k, v in json.loads(line).items() if k not in timed} for line in path.read_text().splitlines()]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_run_that_is_interrupted_continues_bit_for_bit(tmp_path: Path, dtype: torch.dtype) -> None:
    dropped = DecoderConfig(
        vocabulary=97,
        hidden=24,
        layers=2,
        heads=4,
        embedding_dropout=0.1,
        residual_dropout=0.1,
        attention_dropout=0.1,
        tied=True,
    )

    def run(folder: str, stop_before: int) -> Trainer:
        asked = iter(range(100))
        trainer = trainer_on(
            Mesh.single(),
            dtype=dtype,
            config=dropped,
            steps=6,
            schedule=ScheduleConfig(kind="cosine", warmup=2),
            validation=lambda: batches(50),
            bytes_per_token=2.0,
            folder=RunFolder(tmp_path / folder),
            stop=lambda: next(asked) == stop_before,
        )
        trainer.resume()
        trainer.run()
        return trainer

    for folder in ("whole", "parts"):
        (tmp_path / folder).mkdir()
    whole = run("whole", 100)
    assert run("parts", 2).done == 2
    assert run("parts", 1).done == 3
    parts = run("parts", 100)
    assert parts.done == whole.done == 6
    assert deterministic(tmp_path / "whole" / "metrics.jsonl") == deterministic(tmp_path / "parts" / "metrics.jsonl")
    assert "bits_per_byte" in deterministic(tmp_path / "whole" / "metrics.jsonl")[-1]
    ours = {fragment.key: fragment.values for fragment in parts.optimizer.state()}
    for fragment in whole.optimizer.state():
        assert torch.equal(fragment.values, ours[fragment.key]), fragment.key


def save_at(tp: int, dp: int, folder: str) -> list[float]:
    """On the ranks: three steps, a checkpoint, two more steps."""
    trainer = trainer_on(Mesh.build(Layout(tp=tp, dp=dp)), folder=RunFolder(Path(folder)))
    losses = [trainer.step(trainer.data(step)).loss for step in range(3) if trainer.data]
    trainer.save()
    return losses + [trainer.step(trainer.data(step)).loss for step in (3, 4) if trainer.data]


def continue_at(tp: int, dp: int, folder: str) -> list[float]:
    """On the ranks: continue somebody's checkpoint for two steps; its state must be the saved one, bit for bit."""
    trainer = trainer_on(Mesh.build(Layout(tp=tp, dp=dp)), folder=RunFolder(Path(folder)))
    assert trainer.resume()
    assert trainer.done == 3
    saved = checkpoint.Checkpoint.open(Path(folder) / "checkpoints" / "step-00000003")
    for what in ("master", "exp_avg", "exp_avg_sq"):
        for name, piece in trainer.optimizer.pieces(what):
            shard = trainer.optimizer.buckets.shards[name]
            assert torch.equal(gather_whole(piece, shard, trainer.mesh), saved.whole(name, what)), (name, what)
    return [trainer.step(trainer.data(step)).loss for step in (3, 4) if trainer.data]


@pytest.mark.parametrize(("before", "after"), [((2, 1), (1, 2)), ((1, 1), (4, 1)), ((4, 1), (2, 2))])
def test_a_checkpoint_is_read_at_any_layout(
    ranks: Any, tmp_path: Path, before: tuple[int, int], after: tuple[int, int]
) -> None:
    losses = ranks.run(save_at, world=before[0] * before[1], tp=before[0], dp=before[1], folder=str(tmp_path))[0]
    again = ranks.run(continue_at, world=after[0] * after[1], tp=after[0], dp=after[1], folder=str(tmp_path))[0]
    torch.testing.assert_close(again, losses[3:], rtol=1e-11, atol=0)


def test_damaged_checkpoints_are_refused_by_name(tmp_path: Path) -> None:
    trainer = trainer_on(Mesh.single(), folder=RunFolder(tmp_path))
    trainer.step(batches(0))
    trainer.save()
    folder = tmp_path / "checkpoints" / "step-00000001"
    file = folder / "rank-00000.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(CheckpointError, match=r"rank-00000\.safetensors: damaged"):
        trainer_on(Mesh.single(), folder=RunFolder(tmp_path)).resume()
    file.unlink()
    with pytest.raises(CheckpointError, match=r"rank-00000\.safetensors: missing"):
        trainer_on(Mesh.single(), folder=RunFolder(tmp_path)).resume()
    (folder / "manifest.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"manifest\.json"):
        trainer_on(Mesh.single(), folder=RunFolder(tmp_path)).resume()


def test_checkpoints_hold_what_was_never_updated_and_what_is_frozen(tmp_path: Path) -> None:
    def frozen(seed: int) -> Trainer:
        model = build_model(CONFIG, Build(mesh=Mesh.single(), dtype=torch.float64), seed=seed)
        model.embedding.weight.requires_grad_(False)
        folder = RunFolder(tmp_path)
        return Trainer(model, ZeroOptimizer(model, Mesh.single(), OPTIMIZER), Mesh.single(), steps=9, folder=folder)

    one, two = frozen(1), frozen(2)
    one.save()
    assert two.resume()
    assert torch.equal(one.model.embedding.weight, two.model.embedding.weight)
    assert one.step(batches(0)).loss == two.step(batches(0)).loss
    assert one.step(batches(1)).loss == two.step(batches(1)).loss
    saved = checkpoint.Checkpoint.open(tmp_path / "checkpoints" / "step-00000000")
    assert torch.equal(saved.whole("embedding.weight"), two.model.embedding.weight)
    with pytest.raises(CheckpointError, match="exp_avg"):
        saved.whole("embedding.weight", "exp_avg")


def test_checkpoints_beyond_the_latest_are_of_a_past_that_was_left(tmp_path: Path) -> None:
    loop = TrainerConfig(save_every=1, keep=1)
    trainer = trainer_on(Mesh.single(), steps=1, folder=RunFolder(tmp_path), loop=loop)
    (tmp_path / "checkpoints" / "step-00000020").mkdir(parents=True)
    trainer.run()  # at whose end what was taken out is removed
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["latest", "step-00000001"]


def test_a_checkpoint_of_another_model_is_refused(tmp_path: Path) -> None:
    trainer = trainer_on(Mesh.single(), folder=RunFolder(tmp_path))
    trainer.step(batches(0))
    trainer.save()
    other = DecoderConfig(vocabulary=97, hidden=24, layers=1, heads=4)
    with pytest.raises(CheckpointError) as caught:
        trainer_on(Mesh.single(), config=other, folder=RunFolder(tmp_path)).resume()
    assert any("layers.1" in problem for problem in caught.value.problems)


def test_old_checkpoints_are_removed_once_a_new_one_stands(tmp_path: Path) -> None:
    trainer = trainer_on(Mesh.single(), steps=5, folder=RunFolder(tmp_path), loop=TrainerConfig(save_every=1, keep=2))
    trainer.run()
    names = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert names == ["latest", "step-00000004", "step-00000005"]


def test_a_run_folder_has_one_holder(tmp_path: Path) -> None:
    first = RunFolder(tmp_path / "run")
    first.hold()
    with pytest.raises(RunFolderError, match="another run holds"):
        RunFolder(tmp_path / "run").hold()
    first.release()
    RunFolder(tmp_path / "run").hold()


def test_another_recipe_in_the_same_folder_is_refused_with_every_difference(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    folder.write_config("seed = 1\nsteps = 5\n[optimizer]\nlr = 0.1\n")
    folder.check({"seed": 2}, [])  # nothing has begun here
    folder.metrics.write_text("{}\n")
    with pytest.raises(RunFolderError) as caught:
        folder.check({"seed": 2, "steps": 9, "optimizer": {"lr": 0.2}}, ["steps"])
    assert len(caught.value.problems) == 2
    assert "optimizer.lr was 0.1, now 0.2" in caught.value.problems[0]
    folder.check({"seed": 1, "steps": 9, "optimizer": {"lr": 0.1}}, ["steps"])


def test_metrics_after_the_checkpoint_are_cut_off(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n{"step": 3}\n{"ste')
    MetricsLog(path, 2).close()
    assert path.read_text() == '{"step": 1}\n{"step": 2}\n'


@pytest.mark.parametrize("kind", ["cosine", "linear", "wsd", "constant"])
def test_schedules(kind: Any) -> None:
    schedule = ScheduleConfig(kind=kind, warmup=10, floor=0.2, decay=20)
    rates = [schedule.factor(step, 100) for step in range(100)]
    assert rates[:10] == [pytest.approx((step + 1) / 10) for step in range(10)]
    if kind == "constant":
        assert set(rates[10:]) == {1.0}
        return
    assert rates[99] == pytest.approx(0.2)
    assert all(a >= b for a, b in pairwise(rates[9:]))
    middle = {"cosine": 0.6, "linear": 0.6, "wsd": 1.0}[kind]
    assert rates[54] == pytest.approx(middle)
    if kind == "wsd":
        assert rates[79] == 1.0
        assert rates[89] == pytest.approx(0.6)


def test_flops_are_those_that_torch_counts() -> None:
    config = DecoderConfig(vocabulary=50, hidden=32, layers=3, heads=4, kv_heads=2, feed_forward=48).resolved()
    model = build_model(config, Build(mesh=Mesh.single(), dtype=torch.float64))
    batch = Batch.pack([torch.arange(20)] * 2, [torch.arange(20)] * 2)
    with FlopCounterMode(display=False) as counter:
        model.loss(batch).total.backward()
    counted = counter.get_flop_counts()["Global"]
    weights_alone = training_flops(config, [batch]) - 6.0 * 3 * 32 * 2 * 20**2
    assert counted[torch.ops.aten.mm] == weights_alone
    scores = 2 * 2 * 20**2 * 32 * 3  # one product of attention, with the half that the causal formula leaves out
    assert (
        counted[torch.ops.aten.bmm] + counted[torch.ops.aten.baddbmm] == 4 * scores
    )  # two more, in place, not counted


def test_the_model_stays_usable_after_the_optimizer_took_its_parameters() -> None:
    trainer = trainer_on(Mesh.single(), dtype=torch.bfloat16)
    model: Decoder = trainer.model
    before = model(batches(0)[0]).clone()
    trainer.step(batches(0))
    assert not torch.equal(before, model(batches(0)[0]))
    assert all(p.dtype == torch.bfloat16 for p in model.parameters())
    assert all(bucket.master.dtype == torch.float32 for bucket in trainer.optimizer.buckets.buckets)
