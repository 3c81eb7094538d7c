"""Cross-entropy over a cut vocabulary against plain torch in float64, with its options, alone and with the head."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from ranks import Ranks
from test_tp_layers import CLOSE, columns_of, make, rows_of, tensor
from torch import Tensor

from parallel.deferral import Deferral, settle
from parallel.errors import DataError
from parallel.mesh import Layout, Mesh
from parallel.shard import param_shards
from parallel.tp import Dense, ParallelLMHead, vocab_parallel_cross_entropy, vocab_parallel_linear_cross_entropy

LABELS = [3, -100, 96, 0, 24, 25, 49, 50, 74, 75, -100, 95, 72]


def plain_loss(logits: Tensor, labels: Tensor, smoothing: float, z: float) -> Tensor:
    loss = F.cross_entropy(logits, labels, reduction="none", label_smoothing=smoothing)
    return loss + z * logits.logsumexp(-1).square() * (labels != -100)


def check_losses() -> None:
    mesh = Mesh.build(Layout(tp=dist.get_world_size()))
    axis, labels = mesh.tp, torch.tensor(LABELS)
    shards = {n: param_shards(make(lambda a, n=n: ParallelLMHead(97, n, a), axis))["weight"] for n in (4, 16)}
    for smoothing, z in ((0.0, 0.0), (0.1, 0.0), (0.0, 1e-2), (0.2, 1e-3)):
        logits, scale = (30 * tensor(13, 97)).requires_grad_(), tensor(13, seed=3)
        loss = plain_loss(logits, labels, smoothing, z)
        loss.backward(scale)
        padded = torch.full((13, -(-97 // axis.size) * axis.size), 1e3, dtype=torch.float64)
        padded[:, :97] = logits.detach()
        own = columns_of(axis)(padded).clone().requires_grad_()
        options = {"vocabulary": 97, "label_smoothing": smoothing, "z_loss": z}
        mine = vocab_parallel_cross_entropy(own, labels, axis, **options)
        torch.testing.assert_close(mine, loss.detach(), **CLOSE)
        mine.backward(scale)
        grad = torch.zeros_like(padded)
        grad[:, :97] = logits.grad
        torch.testing.assert_close(own.grad, columns_of(axis)(grad), **CLOSE)
        for sequence, block, hidden in itertools.product((False, True), (1, 5, 512), shards):
            shard = shards[hidden]
            x, w = tensor(13, hidden).requires_grad_(), (3 * tensor(97, hidden, seed=1)).requires_grad_()
            loss = plain_loss(F.linear(x, w), labels, smoothing, z)
            (loss.sum() * 0.3 * 0.7).backward()
            own_x = (rows_of(axis)(x) if sequence else x).detach().clone().requires_grad_()
            own_w = shard.cut(w.detach(), mesh.place).requires_grad_()
            more = {"scale": 0.3, "sequence_parallel": sequence, "block": block}
            total, losses = vocab_parallel_linear_cross_entropy(own_x, own_w, labels, axis, **options, **more)
            torch.testing.assert_close(losses, loss.detach(), **CLOSE)
            torch.testing.assert_close(total.detach(), loss.detach().sum() * 0.3, **CLOSE)
            assert not losses.requires_grad
            (total * 0.7).backward()
            torch.testing.assert_close(own_x.grad, rows_of(axis)(x.grad) if sequence else x.grad, **CLOSE)
            torch.testing.assert_close(own_w.grad, shard.cut(w.grad, mesh.place), **CLOSE)


@pytest.mark.parametrize("world", [1, 2, 4])
def test_losses_equal_plain_torch(ranks: Ranks, world: int) -> None:
    ranks.run(check_losses, world=world)


def test_an_impossible_label_is_refused() -> None:
    axis = Mesh.single().tp
    for bad in (97, -1):
        labels = torch.tensor([0, bad])
        with pytest.raises(DataError, match=f"label {bad} is outside the vocabulary of 97"):
            vocab_parallel_cross_entropy(tensor(2, 97), labels, axis)
        with pytest.raises(DataError, match=f"label {bad} is outside the vocabulary of 97"):
            vocab_parallel_linear_cross_entropy(tensor(2, 4), tensor(97, 4), labels, axis)


@pytest.mark.parametrize("hidden", [8, 16])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_low_precision_loss_is_summed_in_float32(dtype: torch.dtype, hidden: int) -> None:
    axis, labels = Mesh.single().tp, torch.tensor(LABELS)
    x = tensor(13, hidden, seed=1).to(dtype).double().requires_grad_()
    w = tensor(97, hidden, seed=2).to(dtype).double().requires_grad_()
    plain_loss(F.linear(x, w), labels, 0.0, 0.0).sum().backward()
    own_x, own_w = (v.detach().to(dtype).requires_grad_() for v in (x, w))
    total, losses = vocab_parallel_linear_cross_entropy(own_x, own_w, labels, axis, block=4)
    assert losses.dtype == torch.float32
    total.backward()
    for mine, theirs in ((own_x.grad, x.grad), (own_w.grad, w.grad)):
        assert mine is not None
        assert theirs is not None
        assert mine.dtype == dtype
        assert (mine.double() - theirs).norm() < (0.02 if dtype == torch.bfloat16 else 1e-5) * theirs.norm()


class Watched(Dense):
    """Notes which gradients are formed."""

    def __init__(self) -> None:
        self.formed: list[str] = []

    def weight_gradient(self, gy_TO: Tensor, x_TI: Tensor) -> Tensor:
        self.formed.append("weight")
        return super().weight_gradient(gy_TO, x_TI)

    def input_gradient(self, gy_TO: Tensor, weight: Tensor) -> Tensor:
        self.formed.append("input")
        return super().input_gradient(gy_TO, weight)


def test_evaluation_forms_no_gradients() -> None:
    method, labels = Watched(), torch.tensor(LABELS)
    head = ParallelLMHead(97, 4, Mesh.single().tp, method=method, dtype=torch.float64)
    x = tensor(13, 4).requires_grad_()
    with torch.no_grad():
        alone = head.loss(x, labels).total
    assert method.formed == []
    assert torch.equal(head.loss(x, labels).total, alone)
    assert method.formed == ["input", "weight"]


def test_few_tokens_leave_the_products_to_backward_which_may_put_them_off() -> None:
    method, deferral, labels = Watched(), Deferral(), torch.tensor(LABELS)
    head = ParallelLMHead(97, 16, Mesh.single().tp, method=method, deferral=deferral, dtype=torch.float64)
    x = tensor(13, 16).requires_grad_()
    loss = head.loss(x, labels).total
    assert method.formed == []
    with deferral.keep() as kept:
        loss.backward()
    assert method.formed == ["input"]
    assert head.weight.grad is None
    settle(kept)
    assert method.formed == ["input", "weight"]
    expected = head.weight.detach().clone().requires_grad_()
    plain_loss(F.linear(x.detach(), expected), labels, 0.0, 0.0).sum().backward()
    torch.testing.assert_close(head.weight.grad, expected.grad, **CLOSE)
