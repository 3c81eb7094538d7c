"""Our trainer over DeepSpeed's engine: equal losses, our checkpoints, and refusals before anything starts."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from launch.deepspeed import check_deepspeed
from launch.recipe import Recipe, load_recipe
from launch.train import main as train
from parallel.config import parse_flags
from parallel.errors import ConfigError
from parallel.mesh import Layout, Mesh
from parallel.models.build import Build
from parallel.models.config import DecoderConfig
from parallel.models.decoder import build_model
from zero.deepspeed_document import engine_document
from zero.deepspeed_engine import UnderDeepSpeed, load_deepspeed
from zero.deepspeed_state import EngineState
from zero.optimizer import OptimizerConfig, ZeroConfig

ROOT = Path(__file__).parent.parent
INSTALLED = importlib.util.find_spec("deepspeed") is not None
needs_deepspeed = pytest.mark.skipif(not INSTALLED, reason="DeepSpeed is not installed")


def test_its_absence_is_a_clear_message(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "deepspeed", None)
    with pytest.raises(ConfigError, match=r"pip install 'lockstep\[deepspeed\]'"):
        load_deepspeed()
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.chdir(tmp_path)
    words = ["tiny", "--zero.backend", "deepspeed", "--zero.stage", "2", "--layout.dp", "2", "--data.source", "/none"]
    with pytest.raises(ConfigError, match=r"^zero\.backend = deepspeed: .* pip install 'lockstep\[deepspeed\]'$"):
        train(words)
    assert list(tmp_path.iterdir()) == []


def recipe(*flags: str) -> Recipe:
    """``tiny`` under DeepSpeed's engine, with flags."""
    _, overrides, problems = parse_flags(["--zero.backend", "deepspeed", *flags])
    return load_recipe("tiny", overrides, problems)


def test_what_it_cannot_do_is_refused_at_once() -> None:
    flags = "--layout.pp 2 --layout.tp 8 --precision fp64 --trace x.svg --zero.stage 1 --zero.top-k 0.1"
    with pytest.raises(ConfigError) as caught:
        recipe(*flags.split(), "--model.heads", "8", "--model.kv-heads", "2")
    text = str(caught.value)
    for part in (
        "layout.pp = 2",
        "precision = fp64",
        "trace: DeepSpeed's engine measures no timeline",
        "zero.top_k = 0.1",
        "layout.tp = 8 repeats the 2 key-value heads",
    ):
        assert part in text, text
    with pytest.raises(ConfigError, match=r"zero\.stage = 0 with bf16"):
        recipe("--precision", "bf16")
    with pytest.raises(ConfigError, match=r"zero\.stage = 0 with offload"):
        recipe("--precision", "fp32", "--zero.offload", "optimizer")
    assert recipe("--precision", "bf16", "--zero.stage", "1").zero.backend == "deepspeed"


@pytest.mark.parametrize(
    ("tools", "stage", "expected"),
    [
        (["g++"], "1", ["needs ninja"]),
        ([], "1", ["needs ninja", "needs g++"]),
        (["ninja", "g++"], "2", ["offload to nvme needs stage 3"]),
    ],
)
def test_what_it_needs_of_the_machine_is_said(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, tools: list[str], stage: str, expected: list[str]
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr("shutil.which", lambda tool: tool if tool in tools else None)
    monkeypatch.setattr(sys, "executable", "/nowhere/python")
    for name in ("DS_ACCELERATOR", "PATH"):
        monkeypatch.setenv(name, "cpu")
    monkeypatch.delenv("CXX", raising=False)
    disk = {"offload_optimizer": {"device": "nvme", "nvme_path": str(tmp_path)}} if stage == "2" else {}
    (tmp_path / "ds.json").write_text(json.dumps({"zero_optimization": disk}))
    with pytest.raises(ConfigError) as caught:
        check_deepspeed(recipe("--device", "cpu", "--zero.stage", stage, "--zero.deepspeed", str(tmp_path / "ds.json")))
    assert len(caught.value.problems) == len(expected)
    assert all(part in problem for part, problem in zip(expected, caught.value.problems, strict=True))


def test_the_engine_is_given_our_options_and_what_they_do_not_decide() -> None:
    given = {
        "train_batch_size": 7,
        "gradient_clipping": 9,
        "optimizer": {"type": "AdamW", "params": {"lr": 1}},
        "scheduler": {"type": "WarmupLR"},
        "fp16": {"enabled": False},
        "bf16": {"enabled": "auto"},
        "zero_optimization": {
            "stage": 1,
            "overlap_comm": True,
            "allgather_bucket_size": "auto",
            "offload_optimizer": {"device": "none", "pin_memory": False},
            "offload_param": {"device": "nvme", "nvme_path": "/disk"},
        },
        "wall_clock_breakdown": True,
    }
    zero, optimizer = ZeroConfig(stage=3, offload="optimizer"), OptimizerConfig(clip=0.25, bucket_mb=4.0)
    settings = engine_document(given, zero, optimizer, torch.bfloat16)
    assert settings == {
        "gradient_clipping": 0.25,
        "bf16": {"enabled": True, "check_grad_overflow": True},
        "data_types": {"grad_accum_dtype": "fp32"},
        "communication_data_type": "fp32",
        "zero_optimization": {
            "stage": 3,
            "overlap_comm": True,
            "reduce_bucket_size": 1 << 20,
            "offload_optimizer": {"device": "cpu", "pin_memory": False},
            "offload_param": {"device": "nvme", "nvme_path": "/disk"},
        },
        "wall_clock_breakdown": True,
    }
    assert engine_document({}, ZeroConfig(stage=1), optimizer, torch.float32) == {
        "gradient_clipping": 0.25,
        "zero_optimization": {"stage": 1, "reduce_bucket_size": 1 << 20},
    }
    assert given["train_batch_size"] == 7 and given["zero_optimization"]["stage"] == 1


def test_a_pipeline_and_repeated_heads_are_refused_by_the_engine_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "deepspeed", SimpleNamespace())
    mesh = Mesh.fake(Layout(pp=2, tp=4), 0)
    model = build_model(DecoderConfig(vocabulary=32, hidden=16, heads=4, kv_heads=2, layers=2), Build(mesh=mesh))
    with pytest.raises(ConfigError) as caught:
        UnderDeepSpeed(model, mesh, {"scheduler": {"type": "WarmupLR"}})
    assert [part in str(caught.value) for part in ("layout.pp = 2", "layout.tp = 4 repeats", "scheduler")] == [True] * 3


