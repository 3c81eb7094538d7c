"""Pipelines that fail: every rank says where and why, soon, and nothing stays behind; what cannot be never starts."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import Ranks
from torch import Tensor

import launch.ranks
from launch.cli import main
from launch.local import run_local
from parallel.deferral import Deferral
from parallel.errors import ConfigError, PipelineError, ScheduleError
from parallel.mesh import Layout, Mesh
from parallel.models.build import Build
from parallel.models.config import DecoderConfig
from parallel.models.decoder import build_model
from parallel.models.pipelined import PipelinedModel
from parallel.pp import Action, PipelineConfig, make_schedule, parse_schedule
from parallel.pp.action import parse_action
from parallel.pp.run import Pipeline

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def own(request: pytest.FixtureRequest) -> Iterator[Ranks]:
    """A pool for failures alone: what they leave under way is nobody else's."""
    pool = Ranks([*request.config.getini("filterwarnings")])
    yield pool
    pool.close()


class _Product(torch.autograd.Function):
    """A linear layer that puts its weight gradient off, and does something else as well at every turn."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, deferral: Deferral, at: Callable[[str], None]) -> Tensor:
        """``at`` is told F, I and W."""
        ctx.save_for_backward(x, weight)
        ctx.rest = weight, deferral, at
        at("F")
        return x @ weight.t()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        """Of input and weight."""
        (x, weight), (parameter, deferral, at) = ctx.saved_tensors, ctx.rest

        def form() -> Tensor:
            at("W")
            return grads[0].t() @ x

        at("I")
        return grads[0] @ weight, deferral(parameter, form), None, None


class Faulty:
    """Stages that do something at some of their actions: ``{"2W3": "fail"}``; B stands for I and W."""

    def __init__(self, faults: dict[str, str]) -> None:
        self.faults = {parse_action(text): what for text, what in faults.items()}
        self.weights = [torch.eye(3, dtype=torch.float64).requires_grad_() for _ in range(8)]
        self.deferral = Deferral()
        self.last = 7

    def __call__(self, stage: int, x: Tensor | None, microbatch: int) -> Tensor:
        def at(op: str) -> None:
            what = self.faults.get(Action(stage, op, microbatch), "")
            if what == "fail":
                raise ValueError(f"no {stage}{op}{microbatch} today")
            time.sleep(float(what or 0))

        rows = torch.ones(2, 3, dtype=torch.float64) if x is None else x
        y = _Product.apply(rows, self.weights[stage], self.deferral, at)
        return y.sum() if stage == self.last else y

    @staticmethod
    def shape(stage: int, microbatch: int) -> tuple[int, int]:
        """Of the input of every stage."""
        return 2, 3


def run_faulty(schedule: str, faults: dict[str, str], timeout_s: float) -> tuple[str, float, str]:
    """On the ranks: a step that fails; the message, after how long, and what was behind it."""
    mesh, faulty = Mesh.build(Layout(pp=4)), Faulty(faults)
    dist.new_group([dist.get_rank()], use_local_synchronization=True)  # so that the next test has other groups
    table = make_schedule(schedule, 4, 8)
    faulty.last = table.stages - 1
    pipeline = Pipeline(mesh, faulty, faulty.shape, torch.float64, deferral=faulty.deferral, timeout_s=timeout_s)
    started = time.monotonic()
    try:
        pipeline.run(table, list(range(8)))
    except PipelineError as error:
        return str(error), time.monotonic() - started, repr(error.__cause__)
    return "", time.monotonic() - started, ""


@pytest.mark.parametrize(
    ("schedule", "action", "rank", "told"),
    [
        ("1f1b", "2F1", 2, "2F1 (forward of microbatch 1 through stage 2)"),
        ("1f1b", "0F4", 0, "0F4 (forward of microbatch 4 through stage 0)"),
        ("1f1b", "1I0", 1, "1B0 (backward of microbatch 0 through stage 1)"),
        ("zb-v", "7I2", 0, "7I2 (backward of the input of microbatch 2 through stage 7)"),
        ("zb-h1", "1W0", 1, "1W0 (backward of the weights of microbatch 0 through stage 1)"),
    ],
)
def test_a_stage_that_raises_is_named_by_every_rank(
    own: Ranks, schedule: str, action: str, rank: int, told: str
) -> None:
    results = own.run(run_faulty, world=4, schedule=schedule, faults={action: "fail"}, timeout_s=60)
    texts = {text for text, _, _ in results}
    stage = parse_action(action).stage
    assert texts == {f"rank {rank} (stage {stage} of the pipeline) failed in {told}: ValueError: no {action} today"}
    assert [repr(ValueError(f"no {action} today")) in cause for _, _, cause in results] == [r == rank for r in range(4)]
    assert max(seconds for _, seconds, _ in results) < 6


def test_two_ranks_that_raise_agree_on_one(own: Ranks) -> None:
    results = own.run(run_faulty, world=4, schedule="1f1b", faults={"1F1": "fail", "2F0": "fail"}, timeout_s=60)
    assert len({text for text, _, _ in results}) == 1
    assert "today" in results[0][0]


@pytest.mark.parametrize(("action", "rank"), [("0F0", 0), ("2I1", 2)])
def test_a_rank_that_stops_answering_is_named(own: Ranks, action: str, rank: int) -> None:
    """Also by those that wait for it by way of others."""
    results = own.run(run_faulty, world=4, schedule="1f1b", faults={action: "3.5"}, timeout_s=1)
    texts = {text for text, _, _ in results}
    assert len(texts) == 1, texts
    (text,) = texts
    assert text.startswith(f"rank {rank} stopped answering: for 1 s rank "), text
    assert all(seconds < 3 for r, (_, seconds, _) in enumerate(results) if r != rank)


def test_a_rank_that_is_only_slow_is_waited_for(own: Ranks) -> None:
    results = own.run(run_faulty, world=4, schedule="1f1b", faults={"1F0": "0.8", "2I3": "0.8"}, timeout_s=20)
    assert [text for text, _, _ in results] == [""] * 4


def forward(stage: int, x: Tensor | None, rows: Tensor) -> Tensor:
    return rows if x is None else x


def test_steps_that_do_not_fit_are_refused() -> None:
    pipeline = Pipeline(Mesh.single(), forward, lambda stage, rows: rows.shape)
    with pytest.raises(ScheduleError, match="the schedule has 4 microbatches, the step 3"):
        pipeline.run(make_schedule("1f1b", 1, 4), [torch.ones(1)] * 3)
    with pytest.raises(ScheduleError, match="the schedule has 2 ranks, the pipeline 1"):
        pipeline.run(make_schedule("1f1b", 2, 4), [torch.ones(1)] * 4)
    with pytest.raises(ScheduleError, match="0F0: is in the table twice"):
        pipeline.run(parse_schedule("0F0 0B0 0F0"), [torch.ones(1)])
    with pytest.raises(PipelineError, match=r"0F0 .*shape \(2,\).*scalar"):
        pipeline.run(make_schedule("1f1b", 1, 1), [torch.ones(2)])


def test_a_model_of_other_stages_is_refused() -> None:
    mesh = Mesh.fake(Layout(pp=2), 1)
    model = build_model(DecoderConfig(vocabulary=9, hidden=8, layers=2, heads=2), Build(mesh=Mesh.single()))
    with pytest.raises(ConfigError, match=r"stages \[1\] of 2 on this rank; the model was built with \[0\] of 1"):
        PipelinedModel(model, mesh, PipelineConfig()).table(4)


def doubled(folder: Path) -> list[str]:
    (folder / "doubled.txt").write_text("0F0 0F1 0F0 0B0 0B1  # rank 0\n1F0 1B0 1F1 1B1\n")
    return ["--layout.pp", "2", "--pp.schedule", str(folder / "doubled.txt"), "--batch.microbatches", "2"]


def broken(folder: Path) -> list[str]:
    (folder / "broken.txt").write_text("0F0 0Q1 0B0\n1F0 xyz 1B0\n")
    return ["--layout.pp", "2", "--pp.schedule", str(folder / "broken.txt"), "--batch.microbatches", "1"]


def other(folder: Path) -> list[str]:
    (folder / "other.txt").write_text(str(make_schedule("zb-h1", 2, 4)) + "\n")
    return ["--layout.pp", "2", "--pp.schedule", str(folder / "other.txt"), "--batch.microbatches", "8"]


def only_forward(folder: Path) -> list[str]:
    (folder / "only.txt").write_text(str(make_schedule("forward", 2, 4)) + "\n")
    return ["--layout.pp", "2", "--pp.schedule", str(folder / "only.txt"), "--batch.microbatches", "4"]


REFUSED: list[tuple[Sequence[str] | Callable[[Path], list[str]], list[str]]] = [
    (["--layout.pp", "2", "--pp.schedule", "zbv"], ["unknown pipeline schedule 'zbv' (did you mean 'zb-v'?)"]),
    (["--layout.pp", "2", "--pp.layers", "1,2"], ["pp.layers = 1,2", "the nearest that works: 2,2"]),
    (["--layout.pp", "3", "--pp.schedule", "dualpipe"], ["even number of ranks, not 3", "dualpipev with 3 ranks"]),
    (["--layout.pp", "8"], ["4 layers are fewer than 8 pipeline stages", "4 stages"]),
    (["--layout.pp", "4", "--pp.schedule", "zb-v"], ["4 layers are fewer than 8 pipeline stages"]),
    (["--layout.pp", "2", "--pp.schedule", "interleaved", "--pp.virtual", "3"], ["fewer than 6 pipeline stages"]),
    (["--layout.pp", "2", "--pp.virtual", "2"], ["schedule 1f1b has 1 stage a rank, not 2", "interleaved"]),
    (["--pp.virtual", "0", "--pp.timeout-s", "0"], ["virtual = 0: must be", "timeout_s = 0.0: must be"]),
    (["--layout.pp", "2", "--pp.schedule", "/nonexistent.txt"], ["/nonexistent.txt"]),
    (["--layout.pp", "2", "--pp.schedule", "forward"], ["'forward' has no backward pass", "1f1b"]),
    (["--pp.balance", "evn"], ["pp.balance", "'even'"]),
    (doubled, ["doubled.txt: rank 0, cell 3, 0F0: is in the table twice"]),
    (broken, ["broken.txt: line 1, cell 2: '0Q1': no kind of action", "broken.txt: line 2, cell 2: 'xyz'"]),
    (other, ["other.txt is for 2 ranks and 4 microbatches, not for 2 and 8"]),
    (only_forward, ["only.txt' has no backward pass"]),
]


@pytest.mark.parametrize(("words", "expected"), REFUSED, ids=[str(words) for words, _ in REFUSED])
def test_what_cannot_be_is_refused_before_a_rank_starts(
    words: Sequence[str] | Callable[[Path], list[str]],
    expected: list[str],
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    flags = words(tmp_path) if callable(words) else words

    def started(*arguments: object, **options: object) -> int:
        raise AssertionError("ranks are started")

    monkeypatch.setattr(launch.ranks, "run_local", started)
    monkeypatch.setattr(launch.ranks.Mesh, "build", started)
    (tmp_path / "corpus.txt").write_text("x = 1\n" * 50)
    out = tmp_path / "run"
    code = main(["train", "tiny", *flags, "--out", str(out), "--data.source", str(tmp_path / "corpus.txt")])
    text = capfd.readouterr().err
    assert code == 2, text
    for part in expected:
        assert part in text
    assert "Traceback" not in text
    assert not out.exists()


RECIPE = """
steps = 100000
[model]
hidden = 16
layers = 2
heads = 2
feed_forward = 24
[data]
source = "{source}"
vocabulary = 300
[batch]
sequence = 15
sequences = 4
"""


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A recipe that runs until it is stopped; its data is prepared."""
    folder = tmp_path_factory.mktemp("faults")
    (folder / "corpus.txt").write_text("\n".join(f"def f{n}(x): return x + {n}" for n in range(400)))
    (folder / "endless.toml").write_text(RECIPE.format(source=folder / "corpus.txt"))
    with program("train", folder / "endless.toml", "--out", folder / "prepared", "--steps", 1) as process:
        assert process.wait(timeout=60) == 0, process.stderr and process.stderr.read()
    return folder / "endless.toml"


