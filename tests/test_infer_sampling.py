"""What is sampled from: against `transformers`, against formulas in float64, and against the frequencies of draws."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers.generation import logits_process as theirs

from infer.params import SamplingParams
from infer.sampling import Row, Sampler, prompt_logprobs, request_seed

PROMPT = [3, 5, 5, 8]


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def logits(rows: int, vocabulary: int, seed: int = 0, spread: float = 3.0) -> Tensor:
    return torch.randn(rows, vocabulary, generator=torch.Generator().manual_seed(seed)) * spread


def rows_of(
    params: SamplingParams, count: int, generated: tuple[int, ...] = (), prompt: list[int] = PROMPT
) -> list[Row]:
    tokens = [*prompt, *generated]
    return [Row(i, params, tokens, len(prompt), len(generated), request_seed(7, i)) for i in range(count)]


def processed(x_RV: Tensor, generated: tuple[int, ...] = (), ends: tuple[int, ...] = (), **given: Any) -> Tensor:
    """The log-probabilities (R, V) that the sampler draws from, -inf where it cannot; what it drew must be possible."""
    vocabulary = x_RV.shape[1]
    params = SamplingParams(**given, logprobs=vocabulary, logprobs_of="processed")
    assert list(params.problems(vocabulary=vocabulary, ends=ends)) == []
    before = x_RV.clone()
    sampled = Sampler(vocabulary, ends=ends)(x_RV, rows_of(params, len(x_RV), generated))
    assert torch.equal(x_RV, before)
    assert sampled.resolve().errors == {}
    out = torch.full_like(x_RV, -torch.inf)
    for part in sampled.logprobs:
        assert torch.equal(part.tokens[:, 0], sampled.tokens_R[list(part.rows)])
        own = part.values[:, 1:].gather(1, (part.tokens[:, 1:] == part.tokens[:, :1]).long().argmax(1, keepdim=True))
        assert torch.equal(own, part.values[:, :1]) and bool((own > -torch.inf).all())
        out[list(part.rows)] = out[list(part.rows)].scatter(1, part.tokens[:, 1:], part.values[:, 1:])
    return out


def expected(x_RV: Tensor, processors: list[Any], generated: tuple[int, ...] = ()) -> Tensor:
    """The same by `transformers`, row by row, log-probabilities in float64."""
    ids = torch.tensor([[*PROMPT, *generated]])
    found = []
    for row in x_RV.clone():
        scores = row[None]
        for processor in processors:
            scores = processor(ids, scores)
        found.append(scores[0].double().log_softmax(0))
    return torch.stack(found)


def same(ours: Tensor, want: Tensor, tolerance: float = 2e-5) -> None:
    assert torch.equal(ours > -torch.inf, want > -torch.inf), "not the same tokens are left"
    kept = want > -torch.inf
    assert float((ours[kept].double() - want[kept]).abs().max()) < tolerance


W: Any = theirs
CASES: dict[str, tuple[dict[str, Any], list[Any]]] = {
    "temperature": ({"temperature": 0.7}, [W.TemperatureLogitsWarper(0.7)]),
    "hot": ({"temperature": 5.0}, [W.TemperatureLogitsWarper(5.0)]),
    "top_k": ({"temperature": 1.0, "top_k": 7}, [W.TopKLogitsWarper(7)]),
    "top_k 1": ({"temperature": 1.0, "top_k": 1}, [W.TopKLogitsWarper(1)]),
    "top_k > V": ({"temperature": 1.0, "top_k": 10**6}, [W.TopKLogitsWarper(10**6)]),
    "top_p": ({"temperature": 1.0, "top_p": 0.8}, [W.TopPLogitsWarper(0.8)]),
    "top_p tiny": ({"temperature": 1.0, "top_p": 1e-6}, [W.TopPLogitsWarper(1e-6)]),
    "top_p near 1": ({"temperature": 2.0, "top_p": 0.999}, [W.TemperatureLogitsWarper(2.0), W.TopPLogitsWarper(0.999)]),
    "min_p": ({"temperature": 1.0, "min_p": 0.02}, [W.MinPLogitsWarper(0.02)]),
    "typical": ({"temperature": 1.0, "typical_p": 0.6}, [W.TypicalLogitsWarper(0.6)]),
    "typical hot": (
        {"temperature": 3.0, "typical_p": 0.2},
        [W.TemperatureLogitsWarper(3.0), W.TypicalLogitsWarper(0.2)],
    ),
    "k then p": (
        {"temperature": 1.5, "top_k": 20, "top_p": 0.7},
        [W.TemperatureLogitsWarper(1.5), W.TopKLogitsWarper(20), W.TopPLogitsWarper(0.7)],
    ),
    "all filters": (
        {"temperature": 1.3, "top_k": 60, "top_p": 0.95, "min_p": 0.01, "typical_p": 0.8},
        [
            W.TemperatureLogitsWarper(1.3),
            W.TopKLogitsWarper(60),
            W.TopPLogitsWarper(0.95),
            W.MinPLogitsWarper(0.01),
            W.TypicalLogitsWarper(0.8),
        ],
    ),
    "repetition": (
        {"temperature": 1.0, "repetition_penalty": 1.4},
        [W.RepetitionPenaltyLogitsProcessor(1.4)],
    ),
    "repetition below 1": ({"repetition_penalty": 0.5}, [W.RepetitionPenaltyLogitsProcessor(0.5)]),
    "bias": (
        {"logit_bias": {2: 1.5, 9: -3.0}},
        [W.SequenceBiasLogitsProcessor({(2,): 1.5, (9,): -3.0})],
    ),
    "bias, then repetition": (
        {"logit_bias": {5: 4.0, 8: -2.0}, "repetition_penalty": 2.0},
        [W.SequenceBiasLogitsProcessor({(5,): 4.0, (8,): -2.0}), W.RepetitionPenaltyLogitsProcessor(2.0)],
    ),
    "bad words": (
        {
            "bad_words": ((4,), (11, 12), (7, 11, 13), (8, 11, 13), (9, 11, 14), (3, 5, 5, 8, 7, 11, 15)),
            "temperature": 1.0,
        },
        [W.NoBadWordsLogitsProcessor([[4], [11, 12], [7, 11, 13], [8, 11, 13], [9, 11, 14], [3, 5, 5, 8, 7, 11, 15]])],
    ),
    "min_tokens": (
        {"min_tokens": 3, "stop_tokens": (6,), "temperature": 1.0},
        [W.MinNewTokensLengthLogitsProcessor(4, 3, [1, 6])],
    ),
    "min_tokens reached": (
        {"min_tokens": 2, "stop_tokens": (6,), "temperature": 1.0},
        [W.MinNewTokensLengthLogitsProcessor(4, 2, [1, 6])],
    ),
    "banned": ({"banned_tokens": (0, 5, 96)}, [W.SuppressTokensLogitsProcessor([0, 5, 96])]),
    "allowed": (
        {"allowed_tokens": (8, 1, 30), "temperature": 1.0},
        [W.PrefixConstrainedLogitsProcessor(lambda batch, ids: [8, 1, 30], 1)],
    ),
}


@pytest.mark.parametrize("name", list(CASES))
def test_the_distribution_is_that_of_transformers(name: str) -> None:
    given, processors = CASES[name]
    x_RV, generated = logits(40, 97, seed=len(name)), (7, 11)
    same(processed(x_RV, generated, ends=(1,), **given), expected(x_RV, processors, generated))


@pytest.mark.parametrize("name", ["top_p", "all filters", "k then p", "typical hot", "top_p near 1", "repetition"])
def test_also_with_a_large_odd_vocabulary(name: str) -> None:
    given, processors = CASES[name]
    x_RV = logits(2, 50257, seed=3)
    same(processed(x_RV, (7, 11), **given), expected(x_RV, processors, (7, 11)))


def test_penalties_follow_the_formula_of_openai() -> None:
    """mu[j] - c[j] * frequency - (c[j] > 0) * presence + bias[j]; c counts what was generated, not the prompt."""
    x_RV, generated = logits(4, 50, seed=5), (9, 2, 9, 9, 5)
    want = x_RV.double()
    for token in set(generated):
        want[:, token] -= 0.3 * generated.count(token) + 0.7
    want[:, 4] += 2.5
    given: dict[str, Any] = {"presence_penalty": 0.7, "frequency_penalty": 0.3, "logit_bias": {4: 2.5}}
    same(processed(x_RV, generated, **given), want.log_softmax(1))
    repeated = W.RepetitionPenaltyLogitsProcessor(1.7)(torch.tensor([[*PROMPT, *generated]] * 4), x_RV)
    for token in set(generated):
        repeated[:, token] -= 0.3 * generated.count(token) + 0.7
    given = {"presence_penalty": 0.7, "frequency_penalty": 0.3, "repetition_penalty": 1.7, "temperature": 1.0}
    same(processed(x_RV, generated, **given), repeated.double().log_softmax(1))


def test_processors_come_after_penalties_and_before_the_temperature() -> None:
    x_RV, seen = logits(3, 60, seed=9), []

    def first(prompt: Any, generated: Any, logits_V: Tensor) -> Tensor:
        seen.append((tuple(prompt), tuple(generated), logits_V.clone()))
        return logits_V.double() * 2

    def second(prompt: Any, generated: Any, logits_V: Tensor) -> Tensor:
        logits_V[7] = -torch.inf
        return logits_V

    given: dict[str, Any] = {"logit_bias": {5: 1.0}, "banned_tokens": (6,), "temperature": 2.0, "top_k": 20}
    ours = processed(x_RV, (7, 11), logits_processors=(first, second), **given)
    want = x_RV.clone()
    want[:, 5] += 1
    want[:, 6] = -torch.inf
    assert [entry[:2] for entry in seen] == [(tuple(PROMPT), (7, 11))] * 3
    assert torch.equal(torch.stack([entry[2] for entry in seen]), want)
    want[:, 7] = -torch.inf
    same(ours, expected(want * 2, [W.TemperatureLogitsWarper(2.0), W.TopKLogitsWarper(20)]))


def test_greedy_takes_the_first_of_the_likeliest() -> None:
    x_RV = logits(9, 5000, seed=1)
    x_RV[0] = 2.0
    x_RV[1, [4999, 4000, 600, 601]] = 99.0
    x_RV[2, 4999] = torch.inf
    x_RV[3, 130] = x_RV[3, 4995] = 50.0
    sampled = Sampler(5000)(x_RV, rows_of(SamplingParams(), 9))
    assert sampled.tokens_R.tolist() == x_RV.argmax(1).tolist()
    assert sampled.tokens_R[:3].tolist() == [0, 600, 4999] and sampled.resolve().errors == {}
    edited = Sampler(5000)(x_RV, rows_of(SamplingParams(banned_tokens=(0,), logprobs=0), 9))
    assert edited.tokens_R[:3].tolist() == [1, 600, 4999]


def p_value(counts: Tensor, probabilities: Tensor) -> float:
    """Of Pearson's chi-square; cells of less than five expected draws are one."""
    want = probabilities.double() * counts.sum()
    small = want < 5
    want = torch.cat([want[~small], want[small].sum()[None]])
    got = torch.cat([counts[~small].double(), counts[small].sum()[None].double()])
    got, want = got[want > 0], want[want > 0]
    statistic = ((got - want) ** 2 / want).sum()
    return float(torch.special.gammaincc(torch.tensor((len(want) - 1) / 2, dtype=torch.float64), statistic / 2))


