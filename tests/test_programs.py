"""The programs as a user starts them: bare, under torchrun, with wrong input, interrupted, one after the other."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from launch import cli

ROOT = Path(__file__).parent.parent
CLOCK = {"seconds", "tokens_per_second", "mfu", "peak_memory"}

RECIPE = """
steps = 6
precision = "fp64"
[model]
hidden = 32
layers = 2
heads = 4
kv_heads = 2
feed_forward = 48
residual_dropout = 0.1
tied = true
[data]
source = "{source}"
vocabulary = 300
validation = 0.3
[batch]
sequence = 31
sequences = 4
[optimizer]
lr = 1e-2
[schedule]
warmup = 2
"""


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A recipe over a small corpus, in a folder of its own."""
    folder = tmp_path_factory.mktemp("programs")
    (folder / "corpus").mkdir()
    for index in range(12):
        lines = [f"def function_{index}_{line}(x):\n    return x + {line * index}\n" for line in range(20)]
        (folder / "corpus" / f"{index}.txt").write_text("\n".join(lines))
    (folder / "small.toml").write_text(RECIPE.format(source=folder / "corpus"))
    return folder / "small.toml"


def start(*words: object, module: tuple[str, ...] = ("-m", "launch")) -> subprocess.Popen[str]:
    """A program under the Python of the tests."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("LOCKSTEP_", "OMP_"))}
    environment["PYTHONPATH"] = str(ROOT)
    return subprocess.Popen(
        [sys.executable, *module, *map(str, words)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
        cwd=ROOT,
    )


def run(*words: object, code: int = 0, module: tuple[str, ...] = ("-m", "launch")) -> tuple[str, str]:
    """Run a program to its end and check its exit code."""
    process = start(*words, module=module)
    out, err = process.communicate(timeout=180)
    assert process.returncode == code, f"exit code {process.returncode}\n{out}\n{err}"
    return out, err


def metrics(folder: Path) -> list[dict[str, Any]]:
    """What a run reported, without what a clock says."""
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k not in CLOCK} for line in lines]


@pytest.fixture(scope="module")
def alone(recipe: Path) -> Path:
    """The run of one process."""
    out = recipe.parent / "alone"
    run("train", recipe, "--out", out)
    return out


def test_a_run_leaves_what_it_promises(alone: Path) -> None:
    rows = metrics(alone)
    assert [row["step"] for row in rows] == list(range(1, 7))
    assert rows[-1]["loss"] < rows[0]["loss"]
    assert rows[-1]["bits_per_byte"] > 0
    assert set(rows[0]) == {"step", "loss", "grad_norm", "lr", "tokens", "skipped"}
    assert 'precision = "fp64"' in (alone / "config.toml").read_text()
    assert (alone / "checkpoints" / "latest").read_text() == "step-00000006\n"


@pytest.mark.parametrize(
    ("flags", "module"),
    [
        (["--layout.tp", "2", "--layout.dp", "2"], ("-m", "launch")),
        (["--layout.tp", "4", "--batch.microbatches", "2"], ("-m", "launch")),
        (["--layout.tp", "2"], ("-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "launch")),
    ],
)
def test_the_losses_do_not_depend_on_the_layout(
    recipe: Path, alone: Path, tmp_path: Path, flags: list[str], module: tuple[str, ...]
) -> None:
    run("train", recipe, "--out", alone.parent / tmp_path.name, *flags, module=module)
    for ours, theirs in zip(metrics(alone.parent / tmp_path.name), metrics(alone), strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-9)
        assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-7)
        assert ours["tokens"] == theirs["tokens"]


def test_an_interrupted_run_continues_bit_for_bit(recipe: Path) -> None:
    flags = ("--steps", 40, "--layout.tp", 2)
    run("train", recipe, "--out", recipe.parent / "whole", *flags)
    parts = recipe.parent / "parts"
    process, deadline = start("train", recipe, "--out", parts, *flags), time.monotonic() + 60
    while time.monotonic() < deadline and process.poll() is None:
        if (parts / "metrics.jsonl").exists() and len((parts / "metrics.jsonl").read_text().splitlines()) > 1:
            break
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0, out + err
    run("train", recipe, "--out", parts, *flags)
    assert metrics(parts) == metrics(recipe.parent / "whole")


def test_export_generate_and_verify_follow(recipe: Path, alone: Path, tmp_path: Path) -> None:
    model = tmp_path / "model"
    run("export", alone, model, "--precision", "fp32")
    prompt = "def function_3_1("
    one, _ = run("generate", model, "--prompt", prompt, "--max-tokens", "24")
    two, _ = run("generate", model, "--prompt", prompt, "--max-tokens", "24", "--layout.tp", "2")
    theirs = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(model)
    ids = tokenizer(prompt, return_tensors="pt")
    text = tokenizer.decode(theirs.generate(**ids, max_new_tokens=24, do_sample=False)[0], skip_special_tokens=True)
    assert one == two == text + "\n"
    out, _ = run("verify", model, "--layout.tp", "2", "--precision", "fp64", "--steps", "2")
    assert "EQUAL: loss" in out
    assert "NOT EQUAL" not in out
    _, err = run("export", alone, model, code=2)
    assert "overwrite" in err


def test_verify_of_a_recipe(recipe: Path) -> None:
    out, _ = run("verify", recipe, "--layout.tp", "2", "--layout.dp", "2")
    assert "EQUAL: loss" in out
    assert "embedding.weight" in out


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["trian", "tiny"], ["unknown command 'trian' (did you mean 'train'?)"]),
        (["train"], ["expected RECIPE, got nothing"]),
        (["train", "tinny"], ["no recipe 'tinny' (did you mean 'tiny'?)"]),
        (
            ["train", "tiny", "--layout.tp", "5", "--stpes", "3", "--precision", "bf61", "--seed", "x"],
            [
                "layout.tp = 5",
                "'stpes' (did you mean 'steps'?)",
                "did you mean 'bf16'?",
                "seed = 'x': must be a whole number",
            ],
        ),
        (["train", "tiny", "--device", "cuda"], ["torch sees no CUDA device"]),
        (["generate", "/nonexistent", "--prompt", "x"], ["/nonexistent"]),
        (["generate", "/nonexistent"], ["give --prompt TEXT or --prompts FILE"]),
        (["export", "/nonexistent", "x"], ["/nonexistent: not a run folder"]),
        (["verify", "/nonexistent"], ["no recipe '/nonexistent'"]),
        (["train", "tiny", "--data.source", "/nonexistent"], ["/nonexistent"]),
    ],
)
def test_wrong_input_is_refused_with_every_reason(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], words: list[str], expected: list[str]
) -> None:
    if torch.cuda.is_available() and "cuda" in words:
        return
    extra = ["--out", str(tmp_path / "run")] if words[0] == "train" else []
    assert cli.main([*words, *extra]) == 2
    out, err = capfd.readouterr()
    for part in expected:
        assert part in err, err
    assert "Traceback" not in err
    assert out == ""


def test_a_refusal_is_the_exit_code_of_the_program() -> None:
    out, err = run("train", "tinny", code=2)
    assert out == ""
    assert err.startswith("no recipe 'tinny' (did you mean 'tiny'?)")


def test_a_world_that_is_not_the_layout_is_refused(recipe: Path, tmp_path: Path) -> None:
    module = ("-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "launch")
    _, err = run("train", recipe, "--out", tmp_path / "run", "--layout.tp", "4", code=1, module=module)
    assert "torchrun started 2 ranks, but layout pp=1 dp=1 cp=1 tp=4 needs 4" in err


def test_a_broken_line_and_an_empty_corpus(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "fine"}\n{"text": \n{"txt": "no"}\n')
    (tmp_path / "r.toml").write_text(RECIPE.format(source=tmp_path / "a.jsonl"))
    _, err = run("train", tmp_path / "r.toml", "--out", tmp_path / "run", code=2)
    assert f"{tmp_path / 'a.jsonl'}:2" in err
    assert f"{tmp_path / 'a.jsonl'}:3" in err
    (tmp_path / "a.jsonl").write_text('{"text": "   "}\n')
    _, err = run("train", tmp_path / "r.toml", "--out", tmp_path / "run", code=2)
    assert "a.jsonl" in err


def test_help_lists_every_option(capsys: pytest.CaptureFixture[str]) -> None:
    out, _ = run("--help")
    assert "lockstep train RECIPE" in out
    for command in ("train", "export", "generate", "serve", "verify"):
        assert cli.main([command, "--help"]) == 0
        out = capsys.readouterr().out
        assert "options:" in out and "--help" not in out


def test_a_refused_start_leaves_nothing_that_refuses_the_next(recipe: Path, tmp_path: Path) -> None:
    out = recipe.parent / tmp_path.name
    run("train", recipe, "--out", out, "--data.source", "/nonexistent", code=2)
    run("train", recipe, "--out", out, "--steps", 1)
    _, err = run("train", recipe, "--out", out, "--steps", 1, "--trainer.z-loss", "0.1", "--seed", 9, code=2)
    assert "trainer.z_loss was 0.0, now 0.1" in err
    assert "seed was 0, now 9" in err


def test_fine_tuning_keeps_the_tokenizer_and_export_needs_no_particular_folder(
    recipe: Path, alone: Path, tmp_path: Path
) -> None:
    run("export", alone, tmp_path / "first")
    out = recipe.parent / tmp_path.name
    flags = ("--init", tmp_path / "first", "--data.source", recipe, "--data.validation", 0, "--steps", 1)
    _, err = run("train", recipe, "--out", out, "--data.text-key", "", *flags, code=2)
    assert "text_key" in err
    (tmp_path / "more.txt").write_text("x = 1\n" * 200)
    flags = (*flags[:3], tmp_path / "more.txt", *flags[4:])
    run("train", recipe, "--out", out, "--layout.tp", 2, *flags)
    (out.parent / "data").rename(out.parent / "elsewhere")
    try:
        run("export", out, tmp_path / "second")
    finally:
        (out.parent / "elsewhere").rename(out.parent / "data")
    first, second = (AutoTokenizer.from_pretrained(tmp_path / name) for name in ("first", "second"))
    assert first.get_vocab() == second.get_vocab()
    (tmp_path / "first" / "model.safetensors").write_bytes(b"\0" * 100)
    _, err = run("train", recipe, "--out", tmp_path / "third", "--init", tmp_path / "first", code=2)
    assert "model.safetensors" in err
