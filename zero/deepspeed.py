"""DeepSpeed's JSON configuration, read without DeepSpeed: what is honoured, what changes nothing, what is refused.

What the file says is laid over a recipe, and flags over both; of what it does not say, or calls ``auto``, the recipe's
value stays. Every key is accounted for.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from parallel.errors import ConfigError, nearest
from zero.deepspeed_keys import HARMLESS, KEYS, SPEED, SWITCHED, Only, Takes, number, whole

__all__ = ["DeepSpeedReading", "read_deepspeed", "translate"]

_BATCH = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")
_ADAM = {"adam": False, "adamw": True}
_SCHEDULERS = {"WarmupLR": "warmup", "WarmupDecayLR": "warmup-decay", "WarmupCosineLR": "warmup-cosine"}
_OFFLOAD = {"offload_optimizer": "optimizer", "offload_param": "parameters"}
_PARAMS = {
    "optimizer": ("lr", "betas", "eps", "weight_decay", "adam_w_mode", "torch_adam", "bias_correction", "amsgrad"),
    "scheduler": (
        "warmup_min_lr",
        "warmup_max_lr",
        "warmup_num_steps",
        "warmup_type",
        "total_num_steps",
        "warmup_min_ratio",
        "cos_min_ratio",
        "last_batch_iteration",
    ),
}


@dataclass(frozen=True, slots=True)
class DeepSpeedReading:
    """A configuration of DeepSpeed in our terms.

    Attributes:
        table: our options, nested, as :func:`parallel.config.resolve` takes them.
        honoured: key -> (our option, its value).
        ignored: key -> why that changes no result.
        problems: every key that would change results and is not honoured, and what contradicts itself.
    """

    table: dict[str, Any] = field(default_factory=dict)
    honoured: dict[str, tuple[str, Any]] = field(default_factory=dict)
    ignored: dict[str, str] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)

    def lines(self) -> Iterator[str]:
        """What became of each key."""
        for key, (name, value) in self.honoured.items():
            yield f"{key}: {name} = {json.dumps(value)}" if name else f"{key}: as it says"
        for key, why in self.ignored.items():
            yield f"{key}: ignored, {why}"

    def set(self, key: str, name: str, value: Any) -> None:
        """Note that ``key`` is honoured by the option ``name``."""
        self.honoured[key] = (name, value)
        table = self.table
        *groups, last = name.split(".")
        for group in groups:
            table = table.setdefault(group, {})
        table[last] = value

    def take(self, key: str, given: Any, rule: Takes) -> None:
        """Honour a key by an option, if it is what it should be."""
        try:
            self.set(key, rule.option, rule.convert(given))
        except ValueError as error:
            self.refuse(key, given, str(error))

    def allow(self, key: str, given: Any, rule: Only) -> None:
        """Honour a key that asks for what happens here."""
        if any(given is value or (type(given) is type(value) and given == value) for value in rule.values):
            self.honoured[key] = ("", given)
        else:
            self.refuse(key, given, rule.instead)

    def refuse(self, key: str, given: Any, why: str) -> None:
        """Note why a key cannot be honoured."""
        self.problems.append(f"{key} = {json.dumps(given)}: {why}")


def read_deepspeed(path: Path) -> dict[str, Any]:
    """The document in a JSON file.

    Raises:
        ConfigError: the file is absent, not JSON, not an object, or names a key twice.
    """

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        names = [name for name, _ in pairs]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise ConfigError(f"{path}: {', '.join(twice)} given twice")
        return dict(pairs)

    try:
        document = json.loads(path.read_text(), object_pairs_hook=once)
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"{path}: {error}") from None
    if not isinstance(document, dict):
        raise ConfigError(f"{path}: a JSON object is needed")
    return document


def translate(document: Mapping[str, Any], *, ranks: int, steps: int, engine: bool = False) -> DeepSpeedReading:
    """A configuration of DeepSpeed in our terms; nothing is raised, see ``problems`` of the result.

    Args:
        document: as in the JSON file.
        ranks: of the data axis, which train_batch_size is over.
        steps: of the run.
        engine: DeepSpeed's own engine is to train, which has nvme, and is given what our options do not decide.
    """
    reading = DeepSpeedReading()
    leaves = dict(_leaves(document, ""))
    for section in list(_without_auto(leaves, reading)):
        del leaves[section]
    _precision(leaves, reading)
    _batch(leaves, ranks, reading)
    _offload(leaves, reading, engine)
    _optimizer(leaves, reading)
    _scheduler(leaves, steps, reading)
    for key, value in leaves.items():
        _single(key, value, document, reading)
    for key in [key for key, why in reading.ignored.items() if engine and why == SPEED.why]:
        del reading.ignored[key]
        reading.honoured[key] = ("", leaves.get(key))
    return reading


def _leaves(table: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
    for key, value in table.items():
        if isinstance(value, Mapping) and value:
            yield from _leaves(value, f"{prefix}{key}.")
        elif not isinstance(value, Mapping):
            yield prefix + key, value


def _without_auto(leaves: Mapping[str, Any], reading: DeepSpeedReading) -> Iterator[str]:
    for key, value in leaves.items():
        if value == "auto" and _known(key):
            reading.ignored[key] = "auto: the recipe's value stays"
            yield key


def _names() -> list[str]:
    params = [f"{group}.params.{name}" for group, names in _PARAMS.items() for name in names]
    params += [f"zero_optimization.{name}{device}" for name in _OFFLOAD for device in ("", ".device")]
    enabled = [f"{section}.enabled" for section in ("bf16", *SWITCHED)]
    return [*KEYS, *HARMLESS, *SWITCHED, *_BATCH, "bf16", "optimizer.type", "scheduler.type", *params, *enabled]


def _known(key: str) -> bool:
    sections = {*HARMLESS, *SWITCHED}
    return key in _names() or any(key.startswith(f"{section}.") for section in sections)


def _single(key: str, value: Any, document: Mapping[str, Any], reading: DeepSpeedReading) -> None:
    rule, section = KEYS.get(key), key.partition(".")[0]
    if isinstance(rule, Takes):
        reading.take(key, value, rule)
    elif isinstance(rule, Only):
        reading.allow(key, value, rule)
    elif rule is not None:
        reading.ignored[key] = rule.why
    elif section in SWITCHED:
        given = document[section]
        if not isinstance(given, Mapping) or given.get("enabled") not in (False, None, "auto"):
            if key in (f"{section}.enabled", section):
                reading.refuse(key, value, SWITCHED[section])
        else:
            reading.ignored[key] = "the section is off"
    elif owner := next((name for name in HARMLESS if key.startswith(f"{name}.")), None):
        reading.ignored[key] = HARMLESS[owner].why
    else:
        reading.problems.append(f"unknown key {key!r} of DeepSpeed's configuration{_near(key)}")


def _near(key: str) -> str:
    """The known name nearest to a key; of a misspelt section, the section."""
    head, _, rest = key.rpartition(".")
    names = _names()
    sections = {name.rpartition(".")[0] for name in names} - {""}
    if rest and head and head not in sections:
        return nearest(head, sections)
    return nearest(key, [*names, *sections])


def _precision(leaves: dict[str, Any], reading: DeepSpeedReading) -> None:
    """bf16 on or off; fp16 and autocast are switched sections."""
    if "bfloat16.enabled" in leaves:
        leaves["bf16.enabled"] = leaves.pop("bfloat16.enabled")
    if "bf16.enabled" not in leaves:
        return
    on = leaves.pop("bf16.enabled")
    if not isinstance(on, bool):
        reading.refuse("bf16.enabled", on, "must be true or false")
    elif on or not leaves.get("fp16.enabled"):
        reading.set("bf16.enabled", "precision", "bf16" if on else "fp32")


def _batch(leaves: dict[str, Any], ranks: int, reading: DeepSpeedReading) -> None:
    """The batch of a step is a rank's microbatch x gradient_accumulation_steps x data ranks; two give the third."""
    given: dict[str, int] = {}
    for key in _BATCH:
        if key not in leaves:
            continue
        value = leaves.pop(key)
        try:
            given[key] = whole(value)
            if given[key] < 1:
                raise ValueError("must be at least 1")
        except ValueError as error:
            reading.refuse(key, value, str(error))
            return
    total, micro, parts = (given.get(key) for key in _BATCH)
    if total and micro and not parts:
        parts = max(1, total // (micro * ranks))
    if parts is None and (total or micro):
        parts = 1
    if parts and not total and micro:
        total = micro * parts * ranks
    if total and micro and parts and total != micro * parts * ranks:
        product = f"{_BATCH[1]} {micro} x {_BATCH[2]} {parts} x {ranks} data ranks = {micro * parts * ranks}"
        reading.problems.append(f"{_BATCH[0]} = {total} is not {product}")
        return
    if total:
        reading.set(_BATCH[0] if _BATCH[0] in given else _BATCH[1], "batch.sequences", total)
    if parts:
        reading.set(_BATCH[2] if _BATCH[2] in given else next(iter(given)), "batch.microbatches", parts)
    for key in given:
        reading.honoured.setdefault(key, ("batch.sequences", total))


def _offload(leaves: dict[str, Any], reading: DeepSpeedReading, engine: bool) -> None:
    """What is kept in CPU memory, or by DeepSpeed's engine on a disk; parameters bring the optimizer's state along."""
    for name, what in _OFFLOAD.items():
        key = f"zero_optimization.{name}"
        given = next((name for name in (f"{key}.device", key) if name in leaves), "")
        device = leaves.pop(given, None)
        if device == "cpu":
            reading.set(given, "zero.offload", what)
        elif device == "nvme" and engine:
            reading.honoured[given] = ("", device)
            if not leaves.get(f"{key}.nvme_path"):
                reading.problems.append(f'{key}.device = "nvme" needs nvme_path beside it, a folder on the disk')
        elif device not in ("none", None):
            reading.refuse(
                given, device, "the nearest is cpu; DeepSpeed's own engine has nvme: --zero.backend deepspeed"
            )
        elif given:
            reading.honoured[given] = ("", device)


def _group(name: str, leaves: dict[str, Any], reading: DeepSpeedReading) -> tuple[Any, dict[str, Any]]:
    """Type and parameters of ``optimizer`` or ``scheduler``, taken out of ``leaves``; unknown ones stay there."""
    kind = leaves.pop(f"{name}.type", None)
    known = {key: f"{name}.params.{key}" for key in _PARAMS[name]}
    return kind, {key: leaves.pop(dotted) for key, dotted in known.items() if dotted in leaves}


def _optimizer(leaves: dict[str, Any], reading: DeepSpeedReading) -> None:
    """Adam and AdamW; weight decay is of matrices, as published recipes have it by their parameter groups."""
    kind, params = _group("optimizer", leaves, reading)
    prefix = "optimizer.params."
    if kind is None and not params and "optimizer.type" not in reading.ignored:
        return
    if kind is not None and str(kind).lower() not in _ADAM:
        names = ("Adam", "AdamW")
        reading.refuse("optimizer.type", kind, f"the file can ask for Adam or AdamW{nearest(str(kind), names)}")
        return
    decoupled = _ADAM.get(str(kind).lower(), True) or params.get("adam_w_mode", True) is True
    if not decoupled and params.get("weight_decay", 0) != 0:
        reading.refuse(prefix + "adam_w_mode", False, "weight decay is decoupled, as with adam_w_mode true")
    elif "adam_w_mode" in params:
        reading.honoured[prefix + "adam_w_mode"] = ("", params["adam_w_mode"])
    if kind is not None:
        reading.honoured["optimizer.type"] = ("", kind)
    for key in ("lr", "eps", "weight_decay"):
        if key in params:
            reading.take(prefix + key, params[key], Takes(f"optimizer.{key}", number))
    betas = params.get("betas")
    if isinstance(betas, list) and len(betas) == 2 and "auto" not in betas:
        for key, value in zip(("beta1", "beta2"), betas, strict=True):
            reading.take(f"{prefix}betas", value, Takes(f"optimizer.{key}", number))
        reading.honoured[f"{prefix}betas"] = ("optimizer.beta1, beta2", betas)
    elif betas is not None:
        reading.refuse(f"{prefix}betas", betas, "must be two numbers")
    if "torch_adam" in params:
        reading.ignored[f"{prefix}torch_adam"] = "it changes speed or memory, no result"
    for key, value in (("bias_correction", True), ("amsgrad", False)):
        if key in params:
            reading.allow(prefix + key, params[key], Only((value,), f"only {json.dumps(value)} is there"))


def _scheduler(leaves: dict[str, Any], steps: int, reading: DeepSpeedReading) -> None:
    """WarmupLR, WarmupDecayLR and WarmupCosineLR, by the letter."""
    kind, params = _group("scheduler", leaves, reading)
    prefix = "scheduler.params."
    if kind is None and not params:
        return
    if kind not in _SCHEDULERS:
        near = nearest(str(kind), _SCHEDULERS)
        reading.refuse("scheduler.type", kind, f"the file can ask for {', '.join(_SCHEDULERS)}{near}")
        return
    reading.set("scheduler.type", "schedule.kind", _SCHEDULERS[kind])
    cosine = kind == "WarmupCosineLR"
    # What such a schedule is without a parameter is part of its type.
    defaults = {"warmup_num_steps": ("warmup", 1000), "warmup_type": ("ramp", "log"), "first": ("first", 0.0)}
    defaults["cos_min_ratio"] = ("floor", 1e-4 if cosine else 0.0)
    reading.table["schedule"] |= dict(v for key, v in defaults.items() if prefix + key not in reading.ignored)
    if kind == "WarmupDecayLR" and f"{prefix}warmup_max_lr" not in reading.ignored:
        params.setdefault("warmup_max_lr", 1e-3)
    total = params.pop("total_num_steps", steps)
    if total != steps:
        reading.refuse(prefix + "total_num_steps", total, f"steps = {steps}; give --steps {total}")
    elif kind != "WarmupLR":
        reading.honoured[prefix + "total_num_steps"] = ("steps", total)
    if "warmup_num_steps" in params:
        reading.take(prefix + "warmup_num_steps", params.pop("warmup_num_steps"), Takes("schedule.warmup", whole))
    ramp = params.pop("warmup_type", None)
    if ramp in ("log", "linear"):
        reading.set(prefix + "warmup_type", "schedule.ramp", ramp)
    elif ramp is not None:
        reading.refuse(prefix + "warmup_type", ramp, "must be log or linear")
    if params.pop("last_batch_iteration", -1) != -1:
        reading.problems.append(f"{prefix}last_batch_iteration: a run continues from its checkpoint")
    if not cosine:
        _rates(params, reading)
    for key, name in (("warmup_min_ratio", "schedule.first"), ("cos_min_ratio", "schedule.floor")) if cosine else ():
        if key in params:
            reading.take(prefix + key, params.pop(key), Takes(name, number))
    for key, value in params.items():
        reading.refuse(prefix + key, value, f"{kind} has no such parameter")


def _rates(params: dict[str, Any], reading: DeepSpeedReading) -> None:
    """The lowest and highest learning rate of a warm-up."""
    lowest, highest = "scheduler.params.warmup_min_lr", "scheduler.params.warmup_max_lr"
    if "warmup_max_lr" in params:
        reading.take(highest, params.pop("warmup_max_lr"), Takes("optimizer.lr", number))
    least = params.pop("warmup_min_lr", None)
    most = reading.table.get("optimizer", {}).get("lr")
    if least in (0, None):
        if least is not None:
            reading.set(lowest, "schedule.first", 0.0)
    elif not most:
        reading.refuse(lowest, least, "needs optimizer.params.lr or warmup_max_lr beside it")
    else:
        reading.take(lowest, least, Takes("schedule.first", lambda value: number(value) / most))
