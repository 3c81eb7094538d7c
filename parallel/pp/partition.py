"""Which layers of a model each pipeline stage holds. No torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from parallel.errors import ConfigError

__all__ = ["Cut", "partition"]


@dataclass(frozen=True, slots=True)
class Cut:
    """One stage of a model.

    Attributes:
        stage: its index.
        stages: how many there are; the first has the embedding, the last the norm and the head.
        layers: the blocks that it holds.
    """

    stage: int
    stages: int
    layers: range

    @property
    def first(self) -> bool:
        """Whether it begins with the embedding."""
        return self.stage == 0

    @property
    def last(self) -> bool:
        """Whether it ends with the norm and the head."""
        return self.stage == self.stages - 1


def partition(
    layers: int, stages: int, by_hand: Sequence[int] = (), *, ends: tuple[float, float] = (0.0, 0.0)
) -> tuple[Cut, ...]:
    """Cut a model into stages.

    Args:
        layers: blocks of the model.
        stages: how many.
        by_hand: blocks of each stage; empty: so that the most expensive stage is as cheap as possible.
        ends: what the embedding, and the norm and head, cost, in blocks.

    Raises:
        ConfigError: too few layers, or ``by_hand`` does not add up; the nearest that works is named.
    """
    counts = list(by_hand) or _balanced(layers, stages, ends)
    if by_hand and (len(by_hand) != stages or sum(by_hand) != layers):
        nearest = ",".join(map(str, _balanced(layers, stages, ends))) if layers >= stages else f"{layers} stages"
        raise ConfigError(
            f"pp.layers = {','.join(map(str, by_hand))}: {len(by_hand)} stages with {sum(by_hand)} layers, but the "
            f"model has {layers} layers for {stages} stages; the nearest that works: {nearest}"
        )
    empty = [stage for stage, count in enumerate(counts) if count < 1 and (count < 0 or 0 < stage < stages - 1)]
    if empty:
        raise ConfigError(f"pp.layers = {','.join(map(str, counts))}: stage {empty[0]} would hold nothing")
    cuts, first = [], 0
    for stage, count in enumerate(counts):
        cuts.append(Cut(stage, stages, range(first, first + count)))
        first += count
    return tuple(cuts)


def _balanced(layers: int, stages: int, ends: tuple[float, float]) -> list[int]:
    """Blocks of each stage, at least one: the cost of the dearest stage is least, and then the counts most even."""
    if layers < stages:
        raise ConfigError(
            f"{layers} layers are fewer than {stages} pipeline stages; the nearest that works is {layers} stages"
        )
    counts = [1] * stages
    extra = [ends[0], *[0.0] * (stages - 2), ends[1]] if stages > 1 else [sum(ends)]
    for _ in range(layers - stages):
        # Blocks cost the same, so giving the next to the cheapest stage is optimal.
        counts[min(range(stages), key=lambda stage: (counts[stage] + extra[stage], stage))] += 1
    return counts
