"""Foreign state dictionaries become Hugging Face folders, bit for bit; every tensor is accounted for."""

from __future__ import annotations

import json
from collections import OrderedDict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from test_hf import CONFIGS, wholes, write
from test_import import Bomb
from torch import Tensor

from launch.foreign import main as import_
from parallel.errors import CheckpointError, ConfigError, ModelFolderError
from parallel.hf import load_model
from parallel.mesh import Mesh
from parallel.models.build import Build


def folder_of(name: str, path: Path) -> tuple[Path, dict[str, Tensor]]:
    """A Hugging Face folder of a configuration, and its tensors."""
    write(CONFIGS[name], path)
    return path, load_file(path / "model.safetensors")


def imported(source: Path, config: Path, target: Path, *flags: str) -> dict[str, Tensor]:
    """What the program writes; the folder is one that models are loaded from."""
    assert import_([str(source), str(target), "--config", str(config), *flags]) == 0
    load_model(target, Build(mesh=Mesh.single()))
    return load_file(target / "model.safetensors")


def same(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name


PREFIXES: dict[str, Callable[[dict[str, Tensor]], Any]] = {
    "as they are": lambda tensors: tensors,
    "DDP": lambda tensors: {f"module.{name}": tensor for name, tensor in tensors.items()},
    "compiled": lambda tensors: {f"_orig_mod.{name}": tensor for name, tensor in tensors.items()},
    "wrapped inside": lambda tensors: {
        "module." + name.replace("mlp.", "_checkpoint_wrapped_module._orig_mod.mlp."): tensor
        for name, tensor in tensors.items()
    },
    "beside an optimizer": lambda tensors: {
        "model": OrderedDict(tensors),
        "optimizer": {"state": {0: {"exp_avg": torch.zeros(3), "step": 1}}, "param_groups": [{"lr": 0.1}]},
        "epoch": 3,
    },
    "an optimizer among them": lambda tensors: {**tensors, "optimizer": {"state": {0: {"exp_avg": torch.zeros(3)}}}},
    "harmless tensors": lambda tensors: {**tensors, "model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(4)},
}


@pytest.mark.parametrize("how", PREFIXES)
def test_names_are_found_behind_what_stands_before_them(tmp_path: Path, how: str) -> None:
    config, tensors = folder_of("llama", tmp_path / "hf")
    torch.save(PREFIXES[how](tensors), tmp_path / "x.pt")
    same(imported(tmp_path / "x.pt", config, tmp_path / "out"), tensors)


@pytest.mark.parametrize("name", CONFIGS)
def test_every_family_and_our_own_names(tmp_path: Path, name: str) -> None:
    config, tensors = folder_of(name, tmp_path / "hf")
    (tmp_path / "bin").mkdir()
    names = [*tensors]
    parts = {"pytorch_model-00001-of-00002.bin": names[::2], "pytorch_model-00002-of-00002.bin": names[1::2]}
    for file, held in parts.items():
        torch.save({name: tensors[name] for name in held}, tmp_path / "bin" / file)
    index = {"weight_map": {name: file for file, held in parts.items() for name in held}}
    (tmp_path / "bin/pytorch_model.bin.index.json").write_text(json.dumps(index))
    same(imported(tmp_path / "bin", config, tmp_path / "one"), tensors)
    torch.save({"state_dict": wholes(CONFIGS[name])}, tmp_path / "ours.ckpt")
    same(imported(tmp_path / "ours.ckpt", config, tmp_path / "two"), tensors)
    bare = {name.removeprefix("model.").removeprefix("transformer."): tensor for name, tensor in tensors.items()}
    torch.save(bare, tmp_path / "bare.pth")
    same(imported(tmp_path / "bare.pth", config, tmp_path / "three"), tensors)


def test_the_type_is_the_widest_or_the_one_asked_for(tmp_path: Path) -> None:
    config, tensors = folder_of("llama", tmp_path / "hf")
    torch.save({name: tensor.bfloat16() for name, tensor in tensors.items()}, tmp_path / "x.pt")
    found = imported(tmp_path / "x.pt", config, tmp_path / "bf16")
    assert {tensor.dtype for tensor in found.values()} == {torch.bfloat16}
    same(found, {name: tensor.bfloat16() for name, tensor in tensors.items()})
    torch.save({name: t.bfloat16() if "norm" in name else t for name, t in tensors.items()}, tmp_path / "y.pt")
    assert {t.dtype for t in imported(tmp_path / "y.pt", config, tmp_path / "mixed").values()} == {torch.float32}
    found = imported(tmp_path / "x.pt", config, tmp_path / "fp64", "--precision", "fp64")
    assert {tensor.dtype for tensor in found.values()} == {torch.float64}


def test_everything_that_does_not_fit_is_said_at_once(tmp_path: Path) -> None:
    config, tensors = folder_of("llama", tmp_path / "hf")
    spoiled: dict[str, Any] = {f"module.{name}": tensor for name, tensor in tensors.items()}
    del spoiled["module.model.norm.weight"]
    spoiled["module.model.layers.1.mlp.down_proj.weight"] = torch.zeros(3, 4)
    spoiled["module.model.layers.0.mlp.up_proj.weight"] = torch.zeros(24, 32, dtype=torch.int64)
    spoiled["module.model.layers.0.mlp.up_proj.weigth"] = torch.zeros(1)
    spoiled["module.model.embed_tokens.weight"] = "none"
    torch.save(spoiled, tmp_path / "x.pt")
    with pytest.raises(CheckpointError) as caught:
        import_([str(tmp_path / "x.pt"), str(tmp_path / "out"), "--config", str(config)])
    text = str(caught.value)
    for part in (
        "module.model.norm.weight is missing (norm.weight)",
        "module.model.layers.1.mlp.down_proj.weight has shape [3, 4]; by config.json it is [32, 24]",
        "module.model.layers.0.mlp.up_proj.weight has type torch.int64",
        "up_proj.weigth is not a tensor of this llama model (did you mean 'model.layers.0.mlp.up_proj.weight'?)",
        "module.model.embed_tokens.weight is there, but is no tensor that can be read",
    ):
        assert part in text, text
    assert not (tmp_path / "out").exists()


def test_two_models_in_one_file_are_told_apart_by_their_prefix(tmp_path: Path) -> None:
    config, tensors = folder_of("llama", tmp_path / "hf")
    torch.save({"model": tensors, "ema": {name: tensor + 1 for name, tensor in tensors.items()}}, tmp_path / "x.pt")
    with pytest.raises(CheckpointError, match=r"'ema\.', 'model\.': say which with --prefix"):
        import_([str(tmp_path / "x.pt"), str(tmp_path / "out"), "--config", str(config)])
    found = imported(tmp_path / "x.pt", config, tmp_path / "out", "--prefix", "ema")
    same(found, {name: tensor + 1 for name, tensor in tensors.items()})
    with pytest.raises(CheckpointError, match=r"no name behind 'emma\.' is one of this model"):
        import_([str(tmp_path / "x.pt"), str(tmp_path / "y"), "--config", str(config), "--prefix", "emma"])


def test_a_tied_head_must_be_the_embedding(tmp_path: Path) -> None:
    config, tensors = folder_of("tied", tmp_path / "hf")
    head = tensors["model.embed_tokens.weight"]
    torch.save({**tensors, "lm_head.weight": head}, tmp_path / "x.pt")
    same(imported(tmp_path / "x.pt", config, tmp_path / "out"), tensors)
    torch.save({**tensors, "lm_head.weight": head + 1e-3}, tmp_path / "y.pt")
    with pytest.raises(CheckpointError, match=r"although config\.json ties them"):
        import_([str(tmp_path / "y.pt"), str(tmp_path / "z"), "--config", str(config)])


def test_wrong_input_is_refused(tmp_path: Path) -> None:
    config, _ = folder_of("llama", tmp_path / "hf")
    with pytest.raises(ConfigError) as caught:
        import_([str(tmp_path), "--precison", "fp32"])
    assert all(part in str(caught.value) for part in ("CHECKPOINT MODEL_DIR", "--config FOLDER", "'precision'"))
    with pytest.raises(ModelFolderError, match=r"config\.json"):
        import_([str(tmp_path), "x", "--config", str(tmp_path)])
    with pytest.raises(CheckpointError, match="no checkpoint of others"):
        import_([str(tmp_path / "nothing"), "x", "--config", str(config)])


def test_no_bomb_goes_off(tmp_path: Path) -> None:
    config, tensors = folder_of("llama", tmp_path / "hf")
    bomb = Bomb(tmp_path / "canary")
    torch.save({"model": tensors, "optimizer": bomb, "more": [bomb, {bomb: 1}]}, tmp_path / "x.pt")
    same(imported(tmp_path / "x.pt", config, tmp_path / "out"), tensors)
    torch.save({**tensors, "model.norm.weight": OrderedDict(x=bomb)}, tmp_path / "y.pt")
    with pytest.raises(CheckpointError, match=r"model\.norm\.weight is missing"):
        imported(tmp_path / "y.pt", config, tmp_path / "no")
    torch.save(bomb, tmp_path / "z.pt")
    with pytest.raises(CheckpointError, match=r"z\.pt: holds '\w+\.exec\(\.\.\.\)', not a dictionary"):
        imported(tmp_path / "z.pt", config, tmp_path / "no")
    assert not (tmp_path / "canary").exists() and not (tmp_path / "no").exists()
