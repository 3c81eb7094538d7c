"""Quantized gathers and reductions, the secondary partition, and the largest values with error feedback."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from parallel import comm
from parallel.config import resolve
from parallel.errors import ConfigError
from parallel.mesh import Layout, Mesh
from tests.test_trainer import batches
from tests.test_zero import trainer_on
from zero.compress import BLOCK, TopK, pack, packed_bytes, start_reduce_scatter, unpack
from zero.optimizer import OptimizerConfig, ZeroConfig

LARGEST = {8: 127, 4: 7}


def bound(x: Tensor, bits: int) -> Tensor:
    """Half a scale, for every value of a vector; a little more for the rounding of the product."""
    parts = [part.abs().max() / LARGEST[bits] * torch.ones_like(part) for part in x.split(BLOCK)]
    return torch.cat(parts) / 2 * (1 + 1e-5)


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("count", [1, 2, 255, 256, 257, 1001])
def test_integers_are_off_by_half_a_scale_at_most(bits: int, count: int) -> None:
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        x = torch.randn(3, count, generator=torch.Generator().manual_seed(count)).to(dtype)
        x[1] *= 1e4
        x[2] = 0
        message = pack(x.double() if dtype == torch.float64 else x.float(), bits)
        assert message.shape == (3, packed_bytes(count, bits))
        back = unpack(message, count, bits, torch.float64)
        for row, whole in zip(back, x.double(), strict=True):
            assert bool(((row - whole).abs() <= bound(whole, bits)).all())
        assert int(back[0].unique().numel()) > min(count // 4, 5)


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_what_is_not_finite_does_not_become_a_number(bits: int, bad: float) -> None:
    x = torch.ones(1, 600)
    x[0, 300] = bad
    back = unpack(pack(x, bits), 600, bits, torch.float32)[0]
    assert not bool(torch.isfinite(back[300]))
    assert torch.equal(back[:256], torch.ones(256))


def reduced(bits: int) -> tuple[float, bool, int]:
    """On the ranks: the worst error over its bound, whether something was rounded, and the bytes of the message."""
    mesh = Mesh.build(Layout(dp=4))
    each = 1001
    all_ = [torch.randn(4 * each, generator=torch.Generator().manual_seed(r)) * 10**r for r in range(4)]
    own = slice(mesh.data.rank * each, (mesh.data.rank + 1) * each)
    mesh.ledger.reset()
    result = start_reduce_scatter(all_[mesh.data.rank], mesh.data, bits).wait()
    sent = mesh.ledger.payload("all_to_all", "data")
    parts = [x[own].double() for x in all_]
    allowed = sum((bound(part, bits) for r, part in enumerate(parts) if r != mesh.data.rank), torch.zeros(each))
    error = (result.double() - torch.stack(parts).sum(0)).abs()
    return float((error / (allowed + 1e-3)).max()), bool(error.max() > 1e-3), sent


@pytest.mark.parametrize("bits", [8, 4])
def test_reduction_is_within_its_bound(ranks: Any, bits: int) -> None:
    for ratio, rounded, sent in ranks.run(reduced, world=4, bits=bits):
        assert ratio <= 1
        assert rounded
        assert sent == 4 * packed_bytes(1001, bits)


def trained(zero: dict[str, Any], layout: dict[str, int], kind: str = "float64", steps: int = 3) -> dict[str, Any]:
    """On the ranks: the loss after some steps on one batch; bytes of the last step by operation and axis; weights."""
    mesh = Mesh.build(Layout(**layout))
    optimizer = OptimizerConfig(lr=1e-2, clip=0.5, bucket_mb=0.05)
    trainer = trainer_on(mesh, ZeroConfig(**zero), dtype=getattr(torch, kind), optimizer=optimizer)
    for _ in range(steps):
        mesh.ledger.reset()
        loss = trainer.step(batches(0, mesh.data.rank, mesh.data.size)).loss
    operations = ("all_gather", "reduce_scatter", "all_to_all", "all_reduce")
    moved = {
        f"{operation} {axis}": mesh.ledger.payload(operation, axis)
        for operation in operations
        for axis in ("data", "data/2")
    }
    norms = [float(p.double().sum()) for n, p in trainer.optimizer.pieces("master") if p.ndim == 1]
    return {"loss": loss, "moved": moved, "norms": norms}


def test_quantized_weights_and_gradients_learn(ranks: Any) -> None:
    """After 15 steps on one batch the loss is far down, and that of exact training within 3 % of the way."""
    exact = ranks.run(trained, zero={"stage": 3}, layout={"dp": 2}, kind="float32", steps=15)[0]
    first = ranks.run(trained, zero={"stage": 3}, layout={"dp": 2}, kind="float32", steps=1)[0]
    way = first["loss"] - exact["loss"]
    assert way > 1
    for zero, gather, reduce in (
        ({"quantize_weights": True, "gradient_bits": 8}, 1, 1),
        ({"gradient_bits": 4}, 4, 0.5),
    ):
        found = ranks.run(trained, zero={"stage": 3, **zero}, layout={"dp": 2}, kind="float32", steps=15)[0]
        assert 0 < abs(found["loss"] - exact["loss"]) < 0.03 * way
        ratio = found["moved"]["all_gather data"] / exact["moved"]["all_gather data"]
        assert gather / 4 <= ratio < gather / 4 * 1.05
        ratio = found["moved"]["all_to_all data"] / exact["moved"]["reduce_scatter data"]
        assert reduce / 4 <= ratio < reduce / 4 * 1.06
        assert found["moved"]["reduce_scatter data"] == 0


def test_quantized_gather_of_bf16_is_half(ranks: Any) -> None:
    zero, layout = {"stage": 3}, {"dp": 2}
    exact, found = (
        ranks.run(trained, zero=zero | more, layout=layout, kind="bfloat16", steps=2)[0]["moved"]["all_gather data"]
        for more in ({}, {"quantize_weights": True})
    )
    assert exact / 2 < found < 1.05 * exact / 2


def gathered() -> tuple[float, bool, bool]:
    """On the ranks: the worst error of gathered weights over its bound, and whether masters and ranks agree."""
    mesh = Mesh.build(Layout(dp=2))
    trainer = trainer_on(mesh, ZeroConfig(stage=3, quantize_weights=True), dtype=torch.float32)
    optimizer = trainer.optimizer
    before = [bucket.master.clone() for bucket in optimizer.buckets.buckets]
    ratio, same = 0.0, True
    with optimizer.whole():
        for bucket in optimizer.buckets.buckets:
            own = bucket.values[bucket.own]
            error, allowed = (own - bucket.master).abs(), bound(bucket.master, 8)
            ratio = max(ratio, float((error / (allowed + 1e-12)).max()))
            sums = mesh.data.size * bucket.values.double()
            both = bucket.values.double().clone()
            same &= torch.equal(comm.sum_(both, mesh.data), sums)
    return ratio, same, all(torch.equal(a, b.master) for a, b in zip(before, optimizer.buckets.buckets, strict=True))


def test_gathered_weights_are_within_their_bound(ranks: Any) -> None:
    for ratio, same, untouched in ranks.run(gathered, world=2):
        assert 0.1 < ratio <= 1.001
        assert same
        assert untouched


def test_secondary_partition_changes_traffic_only(ranks: Any) -> None:
    """Forward gathers over four ranks, backward over two: the same bits, half of the bytes near by."""
    layout = {"dp": 4}
    plain, second = (
        ranks.run(trained, world=4, zero={"stage": 3, "ahead": 0} | more, layout=layout)
        for more in ({}, {"secondary": 2})
    )
    for a, b in zip(plain, second, strict=True):
        assert a["loss"] == b["loss"]
        assert a["norms"] == b["norms"]
        far, near = b["moved"]["all_gather data"], b["moved"]["all_gather data/2"]
        assert a["moved"]["all_gather data/2"] == 0
        assert far == near == a["moved"]["all_gather data"] / 2


@pytest.mark.parametrize("zero", [{"stage": 1, "gradient_bits": 4}, {"stage": 1, "top_k": 0.1}], ids=str)
def test_what_tensor_ranks_hold_alike_stays_alike(ranks: Any, zero: dict[str, Any]) -> None:
    """Norm weights are whole on both tensor ranks, among other neighbours: compressed they would drift apart."""
    layout = {"dp": 2, "tp": 2, "sequence_parallel": False}
    found = [result["norms"] for result in ranks.run(trained, world=4, zero=zero, layout=layout)]
    assert found[0] == found[1] == found[2] == found[3]


def feedback(stage: int) -> tuple[bool, bool, float]:
    """On the ranks: whether sent and kept are the gradient to the bit, over three steps; and the share sent."""
    mesh = Mesh.build(Layout(dp=2))
    axis, length = mesh.data, 200
    own = slice(0, length) if stage == 0 else slice(axis.rank * 100, axis.rank * 100 + 100)
    sender = [TopK(torch.zeros(length).double(), 0.05) for _ in range(2)]
    exact = total = True
    for step in range(3):
        grads = [torch.randn(length, generator=torch.Generator().manual_seed(10 * step + r)).double() for r in range(2)]
        before, rest = [top.kept.clone() for top in sender], [grad.clone() for grad in grads]
        arrived = sender[axis.rank].start(rest[axis.rank], axis, own).wait()
        other = 1 - axis.rank
        sender[other].start(rest[other], Mesh.single().data, slice(0, length))
        sent = [g + k - r for g, k, r in zip(grads, before, rest, strict=True)]
        for r in range(2):
            chosen = rest[r] == 0
            exact &= int(chosen.sum()) == 10 and torch.equal(torch.where(chosen, 0.0, grads[r] + before[r]), rest[r])
            least = sent[r][chosen].abs().min()
            exact &= bool(rest[r].abs().max() <= least)
        total &= torch.equal(arrived, sum(sent, torch.zeros(length).double())[own])
        for r in range(2):
            sender[r].keep(rest[r])
    return exact, total, sender[axis.rank].count / length


@pytest.mark.parametrize("stage", [0, 1])
def test_sent_and_kept_are_the_gradient(ranks: Any, stage: int) -> None:
    for exact, total, share in ranks.run(feedback, world=2, stage=stage):
        assert exact
        assert total
        assert share == 0.05


@pytest.mark.parametrize("stage", [0, 1])
def test_training_on_the_largest_values(ranks: Any, stage: int) -> None:
    """A fifth of every gradient, the rest later: the loss comes within 15 % of the way of exact training."""
    options = {"layout": {"dp": 2}, "kind": "float32"}
    first, exact = (ranks.run(trained, zero={"stage": stage}, steps=n, **options)[0] for n in (1, 20))
    found = ranks.run(trained, zero={"stage": stage, "top_k": 0.2}, steps=20, **options)[0]
    assert abs(found["loss"] - exact["loss"]) < 0.15 * (first["loss"] - exact["loss"])
    key = "all_reduce data" if stage == 0 else "reduce_scatter data"
    gathered = found["moved"]["all_gather data"] - (exact["moved"]["all_gather data"] if stage else 0)
    assert abs(gathered / exact["moved"][key] - 2 * 0.2 * 2) < 0.05


def skipped() -> list[bool]:
    """On the ranks: after a step with a gradient that is not a number, whether what was kept is as before."""
    mesh = Mesh.build(Layout(dp=2))
    trainer = trainer_on(mesh, ZeroConfig(stage=1, top_k=0.1))
    trainer.step(batches(0, mesh.data.rank, 2))
    tops = [b.top for b in trainer.optimizer.buckets.buckets if b.top is not None]
    before = [top.kept.clone() for top in tops]
    weight = next(trainer.model.parameters())
    hook = weight.register_hook(lambda grad: grad * float("nan") if mesh.data.rank else grad)
    metrics = trainer.step(batches(1, mesh.data.rank, 2))
    hook.remove()
    same = all(torch.equal(top.kept, kept) for top, kept in zip(tops, before, strict=True))
    after = trainer.step(batches(2, mesh.data.rank, 2))
    return [metrics.skipped, same, any(bool(kept.any()) for kept in before), not after.skipped]


def test_a_skipped_step_keeps_what_was_kept(ranks: Any) -> None:
    for found in ranks.run(skipped, world=2):
        assert all(found), found


def test_impossible_combinations_are_refused_with_the_nearest() -> None:
    for table, words in (
        ({"stage": 1, "quantize_weights": True}, "quantize_weights at stage 1 nearest 3"),
        ({"gradient_bits": 8}, "gradient_bits at stage 0 nearest 1"),
        ({"stage": 2, "secondary": 2}, "secondary at stage 2 nearest 3"),
        ({"stage": 2, "top_k": 0.1}, "top_k at stage 2 nearest 1"),
        ({"stage": 1, "top_k": 0.1, "gradient_bits": 8}, "top_k and gradient_bits"),
        ({"stage": 2, "offload": "parameters"}, "offload = parameters optimizer"),
        ({"stage": 1, "gradient_bits": 5}, "gradient_bits = 5 8, 4"),
        ({"top_k": 1.5}, "top_k = 1.5"),
        ({"offload": "disk"}, "offload 'disk'"),
    ):
        with pytest.raises(ConfigError) as error:
            resolve(ZeroConfig(), table)
        for word in words.split():
            assert word in str(error.value)
    assert list(ZeroConfig(stage=3, secondary=3).misfits(4)) == [
        "secondary = 3 does not divide 4 ranks that share state; the nearest that works is 2"
    ]
    assert not list(ZeroConfig(stage=3, secondary=2, shard_size=2).misfits(4))
    assert not list(ZeroConfig(stage=3, secondary=-1, shard_size=-2).misfits(4)), "refused elsewhere"
