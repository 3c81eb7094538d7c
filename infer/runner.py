"""The runner: carries out planned steps on this rank's part of a model. It makes no policy."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from infer.batch import StepBatch
from infer.cache import KVCache
from infer.sampling import Resolved, Row, Sampled, Sampler, TokenLogProb, prompt_logprobs
from infer.step import Step, parts, slots
from parallel import comm
from parallel.mesh import Mesh
from parallel.models.decoder import Decoder
from parallel.pp.run import Pipeline
from parallel.pp.schedule import Schedule
from parallel.pp.schedules import make_schedule

__all__ = ["Outcome", "Prepared", "Runner"]

_PROMPT_ROWS = 256
"""Rows of a prompt whose logits exist at a time."""


class Part(NamedTuple):
    """A microbatch of a step.

    Attributes:
        batch: what the model is given.
        runs: which runs of the step it has, ascending.
        samples: how many of its first runs give a token.
        sources_D: for its decoding runs, the run of the step before whose token is computed, -1: it is known.
        prompts: (run, rows among those wanted) of runs whose prompt is to be scored.
    """

    batch: StepBatch
    runs: NDArray[np.int64]
    samples: int
    sources_D: Tensor | None
    prompts: list[tuple[int, slice]]


@dataclass(frozen=True, slots=True)
class Prepared:
    """A step with its inputs, made when it was planned; the scheduler's tables may change afterwards."""

    step: Step
    parts: list[Part]
    rows: list[Row]


class Outcome(NamedTuple):
    """What a step gave, the same on every rank.

    Attributes:
        tokens: of each sampling run; -1 where it failed.
        errors: why, by run.
        logprobs: of runs that ask for them.
        candidates: of runs of a beam search.
        prompts: run -> log-probabilities of the tokens of its prompt that follow those which the step computed.
        lost: pages that could not be stored or loaded.
    """

    tokens: list[int]
    errors: dict[int, str]
    logprobs: dict[int, TokenLogProb]
    candidates: dict[int, tuple[tuple[int, float], ...]]
    prompts: dict[int, list[TokenLogProb]]
    lost: list[tuple[int, bytes]]


