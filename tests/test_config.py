"""Configuration: what is accepted, and that everything wrong is reported at once."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pytest

from launch.recipe import Recipe, load_recipe, recipes
from parallel.config import option, options, parse_flags, read_toml, resolve, to_table, to_toml
from parallel.errors import ConfigError
from parallel.registry import Registry


@dataclass(frozen=True, slots=True, kw_only=True)
class Inner:
    rate: float = option(0.5, "a rate")
    sizes: tuple[int, ...] = option((), "sizes")


@dataclass(frozen=True, slots=True, kw_only=True)
class Outer:
    name: str = option("a", "a name")
    count: int = option(1, "a count")
    flag: bool = option(False, "a flag")
    kind: Literal["red", "green"] = option("red", "a kind")
    inner: Inner = option(Inner(), "the inner part")

    def problems(self) -> list[str]:
        return ["count must not be 13"] if self.count == 13 else []


def test_flags_override_tables_which_override_defaults() -> None:
    positional, flags, problems = parse_flags(
        ["x", "--inner.rate", "2", "--flag", "--count=1_000", "--inner.sizes", "1,2"]
    )
    assert (positional, problems) == (["x"], [])
    value = resolve(Outer(), {"name": "b", "count": 5, "inner": {"rate": 1}}, flags)
    assert value == Outer(name="b", count=1000, flag=True, inner=Inner(rate=2.0, sizes=(1, 2)))


def test_every_problem_is_reported_at_once_with_the_nearest_name() -> None:
    table = {"nmae": "b", "count": "5", "kind": "gren", "inner": {"rat": 1}, "flag": 1}
    _, flags, _ = parse_flags(["--inner.rate", "fast", "--name.first", "x", "--inner", "3", "--count", "2.5"])
    with pytest.raises(ConfigError) as caught:
        resolve(Outer(count=13), table, flags)
    text = "\n".join(caught.value.problems)
    for expected in (
        "unknown option 'nmae' (did you mean 'name'?)",
        "count = '5': must be a whole number",
        "kind = 'gren': must be one of 'red', 'green' (did you mean 'green'?)",
        "unknown option 'inner.rat' (did you mean 'inner.rate'?)",
        "flag = 1: must be true or false",
        "name is a single option",
        "count = '2.5': must be a whole number",
        "count must not be 13",
    ):
        assert expected in text


def test_a_flag_given_twice_or_as_value_and_group() -> None:
    for words in (["--a", "1", "--a", "2"], ["--a", "1", "--a.b", "2"], ["--a.b", "1", "--a", "2"]):
        assert len(parse_flags(words)[2]) == 1


def test_toml_round_trip(tmp_path: Path) -> None:
    recipe = resolve(
        Recipe(), {"model": {"window_layers": [1, 3]}, "out": 'a "quoted"\nfolder', "optimizer": {"lr": 1e-5}}
    )
    (tmp_path / "x.toml").write_text(to_toml(recipe))
    assert resolve(Recipe(), read_toml(tmp_path / "x.toml")) == recipe
    assert resolve(Recipe(), to_table(recipe)) == recipe


def test_a_file_that_is_absent_or_not_toml(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no such file"):
        read_toml(tmp_path / "none.toml")
    (tmp_path / "bad.toml").write_text("a = = 1")
    with pytest.raises(ConfigError, match=r"bad\.toml"):
        read_toml(tmp_path / "bad.toml")


def test_every_option_is_documented_and_every_recipe_is_valid() -> None:
    assert all(leaf.doc for leaf in options(Recipe()))
    assert "tiny" in recipes()
    for name in recipes():
        assert load_recipe(name, {}).steps > 0


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (["--layout.tp", "6"], "layout.tp = 6 does not divide the 8 heads; the nearest degree that works is 4"),
        (["--layout.cp", "2"], "layout.cp = 2: this version has no context parallelism"),
        (["--layout.pp", "8"], "4 layers are fewer than 8 pipeline stages; the nearest that works is 4 stages"),
        (["--layout.pp", "2", "--pp.schedule", "zbv"], "did you mean 'zb-v'?"),
        (["--layout.pp", "2", "--pp.layers", "1,2"], "the nearest that works: 2,2"),
        (["--layout.dp", "3"], "the nearest that is: 15"),
        (["--layout.tp", "0"], "tp = 0: a degree is at least 1"),
        (["--zero.stage", "4"], "zero.stage = 4: the stages are 0, 1, 2 and 3"),
        (["--layout.dp", "4", "--zero.stage", "1", "--zero.shard-size", "3"], "the nearest that works is 2"),
        (["--steps", "0"], "steps = 0: must be at least 1"),
        (["--model.kv-heads", "3"], "heads = 8 is not divisible by kv_heads = 3"),
        (["--optimizer.beta1", "1.5"], "optimizer.beta1 = 1.5"),
        (["--batch.microbatches", "3"], "must be divisible by"),
        (["--precison", "bf16"], "unknown option 'precison' (did you mean 'precision'?)"),
        (["--layout.ep", "3"], "ep * etp = 3 does not divide"),
        (["--model.family", "lama"], "model.family = 'lama': unknown (did you mean 'llama'?)"),
        (["--model.family", "qwen3"], "qk_norm"),
        (["--optimizer.lr", "nan"], "must be a finite number"),
        (["--model.std", "-1"], "std = -1.0: must not be negative"),
    ],
)
def test_recipes_refuse_what_cannot_be(flags: list[str], expected: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_recipe("tiny", parse_flags(flags)[1])
    assert any(expected in problem for problem in caught.value.problems), caught.value.problems


def test_registry_names_the_nearest() -> None:
    registry: Registry[type] = Registry("thing", {"list": "builtins:list", "dict": "builtins:dict"})
    assert registry["list"] is list
    assert "dict" in registry
    assert list(registry) == ["list", "dict"]
    with pytest.raises(ConfigError, match="unknown thing 'dct' \\(did you mean 'dict'"):
        registry["dct"]
