"""One step of the sampler: rows of a kind are computed together, some rows at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import groupby

import torch
from torch import Tensor

from infer.sampling.draw import Draw, Drawn, draw, first_largest, log_total, scaled, truncated, weights
from infer.sampling.edits import EDITED, edit
from infer.sampling.history import History
from infer.sampling.logprobs import LogProbs, of_scaled, of_tokens
from infer.sampling.row import NUMBERS, Entry, Feature, Kind, Row
from infer.sampling.sampled import Sampled, finished

__all__ = ["sample"]

TEMPERATURE, TOP_P, MIN_P, TYPICAL_P = (NUMBERS.index(name) for name in ("temperature", "top_p", "min_p", "typical_p"))
TRUNCATED = Feature.TOP_K | Feature.TOP_P | Feature.MIN_P | Feature.TYPICAL


def sample(logits_RV: Tensor, rows: Sequence[Row], entries: Sequence[Entry], history: History, chunk: int) -> Sampled:
    """Sample one token for each row.

    Args:
        logits_RV: float32; left as they are.
        rows, entries: of each row.
        history: of the entries with a slot.
        chunk: numbers to compute at a time.
    """
    _catch_up(rows, entries, history)
    device = logits_RV.device
    out = Sampled(
        torch.empty(len(rows), dtype=torch.int64, device=device),
        torch.empty(len(rows), dtype=torch.int8, device=device),
    )
    for kind, places in _groups(entries, max(1, chunk // logits_RV.shape[1])):
        _Part(logits_RV, rows, entries, places, out).run(kind, history)
    kept = [i for i, entry in enumerate(entries) if entry.slot >= 0 and entry.kind is not Kind.BEAM]
    if kept:
        slots = [entries[i].slot for i in kept]
        tokens = out.tokens_R[torch.tensor(kept, device=device)]
        history.append(slots, torch.tensor(slots, device=device), tokens)
    for i, entry in enumerate(entries):
        if entry.features & Feature.PROCESSOR:
            entry.late = out.tokens_R, i
    return out


def _catch_up(rows: Sequence[Row], entries: Sequence[Entry], history: History) -> None:
    """Take in what the sampler has not sampled itself: prompts, what was computed elsewhere, and choices of beams."""
    slots, tokens = [], []
    for row, entry in zip(rows, entries, strict=True):
        if entry.slot < 0:
            continue
        tail = max((len(word) for word in entry.sequences), default=2) - 1
        if history.catch_up(entry.slot, row.tokens, row.prompt, row.generated, tail):
            slots.append(entry.slot)
            tokens.append(row.tokens[row.prompt + row.generated - 1])
    if slots:
        history.append(slots, torch.tensor(slots, device=history.device), torch.tensor(tokens, device=history.device))


def _groups(entries: Sequence[Entry], most: int) -> Iterator[tuple[Kind, list[int]]]:
    """Rows that are computed together, neighbours with the same features as far as possible."""

    def kind(i: int) -> tuple[Kind, int]:
        return entries[i].kind, entries[i].features & Feature.TYPICAL

    order = sorted(range(len(entries)), key=lambda i: (kind(i), entries[i].features, entries[i].top_k))
    for (name, _), group in groupby(order, kind):
        places = list(group)
        for start in range(0, len(places), most):
            yield name, sorted(places[start : start + most])


class _Part:
    """Some rows of one kind."""

    def __init__(
        self, logits_RV: Tensor, rows: Sequence[Row], entries: Sequence[Entry], places: list[int], out: Sampled
    ) -> None:
        self.places, self.out = places, out
        self.rows, self.entries = [rows[i] for i in places], [entries[i] for i in places]
        self.present = 0
        for entry in self.entries:
            self.present |= entry.features
        first, last = places[0], places[-1] + 1
        self.at = slice(first, last) if last - first == len(places) else torch.tensor(places, device=logits_RV.device)
        self.raw_RV = logits_RV[self.at]

    def run(self, kind: Kind, history: History) -> None:
        """Sample, and write into ``out`` what belongs to these rows."""
        if kind is Kind.BEAM:
            tokens, largest = self._beams(history)
        elif kind is Kind.DRAW:
            drawn = draw(self._edited(self.raw_RV, history), self._how())
            tokens, largest = drawn.tokens, drawn.largest
            self._report(Feature.PROCESSED, lambda some, most: _of_drawn(drawn, some, self._truncated(some), most))
        else:
            x_RV = self._edited(self.raw_RV, history)
            largest, tokens = first_largest(x_RV)
            self._report(Feature.PROCESSED, lambda some, most: of_tokens(x_RV[some], tokens[some], most))
        self._report(Feature.RAW, lambda some, most: of_tokens(self.raw_RV[some], tokens[some], most))
        done = finished(tokens, largest)
        self.out.tokens_R[self.at], self.out.failed_R[self.at] = done.tokens_R, done.failed_R

    def _edited(self, x_RV: Tensor, history: History) -> Tensor:
        if not self.present & EDITED:
            return x_RV
        if x_RV is self.raw_RV:
            x_RV = x_RV.clone(memory_format=torch.contiguous_format)
        for i, error in edit(x_RV, self.rows, self.entries, history).items():
            self.out.errors[self.places[i]] = error
        return x_RV

    def _how(self) -> Draw:
        device = self.raw_RV.device
        numbers = torch.tensor([entry.numbers for entry in self.entries], dtype=torch.float32, device=device).T
        keys = torch.tensor([(row.seed, row.generated) for row in self.rows], dtype=torch.int64, device=device).T
        how = Draw(seed=keys[0], index=keys[1], temperature=numbers[TEMPERATURE])
        if self.present & Feature.TOP_K:
            top_k = [entry.top_k if entry.features & Feature.TOP_K else 0 for entry in self.entries]
            how.top_k, how.most = torch.tensor(top_k, device=device), max(top_k)
        if self.present & Feature.TOP_P:
            how.top_p = numbers[TOP_P]
        if self.present & Feature.MIN_P:
            how.min_p = numbers[MIN_P]
        if self.present & Feature.TYPICAL:
            how.typical_p = numbers[TYPICAL_P]
        return how

    def _truncated(self, some: Sequence[int]) -> Tensor:
        flags = [bool(self.entries[i].features & TRUNCATED) for i in some]
        return torch.tensor(flags, device=self.raw_RV.device)

    def _beams(self, history: History) -> tuple[Tensor, Tensor]:
        """Candidates by log-probability, which penalties and bans change as in `transformers`: not normalized again."""
        s_RV, largest = scaled(self.raw_RV, None)
        x_RV = self._edited((s_RV - log_total(weights(s_RV))[:, None]).to(torch.float32), history)
        counts = tuple(entry.candidates for entry in self.entries)
        top = x_RV.topk(max(counts), 1)
        tokens, values = (torch.cat([part[:, :1], part], 1) for part in (top.indices, top.values))
        self.out.candidates.append(LogProbs(tuple(self.places), counts, tokens, values))
        return top.indices[:, 0], torch.where(top.values[:, 0] == -torch.inf, -torch.inf, largest)

    def _report(self, feature: int, of: Callable[[list[int], int], tuple[Tensor, Tensor]]) -> None:
        """Log-probabilities of the rows that have the feature."""
        some = [i for i, entry in enumerate(self.entries) if entry.features & feature] if self.present & feature else []
        if some:
            counts = tuple(min(self.entries[i].reported, self.raw_RV.shape[1]) for i in some)
            places = tuple(self.places[i] for i in some)
            self.out.logprobs.append(LogProbs(places, counts, *of(some, max(counts))))


def _of_drawn(drawn: Drawn, some: list[int], truncated_R: Tensor, most: int) -> tuple[Tensor, Tensor]:
    tokens = drawn.tokens[some]
    s_RV, total = truncated(drawn, some, truncated_R)
    return of_scaled(s_RV, total, tokens, most)
