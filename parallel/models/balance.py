"""What the ends of a model cost against one of its blocks, measured, so that stages can be cut by time."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable

import torch
from torch import Tensor

from parallel import comm
from parallel.deferral import Deferral
from parallel.mesh import Mesh
from parallel.models.batch import Batch
from parallel.models.build import Build
from parallel.models.config import DecoderConfig
from parallel.models.decoder import build_model
from parallel.pp import partition

__all__ = ["measured_ends"]


def measured_ends(config: DecoderConfig, build: Build, tokens: int) -> tuple[float, float]:
    """Time of the embedding, and of norm, head and loss, forward and backward, in blocks; the same on every rank.

    Rank 0 measures its own shards, without communication; every rank of the mesh calls this.

    Args:
        tokens: of a microbatch.
    """
    ends: list[float] | None = None
    if build.mesh.rank == 0:
        ends = _measure(config, build, tokens)
    found = comm.gather_json(ends, build.mesh.world)[0]
    return found[0], found[1]


def _measure(config: DecoderConfig, build: Build, tokens: int) -> list[float]:
    mesh = Mesh.fake(build.mesh.layout, 0, build.mesh.device)
    cuts = partition(1, 3, (0, 1, 0))
    one = dataclasses.replace(build, mesh=mesh, cuts=cuts, deferral=Deferral())
    model = build_model(dataclasses.replace(config, layers=1), one)
    ids = torch.arange(tokens, device=mesh.device) % config.vocabulary
    batch = Batch.pack([ids], [ids])
    if config.positions == "learned":
        batch = dataclasses.replace(batch, positions_T=batch.positions_T % config.max_positions)
    x_TD = model.hidden(batch, None, cuts[0]).detach().requires_grad_()
    parts: list[Callable[[], Tensor]] = [
        lambda: model.hidden(batch, None, cuts[0]).sum(),
        lambda: model.hidden(batch, x_TD, cuts[1]).sum(),
        lambda: model.loss(batch, x_TD, cuts[2]).total,
    ]
    first, block, last = (_seconds(part, mesh.device) for part in parts)
    return [first / block, last / block]


def _seconds(part: Callable[[], Tensor], device: torch.device, repeats: int = 4) -> float:
    """Of the fastest run, after one to warm up."""
    best = float("inf")
    for _ in range(repeats):
        start = time.perf_counter()
        part().backward()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - start)
    return best