@contextlib.contextmanager
def program(*words: object) -> Iterator[subprocess.Popen[str]]:
    """A program, which is gone afterwards with all that it started."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("LOCKSTEP_", "OMP_"))}
    process = subprocess.Popen(
        [sys.executable, "-m", "launch", *map(str, words)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment | {"PYTHONPATH": str(ROOT)},
        cwd=ROOT,
    )
    try:
        yield process
    finally:
        for pid in [*ranks_of(process.pid).values(), process.pid]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        process.wait()


def ranks_of(launcher: int) -> dict[int, int]:
    """Rank -> pid, of the processes that a launcher started."""
    found: dict[int, int] = {}
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError, ValueError):
            if int((folder / "stat").read_text().rpartition(")")[2].split()[1]) == launcher:
                variables = dict(v.partition("=")[::2] for v in (folder / "environ").read_text().split("\0"))
                found[int(variables.get("LOCKSTEP_RANK", ""))] = int(folder.name)
    return found


def alive(pid: int) -> bool:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    return False


LINUX = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")


@LINUX
def test_a_rank_that_is_killed_ends_the_run(recipe: Path) -> None:
    out = recipe.parent / "killed"
    with program("train", recipe, "--out", out, "--layout.pp", 2, "--pp.schedule", "zb-h1") as process:
        deadline = time.monotonic() + 60
        while not ((out / "metrics.jsonl").exists() and (out / "metrics.jsonl").stat().st_size > 500):
            assert process.poll() is None, process.communicate()
            assert time.monotonic() < deadline
            time.sleep(0.05)
        pids = ranks_of(process.pid)
        assert sorted(pids) == [0, 1]
        os.kill(pids[1], signal.SIGKILL)
        _, err = process.communicate(timeout=30)
        assert process.returncode not in (0, None)
        assert "rank 1 failed (killed by SIGKILL" in err, err
        assert not any(map(alive, pids.values()))


STOPS = """
import os, signal, sys, time
import torch
from launch.env import detect
from launch.meeting import connect
from launch.local import run_rank
from parallel.mesh import Layout, Mesh
from parallel.pp import make_schedule
from parallel.pp.run import Pipeline

