"""Rows do not touch one another: batches, orders, failures, and steps that the host has not seen the end of."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from infer.params import SamplingParams
from infer.sampling import Row, Sampler, request_seed
from infer.sampling import sampler as sampler_module
from infer.sampling.history import History

VOCABULARY = 1300


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def quiet(prompt: Sequence[int], generated: Sequence[int], logits_V: Tensor) -> Tensor:
    """A processor that looks at everything it is given."""
    logits_V[(sum(prompt) + sum(generated)) % len(logits_V)] += 3.0
    return logits_V


def mixed(count: int) -> list[SamplingParams]:
    """Requests that differ in everything."""
    draw = random.Random(5)
    found = []
    for i in range(count):
        given: dict[str, Any] = {}
        if i % 4:
            given = {"temperature": draw.choice([0.5, 1.0, 3.0]), "top_p": draw.choice([1.0, 0.3, 0.9])}
            given |= {"top_k": draw.choice([0, 0, 5, 400]), "min_p": draw.choice([0.0, 0.02])}
            given |= {"typical_p": draw.choice([1.0, 1.0, 0.7])}
        if draw.random() < 0.5:
            given |= {"repetition_penalty": 1.3, "presence_penalty": 0.4, "frequency_penalty": 0.6}
        if draw.random() < 0.3:
            given |= {"logit_bias": {draw.randrange(VOCABULARY): 5.0, 7: -9.0}, "min_tokens": 4}
        if draw.random() < 0.3:
            words = [tuple(draw.randrange(20) for _ in range(n)) for n in (1, 2, 3)]
            given |= {"allowed_tokens": tuple(range(30)), "banned_tokens": (3, 29), "bad_words": tuple(words)}
        if draw.random() < 0.6:
            given |= {"logprobs": draw.choice([0, 3, 8]), "logprobs_of": draw.choice(["raw", "processed"])}
        if draw.random() < 0.2:
            given |= {"logits_processors": (quiet,)}
        if i % 9 == 8:
            given = {"beams": 2, "repetition_penalty": 1.2, "bad_words": ((1, 2), (5,))}
        params = SamplingParams(**given)
        assert list(params.problems(vocabulary=VOCABULARY)) == []
        found.append(params)
    return found


def model(ids: Sequence[int]) -> Tensor:
    """Logits that depend on the tokens so far, as a model's do; few tokens matter, so that penalties meet repeats."""
    x = torch.randn(VOCABULARY, generator=torch.Generator().manual_seed(hash(tuple(ids[-2:]))))
    return x * 2 + 6 * (torch.arange(VOCABULARY) < 25)


def generate(
    params: list[SamplingParams], batches: list[list[list[int]]], *, chunk: int | None = None
) -> list[list[Any]]:
    """What each request gets in each step: token, log-probabilities, candidates.

    Args:
        batches: for each step the calls to make, each a list of requests.
    """
    sampler = Sampler(VOCABULARY, ends=(2,), chunk=chunk)
    tokens = [[11 + i, 4, 4, 9] for i in range(len(params))]
    found: list[list[Any]] = [[] for _ in params]
    for step, calls in enumerate(batches):
        for call in calls:
            rows = [Row(i, params[i], tokens[i], 4, step, request_seed(3, i)) for i in call]
            got = sampler(torch.stack([model(tokens[i]) for i in call]), rows).resolve()
            assert got.errors == {}
            for place, i in enumerate(call):
                token = got.tokens[place]
                assert token is not None
                found[i].append((token, got.logprobs.get(place), got.candidates.get(place)))
                tokens[i].append(token)
    return found


def test_the_tokens_of_a_seed_do_not_depend_on_the_batch() -> None:
    params, steps = mixed(36), 5
    alone = generate(params, [[[i] for i in range(36)]] * steps)
    assert any(entry[0][1] is not None for entry in alone)
    together = generate(params, [[list(range(36))]] * steps)
    assert together == alone
    order = random.Random(1)
    shuffled = [order.sample(range(36), 36) for _ in range(steps)]
    assert generate(params, [[ids[:20], ids[20:]] for ids in shuffled], chunk=3 * VOCABULARY) == alone
    assert generate(params, [[ids] for ids in shuffled], chunk=1 << 40) == alone
    torch.set_num_threads(2)
    assert [found[:2] for found in alone] == generate(params, [[ids] for ids in shuffled[:2]])


