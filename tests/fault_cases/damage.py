"""T14 and T15: checkpoints that are damaged, or that hold a pickle."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from test_trainer import trainer_on

from fault_cases.processes import ran
from fault_cases.runs import STEPS, assert_nothing_lost, resumed, train, unbroken
from fault_cases.suite import case
from parallel.errors import CheckpointError
from parallel.mesh import Mesh
from zero.run import RunFolder
from zero.trainer import TrainerConfig

__all__: list[str] = []


def flip(folder: Path, name: str) -> None:
    """One bit in the middle."""
    data = bytearray((folder / name).read_bytes())
    data[len(data) // 2] ^= 4
    (folder / name).write_bytes(data)


DAMAGE: dict[str, tuple[str, Callable[[Path], Any]]] = {
    "flipped bit": ("rank-00000.safetensors", lambda f: flip(f, "rank-00000.safetensors")),
    "truncated": ("rank-00000.safetensors", lambda f: os.truncate(f / "rank-00000.safetensors", 5000)),
    "missing": ("rank-00000.safetensors", lambda f: (f / "rank-00000.safetensors").unlink()),
    "extra": (
        "rank-00001.safetensors",
        lambda f: shutil.copy(f / "rank-00000.safetensors", f / "rank-00001.safetensors"),
    ),
    "manifest flipped": ("manifest.json", lambda f: flip(f, "manifest.json")),
    "manifest cut": ("manifest.json", lambda f: os.truncate(f / "manifest.json", 100)),
    "manifest missing": ("", lambda f: (f / "manifest.json").unlink()),
    "all missing": ("", lambda f: shutil.rmtree(f)),
}


@case("T14", *[(name,) for name in DAMAGE], every=3)
def damaged(folder: Path, name: str) -> dict[str, float]:
    """Refused by name, the one before offered; taken if that is asked for, and then nothing is lost."""
    whole, run = unbroken(folder), folder / "run"
    assert ran(lambda: train(run, keep=2, fault="kill@0,4,step.forward") and None) == -signal.SIGKILL
    file, damage = DAMAGE[name]
    damage(run / "checkpoints" / "step-00000003")
    try:
        trainer_on(Mesh.single(), dtype=torch.float32, folder=RunFolder(run)).resume()
    except CheckpointError as error:
        assert f"step-00000003/{file}" in str(error) if file else "step-00000003" in str(error), error
        assert "step-00000002 is whole: give --trainer.fall_back true" in str(error), error
    else:
        raise AssertionError("it was not refused")
    recover = resumed(run, fall_back=True, keep=1)
    assert_nothing_lost(run, whole)
    return {"recover": recover}


@case("T14 all are damaged", ())
def all_damaged(folder: Path) -> None:
    run = folder / "run"
    assert ran(lambda: train(run, keep=2) and None) == 0
    for path in (run / "checkpoints").glob("step-*"):
        flip(path, "rank-00000.safetensors")
    for fall_back in (False, True):
        try:
            loop = TrainerConfig(fall_back=fall_back)
            trainer_on(Mesh.single(), dtype=torch.float32, folder=RunFolder(run), loop=loop).resume()
        except CheckpointError as error:
            assert "no other checkpoint is whole" in str(error)
        else:
            raise AssertionError("it was not refused")


class Payload:
    """Leaves a canary when it is unpickled."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.canary}",)


@case(
    "T15 pickle",
    ("rank-00000.safetensors",),
    ("manifest.json",),
    (".metadata",),
    ("optimizer.pt",),
    ("../latest",),
    every=2,
)
def pickled(folder: Path, name: str) -> None:
    """Nothing of it is ever executed, even where the manifest vouches for it."""
    run, canary = folder / "run", folder / "canary"
    assert ran(lambda: train(run) and None) == 0
    there = run / "checkpoints" / f"step-{STEPS:08d}"
    payload = pickle.dumps(Payload(canary))
    pickle.loads(payload)
    assert canary.exists(), "the payload works"
    canary.unlink()
    (there / name).write_bytes(payload)
    for vouched in (False, True):
        if vouched and name == "rank-00000.safetensors":
            vouch(there, name)
        try:
            trainer_on(Mesh.single(), dtype=torch.float32, folder=RunFolder(run)).resume()
        except CheckpointError as error:
            assert Path(name).name in str(error), error
        else:
            raise AssertionError("it was not refused")
    assert not canary.exists(), "the payload was executed"


def vouch(folder: Path, name: str) -> None:
    """Make the manifest agree with a file."""
    manifest = json.loads((folder / "manifest.json").read_text())
    del manifest["sha256"]
    data = (folder / name).read_bytes()
    manifest["files"][0] |= {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    digest = hashlib.sha256(json.dumps(manifest, sort_keys=True, separators=(",", ":")).encode()).hexdigest()
    (folder / "manifest.json").write_text(json.dumps({"sha256": digest, **manifest}))
