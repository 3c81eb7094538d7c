"""Embeddings: pooling against plain computations, every layout and budget, and folders of sentence-transformers."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import Ranks
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from torch import Tensor

from infer import LLM
from infer.embed import Pooling, embed, pool, steps
from infer.sentences import Sentences, encode_texts, read_sentences, text_tokenizer
from parallel.errors import ConfigError, DataError, ModelFolderError
from parallel.hf import save_model
from parallel.mesh import Layout, Mesh
from parallel.models.batch import Batch
from parallel.models.build import Build, PackedAttention
from parallel.models.config import DecoderConfig
from parallel.models.decoder import Decoder, build_model
from parallel.models.encoder import Encoder, build_encoder
from parallel.models.encoder_config import EncoderConfig
from parallel.pp.partition import partition

ENCODER = EncoderConfig(
    vocabulary=97, hidden=24, layers=2, heads=4, feed_forward=20, max_positions=16, dropout=0.3, std=0.3
)
DECODER = DecoderConfig(vocabulary=97, hidden=24, layers=2, heads=4, kv_heads=2, feed_forward=32, std=0.3, tied=True)
LENGTHS = (5, 1, 11, 4, 5, 16, 4, 5)
POOLINGS: tuple[Pooling, ...] = ("mean", "last", "cls")


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def documents() -> list[list[int]]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randint(97, (length,), generator=generator).tolist() for length in LENGTHS]


def model_of(kind: str, mesh: Mesh, **options: Any) -> Encoder | Decoder:
    build = Build(mesh=mesh, dtype=options.pop("dtype", torch.float64), **options)
    return build_encoder(ENCODER, build, seed=4) if kind == "encoder" else build_model(DECODER, build, seed=4)


def plain(model: Encoder | Decoder, pooling: str, normalize: bool) -> Tensor:
    """Each document by itself."""
    model.eval()
    vectors = []
    for ids in documents():
        hidden = model.hidden(Batch.pack([torch.tensor(ids)])).detach()
        vectors.append({"mean": hidden.sum(0) / len(ids), "last": hidden[-1], "cls": hidden[0]}[pooling])
    found = torch.stack(vectors)
    return found / found.square().sum(1, keepdim=True).sqrt() if normalize else found


def assert_close(ours: Tensor, theirs: Tensor, limit: float = 1e-12) -> None:
    assert ours.shape == theirs.shape
    assert float((ours - theirs).abs().max() / theirs.abs().max()) < limit


@pytest.mark.parametrize("kind", ["encoder", "decoder"])
@pytest.mark.parametrize("pooling", POOLINGS)
def test_equal_to_each_document_by_itself(kind: str, pooling: Pooling) -> None:
    model = model_of(kind, Mesh.single())
    for normalize in (False, True):
        wanted = plain(model, pooling, normalize)
        model.train()
        for budget in (16, 17, 51, 1000):
            found = embed(model, documents(), pooling=pooling, normalize=normalize, budget=budget)
            assert_close(found, wanted)
        assert model.training
        assert all(block.training for block in model.modules())
    assert float(found.norm(dim=1).sub(1).abs().max()) < 1e-14
    assert_close(embed(model, [torch.tensor(ids, dtype=torch.int32) for ids in documents()], pooling=pooling),
                 plain(model, pooling, False))  # fmt: skip


def check_layouts(layouts: list[dict[str, Any]]) -> None:
    for kind in ("encoder", "decoder"):
        single = model_of(kind, Mesh.single())
        wanted = {pooling: plain(single, pooling, True) for pooling in POOLINGS}
        for degrees in layouts:
            model = model_of(kind, Mesh.build(Layout(**degrees)))
            for pooling in POOLINGS:
                assert_close(embed(model, documents(), pooling=pooling, normalize=True, budget=33), wanted[pooling])


def test_every_layout_equals_one_device(ranks: Ranks) -> None:
    ranks.run(check_layouts, world=2, layouts=[{"tp": 2}, {"tp": 2, "sequence_parallel": False}, {"dp": 2}])
    ranks.run(check_layouts, world=4, layouts=[{"tp": 4}, {"tp": 4, "sequence_parallel": False}])


def test_only_the_rows_that_are_pooled_reach_the_end() -> None:
    """The last MLP sees one row for each document where one row is pooled, all rows where the mean is."""
    for kind in ("encoder", "decoder"):
        model, seen = model_of(kind, Mesh.single()), list[int]()
        last = model.layers[str(model.config.layers - 1)].mlp
        last.register_forward_hook(lambda module, inputs, output: seen.append(inputs[0].shape[0]))
        for pooling in POOLINGS:
            embed(model, documents(), pooling=pooling)
        assert seen == [sum(LENGTHS), len(LENGTHS), len(LENGTHS)]


def test_half_precision_is_averaged_in_float32() -> None:
    x_TD = torch.randn(300, 5, generator=torch.Generator().manual_seed(1)).bfloat16() + 4
    found = pool(x_TD, (0, 299, 300), "mean")
    assert found.dtype == torch.float32
    assert_close(found[0], x_TD[:299].double().mean(0).float(), 1e-6)
    assert torch.equal(found[1], x_TD[299].float())
    model = model_of("encoder", Mesh.single(), dtype=torch.bfloat16)
    found = embed(model, documents(), normalize=True)
    assert found.dtype == torch.float32
    assert_close(found, plain(model_of("encoder", Mesh.single()), "mean", True).float(), 0.1)
    assert float(found.norm(dim=1).sub(1).abs().max()) < 1e-6


def test_pooling_can_be_trained() -> None:
    x_TD = torch.randn(7, 3, dtype=torch.float64, requires_grad=True)
    for pooling in POOLINGS:
        assert torch.autograd.gradcheck(lambda x, p=pooling: pool(x, (0, 2, 3, 7), p), (x_TD,))


def test_steps_hold_every_document_once_and_keep_to_the_budget() -> None:
    generator = torch.Generator().manual_seed(5)
    for budget in (20, 33, 64, 1000):
        lengths = torch.randint(1, 21, (50,), generator=generator).tolist()
        found = steps(lengths, budget)
        assert sorted(index for chosen in found for index in chosen) == list(range(50))
        assert all(sum(lengths[index] for index in chosen) <= budget for chosen in found)
        flat = [lengths[index] for chosen in found for index in chosen]
        assert flat == sorted(lengths, reverse=True)
        assert len(found) <= 2 * -(-sum(lengths) // budget)
    assert steps([], 4) == []


def test_a_model_that_serves_embeds_with_the_same_weights(tmp_path: Path) -> None:
    save_model(model_of("decoder", Mesh.single(), dtype=torch.float32), Mesh.single(), tmp_path / "decoder")
    save_model(model_of("encoder", Mesh.single(), dtype=torch.float32), Mesh.single(), tmp_path / "encoder")
    for kind in ("decoder", "encoder"):
        llm, model = LLM(tmp_path / kind), model_of(kind, Mesh.single(), dtype=torch.float32)
        vectors = llm.embed(documents(), pooling="mean", normalize=True)
        torch.testing.assert_close(vectors, plain(model, "mean", True), rtol=1e-5, atol=1e-5)
        if kind == "decoder":
            assert llm.engine.stats.used == llm.engine.stats.cached == (0,), "nothing is cached"
        else:
            with pytest.raises(ConfigError, match="is an encoder: it embeds texts"):
                llm.generate([[1]])

    class Cached(PackedAttention):
        """Not known to leave no trace."""

    with pytest.raises(ConfigError, match="attends by Cached"):
        embed(model_of("decoder", Mesh.single(), attention=Cached), documents())


def test_bad_input_is_refused_before_anything_is_computed() -> None:
    model = model_of("encoder", Mesh.single())
    model.register_forward_pre_hook(lambda *_: pytest.fail("computed"))
    with pytest.raises(ConfigError) as config:
        embed(model, documents(), pooling="men", budget=0)  # type: ignore[arg-type]
    assert config.value.problems == (
        "pooling = 'men': unknown (did you mean 'mean'?); there are: mean, last, cls",
        "budget = 0: must be at least 1",
    )
    bad: list[Any] = [[1], [], [1, 97], [-1], [1] * 17, [1] * 8, "text", [0.5], [[1]], [True], torch.ones(2, 0)]
    with pytest.raises(DataError) as data:
        embed(model, bad, budget=7)
    assert data.value.problems == (
        "document 1 is empty",
        "document 2: token id 97 is outside the vocabulary of 97",
        "document 3: token id -1 is outside the vocabulary of 97",
        "document 4 has 17 tokens, the model has 16 positions",
        "document 4 has 17 tokens, a step at most 7: give a larger budget",
        "document 5 has 8 tokens, a step at most 7: give a larger budget",
        *(f"document {index}: must be a row of token ids" for index in range(6, 11)),
    )
    roberta = build_encoder(dataclasses.replace(ENCODER, family="roberta", first_position=2), Build(mesh=Mesh.single()))
    with pytest.raises(DataError, match="document 1 has the padding token 1: documents are not padded"):
        embed(roberta, [[0, 5, 2], [0, 2, 1, 1]])
    part = build_model(DECODER, Build(mesh=Mesh.fake(Layout(pp=2), 0), cuts=partition(2, 2)[:1]))
    with pytest.raises(ConfigError, match=r"layout\.pp"):
        embed(part, documents())
    assert embed(model, []).shape == (0, 24)
    assert embed(model_of("decoder", Mesh.single()), [[1] * 40]).shape == (1, 24)  # rotary: any length


POOL = "sentence_transformers.models.Pooling"
MODULES = [
    {"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models.Transformer"},
    {"idx": 1, "name": "1", "path": "1_Pooling", "type": POOL},
    {"idx": 2, "name": "2", "path": "2_Normalize", "type": "sentence_transformers.models.Normalize"},
]
FLAGS = {"word_embedding_dimension": 24, "pooling_mode_cls_token": False, "pooling_mode_mean_tokens": True}
FILES: dict[str, Any] = {"modules.json": MODULES, "1_Pooling/config.json": FLAGS}


def write(folder: Path, files: dict[str, Any]) -> Path:
    for name, value in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(json.dumps(value))
    return folder


def test_folders_of_sentence_transformers_are_read(tmp_path: Path) -> None:
    assert read_sentences(write(tmp_path / "0", {"config.json": {}})) is None
    assert read_sentences(write(tmp_path / "1", FILES)) == Sentences(normalize=True)
    new = "sentence_transformers.sentence_transformer.modules."
    files = {
        "modules.json": [
            MODULES[0] | {"type": "sentence_transformers.base.modules.transformer.Transformer"},
            MODULES[1] | {"type": new + "pooling.Pooling"},
        ],
        "1_Pooling/config.json": {"embedding_dimension": 24, "pooling_mode": "lasttoken", "include_prompt": True},
        "sentence_bert_config.json": {
            "transformer_task": "feature-extraction",
            "modality_config": {"text": {"method": "forward", "method_output_name": "last_hidden_state"}},
            "module_output_name": "token_embeddings",
        },
        "tokenizer_config.json": {"model_max_length": 128},
        "config_sentence_transformers.json": {"prompts": {"query": "q: ", "document": None}, "model_type": None},
    }
    found = read_sentences(write(tmp_path / "2", files))
    assert found == Sentences(pooling="last", max_tokens=128, prompts={"query": "q: ", "document": ""})
    files = FILES | {
        "1_Pooling/config.json": {"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False},
        "sentence_roberta_config.json": {"max_seq_length": 64, "do_lower_case": True},
        "tokenizer_config.json": {"model_max_length": 128},
        "config_sentence_transformers.json": {"prompts": {"query": "q: "}, "default_prompt_name": "query"},
    }
    found = read_sentences(write(tmp_path / "3", files))
    assert found == Sentences(
        pooling="cls", normalize=True, max_tokens=64, lowercase=True, prompts={"query": "q: "}, prompt="query"
    )
    plain_tokenizer = FILES | {
        "2_Normalize/config.json": {"module_input_name": "sentence_embedding", "module_output_name": None},
        "tokenizer_config.json": {"model_max_length": 10**30},
    }
    assert read_sentences(write(tmp_path / "4", plain_tokenizer)) == Sentences(normalize=True)


def with_module(kind: str, **values: Any) -> dict[str, Any]:
    return {"modules.json": [*MODULES[:2], {"idx": 2, "name": "2", "path": "2_Dense", "type": kind} | values]}


BAD_FOLDERS: list[tuple[dict[str, Any], list[str]]] = [
    (with_module("sentence_transformers.models.Dense"), ["module 'sentence_transformers.models.Dense' is not"]),
    (with_module("custom.Normalize"), ["module 'custom.Normalize' is not supported"]),
    (with_module(POOL), ["supported is the order Transformer, Pooling, Normalize"]),
    (with_module(MODULES[2]["type"], path="../x", kwargs=["task"]), ["'../x' is not the name", "kwargs is not"]),
    ({"modules.json": {}}, ["must hold a list of modules"]),
    ({"modules.json": [MODULES[0] | {"path": "0_Transformer"}, MODULES[1]]}, ["keeps its transformer in '0_Tr"]),
    ({"1_Pooling/config.json": FLAGS | {"pooling_mode_max_tokens": True}}, ["pooling by max and mean is not"]),
    ({"1_Pooling/config.json": {"pooling_mode": "weightedmean"}}, ["pooling by weightedmean is not supported; one of"]),
    ({"1_Pooling/config.json": {"pooling_mode": ["mean", "cls"]}}, ["pooling by mean and cls"]),
    ({"1_Pooling/config.json": FLAGS | {"include_prompt": False}}, ["include_prompt = False"]),
    ({"1_Pooling/config.json": {"pooling_mode_men": True}}, ["pooling_mode_men is not supported (did you mean"]),
    (
        {"2_Normalize/config.json": {"module_input_name": "token_embeddings"}},
        ["module_input_name = 'token_embeddings'"],
    ),
    (
        {"sentence_bert_config.json": {"max_seq_length": 0, "do_lower_case": 1, "query_length": 5, "x": 1}},
        ["max_seq_length = 0", "do_lower_case = 1", "query_length = 5", "x is not supported"],
    ),
    (
        {"config_sentence_transformers.json": {"model_type": "SparseEncoder", "default_prompt_name": "query"}},
        ["'SparseEncoder' is not supported", "'query' is not one of its prompts"],
    ),
]


@pytest.mark.parametrize("case", range(len(BAD_FOLDERS)))
def test_modules_that_are_not_honoured_are_refused_by_name(case: int, tmp_path: Path) -> None:
    change, wanted = BAD_FOLDERS[case]
    with pytest.raises(ModelFolderError) as caught:
        read_sentences(write(tmp_path, FILES | change))
    assert len(caught.value.problems) == len(wanted)
    for text in wanted:
        assert text in str(caught.value)


def test_a_pooling_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelFolderError, match=r"1_Pooling/config.json: no such file"):
        read_sentences(write(tmp_path, {"modules.json": MODULES}))


def word_tokenizer() -> Tokenizer:
    words = ["[PAD]", "[CLS]", "[SEP]", "[UNK]", "a", "b", "c", "A", "q:"]
    tokenizer = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()  # type: ignore[assignment]
    tokenizer.normalizer = normalizers.NFC()  # type: ignore[assignment]
    tokenizer.add_special_tokens(words[:4])
    tokenizer.post_processor = processors.TemplateProcessing(  # type: ignore[assignment]
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 1), ("[SEP]", 2)]
    )
    tokenizer.enable_padding(length=8, pad_id=0, pad_token="[PAD]")
    tokenizer.enable_truncation(4)
    return tokenizer


def test_texts_are_read_whole_and_without_padding() -> None:
    """Tokenizers of such folders often pad to a fixed length, and cut at another than the folder says."""
    base = word_tokenizer()
    own = text_tokenizer(base)
    assert encode_texts(own, ["a b c A", "b"]) == [[1, 4, 5, 6, 7, 2], [1, 5, 2]]
    assert base.encode("a b c A").ids == [1, 4, 5, 2, 0, 0, 0, 0], "the given one is left as it was"
    asked = Sentences(max_tokens=5, lowercase=True, prompts={"query": "q: ", "none": ""}, prompt="query")
    own = text_tokenizer(base, asked)
    assert encode_texts(own, ["A [SEP]"], asked) == [[1, 8, 4, 2, 2]]
    assert encode_texts(own, ["A"], asked, prompt="none") == [[1, 4, 2]]
    with pytest.raises(DataError) as long:
        encode_texts(own, ["a b", "a b c", "a b c a"], asked)
    assert [problem[:20] for problem in long.value.problems] == ["text 1 has 6 tokens,", "text 2 has 7 tokens,"]
    assert encode_texts(text_tokenizer(base, asked, truncate=True), ["a b c"], asked) == [[1, 8, 4, 5, 2]]
    with pytest.raises(ConfigError, match=r"unknown prompt 'qery' \(did you mean 'query'\?\); there are: query, none"):
        encode_texts(own, ["a"], asked, prompt="qery")
