"""Requests that share pages: samples of one prompt, beams; and a step cut into microbatches."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable
from typing import Any, Literal

import numpy as np
import pytest
import torch
from paged import VOCABULARY, Machine, alone, request, serve, values_of
from transformers import LlamaConfig, LlamaForCausalLM

from infer.beams import BeamSearch, Branch, Hypothesis, branch
from infer.policy import PageGroup, SchedulerConfig
from infer.request import Life, Request, RequestError
from infer.running import columns
from infer.scheduler import Scheduler
from infer.step import parts

PROMPT = [(11 * n + 5) % 50 for n in range(18)]


def made(groups: list[PageGroup], **more: Any) -> tuple[Scheduler, Machine]:
    """A scheduler with pages of four tokens, and its device."""
    config = SchedulerConfig(**({"page_size": 4, "budget": 32, "requests": 8} | more))
    return Scheduler(config, groups), Machine(groups, 4)


@pytest.mark.parametrize("length", [1, 3, 4, 5, 16, 18])
@pytest.mark.parametrize("window", [None, 6])
def test_samples_share_the_pages_of_their_prompt(length: int, window: int | None) -> None:
    """The prompt is computed once; each sample copies at most the page in which it goes on."""
    scheduler, machine = made([PageGroup(None, 60), PageGroup(window, 60)], prefix_cache=False)
    first = request(0, PROMPT[:length], 12)
    scheduler.add(first)
    serve(scheduler, machine, 1)
    others = [scheduler.fork(first, number, keep=length) for number in range(1, 5)]
    scheduler.check()
    full = (length - 1) // 4
    kept = length > 1
    assert [one.life for one in others] == [Life.RUNNING if kept else Life.WAITING] * 4
    if kept and window is None:
        assert scheduler.stats.used[0] == columns(length, 4) + 4 * (columns(length - 1, 4) - full)
    serve(scheduler, machine)
    assert [one.tokens for one in (first, *others)] == [alone(PROMPT[:length], 12)] * 5
    assert scheduler.stats.computed == length + 11 + 4 * 12
    assert machine.moved["copies"] == 2 * 4 * ((length - 1) % 4 > 0)
    assert scheduler.stats.used == (0, 0)


def test_a_fork_goes_its_own_way() -> None:
    scheduler, machine = made([PageGroup(None, 60)])
    first = request(0, PROMPT, 12)
    scheduler.add(first)
    serve(scheduler, machine, 6)
    other = scheduler.fork(first, 1, then=[3, 4])
    back = scheduler.fork(first, 2, keep=9, then=[7])
    again = scheduler.fork(other, 3, then=[8])
    tokens = [list(one.tokens) for one in (other, back, again)]
    assert tokens == [[*first.tokens, 3, 4], [*PROMPT[:9], 7], [*first.tokens, 3, 4, 8]]
    serve(scheduler, machine)
    for one, begun in zip((other, back, again), tokens, strict=True):
        assert one.tokens == alone(begun, one.most - len(begun))
    with pytest.raises(RequestError, match="leave none to generate"):
        scheduler.add(last := request(9, PROMPT, 1))
        scheduler.fork(last, 10, then=[1])
    scheduler.abort(9)


def test_a_fork_without_room_waits_and_computes_what_is_not_cached() -> None:
    scheduler, machine = made([PageGroup(None, 60)], requests=2)
    first = request(0, PROMPT, 4)
    scheduler.add(first)
    serve(scheduler, machine, 2)
    others = [scheduler.fork(first, number, keep=18) for number in (1, 2, 3)]
    assert [one.life for one in others] == [Life.RUNNING, Life.WAITING, Life.WAITING]
    serve(scheduler, machine)
    assert [one.tokens for one in others] == [alone(PROMPT, 4)] * 3
    assert others[2].cached == 16


def test_a_fork_may_be_aborted_before_its_page_is_copied() -> None:
    scheduler, machine = made([PageGroup(None, 60)])
    first = request(0, PROMPT, 8)
    scheduler.add(first)
    serve(scheduler, machine, 1)
    scheduler.fork(first, 1, keep=18)
    other = scheduler.fork(first, 2, keep=18)
    scheduler.abort(1)
    scheduler.check()
    scheduler.abort(0)
    scheduler.check()
    serve(scheduler, machine)
    assert other.tokens == alone(PROMPT, 8) and machine.moved["copies"] == 1


# Beams


@functools.cache
def toy(seed: int) -> LlamaForCausalLM:
    """A model with strong opinions."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=37,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        initializer_range=0.7,
        max_position_embeddings=64,
        bos_token_id=None,
        pad_token_id=36,
    )
    return LlamaForCausalLM(config).eval()


