"""Every model family against transformers, in float64: logits, loss and every gradient; folders both ways."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from parallel.errors import ConfigError, ModelFolderError
from parallel.hf import load_model, read_config, save_model
from parallel.hf.table import parts
from parallel.mesh import Mesh
from parallel.models.batch import IGNORE, Batch
from parallel.models.build import Build
from parallel.models.config import DecoderConfig, RopeConfig
from parallel.models.decoder import Decoder, build_model
from parallel.models.families import FAMILIES

transformers = pytest.importorskip("transformers")

LENGTHS = (5, 11, 23)
"""Of the packed documents; ascending, because transformers' dynamic scaling remembers the longest text so far."""

SMALL: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 10,
    "max_position_embeddings": 16,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def rope(kind: str, theta: float = 10000.0, **values: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": kind, "rope_theta": theta, **values}}


YARN = {"factor": 3.3, "original_max_position_embeddings": 8}

CASES: dict[str, dict[str, Any]] = {
    "llama-1": SMALL | {"num_key_value_heads": 6, "head_dim": 8, "rms_norm_eps": 1e-5},
    "llama-biases-tied": SMALL | {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True},
    "llama-large-vocabulary": SMALL | {"vocab_size": 50257, "hidden_size": 12, "num_hidden_layers": 1, "head_dim": 4},
    "llama-gelu-one-kv": SMALL | {"hidden_act": "gelu", "num_key_value_heads": 1} | rope("default", 500.0),
    "llama-linear": SMALL | rope("linear", factor=3.0),
    "llama-dynamic": SMALL | {"max_position_embeddings": 8} | rope("dynamic", factor=1.7),
    "llama-3": SMALL
    | {"head_dim": 32}
    | rope("llama3", 50.0, factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=64),
    "llama-yarn": SMALL | {"head_dim": 16} | rope("yarn", 30.0, **YARN),
    "llama-yarn-options": SMALL
    | {"head_dim": 16}
    | rope("yarn", 10.0, **YARN, truncate=False, beta_fast=2.0, beta_slow=0.3, attention_factor=1.3),
    "llama-yarn-mscale": SMALL | rope("yarn", **YARN, mscale=0.7, mscale_all_dim=1.4),
    "mistral-window": SMALL | {"sliding_window": 4},
    "mistral-plain-tied": SMALL | {"sliding_window": None, "tie_word_embeddings": True},
    "qwen2-tied": {k: v for k, v in SMALL.items() if k != "head_dim"} | {"tie_word_embeddings": True},
    "qwen2-window": SMALL
    | {"num_hidden_layers": 3, "use_sliding_window": True, "sliding_window": 3, "max_window_layers": 1},
    "qwen2-layer-types": SMALL
    | {
        "num_hidden_layers": 3,
        "use_sliding_window": True,
        "sliding_window": 6,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
    },
    "qwen3": SMALL | {"head_dim": 16} | rope("default", 1e6),
    "qwen3-biases-window": SMALL
    | {"attention_bias": True, "use_sliding_window": True, "sliding_window": 5, "max_window_layers": 0},
    "gpt2": {"vocab_size": 97, "n_embd": 30, "n_layer": 2, "n_head": 5, "n_positions": 32},
    "gpt2-untied": {
        "vocab_size": 50257,
        "n_embd": 12,
        "n_inner": 20,
        "n_layer": 1,
        "n_head": 3,
        "n_positions": 23,
        "activation_function": "gelu",
        "tie_word_embeddings": False,
        "layer_norm_epsilon": 1e-3,
    },
}


def random_case(kind: str, seed: int) -> dict[str, Any]:
    """Any configuration that the family allows."""
    draw = random.Random(f"{kind} {seed}")
    heads = draw.choice([1, 2, 3, 4, 5, 6])
    size = 2 * draw.randint(1, 6)
    if kind == "gpt2":
        values = {"n_embd": heads * (size - 1), "n_head": heads, "n_inner": draw.choice([None, 17]), "n_positions": 29}
        return {"vocab_size": draw.randint(50, 120), "n_layer": draw.randint(1, 3), **values}
    values: dict[str, Any] = {
        "vocab_size": draw.randint(50, 120),
        "hidden_size": heads * draw.randint(3, 9),
        "intermediate_size": draw.randint(1, 60),
        "num_hidden_layers": draw.randint(1, 3),
        "num_attention_heads": heads,
        "num_key_value_heads": draw.choice([kv for kv in range(1, heads + 1) if heads % kv == 0]),
        "head_dim": size,
        "max_position_embeddings": draw.randint(6, 40),
        "rms_norm_eps": draw.choice([1e-6, 1e-3]),
        "tie_word_embeddings": draw.random() < 0.5,
        "hidden_act": draw.choice(["silu", "gelu", "gelu_pytorch_tanh"]),
        "attention_bias": draw.random() < 0.5,
        "mlp_bias": draw.random() < 0.5,
        "sliding_window": None if kind == "llama" else draw.randint(1, 30),
        "use_sliding_window": draw.random() < 0.7,
        "max_window_layers": draw.randint(0, 3),
    }
    if kind == "mistral":
        del values["use_sliding_window"]
    factor, original = draw.uniform(1, 9), draw.randint(4, 30)
    scalings = [
        rope("default", draw.uniform(5, 1e5)),
        rope("linear", draw.uniform(5, 1e5), factor=factor),
        rope("llama3", 20.0, factor=factor, low_freq_factor=1, high_freq_factor=3, original_max_position_embeddings=9),
        rope("yarn", draw.uniform(5, 1e5), factor=factor, original_max_position_embeddings=original),
    ]
    if size > 2:
        scalings.append(rope("dynamic", draw.uniform(5, 1e5), factor=factor))
    return values | draw.choice(scalings)


CASES |= {f"{kind}-random-{seed}": random_case(kind, seed) for kind in FAMILIES for seed in range(3)}


@pytest.fixture(autouse=True)
def one_thread() -> Any:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def widen(model: Any) -> Any:
    """The same model with norms in float64: transformers' RMSNorm goes to float32 and back whatever the model's type,
    which would limit every comparison to 1e-7."""

    def forward(self: Any, x: Tensor) -> Tensor:
        return self.weight * (x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.variance_epsilon))

    for module in model.modules():
        if type(module).__name__.endswith("RMSNorm"):
            module.forward = forward.__get__(module)
    return model.eval()


