"""The optimizer of a sharded model: flat master weights, reduced gradients, clipping over all axes."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Set
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from parallel import comm
from parallel.config import option
from parallel.errors import ConfigError, refuse
from parallel.mesh import Mesh
from zero.bucket import Bucket
from zero.buckets import Buckets, Sharing
from zero.fragment import Fragment
from zero.live import Live, units_of

__all__ = ["OptimizerConfig", "ZeroConfig", "ZeroOptimizer"]


@dataclass(frozen=True, slots=True, kw_only=True)
class OptimizerConfig:
    """AdamW (arXiv 1711.05101). Weight decay applies to matrices, not to biases and norm weights."""

    lr: float = option(3e-4, "highest learning rate")
    beta1: float = option(0.9, "decay of the first moment")
    beta2: float = option(0.95, "decay of the second moment")
    eps: float = option(1e-8, "added to the root of the second moment")
    weight_decay: float = option(0.1, "decoupled weight decay of matrices")
    clip: float = option(1.0, "largest norm of all gradients together (0: no clipping)")
    bucket_mb: float = option(25.0, "gradients that are reduced together, MiB")

    def problems(self) -> Iterator[str]:
        """Why such an optimizer cannot be."""
        for name in ("lr", "eps", "weight_decay", "clip"):
            if getattr(self, name) < 0:
                yield f"{name} = {getattr(self, name)}: must not be negative"
        for name in ("beta1", "beta2"):
            if not 0 <= getattr(self, name) < 1:
                yield f"{name} = {getattr(self, name)}: must be at least 0 and below 1"
        if self.bucket_mb <= 0:
            yield f"bucket_mb = {self.bucket_mb}: must be positive"


@dataclass(frozen=True, slots=True, kw_only=True)
class ZeroConfig:
    """How training state is cut over the data axis (arXiv 1910.02054)."""

    stage: int = option(0, "cut over the data axis: 0 nothing, 1 optimizer state, 2 and gradients, 3 and parameters")
    shard_size: int = option(0, "neighbouring data ranks that share one copy of the state (0: all): hybrid sharding")
    ahead: int = option(1, "stage 3: blocks that are gathered ahead of their use")

    def problems(self) -> Iterator[str]:
        """Why such a stage cannot be."""
        if not 0 <= self.stage <= 3:
            yield f"stage = {self.stage}: the stages are 0, 1, 2 and 3"
        for name in ("shard_size", "ahead"):
            if getattr(self, name) < 0:
                yield f"{name} = {getattr(self, name)}: must not be negative"

    def misfits(self, ranks: int) -> Iterator[str]:
        """Why this cannot be on so many data ranks."""
        if self.shard_size and ranks % self.shard_size:
            near = max(size for size in range(1, self.shard_size + 1) if ranks % size == 0)
            yield f"shard_size = {self.shard_size} does not divide {ranks} data ranks; the nearest that works is {near}"


Factory = Callable[[list[dict[str, Any]]], torch.optim.Optimizer]


class ZeroOptimizer:
    """Any elementwise torch optimizer over the flat master weights of a model.

    Use it like this::

        optimizer.begin()
        for batch in microbatches:
            optimizer.expect_last(batch is microbatches[-1])
            loss(batch).backward()
        norm = optimizer.step(lr)

    Args:
        model: its parameters become views of flat buckets.
        mesh: gradients are summed over ``mesh.data``; losses are to be scaled by one over the global token count.
        config: of AdamW, clipping and buckets.
        factory: makes another optimizer from parameter groups; default AdamW with the values of ``config``.
        zero: how state is cut over the data axis.

    Raises:
        ConfigError: the data axis cannot be cut so.
    """

    def __init__(
        self,
        model: nn.Module,
        mesh: Mesh,
        config: OptimizerConfig | None = None,
        factory: Factory | None = None,
        *,
        zero: ZeroConfig | None = None,
    ) -> None:
        self.config = OptimizerConfig() if config is None else config
        self.zero = ZeroConfig() if zero is None else zero
        self.mesh = mesh
        refuse(ConfigError, self.zero.misfits(mesh.data.size))
        sharing = Sharing.over(mesh, self.zero.stage, self.zero.shard_size)
        units = units_of(model) if sharing.stage == 3 else {}
        owner = {p: name for name, unit in reversed(units.items()) for p in unit.parameters()}
        self.buckets = Buckets(model, mesh, sharing, owner, round(self.config.bucket_mb * (1 << 20)))
        self.live: Live | None = None
        if sharing.stage == 3:
            where = self.buckets.where
            of = {n: list(dict.fromkeys(where[p][0] for p in u.parameters() if p in where)) for n, u in units.items()}
            self.live = Live(units, of, self.zero.ahead)
        self._flats: list[_Flat] = []
        for bucket in self.buckets.buckets:
            for start, stop, decay in bucket.runs():
                self._flats.append(_Flat(bucket, start, stop, decay, nn.Parameter(bucket.master[start:stop])))
        groups = [
            {"params": [flat.values], "weight_decay": self.config.weight_decay if flat.decay else 0.0}
            for flat in self._flats
        ]
        self.inner = (factory or self._adamw)(groups)

    def _adamw(self, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
        c = self.config
        return torch.optim.AdamW(groups, lr=c.lr, betas=(c.beta1, c.beta2), eps=c.eps, fused=True)

    def begin(self) -> None:
        """Start a step: forget the gradients of the last one."""
        self.buckets.begin()

    def expect_last(self, last: bool, of: Set[nn.Parameter] | None = None) -> None:
        """Say whether the next backward pass gives the step's last gradients, whose reduction overlaps it.

        Args:
            of: the parameters of which that is said; default: all.
        """
        self.buckets.expect_last(last, of)

    def reduce(self) -> None:
        """Complete the gradients of this step, which :meth:`step` does by itself."""
        if self.live is not None:
            self.live.end()
        self.buckets.finish()

    @torch.no_grad()
    def step(self, lr: float | None = None) -> float:
        """Reduce, clip and update; returns the norm of the gradients before clipping.

        With a norm that is not finite nothing is changed, on any rank; the caller sees it in the result.
        """
        self.reduce()
        norm = float(self.buckets.norm())
        if not math.isfinite(norm):
            return norm
        scale = self.config.clip / (norm + 1e-6) if self.config.clip else 1.0
        for flat in self._flats:
            flat.values.grad = self.buckets.own(flat.bucket)[flat.start : flat.stop]
            if scale < 1.0:
                flat.values.grad.mul_(scale)
        for group in self.inner.param_groups:
            group["lr"] = self.config.lr if lr is None else lr
        self.inner.step()
        for flat in self._flats:
            flat.values.grad = None
        self.buckets.publish()
        return norm

    def culprits(self) -> list[str]:
        """Where gradients were not finite before they were summed: rank and parameter; every rank calls it."""
        found = comm.gather_json(self.buckets.not_finite()[:3], self.mesh.world)
        return [f"rank {rank}: {name}" for rank, names in enumerate(found) for name in names]

    def whole(self) -> AbstractContextManager[None]:
        """All parameters of this rank's model, whole for as long as the context is open; every data rank opens it."""
        return contextlib.nullcontext() if self.live is None else self.live.whole()

    def pieces(self, what: str) -> Iterator[tuple[str, Tensor]]:
        """(parameter, this rank's tensor-parallel piece) of ``master``, ``gradient`` or a state vector.

        What the data ranks share is gathered, a bucket at a time; all of them call this.
        """
        if what not in ("master", "gradient") and not self.inner.state:
            self.prepare()
        for bucket in self.buckets.buckets:
            own = bucket.master if what == "master" else self.buckets.own(bucket) if what == "gradient" else None
            if own is None:
                own = torch.cat([self.inner.state[f.values][what] for f in self._flats if f.bucket is bucket])
            full = comm.start_all_gather(own.contiguous(), bucket.axis).wait()
            for slot in bucket.slots:
                yield slot.name, full[slot.start : slot.stop].view(slot.parameter.shape)
        if what == "master":
            yield from ((name, parameter.data) for name, parameter in self.buckets.frozen.items())

    def state(self) -> Iterator[Fragment]:
        """What this rank holds of the master weights and of every state vector, as views.

        Parameters that are not trained come last, as they are.
        """
        if not self.inner.state:
            self.prepare()
        for flat in self._flats:
            yield from flat.fragments("master", flat.values.data)
            for what, value in self._vectors(flat.values).items():
                yield from flat.fragments(what, value)
        for name, parameter in self.buckets.frozen.items():
            yield Fragment(name, "master", 0, parameter.data.view(-1))

    def scalars(self) -> dict[str, float]:
        """State that is one number for a parameter (AdamW's step count), by parameter and what."""
        found: dict[str, float] = {}
        for flat in self._flats:
            for what, value in self._numbers(flat.values).items():
                found |= {f"{slot.name}|{what}": float(value) for slot in flat.bucket.slots}
        return found

    def prepare(self) -> None:
        """Allocate the state vectors, which torch otherwise does in the first step, so that they can be filled."""
        lrs = [group["lr"] for group in self.inner.param_groups]
        saved = [bucket.master.clone() for bucket in self.buckets.buckets]
        for group in self.inner.param_groups:
            group["lr"] = 0.0
        for flat in self._flats:
            flat.values.grad = torch.zeros_like(flat.values)
        self.inner.step()
        for flat in self._flats:
            flat.values.grad = None
        with torch.no_grad():
            for bucket, values in zip(self.buckets.buckets, saved, strict=True):
                bucket.master.copy_(values)
        for group, lr in zip(self.inner.param_groups, lrs, strict=True):
            group["lr"] = lr
        for state in self.inner.state.values():
            for value in state.values():
                if isinstance(value, Tensor) and value.ndim == 0:
                    value.zero_()

    @torch.no_grad()
    def restore(self, scalars: dict[str, float]) -> None:
        """After the fragments of :meth:`state` were filled: set the scalars, and give the model its values."""
        for flat in self._flats:
            for what, value in self._numbers(flat.values).items():
                value.fill_(scalars[f"{flat.bucket.slots[0].name}|{what}"])
        self.buckets.publish()

    def _vectors(self, values: nn.Parameter) -> dict[str, Tensor]:
        state = self.inner.state[values]
        return {k: v for k, v in state.items() if isinstance(v, Tensor) and v.shape == values.shape and v.ndim}

    def _numbers(self, values: nn.Parameter) -> dict[str, Tensor]:
        return {k: v for k, v in self.inner.state[values].items() if isinstance(v, Tensor) and v.ndim == 0}


@dataclass(frozen=True, slots=True, eq=False)
class _Flat:
    """A run of a bucket's master weights as one parameter of the inner optimizer."""

    bucket: Bucket
    start: int
    stop: int
    decay: bool
    values: nn.Parameter

    def fragments(self, what: str, vector: Tensor) -> Iterator[Fragment]:
        """The parameters in this run, each with its part of ``vector``."""
        for slot in self.bucket.slots:
            _, run = self.bucket.part(slot)
            first, end = max(run.start, self.start), min(run.stop, self.stop)
            if first < end:
                begin = first + self.bucket.own.start - slot.start
                yield Fragment(slot.name, what, begin, vector[first - self.start : end - self.start])