@pytest.mark.parametrize(
    ("vocabulary", "given"),
    [
        (13, {"temperature": 1.0}),
        (13, {"temperature": 2.0, "top_p": 0.7}),
        (40, {"temperature": 1.0, "top_p": 0.15}),
        (40, {"temperature": 1.5, "top_k": 9, "top_p": 0.8, "min_p": 0.05}),
        (40, {"temperature": 1.5, "typical_p": 0.7}),
        (2000, {"temperature": 1.5}),
        (2000, {"temperature": 1.2, "top_p": 0.9}),
    ],
)
def test_tokens_are_drawn_as_often_as_they_should_be(vocabulary: int, given: dict[str, Any]) -> None:
    """Over seeds and over the tokens of a request alike."""
    x_V = logits(1, vocabulary, seed=2, spread=2.0)
    want = processed(x_V, **given)[0].exp()
    seeds, steps = 300, 40
    params, sampler = SamplingParams(**given), Sampler(vocabulary)
    x_RV = x_V.expand(seeds, vocabulary).contiguous()
    drawn = torch.stack(
        [
            sampler(x_RV, [Row(i, params, PROMPT, 4, step, request_seed(11, i)) for i in range(seeds)]).tokens_R
            for step in range(steps)
        ]
    )
    counts = torch.bincount(drawn.flatten(), minlength=vocabulary)
    assert int(counts[want == 0].sum()) == 0
    assert p_value(counts, want) > 1e-3
    # a token and the next one of its request, and that of the next seed, are independent: pairs come as their product
    for first, second in ((drawn[:-1], drawn[1:]), (drawn[:, :-1], drawn[:, 1:])):
        pairs = torch.bincount((first * vocabulary + second).flatten(), minlength=vocabulary**2)
        assert p_value(pairs, torch.outer(want, want).flatten()) > 1e-3


