"""A recipe: everything that decides a training run."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from parallel.config import option, read_toml, resolve
from parallel.errors import ConfigError, nearest, refuse
from parallel.hf import read_config
from parallel.mesh import Layout
from parallel.models.config import DecoderConfig
from parallel.models.families import FAMILIES
from parallel.pp import PipelineConfig
from parallel.pp.draw import path_problems
from zero.data import DataConfig, Prepared
from zero.deepspeed import DeepSpeedReading, read_deepspeed, translate
from zero.deepspeed_document import engine_misfits
from zero.loader import Loader
from zero.optimizer import OptimizerConfig, ZeroConfig
from zero.schedule import ScheduleConfig
from zero.trainer import TrainerConfig

__all__ = [
    "NOT_YET",
    "PRECISIONS",
    "BatchConfig",
    "Recipe",
    "ZeroOptions",
    "deepspeed_reading",
    "layout_refusals",
    "load_recipe",
    "recipes",
]

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp64": torch.float64}
Precision = Literal["fp32", "bf16", "fp64"]
NOT_YET = ("layout.cp", "layout.ep", "layout.etp")
"""Options of kinds of parallelism that are not there yet; see :func:`layout_refusals`."""

_FOLDER = Path(__file__).parent / "recipes"


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchConfig:
    """What one optimizer step learns from."""

    sequence: int = option(256, "tokens of a sequence")
    sequences: int = option(8, "sequences a step, over all ranks")
    microbatches: int = option(0, "parts of a step that are worked on one after the other (0: as the pipeline needs)")


@dataclass(frozen=True, slots=True, kw_only=True)
class ZeroOptions(ZeroConfig):
    """How training state is cut over the data axis, and whose configuration says so."""

    deepspeed: str = option("", "DeepSpeed's JSON configuration, laid over the recipe")
    backend: Literal["lockstep", "deepspeed"] = option("lockstep", "whose engine trains: ours, or DeepSpeed's own")


@dataclass(frozen=True, slots=True, kw_only=True)
class _Frame:
    """What of a recipe decides how DeepSpeed's configuration is read."""

    steps: int
    layout: Layout
    zero: ZeroOptions


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """A training run."""

    out: str = option("", "run folder (empty: runs/<name of the recipe>)")
    seed: int = option(0, "of initial weights, dropout and data order")
    steps: int = option(100, "optimizer steps")
    precision: Precision = option("fp32", "of weights and activations; master weights are fp32, or fp64")
    device: Literal["auto", "cpu", "cuda"] = option("auto", "where to compute")
    recompute: Literal["none", "selective", "full"] = option(
        "none", "form again in backward: nothing, attention, blocks"
    )
    trace: str = option("", "picture of a measured step, x.svg, x.png, x.json or x.txt; the plan goes to x.plan.svg")
    init: str = option("", "Hugging Face folder to start from; its configuration replaces model.*")
    layout: Layout = option(Layout(), "degrees of parallelism")
    pp: PipelineConfig = option(PipelineConfig(), "the pipeline")
    model: DecoderConfig = option(DecoderConfig(), "the model")
    data: DataConfig = option(DataConfig(), "the text")
    batch: BatchConfig = option(BatchConfig(), "the step")
    optimizer: OptimizerConfig = option(OptimizerConfig(), "AdamW")
    schedule: ScheduleConfig = option(ScheduleConfig(), "the learning rate")
    zero: ZeroOptions = option(ZeroOptions(), "cutting of training state")
    trainer: TrainerConfig = option(TrainerConfig(), "the loop")

    def problems(self) -> Iterator[str]:
        """Why these options do not go together."""
        if self.steps < 1:
            yield f"steps = {self.steps}: must be at least 1"
        yield from (f"trace: {problem}" for problem in (path_problems(Path(self.trace)) if self.trace else ()))
        yield from layout_refusals(self.layout)
        if not self.init and self.layout.tp >= 1 and not any(True for _ in self.model.problems()):
            yield from self.model_problems()
        if self.zero.backend == "deepspeed":
            yield from engine_misfits(self.zero, self.dtype, self.layout.pp, traced=bool(self.trace))
        if self.layout.dp >= 1:
            yield from (f"zero: {misfit}" for misfit in self.zero.misfits(self.layout.dp * self.layout.cp))
            batch = self.batch
            yield from (
                f"batch: {problem}"
                for problem in Loader.problems(
                    sequence=batch.sequence,
                    sequences=batch.sequences,
                    microbatches=self.microbatches,
                    size=self.layout.dp,
                )
            )

    @property
    def microbatches(self) -> int:
        """``batch.microbatches``, or what the pipeline needs: most of those up to 4 a stage that divide the step."""
        if self.batch.microbatches:
            return self.batch.microbatches
        each, most = self.batch.sequences // max(1, self.layout.dp), 1 if self.layout.pp == 1 else 4 * self.layout.pp
        return max((count for count in range(1, most + 1) if each % count == 0), default=1)

    def model_problems(self) -> Iterator[str]:
        """Why the model cannot be of its family, shared by the layout, or given such sequences."""
        model = self.model
        if model.family not in FAMILIES:
            near = nearest(model.family, FAMILIES)
            yield f"model.family = {model.family!r}: unknown{near}; there are: {', '.join(FAMILIES)}"
            return
        yield from (f"model: {problem}" for problem in FAMILIES[model.family].problems(model.resolved()))
        yield from model.layout_problems(self.layout.tp)
        if self.zero.backend == "deepspeed" and model.resolved().kv_heads < self.layout.tp:
            heads, tp = model.resolved().kv_heads, self.layout.tp
            yield (
                f"layout.tp = {tp} repeats the {heads} key-value heads, which DeepSpeed would count twice when it "
                f"clips; the nearest that works under its engine is layout.tp = {heads}"
            )
        if self.layout.pp > 1 and self.microbatches >= 1:
            yield from (f"pp: {misfit}" for misfit in self.pp.misfits(model.layers, self.layout.pp, self.microbatches))
        if model.positions == "learned" and self.batch.sequence > model.max_positions:
            longest = model.max_positions
            yield f"batch.sequence = {self.batch.sequence} is longer than model.max_positions = {longest}"

    def with_model(self, prepared: Prepared) -> Recipe:
        """The effective recipe: the model of ``init`` if there is one, and the tokenizer's vocabulary.

        Raises:
            ConfigError: the model has fewer tokens than the tokenizer, or cannot be trained like this.
        """
        model = read_config(Path(self.init)) if self.init else self.model
        if not model.vocabulary:
            model = dataclasses.replace(model, vocabulary=prepared.vocabulary)
        whole = dataclasses.replace(self, model=model)
        short = model.vocabulary < prepared.vocabulary
        problem = f"model.vocabulary = {model.vocabulary} is less than the tokenizer's {prepared.vocabulary}"
        refuse(ConfigError, [*([problem] if short else []), *whole.model_problems()])
        return whole

    @property
    def text(self) -> DataConfig:
        """The data, with the tokenizer of ``init`` unless another is given."""
        given = self.data.tokenizer or self.init
        return dataclasses.replace(self.data, tokenizer=given)

    @property
    def dtype(self) -> torch.dtype:
        """The torch type of ``precision``."""
        return PRECISIONS[self.precision]

    @property
    def data_folder(self) -> Path:
        """Where the packed data goes: beside the run, shared by all runs over the same text and tokenizer."""
        identity = json.dumps(self.text.identity(), sort_keys=True)
        return Path(self.out).parent / "data" / hashlib.sha256(identity.encode()).hexdigest()[:12]