def flat_engine(model: nn.Module, rank: int) -> tuple[Any, Tensor]:
    """What :class:`EngineState` asks of an engine at stage 1: a half of one flat vector of all parameters."""
    parameters = [*model.parameters()]
    flat = torch.cat([p.detach().view(-1) for p in parameters])
    half = -(-len(flat) // 2)
    own = nn.Parameter(
        torch.nn.functional.pad(flat, (0, 2 * half - len(flat)))[rank * half : (rank + 1) * half].clone()
    )
    begin = 0
    for parameter in parameters:
        first, last = max(begin, rank * half), min(begin + parameter.numel(), (rank + 1) * half)
        mapping = None
        if first < last:
            there = SimpleNamespace(start=first - begin, numel=last - first)
            here = SimpleNamespace(start=first - rank * half, numel=last - first)
            mapping = SimpleNamespace(lp_fragment_address=there, hp_fragment_address=here, param_group_index=0)
        parameter._hp_mapping = mapping
        begin += parameter.numel()
    inner = torch.optim.AdamW([own], lr=0.1, weight_decay=0.5, eps=0.0)
    wrapper = SimpleNamespace(single_partition_of_fp32_groups=[own], update_lp_params=lambda: None)
    return SimpleNamespace(optimizer=wrapper, basic_optimizer=inner, zero_optimization_stage=lambda: 1), flat


def test_state_is_found_where_deepspeed_has_it() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 5), nn.Linear(5, 2))
    found: dict[str, Tensor] = {name: torch.full((p.numel(),), torch.nan) for name, p in model.named_parameters()}
    for rank in (0, 1):
        engine, _ = flat_engine(model, rank)
        mesh = SimpleNamespace(data=SimpleNamespace(rank=rank))
        state = EngineState(engine, model, mesh)  # type: ignore[arg-type]
        held = [*state.fragments()]
        assert {fragment.what for fragment in held} == {"master", "exp_avg", "exp_avg_sq"}
        for name, _, start, values in (f for f in held if f.what == "master"):
            assert found[name][start : start + len(values)].isnan().all()
            found[name][start : start + len(values)] = values
        assert set(state.scalars().values()) == {0.0}
        state.prepare()
        for fragment in state.fragments():
            fragment.values.fill_(3.0)
        state.restore(dict.fromkeys(state.scalars(), 7.0))
        (vector,) = engine.optimizer.single_partition_of_fp32_groups
        inside = sum(f.values.numel() for f in state.fragments() if f.what == "master")
        assert (vector[:inside] == 3).all() and (vector[inside:] == 0).all()
        assert engine.basic_optimizer.state[vector]["step"] == 7
        assert (engine.basic_optimizer.param_groups[0]["lr"], vector.grad) == (0.1, None)
    for name, parameter in model.named_parameters():
        assert torch.equal(found[name], parameter.detach().view(-1)), name


def under_torchrun(world: int, *words: str, timeout: float = 900) -> list[dict[str, Any]]:
    """The JSON lines that a program of several ranks prints; the first start builds an extension, for minutes."""
    environment = {**os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), *sys.path[1:]])
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(world), *words]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=timeout, cwd=ROOT)
    assert done.returncode == 0, done.stdout + done.stderr
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith('{"stage"')]