def oracle(case: str) -> Any:
    kind = case.split("-", maxsplit=1)[0]
    values = json.loads(json.dumps(CASES[case]))
    config = transformers.AutoConfig.for_model(kind, **values)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float64, attn_implementation="sdpa")
    generator = torch.Generator().manual_seed(len(case))
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.copy_(noise * 0.2 + (1.0 if parameter.ndim == 1 else 0.0))
    return widen(model)


def documents(vocabulary: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(7)
    return [torch.randint(vocabulary, (length,), generator=generator) for length in LENGTHS]


def packed(texts: list[Tensor]) -> Batch:
    return Batch.pack(texts, [torch.cat([text[1:], torch.tensor([IGNORE])]) for text in texts])


def relative(ours: Tensor, theirs: Tensor) -> float:
    return float((ours - theirs).abs().max() / theirs.abs().max().clamp_min(1e-30))


def assert_same_function(ours: Decoder, theirs: Any) -> None:
    texts = documents(ours.config.vocabulary)
    count = sum(LENGTHS) - len(LENGTHS)
    logits, loss = [], torch.zeros((), dtype=torch.float64)
    for text in texts:
        out = theirs(text[None])
        logits.append(out.logits[0])
        loss = loss + nn.functional.cross_entropy(out.logits[0, :-1], text[1:], reduction="sum") / count
    theirs.zero_grad()
    loss.backward()
    ours.eval()
    assert relative(ours(packed(texts)).detach(), torch.cat(logits).detach()) < 1e-10
    total = ours.loss(packed(texts), scale=1 / count).total
    total.backward()
    assert relative(total.detach(), loss.detach()) < 1e-10
    gradients = {name: parameter.grad for name, parameter in theirs.named_parameters()}
    table = parts(ours.config)
    for name, parameter in ours.named_parameters():
        wanted = torch.cat([gradients[p.name].t() if p.transposed else gradients[p.name] for p in table[name]])
        assert parameter.grad is not None
        assert relative(parameter.grad, wanted) < 1e-10, name
    assert {part.name for held in table.values() for part in held} == set(gradients)


def check_written(model: Decoder, theirs: Any, folder: Path) -> None:
    """Our folder is loaded by transformers and by us as the same function, and the configuration survives."""
    save_model(model, Mesh.single(), folder, max_file_bytes=20_000, bos=1, eos=[2, 3])
    assert len(list(folder.glob("*.safetensors"))) > 1
    again, info = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float64, attn_implementation="sdpa", output_loading_info=True
    )
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert again.generation_config.eos_token_id == [2, 3]
    widen(again)
    with torch.no_grad():
        for text in documents(model.config.vocabulary):
            assert relative(again(text[None]).logits, theirs(text[None]).logits) < 1e-13
    assert read_config(folder) == model.config
    loaded = load_model(folder, Build(mesh=Mesh.single(), dtype=torch.float64))
    for (name, a), b in zip(model.named_parameters(), loaded.parameters(), strict=True):
        assert torch.equal(a, b), name


