"""T19 and T20: gradients that are not finite on one rank, and losses that jump."""

from __future__ import annotations

import json
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import load_file
from test_trainer import batches

from fault_cases.processes import lockstep, ran, world
from fault_cases.runs import assert_loads, assert_nothing_lost, assert_same, lines, recipe, resumed, start, train
from fault_cases.suite import case
from parallel.models.batch import Batch
from zero.checkpoint import Checkpoint
from zero.optimizer import ZeroConfig
from zero.trainer import NotFiniteError

__all__: list[str] = []

LAYOUTS: dict[str, tuple[dict[str, int], ZeroConfig]] = {
    "dp2": ({"dp": 2}, ZeroConfig()),
    "dp2-zero2": ({"dp": 2}, ZeroConfig(stage=2)),
    "dp2-zero3": ({"dp": 2}, ZeroConfig(stage=3)),
    "dp2-int8": ({"dp": 2}, ZeroConfig(stage=2, gradient_bits=8)),
    "dp2-top": ({"dp": 2}, ZeroConfig(stage=1, top_k=0.1)),
    "tp2": ({"tp": 2}, ZeroConfig()),
    "pp2": ({"pp": 2}, ZeroConfig(stage=1)),
}


def on_two(folder: Path, layout: str, run: Path, **options: Any) -> tuple[list[int], list[Any]]:
    """Train on two ranks; how each ended, and what each says of its steps, or which error it raised."""

    def work() -> None:
        degrees, zero = LAYOUTS[layout]
        trainer = start(run, degrees, zero=zero, **options)
        step, said = trainer.step, list[Any]()

        def noted(microbatches: Any, **more: Any) -> Any:
            metrics = step(microbatches, **more)
            said.append([metrics.step, metrics.skipped, metrics.not_finite, metrics.spike, metrics.loss])
            return metrics

        trainer.step = noted  # type: ignore[method-assign]
        try:
            trainer.run()
        except NotFiniteError as error:
            said = [str(error)]
        (folder / f"said-{dist.get_rank()}").write_text(json.dumps(said))

    codes = world(2, folder, work)
    said = [folder / f"said-{rank}" for rank in range(2)]
    return codes, [json.loads(path.read_text()) if path.exists() else None for path in said]


def state(run: Path, step: int) -> dict[str, torch.Tensor]:
    """All that a checkpoint holds."""
    files = sorted((run / "checkpoints" / f"step-{step:08d}").glob("*.safetensors"))
    return {f"{file.stem} {key}": value for file in files for key, value in load_file(file).items()}


@case("T19 skipped,", *[(kind, layout) for layout in LAYOUTS for kind in ("nan", "inf")], every=5)
def not_finite(folder: Path, kind: str, layout: str) -> None:
    """Every rank leaves out the same step and names rank and parameter; nothing has changed, the next one trains."""
    run = folder / "run"
    codes, said = on_two(folder, layout, run, keep=4, fault=f"{kind}@1,3,step.backward")
    assert codes == [0, 0] and said[0] == said[1], said
    assert [row[1] for row in said[0]] == [False, False, True, False], said
    names = {name.rpartition("|")[0].split(" ")[-1].split("|")[0] for name in state(run, 3)}
    where, _, parameter = said[0][2][2].partition(": ")
    assert where == "rank 1" and parameter in names, (said[0][2], names)
    assert lines(run)[2]["not_finite"] == said[0][2][2] and lines(run)[2]["skipped"]
    before, then, after = (state(run, step) for step in (2, 3, 4))
    assert before.keys() == then.keys() and all(torch.equal(value, then[key]) for key, value in before.items())
    assert all(value.isfinite().all() for value in after.values())
    assert any(not torch.equal(value, after[key]) for key, value in then.items())


@case("T19 stopped,", *[("nan", layout) for layout in ("dp2", "dp2-zero3", "pp2")], every=3)
def not_finite_stops(folder: Path, kind: str, layout: str) -> dict[str, float]:
    """Every rank raises the same error in the same step; the step before is saved, and goes on as if nothing was."""
    run, whole = folder / "run", folder / "whole"
    options = {"save_every": 0, "on_not_finite": "stop"}
    codes, said = on_two(folder, layout, run, fault=f"{kind}@1,3,step.backward", **options)
    assert codes == [0, 0] and said[0] == said[1], said
    (text,) = said[0]
    assert text.startswith("step 3: gradients are not finite (rank 1: ") and "nothing was changed" in text, text
    assert assert_loads(run) == 2
    began = time.monotonic()
    assert on_two(folder, layout, run, **options)[0] == [0, 0]
    seconds = time.monotonic() - began
    assert on_two(folder, layout, whole, **options)[0] == [0, 0]
    assert_nothing_lost(run, whole)
    return {"recover": seconds}


@case("T19 stopped, two ranks of the launcher", short=False)
def not_finite_stops_the_launcher(folder: Path) -> None:
    """Exit code 1, and one traceback that says where."""
    run = folder / "run"
    flags = ["train", recipe(folder), "--out", run, "--layout.dp", 2, "--steps", 9, "--trainer.on_not_finite", "stop"]
    program = lockstep(folder, *flags, "--trainer.fault", "nan@1,3,step.backward")
    assert program.end() == 1, program.shown
    assert "NotFiniteError: step 3: gradients are not finite (rank 1: " in program.shown, program.shown
    assert program.shown.count("Traceback") == 1
    assert assert_loads(run) == 2