culprit, folder = int(sys.argv[1]), sys.argv[2]

def main():
    connect(detect(os.environ), "cpu")
    mesh = Mesh.build(Layout(pp=2))
    open(f"{folder}/{mesh.rank}", "w").write(str(os.getpid()))
    weight = torch.ones(3, requires_grad=True)

    def forward(stage, x, microbatch):
        if mesh.rank == culprit and microbatch == 3:
            os.kill(os.getpid(), signal.SIGSTOP)
        if mesh.rank != culprit and microbatch == (3 if culprit else 1):
            time.sleep(0.7)  # so that the culprit has said that it waits, and stops before it can say that it goes on
        y = weight * (torch.ones(2, 3) if x is None else x)
        return y.sum() if stage else y

    Pipeline(mesh, forward, lambda stage, microbatch: (2, 3), timeout_s=3).run(make_schedule("1f1b", 2, 8), range(8))

sys.exit(run_rank(main))
"""


@LINUX
@pytest.mark.parametrize("culprit", [0, 1])
def test_a_rank_that_is_stopped_ends_the_run(tmp_path: Path, culprit: int, capfd: pytest.CaptureFixture[str]) -> None:
    """Rank 0 serves the rendezvous store: when it stops, nobody can be told anything."""
    command = [sys.executable, "-c", STOPS, str(culprit), str(tmp_path)]
    started = time.monotonic()
    code = run_local(command, 2, environ=os.environ | {"PYTHONPATH": str(ROOT)}, grace_s=1)
    err = capfd.readouterr().err
    assert code not in (0, None)
    assert f"rank {culprit} stopped answering: for 3 s rank {1 - culprit} has waited in" in err, err
    assert f"rank {1 - culprit} failed" in err
    assert time.monotonic() - started < 25
    assert not any(alive(int((tmp_path / str(rank)).read_text())) for rank in (0, 1))
