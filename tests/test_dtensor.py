"""Tensor, sequence and loss parallelism against torch's DTensor, on two ranks in float64."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from ranks import Ranks
from test_tp_layers import CLOSE, NormOfTokens, tensor
from torch import Tensor, nn

from parallel import comm
from parallel.mesh import Axis, Layout, Mesh
from parallel.shard import finalize_gradients, param_shards
from parallel.tp import ColumnParallelLinear, ParallelLMHead, RowParallelLinear


class Plain(nn.Module):
    """What DTensor cuts by its plan: norm, feed-forward, norm, head."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(6, dtype=torch.float64)
        self.up = nn.Linear(6, 20, dtype=torch.float64)
        self.down = nn.Linear(20, 6, dtype=torch.float64)
        self.last = nn.LayerNorm(6, dtype=torch.float64)
        self.head = nn.Linear(6, 98, bias=False, dtype=torch.float64)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.last(self.down(torch.tanh(self.up(self.norm(x))))))


class Ours(nn.Module):
    """The same, with the parallel layers written in."""

    def __init__(self, axis: Axis) -> None:
        super().__init__()
        self.norm, self.last = NormOfTokens(6, axis).double(), NormOfTokens(6, axis).double()
        options: dict[str, Any] = {"sequence_parallel": True, "dtype": torch.float64}
        self.up, self.down = ColumnParallelLinear(6, 20, axis, **options), RowParallelLinear(20, 6, axis, **options)
        self.head = ParallelLMHead(98, 6, axis, **options)

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        return self.head.loss(self.last(self.down(torch.tanh(self.up(self.norm(x))))), labels, scale=1 / 11).total


def check_dtensor() -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate
    from torch.distributed.tensor import Shard as Cut
    from torch.distributed.tensor.parallel import (
        ColwiseParallel,
        RowwiseParallel,
        SequenceParallel,
        loss_parallel,
        parallelize_module,
    )

    torch.manual_seed(1)
    plain, mesh, x = Plain(), Mesh.build(Layout(tp=2)), tensor(12, 6)
    labels = torch.tensor([(7 * i) % 98 for i in range(11)] + [-100])
    ours, whole = Ours(mesh.tp), {name: p.detach().clone() for name, p in plain.named_parameters()}
    for name, shard in param_shards(ours).items():
        ours.get_parameter(name).data.copy_(shard.cut(whole[name], mesh.place))
    plan = {
        "norm": SequenceParallel(sequence_dim=0),
        "up": ColwiseParallel(input_layouts=Cut(0)),
        "down": RowwiseParallel(output_layouts=Cut(0)),
        "last": SequenceParallel(sequence_dim=0),
        "head": ColwiseParallel(input_layouts=Cut(0), output_layouts=Cut(-1), use_local_output=False),
    }
    theirs = parallelize_module(plain, init_device_mesh("cpu", (2,)), plan)
    with loss_parallel():
        loss = F.cross_entropy(theirs(x[comm.chunk(12, mesh.tp)]), labels)
        loss.backward()
    mine = ours(x[comm.chunk(12, mesh.tp)], labels)
    mine.backward()
    finalize_gradients(ours, mesh)
    torch.testing.assert_close(mine.detach(), loss.full_tensor().detach(), **CLOSE)
    for name, shard in param_shards(ours).items():
        expected = theirs.get_parameter(name).grad.redistribute(placements=[Replicate()]).to_local()
        torch.testing.assert_close(ours.get_parameter(name).grad, shard.cut(expected, mesh.place), **CLOSE)


def test_equal_to_dtensor(ranks: Ranks) -> None:
    ranks.run(check_dtensor, world=2)
