"""The engine: samples, log-probabilities, stops, aborts and failures of single requests, at every layout."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import Ranks
from served import leftovers
from test_llm import LLAMA, config_of, work

from infer import LLM, EngineConfig, RequestError, SamplingParams
from infer.aio import AsyncEngine
from infer.build import build_engine
from infer.chat import ChatTemplate
from infer.completion import Event
from infer.lockstep import Replica
from parallel.errors import ModelFolderError
from parallel.hf import load_model, save_model
from parallel.mesh import Layout, Mesh
from parallel.models.batch import Batch
from parallel.models.build import Build
from parallel.models.decoder import build_model

PROMPT = [7, 30, 99, 12, 8, 150, 33]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder."""
    path = tmp_path_factory.mktemp("model") / "llama"
    save_model(build_model(LLAMA, Build(mesh=Mesh.single()), seed=7), Mesh.single(), path, eos=5)
    return path


def mixed(count: int = 24) -> tuple[list[list[int]], list[SamplingParams]]:
    """Requests that ask for much."""
    prompts, plain = work(count)
    kinds: list[dict[str, Any]] = [
        {"temperature": 0.9, "seed": 11, "top_p": 0.9},
        {"temperature": 1.3, "seed": 12, "n": 3, "logprobs": 2},
        {"repetition_penalty": 1.4, "presence_penalty": 0.5, "logprobs": 0, "prompt_logprobs": 1},
        {"temperature": 0.7, "seed": 13, "best_of": 4, "n": 2, "min_p": 0.01, "min_tokens": 2},
    ]
    params = [SamplingParams(max_tokens=max(2, own.max_tokens), **kinds[i % len(kinds)]) for i, own in enumerate(plain)]
    return prompts, params


def told(folder: str | Path, mesh: Mesh | None = None, config: EngineConfig | None = None) -> list[Any]:
    """What :func:`mixed` gives: tokens exactly, log-probabilities to five digits."""
    llm = LLM(folder, mesh=mesh, config=config)
    found = []
    for completion in llm.generate(*mixed()):
        choices = []
        for choice in completion.choices:
            scores = [(p.token, round(p.value, 3), [t for t, _ in p.top]) for p in choice.logprobs or ()]
            choices.append([choice.index, list(choice.tokens), choice.finish_reason, scores, round(choice.score, 3)])
        prompt = [(p.token, round(p.value, 3)) for p in completion.prompt_logprobs or ()]
        found.append([choices, prompt, completion.error])
    return json.loads(json.dumps(found))


def check_told(folder: str, layouts: list[dict[str, Any]]) -> list[Any]:
    return [
        told(folder, Mesh.build(Layout(**{"sequence_parallel": False, **degrees})), config_of(budget=50, running=9))
        for degrees in layouts
    ]


def test_seeded_samples_are_the_same_at_every_layout(ranks: Ranks, folder: Path) -> None:
    want = told(folder)
    assert all(len({tuple(choice[1]) for choice in entry[0]}) > 1 for entry in want[1::4]), "samples of a prompt differ"
    assert told(folder, config=config_of(page=3, chunk=5, few=150, swap=True, overlap=True, prefix=True)) == want
    layouts = [{"tp": 2}, {"pp": 2}, {"dp": 2}]
    for rank in ranks.run(check_told, world=2, folder=str(folder), layouts=layouts):
        for degrees, found in zip(layouts, rank, strict=True):
            assert found == want, degrees


def test_log_probabilities_are_those_of_the_trainers_forward(folder: Path) -> None:
    model = load_model(folder, Build(mesh=Mesh.single())).eval()
    params = SamplingParams(max_tokens=9, logprobs=3, prompt_logprobs=2, ignore_eos=True)
    (completion,) = LLM(folder, config=config_of(chunk=3)).generate([PROMPT], params)
    text = [*PROMPT, *completion.tokens]
    with torch.no_grad():
        scores = torch.log_softmax(model(Batch.pack([torch.tensor(text)])).double(), -1)
    assert completion.prompt_logprobs is not None
    assert completion.choices[0].logprobs is not None
    reported = [*completion.prompt_logprobs, *completion.choices[0].logprobs]
    assert len(reported) == len(text) - 1
    for place, found in enumerate(reported):
        assert found.token == text[place + 1]
        assert abs(found.value - float(scores[place, found.token])) < 1e-5
        best = scores[place].topk(len(found.top))
        assert [token for token, _ in found.top] == best.indices.tolist()
        assert all(abs(value - float(own)) < 1e-5 for (_, value), own in zip(found.top, best.values, strict=True))