def test_seeds_and_completions_differ() -> None:
    params = SamplingParams(temperature=1.0)
    x_RV = torch.zeros(4, VOCABULARY)

    def drawn(*seeds: int) -> list[int]:
        return Sampler(VOCABULARY)(x_RV, [Row(i, params, [1], 1, 0, s) for i, s in enumerate(seeds)]).tokens_R.tolist()

    first = drawn(*(request_seed(seed) for seed in range(4)))
    assert len(set(first)) == 4 and first == drawn(*(request_seed(seed) for seed in range(4)))
    assert len(set(drawn(*(request_seed(0, completion) for completion in range(4))))) == 4
    seeds = {request_seed(seed, completion) for seed in range(100) for completion in range(10)}
    assert len(seeds) == 1000 and all(-(2**63) <= seed < 2**63 for seed in seeds)


def test_greedy_batches_are_an_argmax_and_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sampler_module, "sample", None)
    x_RV = torch.stack([model([i]) for i in range(5)])
    rows = [Row(i, SamplingParams(max_tokens=3), [1], 1, 0, 0) for i in range(5)]
    assert Sampler(VOCABULARY)(x_RV, rows).tokens_R.tolist() == x_RV.argmax(1).tolist()


@pytest.mark.parametrize("greedy", [True, False])
def test_a_row_fails_alone(greedy: bool) -> None:
    params = mixed(12)
    clean = torch.stack([model([i]) for i in range(12)])
    rows = [Row(i, p, [11 + i, 4], 2, 0, request_seed(3, i)) for i, p in enumerate(params)]
    kind = SamplingParams(temperature=0.0 if greedy else 0.8, top_p=1.0 if greedy else 0.5, logprobs=2)

    def broken(prompt: Sequence[int], generated: Sequence[int], logits_V: Tensor) -> Tensor:
        logits_V.fill_(float("nan"))
        raise LookupError("no such thing")

    def short(prompt: Sequence[int], generated: Sequence[int], logits_V: Tensor) -> Tensor:
        return logits_V[:-1]

    want = Sampler(VOCABULARY)(clean, rows).resolve()
    bad = clean[:6].clone()
    bad[0, 700] = torch.nan
    bad[1] = -torch.inf
    plain = [kind, kind] + [
        SamplingParams(temperature=kind.temperature, logits_processors=(quiet, function))
        for function in (broken, short)
    ]
    plain += [SamplingParams(allowed_tokens=(2,), min_tokens=1, temperature=kind.temperature), SamplingParams(beams=2)]
    bad[5] = torch.nan
    more = [Row(100 + i, p, [1], 1, 0, 9) for i, p in enumerate(plain)]
    order = [0, 6, 1, 7, 2, 3, 8, 9, 10, 4, 5, 11]  # the rows that fail stand between the others
    both, names = torch.cat([bad, clean]), more + rows
    places = [place for pair in zip(order[:6], range(6), strict=True) for place in (6 + pair[0], pair[1])]
    places += [6 + place for place in order[6:]]
    sampler = Sampler(VOCABULARY, ends=(2,))
    got = sampler(both[places], [names[place] for place in places])
    found = got.resolve()
    failed = {places.index(i) for i in range(6)}
    assert set(found.errors) == failed == {row for row, token in enumerate(found.tokens) if token is None}
    said = [found.errors[places.index(i)] for i in range(6)]
    assert "NaN" in said[0] and "no token is left" in said[1] and "no token is left" in said[4] and "NaN" in said[5]
    assert "broken" in said[2] and "LookupError: no such thing" in said[2]
    assert "short" in said[3] and "not 1300 floating-point logits" in said[3]
    for row, place in enumerate(places):
        if place >= 6:
            assert found.tokens[row] == want.tokens[place - 6]
            assert found.logprobs.get(row) == want.logprobs.get(place - 6)
            assert found.candidates.get(row) == want.candidates.get(place - 6)
    # a step is on its way already when the host learns of the failure
    assert bool(((got.tokens_R >= 0) & (got.tokens_R < VOCABULARY)).all())
    after = [name._replace(generated=1, tokens=[*name.tokens, 4]) for name in names]
    sampler(both[places], [after[place] for place in places])


