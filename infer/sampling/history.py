"""What was generated so far, as tensors: a step takes the tokens of the one before without the host knowing them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["History"]

SLOTS, WIDTH = 8, 64
NOTHING = -1


class History:
    """For each slot: the different tokens seen and how often each was generated, and the last tokens in order.

    A slot costs memory for the different tokens of its request, not for the vocabulary. ``seen`` says how many
    generated tokens a slot has taken in, :meth:`catch_up` brings it to where the host says it must be.
    """

    def __init__(self, vocabulary: int, device: torch.device) -> None:
        self.vocabulary, self.device = vocabulary, device
        self.seen: list[int] = []
        self._free: list[int] = []
        self._longest: list[int] = []
        self._tokens = torch.zeros(0, WIDTH, dtype=torch.int64, device=device)
        self._counts = torch.zeros(0, WIDTH, dtype=torch.int32, device=device)
        self._length = torch.zeros(0, dtype=torch.int64, device=device)
        self._tail = torch.zeros(0, 1, dtype=torch.int64, device=device)

    def take_slot(self) -> int:
        """A free slot, which is not filled yet."""
        if not self._free:
            slots = len(self.seen)
            self._resize(max(SLOTS, 2 * slots), self._tokens.shape[1], self._tail.shape[1])
            self._free = list(range(max(SLOTS, 2 * slots) - 1, slots - 1, -1))
        slot = self._free.pop()
        self.seen[slot] = NOTHING
        return slot

    def release(self, slot: int) -> None:
        """Give a slot back."""
        self._free.append(slot)

    def copy(self, source: int, target: int) -> None:
        """Make a slot equal to another one."""
        for table in (self._tokens, self._counts, self._length, self._tail):
            table[target] = table[source]
        self.seen[target], self._longest[target] = self.seen[source], self._longest[source]

    def catch_up(self, slot: int, tokens: Sequence[int], prompt: int, generated: int, tail: int) -> bool:
        """Whether a slot lacks exactly one token; if it lacks more, it is filled from the host's tokens.

        Args:
            tokens, prompt, generated: as in :class:`infer.sampling.row.Row`.
            tail: how many of the last tokens this request wants in order.
        """
        if tail > self._tail.shape[1]:
            self._resize(len(self.seen), self._tokens.shape[1], tail)  # who is here already wants no more than before
        lacks = generated - self.seen[slot]
        if self.seen[slot] != NOTHING and 0 <= lacks <= 1:
            return lacks == 1
        assert prompt + generated <= len(tokens), "the history of a request cannot be rebuilt from tokens not yet known"
        self._fill(slot, tokens[:prompt], tokens[prompt : prompt + generated])
        return False

    def append(self, slots: Sequence[int], slots_R: Tensor, tokens_R: Tensor) -> None:
        """Take in one generated token for each of these slots, which are given twice: for the host and as a tensor."""
        width = self._tokens.shape[1]
        for slot in slots:
            self.seen[slot] += 1
            self._longest[slot] = min(self._longest[slot] + 1, self.vocabulary)
        if slots and max(self._longest[slot] for slot in slots) > width:
            self._resize(len(self.seen), 2 * width, self._tail.shape[1])
        tokens, length = self._tokens[slots_R], self._length[slots_R]
        place = torch.arange(tokens.shape[1], device=self.device)
        same = (tokens == tokens_R[:, None]) & (place < length[:, None])
        new = ~same.any(1)
        self._counts.index_add_(0, slots_R, same.to(torch.int32))
        spot = (slots_R, length.clamp(max=tokens.shape[1] - 1))
        self._tokens[spot] = torch.where(new, tokens_R, self._tokens[spot])
        self._counts[spot] = torch.where(new, torch.ones_like(spot[0], dtype=torch.int32), self._counts[spot])
        self._length[slots_R] = length + new
        self._tail[slots_R] = torch.cat([self._tail[slots_R, 1:], tokens_R[:, None]], 1)

    def counts(self, slots_R: Tensor) -> tuple[Tensor, Tensor]:
        """The different tokens seen by each slot (R, C), and how often each was generated (R, C), int64 and int32.

        Shorter rows are filled up with their first token, which comes with the same count wherever it stands.
        """
        tokens, counts = self._tokens[slots_R], self._counts[slots_R]
        beyond = torch.arange(tokens.shape[1], device=self.device) >= self._length[slots_R][:, None]
        return torch.where(beyond, tokens[:, :1], tokens), torch.where(beyond, counts[:, :1], counts)

    def tails(self, slots_R: Tensor) -> Tensor:
        """The last tokens of each slot in order (R, L), -1 where there was none."""
        return self._tail[slots_R]

    def _fill(self, slot: int, prompt: Sequence[int], generated: Sequence[int]) -> None:
        counts = Counter(generated)
        different = list(dict.fromkeys((*prompt, *generated)))
        width = self._tokens.shape[1]
        if len(different) > width:
            self._resize(len(self.seen), max(2 * width, len(different)), self._tail.shape[1])
        last = self._tail.shape[1]
        tail = [NOTHING] * last + [*prompt[-last:], *generated[-last:]]
        size = len(different)
        self._tokens[slot, :size] = torch.tensor(different, dtype=torch.int64, device=self.device)
        self._counts[slot, :size] = torch.tensor(
            [counts[token] for token in different], dtype=torch.int32, device=self.device
        )
        self._length[slot] = size
        self._tail[slot] = torch.tensor(tail[-last:], dtype=torch.int64, device=self.device)
        self.seen[slot], self._longest[slot] = len(generated), size

    def _resize(self, slots: int, width: int, tail: int) -> None:
        def grown(table: Tensor, *shape: int) -> Tensor:
            larger = table.new_zeros(shape)
            larger[tuple(slice(size) for size in table.shape)] = table
            return larger

        kept = self._tail
        self._tokens = grown(self._tokens, slots, width)
        self._counts = grown(self._counts, slots, width)
        self._length = grown(self._length, slots)
        self._tail = kept.new_full((slots, tail), NOTHING)
        if kept.numel():
            self._tail[: kept.shape[0], tail - kept.shape[1] :] = kept
        self.seen += [NOTHING] * (slots - len(self.seen))
        self._longest += [0] * (slots - len(self._longest))
