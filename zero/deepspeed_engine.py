"""A model made of our layers under DeepSpeed's own engine: its ZeRO, its collectives, its offload."""

from __future__ import annotations

import contextlib
import importlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from parallel import comm
from parallel.errors import ConfigError, refuse
from parallel.holders import holders
from parallel.mesh import Axis, Mesh
from parallel.models.batch import Batch
from parallel.models.decoder import Decoder
from parallel.pp import Schedule, Timeline
from parallel.shard import Shard, param_shards
from zero.deepspeed_state import EngineState
from zero.fragment import Fragment
from zero.optimizer import OptimizerConfig

__all__ = ["ModelParallelUnit", "UnderDeepSpeed", "load_deepspeed"]

_ABSENT = "this needs DeepSpeed: pip install 'lockstep[deepspeed]'"


def load_deepspeed(name: str = "deepspeed") -> Any:
    """A module of DeepSpeed.

    Raises:
        ConfigError: it is not installed.
    """
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ConfigError(f"{_ABSENT} ({error})") from None


class ModelParallelUnit:
    """What DeepSpeed asks its ``mpu``: who shares a layer (tp), and who has a copy of it (dp x cp).

    Args:
        mesh: without a pipeline; every rank makes one at the same time.
    """

    def __init__(self, mesh: Mesh) -> None:
        self._model, self._data = mesh.tp, mesh.data
        self._groups = {axis.name: _group(axis, mesh.rank) for axis in (mesh.tp, mesh.data)}

    def get_model_parallel_rank(self) -> int:
        """Of this rank on tp."""
        return self._model.rank

    def get_model_parallel_world_size(self) -> int:
        """Ranks that share a layer."""
        return self._model.size

    def get_model_parallel_group(self) -> dist.ProcessGroup:
        """The ranks that share a layer."""
        return self._groups[self._model.name]

    def get_data_parallel_rank(self) -> int:
        """Of this rank on the data axis."""
        return self._data.rank

    def get_data_parallel_world_size(self) -> int:
        """Ranks that learn from different tokens."""
        return self._data.size

    def get_data_parallel_group(self) -> dist.ProcessGroup:
        """The ranks that learn from different tokens."""
        return self._groups[self._data.name]

    get_tensor_model_parallel_rank = get_model_parallel_rank
    get_tensor_model_parallel_world_size = get_model_parallel_world_size
    get_tensor_model_parallel_group = get_model_parallel_group


def _group(axis: Axis, rank: int) -> dist.ProcessGroup:
    """The group of an axis; for an axis of one rank, which has none, one of that rank."""
    made = axis.group or dist.new_group([rank], use_local_synchronization=True)
    assert isinstance(made, dist.ProcessGroup)
    return made


class _Held:
    """See :class:`zero.engine.Held`."""

    def __init__(self, shards: Mapping[str, Shard], mesh: Mesh) -> None:
        self.shards, self.holders = shards, holders(shards, mesh)
        self.arriving: Callable[[Tensor], None] | None = None


