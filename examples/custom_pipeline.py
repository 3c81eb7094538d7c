"""Your own model in a pipeline: stages of a few layers each, any schedule, a plain torch optimizer.

    python examples/custom_pipeline.py                                          one process
    torchrun --nproc-per-node 2 examples/custom_pipeline.py zb-h1               pp = 2, the same losses
    torchrun --nproc-per-node 2 examples/custom_pipeline.py zb-v                pp = 2 with two stages a rank

Nothing of the trainer is used: your modules, your loss, your optimizer.
"""

from __future__ import annotations

import os
import sys

import torch
import torch.distributed as dist
from torch import Tensor, nn

from parallel import comm
from parallel.deferral import Deferral
from parallel.mesh import Axis, Layout, Mesh
from parallel.pp import make_schedule
from parallel.pp.run import Pipeline
from parallel.tp import ColumnParallelLinear

LAYERS, SIZE, MICROBATCHES = 8, 24, 6


class Layer(nn.Module):
    """``x + tanh(W x)``. The linear layer asks ``deferral`` whether its weight's gradient may wait."""

    def __init__(self, axis: Axis, deferral: Deferral, index: int) -> None:
        super().__init__()
        torch.manual_seed(index)  # the same weights wherever the layer is
        self.linear = ColumnParallelLinear(SIZE, SIZE, axis, deferral=deferral)

    def forward(self, x_TD: Tensor) -> Tensor:
        """(T, D) -> (T, D)."""
        return x_TD + torch.tanh(self.linear(x_TD))


def main() -> None:
    """Train for 30 steps; print the loss now and then."""
    if "RANK" in os.environ:
        dist.init_process_group("gloo")
    mesh = Mesh.build(Layout(pp=dist.get_world_size() if dist.is_initialized() else 1))
    schedule = make_schedule(sys.argv[1] if len(sys.argv) > 1 else "1f1b", mesh.pp.size, MICROBATCHES)
    deferral = Deferral()
    each = LAYERS // schedule.stages
    stages = nn.ModuleDict(
        {
            str(stage): nn.Sequential(*(Layer(mesh.tp, deferral, stage * each + layer) for layer in range(each)))
            for stage in schedule.stages_of(mesh.pp.rank)
        }
    )
    generator = torch.Generator().manual_seed(0)
    inputs = [torch.randn(5 + index, SIZE, generator=generator) for index in range(MICROBATCHES)]
    count = sum(x_TD.numel() for x_TD in inputs)

    def forward(stage: int, x_TD: Tensor | None, microbatch: int) -> Tensor:
        """The first stage reads its microbatch; the last gives the loss, a share of the mean over all microbatches."""
        y_TD = stages[str(stage)](inputs[microbatch] if x_TD is None else x_TD)
        return y_TD if stage < schedule.stages - 1 else (y_TD - inputs[microbatch].flip(1)).square().sum() / count

    pipeline = Pipeline(mesh, forward, lambda stage, microbatch: inputs[microbatch].shape, deferral=deferral)
    optimizer = torch.optim.AdamW(stages.parameters(), lr=1e-2)
    for step in range(30):
        optimizer.zero_grad()
        losses = pipeline.run(schedule, range(MICROBATCHES))
        optimizer.step()
        loss = comm.sum_(torch.tensor([float(value) for value in losses.values()]).sum(), mesh.pp)
        if mesh.rank == 0 and step % 10 == 9:
            print(f"step {step + 1}: loss {float(loss):.6f}")
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