def test_a_processor_that_raises_ends_its_own_request_only(folder: Path) -> None:
    def fails(prompt: Sequence[int], tokens: Sequence[int], logits: torch.Tensor) -> torch.Tensor:
        if len(tokens) == 3:
            raise ValueError("no such thing")
        return logits

    prompts, params = mixed()
    alone = LLM(folder, config=config_of()).generate(prompts, params)
    bad = SamplingParams(max_tokens=9, logits_processors=(fails,))
    both = LLM(folder, config=config_of()).generate([*prompts, PROMPT], [*params, bad])
    assert [c.choices for c in both[:-1]] == [c.choices for c in alone]
    assert both[-1].finish_reason == "error"
    assert "no such thing" in both[-1].error
    assert len(both[-1].tokens) == 3


def test_stop_tokens_and_aborts_free_everything(folder: Path) -> None:
    llm = LLM(folder, config=config_of())
    (free,) = llm.generate([PROMPT], SamplingParams(max_tokens=8, ignore_eos=True))
    stop = SamplingParams(max_tokens=8, ignore_eos=True, stop_tokens=(free.tokens[4],))
    (stopped,) = llm.generate([PROMPT], stop)
    first = free.tokens.index(free.tokens[4])
    assert (stopped.tokens, stopped.finish_reason) == (free.tokens[:first], "stop")
    assert stopped.choices[0].stop_reason == free.tokens[4]
    engine = llm.engine
    ids = [engine.add(prompt, own) for prompt, own in zip(*mixed(), strict=True)]
    for _ in range(3):
        engine.step()
    for id in ids[::2]:
        engine.abort(id)
    assert not engine.abort(ids[0])
    ended = set()
    while engine.busy:
        ended |= {event.id for event in engine.step() if event.completion}
        engine.scheduler.check()
    assert ended <= set(ids[1::2])
    assert engine.stats.used == (0,)
    stream = llm.stream(PROMPT, SamplingParams(max_tokens=50, ignore_eos=True))
    assert next(stream).tokens == free.tokens[:1]
    stream.close()
    assert not engine.busy
    assert engine.stats.used == (0,)


def test_what_has_ended_does_not_wait_for_the_garbage_collector(folder: Path) -> None:
    llm = LLM(folder)
    params = [
        SamplingParams(n=3, temperature=1.0, logprobs=2, max_tokens=5, ignore_eos=True),
        SamplingParams(beams=2, max_tokens=5, stop=("never",), ignore_eos=True),
    ]

    def work() -> None:
        llm.engine.abort(llm.engine.add([4, 5, 6], params[0]))
        llm.generate([[1, 2, 3], [1, 2, 4]], params)

    work()
    assert leftovers(work, "infer") == set()


def replica(folder: str, degrees: dict[str, int]) -> Any:
    mesh = Mesh.build(Layout(**degrees, sequence_parallel=False))
    engine, _ = build_engine(Path(folder), mesh, torch.float32, config_of(overlap=True), tokenizer=None)
    own = Replica(engine, mesh)
    if not own.first:
        own.follow()
        return engine.stats.used
    with pytest.raises(RequestError, match="functions cannot be sent"):
        own.add(PROMPT, SamplingParams(logits_processors=(lambda *_: None,)))
    prompts, params = mixed()
    places = {own.add(prompt, given): place for place, (prompt, given) in enumerate(zip(prompts, params, strict=True))}
    own.abort(next(iter(places)))
    done: dict[int, Any] = {}
    while own.busy:
        for event in own.step():
            if event.completion is not None:
                done[places[event.id]] = [list(choice.tokens) for choice in event.completion.choices]
    own.step()
    own.close()
    return [done.get(place) for place in range(len(prompts))]


@pytest.mark.parametrize("degrees", [{"tp": 2}, {"pp": 2}])
def test_ranks_follow_the_first(ranks: Ranks, folder: Path, degrees: dict[str, int]) -> None:
    prompts, params = mixed()
    want: list[Any] = [
        [list(choice.tokens) for choice in completion.choices]
        for completion in LLM(folder, config=config_of()).generate(prompts, params)
    ]
    first, second = ranks.run(replica, world=2, folder=str(folder), degrees=degrees)
    assert first == [None, *want[1:]]
    assert tuple(second) == (0,)


