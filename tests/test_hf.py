"""Hugging Face folders: pieces read and written by ranks, and every kind of bad folder."""

from __future__ import annotations

import json
import os
import resource
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import Ranks
from safetensors.torch import load_file, save_file
from torch import Tensor

from parallel.errors import ConfigError, ModelFolderError, RankError, ShardError
from parallel.hf import check_folder, load_model, read_config, save_model, write_folder
from parallel.hf.folder import inspect
from parallel.hf.load import FolderReader
from parallel.hf.stream import write_file
from parallel.hf.table import whole_shards
from parallel.mesh import Layout, Mesh
from parallel.models.build import Build
from parallel.models.config import DecoderConfig
from parallel.models.decoder import build_model
from parallel.models.families import FAMILIES
from parallel.shard import Box, param_shards

LLAMA = DecoderConfig(family="llama", vocabulary=97, hidden=32, layers=2, heads=4, kv_heads=2, feed_forward=24)
TIED = replace(LLAMA, tied=True)
QWEN3 = replace(LLAMA, family="qwen3", qk_norm=True, qkv_bias=True, out_bias=True, head_size=6)
GPT2 = DecoderConfig(
    family="gpt2",
    vocabulary=97,
    hidden=32,
    layers=2,
    heads=4,
    feed_forward=40,
    activation="gelu_tanh",
    gated=False,
    norm="layer",
    qkv_bias=True,
    out_bias=True,
    mlp_bias=True,
    positions="learned",
    max_positions=16,
    tied=True,
)
CONFIGS = {"llama": LLAMA, "tied": TIED, "qwen3": QWEN3, "gpt2": GPT2}


def value_of(name: str, shape: tuple[int, ...]) -> Tensor:
    generator = torch.Generator().manual_seed(len(name) * 7919 + sum(map(ord, name)))
    return torch.randn(shape, generator=generator)


def wholes(config: DecoderConfig) -> dict[str, Tensor]:
    """Every parameter of a model, whole, all values different."""
    shards = param_shards(build_model(config, Build(mesh=Mesh.single())))
    return {name: value_of(name, shard.shape) for name, shard in shards.items()}


def write(config: DecoderConfig, folder: Path, dtype: torch.dtype = torch.float32, **options: Any) -> Path:
    values = wholes(config)
    write_folder(config, values.__getitem__, folder, dtype=dtype, **options)
    return folder


@pytest.mark.parametrize("name", list(CONFIGS))
@pytest.mark.parametrize("tp", [1, 2, 4])
def test_each_rank_gets_its_cut(name: str, tp: int, tmp_path: Path) -> None:
    config, values = CONFIGS[name], wholes(CONFIGS[name])
    write(config, tmp_path / "m", max_file_bytes=9000)
    assert read_config(tmp_path / "m") == config.resolved()
    for rank in range(tp):
        mesh = Mesh.fake(Layout(tp=tp), rank)
        model = load_model(tmp_path / "m", Build(mesh=mesh))
        for parameter, shard in param_shards(model).items():
            assert torch.equal(model.get_parameter(parameter), shard.cut(values[parameter], mesh.place)), parameter


def test_gpt2_is_stored_transposed_and_fused(tmp_path: Path) -> None:
    stored, values = load_file(write(GPT2, tmp_path / "m") / "model.safetensors"), wholes(GPT2)
    assert torch.equal(stored["transformer.h.1.attn.c_attn.weight"], values["layers.1.attention.qkv.weight"].t())
    assert torch.equal(stored["transformer.h.1.attn.c_attn.bias"], values["layers.1.attention.qkv.bias"])
    assert "lm_head.weight" not in stored


def test_a_rank_reads_only_its_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("llama", "gpt2"):
        folder = write(CONFIGS[name], tmp_path / name)
        counted = 0
        plain = FolderReader.read

        def read(self: FolderReader, name: str, box: Box, plain: Callable[..., Tensor] = plain) -> Tensor:
            nonlocal counted
            found = plain(self, name, box)
            counted += found.numel()
            return found

        monkeypatch.setattr(FolderReader, "read", read)
        mesh = Mesh.fake(Layout(tp=4), 1)
        model = load_model(folder, Build(mesh=mesh))
        monkeypatch.undo()
        wanted = 0
        for shard in param_shards(model).values():
            wanted += sum(
                torch.empty(shard.shape, device="meta")[piece.full].numel() for piece in shard.pieces(mesh.place)
            )
        assert counted == wanted


