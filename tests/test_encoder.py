"""BERT-type encoders: equal to transformers in float64, to themselves at every layout, and what is refused."""

from __future__ import annotations

import dataclasses
import json
import random
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import Ranks
from safetensors.torch import load_file, save_file
from test_layouts import assert_equal_to, joined_gradients
from torch import Tensor

from parallel import comm, rng
from parallel.errors import ConfigError, DataError, ModelFolderError
from parallel.hf import check_folder, load_model, read_config, save_model
from parallel.hf.table import parts
from parallel.kernels.bidirectional import bidirectional_attention, bidirectional_attention_reference
from parallel.kernels.dropout import dropout
from parallel.mesh import Layout, Mesh
from parallel.models.batch import Batch
from parallel.models.build import Build, PackedAttention, Recompute
from parallel.models.encoder import Encoder, build_encoder
from parallel.models.encoder_config import EncoderConfig
from parallel.models.families import ENCODERS
from parallel.pp.partition import partition
from parallel.shard import finalize_gradients

transformers = pytest.importorskip("transformers")

LENGTHS = (5, 11, 1, 4, 4, 8)
SMALL: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 24,
    "intermediate_size": 35,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "max_position_embeddings": 14,
}
CASES: dict[str, dict[str, Any]] = {
    "bert": SMALL,
    "bert-large-vocabulary": SMALL | {"vocab_size": 50257, "num_hidden_layers": 1, "type_vocab_size": 3},
    "roberta": SMALL,
    "xlm-roberta": SMALL | {"type_vocab_size": 1, "hidden_act": "gelu_new"},
    "camembert": SMALL | {"pad_token_id": 2, "max_position_embeddings": 15, "hidden_act": "silu"},
}


def random_case(seed: int) -> dict[str, Any]:
    draw = random.Random(seed)
    heads = draw.choice([1, 3, 5, 6])
    return {
        "vocab_size": draw.randint(50, 120),
        "hidden_size": heads * draw.randint(1, 7),
        "intermediate_size": draw.randint(1, 60),
        "num_hidden_layers": draw.randint(1, 4),
        "num_attention_heads": heads,
        "max_position_embeddings": draw.randint(14, 40),
        "type_vocab_size": draw.randint(1, 4),
        "layer_norm_eps": draw.choice([1e-12, 1e-3]),
        "hidden_act": draw.choice(["gelu", "gelu_new", "silu"]),
    }


CASES |= {f"{kind}-random-{seed}": random_case(seed) for kind, seed in (("bert", 0), ("bert", 1), ("roberta", 2))}


@pytest.fixture(autouse=True)
def one_thread() -> Any:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def kind_of(case: str) -> str:
    return next(kind for kind in sorted(ENCODERS, key=len, reverse=True) if case.startswith(kind))


def oracle(case: str, kind: Any = None) -> Any:
    config = transformers.AutoConfig.for_model(kind_of(case), **CASES[case])
    model = (kind or transformers.AutoModel).from_config(config, dtype=torch.float64)
    generator = torch.Generator().manual_seed(len(case))
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.copy_(noise * 0.2 + (1.0 if parameter.ndim == 1 else 0.0))
    return model.eval()


def documents(vocabulary: int) -> list[Tensor]:
    """None has the padding token, whose gradient transformers leaves out."""
    generator = torch.Generator().manual_seed(7)
    return [torch.randint(3, vocabulary, (length,), generator=generator) for length in LENGTHS]


