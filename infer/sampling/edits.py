"""Stages 1 to 5 of :mod:`infer.params`: what is done to logits before any token is drawn."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from infer.constrain.forms import Form, Forms
from infer.sampling.history import History
from infer.sampling.row import NUMBERS, Entry, Feature, Row

__all__ = ["EDITED", "edit"]

EDITED = (
    Feature.BIAS
    | Feature.PENALTY
    | Feature.ALLOWED
    | Feature.BANNED
    | Feature.WORDS
    | Feature.MINIMUM
    | Feature.PROCESSOR
    | Feature.FORM
)
PRESENCE, FREQUENCY, REPETITION = (
    NUMBERS.index(name) for name in ("presence_penalty", "frequency_penalty", "repetition_penalty")
)
NEVER = float("-inf")


def edit(
    x_RV: Tensor, rows: Sequence[Row], entries: Sequence[Entry], history: History, forms: Forms | None
) -> dict[int, str]:
    """Change logits in place as their requests ask; every row by itself.

    Returns:
        rows whose logits processor or form failed, and how; their logits are not to be used.
    """
    present = 0
    for entry in entries:
        present |= entry.features
    if not present & EDITED:
        return {}

    def having(feature: int) -> list[int]:
        return [i for i, entry in enumerate(entries) if entry.features & feature] if present & feature else []

    if chosen := having(Feature.BIAS):
        flat = _places(x_RV, chosen, entries, lambda entry: entry.bias_tokens)
        x_RV.view(-1)[flat] += torch.cat([entries[i].bias_values for i in chosen])
    if chosen := having(Feature.PENALTY):
        _penalize(x_RV, chosen, entries, history)
    if chosen := having(Feature.ALLOWED):
        flat = _places(x_RV, chosen, entries, lambda entry: entry.allowed)
        kept = x_RV.view(-1)[flat]
        x_RV[chosen] = NEVER
        x_RV.view(-1)[flat] = kept
    if chosen := having(Feature.BANNED):
        x_RV.view(-1)[_places(x_RV, chosen, entries, lambda entry: entry.banned)] = NEVER
    if chosen := having(Feature.WORDS):
        _ban_words(x_RV, chosen, entries, history)
    if chosen := [i for i in having(Feature.MINIMUM) if rows[i].generated < rows[i].params.min_tokens]:
        x_RV.view(-1)[_places(x_RV, chosen, entries, lambda entry: entry.stops)] = NEVER
    errors = _process(x_RV, having(Feature.PROCESSOR), rows, entries)
    if chosen := having(Feature.FORM):
        assert forms is not None
        errors = _keep_forms(x_RV, chosen, rows, entries, forms) | errors
    return errors


def _places(x_RV: Tensor, chosen: Sequence[int], entries: Sequence[Entry], tokens: Callable[[Entry], Tensor]) -> Tensor:
    """Where the tokens of some rows stand in ``x_RV.view(-1)``."""
    parts = [tokens(entries[i]) for i in chosen]
    sizes = [len(part) for part in parts]
    starts_sizes = torch.tensor([[i * x_RV.shape[1] for i in chosen], sizes], device=x_RV.device)
    return torch.cat(parts) + starts_sizes[0].repeat_interleave(starts_sizes[1], output_size=sum(sizes))


def _penalize(x_RV: Tensor, chosen: Sequence[int], entries: Sequence[Entry], history: History) -> None:
    """Repetition (Keskar et al., 1909.05858), then frequency and presence as in OpenAI's formula."""
    rows = torch.tensor(chosen, device=x_RV.device)
    tokens, counts = history.counts(torch.tensor([entries[i].slot for i in chosen], device=x_RV.device))
    numbers = torch.tensor([entries[i].numbers for i in chosen], dtype=torch.float32, device=x_RV.device)
    presence, frequency, repetition = (numbers[:, i : i + 1] for i in (PRESENCE, FREQUENCY, REPETITION))
    flat = tokens + rows[:, None] * x_RV.shape[1]
    x = x_RV.view(-1)[flat]
    x = torch.where(x < 0, x * repetition, x / repetition)
    x -= frequency * counts
    x -= presence * (counts > 0)
    x_RV.view(-1)[flat] = x