def likeliest(logprobs: list[float], count: int) -> list[tuple[int, float]]:
    """Tokens with their log-probabilities, best first."""
    return sorted(enumerate(logprobs), key=lambda pair: -pair[1])[:count]


def search(given: BeamSearch, logprobs: Callable[[tuple[int, ...]], list[float]]) -> list[Hypothesis]:
    """The search to its end, without pages."""
    while not given.done:
        given.advance([likeliest(logprobs(tokens), given.candidates) for tokens in given.sequences])
    return given.hypotheses


@pytest.mark.parametrize("early_stopping", [False, True, "never"])
@pytest.mark.parametrize("length_penalty", [0.0, 1.0, 2.5, -1.0])
@torch.inference_mode()
def test_beams_are_those_of_transformers(early_stopping: bool | Literal["never"], length_penalty: float) -> None:
    for seed, width, ends in ((1, 4, (3,)), (2, 2, (3, 11, 12)), (3, 3, (3,)), (4, 3, (7, 9))):
        model, prompt = toy(seed), [5, 9, 20 + seed]
        expected = model.generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, 3, dtype=torch.long),
            num_beams=width,
            num_return_sequences=width,
            max_new_tokens=9,
            do_sample=False,
            eos_token_id=list(ends),
            early_stopping=early_stopping,
            length_penalty=length_penalty,
            return_dict_in_generate=True,
            output_scores=True,
        )

        def logprobs(tokens: tuple[int, ...], model: Any = model, prompt: list[int] = prompt) -> list[float]:
            logits = model(torch.tensor([prompt + list(tokens)])).logits[0, -1].float()
            return torch.log_softmax(logits, -1).tolist()

        given = BeamSearch(width, longest=9, ends=ends, length_penalty=length_penalty, early_stopping=early_stopping)
        found = search(given, logprobs)
        for one, tokens, score in zip(found, expected.sequences, expected.sequences_scores, strict=True):
            assert list(one.tokens) == tokens[3 : 3 + len(one.tokens)].tolist()
            assert all(token == 36 for token in tokens[3 + len(one.tokens) :].tolist())
            assert math.isclose(one.score, float(score), rel_tol=1e-4)
            assert one.stopped == (one.tokens[-1] in ends)


def test_beams_enough_find_the_best_of_all_sequences() -> None:
    """Against every sequence there is; and greedy does not find it."""
    chance = np.random.default_rng(4)
    table = np.log(chance.dirichlet([0.3] * 4, size=(5, 4)))

    def logprobs(tokens: tuple[int, ...]) -> list[float]:
        return table[len(tokens), tokens[-1] if tokens else 0].tolist()

    def score(tokens: tuple[int, ...]) -> float:
        return sum(logprobs(tokens[:place])[token] for place, token in enumerate(tokens))

    every = [
        tokens
        for length in range(1, 6)
        for tokens in itertools.product(range(4), repeat=length)
        if 3 not in tokens[:-1] and (tokens[-1] == 3 or length == 5)
    ]
    for penalty in (0.0, 1.0):
        best = max(every, key=lambda tokens: score(tokens) / len(tokens) ** penalty)
        wide = search(BeamSearch(400, longest=5, ends=[3], length_penalty=penalty, early_stopping="never"), logprobs)
        assert wide[0].tokens == best and math.isclose(wide[0].score, score(best) / len(best) ** penalty)
        narrow = search(BeamSearch(1, longest=5, ends=[3], length_penalty=penalty), logprobs)
        assert narrow[0].score <= wide[0].score