@pytest.mark.parametrize("case", list(CASES))
def test_equal_to_transformers(case: str, tmp_path: Path) -> None:
    theirs = oracle(case)
    theirs.save_pretrained(tmp_path / "theirs", max_shard_size="20KB")
    assert (tmp_path / "theirs" / "model.safetensors.index.json").exists()
    ours = load_model(tmp_path / "theirs", Build(mesh=Mesh.single(), dtype=torch.float64))
    assert ours.config.family == case.split("-", maxsplit=1)[0]
    assert_same_function(ours, theirs)
    rotary = getattr(theirs.base_model, "rotary_emb", None)
    if rotary is not None and ours.config.rope.scaling == "dynamic":
        theirs.base_model.rotary_emb = type(rotary)(theirs.config)
    check_written(ours, theirs, tmp_path / "ours")


def described(case: str) -> dict[str, Any]:
    """A release-4 config.json of a case."""
    config: dict[str, Any] = {"model_type": case.split("-", maxsplit=1)[0]} | CASES[case]
    table: dict[str, Any] = dict(config.pop("rope_parameters", {}))
    if table:
        config["rope_theta"] = table.pop("rope_theta")
        table["type"] = table.pop("rope_type")
        config["rope_scaling"] = table if table["type"] != "default" else None
    return config


@pytest.mark.parametrize("case", list(CASES))
def test_both_releases_of_config_json(case: str, tmp_path: Path) -> None:
    old = described(case)
    family = FAMILIES[old["model_type"]]
    config = family.read(old)
    assert config == family.read({"model_type": old["model_type"]} | CASES[case])
    values = json.loads(json.dumps(CASES[case]))
    assert config == family.read(transformers.AutoConfig.for_model(old["model_type"], **values).to_dict())
    written = family.write(config)
    assert family.read(written) == config
    only_old = {key: value for key, value in written.items() if key != "rope_parameters"}
    only_new = {key: value for key, value in written.items() if key not in ("rope_theta", "rope_scaling")}
    assert family.read(only_old) == family.read(only_new) == config
    for number, style in enumerate((written, only_old, only_new)):
        folder = tmp_path / str(number)
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps(style))
        seen = transformers.AutoConfig.from_pretrained(folder)
        assert family.read(seen.to_dict()) == config


def test_missing_keys_mean_what_they_mean_to_transformers(tmp_path: Path) -> None:
    for name in FAMILIES:
        needed = ["vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"]
        values: dict[str, Any] = {key: SMALL[key] for key in needed} | {"num_attention_heads": 32, "hidden_size": 256}
        if name == "gpt2":
            values = {"vocab_size": 97, "n_embd": 30, "n_layer": 2, "n_head": 5}
        seen = transformers.AutoConfig.for_model(name, **values).to_dict()
        assert FAMILIES[name].read(values) == FAMILIES[name].read(seen), name


