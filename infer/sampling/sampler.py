"""The sampler: logits of many requests in, a token of each out; what one asks for changes nothing for the others."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from infer.constrain.forms import Forms
from infer.sampling.batch import sample
from infer.sampling.history import History
from infer.sampling.row import Entry, Feature, Kind, Row, compile_row
from infer.sampling.sampled import Sampled
from infer.sampling.weights import Space, first_largest

__all__ = ["Sampler"]

CHUNK = 1 << 18  # numbers of a chunk of rows on a CPU, so that what is computed from them stays in its caches
REMEMBERED = Feature.PENALTY | Feature.WORDS


class Sampler:
    """Samples one token for each row of logits, and keeps what penalties and bad words need of each request.

    Args:
        vocabulary: of the model.
        ends: its end-of-text tokens.
        device: where the logits are.
        chunk: numbers that are computed at a time; None: what suits the device.
        forms: of completions; None: no request has one.
    """

    def __init__(
        self,
        vocabulary: int,
        *,
        ends: Sequence[int] = (),
        device: torch.device | str = "cpu",
        chunk: int | None = None,
        forms: Forms | None = None,
    ) -> None:
        self.vocabulary, self.ends, self.device = vocabulary, tuple(ends), torch.device(device)
        self.chunk = chunk if chunk is not None else (CHUNK if self.device.type == "cpu" else 1 << 62)
        self.forms = forms
        self._entries: dict[int, Entry] = {}
        self._asked: deque[tuple[int, int | None]] = deque()
        self._history, self._space = History(vocabulary, self.device), Space(self.device)

    @torch.inference_mode()
    def __call__(self, logits_RV: Tensor, rows: Sequence[Row]) -> Sampled:
        """Sample; the logits are left as they are.

        Args:
            logits_RV: the last logits of each request, the whole vocabulary; computed in float32.
            rows: one a request; no request twice.
        """
        assert logits_RV.shape == (len(rows), self.vocabulary), f"{tuple(logits_RV.shape)} for {len(rows)} rows"
        if self._asked:
            self._settle(rows)
        entries = [self._entries.get(row.id) or self._enter(row) for row in rows]
        if all(entry.kind is Kind.PLAIN for entry in entries):
            largest, tokens = first_largest(logits_RV)
            return Sampled(tokens, largest)
        return sample(logits_RV.float(), rows, entries, self._history, self.forms, self._space, self.chunk)

    def forget(self, request: int) -> None:
        """Drop what is kept of a request, after the last step that has a row of it; one that is not known is fine.

        Like :meth:`fork`, this may be called while another thread samples: the next step carries it out.
        """
        self._asked.append((request, None))

    def fork(self, request: int, new: int) -> None:
        """Let a new request begin with the parameters and the history of another one."""
        self._asked.append((request, new))

    def _settle(self, rows: Sequence[Row]) -> None:
        """Carry out what was asked for since the last step, in that order."""
        present = {row.id for row in rows}
        for _ in range(len(self._asked)):
            request, new = self._asked.popleft()
            if new is not None:
                self._copy(request, new)
            elif request in present:
                self._asked.append((request, None))
            elif (entry := self._entries.pop(request, None)) is not None and entry.slot >= 0:
                self._history.release(entry.slot)

    def _copy(self, request: int, new: int) -> None:
        entry = self._entries.get(request)
        if entry is None:
            return  # nothing to copy yet: it is filled when its first row comes
        slot = -1
        if entry.slot >= 0:
            slot = self._history.take_slot()
            self._history.copy(entry.slot, slot)
        form = None if entry.form is None else entry.form.copy()
        self._entries[new] = replace(entry, slot=slot, form=form)

    def _enter(self, row: Row) -> Entry:
        entry = compile_row(row, vocabulary=self.vocabulary, ends=self.ends, device=self.device)
        if entry.features & REMEMBERED:
            entry.slot = self._history.take_slot()
        if row.params.constraint is not None:
            assert self.forms is not None
            entry.form = self.forms.begin(row.params.constraint)
        self._entries[row.id] = entry
        return entry