def test_coroutines_share_an_engine(folder: Path) -> None:
    prompts, params = mixed()
    llm = LLM(folder, config=config_of(overlap=True))
    want = [completion.choices for completion in LLM(folder, config=config_of()).generate(prompts, params)]

    async def main() -> None:
        async with AsyncEngine(llm.engine) as engine:
            got = await asyncio.gather(*map(engine.generate, prompts, params))
            assert [completion.choices for completion in got] == want
            with pytest.raises(RequestError, match="prompt is empty"):
                await engine.generate([])
            stream = engine.stream(PROMPT, SamplingParams(max_tokens=60, ignore_eos=True))
            async for event in stream:
                assert len(event.tokens) == 1
                break
            await stream.aclose()
        assert not llm.engine.busy

    asyncio.run(asyncio.wait_for(main(), 60))


@pytest.mark.parametrize("how", ["fails", "closes"])
def test_who_waits_is_told_that_the_engine_has_ended(folder: Path, how: str) -> None:
    """Also whose order nobody has looked at: it comes while the last step is made."""
    llm = LLM(folder, config=config_of())
    step, reached, go_on = llm.engine.step, threading.Event(), threading.Event()

    def last() -> list[Event]:
        reached.set()
        assert go_on.wait(20)
        if how == "fails":
            raise OSError("a broken engine")
        return step()

    async def main() -> None:
        expected = (
            pytest.raises(OSError, match="broken") if how == "fails" else pytest.raises(RuntimeError, match="closed")
        )
        async with AsyncEngine(llm.engine) as engine:
            llm.engine.step = last
            first = asyncio.create_task(engine.generate(PROMPT, SamplingParams(max_tokens=60, ignore_eos=True)))
            await asyncio.to_thread(reached.wait, 20)
            if how == "closes":
                closing = asyncio.create_task(engine.__aexit__())
                await asyncio.sleep(0.05)
            late = asyncio.create_task(engine.generate(PROMPT))
            vectors = asyncio.create_task(engine.embed([PROMPT]))
            await asyncio.sleep(0.05)
            go_on.set()
            for task in (first, late, vectors):
                with expected:
                    await task
            with expected:
                await engine.generate(PROMPT)
            if how == "closes":
                await closing

    asyncio.run(asyncio.wait_for(main(), 60))


def test_a_chat_template_is_rendered_as_by_transformers(tmp_path: Path) -> None:
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    template = (
        "{{ bos_token }}{% for m in messages %}{% if m.role == 'odd' %}{{ raise_exception('odd role') }}{% endif %}\n"
        "<|{{ m['role'] }}|>{{ m.content | trim }}{% endfor %}\n"
        "{% if tools %}{{ tools | tojson }}{% endif %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
    )
    theirs = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"a": 0}, "a")), bos_token="<s>")
    theirs.chat_template = template
    theirs.save_pretrained(tmp_path)
    messages = [{"role": "system", "content": " Be é. "}, {"role": "user", "content": "Hi"}]
    ours = ChatTemplate(tmp_path)
    tools = [{"type": "function", "function": {"name": "f", "parameters": {"x": "<é>"}}}]
    for given in (None, tools):
        want = theirs.apply_chat_template(messages, tools=given, tokenize=False, add_generation_prompt=True)
        assert ours.render(messages, tools=given) == want
    with pytest.raises(RequestError, match="odd role"):
        ours.render([{"role": "odd", "content": ""}])
    with pytest.raises(RequestError, match="at least one"):
        ours.render([])


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}", "longer than 0.2 s"),
        ("{{ 'a' * 1000000000 }}", "may not use"),
        ("{{ ''.__class__.__mro__ }}", "unsafe"),
        ("{{ messages.append(1) }}", "unsafe"),
    ],
)
def test_a_hostile_template_ends(tmp_path: Path, template: str, message: str) -> None:
    (tmp_path / "chat_template.jinja").write_text(template)
    with pytest.raises(RequestError, match=message):
        ChatTemplate(tmp_path, seconds=0.2).render([{"role": "user", "content": "x"}])


def test_a_folder_without_a_template_is_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelFolderError, match="no chat template"):
        ChatTemplate(folder)
    (tmp_path / "chat_template.jinja").write_text("{% for %}")
    with pytest.raises(ModelFolderError, match="chat template"):
        ChatTemplate(tmp_path)
