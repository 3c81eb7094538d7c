"""The command line as a stranger types it: help, names of other programs, slips of the finger."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from launch import cli
from launch.bench.config import BenchConfig
from launch.generate import GenerateConfig
from launch.recipe import Recipe
from launch.serve import ServeConfig
from launch.spellings import _SPELLINGS
from parallel.config import options, resolve, to_toml
from parallel.errors import ConfigError

COMMANDS = ("train", "export", "import", "reshard", "compare", "generate", "serve", "verify", "draw", "bench")


def told(capfd: pytest.CaptureFixture[str], *words: str) -> list[str]:
    """The lines with which a command line is refused."""
    assert cli.main(words) == 2, words
    out, err = capfd.readouterr()
    assert out == "" and "Traceback" not in err
    return err.splitlines()


@pytest.mark.parametrize("command", COMMANDS)
def test_help_spells_options_as_they_are_typed(command: str, capfd: pytest.CaptureFixture[str]) -> None:
    texts = []
    for words in ([command, "--help"], [command, "-h"], ["help", command]):
        assert cli.main(words) == 0
        texts.append(capfd.readouterr().out)
    assert len(set(texts)) == 1
    assert not re.findall(r"--[a-z0-9.-]*_", texts[0])
    listed = re.findall(r"^  --(\S+) (\S+)", texts[0], flags=re.MULTILINE)
    assert bool(listed) == (command != "compare")
    assert not [default for _, default in listed if default in ("None", "True", "False")]
    bare = {leaf.rpartition(".")[2].replace("-", "_") for leaf, _ in listed if "-" in leaf}
    assert not {word for word in re.findall(r"[a-z0-9.]+_[a-z0-9_]+", texts[0]) if word.rpartition(".")[2] in bare}


def listed(command: str, capfd: pytest.CaptureFixture[str]) -> set[str]:
    assert cli.main([command, "--help"]) == 0
    return set(re.findall(r"^  --(\S+)", capfd.readouterr().out, flags=re.MULTILINE))


def test_help_lists_what_can_be_used_and_the_rest_is_refused_by_name(
    capfd: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    degrees = ("layout.cp", "layout.ep", "layout.etp")
    unusable = {
        "serve": (*degrees, "http.keys"),
        "generate": degrees,
        "train": degrees,
        "verify": (*degrees, "trace", "init", "trainer.fault", "trainer.save-every"),
        "reshard": (*degrees, "out"),
    }
    places = {"train": ["tiny"], "verify": ["tiny"], "reshard": [str(tmp_path), str(tmp_path / "b")]}
    (tmp_path / "config.toml").write_text(to_toml(Recipe()))
    (tmp_path / "run").mkdir()
    for command, names in unusable.items():
        found = listed(command, capfd)
        assert found and not found & set(names), command
        assert {"layout.tp", "layout.dp", "layout.pp"} <= found
        for name in names:
            lines = told(capfd, command, *places.get(command, [str(tmp_path)]), f"--{name}", "2")
            assert any(name.replace("-", "_") in line.replace("-", "_") for line in lines), (name, lines)
    assert not {"model.layers", "optimizer.lr", "data.source"} & listed("reshard", capfd), "of the run that is there"
    key = "a-key-that-nobody-may-see"
    assert told(capfd, "serve", str(tmp_path), "--http.keys", key) == [
        "--http.keys: whoever may list processes would read them: give --keys-file FILE"
    ]


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("serve . --tensor-parallel-size 2", "--tensor-parallel-size is --layout.tp here"),
        ("serve . --tp-size 2", "--tp-size is --layout.tp here"),
        ("serve . --pipeline-parallel-size=2", "--pipeline-parallel-size is --layout.pp here"),
        ("serve . --data_parallel_size 2", "--data-parallel-size is --layout.dp here"),
        ("serve . --max-model-len 99", "--max-model-len is --engine.context here"),
        ("serve . --gpu-memory-utilization 0.9", "--gpu-memory-utilization is --engine.cache.share here: a share of"),
        ("serve . --mem-fraction-static 0.9", "--mem-fraction-static is --engine.cache.share here"),
        ("serve . --max-num-seqs 9", "--max-num-seqs is --engine.scheduler.requests here"),
        ("serve . --max-num-batched-tokens 9", "--max-num-batched-tokens is --engine.scheduler.budget here"),
        ("serve . --kv-cache-dtype fp8", "--kv-cache-dtype is --engine.cache.precision here"),
        ("serve . --served-model-name x", "--served-model-name is --names here"),
        ("serve . --api-key secret-secret", "--api-key is --keys-file here: the name of a file"),
        ("serve . --enable-prefix-caching", "--enable-prefix-caching is --engine.scheduler.prefix-cache here"),
        ("serve . --dtype bfloat16", "--dtype is --precision here"),
        ("serve --model x", "--model: the folder comes first, without an option: lockstep serve MODEL_DIR"),
        ("generate . --prompt x --max-new-tokens 9", "--max-new-tokens is --max-tokens here"),
        ("train tiny --tensor-model-parallel-size 2", "--tensor-model-parallel-size is --layout.tp here"),
        ("train tiny --micro-batch-size 2", "--micro-batch-size is --batch.microbatches here: how many there are"),
        ("train tiny --global-batch-size 2", "--global-batch-size is --batch.sequences here"),
        ("train tiny --seq-length 2", "--seq-length is --batch.sequence here"),
        ("train tiny --training.seq_len 2", "--training.seq-len is --batch.sequence here"),
        ("bench serve http://x --api-key secret-secret", "--api-key is --key-file here: the name of a file"),
        ("bench serve http://x --num-prompts 3", "--num-prompts is --requests here"),
    ],
)
def test_names_of_other_programs_are_answered_with_ours(
    words: str, expected: str, capfd: pytest.CaptureFixture[str]
) -> None:
    lines = told(capfd, *words.split())
    assert any(line.startswith(expected) for line in lines), lines
    assert "secret-secret" not in "".join(lines)
    assert not any("unknown option" in line for line in lines)


def test_the_table_of_spellings_names_options_that_there_are() -> None:
    everything = [
        leaf.name for config in (ServeConfig(), GenerateConfig(), Recipe(), BenchConfig()) for leaf in options(config)
    ]
    theirs = [name for names, _, _ in _SPELLINGS for name in names.split()]
    assert len(theirs) == len(set(theirs))
    for _, ours, _ in _SPELLINGS:
        assert set(ours.split()) <= set(everything)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (
            "serve /nowhere --port 70000",
            ["/nowhere: no such folder", "port = 70000: must be at least 0 and below 65536"],
        ),
        ("serve . --engine.context -3", ["engine.context = -3: must not be negative"]),
        (
            "serve . --port 70000 --port 70001 --port 1",
            ["--port is given twice", "port = 70000: must be at least 0 and below 65536"],
        ),
        (
            "serve . --tp 2 --memory-gib 1",
            ["--tp is --layout.tp here", "unknown option 'memory_gib' (did you mean 'engine.cache.memory_gib'?)"],
        ),
        (
            "generate . -p hi",
            [
                "-p: options begin with two hyphens; a file of that name is ./-p",
                "expected MODEL_DIR, got . hi",
                "give --prompt TEXT or --prompts FILE",
            ],
        ),
        (
            "generate . --prompt",
            ["prompt is given without a value: must be text", "give --prompt TEXT or --prompts FILE"],
        ),
        ("generate . --prompt x --stop --json", ["stop is given without a value: must be a list"]),
        ("draw 1f1b --stages", ["stages is given without a value: must be a whole number"]),
        (
            "export /nowhere x --overwrit",
            ["/nowhere: not a run folder (no config.toml)", "unknown option 'overwrit' (did you mean 'overwrite'?)"],
        ),
        ("compare a b --x 1 --x 2 --x 3", ["--x is given twice", "--x: compare has no options"]),
        (
            "bench serve http://x --out --png",
            ["out is given without a value: must be text", "png is given without a value: must be text"],
        ),
    ],
)
def test_every_slip_is_told_once(words: str, expected: Sequence[str], capfd: pytest.CaptureFixture[str]) -> None:
    assert sorted(told(capfd, *words.split())) == sorted(expected)


def spoiled(config: Any) -> Iterator[dict[str, Any]]:
    """Tables in which one number is what no number may be."""
    for leaf in options(config):
        if isinstance(leaf.default, int | float) and not isinstance(leaf.default, bool):
            at: dict[str, Any] = {}
            table = at
            *groups, last = leaf.name.split(".")
            for group in groups:
                at = at.setdefault(group, {})
            at[last] = -7
            yield table


@pytest.mark.parametrize(
    "config",
    [ServeConfig(), GenerateConfig(prompt="x"), Recipe(), BenchConfig()],
    ids=lambda c: type(c).__name__,
)
def test_no_problem_is_found_by_two_layers(config: Any) -> None:
    refused = 0
    for table in spoiled(config):
        try:
            resolve(config, table)
        except ConfigError as error:
            refused += 1
            problems = error.problems
            assert not [(a, b) for a in problems for b in problems if a != b and a.endswith(b)], problems
    assert refused > 3


def test_the_version_is_told(capfd: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--version"]) == 0
    assert re.fullmatch(r"lockstep \d+\.\S+\n", capfd.readouterr().out)
