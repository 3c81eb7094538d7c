"""T22, T23 and T24: data and options that cannot be used, and data that fails while it is used."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fault_cases.processes import below, ended, forked, lockstep, ran, stopped, timed
from fault_cases.runs import assert_loads, recipe, train
from fault_cases.suite import case
from launch.cli import main
from parallel.errors import DataError
from zero.data import DataConfig, Prepared, prepare

__all__: list[str] = []


@case("T22", ("broken row",), ("empty file",), ("id beyond the vocabulary",), ("vanished shard",))
def bad_data(folder: Path, what: str) -> None:
    """Named by file and line, or skipped and counted."""
    lines = ['{"text": "fine and good, and long enough"}', '{"text": ', '{"text": "also fine, and just as long"}'] * 3
    path = folder / "rows.jsonl"
    path.write_text("\n".join(lines))
    if what == "broken row":
        config = DataConfig(source=str(path), vocabulary=270)
        refused(lambda: prepare(config, folder / "a"), f"{path}:2")
        tolerant = DataConfig(source=str(path), vocabulary=270, skip_broken=True)
        assert prepare(tolerant, folder / "b").skipped["broken"] == 3
        return
    if what == "empty file":
        path.write_text("")
        refused(lambda: prepare(DataConfig(source=str(path), vocabulary=270), folder / "a"), "rows.jsonl")
        return
    prepared = prepare(DataConfig(source=str(path), vocabulary=270, skip_broken=True, validation=0.0), folder / "a")
    tokens = folder / "a" / "train.tokens"
    if what == "vanished shard":
        tokens.unlink()
        refused(lambda: Prepared.load(folder / "a"), "train.tokens: missing")
        return
    data = bytearray(tokens.read_bytes())
    data[6:8] = b"\xff\xff"
    tokens.write_bytes(data)
    packed = prepared.open("train")
    refused(lambda: packed.window(0, 8), "token 3 (byte 6): id 65535 is outside the vocabulary")


def refused(work: Callable[[], Any], expected: str) -> None:
    """It raises a DataError that says this."""
    try:
        work()
    except DataError as error:
        assert expected in str(error), error
    else:
        raise AssertionError("it was not refused")


@case("T23 there is no data worker to kill")
def no_workers(folder: Path) -> None:
    """A rank maps the packed tokens and reads them itself: no process is below it while it is at its data."""
    flags = ["train", str(recipe(folder)), "--out", str(folder / "run"), "--steps", "4"]
    pid = forked(lambda: main([*flags, "--trainer.fault", "stop@0,3,step.data"]))
    stopped(pid)
    assert below(pid) == []
    os.kill(pid, signal.SIGCONT)
    assert ended(pid) == 0
    assert assert_loads(folder / "run") == 4


def packed(folder: Path, split: str = "train") -> Path:
    """The packed tokens that the recipe's runs use."""
    (found,) = (folder / "data").glob(f"*/{split}.tokens")
    return found


def shown_by(folder: Path, work: Callable[[], int]) -> Callable[[], int]:
    """The same with what it says in a file."""

    def go() -> int:
        with (folder / "shown").open("w") as file:
            os.dup2(file.fileno(), 2)
        return work()

    return go


@case("T23 tokens cut short while training")
def tokens_cut_short(folder: Path) -> dict[str, float]:
    """Not a bus error: the file is named with what is left of it, and the exit code is that of refused input."""
    run, path = folder / "run", recipe(folder)
    flags = ["train", str(path), "--out", str(run), "--steps", "9", "--trainer.fault", "stop@0,3,step.data"]
    pid = forked(shown_by(folder, lambda: main(flags)))
    stopped(pid)
    tokens = packed(folder)
    size = tokens.stat().st_size
    os.truncate(tokens, 100)
    began = time.monotonic()
    os.kill(pid, signal.SIGCONT)
    assert ended(pid) == 2
    seconds = time.monotonic() - began
    expected = f"{tokens}: cut short while it is in use: 100 of {size} bytes are left"
    assert expected in (folder / "shown").read_text(), (folder / "shown").read_text()
    assert assert_loads(run) == 2
    assert ran(shown_by(folder, lambda: main(flags[:-2]))) == 2
    assert f"{tokens}: damaged: 100 bytes, expected {size}" in (folder / "shown").read_text()
    return {"detect": seconds}