def test_extreme_logits() -> None:
    x_RV = torch.zeros(6, VOCABULARY)
    x_RV[1, [5, 900]] = torch.inf
    x_RV[2] = 3e38
    x_RV[2, 7] = -3e38
    x_RV[3] = -3.4e38
    x_RV[4] = -torch.inf
    x_RV[4, 77] = -1e30
    x_RV[5] = torch.linspace(-1, 1, VOCABULARY) * 3e38
    cold: dict[str, Any] = {"temperature": 0.002, "logprobs": 0, "logprobs_of": "processed"}
    cases: list[dict[str, Any]] = [{"top_p": 0.9}, {"top_k": 3}, {"min_p": 0.1, "typical_p": 0.9}, {"temperature": 100}]
    for given in cases:
        params = SamplingParams(**(cold | given))
        sampler, seen = Sampler(VOCABULARY), [set() for _ in range(6)]
        for step in range(12):
            found = sampler(x_RV, [Row(i, params, [1], 1, step, request_seed(1, i)) for i in range(6)]).resolve()
            assert found.errors == {}
            for row, token in enumerate(found.tokens):
                seen[row].add(token)
                assert -20 < found.logprobs[row].value <= 0
        assert seen[1] == {5, 900} and seen[4] == {77} and seen[5] == {VOCABULARY - 1}
        assert len(seen[0]) > 5 and len(seen[2]) > 5 and 7 not in seen[2] and len(seen[3]) > 5


def test_a_step_needs_no_token_from_the_host() -> None:
    """Penalties, bad words and processors see the token of the step before, which the host learns of a step later."""
    params, steps = [p for p in mixed(36) if p.beams == 1], 9
    want = generate(params, [[list(range(len(params)))]] * steps)
    sampler = Sampler(VOCABULARY, ends=(2,))
    known = [[11 + i, 4, 4, 9] for i in range(len(params))]
    true = [list(tokens) for tokens in known]
    found: list[list[Any]] = [[] for _ in params]
    for step in range(steps):
        rows = [Row(i, p, known[i], 4, step, request_seed(3, i)) for i, p in enumerate(params)]
        got = sampler(torch.stack([model(tokens) for tokens in true]), rows).resolve()
        for i, token in enumerate(got.tokens):
            assert token is not None
            found[i].append((token, got.logprobs.get(i), None))
            known[i][:] = true[i]
            true[i].append(token)
    assert found == want


def test_forks_and_what_was_forgotten() -> None:
    params = SamplingParams(temperature=1.0, repetition_penalty=1.5, frequency_penalty=1.0, bad_words=((6, 7), (4, 4)))

    def run(sampler: Sampler, tokens: list[int], prompt: int, request: int) -> int:
        row = Row(request, params, tokens, prompt, len(tokens) - prompt, request_seed(4))
        return int(sampler(model(tokens)[None], [row]).tokens_R)

    base, one = Sampler(VOCABULARY), [9, 4, 4]
    for _ in range(6):
        one.append(run(base, one, 3, 0))
    want = run(Sampler(VOCABULARY), one, 3, 5)  # rebuilt from the host's tokens
    base.fork(0, 1)
    base.fork(77, 78)
    base.forget(0)
    base.forget(0)
    assert run(base, one, 3, 2) == run(base, one, 3, 1) == want
    assert len(base._history.seen) == 8
    for request in range(10, 40):
        run(base, one, 3, request)
        base.forget(request)
        if request % 2:  # a step that was under way when its request ended
            run(base, one, 3, request)
    run(base, one, 3, 1)
    assert set(base._entries) == {1, 2}
    assert len(base._history.seen) == 8, "slots are used again"


@pytest.mark.parametrize("vocabulary", [50, 400])
def test_history_grows_with_different_tokens_only(vocabulary: int) -> None:
    history = History(vocabulary, torch.device("cpu"))
    slot = history.take_slot()
    tokens = [1, 2, 3]
    assert not history.catch_up(slot, tokens, 3, 0, 4)
    slots = torch.tensor([slot])
    generator = random.Random(2)
    for _ in range(300):
        tokens.append(generator.randrange(vocabulary))
        history.append([slot], slots, torch.tensor([tokens[-1]]))
    seen, counts = history.counts(slots)
    want = {token: tokens[3:].count(token) for token in tokens}
    assert dict(zip(seen[0].tolist(), counts[0].tolist(), strict=True)) == want
    assert history.tails(slots)[0].tolist() == tokens[-4:]
    assert seen.shape[1] < max(65, 2 * vocabulary)
    assert not history.catch_up(slot, tokens, 3, 300, 9) and history.catch_up(slot, [*tokens, 5], 3, 301, 4)
