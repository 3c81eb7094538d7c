"""The optimizer of a sharded model: flat master weights, reduced gradients, clipping over all axes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Set
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from parallel.config import option
from parallel.mesh import Mesh
from zero.bucket import Bucket, Buckets

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

    stage: int = option(0, "0: every replica holds all of it")

    def problems(self) -> Iterator[str]:
        """Why such a stage cannot be."""
        if self.stage:
            yield f"stage = {self.stage}: this version has stage 0 (replicated state) only"


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
    """

    def __init__(
        self, model: nn.Module, mesh: Mesh, config: OptimizerConfig | None = None, factory: Factory | None = None
    ) -> None:
        self.config = OptimizerConfig() if config is None else config
        self.mesh = mesh
        self.buckets = Buckets(model, mesh, round(self.config.bucket_mb * (1 << 20)))
        self._flats = [nn.Parameter(bucket.master) for bucket in self.buckets.buckets]
        groups = [
            {"params": [flat], "weight_decay": self.config.weight_decay if bucket.decay else 0.0}
            for flat, bucket in zip(self._flats, self.buckets.buckets, strict=True)
        ]
        nothing = [{"params": [nn.Parameter(torch.zeros(0, device=mesh.device))]}]  # of a frozen stage: torch wants one
        self.inner = (factory or self._adamw)(groups or nothing)

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

    def reduce(self) -> Iterator[tuple[str, Tensor]]:
        """Complete the gradients of this step; (parameter, this rank's piece of its gradient as a view)."""
        self.buckets.finish()
        for bucket in self.buckets.buckets:
            yield from zip(bucket.names, bucket.views, strict=True)

    @torch.no_grad()
    def step(self, lr: float | None = None) -> float:
        """Reduce, clip and update; returns the norm of the gradients before clipping.

        With a norm that is not finite nothing is changed, on any rank; the caller sees it in the result.
        """
        self.buckets.finish()
        norm = float(self.buckets.norm())
        if norm != norm or norm == float("inf"):
            return norm
        scale = self.config.clip / (norm + 1e-6) if self.config.clip else 1.0
        for flat, bucket in zip(self._flats, self.buckets.buckets, strict=True):
            if scale < 1.0:
                bucket.gradient.mul_(scale)
            flat.grad = bucket.gradient
        for group in self.inner.param_groups:
            group["lr"] = self.config.lr if lr is None else lr
        self.inner.step()
        for flat in self._flats:
            flat.grad = None
        self.buckets.publish()
        return norm

    def state(self) -> Iterator[tuple[str, str, Tensor]]:
        """(parameter, what, this rank's piece as a view): the master weights and every state vector.

        Parameters that are not trained come last, as they are.
        """
        if not self.inner.state:
            self.prepare()
        for flat, bucket in zip(self._flats, self.buckets.buckets, strict=True):
            yield from _views(bucket, "master", bucket.master)
            for what, value in self._vectors(flat).items():
                yield from _views(bucket, what, value)
        for name, parameter in self.buckets.frozen.items():
            yield name, "master", parameter.data

    def scalars(self) -> dict[str, float]:
        """State that is one number for a parameter (AdamW's step count), by parameter and what."""
        found: dict[str, float] = {}
        for flat, bucket in zip(self._flats, self.buckets.buckets, strict=True):
            for what, value in self.inner.state[flat].items():
                if isinstance(value, Tensor) and value.numel() == 1 and flat.numel() != 1:
                    found |= {f"{name}|{what}": float(value) for name in bucket.names}
        return found

    def prepare(self) -> None:
        """Allocate the state vectors, which torch otherwise does in the first step, so that they can be filled."""
        lrs = [group["lr"] for group in self.inner.param_groups]
        saved = [bucket.master.clone() for bucket in self.buckets.buckets]
        for group in self.inner.param_groups:
            group["lr"] = 0.0
        for flat in self._flats:
            flat.grad = torch.zeros_like(flat)
        self.inner.step()
        for flat, bucket, values in zip(self._flats, self.buckets.buckets, saved, strict=True):
            flat.grad = None
            with torch.no_grad():
                bucket.master.copy_(values)
        for group, lr in zip(self.inner.param_groups, lrs, strict=True):
            group["lr"] = lr
        for state in self.inner.state.values():
            for value in state.values():
                if isinstance(value, Tensor) and value.ndim == 0:
                    value.zero_()

    @torch.no_grad()
    def restore(self, scalars: dict[str, float]) -> None:
        """After the views of :meth:`state` were filled: set the scalars, and give the model its values."""
        for flat, bucket in zip(self._flats, self.buckets.buckets, strict=True):
            for what, value in self.inner.state[flat].items():
                if isinstance(value, Tensor) and value.numel() == 1 and flat.numel() != 1:
                    value.fill_(scalars[f"{bucket.names[0]}|{what}"])
        self.buckets.publish()

    def _vectors(self, flat: nn.Parameter) -> dict[str, Tensor]:
        state = self.inner.state[flat]
        return {k: v for k, v in state.items() if isinstance(v, Tensor) and v.shape == flat.shape}


def _views(bucket: Bucket, what: str, flat: Tensor) -> Iterator[tuple[str, str, Tensor]]:
    for name, view in zip(bucket.names, bucket.split(flat), strict=True):
        yield name, what, view