class UnderDeepSpeed:
    """A model under ``deepspeed.initialize``, as :class:`zero.trainer.Trainer` takes it in the place of an optimizer.

    DeepSpeed reads LOCAL_RANK from the environment, as torchrun sets it.

    Args:
        model: built on the mesh, without a pipeline.
        mesh: over an initialized process group.
        document: DeepSpeed's configuration; the sizes of a batch in it are replaced.
        microbatches: of each rank and step.
        optimizer: AdamW, where the document has no optimizer, and clipping, where it says nothing of it.

    Raises:
        ConfigError: DeepSpeed is not installed, or it cannot train like this.
    """

    def __init__(
        self,
        model: Decoder,
        mesh: Mesh,
        document: Mapping[str, Any],
        *,
        microbatches: int = 1,
        optimizer: OptimizerConfig | None = None,
    ) -> None:
        deepspeed = load_deepspeed()
        self.model, self.mesh, self.microbatches = model, mesh, microbatches
        self.config = OptimizerConfig() if optimizer is None else optimizer
        self._shards = param_shards(model)
        refuse(ConfigError, self._misfits(document))
        self.buckets = _Held(self._shards, mesh)
        self._mark()
        settings = dict(document) | {
            "train_micro_batch_size_per_gpu": 1,
            "gradient_accumulation_steps": microbatches,
            "train_batch_size": microbatches * mesh.data.size,
        }
        settings.setdefault("gradient_clipping", self.config.clip)
        settings.setdefault("zero_allow_untested_optimizer", True)
        settings.setdefault("steps_per_print", 1 << 30)
        # It would replace torch's own linear function, for every module of the process.
        cut: dict[str, Any] = dict(document.get("zero_optimization", {}))
        settings["zero_optimization"] = {"memory_efficient_linear": False, **cut}
        groups = self._parameter_groups(document)
        self.engine, *_ = deepspeed.initialize(
            model=_Loss(model),
            model_parameters=groups,
            optimizer=None if "optimizer" in document else self._adamw(groups, cut),
            config=settings,
            mpu=ModelParallelUnit(mesh),
            dist_init_required=False,
        )
        self._state = EngineState(self.engine, model, mesh)

    @property
    def stage(self) -> int:
        """Of ZeRO."""
        return self._state.stage

    def _misfits(self, document: Mapping[str, Any]) -> Iterator[str]:
        if self.mesh.pp.size > 1:
            yield f"layout.pp = {self.mesh.pp.size}: DeepSpeed's engine is not given a pipeline; the nearest is pp = 1"
        if any(shard.repeated(self.mesh.tp.size) for shard in self._shards.values()):
            size = self.mesh.tp.size
            yield f"layout.tp = {size} repeats key-value heads, which DeepSpeed would count twice when it clips"
        if "scheduler" in document:
            yield "scheduler: the learning rate is the trainer's (schedule.*), which sets it in every step"

    def _mark(self) -> None:
        """Tell DeepSpeed which parameters are cut, as it asks for it, and complete gradients that arrive in parts."""
        for name, parameter in self.model.named_parameters():
            shard = self._shards[name]
            if "tp" in shard.split:
                parameter.model_parallel = True  # pyright: ignore[reportAttributeAccessIssue]
            if parameter.requires_grad:
                parameter.register_hook(self._arrival(shard))

    def _arrival(self, shard: Shard) -> Callable[[Tensor], Tensor]:
        """What becomes of a gradient before DeepSpeed has it."""
        axes = [axis for name in shard.partial if (axis := self.mesh.axes[name]).size > 1]

        def hook(grad: Tensor) -> Tensor:
            if axes or self.buckets.arriving:
                grad = grad.clone()
            if self.buckets.arriving:
                self.buckets.arriving(grad)
            for axis in axes:
                comm.sum_(grad, axis)
            return grad

        return hook

    def _parameter_groups(self, document: Mapping[str, Any]) -> list[dict[str, Any]]:
        """Matrices, whose weights decay, and the rest."""
        decay = document.get("optimizer", {}).get("params", {}).get("weight_decay", self.config.weight_decay)
        trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        matrices, others = [p for p in trained if p.ndim > 1], [p for p in trained if p.ndim <= 1]
        groups = [{"params": matrices, "weight_decay": decay}, {"params": others, "weight_decay": 0.0}]
        return [group for group in groups if group["params"]]

    def _adamw(self, groups: list[dict[str, Any]], cut: Mapping[str, Any]) -> torch.optim.Optimizer:
        """AdamW with our values; DeepSpeed's own where the state is in CPU memory or on a disk, as it asks for it."""
        c = self.config
        values = {"lr": c.lr, "betas": (c.beta1, c.beta2), "eps": c.eps}
        section = cut.get("offload_optimizer") or {}
        if section.get("device", "none") == "none":
            return torch.optim.AdamW(groups, **values)
        return load_deepspeed("deepspeed.ops.adam").DeepSpeedCPUAdam(groups, **values, adamw_mode=True)

    def train(self, batches: Sequence[Batch], *, trace: bool = False, **options: Any) -> Tensor:
        """See :class:`zero.engine.Engine`; there are as many microbatches as was said."""
        assert len(batches) == self.microbatches, f"{len(batches)} microbatches, of {self.microbatches}"
        # DeepSpeed divides by ranks and microbatches; the sum of losses is to be divided by the labels of all.
        options["scale"] = options.get("scale", 1.0) * self.mesh.data.size * self.microbatches
        total = torch.zeros((), dtype=torch.float64, device=self.mesh.device)
        self.engine.train()
        for index, batch in enumerate(batches):
            loss, losses_T = self.engine(batch, options)
            total += losses_T.detach().sum()
            self.engine.backward(loss)
            if index < len(batches) - 1:
                self.engine.step()
        return total

    def step(self, lr: float | None = None) -> float:
        """Clip and update; the norm of the gradients before clipping.

        With a norm that is not finite nothing is changed, on any rank.
        """
        for group in self.engine.basic_optimizer.param_groups:
            group["lr"] = self.config.lr if lr is None else lr
        if self.stage:
            self.engine.step()
            return float(self.engine.get_global_grad_norm())
        norm = self._norm()
        if math.isfinite(norm):
            self.engine.step()
            return norm
        self.engine.set_gradient_accumulation_boundary(False)  # then a step only counts
        self.engine.step()
        self.engine.set_gradient_accumulation_boundary(None)
        self.engine.zero_grad()
        return norm

    def _norm(self) -> float:
        """Of all gradients, which without ZeRO DeepSpeed does not tell."""
        own, shared = torch.zeros(2, dtype=torch.float64, device=self.mesh.device)
        for name, parameter in self.model.named_parameters():
            if parameter.grad is not None:
                square = parameter.grad.double().pow(2).sum()
                own, shared = (own + square, shared) if "tp" in self._shards[name].split else (own, shared + square)
        return math.sqrt(float(comm.sum_(own, self.mesh.tp) + shared))

    @torch.no_grad()
    def evaluate(self, batches: Sequence[Batch]) -> Tensor:
        """See :class:`zero.engine.Engine`."""
        total = torch.zeros((), dtype=torch.float64, device=self.mesh.device)
        self.engine.eval()
        for batch in batches:
            total += self.engine(batch, {})[1].sum()
        return total

    def timeline(self) -> Timeline:
        """There is none."""
        raise ConfigError("trace: DeepSpeed's engine has no timeline")

    def table(self, microbatches: int) -> Schedule:
        """There is none."""
        raise ConfigError("trace: DeepSpeed's engine has no schedule")

    def explained(self, held: Callable[[], int]) -> AbstractContextManager[None]:
        """Nothing is explained."""
        return contextlib.nullcontext()

    def culprits(self) -> list[str]:
        """Where gradients were not finite is not known."""
        return ["DeepSpeed's engine does not say where"]

    def pieces(self, what: str) -> Iterator[tuple[str, Tensor]]:
        """(parameter, this rank's tensor-parallel piece) of ``master`` or a state vector; every rank calls it."""
        deepspeed = load_deepspeed("deepspeed.utils")
        own = {(f.parameter, f.what): f.values for f in self.state()} if not self.stage else {}
        self._state.link()
        for name, parameter in self.model.named_parameters():
            if not parameter.requires_grad:
                continue
            if not self.stage:
                value = own[name, what]
            elif what == "master":
                value = deepspeed.safe_get_full_fp32_param(parameter)
            else:
                value = deepspeed.safe_get_full_optimizer_state(parameter, what)
            yield name, value.view(self._shards[name].local_shape(self.mesh.place))

    def state(self) -> Iterator[Fragment]:
        """See :meth:`zero.optimizer.ZeroOptimizer.state`; of what is on a disk there are copies."""
        return self._state.fragments()

    def scalars(self) -> dict[str, float]:
        """See :meth:`zero.optimizer.ZeroOptimizer.scalars`."""
        return self._state.scalars()

    def prepare(self) -> None:
        """See :meth:`zero.optimizer.ZeroOptimizer.prepare`."""
        self._state.prepare()

    def restore(self, scalars: dict[str, float]) -> None:
        """See :meth:`zero.optimizer.ZeroOptimizer.restore`."""
        self._state.restore(scalars)

    def changes(self) -> int:
        """See :meth:`zero.optimizer.ZeroOptimizer.changes`; DeepSpeed's are not counted."""
        return 0

    def read_behind(self, wait: Callable[[], object]) -> None:
        """Wait at once: DeepSpeed cannot be held off its state."""
        wait()


class _Loss(nn.Module):
    """The loss as what the module returns, for DeepSpeed's hooks go around ``forward``."""

    def __init__(self, model: Decoder) -> None:
        super().__init__()
        self.model = model

    def forward(self, batch: Batch, options: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """The sum of the losses times ``scale``, and the loss of each token."""
        loss = self.model.loss(batch, **options)
        return loss.total, loss.losses_T
