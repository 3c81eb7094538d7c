"""One step of the sampler: rows of a kind are computed together, some rows at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import groupby

import torch
from torch import Tensor

from infer.constrain.forms import Forms
from infer.sampling.draw import Draw, Drawn, draw, truncated
from infer.sampling.edits import EDITED, edit
from infer.sampling.history import History
from infer.sampling.logprobs import LogProbs, of_scaled, of_tokens
from infer.sampling.row import NUMBERS, Entry, Feature, Kind, Row
from infer.sampling.sampled import Sampled
from infer.sampling.weights import Space, first_largest, largest, log_total, scaled, weights

__all__ = ["sample"]

TEMPERATURE, TOP_P, MIN_P, TYPICAL_P = (NUMBERS.index(name) for name in ("temperature", "top_p", "min_p", "typical_p"))
TRUNCATED = Feature.TOP_K | Feature.TOP_P | Feature.MIN_P | Feature.TYPICAL


def sample(
    logits_RV: Tensor,
    rows: Sequence[Row],
    entries: Sequence[Entry],
    history: History,
    forms: Forms | None,
    space: Space,
    chunk: int,
) -> Sampled:
    """Sample one token for each row.

    Args:
        logits_RV: float32; left as they are.
        rows, entries: of each row.
        history: of the entries with a slot.
        forms: of the entries with a form.
        space: to compute in.
        chunk: numbers to compute at a time.
    """
    _catch_up(rows, entries, history)
    device = logits_RV.device
    out = Sampled(
        torch.empty(len(rows), dtype=torch.int64, device=device),
        torch.empty(len(rows), dtype=torch.float32, device=device),
    )
    for kind, width, places in _groups(entries, max(1, chunk // logits_RV.shape[1])):
        _Part(logits_RV, rows, entries, places, out, forms, space).run(kind, width, history)
    kept = [i for i, entry in enumerate(entries) if entry.slot >= 0 and entry.kind is not Kind.BEAM]
    if kept:
        slots = [entries[i].slot for i in kept]
        tokens = out.tokens_R[torch.tensor(kept, device=device)]
        history.append(slots, torch.tensor(slots, device=device), tokens)
    for i, entry in enumerate(entries):
        if entry.features & (Feature.PROCESSOR | Feature.FORM):
            entry.late = out.tokens_R, i
    return out


def _catch_up(rows: Sequence[Row], entries: Sequence[Entry], history: History) -> None:
    """Take in what the sampler has not sampled itself: prompts, what was computed elsewhere, and choices of beams."""
    slots, tokens = [], []
    for row, entry in zip(rows, entries, strict=True):
        if entry.slot < 0:
            continue
        if history.catch_up(entry.slot, row.tokens, row.prompt, row.generated, entry.tail):
            slots.append(entry.slot)
            tokens.append(row.tokens[row.prompt + row.generated - 1])
    if slots:
        history.append(slots, torch.tensor(slots, device=history.device), torch.tensor(tokens, device=history.device))


def _groups(entries: Sequence[Entry], most: int) -> Iterator[tuple[Kind, int, list[int]]]:
    """Rows that are computed together, their kind and their width; neighbours have the same features if possible."""

    def same(i: int) -> tuple[Kind, int, int]:
        return entries[i].kind, entries[i].width, entries[i].features & Feature.TYPICAL

    order = sorted(range(len(entries)), key=lambda i: (same(i), entries[i].features, entries[i].top_k))
    for (kind, width, _), group in groupby(order, same):
        places = list(group)
        for start in range(0, len(places), most):
            yield kind, width, sorted(places[start : start + most])


class _Part:
    """Some rows of one kind."""

    def __init__(
        self,
        logits_RV: Tensor,
        rows: Sequence[Row],
        entries: Sequence[Entry],
        places: list[int],
        out: Sampled,
        forms: Forms | None,
        space: Space,
    ) -> None:
        self.places, self.out, self.forms, self.space = places, out, forms, space
        self.rows, self.entries = [rows[i] for i in places], [entries[i] for i in places]
        self.present = 0
        for entry in self.entries:
            self.present |= entry.features
        first, last = places[0], places[-1] + 1
        if last - first == len(places):
            self.at: slice | Tensor = slice(first, last)
            self.raw_RV = logits_RV[self.at]
        else:
            self.at = torch.tensor(places, device=logits_RV.device)
            copy = space.take("rows", len(places), logits_RV.shape[1])
            self.raw_RV = torch.index_select(logits_RV, 0, self.at, out=copy)

    def run(self, kind: Kind, width: int, history: History) -> None:
        """Sample, and write into ``out`` what belongs to these rows."""
        if kind is Kind.BEAM:
            tokens, most = self._beams(history)
        elif kind is Kind.DRAW:
            drawn = draw(self._edited(self.raw_RV, history), self._how(), self.space, width)
            tokens, most = drawn.tokens, drawn.largest
            self._report(Feature.PROCESSED, lambda some, most: self._of_drawn(drawn, some, most))
        else:
            x_RV = self._edited(self.raw_RV, history)
            most, tokens = first_largest(x_RV)
            self._report(Feature.PROCESSED, lambda some, most: self._of_logits(x_RV, tokens, some, most))
        self._report(Feature.RAW, lambda some, most: self._of_logits(self.raw_RV, tokens, some, most))
        self.out.tokens_R[self.at], self.out.largest_R[self.at] = tokens, most

    def _edited(self, x_RV: Tensor, history: History) -> Tensor:
        if not self.present & EDITED:
            return x_RV
        if x_RV is self.raw_RV:
            x_RV = self.space.take("edited", *x_RV.shape).copy_(x_RV)
        for i, error in edit(x_RV, self.rows, self.entries, history, self.forms).items():
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

    def _of_drawn(self, drawn: Drawn, some: list[int], most: int) -> tuple[Tensor, Tensor]:
        cut = [bool(self.entries[i].features & TRUNCATED) for i in some]
        s_RN, total = truncated(drawn, some, torch.tensor(cut, device=drawn.tokens.device), self.space)
        columns, values = of_scaled(s_RN, total, drawn.chosen[some], min(most, s_RN.shape[1]))
        return columns if drawn.places_RN is None else drawn.places_RN[some].gather(1, columns), values

    def _of_logits(self, x_RV: Tensor, tokens: Tensor, some: list[int], most: int) -> tuple[Tensor, Tensor]:
        if len(some) < len(self.rows):
            x_RV, tokens = x_RV[some], tokens[some]
        return of_tokens(x_RV, tokens, most, self.space)

    def _beams(self, history: History) -> tuple[Tensor, Tensor]:
        """Candidates by log-probability, which penalties and bans change as in `transformers`: not normalized again."""
        s_RV, most = scaled(self.raw_RV, None, self.space)
        x_RV = self._edited(
            (s_RV - log_total(weights(s_RV, self.space), self.space)[:, None]).to(torch.float32), history
        )
        tokens, values = x_RV.max(1)[::-1]
        for count, some in self._by_count([entry.candidates for entry in self.entries]):
            best, likeliest = largest(x_RV[some], count)
            own = tokens[some][:, None], values[some][:, None]
            self._note(self.out.candidates, some, torch.cat([own[0], likeliest], 1), torch.cat([own[1], best], 1))
        return tokens, torch.where(values == -torch.inf, -torch.inf, most)

    def _report(self, feature: int, of: Callable[[list[int], int], tuple[Tensor, Tensor]]) -> None:
        """Log-probabilities of the rows that have the feature."""
        if self.present & feature:
            wanted = [entry.reported if entry.features & feature else -1 for entry in self.entries]
            for count, some in self._by_count(wanted):
                self._note(self.out.logprobs, some, *of(some, count))

    def _by_count(self, counts: Sequence[int]) -> Iterator[tuple[int, list[int]]]:
        """Rows that want as many: which of several equals are among so many does not depend on what others want."""
        for count in sorted(set(counts) - {-1}):
            yield count, [i for i, wanted in enumerate(counts) if wanted == count]

    def _note(self, reports: list[LogProbs], some: list[int], tokens: Tensor, values: Tensor) -> None:
        reports.append(LogProbs(tuple(self.places[i] for i in some), tokens, values))