@contextmanager
def memory_limit(more: int) -> Iterator[None]:
    """At most ``more`` bytes beyond what this process has now; files that are mapped already do not count."""
    lines = Path("/proc/self/status").read_text().splitlines()
    used = int(next(line for line in lines if line.startswith("VmData")).split()[1]) * 1024
    before = resource.getrlimit(resource.RLIMIT_DATA)
    resource.setrlimit(resource.RLIMIT_DATA, (used + more, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, before)


LARGE = replace(GPT2, vocabulary=8, hidden=1024, heads=4, feed_forward=16384, layers=1)


@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc")
def test_a_cut_tensor_is_never_whole_in_memory(tmp_path: Path) -> None:
    """Rows, columns and transposed ones of 64 MB tensors, in a process that has no room for one of them."""
    shards = whole_shards(LARGE)
    write_folder(LARGE, lambda name: torch.zeros(shards[name].shape), tmp_path / "m", dtype=torch.float32)
    program = "import sys; from pathlib import Path; from test_hf import read_cut; read_cut(Path(sys.argv[1]))"
    subprocess.run([sys.executable, "-c", program, str(tmp_path / "m")], check=True, cwd=Path(__file__).parent)


def read_cut(folder: Path) -> None:
    """In a process of its own: one that had more memory before may find room for what a system does not give."""
    shards = whole_shards(LARGE)
    with FolderReader(inspect(folder)) as reader:
        reader.read("norm.weight", (slice(0, 1),))
        with memory_limit(24 << 20):
            for name in ("layers.0.mlp.up.weight", "layers.0.mlp.down.weight"):
                rows, columns = shards[name].shape
                for box in ((slice(0, 64), slice(0, columns)), (slice(0, rows), slice(0, 64))):
                    assert reader.read(name, box).clone().shape == (box[0].stop, box[1].stop)
            with pytest.raises(RuntimeError, match="memory"):
                torch.empty(64 << 20, dtype=torch.uint8)


def test_types_are_converted(tmp_path: Path) -> None:
    folder = write(LLAMA, tmp_path / "m", dtype=torch.bfloat16)
    assert json.loads((folder / "config.json").read_text())["dtype"] == "bfloat16"
    model = load_model(folder, Build(mesh=Mesh.single(), dtype=torch.float64))
    expected = wholes(LLAMA)["layers.0.mlp.gate_up.weight"].bfloat16().double()
    assert torch.equal(model.get_parameter("layers.0.mlp.gate_up.weight"), expected)


def test_base_model_names_and_harmless_tensors(tmp_path: Path) -> None:
    """Folders of the model without its head lack the prefix; masks and frequencies are of no interest."""
    for name, extra in (("tied", "layers.0.self_attn.rotary_emb.inv_freq"), ("gpt2", "h.0.attn.bias")):
        file = write(CONFIGS[name], tmp_path / name) / "model.safetensors"
        prefix = FAMILIES[CONFIGS[name].family].prefix
        held = {key.removeprefix(prefix): value for key, value in load_file(file).items()}
        save_file(held | {extra: torch.ones(3, dtype=torch.uint8)}, file)
        assert check_folder(tmp_path / name) == []
        model = load_model(tmp_path / name, Build(mesh=Mesh.single()))
        assert torch.equal(model.get_parameter("embedding.weight"), wholes(CONFIGS[name])["embedding.weight"])


def test_symlinked_weights_are_read(tmp_path: Path) -> None:
    folder = write(LLAMA, tmp_path / "snapshot")
    (tmp_path / "blobs").mkdir()
    (folder / "model.safetensors").rename(tmp_path / "blobs" / "abc")
    (folder / "model.safetensors").symlink_to("../blobs/abc")
    assert check_folder(folder) == []


Change = Callable[[Path], None]


def change_config(**values: Any) -> Change:
    def change(folder: Path) -> None:
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | values))

    return change


