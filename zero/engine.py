"""What a trainer trains with: how gradients come to be and weights change, and the state that checkpoints hold."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol, runtime_checkable

from torch import Tensor

from parallel.mesh import Mesh
from parallel.models.batch import Batch
from parallel.models.decoder import Decoder
from parallel.models.pipelined import PipelinedModel
from parallel.pp import PipelineConfig, Schedule, Timeline
from parallel.shard import Shard
from zero.fragment import Fragment
from zero.memory import explained
from zero.optimizer import OptimizerConfig, ZeroOptimizer

__all__ = ["Engine", "Held", "Optimizer", "Own", "engine_of"]


class Held(Protocol):
    """Which parameters there are.

    Attributes:
        shards: the shard table of this rank's.
        holders: parameter -> pipeline ranks that hold it, for those of all stages.
        arriving: called with every gradient before it is added to others; for tests.
    """

    @property
    def shards(self) -> Mapping[str, Shard]: ...
    @property
    def holders(self) -> Mapping[str, Sequence[int]]: ...

    arriving: Callable[[Tensor], None] | None


class Optimizer(Protocol):
    """Weights and the state of their optimizer: what changes them, and what a checkpoint is made of.

    The state is read, and written, as :meth:`zero.optimizer.ZeroOptimizer.state` and its neighbours say.
    """

    config: OptimizerConfig
    mesh: Mesh

    @property
    def buckets(self) -> Held: ...
    @property
    def stage(self) -> int: ...
    def step(self, lr: float | None = None) -> float: ...
    def culprits(self) -> list[str]: ...
    def state(self) -> Iterator[Fragment]: ...
    def scalars(self) -> dict[str, float]: ...
    def prepare(self) -> None: ...
    def restore(self, scalars: dict[str, float]) -> None: ...
    def changes(self) -> int: ...
    def read_behind(self, wait: Callable[[], object]) -> None: ...


@runtime_checkable
class Engine(Protocol):
    """How the gradients of an optimizer's parameters come to be."""

    def train(self, batches: Sequence[Batch], *, trace: bool = False, **options: Any) -> Tensor:
        """Form the gradients of a step; the sum of the losses that this rank has seen, a float64 scalar.

        Args:
            batches: microbatches.
            trace: keep a record for :meth:`timeline`.
            options: of :meth:`Decoder.loss`; ``scale`` is one over the labels of all ranks.
        """
        ...

    def evaluate(self, batches: Sequence[Batch]) -> Tensor:
        """The sum of the losses that this rank has seen, without gradients."""
        ...

    def timeline(self) -> Timeline:
        """Of the last traced step; every rank of a pipeline calls this."""
        ...

    def table(self, microbatches: int) -> Schedule:
        """The schedule of a step with so many microbatches."""
        ...

    def explained(self, held: Callable[[], int]) -> AbstractContextManager[None]:
        """A context that says what training needs if memory ends in it; ``held``: the most bytes so far."""
        ...


class Own:
    """Our own engine: a model and its pipeline, whose gradients go into the buckets of our optimizer.

    Args:
        model: this rank's stages.
        optimizer: over the same model.
        mesh: where.
        config: of the pipeline.
    """

    def __init__(self, model: Decoder, optimizer: ZeroOptimizer, mesh: Mesh, config: PipelineConfig) -> None:
        self.optimizer, self.mesh = optimizer, mesh
        self.stages = PipelinedModel(model, mesh, config)
        self._trained = [parameter for parameter in model.parameters() if parameter.requires_grad]

    def train(self, batches: Sequence[Batch], *, trace: bool = False, **options: Any) -> Tensor:
        """See :class:`Engine`."""
        self.optimizer.begin()
        return self.stages.train(batches, self.optimizer.expect_last, trace=trace, **options)

    def evaluate(self, batches: Sequence[Batch]) -> Tensor:
        """See :class:`Engine`."""
        return self.stages.evaluate(batches)

    def timeline(self) -> Timeline:
        """See :class:`Engine`."""
        return self.stages.timeline()

    def table(self, microbatches: int) -> Schedule:
        """See :class:`Engine`."""
        return self.stages.table(microbatches)

    def explained(self, held: Callable[[], int]) -> AbstractContextManager[None]:
        """See :class:`Engine`."""
        return explained(self._trained, self.optimizer.buckets.sharing, self.mesh.data.size, held)


def engine_of(model: Decoder, optimizer: Optimizer, mesh: Mesh, config: PipelineConfig) -> Engine:
    """What forms the gradients of an optimizer: the optimizer itself where it comes with an engine, else ours.

    Raises:
        TypeError: it is none of them.
    """
    if isinstance(optimizer, Engine):
        return optimizer
    if isinstance(optimizer, ZeroOptimizer):
        return Own(model, optimizer, mesh, config)
    raise TypeError(f"{type(optimizer).__name__} forms no gradients")
