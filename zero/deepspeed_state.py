"""The training state that DeepSpeed's engine holds, as fragments of our parameters, so that checkpoints are ours.

Whatever the stage, the inner optimizer updates flat vectors, and each is made of runs of parameters:

=====  ===================================  =========================================
stage  a vector                             a run in it
=====  ===================================  =========================================
0      a parameter                          all of it
1, 2   this rank's part of a group          what of a parameter is in that part
3      this rank's share of a sub-group     this rank's share of a parameter, padded
=====  ===================================  =========================================

At stage 3 a vector may be on a disk (``offload_optimizer`` to nvme); it is in memory while it is looked at.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from parallel.mesh import Mesh
from zero.fragment import Fragment

__all__ = ["EngineState"]


class _Run(NamedTuple):
    """Elements ``start`` and on of a flattened parameter, at ``begin`` of a vector."""

    name: str
    start: int
    begin: int
    length: int


@dataclass(slots=True, eq=False)
class _Vector:
    """What the inner optimizer sees as one parameter.

    Attributes:
        values: in the precision of the optimizer; empty while on a disk.
        group: of the inner optimizer.
        index: of the sub-group (stage 3).
        swapped: it is on a disk.
        runs: of parameters.
    """

    values: Tensor
    group: int
    index: int = 0
    swapped: bool = False
    runs: list[_Run] = field(default_factory=list)


class EngineState:
    """Master weights and optimizer state of an engine of DeepSpeed.

    Args:
        engine: initialized.
        model: that it trains.
        mesh: where.
    """

    def __init__(self, engine: Any, model: nn.Module, mesh: Mesh) -> None:
        self.stage: int = engine.zero_optimization_stage()
        self.wrapper, self.inner = engine.optimizer, engine.basic_optimizer
        self._trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self._frozen = {name: p for name, p in model.named_parameters() if not p.requires_grad}
        self._rank = mesh.data.rank
        self._vectors = [*(self._cut() if self.stage == 3 else self._flat() if self.stage else self._whole())]
        self._filling = self._prepared = False

    def _whole(self) -> Iterator[_Vector]:
        names = {parameter: name for name, parameter in self._trained.items()}
        for index, group in enumerate(self.inner.param_groups):
            for parameter in group["params"]:
                yield _Vector(parameter, index, runs=[_Run(names[parameter], 0, 0, parameter.numel())])

    def _flat(self) -> Iterator[_Vector]:
        flats = getattr(self.wrapper, "single_partition_of_fp32_groups", None)
        vectors = [_Vector(v, i) for i, v in enumerate(flats or self.wrapper.fp32_groups_flat_partition)]
        for name, parameter in self._trained.items():
            mapping: Any = getattr(parameter, "_hp_mapping")  # noqa: B009 - DeepSpeed's own, None if nothing is here
            if mapping is not None:
                there, here = mapping.lp_fragment_address, mapping.hp_fragment_address
                vectors[mapping.param_group_index].runs.append(_Run(name, there.start, here.start, here.numel))
        return iter(vectors)

    def _cut(self) -> Iterator[_Vector]:
        zero = self.wrapper
        vectors = [
            _Vector(values, zero.sub_group_to_group_id[i], i, zero._swappable_optimizer_subgroup(i))
            for i, values in enumerate(zero.fp32_partitioned_groups_flat)
        ]
        for name, parameter in self._trained.items():
            index, begin, share = zero.grad_position[zero.get_param_id(parameter)]
            length = min(share, _numel(parameter) - self._rank * share)
            if length > 0:
                vectors[index].runs.append(_Run(name, self._rank * share, begin, length))
        return iter(vectors)

    def fragments(self) -> Iterator[Fragment]:
        """What this rank holds, as views; of a vector on a disk copies, which are written back after :meth:`prepare`.

        Such a vector is in memory from its first fragment until the one after its last is asked for.
        """
        self._prepare_once()
        for vector in self._vectors:
            with self._in_memory(vector):
                kept = []
                for what, values in {"master": vector.values.data, **self._states(vector)}.items():
                    for run in vector.runs:
                        view = values.view(-1)[run.begin : run.begin + run.length]
                        kept.append((view, view.clone() if vector.swapped else view))
                        yield Fragment(run.name, what, run.start, kept[-1][1])
                for view, given in kept if vector.swapped and self._filling else ():
                    view.copy_(given)
        for name, parameter in self._frozen.items():
            yield self._frozen_fragment(name, parameter)

    def _frozen_fragment(self, name: str, parameter: nn.Parameter) -> Fragment:
        share: Tensor | None = getattr(parameter, "ds_tensor", None)
        if share is None:
            return Fragment(name, "master", 0, parameter.data.view(-1))
        start = self._rank * share.numel()
        return Fragment(name, "master", start, share.data[: max(0, min(share.numel(), _numel(parameter) - start))])

    def scalars(self) -> dict[str, float]:
        """State that is one number for a parameter (AdamW's step count), by parameter and what."""
        self._prepare_once()
        return {
            f"{run.name}|{what}": float(value)
            for vector in self._vectors
            for what, value in self._numbers(vector).items()
            for run in vector.runs
        }

    def prepare(self) -> None:
        """Allocate the state vectors, and expect that the fragments will be filled."""
        self._prepared = self._filling = True
        for vector in self._vectors:
            with self._in_memory(vector):
                self._allocate(vector)

    @torch.no_grad()
    def restore(self, scalars: Mapping[str, float]) -> None:
        """After the fragments were filled: set the scalars, and give the model its values."""
        self._filling = False
        for vector in self._vectors:
            state = self.inner.state[vector.values]
            for what, value in self._numbers(vector).items() if vector.runs else ():
                saved = scalars[f"{vector.runs[0].name}|{what}"]
                state[what] = value.fill_(saved) if isinstance(value, Tensor) else type(value)(saved)
        if self.stage == 3:
            for vector in self._vectors:
                if not vector.swapped:
                    self.wrapper._reassign_or_swap_out_partitioned_parameters(vector.index)
            if kept := self.wrapper.persistent_parameters:
                kept[0].all_gather(kept)
            self.wrapper.invalidate_secondary_tensor()
        elif self.stage:
            self.wrapper.update_lp_params()

    def link(self) -> None:
        """Let DeepSpeed's own functions find the state: by itself it looks once, when one of the groups has some."""
        self._prepare_once()
        if self.stage in (1, 2):
            self.wrapper._hp_optimizer_states_linked = False
            self.wrapper._lazy_init_hp_params_optimizer_state()

    def _prepare_once(self) -> None:
        if not self._prepared and not any(self._states(vector) for vector in self._vectors):
            self.prepare()
            self._filling = False
        self._prepared = True

    def _allocate(self, vector: _Vector) -> None:
        """Have the inner optimizer make its state, which it does in a step: one of rate 0 with gradient 0."""
        groups = self.inner.param_groups
        params, rates = [g["params"] for g in groups], [(g["lr"], g["weight_decay"]) for g in groups]
        saved, gradient = vector.values.detach().clone(), vector.values.grad
        vector.values.grad = torch.zeros_like(vector.values)
        for index, group in enumerate(groups):
            own = [vector.values] if index == vector.group else []
            group.update(params=own, lr=0.0, weight_decay=0.0)
        try:
            self.inner.step()
        finally:
            for group, held, (lr, decay) in zip(groups, params, rates, strict=True):
                group.update(params=held, lr=lr, weight_decay=decay)
            vector.values.grad = gradient  # with offload it is kept for the next step
        vector.values.data.copy_(saved)
        state = self.inner.state[vector.values]
        for what, value in self._numbers(vector).items():
            state[what] = value.zero_() if isinstance(value, Tensor) else type(value)(0)

    @contextmanager
    def _in_memory(self, vector: _Vector) -> Iterator[None]:
        """A vector and its state, read from the disk and, while they are being filled, written back to it."""
        if not vector.swapped:
            yield
            return
        zero = self.wrapper
        zero._optimizer_states_and_gradient_swap_in(vector.index)
        try:
            yield
        finally:
            if self._filling:
                zero._reassign_or_swap_out_partitioned_parameters(vector.index)
                zero._optimizer_states_and_gradient_swap_out(vector.index)
            else:
                zero._release_swap_buffers(vector.index)

    def _states(self, vector: _Vector) -> dict[str, Tensor]:
        values = vector.values
        state = self.inner.state.get(values, {})
        return {k: v for k, v in state.items() if isinstance(v, Tensor) and v.ndim and v.shape == values.shape}

    def _numbers(self, vector: _Vector) -> dict[str, Any]:
        state = self.inner.state.get(vector.values, {})
        return {k: v for k, v in state.items() if isinstance(v, int | float) or (isinstance(v, Tensor) and not v.ndim)}


def _numel(parameter: nn.Parameter) -> int:
    """Of the whole parameter, also where stage 3 has taken its values away."""
    return int(getattr(parameter, "ds_numel", parameter.numel()))