def change_tensors(edit: Callable[[dict[str, Tensor]], object], number: int = 1) -> Change:
    def change(folder: Path) -> None:
        file = sorted(folder.glob("*.safetensors"))[number - 1]
        held = load_file(file)
        edit(held)
        save_file(held, file)

    return change


def change_index(**weight_map: str) -> Change:
    def change(folder: Path) -> None:
        path = folder / "model.safetensors.index.json"
        index = json.loads(path.read_text())
        index["weight_map"] |= {name.replace("__", "."): file for name, file in weight_map.items()}
        path.write_text(json.dumps(index))

    return change


def change_file(edit: Callable[[bytes], bytes], name: str = "") -> Change:
    def change(folder: Path) -> None:
        path = folder / name if name else sorted(folder.glob("*.safetensors"))[1]
        path.write_bytes(edit(path.read_bytes()))

    return change


def only_pickles(folder: Path) -> None:
    for path in folder.glob("model*"):
        path.unlink()
    (folder / "pytorch_model.bin").write_bytes(b"")


def no_weights(folder: Path) -> None:
    for path in folder.glob("model*"):
        path.unlink()


def lost_file(folder: Path) -> None:
    sorted(folder.glob("*.safetensors"))[1].unlink()


def dangling(folder: Path) -> None:
    lost = sorted(folder.glob("*.safetensors"))[1]
    lost.unlink()
    lost.symlink_to("../nowhere")


def wrong_file(folder: Path) -> None:
    change_index(**{NORM.replace(".", "__"): sorted(folder.glob("*.safetensors"))[1].name})(folder)


def stale_single(folder: Path) -> None:
    save_file({"x": torch.zeros(1)}, folder / "model.safetensors")


NORM = "model.layers.1.input_layernorm.weight"
DOWN = "model.layers.0.mlp.down_proj.weight"
EMBEDDING = "model.embed_tokens.weight"