@needs_deepspeed
@pytest.mark.parametrize(("world", "tp"), [(2, 1), (4, 2)])
def test_losses_norms_and_weights_are_ours(world: int, tp: int) -> None:
    """fp32, 20 steps, stages 0 to 3: losses to 1e-6, norms and weights to 1e-5, of the largest of each weight."""
    reports = under_torchrun(world, "examples/under_deepspeed.py", "--tp", str(tp))
    assert [report["stage"] for report in reports] == [0, 1, 2, 3]
    for report in reports:
        assert len(report["ours"]) == 20
        assert report["ours"][-1] < 0.8 * report["ours"][0]
        assert report["loss"] < 1e-6
        assert report["norm"] < 1e-5
        assert report["weight"] < 1e-5


def has_aio() -> bool:
    """Whether DeepSpeed can write to disks here; it asks the compiler."""
    code = "import sys; from deepspeed.ops.op_builder import *; sys.exit(not AsyncIOBuilder().is_compatible(False))"
    environment = {**os.environ, "DS_ACCELERATOR": "cpu", "PYTHONPATH": os.pathsep.join(sys.path[1:])}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, timeout=300)
    return done.returncode == 0


CASES = [
    pytest.param(2, 1, ["0", "1", "2", "3"], 1e-6, id="fp32"),
    pytest.param(2, 1, ["1:bf16", "2:bf16", "3:bf16"], 1e-3, id="bf16"),
    pytest.param(2, 1, ["2:optimizer", "3:parameters"], 1e-6, id="offload"),
    pytest.param(4, 2, ["1", "3"], 1e-6, id="tp=2"),
    pytest.param(2, 1, ["3:disk"], 3e-6, id="disk"),
    pytest.param(2, 1, ["3:disk-bf16"], 2e-3, id="disk-bf16"),
]
"""Ranks, tp, cases of deepspeed_program.py, and how near losses are in their precision."""


@needs_deepspeed
@pytest.mark.parametrize(("world", "tp", "names", "near"), CASES)
def test_checkpoints_pass_between_the_engines(
    tmp_path: Path, world: int, tp: int, names: list[str], near: float
) -> None:
    """Saved bit for bit, continued bit for bit by itself, and by ours; and the other way round."""
    disk = any("disk" in name for name in names)
    if disk and not has_aio():
        pytest.skip("DeepSpeed's async_io does not build here: it needs libaio, with its headers")
    reports = under_torchrun(world, "tests/deepspeed_program.py", str(tmp_path), str(tp), *names)
    assert len(reports) == len(names)
    for report in reports:
        for what in ("saved", "resumed", "same", "resumed by ours", "resumed from ours", "unchanged"):
            assert report[what] is True, (what, report)
        for what in ("as ours", "from the start", "after ours"):
            assert report[what] < near, (what, report)
        assert bool(report["swapped"]) is disk


@needs_deepspeed
def test_the_program_trains_stops_and_continues_under_either(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("\n".join(f"def f_{n}(x):\n    return x + {n}\n" for n in range(300)))
    (tmp_path / "ds.json").write_text(json.dumps({"zero_optimization": {"stage": 2}, "gradient_clipping": 0.5}))
    flags = f"--data.source {tmp_path}/text.txt --data.vocabulary 300 --data.validation 0.2 --precision fp32 --steps 6"
    flags += " --model.hidden 32 --model.layers 2 --model.heads 4 --batch.sequence 31 --batch.sequences 4"
    flags += f" --zero.deepspeed {tmp_path}/ds.json --layout.tp 2 --trainer.validate_every 2 --optimizer.eps 1e-6"
    environment = {k: v for k, v in os.environ.items() if k != "LOCAL_RANK"}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), *sys.path[1:]])

    def run(name: str, *more: str) -> list[dict[str, Any]]:
        command = [
            sys.executable,
            "-m",
            "launch",
            "train",
            "tiny",
            *flags.split(),
            "--out",
            str(tmp_path / name),
            *more,
        ]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900, cwd=ROOT)
        assert done.returncode == 0, done.stdout + done.stderr
        return [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]

    ours = run("ours")
    theirs = run("theirs", "--zero.backend", "deepspeed", "--trainer.save_every", "3")
    latest = tmp_path / "theirs/checkpoints/latest"
    latest.write_text("step-00000003\n")
    assert [row["loss"] for row in run("theirs", "--zero.backend", "deepspeed")] == [row["loss"] for row in theirs]
    latest.write_text("step-00000003\n")
    again = run("theirs", "--layout.tp", "1", "--layout.dp", "2", "--zero.stage", "3")
    for rows in (theirs, again):
        for key in ("loss", "grad_norm", "lr", "tokens", "validation_loss"):
            assert [row.get(key) for row in rows] == [pytest.approx(row.get(key), rel=1e-5) for row in ours], key
