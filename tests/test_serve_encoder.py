"""``lockstep serve`` of models that make vectors: equal to transformers, at every layout, and what is refused."""

from __future__ import annotations

import base64
import concurrent.futures
import contextlib
import json
import os
import signal
import socket
import struct
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from test_serve import Server, ready
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from infer import LLM, EngineConfig, RequestError
from infer.cache import CacheConfig
from infer.vectors import build_vectors, makes_vectors, trained_sizes
from launch.serve import main
from parallel.errors import ConfigError, ModelFolderError
from parallel.hf import save_model
from parallel.mesh import Mesh
from parallel.models.build import Build
from parallel.models.config import DecoderConfig
from parallel.models.decoder import build_model

transformers = pytest.importorskip("transformers")

KEY = "only-those-who-run-it"
TYPE = "sentence_transformers.models."
WORDS = ["[PAD]", "[CLS]", "[SEP]", "[UNK]", *(f"w{number}" for number in range(93))]
SMALL = {
    "vocab_size": len(WORDS),
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "initializer_range": 0.3,
}
TEXTS = ["w1 w2 w3", "w4", " ".join(f"w{number}" for number in range(40)), "w9 W1 w1 w1 w2"]


def write_tokenizer(folder: Path) -> None:
    """One that pads and cuts, as many of these folders have it; whoever serves texts must not."""
    tokenizer = Tokenizer(models.WordLevel({word: index for index, word in enumerate(WORDS)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()  # type: ignore[assignment]
    tokenizer.add_special_tokens(WORDS[:4])
    tokenizer.post_processor = processors.TemplateProcessing(  # type: ignore[assignment]
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 1), ("[SEP]", 2)]
    )
    tokenizer.enable_padding(length=8, pad_id=0, pad_token="[PAD]")
    tokenizer.enable_truncation(5)
    tokenizer.save(str(folder / "tokenizer.json"))


def write_sentences(folder: Path, pooling: str, normalize: bool, **texts: Any) -> None:
    kinds = [("", "Transformer"), ("1_Pooling", "Pooling"), ("2_Normalize", "Normalize")][: 3 if normalize else 2]
    listed = [{"idx": i, "name": str(i), "path": path, "type": TYPE + kind} for i, (path, kind) in enumerate(kinds)]
    (folder / "modules.json").write_text(json.dumps(listed))
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling" / "config.json").write_text(json.dumps({"pooling_mode": pooling}))
    (folder / "sentence_bert_config.json").write_text(json.dumps({"max_seq_length": 48}))
    (folder / "config_sentence_transformers.json").write_text(json.dumps(texts))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """BERT without anything but its configuration and a tokenizer."""
    place = tmp_path_factory.mktemp("encoders") / "bert"
    torch.manual_seed(5)
    transformers.BertModel(transformers.BertConfig(**SMALL)).save_pretrained(place)
    write_tokenizer(place)
    return place


@pytest.fixture(scope="module")
def sentences(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """RoBERTa as sentence-transformers keeps it, with prompts; its vectors may be cut."""
    place = tmp_path_factory.mktemp("encoders") / "roberta"
    torch.manual_seed(6)
    config = transformers.RobertaConfig(**SMALL | {"max_position_embeddings": 66}, pad_token_id=0)
    transformers.RobertaModel(config).save_pretrained(place)
    write_tokenizer(place)
    write_sentences(place, "cls", True, prompts={"query": "w7 w8 ", "document": ""}, default_prompt_name="document")
    values = json.loads((place / "config.json").read_text())
    (place / "config.json").write_text(json.dumps(values | {"matryoshka_dimensions": [8, 16]}))
    return place


@pytest.fixture(scope="module")
def bert(folder: Path) -> Iterator[Server]:
    with serving_vectors(folder, "--layout.tp", "2") as server:
        yield server
        assert server.stop() == 0


@pytest.fixture(scope="module")
def roberta(sentences: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[VectorServer]:
    key = tmp_path_factory.mktemp("admin") / "key"
    key.write_text(KEY)
    key.chmod(0o600)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    given = ("--layout.dp", "2", "--admin-port", str(port), "--admin-key-file", str(key))
    with serving_vectors(sentences, *given) as server:
        server.admin = f"http://127.0.0.1:{port}"
        yield server
        assert server.stop() == 0


class VectorServer(Server):
    """One without a cache."""

    limits = ()
    admin = ""

    def engines_told(self) -> list[dict[str, Any]]:
        request = urllib.request.Request(f"{self.admin}/engines", headers={"authorization": f"Bearer {KEY}"})
        return json.load(urllib.request.urlopen(request, timeout=20))["engines"]


@contextlib.contextmanager
def serving_vectors(folder: Path, *options: str) -> Iterator[VectorServer]:
    server = VectorServer(folder, *options)
    try:
        yield server
    finally:
        if server.process.poll() is None:
            server.process.kill()
            server.process.wait()


def ids_of(text: str) -> list[int]:
    return [1, *(WORDS.index(word) if word in WORDS else 3 for word in text.split()), 2]


def theirs(folder: Path, documents: list[list[int]], pooling: str = "mean") -> torch.Tensor:
    """Each document by itself."""
    model = transformers.AutoModel.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        states = [model(torch.tensor([ids])).last_hidden_state[0] for ids in documents]
    return torch.stack([x_TD.mean(0) if pooling == "mean" else x_TD[0] for x_TD in states])


def ours(server: Server, given: Any, **options: Any) -> torch.Tensor:
    answer = server.client.embeddings.create(model=server.model, input=given, **options)
    assert [entry.index for entry in answer.data] == list(range(len(answer.data)))
    return torch.tensor([entry.embedding for entry in answer.data])


def assert_equal(found: torch.Tensor, wanted: torch.Tensor) -> None:
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)


def error(server: Server, path: str, body: dict[str, Any] | None = None) -> tuple[int, dict[str, Any]]:
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(server.address + path, data, {"content-type": "application/json"})
    with pytest.raises(urllib.error.HTTPError) as caught:
        urllib.request.urlopen(request, timeout=20)
    return caught.value.code, json.load(caught.value)["error"]


def test_vectors_are_those_of_transformers(bert: Server, folder: Path) -> None:
    documents = [ids_of(text) for text in TEXTS]
    wanted = theirs(folder, documents)
    assert_equal(ours(bert, TEXTS), wanted)
    assert_equal(ours(bert, TEXTS, encoding_format="float"), wanted)
    assert_equal(ours(bert, TEXTS[0]), wanted[:1])
    assert_equal(ours(bert, documents), wanted)
    assert_equal(ours(bert, documents[2]), wanted[2:3])
    assert_equal(ours(bert, TEXTS, dimensions=24), wanted)
    answer = bert.client.embeddings.create(model=bert.model, input=TEXTS)
    assert answer.usage.prompt_tokens == answer.usage.total_tokens == sum(map(len, documents))
    body = json.dumps({"model": bert.model, "input": TEXTS[0], "encoding_format": "base64"}).encode()
    request = urllib.request.Request(f"{bert.address}/v1/embeddings", body, {"content-type": "application/json"})
    (entry,) = json.load(urllib.request.urlopen(request, timeout=20))["data"]
    assert_equal(torch.tensor(struct.unpack("<24f", base64.b64decode(entry["embedding"]))), wanted[0])


def test_many_at_once_are_those_of_each_alone(bert: Server, folder: Path) -> None:
    given = [[" ".join(f"w{(i * k) % 93}" for k in range(1 + i % 30))] * (1 + i % 3) for i in range(48)]
    wanted = [theirs(folder, [ids_of(text[0])]) for text in given]
    with concurrent.futures.ThreadPoolExecutor(16) as pool:
        for found, one in zip(pool.map(lambda texts: ours(bert, texts), given), wanted, strict=True):
            assert_equal(found, one.expand(len(found), -1))


def test_other_routes(bert: Server) -> None:
    assert ready(bert) == 200
    body = json.dumps({"prompt": TEXTS[2]}).encode()
    request = urllib.request.Request(f"{bert.address}/tokenize", body, {"content-type": "application/json"})
    told = json.load(urllib.request.urlopen(request, timeout=20))
    assert (told["tokens"], told["max_model_len"]) == (ids_of(TEXTS[2]), 64)
    (card,) = json.load(urllib.request.urlopen(f"{bert.address}/v1/models", timeout=20))["data"]
    assert (card["max_model_len"], card["chat_template"]) == (64, False)
    time.sleep(0.6)  # counters come four times a second
    metrics = urllib.request.urlopen(f"{bert.address}/metrics", timeout=20).read().decode()
    counted = dict(line.rsplit(" ", 1) for line in metrics.splitlines() if not line.startswith("#"))
    assert counted["lockstep_engine_up"] == "1" and counted["lockstep_engine_waiting"] == "0"
    assert int(counted["lockstep_engine_computed_tokens_total"]) > 0
    paths = json.load(urllib.request.urlopen(f"{bert.address}/openapi.json", timeout=20))["paths"]
    assert "/v1/embeddings" in paths and not {"/", "/v1/completions", "/v1/stream"} & set(paths)


def test_it_says_what_it_cannot_do(bert: Server) -> None:
    bodies: dict[str, dict[str, Any]] = {
        "/v1/completions": {"prompt": "w1"},
        "/v1/chat/completions": {"messages": [{"role": "user", "content": "w1"}]},
        "/v1/responses": {"input": "w1"},
    }
    for path, body in bodies.items():
        code, told = error(bert, path, {"model": bert.model} | body)
        assert (code, told["param"]) == (404, "model") and "makes vectors and cannot continue texts" in told["message"]
    code, told = error(bert, "/")
    assert code == 404 and "this one makes vectors" in told["message"]
    wrong: list[tuple[dict[str, Any], str, str]] = [
        ({"dimensions": 8}, "dimensions", "vectors of this model can have 24"),
        ({"dimensions": 0}, "dimensions", "24"),
        ({"prompt_name": "query"}, "prompt_name", "unknown prompt 'query'; there are: none"),
        ({"input": " ".join(["w1"] * 63)}, "input", "n_prompt = 65, n_ctx = 64"),
        ({"input": [[1, 2], [1] * 65]}, "input", "n_prompt = 65, n_ctx = 64"),
        ({"input": [1, 97]}, "input", "97 is outside the vocabulary of 97"),
        ({"input": [1, 5, 2], "truncate": True}, "truncate", "token ids are taken as they are"),
    ]
    for change, param, message in wrong:
        code, told = error(bert, "/v1/embeddings", {"model": bert.model, "input": "w1"} | change)
        assert (code, told["param"]) == (400, param) and message in told["message"], told


def test_a_folder_of_sentence_transformers_by_two_replicas(roberta: Server, sentences: Path) -> None:
    wanted = torch.nn.functional.normalize(theirs(sentences, [ids_of(text) for text in TEXTS], "cls"), dim=-1)
    assert_equal(ours(roberta, TEXTS), wanted)
    asked = torch.nn.functional.normalize(theirs(sentences, [ids_of("w7 w8 w1")], "cls"), dim=-1)
    assert_equal(ours(roberta, "w1", extra_body={"prompt_name": "query"}), asked)
    code, told = error(roberta, "/v1/embeddings", {"model": roberta.model, "input": "w1", "prompt_name": "qery"})
    assert (code, told["param"]) == (400, "prompt_name") and "did you mean 'query'" in told["message"]
    for size in (8, 16, 24):
        cut = torch.nn.functional.normalize(wanted[:, :size], dim=-1)
        assert_equal(ours(roberta, TEXTS, dimensions=size), cut)
    code, told = error(roberta, "/v1/embeddings", {"model": roberta.model, "input": "w1", "dimensions": 12})
    assert (code, told["param"]) == (400, "dimensions") and "8, 16, 24" in told["message"]
    long = " ".join(["w5"] * 60)
    code, told = error(roberta, "/v1/embeddings", {"model": roberta.model, "input": long})
    assert (code, told["code"]) == (400, "context_length_exceeded") and "n_ctx = 48" in told["message"]
    cut = torch.nn.functional.normalize(theirs(sentences, [[1, *[WORDS.index("w5")] * 46, 2]], "cls"), dim=-1)
    assert_equal(ours(roberta, long, extra_body={"truncate": True}), cut)
    code, told = error(roberta, "/v1/embeddings", {"model": roberta.model, "input": [[1, 5, 2], [1, 0, 2]]})
    assert code == 400 and told["message"].startswith("document 1 has the padding token 0")


def test_a_replica_that_is_killed_is_missed_by_nobody(roberta: VectorServer) -> None:
    wanted = ours(roberta, TEXTS)
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        answers = [pool.submit(ours, roberta, TEXTS) for _ in range(40)]
        victim = next(pid for pid in roberta.engines() if b"--channel" in Path(f"/proc/{pid}/cmdline").read_bytes())
        os.killpg(victim, signal.SIGKILL)
        for answer in answers:
            assert_equal(answer.result(), wanted)
    end = time.monotonic() + 60
    while sum(engine["restarts"] and engine["there"] for engine in roberta.engines_told()) < 1:
        assert time.monotonic() < end, "it was not started again"
        time.sleep(0.1)
    for _ in range(4):
        assert_equal(ours(roberta, TEXTS), wanted)


def test_what_cannot_be_served_is_refused_before_anything_starts(folder: Path, tmp_path: Path) -> None:
    given = ["--layout.pp", "2", "--layout.tp", "3", "--engine.context", "65", "--engine.disk", "x", "--sizes", "25"]
    given += ["--engine.scheduler.disk-pages", "5", "--engine.cache.memory-gib", "1"]
    with pytest.raises(ConfigError) as caught:
        main([str(folder), *given])
    found = [problem.split(":")[0] for problem in caught.value.problems]
    assert found == [
        "layout.tp = 3 does not divide the 4 heads; the nearest degree that works is 2",
        "engine.context = 65",
        "sizes = 25",
        "layout.pp = 2",
        "engine.cache.memory_gib = 1.0",
        "engine.scheduler.disk_pages = 5",
        "engine.disk = x",
    ]
    with pytest.raises(ConfigError, match="task = generate: the model is an encoder"):
        main([str(folder), "--task", "generate"])
    place = tmp_path / "decoder"
    config = DecoderConfig(vocabulary=len(WORDS), hidden=24, layers=2, heads=4, kv_heads=2, head_size=8)
    save_model(build_model(config, Build(mesh=Mesh.single()), seed=3), Mesh.single(), place)
    with pytest.raises(ConfigError, match=r"engine\.overlap = on: of what generates"):
        main([str(place), "--task", "embed", "--engine.overlap", "on"])
    write_sentences(place, "max", True)
    with pytest.raises(ModelFolderError, match="pooling by max is not supported"):
        main([str(place)])


def test_a_decoder_for_its_vectors_only(tmp_path: Path) -> None:
    config = DecoderConfig(vocabulary=97, hidden=24, layers=2, heads=4, kv_heads=2, head_size=8, feed_forward=40)
    save_model(build_model(config, Build(mesh=Mesh.single()), seed=3), Mesh.single(), tmp_path / "m")
    assert not makes_vectors(tmp_path / "m", "auto") and makes_vectors(tmp_path / "m", "embed")
    write_sentences(tmp_path / "m", "lasttoken", True)
    assert makes_vectors(tmp_path / "m", "auto") and not makes_vectors(tmp_path / "m", "generate")
    documents = [[5, 6, 7], [8], list(range(60))]
    engine = build_vectors(tmp_path / "m", Mesh.single(), torch.float32, tokenizer=None, budget=4)
    llm = LLM(tmp_path / "m", config=EngineConfig(cache=CacheConfig(memory_gib=0.02)))
    assert_equal(torch.tensor(engine.embed(documents)), llm.embed(documents))
    assert engine.stats.computed == 64
    with pytest.raises(RequestError, match="cannot continue texts"):
        engine.add([1])
    with pytest.raises(RequestError, match="document 1 is empty"):
        engine.embed([[1], []])


def test_sizes_are_those_that_the_model_was_trained_for(folder: Path, sentences: Path, tmp_path: Path) -> None:
    assert (trained_sizes(folder), trained_sizes(sentences)) == ((), (8, 16))
    values = json.loads((folder / "config.json").read_text())
    for told, wanted in (
        ({"is_matryoshka": True}, range(1, 25)),
        ({"is_matryoshka": 1}, "is_matryoshka = 1"),
        ({"matryoshka_dimensions": [8, 25]}, r"matryoshka_dimensions = \[8, 25\]: must be sizes of at most 24"),
    ):
        (tmp_path / "config.json").write_text(json.dumps(values | told))
        if isinstance(wanted, range):
            assert trained_sizes(tmp_path) == wanted
            continue
        with pytest.raises(ModelFolderError, match=wanted):
            trained_sizes(tmp_path)