BAD_KEYS: list[tuple[str, dict[str, Any], list[str]]] = [
    ("llama", {"vocab_size": None, "hidden_act": "relu"}, ["vocab_size is missing", "hidden_act = 'relu'"]),
    ("llama", {"quantization_config": {"bits": 4}}, ["quantization_config", "quantized"]),
    ("llama", {"auto_map": {"AutoModel": "x.Y"}}, ["auto_map", "never run"]),
    ("llama", {"partial_rotary_factor": 0.5}, ["partial_rotary_factor = 0.5"]),
    ("llama", {"rope_scaling": {"type": "longrope", "factor": 2.0}}, ["'longrope': is not one of default"]),
    ("llama", {"rope_scaling": {"type": "linear"}}, ["factor is missing"]),
    ("llama", {"rope_scaling": {"type": "llama3", "factor": 8.0}}, ["low_freq_factor", "high_freq_factor"]),
    ("llama", {"rope_scaling": {"type": "linear", "factor": 2.0, "alpha": 3}}, ["alpha is not supported"]),
    (
        "llama",
        rope("linear", factor=2.0) | {"rope_scaling": {"type": "linear", "factor": 3.0}},
        ["contradict", "factor"],
    ),
    ("llama", {"hidden_size": "48"}, ["hidden_size = '48': must be a whole number"]),
    ("llama", {"num_hidden_layers": True}, ["num_hidden_layers = True"]),
    ("llama", {"rms_norm_eps": float("nan")}, ["rms_norm_eps"]),
    ("llama", {"num_key_value_heads": 4}, ["not divisible by kv_heads"]),
    ("llama", {"architectures": ["LlamaForSequenceClassification"]}, ["architectures", "LlamaForCausalLM"]),
    ("mistral", {"layer_types": ["full_attention"] * 2, "sliding_window": 4}, ["layer_types"]),
    ("qwen2", {"layer_types": ["sliding_attention"] * 2}, ["use_sliding_window"]),
    ("qwen2", {"layer_types": ["full_attention"] * 3}, ["3 layers"]),
    ("qwen3", {"layer_types": ["linear_attention"] * 2}, ["full_attention or sliding_attention"]),
    ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, ["scale_attn_by_inverse_layer_idx"]),
    ("gpt2", {"add_cross_attention": True, "scale_attn_weights": False}, ["add_cross", "scale_attn_weights"]),
    ("gpt2", {"n_head": 7}, ["not divisible by heads = 7"]),
]


@pytest.mark.parametrize(("name", "change", "wanted"), BAD_KEYS)
def test_what_is_not_honoured_is_refused(name: str, change: dict[str, Any], wanted: list[str]) -> None:
    values = CASES["gpt2"] if name == "gpt2" else SMALL
    FAMILIES[name].read(values)
    with pytest.raises(ModelFolderError) as caught:
        FAMILIES[name].read(values | change)
    for text in wanted:
        assert text in str(caught.value)


MISFITS: list[tuple[str, dict[str, Any], str]] = [
    ("llama", {"qk_norm": True}, "no qk_norm"),
    ("llama", {"qkv_bias": True}, "set both or neither"),
    ("llama", {"window": 4}, "no sliding window"),
    ("llama", {"positions": "learned"}, "rotary"),
    ("llama", {"rope": RopeConfig(scaling="dynamic", factor=2.0, original=7)}, "max_positions"),
    ("mistral", {"window": 4, "window_layers": (1,)}, "every layer"),
    ("mistral", {"mlp_bias": True}, "no biases"),
    ("qwen2", {}, "set qkv_bias"),
    ("qwen3", {}, "set qk_norm"),
    ("gpt2", {}, "positions = 'learned', not 'rotary'"),
]


@pytest.mark.parametrize(("name", "change", "wanted"), MISFITS)
def test_what_a_family_cannot_express_is_refused(name: str, change: dict[str, Any], wanted: str) -> None:
    config = DecoderConfig(family=name, vocabulary=97, hidden=32, heads=4, **change)
    assert any(wanted in problem for problem in FAMILIES[name].problems(config))
    with pytest.raises(ConfigError, match=wanted.replace("(", r"\(")):
        FAMILIES[name].write(config)


@pytest.mark.parametrize("name", list(FAMILIES))
def test_every_parameter_has_a_place(name: str) -> None:
    """The contract of a family: a built model's parameters and the family's names are the same set."""
    case = next(case for case in CASES if case.split("-", maxsplit=1)[0] == name)
    for tied in (False, True):
        config = FAMILIES[name].read(CASES[case] | {"tie_word_embeddings": tied})
        model = build_model(config, Build(mesh=Mesh.single()))
        assert set(FAMILIES[name].stored(config)) == {parameter for parameter, _ in model.named_parameters()}