def test_a_stop_string_ends_a_beam() -> None:
    given = BeamSearch(2, longest=4, stopped=lambda tokens: tuple(tokens[-2:]) == (1, 2))
    assert given.advance([[(1, -0.1), (0, -2.5), (4, -9.0)]]) == [Branch(0, 1), Branch(0, 0)]
    assert given.advance([[(2, -0.1), (4, -3.0)], [(2, -0.2), (4, -4.0)]]) == [Branch(1, 2), Branch(0, 4)]
    assert [one.tokens for one in given.hypotheses] == [(1, 2)] and given.hypotheses[0].stopped


def beams_of(value: int) -> list[float]:
    """Log-probabilities that the toy device has after a token."""
    weights = [((value >> place) % 97) + 1.5 for place in range(VOCABULARY)]
    total = sum(weights)
    return [math.log(weight / total) for weight in weights]


@pytest.mark.parametrize("pages", [80, 14, 9])
@pytest.mark.parametrize("window", [None, 5])
def test_beams_on_pages_are_the_beams_of_the_search(pages: int, window: int | None) -> None:
    """However few pages there are, so that beams are preempted and wait for one another; two searches at a time."""
    groups = [PageGroup(None, pages, 6, 2.0), PageGroup(window, 80)]
    scheduler, machine = made(groups, horizon=2, watermark=0.0, requests=7)
    numbers = itertools.count(10)
    searches = [BeamSearch(4, longest=12, ends=[1], length_penalty=0.5) for _ in range(2)]
    prompts = [PROMPT[:9], PROMPT[4:15]]
    beams: list[list[Request]] = []
    for number, prompt in enumerate(prompts):
        one = request(number, prompt, 12, external=True)
        scheduler.add(one)
        beams.append([one])
    for _ in range(2000):
        if not scheduler.requests:
            break
        step = scheduler.plan()
        scheduler.check()
        machine.execute(machine.prepare(step, scheduler.tables))
        scheduler.commit(step, [0] * step.samples)
        for place, given in enumerate(searches):
            own = beams[place]
            if not given.done and all(one.paused for one in own):
                found = [likeliest(beams_of(values_of(one.tokens, b"")[-1]), given.candidates) for one in own]
                beams[place] = branch(scheduler, own, given.advance(found), lambda: next(numbers))
                scheduler.check()
                sequences = [tuple(one.tokens[len(prompts[place]) :]) for one in beams[place]]
                assert given.done or sequences == given.sequences
    for given, prompt in zip(searches, prompts, strict=True):
        alike = BeamSearch(4, longest=12, ends=[1], length_penalty=0.5)

        def logprobs(tokens: tuple[int, ...], prompt: list[int] = prompt) -> list[float]:
            return beams_of(values_of([*prompt, *tokens], b"")[-1])

        assert given.done and given.hypotheses == search(alike, logprobs)
    stats = scheduler.stats
    assert not scheduler.requests and stats.used == (0, 0)
    assert (stats.recomputed + stats.swaps > 0) == (pages < 80)


# Microbatches


def test_microbatches_take_every_run_once_and_about_as_long() -> None:
    """Alike in length within, so that the table of each is not much wider than its runs need."""
    scheduler, machine = made([PageGroup(None, 400)], requests=32, budget=64, chunk=24)
    for number in range(24):
        scheduler.add(request(number, [number] * (2 + 9 * (number % 8)), 60))
    serve(scheduler, machine, 30)
    step = scheduler.plan()
    whole = len(step.requests)
    assert whole > 12
    for count in (1, 2, 3, 5):
        cut = parts(step, count)
        assert len(cut) == count and sorted(np.concatenate(cut).tolist()) == list(range(whole))
        assert all((np.diff(piece) > 0).all() for piece in cut)
        lengths = [step.stops_R[piece] for piece in cut]
        assert all(a.max() <= b.min() for a, b in itertools.pairwise(lengths))
        sizes = [len(piece) for piece in cut]
        assert max(sizes) - min(sizes) <= 2
    few = parts(step, 100)
    assert len(few) <= whole and all(len(piece) for piece in few)


def test_an_empty_step_has_no_microbatches() -> None:
    scheduler, _ = made([PageGroup(None, 8)])
    step = scheduler.plan()
    assert step.empty and parts(step, 4) == []
