"""Checkpoints of DeepSpeed: put together from what its data ranks wrote, and refused where that cannot be."""

from __future__ import annotations

import enum
import importlib.util
import os
import subprocess
import sys
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from test_hf import CONFIGS
from test_import import Bomb
from test_import_names import folder_of, imported, same
from torch import Tensor

from parallel.errors import CheckpointError
from zero.foreign import open_foreign
from zero.foreign.names import match

ROOT = Path(__file__).parent.parent


class ZeroStage(enum.Enum):
    """As DeepSpeed writes the stage: an object of a class that need not be known."""

    TWO = 2
    THREE = 3


def shares(group: Sequence[Tensor], stage: int, ranks: int, padding: int) -> list[Tensor]:
    """The vectors of a group of parameters on each rank, as DeepSpeed cuts them."""
    flat = [tensor.reshape(-1) for tensor in group]
    if stage == 3:
        return [torch.cat([cut_evenly(values, ranks)[rank] for values in flat]) for rank in range(ranks)]
    whole = torch.cat([torch.nn.functional.pad(values, (0, padding)) for values in flat])
    length = -(-len(whole) // (2 * ranks)) * 2
    return [whole[rank * length : (rank + 1) * length].clone() for rank in range(ranks)]


def cut_evenly(values: Tensor, ranks: int) -> Tensor:
    """(ranks, share); what is too much is not zero, so that it would be seen."""
    share = -(-values.numel() // ranks)
    return torch.nn.functional.pad(values.reshape(-1), (0, share * ranks - values.numel()), value=9.0).view(ranks, -1)


def optimizer_state(vectors: list[Tensor], stage: int, ranks: int, paddings: list[list[int]]) -> dict[str, Any]:
    """Moments are twice and thrice the weights."""
    moments = {
        index: {"step": torch.tensor(7.0), "exp_avg": 2 * vector, "exp_avg_sq": 3 * vector}
        for index, vector in enumerate(vectors)
    }
    if stage == 3:
        for index, vector in enumerate(vectors):
            vector.ds_id = str(index)  # DeepSpeed marks them, and torch then writes them in another way
        state = {"fp32_flat_groups": vectors, "optimizer_state_dict": {"state": moments}, "partition_count": ranks}
    else:
        state = {"single_partition_of_fp32_groups": vectors, "base_optimizer_state": {"state": moments}}
        state |= {"partition_count": [ranks] * len(vectors), "param_alignment_paddings": paddings}
    return {"optimizer_state_dict": {"zero_stage": ZeroStage(stage), **state}}


def deepspeed_folder(
    folder: Path, tensors: Mapping[str, Tensor], stage: int, ranks: int, frozen: str = "", padding: int = 0, **more: Any
) -> Path:
    """A folder as DeepSpeed writes it: matrices are one group, the rest another."""
    tag = folder / "global_step7"
    tag.mkdir(parents=True)
    (folder / "latest").write_text("global_step7\n")
    groups: list[list[str]] = [[], []]
    for name, tensor in tensors.items():
        if name != frozen:
            groups[tensor.ndim < 2].append(name)
    shapes = [OrderedDict((name, tensors[name].shape) for name in group) for group in groups]
    vectors = [shares([tensors[name] for name in group], stage, ranks, padding) for group in groups]
    paddings = [[padding] * len(group) for group in groups]
    for rank in range(ranks):
        state = optimizer_state([of_group[rank] for of_group in vectors], stage, ranks, paddings)
        torch.save(state, tag / f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt")
    module = {name: tensor if name == frozen else tensor.bfloat16() for name, tensor in tensors.items()}
    common = {"param_shapes": shapes, "buffer_names": [], "shared_params": {}, "ds_version": "0.19", **more}
    if stage < 3:
        torch.save({**common, "module": module}, tag / "mp_rank_00_model_states.pt")
    for rank in range(ranks) if stage == 3 else ():
        own = {**common, "module": {name: torch.zeros(0) for name in tensors}}
        if frozen:
            own["frozen_param_shapes"] = OrderedDict({frozen: tensors[frozen].shape})
            own["frozen_param_fragments"] = OrderedDict({frozen: cut_evenly(tensors[frozen], ranks)[rank].clone()})
        torch.save(own, tag / f"zero_pp_rank_{rank}_mp_rank_00_model_states.pt")
    return folder


@pytest.mark.parametrize("stage", [2, 3])
@pytest.mark.parametrize("ranks", [1, 2, 3])
@pytest.mark.parametrize("frozen", ["", "model.embed_tokens.weight"])
def test_weights_and_moments_of_deepspeed(tmp_path: Path, stage: int, ranks: int, frozen: str) -> None:
    config, tensors = folder_of("llama", tmp_path / "hf")
    folder = deepspeed_folder(tmp_path / "ds", tensors, stage, ranks, frozen)
    source = open_foreign(folder)
    assert source.states == ("exp_avg", "exp_avg_sq")
    for name, tensor in tensors.items():
        assert torch.equal(source.read(name), tensor), name
        for what, factor in (("exp_avg", 2), ("exp_avg_sq", 3)) if name != frozen else ():
            assert torch.equal(source.read(name, what), factor * tensor), name
    if frozen:
        with pytest.raises(CheckpointError, match=r"has no model\.embed_tokens\.weight\|exp_avg"):
            source.read(frozen, "exp_avg")
    named = match(source, CONFIGS["llama"].resolved())
    fused = torch.cat([tensors[f"model.layers.0.self_attn.{which}_proj.weight"] for which in "qkv"])
    assert torch.equal(named.whole("layers.0.attention.qkv.weight", "exp_avg"), 2 * fused)
    same(imported(folder / "global_step7", config, tmp_path / "out"), tensors)


def test_no_bomb_goes_off(tmp_path: Path) -> None:
    config, tensors = folder_of("llama", tmp_path / "hf")
    bomb = Bomb(tmp_path / "canary")
    folder = deepspeed_folder(tmp_path / "ds", tensors, 3, 2, lr_scheduler=bomb, ds_config={"x": bomb})
    same(imported(folder, config, tmp_path / "out"), tensors)
    folder = deepspeed_folder(tmp_path / "no", tensors, 3, 2, shared_params={"x": bomb})
    with pytest.raises(CheckpointError, match=r"'x' is '\w+\.exec\(\.\.\.\)', which is not there"):
        open_foreign(folder)
    assert not (tmp_path / "canary").exists()


@pytest.mark.parametrize("ranks", [1, 2, 3])
@pytest.mark.parametrize("stage", [2, 3])
def test_a_vector_of_the_length_of_a_parameter_is_not_that_parameter(tmp_path: Path, stage: int, ranks: int) -> None:
    torch.manual_seed(0)
    tensors = {"a.weight": torch.randn(7, 5), "a.bias": torch.randn(7), "norm": torch.randn(5)}  # at 3, 4 + 3 values
    source = open_foreign(deepspeed_folder(tmp_path / "ds", tensors, stage, ranks))
    assert all(torch.equal(source.read(name), tensor) for name, tensor in tensors.items())
    assert all(torch.equal(source.read(name, "exp_avg"), 2 * tensor) for name, tensor in tensors.items())


def test_paddings_between_parameters(tmp_path: Path) -> None:
    _, tensors = folder_of("llama", tmp_path / "hf")
    source = open_foreign(deepspeed_folder(tmp_path / "ds", tensors, 2, 2, padding=3))
    assert all(torch.equal(source.read(name), tensor) for name, tensor in tensors.items())


def test_without_zero_the_model_file_has_all(tmp_path: Path) -> None:
    config, tensors = folder_of("llama", tmp_path / "hf")
    module = {f"module.{name}": tensor for name, tensor in tensors.items()}
    torch.save(
        {"module": module, "optimizer": {"state": {}}, "param_shapes": None}, tmp_path / "mp_rank_00_model_states.pt"
    )
    same(imported(tmp_path, config, tmp_path / "out"), tensors)


@pytest.mark.parametrize(
    ("spoil", "problem"),
    [
        (lambda tag: (tag / "zero_pp_rank_1_mp_rank_00_optim_states.pt").unlink(), "data rank 1 is missing|of 3 ranks"),
        (lambda tag: (tag / "zero_pp_rank_2_mp_rank_00_optim_states.pt").unlink(), "2 .*_optim_states.pt, of"),
        (lambda tag: (tag / "mp_rank_00_model_states.pt").unlink(), "has no .*_model_states.pt"),
        (
            lambda tag: (tag / "mp_rank_01_model_states.pt").write_bytes(b""),
            "tensor-parallel ranks are not put together",
        ),
        (lambda tag: (tag / "layer_00-model_00-model_states.pt").write_bytes(b""), "pipeline stages and experts"),
        (lambda tag: (tag.parent / "latest").write_text("../elsewhere"), "latest names '../elsewhere'"),
        (lambda tag: (tag.parent / "latest").write_text("global_step8"), "latest names 'global_step8'"),
    ],
)
def test_what_deepspeed_lacks_is_said(tmp_path: Path, spoil: Callable[[Path], Any], problem: str) -> None:
    _, tensors = folder_of("llama", tmp_path / "hf")
    folder = deepspeed_folder(tmp_path / "ds", tensors, 2, 3)
    spoil(folder / "global_step7")
    with pytest.raises(CheckpointError, match=problem):
        open_foreign(folder)


@pytest.mark.parametrize("stage", [2, 3])
def test_shapes_that_are_not_those_of_the_vectors_are_refused(tmp_path: Path, stage: int) -> None:
    _, tensors = folder_of("llama", tmp_path / "hf")
    folder = deepspeed_folder(tmp_path / "ds", tensors, stage, 2)
    larger = {**tensors, "model.norm.weight": torch.zeros(77)}
    other = deepspeed_folder(tmp_path / "other", larger, stage, 2)
    for path in (other / "global_step7").glob("*model_states.pt"):
        path.replace(folder / "global_step7" / path.name)
    with pytest.raises(CheckpointError, match=r"values, (its|the) parameters need"):
        open_foreign(folder)


@pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="DeepSpeed is not installed")
@pytest.mark.parametrize("case", ["0", "1", "2", "3", "1:bf16", "2:bf16", "3:bf16", "3:frozen", "2:frozen"])
def test_real_folders_of_deepspeed(tmp_path: Path, case: str) -> None:
    """Weights and moments are those that DeepSpeed's own functions gather in the process that saved."""
    environment = {**os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), *sys.path[1:]])
    words = ["-m", "torch.distributed.run", "--nproc-per-node", "2", str(ROOT / "tests/deepspeed_saver.py")]
    done = subprocess.run(
        [sys.executable, *words, str(tmp_path), case], env=environment, capture_output=True, text=True, timeout=900
    )
    assert done.returncode == 0, done.stdout + done.stderr
    expected = load_file(tmp_path / "expected.safetensors")
    source = open_foreign(tmp_path / "ds")
    assert {key.partition("|")[0] for key in expected} == source.entries.keys()
    assert len(expected) > len(source.entries) or case == "0"
    for key, tensor in expected.items():
        assert torch.equal(source.read(*key.split("|")), tensor), key
