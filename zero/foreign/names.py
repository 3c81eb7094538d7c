"""Which tensors of a foreign checkpoint make up each of our parameters; every tensor is accounted for."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from parallel.errors import CheckpointError, nearest, refuse
from parallel.hf.table import Part, parts, whole_shards
from parallel.models.config import DecoderConfig
from parallel.models.families import FAMILIES
from zero.foreign.source import Foreign

__all__ = ["Named", "match"]

_HEAD = "lm_head.weight"
_WRAPPERS = ("_orig_mod.", "_fsdp_wrapped_module.", "_checkpoint_wrapped_module.")
"""What torch.compile, FSDP and checkpoint wrappers put into names; it is left out wherever it stands."""
_BESIDE = frozenset(
    (
        "optimizer",
        "optimizers",
        "optim",
        "optimizer_states",
        "lr_scheduler",
        "lr_schedulers",
        "dataloader",
        "train_state",
    )
)
"""Beginnings of names of what is saved beside a model that has no beginning of its own."""
_FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
_SHOWN = 20  # problems of one kind; the rest are counted


@dataclass(frozen=True)
class Named:
    """A foreign checkpoint under our names.

    Attributes:
        source: where tensors are read.
        prefix: what stands before every name of the model.
        names: whose names they are.
        held: our parameter -> the parts that make it up, with the names that they have there.
        beside: names that are not of the model, and are left.
        dtype: the widest type of its weights.
    """

    source: Foreign
    prefix: str
    names: str
    held: Mapping[str, tuple[Part, ...]]
    beside: tuple[str, ...]
    dtype: torch.dtype

    def whole(self, name: str, what: str = "master") -> Tensor:
        """The whole of one of our parameters, or of a vector of its optimizer state.

        Raises:
            CheckpointError: its bytes are damaged, or it has no such state.
        """
        found = (self._read(part, what) for part in self.held[name])
        return torch.cat([*found]) if len(self.held[name]) > 1 else next(found)

    def _read(self, part: Part, what: str) -> Tensor:
        tensor = self.source.read(part.name, what)
        return tensor.t() if part.transposed else tensor


@dataclass(frozen=True)
class _Scheme:
    """One way in which a model's tensors may be named: their names -> (our parameter, its part)."""

    names: str
    expected: Mapping[str, tuple[str, Part]]


def match(source: Foreign, config: DecoderConfig, prefix: str | None = None) -> Named:
    """Find a model in a checkpoint.

    Its names may be those of a Hugging Face folder, with or without what the family's names begin with, or ours; the
    same something (``module.``, ``model.``) may stand before all of them.

    Args:
        source: the checkpoint.
        config: of the model, resolved.
        prefix: that something; None: what most names have.

    Raises:
        CheckpointError: with all that is missing, unexpected, of the wrong shape or type, or there more than once.
    """
    plain, problems = _without_wrappers(source)
    refuse(CheckpointError, problems)
    scheme, prefix = _best(source, _schemes(config), plain, prefix)
    inside = {name.removeprefix(prefix): full for name, full in plain.items() if _inside(name, prefix)}
    refuse(CheckpointError, _account(source, config, scheme, inside, prefix))
    held: dict[str, list[Part]] = {}
    for name, (ours, part) in scheme.expected.items():
        held.setdefault(ours, []).append(part._replace(name=inside[name]))
    dtypes = {source.entries[part.name].dtype for own in held.values() for part in own}
    return Named(
        source,
        prefix,
        scheme.names,
        {ours: tuple(own) for ours, own in held.items()},
        tuple(full for name, full in plain.items() if not _inside(name, prefix)),
        dtypes.pop() if len(dtypes) == 1 else torch.float64 if torch.float64 in dtypes else torch.float32,
    )


def _without_wrappers(source: Foreign) -> tuple[dict[str, str], list[str]]:
    """Names without what wrappers put into them -> as they are; and those that are then alike."""
    plain: dict[str, str] = {}
    problems: list[str] = []
    for full in source.entries:
        name = full
        for wrapper in _WRAPPERS:
            name = re.sub(rf"(^|\.){re.escape(wrapper)}", r"\1", name)
        if name in plain:
            problems.append(f"{source.path}: {plain[name]} and {full} are both {name}")
        plain[name] = full
    return plain, problems