@case("T23 tokens cut short, two ranks of the launcher", short=False)
def tokens_cut_short_on_ranks(folder: Path) -> dict[str, float]:
    """The rank that sees it says so, the other does not wait."""
    run = folder / "run"
    flags = ["train", recipe(folder), "--out", run, "--layout.dp", 2, "--steps", 9]
    program = lockstep(folder, *flags, "--trainer.fault", "stop@1,3,step.data")
    pid = program.rank(1)
    os.truncate(packed(folder), 100)
    began = time.monotonic()
    os.kill(pid, signal.SIGCONT)
    assert program.end() == 2, program.shown
    assert "train.tokens: cut short while it is in use: 100 of" in program.shown, program.shown
    assert assert_loads(run) == 2
    return {"detect": time.monotonic() - began}


@case("T23 tokens vanish while training")
def tokens_vanish(folder: Path) -> None:
    """What is mapped stays: the run goes on to its end. The next one says what is missing."""
    run, path = folder / "run", recipe(folder)
    flags = ["train", str(path), "--out", str(run), "--steps", "5", "--trainer.fault", "stop@0,3,step.data"]
    pid = forked(lambda: main(flags))
    stopped(pid)
    tokens = packed(folder)
    tokens.unlink()
    os.kill(pid, signal.SIGCONT)
    assert ended(pid) == 0
    assert assert_loads(run) == 5
    flags[5] = "9"
    assert ran(shown_by(folder, lambda: main(flags[:-2]))) == 2
    assert f"{tokens}: missing" in (folder / "shown").read_text()


@case("T23 data cannot be read on rank 1", ("eio",), ("raise",), every=2)
def reading_fails(folder: Path, kind: str) -> dict[str, float]:
    """That rank raises what it got; the other does not wait."""
    codes, detect = timed(2, folder, lambda: train(folder / "run", {"dp": 2}, fault=f"{kind}@1,3,step.data"))
    assert codes == [1, 1], codes
    assert assert_loads(folder / "run") == 2
    return {"detect": detect}


@case("T23 killed while data is prepared")
def killed_while_preparing(folder: Path) -> dict[str, float]:
    """Nothing half done is taken for data: the next start prepares it anew."""
    config = DataConfig(source=str(recipe(folder).parent / "corpus"), vocabulary=280)

    def kill(what: str, share: float) -> None:
        if what == "encoding":
            os.kill(os.getpid(), signal.SIGKILL)

    assert ran(lambda: prepare(config, folder / "data", kill) and None) == -signal.SIGKILL
    assert not (folder / "data").exists()
    began = time.monotonic()
    prepared = prepare(config, folder / "data")
    seconds = time.monotonic() - began
    assert prepared.splits["train"].tokens == len(Prepared.load(folder / "data", hashes=True).open("train")) > 100
    assert not [*folder.glob(".data.partial")]
    return {"recover": seconds}


@case("T24 options that cannot be", ())
def bad_options(folder: Path) -> None:
    """All of them at once, with the nearest names, before a rank starts; exit code 2."""
    shown = folder / "shown"
    flags = {
        "--stpes": "3",
        "--precision": "bf61",
        "--seed": "x",
        "--layout.tp": "5",
        "--trainer.keep": "0",
        "--trainer.fault": "kil@0,1,save.fsink",
    }

    def go() -> int:
        with shown.open("w") as file:
            os.dup2(file.fileno(), 2)
        words = [word for pair in flags.items() for word in pair]
        return main(["train", str(recipe(folder)), "--out", str(folder / "run"), *words])

    began = time.monotonic()
    assert ran(go) == 2
    assert time.monotonic() - began < 5
    text = shown.read_text()
    for expected in ("'steps'", "'bf16'", "seed = 'x'", "layout.tp = 5", "keep = 0", "'kill'", "'save.fsync'"):
        assert expected in text, text
    assert not (folder / "run").exists()
