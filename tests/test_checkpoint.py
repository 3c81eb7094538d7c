"""Checkpoints: any layout and any division among data ranks read any other's, bit for bit, and nothing unneeded."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from ranks import Ranks
from test_trainer import CONFIG, OPTIMIZER, batches, trainer_on
from torch import Tensor

from parallel.errors import CheckpointError, ConfigError
from parallel.mesh import Layout, Mesh
from parallel.models.build import Build
from parallel.models.config import DecoderConfig
from parallel.models.decoder import build_model
from parallel.pp import PipelineConfig
from zero import checkpoint
from zero.checkpoint.publish import MOVES, State
from zero.checkpoint.runs import clip, shared_runs
from zero.faults import KINDS, POINTS, Fault, InjectedFault, Injector
from zero.fragment import Fragment
from zero.optimizer import ZeroConfig, ZeroOptimizer
from zero.run import RunFolder
from zero.trainer import Trainer, TrainerConfig

ODD = DecoderConfig(vocabulary=97, hidden=32, layers=2, heads=8, kv_heads=2, feed_forward=40, qk_norm=True, tied=True)


def optimizer_on(layout: dict[str, Any], stage: int, config: DecoderConfig = ODD, seed: int = 3) -> ZeroOptimizer:
    mesh = Mesh.build(Layout(**layout)) if layout else Mesh.single()
    table, pipeline = PipelineConfig().table(mesh.pp.size, 2, config.layers), PipelineConfig()
    cuts = pipeline.cuts(config.layers, table.stages)
    held = tuple(cuts[stage] for stage in table.stages_of(mesh.pp.rank))
    model = build_model(config, Build(mesh=mesh, dtype=torch.float32, seed=5, cuts=held), seed=seed)
    return ZeroOptimizer(model, mesh, OPTIMIZER, zero=ZeroConfig(stage=stage))


def value_of(name: str, what: str, shape: tuple[int, ...]) -> Tensor:
    """The whole of a state tensor, with values that name their place."""
    key = int(hashlib.sha256(f"{name}|{what}".encode()).hexdigest()[:4], 16)
    return torch.arange(int(np.prod(shape)), dtype=torch.float32).view(shape) + 1000 * key


def each_with_its_value(optimizer: ZeroOptimizer) -> Iterator[tuple[Fragment, Tensor]]:
    """Each fragment of a rank with the values that belong there, cut from the whole by the shard table."""
    for fragment in optimizer.state():
        shard = optimizer.buckets.shards[fragment.parameter]
        whole = value_of(fragment.parameter, fragment.what, shard.shape)
        local = shard.cut(whole, optimizer.mesh.place).reshape(-1)
        yield fragment, local[fragment.start : fragment.start + fragment.values.numel()]


def save_known(folder: str, layout: dict[str, Any], stage: int) -> int:
    """On the ranks: save a state in which every value names its place; bytes of all values of this rank's file."""
    optimizer = optimizer_on(layout, stage)
    optimizer.prepare()
    for fragment, expected in each_with_its_value(optimizer):
        fragment.values.copy_(expected)
    for state in optimizer.inner.state.values():
        state["step"].fill_(7)
    checkpoint.save(Path(folder), optimizer.mesh, optimizer, step=7, tokens=70, keep=1, about={"seed": 5})
    return sum(f.values.numel() * 4 for f in optimizer.state())


def load_known(folder: str, layout: dict[str, Any], stage: int) -> list[int]:
    """On the ranks: load it, find every value where it belongs, and say how many bytes were read and were needed."""
    optimizer = optimizer_on(layout, stage, seed=4)
    found = checkpoint.latest(Path(folder))
    assert found is not None
    loaded = checkpoint.load(found, optimizer.mesh, optimizer)
    assert (loaded.step, loaded.tokens, loaded.manifest.about) == (7, 70, {"seed": 5})
    needed = 0
    for fragment, expected in each_with_its_value(optimizer):
        assert torch.equal(fragment.values, expected), fragment.key
        shard = optimizer.buckets.shards[fragment.parameter]
        mask = shard.cut(torch.ones(shard.shape), optimizer.mesh.place).reshape(-1)
        needed += 4 * int(mask[fragment.start : fragment.start + fragment.values.numel()].sum())
    assert set(optimizer.scalars().values()) == {7.0}
    with optimizer.whole():
        for bucket in optimizer.buckets.buckets:
            assert torch.equal(bucket.values[bucket.own], bucket.master)
    return [loaded.bytes_read, needed]


