"""The optimizer of a sharded model: flat master weights, reduced gradients, clipping over all axes."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence, Set
from contextlib import AbstractContextManager
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, nn

from parallel import comm
from parallel.config import option
from parallel.errors import ConfigError, refuse
from parallel.mesh import Mesh
from zero.bucket import Bucket
from zero.buckets import Buckets
from zero.flat import Flat, with_room
from zero.fragment import Fragment
from zero.live import Live, units_of
from zero.memory import explained
from zero.offload import Offload, hosted, overlapped
from zero.sharing import Sharing

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
    """How training state is cut over the data axis (arXiv 1910.02054), how it travels, and where it lives."""

    stage: int = option(0, "cut over the data axis: 0 nothing, 1 optimizer state, 2 and gradients, 3 and parameters")
    shard_size: int = option(0, "neighbouring data ranks that share one copy of the state (0: all): hybrid sharding")
    ahead: int = option(1, "stage 3: blocks that are gathered ahead of their use")
    secondary: int = option(0, "stage 3: neighbouring ranks that gather again from a second copy (0: none): hpZ")
    quantize_weights: bool = option(False, "stage 3: weights are gathered as int8, with a scale for 256 values: qwZ")
    gradient_bits: int = option(0, "gradients are reduced as integers of 8 or 4 bits (0: exactly): qgZ")
    top_k: float = option(0.0, "stages 0 and 1: share of each gradient that is sent, the rest waits (0: all is sent)")
    offload: Offload = option("none", "kept in CPU memory: none, optimizer (and master weights), parameters (as well)")

    def problems(self) -> Iterator[str]:
        """Why such a stage cannot be."""
        if not 0 <= self.stage <= 3:
            yield f"stage = {self.stage}: the stages are 0, 1, 2 and 3"
            return
        for name in ("shard_size", "ahead", "secondary"):
            if getattr(self, name) < 0:
                yield f"{name} = {getattr(self, name)}: must not be negative"
        if self.gradient_bits not in (0, 4, 8):
            yield f"gradient_bits = {self.gradient_bits}: must be 8, 4 or 0 (exact)"
        if not 0 <= self.top_k < 1:
            yield f"top_k = {self.top_k}: must be at least 0 (all is sent) and below 1"
        for name, least, why in (
            ("secondary", 3, "a second copy is of parameters that are cut"),
            ("quantize_weights", 3, "below, the weights that are gathered are those that are kept"),
            ("gradient_bits", 1, "integers are summed by the rank that owns the run"),
        ):
            if getattr(self, name) and self.stage < least:
                yield f"{name} at stage {self.stage}: {why}; the nearest stage that works is {least}"
        if self.offload == "parameters" and self.stage < 3:
            yield f"offload = parameters at stage {self.stage}: nearest are offload = optimizer, and stage 3"
        if self.top_k and self.stage > 1:
            yield f"top_k at stage {self.stage}: what waits is a whole gradient; the nearest stage that works is 1"
        if self.top_k and self.gradient_bits:
            yield "top_k and gradient_bits: a gradient is made smaller by one of them; set the other to 0"

    def misfits(self, ranks: int) -> Iterator[str]:
        """Why this cannot be on so many data ranks, where it can be at all (:meth:`problems`)."""
        shared = max(self.shard_size, 0) or ranks
        for name, whole, what in (("shard_size", ranks, "data ranks"), ("secondary", shared, "ranks that share state")):
            size = getattr(self, name)
            if size > 0 and whole % size:
                near = max(near for near in range(1, size + 1) if whole % near == 0)
                yield f"{name} = {size} does not divide {whole} {what}; the nearest that works is {near}"


Factory = Callable[[list[dict[str, Any]]], torch.optim.Optimizer]


class ZeroOptimizer:
    """Any torch optimizer over the master weights of a model.

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
        whole_matrices: ``factory`` gets every parameter in its whole shape, for updates that are not elementwise
            (Muon); otherwise it gets runs of flat vectors.

    Raises:
        ConfigError: the data axis cannot be cut so.
        NotEnoughMemory: here, or in the first step.
    """

    def __init__(
        self,
        model: nn.Module,
        mesh: Mesh,
        config: OptimizerConfig | None = None,
        factory: Factory | None = None,
        *,
        zero: ZeroConfig | None = None,
        whole_matrices: bool = False,
    ) -> None:
        self.config = OptimizerConfig() if config is None else config
        self.zero = z = ZeroConfig() if zero is None else zero
        self.stage = z.stage
        self.mesh = mesh
        refuse(ConfigError, [*z.problems(), *z.misfits(mesh.data.size)])
        sharing = Sharing.over(
            mesh,
            z.stage,
            z.shard_size,
            z.secondary,
            quantize_weights=z.quantize_weights,
            gradient_bits=z.gradient_bits,
            top_k=z.top_k,
            offload=z.offload,
            whole_matrices=whole_matrices,
        )
        units = units_of(model) if sharing.stage == 3 else {}
        owner = {p: name for name, unit in reversed(units.items()) for p in unit.parameters()}
        self._trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        with explained(self._trained, sharing, mesh.data.size):
            self.buckets = Buckets(model, mesh, sharing, owner, round(self.config.bucket_mb * (1 << 20)))
            self._flats = [*self._make_flats()]
        self._of = {b: [*flats] for b, flats in groupby(self._flats, lambda flat: flat.bucket)}
        self.live: Live | None = None
        if sharing.stage == 3:
            where = self.buckets.where
            of = {n: list(dict.fromkeys(where[p][0] for p in u.parameters() if p in where)) for n, u in units.items()}
            self.live = Live(units, of, self.zero.ahead, sharing.shard, self.buckets.turns.passed)
        groups = [
            {"params": [flat.values], "weight_decay": self.config.weight_decay if flat.decay else 0.0}
            for flat in self._flats
        ]
        nothing = {"params": [nn.Parameter(torch.empty(0))], "weight_decay": 0.0}  # torch refuses an empty list
        self.inner = (factory or self._adamw)(groups or [nothing])
        self._hosts: dict[Flat, Tensor] = {}
        self._readers: list[Callable[[], object]] = []

    def _make_flats(self) -> Iterator[Flat]:
        for bucket in self.buckets.buckets:
            for start, stop, decay, slot in bucket.runs():
                shard = None if slot is None else self.buckets.shards[slot.name]
                yield Flat(bucket, start, stop, decay, slot, shard, self.mesh)

    def _adamw(self, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
        c = self.config
        return torch.optim.AdamW(groups, lr=c.lr, betas=(c.beta1, c.beta2), eps=c.eps, fused=True)

    def begin(self) -> None:
        """Start a step: forget the gradients of the last one, and what one that was broken off has left."""
        if self.live is not None:
            self.live.begin()
        self.buckets.begin()

    def expect_last(self, last: bool, of: Set[nn.Parameter] | None = None, whole: bool = True) -> None:
        """Announce a backward pass, and say whether it gives the step's last gradients; their reduction overlaps it.

        Stages 2 and 3 reduce in every pass that is announced; a pass that is not adds to what the rank has in memory.

        Args:
            of: the parameters of which that is said; default: all. None at all: the pass announced before is over.
            whole: whether none of their gradients is put off to a later pass, as I of a pipeline schedule does.
        """
        self.buckets.expect_last(last, of, whole)

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
        for group in self.inner.param_groups:
            group["lr"] = self.config.lr if lr is None else lr
        with explained(self._trained, self.buckets.sharing, self.mesh.data.size):
            self._update(scale)
        for bucket in self.buckets.buckets:
            bucket.accept()
        return norm

    def _update(self, scale: float) -> None:
        """From reduced gradients to new parameters."""
        self.settle()
        if self.zero.offload == "none":
            for flat in self._flats:
                flat.values.grad = flat.gradient(self.buckets.own(flat.bucket), scale)
            self._apply(self._flats)
            self.buckets.publish()
            return
        leaving: list[comm.Pending | None] = []
        overlapped(
            self.buckets.buckets,
            lambda bucket: self._fetch(bucket, scale),
            self._land,
            lambda bucket: leaving.append(bucket.publish()),
        )
        for pending in leaving:
            if pending is not None:
                pending.wait()

    def _land(self, bucket: Bucket) -> None:
        self._apply(self._of.get(bucket, []))
        bucket.land()

    def _fetch(self, bucket: Bucket, scale: float) -> Callable[[], None]:
        """Have a reduced gradient in CPU memory; the result waits for what is on its way."""
        arrivals: list[Callable[[], None]] = []
        for flat in self._of.get(bucket, []):
            gradient = flat.gradient(self.buckets.own(bucket), scale)
            if bucket.landing is None:
                there = self._hosts.get(flat)
                if there is None:
                    there = self._hosts[flat] = hosted(gradient)
                arrivals.append(self.buckets.sharing.lane.down(gradient, there))
                gradient = there
            flat.values.grad = gradient

        def wait() -> None:
            for arrived in arrivals:
                arrived()

        return wait

    def _apply(self, flats: Sequence[Flat]) -> None:
        """Update the master weights whose gradients are there."""
        self._step_only(flats)
        for flat in flats:
            flat.updated()

    def _step_only(self, flats: Sequence[Flat]) -> None:
        """A step of the inner optimizer, of these."""
        params = {flat.values for flat in flats}
        groups = self.inner.param_groups
        self.inner.param_groups = [group for group in groups if not params.isdisjoint(group["params"])]
        try:
            self.inner.step()
        finally:
            self.inner.param_groups = groups
        for flat in flats:
            flat.values.grad = None

    def read_behind(self, wait: Callable[[], object]) -> None:
        """Somebody reads the state while training goes on: before it next changes, ``wait`` is called, once."""
        self._readers.append(wait)

    def changes(self) -> int:
        """A number that grows with every change in place of weights or optimizer state, as far as torch counts them."""
        tensors = [flat.bucket.master for flat in self._flats]
        tensors += [v for state in self.inner.state.values() for v in state.values() if isinstance(v, Tensor)]
        return sum(tensor._version for tensor in (*tensors, *self.buckets.where, *self.buckets.frozen.values()))

    def settle(self) -> None:
        """Return when nobody reads the state any more; to be called before it is changed by other means than ours."""
        readers, self._readers = self._readers, []
        for wait in readers:
            wait()

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
                own = torch.zeros_like(bucket.master)
                for flat in self._of.get(bucket, []):
                    own[flat.start : flat.stop] = flat.piece(what, self.inner.state[flat.values][what])
            full = comm.start_all_gather(own.to(bucket.device).contiguous(), bucket.axis).wait()
            for slot in bucket.slots:
                yield slot.name, full[slot.start : slot.stop].view(slot.parameter.shape)
        if what == "master":
            yield from ((name, parameter.data) for name, parameter in self.buckets.frozen.items())

    def state(self) -> Iterator[Fragment]:
        """What this rank holds of the master weights, of every state vector and of what top-k keeps back, as views.

        Parameters that are not trained come last, as they are.
        """
        self.settle()
        if not self.inner.state:
            self.prepare()
        for flat in self._flats:
            yield from flat.fragments("master", flat.bucket.master[flat.start : flat.stop])
            for what, value in self._vectors(flat.values).items():
                yield from flat.fragments(what, flat.piece(what, value))
        yield from self.buckets.residues()
        for name, parameter in self.buckets.frozen.items():
            yield Fragment(name, "master", 0, parameter.data.view(-1))

    def scalars(self) -> dict[str, float]:
        """State that is one number for a parameter (AdamW's step count), by parameter and what."""
        found: dict[str, float] = {}
        for flat in self._flats:
            for what, value in self._numbers(flat.values).items():
                found |= {f"{name}|{what}": float(value) for name in flat.names}
        return found

    def prepare(self) -> None:
        """Allocate the state vectors, which torch otherwise does in the first step, so that they can be filled.

        Memory beyond them: twice the largest run of the master weights that is updated as one.
        """
        self.settle()
        groups = self.inner.param_groups
        rates = [{key: group[key] for key in ("lr", "weight_decay") if key in group} for group in groups]
        for group, own in zip(groups, rates, strict=True):
            group.update(dict.fromkeys(own, 0.0))
        for flat, saved, gradient in with_room(self._flats):
            saved.copy_(flat.values.detach())
            flat.values.grad = gradient.zero_()
            self._step_only([flat])
            flat.values.detach().copy_(saved)
        for group, own in zip(groups, rates, strict=True):
            group.update(own)
        for state in self.inner.state.values():
            for value in state.values():
                if isinstance(value, Tensor) and value.ndim == 0:
                    value.zero_()

    @torch.no_grad()
    def restore(self, scalars: dict[str, float]) -> None:
        """After the fragments of :meth:`state` were filled: set the scalars, and give the model its values."""
        self.settle()
        for flat in self._flats:
            for what, value in self._numbers(flat.values).items():
                value.fill_(scalars[f"{flat.names[0]}|{what}"])
            flat.join(self._vectors(flat.values))
        self.buckets.publish()

    def _vectors(self, values: nn.Parameter) -> dict[str, Tensor]:
        state = self.inner.state[values]
        return {k: v for k, v in state.items() if isinstance(v, Tensor) and v.shape == values.shape and v.ndim}

    def _numbers(self, values: nn.Parameter) -> dict[str, Tensor]:
        return {k: v for k, v in self.inner.state[values].items() if isinstance(v, Tensor) and v.ndim == 0}
