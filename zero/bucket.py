"""Flat buckets: parameters, gradients and master weights of a model as views of a few long vectors.

Gradients are copied into their bucket as backward produces them; a bucket whose gradients are all there is reduced at
once, while backward goes on. Buckets are reduced in one fixed order on every rank.
"""

from __future__ import annotations

from collections.abc import Set
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from parallel import comm
from parallel.holders import holders
from parallel.mesh import Mesh
from parallel.shard import Shard, param_shards, sum_repeated

__all__ = ["Bucket", "Buckets"]


@dataclass(eq=False, slots=True)
class Bucket:
    """Parameters that are reduced and updated together.

    Attributes:
        names: of the parameters, in the order of the vectors.
        parameters: views of ``values``.
        decay: whether weight decay applies.
        partial: axes beside the data axis over which gradients are summed.
        shared: pipeline ranks that hold the same parameters and sum their gradients; empty: this one alone.
        values: the parameters, in the precision of the model.
        master: the parameters in the precision of the optimizer; ``values`` itself where that is the same.
        gradient: in the precision of the optimizer.
        views: each parameter's part of ``gradient``.
    """

    names: list[str]
    parameters: list[nn.Parameter]
    decay: bool
    partial: tuple[str, ...]
    shared: tuple[int, ...]
    values: Tensor
    master: Tensor
    gradient: Tensor
    views: list[Tensor]
    ready: set[int] = field(default_factory=set)
    fresh: set[int] = field(default_factory=set)
    pending: comm.Pending | None = None

    def split(self, flat: Tensor) -> list[Tensor]:
        """A vector of the bucket's length as one view a parameter."""
        parts = flat.split([parameter.numel() for parameter in self.parameters])
        return [part.view_as(parameter) for part, parameter in zip(parts, self.parameters, strict=True)]


class Buckets:
    """All parameters of a model that are trained, in flat buckets.

    Args:
        model: its parameters become views of the buckets.
        mesh: gradients are summed over ``mesh.data`` (tp where they arrive in parts, pp where stages share them); every
            rank makes its buckets at the same time.
        bucket_bytes: of gradients; a larger parameter has a bucket of its own.

    Attributes:
        buckets: in the order in which they are reduced.
        frozen: parameters that are not trained, by name.
        shards: the shard table of all.
        holders: parameter -> pipeline ranks that hold it, for those of all stages.
    """

    def __init__(self, model: nn.Module, mesh: Mesh, bucket_bytes: int) -> None:
        self.mesh = mesh
        self.shards = param_shards(model)
        self.frozen = {name: parameter for name, parameter in model.named_parameters() if not parameter.requires_grad}
        self.holders = holders(self.shards, mesh)
        self.buckets: list[Bucket] = []
        self._where: dict[nn.Parameter, tuple[int, int]] = {}
        self._launched = 0
        self._last: Set[nn.Parameter] = frozenset()
        for group in _grouped(model, self.shards, self.holders, bucket_bytes):
            for position, parameter in enumerate(group.parameters):
                self._where[parameter] = (len(self.buckets), position)
                parameter.register_post_accumulate_grad_hook(self._arrived)
            self.buckets.append(_flatten(group))
        for shared in sorted({ranks for ranks in self.holders.values() if len(ranks) > 1 and mesh.pp.rank in ranks}):
            mesh.among("pp", shared)

    def begin(self) -> None:
        """Forget the gradients of the last step."""
        self._launched = 0
        for bucket in self.buckets:
            bucket.ready.clear()
            bucket.fresh = set(range(len(bucket.parameters)))

    def expect_last(self, last: bool, of: Set[nn.Parameter] | None = None) -> None:
        """Say whether the next backward pass gives the step's last gradients: then buckets are reduced as they fill.

        Args:
            of: the parameters of which that is said; default: all.
        """
        self._last = frozenset() if not last else self._where.keys() if of is None else of

    def _arrived(self, parameter: Tensor) -> None:
        assert isinstance(parameter, nn.Parameter)
        if parameter.grad is None:  # put off: autograd calls the hook of a weight whose gradient was left out
            return
        index, position = self._where[parameter]
        bucket = self.buckets[index]
        if position in bucket.fresh:
            bucket.views[position].copy_(parameter.grad)
            bucket.fresh.discard(position)
        else:
            bucket.views[position].add_(parameter.grad)
        parameter.grad = None
        if parameter in self._last:
            bucket.ready.add(position)
            self._launch(complete_only=True)

    def _launch(self, complete_only: bool) -> None:
        while self._launched < len(self.buckets):
            bucket = self.buckets[self._launched]
            if complete_only and len(bucket.ready) < len(bucket.parameters):
                return
            for position in bucket.fresh:
                bucket.views[position].zero_()
            bucket.pending = comm.start_all_reduce(bucket.gradient, self.mesh.data)
            self._launched += 1

    def finish(self) -> None:
        """Wait until every gradient is the whole sum, on every rank that holds the parameter; once a step."""
        self._launch(complete_only=False)
        for bucket in self.buckets:
            if bucket.pending is None:
                continue
            bucket.pending.wait()
            bucket.pending = None
            for axis in bucket.partial:
                comm.sum_(bucket.gradient, self.mesh.axes[axis])
            if bucket.shared:
                comm.sum_(bucket.gradient, self.mesh.among("pp", bucket.shared))
            for name, view in zip(bucket.names, bucket.views, strict=True):
                sum_repeated(view, self.shards[name], self.mesh)

    @torch.no_grad()
    def norm(self) -> Tensor:
        """The 2-norm of all gradients of all ranks, every value counted once; a scalar."""
        held: list[Tensor] = []
        place = {"tp": (self.mesh.tp.rank, self.mesh.tp.size)}
        for bucket in self.buckets:
            if bucket.shared and bucket.shared[0] != self.mesh.pp.rank:
                continue
            if self.mesh.tp.size == 1:
                held.append(bucket.gradient)
                continue
            for name, view in zip(bucket.names, bucket.views, strict=True):
                held += self.shards[name].held(place, view)
        total = torch.zeros((), dtype=torch.float64, device=self.mesh.device)
        for view in held:
            total += torch.linalg.vector_norm(view).double().square()
        return comm.sum_(comm.sum_(total, self.mesh.tp), self.mesh.pp).sqrt()

    @torch.no_grad()
    def publish(self) -> None:
        """Give the model the values of the master weights."""
        for bucket in self.buckets:
            if bucket.values is not bucket.master:
                bucket.values.copy_(bucket.master)