PLACES: list[tuple[dict[str, Any], int]] = [
    ({}, 0),
    ({"dp": 2}, 1),
    ({"tp": 2, "dp": 2}, 2),
    ({"tp": 4}, 0),
    ({"dp": 4}, 3),
    ({"pp": 2, "dp": 2}, 3),
    ({"pp": 2, "tp": 2}, 0),
]


def on(ranks: Ranks, function: Callable[..., Any], folder: Path, place: tuple[dict[str, Any], int]) -> list[Any]:
    layout, stage = place
    world = Layout(**layout).world
    if world == 1:
        return [function(folder=str(folder), layout=layout, stage=stage)]
    return ranks.run(function, world=world, folder=str(folder), layout=layout, stage=stage)


@pytest.mark.parametrize("before", range(len(PLACES)))
def test_any_place_reads_any_other_bit_for_bit_and_no_byte_too_many(ranks: Ranks, tmp_path: Path, before: int) -> None:
    """Repeated kv heads (2 on 4 ranks), a padded vocabulary (97), odd shares, tied ends."""
    on(ranks, save_known, tmp_path, PLACES[before])
    saved = checkpoint.Checkpoint.open(tmp_path / "step-00000007")
    whole = sum(int(np.prod(shard.shape)) for shard in saved.shards.values())
    held = [f for entry in saved.files for f in entry.fragments]
    layout, stage = Layout(**PLACES[before][0]), PLACES[before][1]
    if layout.tp == 1:
        assert sum(length for *_, length in held) == 3 * whole, "every value once"
    assert len(saved.files) == (layout.world if stage else layout.world // layout.dp)
    for (name, shard), what in itertools.product(saved.shards.items(), ("master", "exp_avg", "exp_avg_sq")):
        assert torch.equal(saved.whole(name, what), value_of(name, what, shard.shape)), (name, what)
    for after in (PLACES * 2)[before + 1 : before + 4]:
        for read, needed in on(ranks, load_known, tmp_path, after):
            assert read == needed > 0


def there_and_back(folder: str, one: dict[str, Any], other: dict[str, Any]) -> None:
    """On the ranks: train, save, load elsewhere, save there, load here: the state must be what it was."""
    mesh = Mesh.build(Layout(**one))
    trainer = trainer_on(mesh, dtype=torch.bfloat16, optimizer=OPTIMIZER)
    for step in range(2):
        trainer.step(batches(step, mesh.data.rank, mesh.data.size))
    keep: dict[str, Any] = {"step": 2, "tokens": 1, "keep": 1}
    checkpoint.save(Path(folder) / "a", mesh, trainer.optimizer, **keep)
    there = trainer_on(Mesh.build(Layout(**other)), dtype=torch.bfloat16)
    found = checkpoint.latest(Path(folder) / "a")
    assert found is not None
    checkpoint.load(found, there.mesh, there.optimizer)
    checkpoint.save(Path(folder) / "b", there.mesh, there.optimizer, **keep)
    before = {f.key: f.values.clone() for f in trainer.optimizer.state()}
    weights = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    trainer.step(batches(2, mesh.data.rank, mesh.data.size))
    found = checkpoint.latest(Path(folder) / "b")
    assert found is not None
    checkpoint.load(found, mesh, trainer.optimizer)
    for fragment in trainer.optimizer.state():
        assert torch.equal(fragment.values, before[fragment.key]), fragment.key
    for name, parameter in trainer.model.named_parameters():
        assert torch.equal(parameter, weights[name]), name


@pytest.mark.parametrize(
    ("one", "other"),
    [({"tp": 4}, {"dp": 4}), ({"tp": 2, "dp": 2}, {"tp": 4})],
)
def test_there_and_back_changes_no_bit(
    ranks: Ranks, tmp_path: Path, one: dict[str, Any], other: dict[str, Any]
) -> None:
    ranks.run(there_and_back, world=4, folder=str(tmp_path), one=one, other=other)


boxes = st.lists(st.tuples(st.integers(1, 4), st.integers(0, 3), st.integers(0, 3)), min_size=0, max_size=4)


@given(boxes, st.data())
@settings(max_examples=150, deadline=None)
def test_runs_copy_what_slices_copy(dims: list[tuple[int, int, int]], data: st.DataObject) -> None:
    """Any box from one tensor to another, any span held of the one, any wanted of the other."""
    box = [size for size, _, _ in dims]
    source, target = ([size + more for size, *mores in dims for more in mores[which : which + 1]] for which in (0, 1))
    at = [
        [data.draw(st.integers(0, whole - size)) for whole, size in zip(shape, box, strict=True)]
        for shape in (source, target)
    ]
    inside, outside = (tuple(slice(a, a + size) for a, size in zip(begins, box, strict=True)) for begins in at)
    values = np.arange(np.prod(source, dtype=int)).reshape(source)
    expected = np.full(target, -1)
    expected[outside] = values[inside]
    span = [sorted(data.draw(st.lists(st.integers(0, s.size), min_size=2, max_size=2))) for s in (values, expected)]
    (held_from, held_to), (wanted_from, wanted_to) = span
    begins, into, length = shared_runs(source, inside, target, outside)
    assert (np.diff(begins) > 0).all()
    got = np.full(wanted_to - wanted_from, -1)
    held = values.reshape(-1)[held_from:held_to]
    parts = clip(begins, into, length, (held_from, held_to), (wanted_from, wanted_to))
    for begin, to, size in zip(*parts, strict=True):
        assert size > 0
        got[to : to + size] = held[begin : begin + size]
    flat = expected.reshape(-1)
    kept = np.where((flat >= held_from) & (flat < held_to), flat, -1)[wanted_from:wanted_to]
    assert (got == kept).all()


def test_a_whole_matrix_is_one_run() -> None:
    whole = (slice(0, 8), slice(0, 16))
    assert [len(part) for part in shared_runs((8, 16), whole, (8, 16), whole)[:2]] == [1, 1]


def trained(folder: Path, steps: int = 1, **loop: Any) -> Trainer:
    """A run of a few steps with a checkpoint after each."""
    folder.mkdir(exist_ok=True)
    trainer = trainer_on(
        Mesh.single(),
        dtype=torch.float32,
        steps=steps,
        folder=RunFolder(folder),
        loop=TrainerConfig(**{"save_every": 1, **loop}),
    )
    trainer.run()
    return trainer


def test_everything_is_on_the_disk_before_it_gets_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = trained(tmp_path)
    events: list[tuple[str, str]] = []
    fsync, rename, replace = os.fsync, os.rename, os.replace

    def recorded(what: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def do(first: Any, *rest: Any) -> Any:
            place = os.readlink(f"/proc/self/fd/{first}") if isinstance(first, int) else str(first)
            events.append((what, Path(place).name))
            return call(first, *rest)

        return do

    for name, call in (("fsync", fsync), ("rename", rename), ("replace", replace)):
        monkeypatch.setattr(os, name, recorded(name, call))
    trainer.done = 5
    trainer.config = TrainerConfig(keep=1)
    assert trainer._saver is not None
    trainer._saver.keep = 1
    trainer.save()
    draft = ".step-00000005.tmp"
    assert events == [
        ("fsync", "rank-00000.safetensors"),
        ("fsync", "manifest.json"),
        ("fsync", draft),
        ("rename", draft),
        ("fsync", "checkpoints"),
        ("fsync", ".latest.tmp"),
        ("replace", ".latest.tmp"),
        ("fsync", "checkpoints"),
        ("rename", "step-00000001"),
    ]


@pytest.mark.parametrize(("keep", "left"), [(1, [5]), (2, [4, 5]), (4, [2, 3, 4, 5]), (9, [1, 2, 3, 4, 5])])
def test_as_many_stay_as_are_to_be_kept(tmp_path: Path, keep: int, left: list[int]) -> None:
    trainer = trainer_on(Mesh.single(), dtype=torch.float32)
    for step in range(1, 6):
        checkpoint.save(tmp_path, trainer.mesh, trainer.optimizer, step=step, tokens=0, keep=keep)
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["latest", *(f"step-{step:08d}" for step in left)]


def test_leftovers_of_dead_processes_go_with_the_next_save(tmp_path: Path) -> None:
    for name in (".step-00000003.tmp", ".step-00000001.gone", ".step-00000002.old"):
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
        (tmp_path / "checkpoints" / name / "rank-00000.safetensors").write_bytes(b"x")
    trained(tmp_path)
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["latest", "step-00000001"]


def rewritten(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """A manifest with a change in it that it vouches for."""
    data = json.loads((folder / "manifest.json").read_text())
    del data["sha256"]
    change(data)
    digest = hashlib.sha256(json.dumps(data, sort_keys=True, separators=(",", ":")).encode()).hexdigest()
    (folder / "manifest.json").write_text(json.dumps({"sha256": digest, **data}))


LIES: dict[str, Callable[[dict[str, Any]], None]] = {
    "a path": lambda data: data["files"][0].update(name="../../etc/rank-00000.safetensors"),
    "a rank": lambda data: data["files"][0].update(rank=3),
    "a degree": lambda data: data["layout"].update(tp=0),
    "an unknown degree": lambda data: data["layout"].update(zp=1),
    "a negative length": lambda data: data["files"][0]["fragments"][0].__setitem__(3, -1),
    "no shards": lambda data: data.update(shards={}),
    "shards of another kind": lambda data: data.update(shards=[1]),
    "a shard that is none": lambda data: next(iter(data["shards"].values())).update(split=["tp"]),
    "no files": lambda data: data.update(files=[]),
    "a fragment too few": lambda data: data["files"][0]["fragments"].pop(),
    "a fragment too short": lambda data: data["files"][0]["fragments"][-1].__setitem__(3, 1),
    "a fragment too long": lambda data: data["files"][0]["fragments"][-1].__setitem__(3, 10**6),
    "a fragment elsewhere": lambda data: data["files"][0]["fragments"][-1].__setitem__(2, 5),
    "no scalars": lambda data: data.update(scalars={}),
    "a step that is none": lambda data: data.update(step="1"),
    "another format": lambda data: data.update(format=2),
}


@pytest.mark.parametrize("lie", LIES)
def test_a_manifest_that_lies_is_refused_and_nothing_changes(tmp_path: Path, lie: str) -> None:
    trained(tmp_path)
    folder = tmp_path / "checkpoints" / "step-00000001"
    rewritten(folder, LIES[lie])
    other = trainer_on(Mesh.single(), dtype=torch.float32)
    before = {f.key: f.values.clone() for f in other.optimizer.state()}
    with pytest.raises(CheckpointError, match="step-00000001"):
        checkpoint.load(folder, other.mesh, other.optimizer)
    assert all(torch.equal(before[f.key], f.values) for f in other.optimizer.state())


def test_every_flipped_byte_of_a_manifest_is_seen(tmp_path: Path) -> None:
    trained(tmp_path)
    path = tmp_path / "checkpoints" / "step-00000001" / "manifest.json"
    whole = path.read_bytes()
    for place in [*range(0, len(whole), 97), whole.index(b'"step": 1') + 8, whole.index(b'"tokens": ') + 10]:
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        try:
            opened = checkpoint.Checkpoint.open(path.parent)
        except CheckpointError as error:
            assert "manifest.json" in str(error)
        else:  # white space became other white space
            assert opened.manifest.to_bytes() == whole, place


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        (".metadata", "torch distributed checkpoint"),
        ("__0_0.distcp", "torch distributed checkpoint"),
        ("mp_rank_00_model_states.pt", "DeepSpeed"),
        ("optimizer.pt", "pickles"),
    ],
)
def test_checkpoints_of_others_that_are_pickles_are_refused_with_the_reason(
    tmp_path: Path, name: str, expected: str
) -> None:
    (tmp_path / name).write_bytes(b"x")
    with pytest.raises(CheckpointError, match=f"{expected}.* run any code .*--init"):
        checkpoint.Checkpoint.open(tmp_path)


def test_the_state_of_another_optimizer_is_refused_by_name(tmp_path: Path) -> None:
    def with_(kind: Any) -> Trainer:
        model = build_model(CONFIG, Build(mesh=Mesh.single(), dtype=torch.float64), seed=3)
        optimizer = ZeroOptimizer(model, Mesh.single(), OPTIMIZER, lambda groups: kind(groups, lr=0.1))
        return Trainer(model, optimizer, Mesh.single(), steps=3, folder=RunFolder(tmp_path))

    with_(torch.optim.SGD).save()
    with pytest.raises(CheckpointError) as caught:
        with_(torch.optim.AdamW).resume()
    assert any("embedding.weight|exp_avg" in problem for problem in caught.value.problems)
    assert not any("is whole" in problem for problem in caught.value.problems), "an older one would not fit either"


# Faults as text, states as a table


def test_faults_are_refused_with_the_nearest_name() -> None:
    assert Fault.parse("kill@1,3,save.fsync") == Fault("kill", 1, 3, "save.fsync")
    for text, expected in [
        ("kil@0,1,save.fsync", "did you mean 'kill'"),
        ("kill@0,1,save.fsink", "did you mean 'save.fsync'"),
        ("kill@0,save.fsync", "kind@rank,step,point"),
        ("kill", "kind@rank,step,point"),
        ("kill@-1,2,save.fsync", "kind@rank,step,point"),
    ]:
        with pytest.raises(ConfigError, match=expected):
            Fault.parse(text)
        assert any(expected in problem for problem in TrainerConfig(fault=text).problems())
    assert [*TrainerConfig(fault="nan@0,1,step.backward; kill@1,2,save.prune").problems()] == []


def test_an_injector_strikes_its_rank_step_and_point_only() -> None:
    injector = Injector("raise@1,2,step.update; enospc@1,2,save.write", rank=1)
    for rank in (0, 2):
        Injector("raise@1,2,step.update", rank=rank).at("step.update", 2)
    for step in (1, 3):
        injector.begin(step)
        injector.at("step.update")
    injector.begin(2)
    injector.at("step.forward")
    with pytest.raises(InjectedFault):
        injector.at("step.update")
    injector.begin(3)
    with pytest.raises(OSError, match="No space left"):
        injector.at("save.write", 2)
    gradients = [torch.zeros(0), torch.zeros(2, 3)]
    nan = Injector("nan@0,2,step.backward")
    nan.begin(1)
    nan.spoil("step.backward", gradients)
    assert not gradients[1].isnan().any()
    nan.begin(2)
    nan.spoil("step.backward", gradients)
    assert gradients[1].isnan().sum() == 1


def test_every_point_is_in_the_code_and_every_kind_is_explained() -> None:
    source = "".join(path.read_text() for path in (Path(checkpoint.__file__).parent.parent).rglob("*.py"))
    for point in POINTS:
        assert f'at("{point}"' in source, point
    text = (Path(__file__).parent.parent / "docs" / "checkpoints.md").read_text()
    assert all(f"`{name}`" in text for name in (*KINDS, *POINTS))


def test_states_of_a_publication_lead_somewhere() -> None:
    assert MOVES.keys() == set(State)
    assert {state for moves in MOVES.values() for state in moves} == set(State) - {State.DRAFT}