BAD_FOLDERS: dict[str, tuple[Change, list[str]]] = {
    "no config": (lambda folder: (folder / "config.json").unlink(), ["config.json: no such file"]),
    "config is not JSON": (change_file(lambda b: b[:-9], "config.json"), ["config.json: "]),
    "config is not text": (change_file(lambda b: b"\xff\xfe" + b, "config.json"), ["config.json: "]),
    "config is a list": (change_file(lambda b: b"[]", "config.json"), ["must hold an object"]),
    "deep config": (change_file(lambda b: b"[" * 200_000, "config.json"), ["config.json: "]),
    "unknown model": (change_config(model_type="lama"), ["'lama' (did you mean 'llama'?)", "gpt2"]),
    "model type is a list": (change_config(model_type=["llama"]), ["unknown model_type"]),
    "remote code": (change_config(auto_map={"AutoModel": "m.X"}), ["auto_map", "never run"]),
    "endless layers": (change_config(num_hidden_layers=10**9), ["config.json: asks for 1000000000 layers"]),
    "endless width": (change_config(hidden_size=4 * 10**18), ["impossible size"]),
    "endless number": (change_config(rms_norm_eps=10**400), ["rms_norm_eps"]),
    "other task": (change_config(architectures=["LlamaForSequenceClassification"]), ["must name LlamaForCausalLM"]),
    "quantized": (change_config(quantization_config={"bits": 4}), ["quantization_config"]),
    "missing tensor": (
        change_tensors(lambda held: held.pop(EMBEDDING)),
        [f"{EMBEDDING} is missing (embedding.weight)"],
    ),
    "unexpected tensor": (
        change_tensors(lambda held: held.update({"model.layers.9.mlp.down_proj.weight": torch.zeros(1)})),
        ["model.layers.9.mlp.down_proj.weight is not a tensor of this llama model"],
    ),
    "bias without switch": (
        change_tensors(lambda held: held.update({"model.layers.0.self_attn.q_proj.bias": torch.zeros(32)})),
        ["self_attn.q_proj.bias is not a tensor"],
    ),
    "wrong shape": (
        change_tensors(lambda held: held.update({EMBEDDING: torch.zeros(96, 32)})),
        [f"{EMBEDDING} has shape [96, 32]; by config.json it is [97, 32] (embedding.weight)"],
    ),
    "wrong type": (
        change_tensors(lambda held: held.update({EMBEDDING: torch.zeros(97, 32, dtype=torch.int8)})),
        [f"{EMBEDDING} has type I8"],
    ),
    "lost file": (lost_file, ["model-00002-of-", "no such file"]),
    "dangling link": (dangling, ["model-00002-of-", "no such file"]),
    "truncated file": (change_file(lambda b: b[:-1]), ["model-00002-of-", "not a whole safetensors file"]),
    "longer file": (change_file(lambda b: b + b"x"), ["model-00002-of-", "not a whole safetensors file"]),
    "empty file": (change_file(lambda b: b""), ["model-00002-of-", "not a whole safetensors file"]),
    "corrupt header": (
        change_file(lambda b: b[:8] + b"x" + b[9:]),
        ["model-00002-of-", "not a whole safetensors file"],
    ),
    "huge header": (change_file(lambda b: struct.pack("<Q", 1 << 62) + b[8:]), ["not a whole safetensors file"]),
    "only pickles": (only_pickles, ["pytorch_model.bin is a pickle", "lockstep import"]),
    "no weights": (no_weights, ["has neither model.safetensors nor"]),
    "index without map": (change_file(lambda b: b"{}", "model.safetensors.index.json"), ["has no weight_map"]),
    "index is not JSON": (change_file(lambda b: b[:40], "model.safetensors.index.json"), ["index.json: "]),
    "path upward": (change_index(x="../model.safetensors"), ["'../model.safetensors' is not the name"]),
    "absolute path": (change_index(x="/etc/passwd"), ["'/etc/passwd' is not the name"]),
    "dots": (change_index(x=".."), ["'..' is not the name"]),
    "pickle in index": (change_index(x="pytorch_model.bin"), ["'pytorch_model.bin' is not the name"]),
    "name is a number": (change_index(x=3), ["'3' is not the name"]),  # type: ignore[arg-type]
    "index names a wrong file": (
        wrong_file,
        ["is not in model-00002"],
    ),
    "not in the index": (
        change_tensors(lambda held: held.update({"model.rotary_emb.inv_freq": torch.zeros(2)})),
        ["which model.safetensors.index.json does not list"],
    ),
    "twice": (
        change_tensors(lambda held: held.update({EMBEDDING: torch.zeros(97, 32)}), number=2),
        [f"{EMBEDDING} is in both"],
    ),
    "stale single file": (stale_single, ["holds both"]),
}