@pytest.mark.parametrize("vocabulary", [97, 50257])
def test_log_probabilities_of_samples_and_prompts(vocabulary: int) -> None:
    x_RV = logits(6, vocabulary, seed=4, spread=8.0)
    x_RV[0, :50] = -torch.inf
    want = x_RV.double().log_softmax(1)
    sampled = Sampler(vocabulary)(x_RV, rows_of(SamplingParams(temperature=1.0, top_p=0.5, logprobs=5), 6))
    found = sampled.resolve()
    for row, token in enumerate(found.tokens):
        own = found.logprobs[row]
        assert own.token == token and abs(own.value - want[row, token].item()) < 1e-5
        top = want[row].topk(5)
        assert [pair[0] for pair in own.top] == top.indices.tolist()
        assert torch.tensor([pair[1] for pair in own.top], dtype=torch.float64).sub(top.values).abs().max() < 1e-5
    tokens = [5, 96, 60, 96, 2, 0]
    whole = prompt_logprobs(x_RV, tokens, 3)
    parts = [prompt_logprobs(x_RV[a:b], tokens[a:b], 3) for a, b in ((0, 1), (1, 1), (1, 4), (4, 6))]
    assert torch.equal(torch.cat([part.values for part in parts]), whole.values)
    assert torch.equal(torch.cat([part.tokens for part in parts]), whole.tokens)
    assert whole.tokens[:, 0].tolist() == tokens
    own = want[torch.arange(6), torch.tensor(tokens)]
    assert float((whole.values[1:, 0].double() - own[1:]).abs().max()) < 1e-5
    assert whole.resolve()[0].value == -torch.inf and len(whole.resolve()[1].top) == 3


def test_beams_get_the_candidates_of_transformers() -> None:
    """`transformers` applies its processors to log-probabilities, and does not normalize them again."""
    x_RV, generated, beams = logits(5, 97, seed=6), (7, 11), 3
    params = SamplingParams(beams=beams, repetition_penalty=1.5, min_tokens=4, bad_words=((11, 20),), stop_tokens=(2,))
    found = Sampler(97, ends=(1,))(x_RV, rows_of(params, 5, generated)).resolve()
    ids = torch.tensor([[*PROMPT, *generated]]).expand(5, -1)
    scores = x_RV.log_softmax(1)
    for processor in (
        W.RepetitionPenaltyLogitsProcessor(1.5),
        W.NoBadWordsLogitsProcessor([[11, 20]]),
        W.MinNewTokensLengthLogitsProcessor(4, 4, [1, 2]),
    ):
        scores = processor(ids, scores)
    want = scores.topk(3 * beams, 1)
    assert found.tokens == want.indices[:, 0].tolist()
    for row in range(5):
        assert [token for token, _ in found.candidates[row]] == want.indices[row].tolist()
        assert torch.tensor([v for _, v in found.candidates[row]]).sub(want.values[row]).abs().max() < 1e-5
