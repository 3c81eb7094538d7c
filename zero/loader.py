"""The order of training data: which tokens each rank learns from in each step, as a function of the step."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch

from parallel.errors import ConfigError, DataError, refuse
from parallel.models.batch import IGNORE, Batch
from zero.data import PackedTokens

__all__ = ["Loader", "Sample", "permute", "validation_batches"]


@dataclass(frozen=True, slots=True)
class Sample:
    """One sequence of a step: which window of the tokens, and the first and the last document that it touches.

    Documents are counted from 0 in the order in which they were packed; window w is tokens ``w * sequence`` and on.
    """

    window: int
    first_document: int
    last_document: int


def permute(index: int, count: int, key: int) -> int:
    """Where the permutation of ``range(count)`` that ``key`` names puts ``index``; the same on every machine.

    A Feistel network of six rounds over the next even number of bits, walked until it lands inside the range (Black and
    Rogaway, Ciphers with Arbitrary Finite Domains, 2002); the rounds mix with splitmix64.
    """
    if not 0 <= index < count:
        raise IndexError(f"{index} is not in range({count})")
    half = max((count - 1).bit_length() + 1, 2) // 2
    mask = (1 << half) - 1
    rounds = [_mix(key + turn) for turn in range(6)]
    while True:
        left, right = index >> half, index & mask
        for turn in rounds:
            left, right = right, left ^ (_mix(turn ^ right) & mask)
        index = left << half | right
        if index < count:
            return index


def _mix(value: int) -> int:
    """splitmix64 (Steele, Lea and Flood, 2014) of the low 64 bits."""
    mask = (1 << 64) - 1
    value = (value + 0x9E3779B97F4A7C15) & mask
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & mask
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & mask
    return value ^ (value >> 31)


class Loader:
    """The microbatches of each optimizer step, as a function of its number; nothing to save, nothing to restore.

    A step takes the next ``sequences`` windows of an endless order in which every window appears once an epoch, each
    epoch in its own permutation. Position k of a step goes to microbatch ``k // (size * n)`` and therein to rank
    ``k // n % size``, n sequences each; its tokens have indices ``k * sequence`` and on, whatever the layout.

    Args:
        packed: the tokens.
        sequence: tokens a sequence.
        sequences: sequences a step, over all ranks and microbatches.
        microbatches: of each rank and step.
        rank: data-parallel rank, of ``size``.
        seed: of the order.
        shuffle: False reads the windows as they lie.

    Raises:
        ConfigError: what :meth:`problems` finds.
        DataError: too few tokens for one sequence.
    """

    def __init__(
        self,
        packed: PackedTokens,
        *,
        sequence: int,
        sequences: int,
        microbatches: int = 1,
        rank: int = 0,
        size: int = 1,
        seed: int = 0,
        shuffle: bool = True,
    ) -> None:
        found = self.problems(sequence=sequence, sequences=sequences, microbatches=microbatches, rank=rank, size=size)
        refuse(ConfigError, found)
        if not packed.windows(sequence):
            need = f"a sequence of {sequence} needs {sequence + 1} (one more, for the last label)"
            raise DataError(f"{packed.path} holds {len(packed)} tokens; {need}")
        self.packed, self.sequence, self.sequences, self.microbatches = packed, sequence, sequences, microbatches
        self.rank, self.size, self.seed, self.shuffle = rank, size, seed, shuffle

    @staticmethod
    def problems(*, sequence: int, sequences: int, microbatches: int = 1, rank: int = 0, size: int = 1) -> list[str]:
        """Why these arguments cannot be honoured, one sentence each; empty if they can."""
        counts = {"sequence": sequence, "sequences": sequences, "microbatches": microbatches, "size": size}
        found = [f"{name} = {value} must be at least 1" for name, value in counts.items() if value < 1]
        if not found and not 0 <= rank < size:
            found.append(f"rank = {rank} must be at least 0 and less than size = {size}")
        if not found and sequences % (size * microbatches):
            unit = size * microbatches
            closest = max((sequences + unit // 2) // unit, 1) * unit
            factors = f"{size} data-parallel ranks x {microbatches} microbatches = {unit}"
            found.append(f"sequences = {sequences} must be divisible by {factors}; the nearest that is: {closest}")
        return found

    def step(self, number: int) -> list[Batch]:
        """The microbatches of this rank for optimizer step ``number``, counted from 0."""
        if number < 0:
            raise IndexError(f"step {number}")
        each = self.sequences // (self.size * self.microbatches)
        firsts = [(microbatch * self.size + self.rank) * each for microbatch in range(self.microbatches)]
        return [self._batch(number, range(first, first + each)) for first in firsts]

    def samples(self, number: int) -> list[Sample]:
        """What all ranks learn from in optimizer step ``number``, in the order of the step."""
        windows = [self._window(number * self.sequences + place) for place in range(self.sequences)]
        return [Sample(window, *self.packed.documents(window, self.sequence)) for window in windows]

    def _batch(self, number: int, places: range) -> Batch:
        windows = [self._window(number * self.sequences + place) for place in places]
        return _pack(self.packed, self.sequence, list(zip(places, windows, strict=True)), key=number)

    def _window(self, entry: int) -> int:
        count = self.packed.windows(self.sequence)
        epoch, place = divmod(entry, count)
        return permute(place, count, _mix(_mix(self.seed) + epoch)) if self.shuffle else place


def validation_batches(
    packed: PackedTokens, *, sequence: int, sequences: int, rank: int = 0, size: int = 1, limit: int | None = None
) -> Iterator[Batch]:
    """``limit`` windows spread evenly over the text (None: all) in order, ``sequences`` at a time over all ranks.

    Every rank gets equally many batches, so that ranks stay in step; where windows run short, a rank's batch holds
    fewer of them, or one whose labels are all :data:`IGNORE`. Nothing is yielded where there is no whole window.

    Raises:
        ConfigError: an argument out of its range.
    """
    refuse(ConfigError, Loader.problems(sequence=sequence, sequences=size * max(sequences, 0), rank=rank, size=size))
    there = packed.windows(sequence)
    count = there if limit is None else min(there, max(limit, 0))
    chosen = [place * there // count for place in range(count)]
    return (
        _share(packed, sequence, chosen[first : first + sequences], rank, size, key)
        for key, first in enumerate(range(0, count, sequences))
    )


def _share(packed: PackedTokens, sequence: int, windows: list[int], rank: int, size: int, key: int) -> Batch:
    places = range(rank * len(windows) // size, (rank + 1) * len(windows) // size)
    if places:
        return _pack(packed, sequence, [(place, windows[place]) for place in places], key)
    idle = _pack(packed, sequence, [(len(windows) + rank, windows[0])], key)
    return replace(idle, labels_T=torch.full((sequence,), IGNORE))


def _pack(packed: PackedTokens, sequence: int, entries: list[tuple[int, int]], key: int) -> Batch:
    """Windows, each with its place in the step, one after the other in a batch."""
    tokens, labels, index, bounds = [], [], [], []
    for number, (place, window) in enumerate(entries):
        window_tokens, window_labels, begins = packed.window(window, sequence)
        tokens.append(window_tokens)
        labels.append(window_labels)
        index.append(torch.arange(place * sequence, (place + 1) * sequence))
        bounds += [number * sequence + begin for begin in (0, *begins)]
    bounds.append(len(entries) * sequence)
    starts = torch.tensor(bounds)
    return Batch(
        tokens_T=torch.cat(tokens),
        positions_T=torch.arange(bounds[-1]) - torch.repeat_interleave(starts[:-1], starts.diff()),
        boundaries=tuple(bounds),
        labels_T=torch.cat(labels),
        index_T=torch.cat(index),
        key=key,
    )