@pytest.mark.parametrize("case", list(BAD_FOLDERS))
def test_bad_folders_are_refused(case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    change, wanted = BAD_FOLDERS[case]
    folder = write(LLAMA, tmp_path / "m", max_file_bytes=9000)
    assert check_folder(folder) == []
    change(folder)
    problems = check_folder(folder)
    assert problems
    for text in wanted:
        assert text in "\n".join(problems)
    monkeypatch.setattr("parallel.hf.load.empty_model", lambda *_: pytest.fail("memory before refusal"))
    with pytest.raises(ModelFolderError) as caught:
        load_model(folder, Build(mesh=Mesh.single()))
    assert list(caught.value.problems) == problems


def test_all_problems_at_once(tmp_path: Path) -> None:
    folder = write(LLAMA, tmp_path / "m")

    def spoil(held: dict[str, Tensor]) -> None:
        del held[NORM]
        held[DOWN] = torch.zeros(2, 2, dtype=torch.int32)
        held["stray"] = torch.zeros(1)

    change_tensors(spoil)(folder)
    problems = "\n".join(check_folder(folder))
    for text in (f"{NORM} is missing", f"{DOWN} has shape", f"{DOWN} has type I32", "stray is not a tensor"):
        assert text in problems
    change_config(model_type="nope")(folder)
    change_file(lambda b: b[:-1], "model.safetensors")(folder)
    assert len(check_folder(folder)) == 2


def test_many_missing_tensors_are_counted(tmp_path: Path) -> None:
    folder = write(LLAMA, tmp_path / "m")
    change_config(num_hidden_layers=10)(folder)
    problems = check_folder(folder)
    assert len(problems) == 21
    assert problems[-1] == "... and 52 more tensors"


def test_no_folder(tmp_path: Path) -> None:
    assert check_folder(tmp_path / "nowhere") == [f"{tmp_path / 'nowhere'}: no such folder"]


@pytest.mark.parametrize("same", [True, False])
def test_a_stored_head_must_be_the_embedding_it_is_tied_to(same: bool, tmp_path: Path) -> None:
    folder = write(TIED, tmp_path / "m")
    head = wholes(TIED)["embedding.weight"].clone()
    if not same:
        head[-1, -1] += 1e-3
    change_tensors(lambda held: held.update({"lm_head.weight": head}))(folder)
    problems = check_folder(folder)
    assert (problems == []) if same else ("lm_head.weight differs from model.embed_tokens.weight" in problems[0])


def test_a_layout_that_cannot_share_the_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"layout.tp = 3"):
        load_model(write(LLAMA, tmp_path / "m"), Build(mesh=Mesh.fake(Layout(tp=3), 0)))


