"""A model made of our layers under DeepSpeed's own engine: its ZeRO, its optimizers, its offload."""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from parallel import comm
from parallel.errors import ConfigError, refuse
from parallel.mesh import Axis, Mesh
from parallel.models.batch import IGNORE, Batch
from parallel.models.decoder import Decoder
from parallel.shard import Shard, param_shards
from zero.optimizer import OptimizerConfig
from zero.schedule import ScheduleConfig

__all__ = ["ModelParallelUnit", "UnderDeepSpeed", "load_deepspeed"]


def load_deepspeed(name: str = "deepspeed") -> Any:
    """A module of DeepSpeed.

    Raises:
        ConfigError: it is not installed.
    """
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ConfigError(f"this needs DeepSpeed: pip install 'lockstep[deepspeed]' ({error})") from None


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


class UnderDeepSpeed:
    """Steps of a model under ``deepspeed.initialize``, with the face of :class:`zero.trainer.Trainer`'s steps.

    Optimizer, schedule and clipping are DeepSpeed's where the document has them, else ours. DeepSpeed reads LOCAL_RANK
    from the environment, as torchrun sets it.

    Args:
        model: built on the mesh, without a pipeline.
        mesh: over an initialized process group.
        document: DeepSpeed's configuration; the sizes of a batch in it are replaced.
        steps: of the whole run.
        microbatches: of each rank and step.
        optimizer: AdamW and clipping, where the document has none.
        schedule: of the learning rate, where the document has none.

    Raises:
        ConfigError: DeepSpeed is not installed, or the layout cannot be.
    """

    def __init__(
        self,
        model: Decoder,
        mesh: Mesh,
        document: Mapping[str, Any],
        *,
        steps: int,
        microbatches: int = 1,
        optimizer: OptimizerConfig | None = None,
        schedule: ScheduleConfig | None = None,
    ) -> None:
        deepspeed = load_deepspeed()
        self.model, self.mesh, self.steps, self.microbatches = model, mesh, steps, microbatches
        self.config = OptimizerConfig() if optimizer is None else optimizer
        self.schedule = ScheduleConfig(kind="constant", warmup=0) if schedule is None else schedule
        self.shards = param_shards(model)
        refuse(ConfigError, self._misfits())
        self._sum_parts()
        settings = dict(document) | {
            "train_micro_batch_size_per_gpu": 1,
            "gradient_accumulation_steps": microbatches,
            "train_batch_size": microbatches * mesh.data.size,
        }
        settings.setdefault("gradient_clipping", self.config.clip)
        settings.setdefault("zero_allow_untested_optimizer", True)
        groups = self._parameter_groups(document)
        self.engine, self._inner, _, self._scheduler = deepspeed.initialize(
            model=_Loss(model),
            model_parameters=groups,
            optimizer=None if "optimizer" in document else self._adamw(groups),
            config=settings,
            mpu=ModelParallelUnit(mesh),
            dist_init_required=False,
        )
        self.done = 0

    def _misfits(self) -> Iterator[str]:
        if self.mesh.pp.size > 1:
            yield f"layout.pp = {self.mesh.pp.size}: DeepSpeed's engine is not given a pipeline; the nearest is pp = 1"
        if any(shard.repeated(self.mesh.tp.size) for shard in self.shards.values()):
            size = self.mesh.tp.size
            yield f"layout.tp = {size} repeats key-value heads, which DeepSpeed would count twice when it clips"

    def _sum_parts(self) -> None:
        """Sum over tp what arrives in parts, and tell DeepSpeed which parameters are cut, in the way it asks for."""
        for name, parameter in self.model.named_parameters():
            shard = self.shards[name]
            if "tp" in shard.split:
                parameter.model_parallel = True  # pyright: ignore[reportAttributeAccessIssue]
            if parameter.requires_grad and self.mesh.tp.size > 1 and shard.partial:
                parameter.register_hook(_summed(shard, self.mesh))

    def _parameter_groups(self, document: Mapping[str, Any]) -> list[dict[str, Any]]:
        """Matrices, whose weights decay, and the rest."""
        decay = document.get("optimizer", {}).get("params", {}).get("weight_decay", self.config.weight_decay)
        trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        matrices, others = [p for p in trained if p.ndim > 1], [p for p in trained if p.ndim <= 1]
        groups = [{"params": matrices, "weight_decay": decay}, {"params": others, "weight_decay": 0.0}]
        return [group for group in groups if group["params"]]

    def _adamw(self, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
        c = self.config
        return torch.optim.AdamW(groups, lr=c.lr, betas=(c.beta1, c.beta2), eps=c.eps)

    def step(self, batches: Sequence[Batch]) -> tuple[float, float]:
        """One optimizer step over this rank's microbatches; the mean loss, and the gradients' norm before clipping."""
        loss, _ = self.accumulate(batches)
        return loss, self.update()[0]

    def accumulate(self, batches: Sequence[Batch]) -> tuple[float, int]:
        """The gradients of one step; the mean loss, and the number of labels, of all ranks."""
        assert len(batches) == self.microbatches, f"{len(batches)} microbatches, of {self.microbatches}"
        batches = [batch.to(self.mesh.device) for batch in batches]
        own = sum(int((batch.labels_T != IGNORE).sum()) for batch in batches if batch.labels_T is not None)
        count = int(comm.sum_(torch.tensor(own, device=self.mesh.device), self.mesh.data))
        # DeepSpeed divides by ranks and microbatches; the sum of losses is to be divided by the labels of all.
        scale = self.mesh.data.size * self.microbatches / max(1, count)
        total = torch.zeros((), dtype=torch.float64, device=self.mesh.device)
        self.engine.train()
        for index, batch in enumerate(batches):
            loss, losses_T = self.engine(batch, scale)
            total += losses_T.detach().sum()
            self.engine.backward(loss)
            if index < len(batches) - 1:
                self.engine.step()
        return float(comm.sum_(total, self.mesh.data)) / max(1, count), count

    def update(self) -> tuple[float, float]:
        """Apply the gradients of this step; their norm before clipping, and the learning rate."""
        if self._scheduler is None:
            lr = self.config.lr * self.schedule.factor(self.done, self.steps)
            for group in self._inner.param_groups:
                group["lr"] = lr
        lr = float(self._inner.param_groups[0]["lr"])
        self.engine.step()
        self.done += 1
        return float(self.engine.get_global_grad_norm() or 0.0), lr

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        """(parameter, this rank's tensor-parallel piece) of the master weights; every rank calls it."""
        full = load_deepspeed("deepspeed.utils").safe_get_full_fp32_param
        for name, parameter in self.model.named_parameters():
            value = full(parameter)
            yield name, parameter.data if value is None else value.view(self.shards[name].local_shape(self.mesh.place))


class _Loss(nn.Module):
    """The loss as what the module returns, for DeepSpeed's hooks go around ``forward``."""

    def __init__(self, model: Decoder) -> None:
        super().__init__()
        self.model = model

    def forward(self, batch: Batch, scale: float) -> tuple[Tensor, Tensor]:
        """The sum of the losses times ``scale``, and the loss of each token."""
        loss = self.model.loss(batch, scale=scale)
        return loss.total, loss.losses_T


def _summed(shard: Shard, mesh: Mesh) -> Any:
    """A hook that completes a gradient over the axes on which it arrives in parts."""

    def hook(grad: Tensor) -> Tensor:
        grad = grad.clone()
        for name in shard.partial:
            comm.sum_(grad, mesh.axes[name])
        return grad

    return hook