class Runner:
    """Every rank of a replica makes one, and carries out the same steps.

    Args:
        model: this rank's part, built with the attention of ``cache``.
        mesh: that it was built on.
        cache: its keys and values.
        sampler: of the whole vocabulary.
        microbatches: of a step, where there is a pipeline; 0: as many as stages.
        timeout_s: longest wait for another stage.
        graphs: computes decoding steps faster than the model, or gives None: this one it does not.
    """

    def __init__(
        self,
        model: Decoder,
        mesh: Mesh,
        cache: KVCache,
        sampler: Sampler,
        *,
        microbatches: int = 0,
        timeout_s: float = 600.0,
        graphs: Callable[[StepBatch], Tensor | None] | None = None,
    ) -> None:
        self.model, self.mesh, self.cache, self.sampler, self.graphs = model, mesh, cache, sampler, graphs
        self.most = (microbatches or mesh.pp.size) if mesh.pp.size > 1 else 1
        self._last: Tensor = torch.zeros(1, dtype=torch.int64, device=mesh.device)
        self._tables: dict[int, Schedule] = {}
        self._pipeline: Pipeline[StepBatch] | None = None
        if mesh.pp.size > 1:
            dtype = next(model.parameters()).dtype
            self._pipeline = Pipeline(mesh, self._stage, self._shape, dtype, timeout_s=timeout_s)

    def prepare(self, step: Step, tables: Sequence[NDArray[np.int32]], rows: list[Row]) -> Prepared:
        """The inputs of a step, before anything is planned after it.

        Args:
            step: as planned.
            tables: of the scheduler, one a page group.
            rows: of the sampling runs.
        """
        slots_T = [slots(step, table, self.cache.page_size) for table in tables]
        runs = parts(step, self.most) if self.most > 1 else [np.arange(len(step.requests))] * (not step.empty)
        return Prepared(step, [self._part(step, own, tables, slots_T, len(runs)) for own in runs], rows)

    def _part(
        self,
        step: Step,
        runs: NDArray[np.int64],
        tables: Sequence[NDArray[np.int32]],
        slots_T: list[NDArray[np.int64]],
        of: int,
    ) -> Part:
        where: Any = slice(None)
        if of == 1:
            bounds, samples, decoding = step.bounds, step.samples, step.decoding
            rows_R, stops_R = step.rows_R, step.stops_R
        else:
            rows_R, stops_R, first = step.rows_R[runs], step.stops_R[runs], step.bounds[runs]
            lengths = step.bounds[runs + 1] - first
            bounds = np.concatenate(([0], np.cumsum(lengths)))
            where = np.arange(bounds[-1]) + np.repeat(first - bounds[:-1], lengths)
            samples, decoding = (int(np.searchsorted(runs, n)) for n in (step.samples, step.decoding))
        wanted, prompts = bounds[1 : samples + 1] - 1, []
        for place, run in enumerate(runs.tolist()):
            request = step.requests[run]
            if request.params.prompt_logprobs is None:
                continue
            begin, end = int(step.starts_R[run]), min(int(step.stops_R[run]), request.prompt - 1)
            if begin < end:
                rows = bounds[place] + np.arange(end - begin)
                prompts.append((run, slice(len(wanted), len(wanted) + len(rows))))
                wanted = np.concatenate((wanted, rows))
        longest = int(stops_R.max())
        pages = -(-longest // self.cache.page_size)
        give = self._tensor
        batch = StepBatch(
            tokens_T=give(step.tokens_T[where]),
            positions_T=give(step.positions_T[where]),
            boundaries=tuple(bounds.tolist()),
            wanted_R=None if len(wanted) == bounds[-1] and not prompts else give(wanted if len(wanted) else bounds[:1]),
            table=tuple(give(table[rows_R, :pages]) for table in tables),
            slots_T=tuple(give(own[where]) for own in slots_T),
            context_R=give(stops_R.astype(np.int32)),
            starts_R=give(bounds.astype(np.int32)),
            longest=longest,
            widest=int(np.diff(bounds).max()),
        )
        sources = None if step.sources_D is None else give(step.sources_D[runs[:decoding]])
        return Part(batch, runs, samples, sources, prompts)

    def _tensor(self, array: NDArray[Any]) -> Tensor:
        tensor = torch.from_numpy(np.array(array, order="C"))  # a copy: the scheduler's arrays change meanwhile
        if self.mesh.device.type != "cuda":
            return tensor
        return tensor.pin_memory().to(self.mesh.device, non_blocking=True)

    def fork(self, request: int, new: int) -> None:
        """A request begins with the history of another one."""
        self.sampler.fork(request, new)

    def forget(self, request: int) -> None:
        """A request has ended."""
        self.sampler.forget(request)

    @torch.inference_mode()
    def execute(self, prepared: Prepared) -> Outcome:
        """Move pages, compute, sample."""
        self.cache.carry_out(prepared.step.moves)
        if not prepared.parts:
            return Outcome([], {}, {}, {}, {}, self._lost(prepared.step))
        for part in prepared.parts:
            self._fill(part)
        batches = [part.batch for part in prepared.parts]
        if self._pipeline is None:
            logits = [self._logits(batch) for batch in batches]
        else:
            found = self._pipeline.run(self._table(len(batches)), batches)
            logits = [found[index] for index in sorted(found)]
        return self._outcome(prepared, logits)

    def _logits(self, batch: StepBatch) -> Tensor:
        recorded = self.graphs(batch) if self.graphs is not None else None
        return self.model(batch) if recorded is None else recorded

    def _fill(self, part: Part) -> None:
        """Put the tokens of the step before where they are computed."""
        if part.sources_D is not None and len(part.sources_D):
            sources, tokens_D = part.sources_D, part.batch.tokens_T[: len(part.sources_D)]
            last = self._last[sources.clamp(min=0)] if len(self._last) else tokens_D
            tokens_D.copy_(torch.where(sources >= 0, last, tokens_D))

    def _outcome(self, prepared: Prepared, logits: list[Tensor]) -> Outcome:
        """Sample on the last stage, and let every stage know."""
        step, pp = prepared.step, self.mesh.pp
        sampled, prompts = self._sample(prepared, logits) if logits else (None, {})
        alike = self.mesh.tp.size == 1 or all(row.params.constraint is None for row in prepared.rows)
        resolved = sampled.resolve() if sampled is not None else _NOTHING
        if pp.size > 1 or not alike:
            known = self._agree(sampled, step.samples, alike)
        else:
            known = [-1 if token is None else token for token in resolved.tokens]
            if sampled is not None:
                self._last = sampled.tokens_R
        details = resolved.errors, resolved.logprobs, resolved.candidates, prompts
        if pp.size > 1:
            asked = -1 in known or any(_reports(row) for row in prepared.rows)
            asked = asked or any(part.prompts for part in prepared.parts)
            details = _unpacked(comm.gather_json(_packed(details), pp)[-1]) if asked else ({}, {}, {}, {})
        errors, logprobs, candidates, prompts = details
        return Outcome(known, errors, logprobs, candidates, prompts, self._lost(step))

    def _agree(self, sampled: Sampled | None, samples: int, alike: bool) -> list[int]:
        """The tokens that the last stage has sampled, -1 where a row has failed on any rank that samples."""
        told_2S = torch.zeros(2, samples, dtype=torch.int64, device=self.mesh.device)
        if sampled is not None:
            told_2S = torch.stack([sampled.tokens_R, sampled.failed_R.to(torch.int64)])
        if not alike:  # a form that is too complex for one rank has ended for all
            comm.sum_(told_2S[1], self.mesh.tp, "max")
        comm.sum_(told_2S, self.mesh.pp)
        self._last = told_2S[0]
        return [-1 if bad else token for token, bad in zip(*told_2S.tolist(), strict=True)]

    def _sample(self, prepared: Prepared, logits: list[Tensor]) -> tuple[Sampled | None, dict[int, list[TokenLogProb]]]:
        step, prompts = prepared.step, {}
        for part, own in zip(prepared.parts, logits, strict=True):
            for run, rows in part.prompts:
                prompts[run] = _scores(step, run, own[rows])
        if not step.samples:
            return None, prompts
        if len(logits) == 1:
            return self.sampler(logits[0][: step.samples], prepared.rows), prompts
        logits_RV = torch.cat([own[: part.samples] for part, own in zip(prepared.parts, logits, strict=True)])
        order = np.concatenate([part.runs[: part.samples] for part in prepared.parts])
        return self.sampler(logits_RV[self._tensor(np.argsort(order))], prepared.rows), prompts

    def _lost(self, step: Step) -> list[tuple[int, bytes]]:
        """Pages that some rank could not store or load: they are lost for all."""
        if not (step.moves.save or step.moves.load):
            return []
        told: list[Any] = [(group, key.hex()) for group, key in self.cache.settle()]
        for axis in (self.mesh.tp, self.mesh.pp):
            if axis.size > 1:
                told = [pair for own in comm.gather_json(told, axis) for pair in own]
        return sorted({(group, bytes.fromhex(key)) for group, key in told})

    def _table(self, microbatches: int) -> Schedule:
        if microbatches not in self._tables:
            self._tables[microbatches] = make_schedule("forward", self.mesh.pp.size, microbatches)
        return self._tables[microbatches]

    def _stage(self, stage: int, x_TD: Tensor | None, batch: StepBatch) -> Tensor:
        cut = self.model.cuts[0]
        return self.model(batch, x_TD, cut) if cut.last else self.model.hidden(batch, x_TD, cut)

    def _shape(self, stage: int, batch: StepBatch) -> tuple[int, int]:
        tokens = len(batch)
        if self.model.sequence_parallel:
            own = comm.chunk(tokens, self.mesh.tp)
            tokens = own.stop - own.start
        return tokens, self.model.config.hidden


_NOTHING = Resolved([], {}, {}, {})


def _reports(row: Row) -> bool:
    params = row.params
    return params.logprobs is not None or params.beams > 1 or params.samples > params.n


def _scores(step: Step, run: int, logits_CV: Tensor) -> list[TokenLogProb]:
    """Log-probabilities of the prompt tokens that follow the first ones of a run."""
    request, begin = step.requests[run], int(step.starts_R[run]) + 1
    tokens = request.tokens[begin : begin + len(logits_CV)]
    count, found = request.params.prompt_logprobs or 0, []
    for at in range(0, len(tokens), _PROMPT_ROWS):
        rows = slice(at, at + _PROMPT_ROWS)
        found += prompt_logprobs(logits_CV[rows].float(), tokens[rows], count).resolve().values()
    return found


def _packed(details: tuple[Any, ...]) -> list[Any]:
    """As JSON, whose keys are texts."""
    return [list(part.items()) for part in details]


def _unpacked(packed: list[Any]) -> tuple[Any, ...]:
    errors, logprobs, candidates, prompts = (dict(part) for part in packed)
    return (
        errors,
        {run: _logprob(value) for run, value in logprobs.items()},
        {run: tuple((token, value) for token, value in pairs) for run, pairs in candidates.items()},
        {run: [_logprob(value) for value in values] for run, values in prompts.items()},
    )


def _logprob(value: Any) -> TokenLogProb:
    token, own, top = value
    return TokenLogProb(token, own, tuple((token, value) for token, value in top))