SPIKES = "; ".join(f"spike@{rank},6,step.forward" for rank in range(2))


@case("T20 told,", ("dp2", 2), ("dp2", 1), ("tp2", 2), ("pp2", 2), every=2)
def spike_told(folder: Path, layout: str, ranks: int) -> None:
    """A loss of ten times what it was, on all data ranks or on one, is told with what the step learned from."""
    run = folder / "run"
    codes, said = on_two(folder, layout, run, steps=8, fault=SPIKES if ranks == 2 else SPIKES.partition(";")[0])
    assert codes == [0, 0] and said[0] == said[1], said
    told = {line["step"]: line for line in lines(run) if "spike" in line}
    assert [*told] == [6], told
    assert (9 if ranks == 2 else 4) < told[6]["spike"] < 12
    assert [sample["window"] for sample in told[6]["samples"]] == [*range(40, 48)]


def without_sixth(step: int) -> int:
    """Which step's data a step learns from where that of the sixth is left out."""
    return step if step < 5 else step + 1


def share_of(layout: str, which: Callable[[int], int]) -> Callable[[int], list[Batch]]:
    """Data of other steps, for a rank of two or of one."""
    size = 1 if layout == "single" else LAYOUTS[layout][0].get("dp", 1)
    parts = 1 if layout == "single" else LAYOUTS[layout][0].get("pp", 1)
    return lambda step: batches(which(step), dist.get_rank() if size > 1 else 0, size, parts)


@case("T20 gone back,", ("dp2-zero3", False), ("tp2", True))
@case(
    "T20 gone back,",
    *[(layout, False) for layout in LAYOUTS if layout != "dp2-zero3"],
    *[(layout, True) for layout in ("dp2-zero3", "pp2")],
    short=False,
)
def spike_rewound(folder: Path, layout: str, background: bool) -> None:
    """Back at the checkpoint of step 4, the data of step 6 is passed over: the same, to the bit, as never having it."""
    run, whole = folder / "run", folder / "whole"
    options = {"steps": 8, "save_every": 4, "save_async": background}
    codes, said = on_two(folder, layout, run, rewind=1, fault=SPIKES, **options)
    assert codes == [0, 0] and said[0] == said[1], said
    assert [row[0] for row in said[0]] == [1, 2, 3, 4, 5, 6, 5, 6, 7, 8], said
    codes, _ = on_two(folder, layout, whole, data=share_of(layout, without_sixth), **options)
    assert codes == [0, 0]
    assert_nothing_lost(run, whole, but=("rewound",))
    (line,) = [line for line in lines(run) if "rewound" in line]
    rewound = line["rewound"]
    assert (line["step"], rewound["from_step"], rewound["to_step"], rewound["share"]) == (5, 6, 4, 5), line
    assert 9 < rewound["spike"] < 12
    assert [sample["window"] for sample in rewound["samples"]] == [*range(40, 48)]
    assert Checkpoint.open(run / "checkpoints" / "step-00000008").manifest.past.passed_over == (5,)


@case("T20 gone back, then killed", ("step.forward",), ("save.fsync",), every=2)
def spike_rewound_and_killed(folder: Path, point: str) -> dict[str, float]:
    """What is passed over is in the checkpoints: a run that is killed and continued goes on passing it over."""
    run, whole = folder / "run", folder / "whole"
    options = {"steps": 9, "save_every": 3}
    fault = f"spike@0,6,step.forward; kill@0,{8 if point == 'step.forward' else 9},{point}"
    assert ran(lambda: train(run, rewind=2, fault=fault, **options) and None) == -signal.SIGKILL
    assert assert_loads(run) == 6
    recover = resumed(run, rewind=2, **options)
    assert ran(lambda: train(whole, data=share_of("single", without_sixth), **options) and None) == 0
    assert_nothing_lost(run, whole, but=("rewound",))
    return {"recover": recover}


@case("T20 gone back, but not for ever")
def spikes_again(folder: Path) -> None:
    """After as many spikes as are allowed the next is told and no more."""
    run, whole = folder / "run", folder / "whole"
    fault = "; ".join(f"spike@0,{step},step.forward" for step in (4, 5, 6))
    options = {"steps": 7, "save_every": 3}
    assert ran(lambda: train(run, rewind=2, fault=fault, **options) and None) == 0
    told = [(line["step"], "rewound" in line, "spike" in line) for line in lines(run)]
    assert told == [(s, s == 4, s == 6) for s in range(1, 8)], told
    past = Checkpoint.open(run / "checkpoints" / "step-00000007").manifest.past
    assert past.passed_over == (3, 5), past
    share = {3: 4, 4: 6, 5: 7, 6: 8}
    work = lambda: train(  # noqa: E731
        whole,
        data=share_of("single", lambda step: share.get(step, step)),
        fault="spike@0,6,step.forward",
        **options,
    )
    assert ran(lambda: work() and None) == 0
    assert_same(run, whole, 7)