def _schemes(config: DecoderConfig) -> Iterator[_Scheme]:
    stored, start = parts(config), FAMILIES[config.family].prefix
    hf = {part.name: (ours, part) for ours, held in stored.items() for part in held}
    yield _Scheme("Hugging Face's names", hf)
    if start:
        bare = {name.removeprefix(start): pair for name, pair in hf.items()}
        yield _Scheme(f"Hugging Face's names without {start}", bare)
    shards = whole_shards(config)
    own = {name: (name, Part(name, 0, shard.shape[0], shard.shape, False)) for name, shard in shards.items()}
    yield _Scheme("our names", own)


def _best(
    source: Foreign, schemes: Iterator[_Scheme], plain: Mapping[str, str], given: str | None
) -> tuple[_Scheme, str]:
    """The names, and what stands before them, that explain most of a checkpoint.

    Raises:
        CheckpointError: nothing explains any of it, or several models are in it.
    """
    found: list[tuple[int, _Scheme, list[str]]] = []
    for scheme in schemes:
        hits: Counter[str] = Counter()
        for name in plain:
            edges = [0, *(index + 1 for index, letter in enumerate(name) if letter == ".")]
            hits.update(name[:edge] for edge in edges if name[edge:] in scheme.expected)
        if given is not None:
            hits = Counter({given: hits[given]})
        most = max(hits.values(), default=0)
        found.append((most, scheme, sorted((p for p, count in hits.items() if count == most), key=len)))
    most, scheme, prefixes = max(found, key=lambda one: one[0])
    if not most:
        some = ", ".join([*plain][:5]) or "nothing"
        before = f" behind {given!r}" if given else ""
        raise CheckpointError(f"{source.path}: no name{before} is one of this model; there are: {some}, ...")
    if len(prefixes) > 1:
        several = ", ".join(repr(prefix) for prefix in prefixes[:5])
        raise CheckpointError(f"{source.path}: names of the model stand behind {several}: say which with --prefix")
    return scheme, prefixes[0]


def _inside(name: str, prefix: str) -> bool:
    """Whether a name is one of the model's."""
    return name.startswith(prefix) if prefix else name.partition(".")[0] not in _BESIDE


def _account(
    source: Foreign, config: DecoderConfig, scheme: _Scheme, inside: Mapping[str, str], prefix: str
) -> Iterator[str]:
    """What is missing, what is too much, what does not fit."""
    where, expected, others = source.path, scheme.expected, set(source.others)
    ignored = [re.compile(pattern) for pattern in FAMILIES[config.family].ignored]
    missing, surplus, misshapen, untyped = list[str](), list[str](), list[str](), list[str]()
    for name, (ours, part) in expected.items():
        if name not in inside:
            what = "is there, but is no tensor that can be read" if prefix + name in others else "is missing"
            missing.append(f"{where}: {prefix}{name} {what} ({ours})")
            continue
        entry = source.entries[inside[name]]
        if entry.shape != part.shape:
            misshapen.append(
                f"{entry.file}: {inside[name]} has shape {list(entry.shape)}; by config.json it is {list(part.shape)}"
                f" ({ours})"
            )
        if entry.dtype not in _FLOATS:
            untyped.append(f"{entry.file}: {inside[name]} has type {entry.dtype}; floating-point types are read")
    for name, full in inside.items():
        if name in expected or any(pattern.search(name) for pattern in ignored):
            continue
        if name == _HEAD and config.tied:
            surplus += _head_problems(source, full, inside[_embedding(scheme)]) if not missing else ()
        else:
            near = nearest(name, expected)
            surplus.append(f"{source.entries[full].file}: {full} is not a tensor of this {config.family} model{near}")
    yield from _first(missing, "tensors that are missing")
    yield from _first(surplus, "unexpected tensors")
    yield from _first(misshapen, "tensors of the wrong shape")
    yield from _first(untyped, "tensors of the wrong type")


def _embedding(scheme: _Scheme) -> str:
    return next(name for name, (ours, _) in scheme.expected.items() if ours == "embedding.weight")


def _head_problems(source: Foreign, head: str, embedding: str) -> Iterator[str]:
    """Why a head that is stored beside the embedding it is tied to cannot be left unread."""
    one, two = source.entries[head], source.entries[embedding]
    if one.shape != two.shape or not torch.equal(source.read(head).double(), source.read(embedding).double()):
        yield f"{one.file}: {head} differs from {embedding}, although config.json ties them"


def _first(problems: Sequence[str], kind: str) -> list[str]:
    more = len(problems) - _SHOWN
    return [*problems[:_SHOWN], *([f"... and {more} more {kind}"] if more > 0 else [])]