def types_of(texts: list[Tensor], types: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(8)
    return [torch.randint(types, text.shape, generator=generator) for text in texts]


def padded(texts: list[Tensor], value: int) -> Tensor:
    return torch.nn.utils.rnn.pad_sequence(texts, batch_first=True, padding_value=value)


def relative(ours: Tensor, theirs: Tensor) -> float:
    return float((ours - theirs).abs().max() / theirs.abs().max().clamp_min(1e-30))


def load(folder: Path) -> Encoder:
    model = load_model(folder, Build(mesh=Mesh.single(), dtype=torch.float64), encoders=True)
    assert isinstance(model, Encoder)
    return model.eval()


def assert_same_function(ours: Encoder, theirs: Any, types: list[Tensor] | None) -> None:
    """Packed against padded: every hidden state, and every gradient of a sum that weighs them all differently."""
    texts = documents(ours.config.vocabulary)
    mask = padded([torch.ones_like(text) for text in texts], 0)
    given = {} if types is None else {"token_type_ids": padded(types, 0)}
    pad = theirs.config.pad_token_id
    out = theirs(padded(texts, 0 if pad is None else pad), attention_mask=mask, **given).last_hidden_state[mask.bool()]
    hidden = ours(Batch.pack(texts), None if types is None else torch.cat(types))
    assert relative(hidden.detach(), out.detach()) < 1e-10
    weigh = torch.randn(out.shape, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    ours.zero_grad()
    theirs.zero_grad()
    (out * weigh).sum().backward()
    (hidden * weigh).sum().backward()
    prefix = ENCODERS[ours.config.family].prefix
    wanted = {prefix + name: p.grad for name, p in theirs.named_parameters() if not name.startswith("pooler")}
    table = parts(ours.config)
    for name, parameter in ours.named_parameters():
        assert parameter.grad is not None
        assert relative(parameter.grad, torch.cat([wanted.pop(part.name) for part in table[name]])) < 1e-10, name
    assert not wanted


@pytest.mark.parametrize("case", list(CASES))
def test_equal_to_transformers(case: str, tmp_path: Path) -> None:
    theirs = oracle(case)
    theirs.save_pretrained(tmp_path / "theirs", max_shard_size="20KB")
    ours = load(tmp_path / "theirs")
    assert ours.config.family == kind_of(case)
    texts = documents(ours.config.vocabulary)
    assert_same_function(ours, theirs, None)
    assert_same_function(ours, theirs, types_of(texts, ours.config.token_types))
    save_model(ours, Mesh.single(), tmp_path / "ours")
    again, info = transformers.AutoModel.from_pretrained(
        tmp_path / "ours", dtype=torch.float64, output_loading_info=True
    )
    assert all(name.startswith("pooler.") for name in info["missing_keys"])
    assert not info["unexpected_keys"]
    with torch.no_grad():
        for text in texts:
            difference = relative(again(text[None]).last_hidden_state, theirs(text[None]).last_hidden_state)
            assert difference < 1e-13
    assert read_config(tmp_path / "ours", encoders=True) == ours.config
    for (name, a), b in zip(ours.named_parameters(), load(tmp_path / "ours").parameters(), strict=True):
        assert torch.equal(a, b), name


@pytest.mark.parametrize("case", ["bert", "roberta"])
def test_heads_are_accounted_for_and_left_out(case: str, tmp_path: Path) -> None:
    theirs = oracle(case, transformers.AutoModelForMaskedLM)
    theirs.save_pretrained(tmp_path / "m")
    config = json.loads((tmp_path / "m" / "config.json").read_text())
    assert config["architectures"][0].endswith("ForMaskedLM")
    assert_same_function(load(tmp_path / "m"), theirs.base_model, None)
    if case == "bert":  # as the first releases wrote it
        held = load_file(tmp_path / "m" / "model.safetensors")
        old = {name.replace("Norm.weight", "Norm.gamma").replace("Norm.bias", "Norm.beta"): held[name] for name in held}
        extra = {"cls.seq_relationship.weight": torch.zeros(2, 24), "bert.pooler.dense.bias": torch.zeros(24)}
        extra["bert.embeddings.position_ids"] = torch.arange(14)
        save_file(old | extra, tmp_path / "m" / "model.safetensors")
        assert_same_function(load(tmp_path / "m"), theirs.base_model, None)
        save_file(held | {"bert.embeddings.LayerNorm.gamma": torch.ones(24)}, tmp_path / "m" / "model.safetensors")
        assert "two names of one tensor" in check_folder(tmp_path / "m", encoders=True)[0]


def test_missing_keys_mean_what_they_mean_to_transformers() -> None:
    for name in ENCODERS:
        values = {key: SMALL[key] for key in SMALL if key != "max_position_embeddings"}
        seen = transformers.AutoConfig.for_model(name, **values).to_dict()
        assert ENCODERS[name].read(values) == ENCODERS[name].read(seen), name


BAD_KEYS: list[tuple[str, dict[str, Any], list[str]]] = [
    ("bert", {"position_embedding_type": "relative_key", "is_decoder": True}, ["'relative_key'", "is_decoder = True"]),
    ("bert", {"add_cross_attention": True, "hidden_act": "relu"}, ["add_cross_attention", "hidden_act = 'relu'"]),
    ("bert", {"quantization_config": {"bits": 4}, "auto_map": {"AutoModel": "x.Y"}}, ["quantized", "never run"]),
    ("bert", {"vocab_size": None, "type_vocab_size": 0}, ["vocab_size is missing", "type_vocab_size = 0"]),
    ("bert", {"architectures": ["BertForSequenceClassification"]}, ["must name BertModel"]),
    ("bert", {"architectures": ["BertLMHeadModel"]}, ["must name BertModel"]),
    ("bert", {"num_attention_heads": 5}, ["not divisible by heads = 5"]),
    ("bert", {"hidden_dropout_prob": 1.0, "layer_norm_eps": 0}, ["hidden_dropout_prob", "layer_norm_eps"]),
    ("roberta", {"pad_token_id": 13}, ["max_position_embeddings = 14: the first position is 14"]),
    ("roberta", {"pad_token_id": -1}, ["pad_token_id = -1"]),
]


@pytest.mark.parametrize(("name", "change", "wanted"), BAD_KEYS)
def test_what_is_not_honoured_is_refused(name: str, change: dict[str, Any], wanted: list[str]) -> None:
    ENCODERS[name].read(SMALL)
    with pytest.raises(ModelFolderError) as caught:
        ENCODERS[name].read(SMALL | change)
    for text in wanted:
        assert text in str(caught.value)


CONFIG = EncoderConfig(vocabulary=97, hidden=36, layers=2, heads=12, feed_forward=28, max_positions=16)
DROPPED = dataclasses.replace(CONFIG, dropout=0.1, attention_dropout=0.2, first_position=2, token_types=3)


def test_an_encoder_is_no_decoder(tmp_path: Path) -> None:
    build = Build(mesh=Mesh.single())
    save_model(build_encoder(CONFIG, build), build.mesh, tmp_path / "m")
    assert check_folder(tmp_path / "m", encoders=True) == []
    for refused in (lambda: load_model(tmp_path / "m", build), lambda: read_config(tmp_path / "m")):
        with pytest.raises(ModelFolderError, match="'bert' is an encoder: it embeds texts"):
            refused()
    held = load_file(tmp_path / "m" / "model.safetensors")
    held["bert.encoder.layer.0.crossattention.self.query.weight"] = torch.zeros(36, 36)
    del held["bert.embeddings.LayerNorm.bias"]
    save_file(held, tmp_path / "m" / "model.safetensors")
    missing, unexpected = check_folder(tmp_path / "m", encoders=True)
    assert missing.startswith("bert.embeddings.LayerNorm.bias is missing (norm.bias)")
    assert "crossattention.self.query.weight is not a tensor of this bert model" in unexpected


def test_what_an_encoder_cannot_have_is_refused() -> None:
    class Other(PackedAttention):
        pass

    build = Build(mesh=Mesh.fake(Layout(pp=2, cp=2), 0), attention=Other, cuts=partition(2, 2)[:1])
    with pytest.raises(ConfigError) as caught:
        build_encoder(dataclasses.replace(CONFIG, token_types=0, dropout=1.0), build)
    assert [problem.split(":")[0] for problem in caught.value.problems] == [
        "token_types = 0",
        "dropout = 1.0",
        "layout.pp = 2",
        "layout.cp = 2",
        "Build.cuts",
        "Build.attention",
    ]
    with pytest.raises(ConfigError, match="tp = 5 does not divide the 12 heads; the nearest degree that works is 4"):
        build_encoder(CONFIG, Build(mesh=Mesh.fake(Layout(tp=5), 0)))
    with pytest.raises(ConfigError, match="first_position = 0, not 2"):
        ENCODERS["bert"].write(DROPPED)
    model = build_encoder(CONFIG, Build(mesh=Mesh.single()))
    with pytest.raises(DataError, match="position 16 is outside the 16"):
        model(Batch.pack([torch.ones(17, dtype=torch.int64)]))
    batch = Batch.pack([torch.ones(3, dtype=torch.int64)])
    with pytest.raises(DataError, match="token type 2 is outside the 2"):
        model(batch, torch.tensor([0, 2, 1]))


@pytest.mark.parametrize("shape", [(3, 5), (1, 1), (2, 70)])
def test_attention_equals_its_reference(shape: tuple[int, int]) -> None:
    heads, size = shape
    boundaries = (0, 3, 6, 7, 8, 39, 44)
    generator = torch.Generator().manual_seed(1)
    inputs = [torch.randn(44, heads, size, generator=generator, dtype=torch.float64) for _ in range(4)]
    results = []
    for function in (bidirectional_attention, bidirectional_attention_reference):
        q, k, v = (x.clone().requires_grad_() for x in inputs[:3])
        out = function(q, k, v, boundaries)
        results.append([out, *torch.autograd.grad((out * inputs[3]).sum(), (q, k, v))])
    for ours, reference in zip(*results, strict=True):
        assert relative(ours.detach(), reference.detach()) < 1e-13
    alone = torch.softmax(inputs[0][3:6, 0] @ inputs[1][3:6, 0].T * size**-0.5, -1) @ inputs[2][3:6, 0]
    assert relative(results[1][0][3:6, 0].detach(), alone) < 1e-13


def batch_of(config: EncoderConfig, mesh: Mesh) -> tuple[Batch, Tensor]:
    """The documents of this data-parallel rank, and the types of their tokens."""
    texts = documents(config.vocabulary)
    types = types_of(texts, config.token_types)
    mine = slice(None) if mesh.data.size == 1 else slice(2 * mesh.data.rank, 2 + 4 * mesh.data.rank)
    batch = Batch.pack(texts[mine], first_index=sum(LENGTHS[: mine.start or 0]), key=7)
    return batch, torch.cat(types[mine])


def step(config: EncoderConfig, mesh: Mesh, recompute: Recompute = "none") -> tuple[Encoder, Tensor]:
    """Hidden states, and complete gradients of a sum that weighs them all differently."""
    build = Build(mesh=mesh, dtype=torch.float64, seed=11, recompute=recompute)
    model = build_encoder(config, build, seed=2)
    batch, types_T = batch_of(config, mesh)
    assert batch.index_T is not None
    hidden = model(batch, types_T)
    weigh = torch.randn(sum(LENGTHS), config.hidden, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    (hidden * weigh[batch.index_T]).sum().backward()
    finalize_gradients(model, mesh)
    for parameter in model.parameters():
        assert parameter.grad is not None
        comm.sum_(parameter.grad, mesh.data)
    return model, hidden.detach()


def check_layouts(dropped: bool, layouts: list[dict[str, Any]]) -> None:
    config, alone = DROPPED if dropped else CONFIG, Mesh.single()
    single, reference = step(config, alone)
    for degrees in layouts:
        mesh = Mesh.build(Layout(**degrees))
        model, hidden = step(config, mesh)
        batch, types_T = batch_of(config, mesh)
        assert batch.index_T is not None
        assert_equal_to(hidden, reference[batch.index_T], f"{degrees}: hidden states")
        grads = joined_gradients(model, mesh)  # type: ignore[arg-type]
        for name, parameter in single.named_parameters():
            assert parameter.grad is not None
            assert_equal_to(grads[name], parameter.grad, f"{degrees}: gradient of {name}")
        wanted_R = torch.tensor([len(batch) - 1, 1])
        few = model.eval()(dataclasses.replace(batch, wanted_R=wanted_R), types_T)
        assert_equal_to(few, model(batch, types_T)[wanted_R], f"{degrees}: hidden states that are wanted")


@pytest.mark.parametrize("dropped", [False, True])
def test_every_layout_equals_one_device(ranks: Ranks, dropped: bool) -> None:
    two = [{"tp": 2}, {"tp": 2, "sequence_parallel": False}, {"dp": 2}]
    four = [{"tp": 4}, {"tp": 4, "sequence_parallel": False}, {"tp": 2, "dp": 2}]
    ranks.run(check_layouts, world=2, dropped=dropped, layouts=two)
    ranks.run(check_layouts, world=4, dropped=dropped, layouts=four)


def test_dropout_and_recomputing() -> None:
    mesh = Mesh.single()
    model, hidden = step(DROPPED, mesh)
    seen = [hidden]
    for recompute in ("selective", "full"):
        again, same = step(DROPPED, mesh, recompute)
        assert torch.equal(hidden, same)
        for a, b in zip(model.parameters(), again.parameters(), strict=True):
            assert a.grad is not None and b.grad is not None
            assert torch.equal(a.grad, b.grad), recompute
    for change in ({"dropout": 0.0}, {"attention_dropout": 0.0}, {"dropout": 0.0, "attention_dropout": 0.0}):
        seen.append(step(dataclasses.replace(DROPPED, **change), mesh)[1])
    batch, types_T = batch_of(DROPPED, mesh)
    seen.append(model(dataclasses.replace(batch, key=8), types_T).detach())
    assert len({float(x.sum()) for x in seen}) == 5
    assert relative(model.eval()(batch, types_T).detach(), seen[3]) < 1e-13


def test_dropout_stands_where_transformers_has_it() -> None:
    """Theirs draws our numbers, keyed by the place in the model."""
    theirs = oracle("bert")
    names = {"embeddings.dropout": "embedding"}
    for layer in range(SMALL["num_hidden_layers"]):
        names |= {
            f"encoder.layer.{layer}.attention.output.dropout": f"layers.{layer}.attention",
            f"encoder.layer.{layer}.output.dropout": f"layers.{layer}.mlp",
        }
    text = documents(97)[1]
    for place, name in names.items():
        draw = partial(dropout, drop=0.3, index_T=torch.arange(len(text)), draw=rng.key(11, 7, name))
        theirs.get_submodule(place).forward = lambda x, draw=draw: draw(x[0])[None]
    config = ENCODERS["bert"].read(SMALL | {"hidden_dropout_prob": 0.3, "attention_probs_dropout_prob": 0.0})
    ours = build_encoder(config, Build(mesh=Mesh.single(), dtype=torch.float64, seed=11))
    weights = {"bert." + name: parameter for name, parameter in theirs.named_parameters()}
    table = parts(config)
    ours.load_state_dict(
        {name: torch.cat([weights[part.name] for part in table[name]]) for name, _ in ours.named_parameters()}
    )
    found = ours(Batch.pack([text], key=7)).detach()
    assert relative(found, theirs(text[None]).last_hidden_state[0].detach()) < 1e-10
    assert relative(found, ours.eval()(Batch.pack([text])).detach()) > 0.1
