"""Checkpoints of torch.distributed.checkpoint: read whole whatever ranks wrote them, and refused where they lie."""

from __future__ import annotations

import pickle
import random
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from ranks import Ranks
from safetensors.torch import load_file
from test_import import Bomb
from test_import_names import folder_of, imported, same
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from parallel.errors import CheckpointError
from zero.foreign import open_foreign


class Bag(nn.Module):
    """Modules and parameters with given names."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        super().__init__()
        inner: dict[str, dict[str, Tensor]] = {}
        for name, tensor in tensors.items():
            first, _, rest = name.partition(".")
            if rest:
                inner.setdefault(first, {})[rest] = tensor
            else:
                self.register_parameter(name, nn.Parameter(tensor.clone()))
        for first, held in inner.items():
            self.add_module(first, Bag(held))


def save_sharded(folder: str, hf: str, how: str) -> int:
    """On the ranks: an FSDP2 model and what its optimizer has, with torch's distributed checkpoint."""
    tensors = load_file(Path(hf) / "model.safetensors")
    bag = Bag(tensors)
    world = torch.distributed.get_world_size()
    flat = how == "1d"
    mesh = (
        init_device_mesh("cpu", (world,))
        if flat
        else init_device_mesh("cpu", (2, world // 2), mesh_dim_names=("replica", "shard"))
    )
    fully_shard(bag, mesh=mesh)
    optimizer = torch.optim.AdamW(bag.parameters(), lr=0.0, weight_decay=0.0)
    for parameter in bag.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    state = {"model": bag.state_dict(), "optim": optimizer.state_dict(), "step": 3}
    dcp.save(state, checkpoint_id=folder)
    return len(tensors)


@pytest.mark.parametrize(("world", "how"), [(2, "1d"), (4, "2d")])
def test_what_fsdp2_ranks_saved(ranks: Ranks, tmp_path: Path, world: int, how: str) -> None:
    config, tensors = folder_of("qwen3", tmp_path / "hf")
    folder = tmp_path / "dcp"
    ranks.run(save_sharded, world=world, folder=str(folder), hf=str(config), how=how)
    files = {path.name for path in folder.iterdir()}
    assert len(files) > 2 and ".metadata" in files
    source = open_foreign(folder)
    assert max(len(chunks) for chunks in source._chunks.values()) == 2
    assert {name.partition(".")[0] for name in source.entries} == {"model", "optim"}
    same(imported(folder, config, tmp_path / "out"), tensors)
    (folder / "__0_0.distcp").rename(folder / "elsewhere")
    with pytest.raises(CheckpointError, match=r"__0_0\.distcp: missing"):
        open_foreign(folder)


def saved_alone(folder: Path, tensors: Mapping[str, Tensor], **more: Any) -> Path:
    """A checkpoint of one process."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.save({"model": dict(tensors), **more}, checkpoint_id=folder)
    return folder


@pytest.mark.parametrize("where", ["a value", "the metadata", "a chunk"])
def test_no_bomb_goes_off(tmp_path: Path, where: str) -> None:
    config, tensors = folder_of("llama", tmp_path / "hf")
    source, bomb = tmp_path / "dcp", Bomb(tmp_path / "canary")
    saved_alone(source, tensors, **({"state": bomb} if where == "a value" else {}))
    if where == "a value":
        same(imported(source, config, tmp_path / "out"), tensors)
    else:
        if where == "the metadata":
            (source / ".metadata").write_bytes(pickle.dumps({"state_dict_metadata": bomb}))
        else:
            torch.save(bomb, tmp_path / "bomb.pt")
            file = source / "__0_0.distcp"
            file.write_bytes(((tmp_path / "bomb.pt").read_bytes() + file.read_bytes())[: file.stat().st_size])
        with pytest.raises(CheckpointError):
            imported(source, config, tmp_path / "out")
    assert not (tmp_path / "canary").exists()


def test_spoiled_distributed_checkpoints_are_refused_by_name(tmp_path: Path) -> None:
    tensors = {"a": torch.randn(4, 3), "b": torch.arange(5.0)}
    folder = saved_alone(tmp_path / "dcp", tensors, step=3)
    generator = random.Random(3)
    for name in (".metadata", "__0_0.distcp"):
        whole = (folder / name).read_bytes()
        for _ in range(150):
            data = bytearray(whole)
            if generator.random() < 0.2:
                del data[generator.randrange(len(data)) :]
            else:
                data[generator.randrange(len(data))] ^= 1 << generator.randrange(8)
            (folder / name).write_bytes(data)
            try:
                source = open_foreign(folder)
                for entry in source.entries:
                    found = source.read(entry)
                    assert name == ".metadata" or torch.equal(found, tensors[entry.removeprefix("model.")])
            except CheckpointError as error:
                assert str(tmp_path) in str(error)
        (folder / name).write_bytes(whole)
    assert torch.equal(open_foreign(folder).read("model.a"), tensors["a"])