def test_existing_folders_are_kept(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    folder = write(LLAMA, tmp_path / "empty")
    before = (folder / "model.safetensors").stat().st_ino
    with pytest.raises(ModelFolderError, match="exists and is not empty; to replace"):
        write(LLAMA, folder)
    assert (folder / "model.safetensors").stat().st_ino == before
    write(TIED, folder, overwrite=True, max_file_bytes=9000)
    assert read_config(folder).tied
    assert not (folder / "model.safetensors").exists()
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "thesis.txt").write_text("...")
    with pytest.raises(ModelFolderError, match="not a model folder"):
        write(LLAMA, tmp_path / "home", overwrite=True)
    with pytest.raises(ModelFolderError, match="is a file"):
        write(LLAMA, tmp_path / "home" / "thesis.txt", overwrite=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty", "home"]


def test_nothing_is_published_when_writing_fails(tmp_path: Path) -> None:
    values = wholes(LLAMA)

    def fail(name: str) -> Tensor:
        if name.startswith("layers.1"):
            raise OSError("gone")
        return values[name]

    with pytest.raises(OSError, match="gone"):
        write_folder(LLAMA, fail, tmp_path / "m", dtype=torch.float32, max_file_bytes=1000)
    with pytest.raises(ShardError, match="expected the whole tensor"):
        write_folder(LLAMA, lambda name: torch.zeros(1), tmp_path / "m", dtype=torch.float32)
    with pytest.raises(ConfigError, match="no qk_norm"):
        write_folder(replace(LLAMA, qk_norm=True), fail, tmp_path / "m", dtype=torch.float32)
    assert list(tmp_path.iterdir()) == []


def test_tokenizer_files_and_special_tokens(tmp_path: Path) -> None:
    (tmp_path / "t").mkdir()
    with pytest.raises(ModelFolderError, match="holds no tokenizer"):
        write(LLAMA, tmp_path / "m", tokenizer=tmp_path / "t")
    (tmp_path / "t" / "tokenizer.json").write_text("{}")
    folder = write(LLAMA, tmp_path / "m", tokenizer=tmp_path / "t", bos=1, eos=(2, 3))
    assert (folder / "tokenizer.json").read_text() == "{}"
    for name in ("config.json", "generation_config.json"):
        described = json.loads((folder / name).read_text())
        assert (described["bos_token_id"], described["eos_token_id"]) == (1, [2, 3])


def test_files_have_the_size_that_was_asked_for(tmp_path: Path) -> None:
    folder = write(LLAMA, tmp_path / "m", max_file_bytes=15_000)
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    files = set(index["weight_map"].values())
    sizes = {file: sum(value.numel() * 4 for value in load_file(folder / file).values()) for file in files}
    assert max(sizes.values()) <= 15_000
    assert sum(sizes.values()) == index["metadata"]["total_size"] == sum(v.numel() * 4 for v in wholes(LLAMA).values())


def save_and_load(name: str, layout: dict[str, Any], folder: str) -> list[str]:
    """On a rank: build, save together, load our piece again; the parameters that did not come back the same."""
    mesh = Mesh.build(Layout(**layout))
    model = build_model(CONFIGS[name], Build(mesh=mesh), seed=3)
    save_model(model, mesh, Path(folder), max_file_bytes=9000, eos=2)
    again = load_model(Path(folder), Build(mesh=mesh))
    return [key for key, value in model.named_parameters() if not torch.equal(value, again.get_parameter(key))]


@pytest.mark.parametrize(
    ("name", "layout"),
    [("llama", {"tp": 2}), ("qwen3", {"tp": 4}), ("gpt2", {"tp": 2, "dp": 2}), ("tied", {"tp": 4})],
)
def test_ranks_save_together(ranks: Ranks, name: str, layout: dict[str, int], tmp_path: Path) -> None:
    world = layout["tp"] * layout.get("dp", 1)
    answers = ranks.run(save_and_load, world=world, name=name, layout=layout, folder=str(tmp_path / "m"))
    assert answers == [[]] * world
    alone = build_model(CONFIGS[name], Build(mesh=Mesh.single()), seed=3)
    loaded = load_model(tmp_path / "m", Build(mesh=Mesh.single()))
    for (key, a), b in zip(alone.named_parameters(), loaded.parameters(), strict=True):
        assert torch.equal(a, b), key


def test_one_parameter_at_a_time_is_asked_for_and_written(tmp_path: Path) -> None:
    """The next one comes when the last one is in the file; a file is what the library reads."""
    shapes = {"a": (3, 5), "b": (4,), "c": (0, 2)}
    values = {name: torch.randn(shape).to(torch.bfloat16) for name, shape in shapes.items()}
    sizes: list[int] = []

    def each() -> Iterator[tuple[str, Tensor]]:
        for name, value in values.items():
            sizes.append((tmp_path / "x").stat().st_size)
            yield name, value

    write_file(tmp_path / "x", shapes, torch.bfloat16, each())
    assert sizes == [sizes[0], sizes[0] + 30, sizes[0] + 38]
    read = load_file(tmp_path / "x")
    assert read.keys() == values.keys() and all(torch.equal(read[name], value) for name, value in values.items())
    for wrong in ([("b", values["b"])], [("a", values["a"].float())], [("a", values["a"])]):
        with pytest.raises(ValueError, match="announced"):
            write_file(tmp_path / "y", shapes, torch.bfloat16, wrong)


def fail_to_save(folder: str) -> list[str]:
    """On a rank: the errors of saving to a folder that exists, then to a disk that fails under way."""
    mesh = Mesh.build(Layout(tp=2))
    model = build_model(LLAMA, Build(mesh=mesh))
    errors: list[str] = []

    def save(path: Path) -> None:
        try:
            save_model(model, mesh, path, max_file_bytes=9000)
        except (ModelFolderError, RankError, OSError) as error:
            errors.append(f"{type(error).__name__}: {error}")

    def full(*_: Any, **__: Any) -> None:
        raise OSError("disk full")

    save(Path(folder))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("parallel.hf.save.write_file", full)
        save(Path(folder) / "new")
    return errors


def test_every_rank_learns_that_saving_failed(ranks: Ranks, tmp_path: Path) -> None:
    (tmp_path / "x").write_text("")
    first, second = ranks.run(fail_to_save, world=2, folder=str(tmp_path))
    assert (
        first[0]
        == second[0]
        == (f"ModelFolderError: {tmp_path}: exists and is not empty; to replace an exported folder, say overwrite")
    )
    assert first[1] == "OSError: disk full"
    assert second[1].startswith("RankError: rank 0 could not write")
    assert os.listdir(tmp_path) == ["x"]