def layout_refusals(layout: Layout) -> Iterator[str]:
    """Of the kinds of parallelism that are not there yet, those asked for, with the nearest layout that works."""
    for name, what in {"cp": "context", "ep": "expert", "etp": "expert-tensor"}.items():
        degree = getattr(layout, name)
        if degree > 1:
            instead = f" with layout.dp = {layout.dp * degree}" if name == "cp" else ""
            yield (
                f"layout.{name} = {degree}: this version has no {what} parallelism; the nearest layout that works has "
                f"layout.{name} = 1{instead}"
            )


def recipes() -> list[str]:
    """Names of the built-in recipes."""
    return sorted(path.stem for path in _FOLDER.glob("*.toml"))


def load_recipe(name: str, overrides: Mapping[str, Any], extra: Iterable[str] = ()) -> Recipe:
    """The recipe of a TOML file or a built-in name, with command-line overrides.

    Raises:
        ConfigError: every problem of file and overrides together.
    """
    path = _FOLDER / f"{name}.toml" if name in recipes() else Path(name)
    if name not in recipes() and path.suffix != ".toml":
        known = ", ".join(recipes())
        raise ConfigError([*extra, f"no recipe {name!r}{nearest(name, recipes())}; a TOML file, or one of: {known}"])
    table, base = read_toml(path), Recipe(out=f"runs/{path.stem}")
    frame = _frame(base, table, overrides)
    if frame is None or not frame.zero.deepspeed:
        return resolve(base, table, overrides, extra=extra)
    reading = deepspeed_reading(frame)
    return resolve(base, table, reading.table, overrides, extra=[*extra, *reading.problems])


def _frame(base: Recipe, *tables: Mapping[str, Any]) -> _Frame | None:
    """Steps, layout and ZeRO of a recipe; None where they are wrong, which the recipe will say."""
    names = [field.name for field in dataclasses.fields(_Frame)]
    parts = [{name: table[name] for name in names if name in table} for table in tables]
    with contextlib.suppress(ConfigError):
        return resolve(_Frame(steps=base.steps, layout=base.layout, zero=base.zero), *parts)
    return None


def deepspeed_reading(recipe: Recipe | _Frame) -> DeepSpeedReading:
    """What the configuration of DeepSpeed that ``recipe`` names says.

    Raises:
        ConfigError: it cannot be read.
    """
    layout, path = recipe.layout, Path(recipe.zero.deepspeed)
    engine, ranks = recipe.zero.backend == "deepspeed", layout.dp * layout.cp
    reading = translate(read_deepspeed(path), ranks=ranks, steps=recipe.steps, engine=engine)
    return dataclasses.replace(reading, problems=[f"{path}: {problem}" for problem in reading.problems])