@dataclass(frozen=True, slots=True)
class _Group:
    """The parameters of one bucket to be."""

    decay: bool
    partial: tuple[str, ...]
    shared: tuple[int, ...]
    names: list[str] = field(default_factory=list)
    parameters: list[nn.Parameter] = field(default_factory=list)


def _grouped(
    model: nn.Module, shards: dict[str, Shard], holders: dict[str, tuple[int, ...]], bucket_bytes: int
) -> list[_Group]:
    """Parameters in the order in which backward reaches them, cut into groups of one kind each."""
    groups: list[_Group] = []
    open_: dict[tuple[Any, ...], tuple[_Group, int]] = {}
    for name, parameter in reversed([item for item in model.named_parameters() if item[1].requires_grad]):
        shared = holders[name] if len(holders[name]) > 1 else ()
        kind = parameter.ndim > 1, shards[name].partial, shared
        key, size = (*kind, parameter.dtype), parameter.numel() * _wide(parameter.dtype).itemsize
        group, filled = open_.get(key, (None, 0))
        if group is None or filled + size > bucket_bytes:
            group, filled = _Group(*kind), 0
            groups.append(group)
        group.names.append(name)
        group.parameters.append(parameter)
        open_[key] = (group, filled + size)
    return groups


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


@torch.no_grad()
def _flatten(group: _Group) -> Bucket:
    values = torch.cat([parameter.reshape(-1) for parameter in group.parameters])
    wide = _wide(values.dtype)
    master = values if values.dtype == wide else values.to(wide)
    kind = group.decay, group.partial, group.shared
    bucket = Bucket(group.names, group.parameters, *kind, values, master, torch.zeros_like(master), [])
    for parameter, view in zip(group.parameters, bucket.split(values), strict=True):
        parameter.data = view
    bucket.views = bucket.split(bucket.gradient)
    return bucket