def _ban_words(x_RV: Tensor, chosen: Sequence[int], entries: Sequence[Entry], history: History) -> None:
    """The last token of each sequence whose beginning was the end of the text so far."""
    pairs = [(row, word) for row, i in enumerate(chosen) for word in entries[i].sequences]
    longest = max(len(word) for _, word in pairs) - 1
    tails = history.tails(torch.tensor([entries[i].slot for i in chosen], device=x_RV.device))[:, -longest:]
    wanted = torch.tensor([[-2] * (longest - len(word) + 1) + list(word[:-1]) for _, word in pairs])
    wanted = wanted.to(x_RV.device)
    rows = torch.tensor([row for row, _ in pairs], device=x_RV.device)
    flat = torch.tensor([chosen[row] * x_RV.shape[1] + word[-1] for row, word in pairs], device=x_RV.device)
    match = ((tails[rows] == wanted) | (wanted == -2)).all(1)
    # several words may end in the same token, and only some of them match: the smaller value stays
    ban = torch.where(match, NEVER, torch.inf).to(x_RV.dtype)
    x_RV.view(-1).scatter_reduce_(0, flat, ban, "amin")


def _process(x_RV: Tensor, chosen: Sequence[int], rows: Sequence[Row], entries: Sequence[Entry]) -> dict[int, str]:
    """The requests' own functions, each on a copy of its row."""
    errors: dict[int, str] = {}
    for i in chosen:
        row, entry = rows[i], entries[i]
        generated = _generated(row, entry)
        for processor in row.params.logits_processors:
            name = getattr(processor, "__qualname__", type(processor).__qualname__)
            try:
                out = processor(tuple(row.tokens[: row.prompt]), generated, x_RV[i].clone())
            except Exception as error:  # noqa: BLE001 - whatever a request's own function raises ends that request alone
                errors[i] = f"logits processor {name} raised {type(error).__name__}: {error}"
                break
            if not isinstance(out, Tensor) or out.shape != x_RV[i].shape or not out.is_floating_point():
                got = f"{tuple(out.shape)} {out.dtype}" if isinstance(out, Tensor) else type(out).__name__
                errors[i] = f"logits processor {name} returned {got}, not {x_RV.shape[1]} floating-point logits"
                break
            x_RV[i] = out
    return errors


def _generated(row: Row, entry: Entry) -> tuple[int, ...]:
    """What was generated so far; waits for the device if the last token is not known to the host yet."""
    return tuple(_since(row, entry, 0))


def _since(row: Row, entry: Entry, first: int) -> list[int]:
    """The tokens that were generated after the first ones, as :func:`_generated`."""
    known = list(row.tokens[row.prompt + first : row.prompt + row.generated])
    if len(known) < row.generated - first:
        assert entry.late is not None, "a request lacks a token"
        tokens, place = entry.late
        known.append(int(tokens[place]))
    return known


def _keep_forms(
    x_RV: Tensor, chosen: Sequence[int], rows: Sequence[Row], entries: Sequence[Entry], forms: Forms
) -> dict[int, str]:
    """Leave only the tokens that the forms of some rows allow next."""
    own: list[Form] = []
    for i in chosen:
        form = entries[i].form
        assert form is not None
        forms.advance(form, _since(rows[i], entries[i], form.seen))
        own.append(form)
    params = [rows[i].params for i in chosen]
    holding = [one.ignore_eos or rows[i].generated < one.min_tokens for i, one in zip(chosen, params, strict=True)]
    barred = _barred(forms.fill(own, holding), x_RV)
    if len(chosen) == len(x_RV):
        x_RV.masked_fill_(barred, NEVER)
    else:
        at = torch.tensor(chosen, device=x_RV.device)
        x_RV[at] = x_RV[at].masked_fill_(barred, NEVER)
    return {i: form.error for i, form in zip(chosen, own, strict=True) if form.error}


def _barred(bits_RW: NDArray[np.int32], x_RV: Tensor) -> Tensor:
    """Where a bit is 0, as a mask over the vocabulary."""
    if x_RV.device.type == "cpu":
        flags = np.unpackbits(bits_RW.view(np.uint8), axis=1, count=x_RV.shape[1], bitorder="little")
        return torch.from_numpy(flags.view(np.bool_)).logical_not_()
    words = torch.from_numpy(bits_RW).pin_memory().to(x_RV.device, non_blocking=True)
    flags = (words[:, :, None] >> torch.arange(32, dtype=torch.int32, device=x_RV.device)) & 1
    return flags.flatten(1)[:, : x_RV.shape[1]] == 0
