"""A Hugging Face folder, inspected: its configuration, and every tensor accounted for from the headers alone."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, overload

import torch
from safetensors import SafetensorError, safe_open

from parallel.errors import ModelFolderError, nearest, refuse
from parallel.hf.table import ModelConfig, Part, parts
from parallel.models.config import DecoderConfig
from parallel.models.encoder_config import EncoderConfig
from parallel.models.families import ENCODERS, FAMILIES, EncoderFamily, Family

__all__ = ["HEAD", "INDEX", "SINGLE", "Entry", "Folder", "check_folder", "inspect", "read_config"]

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
HEAD = "lm_head.weight"
_FLOATS = ("F64", "F32", "BF16", "F16")
_SHOWN = 20  # problems of one kind; the rest are counted
_VALUES = 1 << 44  # in one tensor
_LAYERS = 1 << 14
_ROWS = 1024  # rows of the vocabulary that are compared at a time


@dataclass(frozen=True, slots=True)
class Entry:
    """One tensor of a folder, as its file's header describes it.

    Attributes:
        file: that holds it.
        name: in that file.
        shape, kind: its shape, and its type in the words of safetensors (``BF16``).
    """

    file: Path
    name: str
    shape: tuple[int, ...]
    kind: str


@dataclass(frozen=True, slots=True)
class Folder:
    """A folder without problems.

    Attributes:
        config: of the model, resolved.
        parts: our parameter name -> the tensors that hold it.
        entries: their names -> where they are.
    """

    config: ModelConfig
    parts: Mapping[str, tuple[Part, ...]]
    entries: Mapping[str, Entry]


@overload
def read_config(folder: Path, *, encoders: Literal[False] = False) -> DecoderConfig: ...
@overload
def read_config(folder: Path, *, encoders: bool) -> ModelConfig: ...
def read_config(folder: Path, *, encoders: bool = False) -> ModelConfig:
    """The configuration in a folder's config.json, resolved.

    Args:
        folder: with a config.json.
        encoders: whether the caller has a use for an encoder as well.

    Raises:
        ModelFolderError: with everything in it that is missing, malformed or not supported.
    """
    path = Path(folder) / "config.json"
    config = _read_json(path)
    kind = config.get("model_type")
    known = [*FAMILIES, *ENCODERS] if encoders else [*FAMILIES]
    if not isinstance(kind, str) or kind not in known:
        problem = f"unknown model_type {kind!r}{nearest(str(kind), known)}; there are: {', '.join(known)}"
        if isinstance(kind, str) and kind in ENCODERS:
            problem = f"model_type {kind!r} is an encoder: it embeds texts, and cannot continue them"
        raise ModelFolderError(f"{path}: {problem}")
    try:
        return ENCODERS[kind].read(config) if kind in ENCODERS else FAMILIES[kind].read(config)
    except ModelFolderError as error:
        raise ModelFolderError(f"{path}: {problem}" for problem in error.problems) from None


def check_folder(folder: Path, *, encoders: bool = False) -> list[str]:
    """Every reason why :func:`~parallel.hf.load.load_model` would refuse a folder; reads headers, allocates nothing."""
    try:
        inspect(folder, encoders=encoders)
    except ModelFolderError as error:
        return list(error.problems)
    return []


def inspect(folder: Path, *, encoders: bool = False) -> Folder:
    """A folder's configuration and tensors.

    Args:
        folder: config.json and safetensors files.
        encoders: whether the caller has a use for an encoder as well.

    Raises:
        ModelFolderError: with every problem of the configuration, of the files and of the tensors.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ModelFolderError(f"{folder}: no such folder")
    problems = list(_untrusted(folder))
    refuse(ModelFolderError, problems)
    config = None
    try:
        config = read_config(folder, encoders=encoders)
    except ModelFolderError as error:
        problems += error.problems
    entries, complete = _read_headers(folder, problems)
    if config is not None and (absurd := list(_absurd(config, len(entries)))):
        problems += [f"{folder / 'config.json'}: {problem}" for problem in absurd]
        config = None
    if config is None:
        raise ModelFolderError(problems)
    family = ENCODERS[config.family] if isinstance(config, EncoderConfig) else FAMILIES[config.family]
    if entries and not any(name.startswith(family.prefix) for name in entries):
        entries = {name if name == HEAD else family.prefix + name: entry for name, entry in entries.items()}
    if isinstance(family, EncoderFamily):
        entries = _renamed(entries, family, problems)
    table = parts(config)
    tied = isinstance(config, DecoderConfig) and config.tied
    problems += _account(family, tied, table, entries, complete)
    refuse(ModelFolderError, problems)
    if tied and HEAD in entries:
        refuse(ModelFolderError, _head_problems(entries[HEAD], entries[table["embedding.weight"][0].name]))
    return Folder(config, table, entries)


def _untrusted(folder: Path) -> Iterator[str]:
    """What a folder from a stranger may hold: links to other places, and code of its own."""
    own = folder.resolve()
    places = [own, own.parent / "blobs", own.parent.parent / "blobs"]  # a hub's cache has links to its blobs
    for pattern in ("*.json", "*.jinja", "*.safetensors"):
        for path in sorted(folder.glob(pattern)):
            if (
                path.is_symlink()
                and path.exists()
                and not any(path.resolve().is_relative_to(place) for place in places)
            ):
                yield f"{path}: is a link to a place outside the folder"
    path = folder / "config.json"
    if path.is_file() and "auto_map" in _read_json(path):
        yield f"{path}: auto_map names code of the model's own, which is never run; remove it if it is not needed"


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise ModelFolderError(f"{path}: no such file") from None
    except (OSError, ValueError, RecursionError) as error:
        raise ModelFolderError(f"{path}: {error}") from None
    if not isinstance(value, dict):
        raise ModelFolderError(f"{path}: must hold an object")
    return value


def _read_headers(folder: Path, problems: list[str]) -> tuple[dict[str, Entry], bool]:
    """Every tensor of the folder, and whether all files could be read."""
    index: dict[str, str] | None = None
    if (folder / INDEX).exists():
        try:
            index = _read_index(folder / INDEX)
        except ModelFolderError as error:
            problems += error.problems
            return {}, False
    files = [SINGLE] if index is None else sorted(set(index.values()))
    if index is not None and (folder / SINGLE).exists() and SINGLE not in files:
        problems.append(f"{folder}: holds both {SINGLE} and {INDEX}, which names other files: remove one")
    if index is None and not (folder / SINGLE).exists():
        problems.append(_absent(folder))
        return {}, False
    entries: dict[str, Entry] = {}
    complete = True
    for file in files:
        try:
            found = _read_header(folder / file)
        except ModelFolderError as error:
            problems += error.problems
            complete = False
            continue
        for entry in found:
            if entry.name in entries:
                problems.append(f"{entry.name} is in both {entries[entry.name].file.name} and {file}")
            entries[entry.name] = entry
    if index is not None and complete:
        wrong = [name for name, file in index.items() if name in entries and entries[name].file.name != file]
        problems += [f"{INDEX}: {name} is not in {index[name]} but in {entries[name].file.name}" for name in wrong]
        unlisted = [
            f"{e.file.name} holds {name}, which {INDEX} does not list"
            for name, e in entries.items()
            if name not in index
        ]
        problems += _first(unlisted, "tensors that the index does not list")
    return entries, complete


def _absent(folder: Path) -> str:
    pickled = sorted(path.name for pattern in ("*.bin", "*.pt", "*.pth") for path in folder.glob(pattern))
    if pickled:
        return (
            f"{folder}: has no {SINGLE}; {pickled[0]} is a pickle, which can run code when it is read; "
            "`lockstep import` reads it without that"
        )
    return f"{folder}: has neither {SINGLE} nor {INDEX}"


def _read_index(path: Path) -> dict[str, str]:
    """Tensor name -> file name.

    Raises:
        ModelFolderError: malformed, or naming a file outside the folder.
    """
    table = _read_json(path).get("weight_map")
    if not isinstance(table, dict) or not table:
        raise ModelFolderError(f"{path}: has no weight_map")
    wrong = {str(file) for file in table.values() if not _is_plain(file)}
    refuse(
        ModelFolderError,
        (f"{path}: {file!r} is not the name of a .safetensors file in the folder" for file in sorted(wrong)),
    )
    return table


def _is_plain(file: Any) -> bool:
    return (
        isinstance(file, str) and re.fullmatch(r"[^/\\\0]+\.safetensors", file) is not None and not file.startswith(".")
    )


def _read_header(path: Path) -> list[Entry]:
    """The tensors of one file.

    Raises:
        ModelFolderError: absent, truncated, or not safetensors.
    """
    if not path.is_file():
        raise ModelFolderError(f"{path}: no such file")
    try:
        with safe_open(path, "pt") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
            return [Entry(path, name, tuple(s.get_shape()), s.get_dtype()) for name, s in slices.items()]
    except (SafetensorError, OSError, ValueError) as error:
        raise ModelFolderError(f"{path}: not a whole safetensors file: {error}") from None


def _renamed(entries: Mapping[str, Entry], family: EncoderFamily, problems: list[str]) -> dict[str, Entry]:
    """The tensors under the names that releases of today write."""
    found: dict[str, Entry] = {}
    for name, entry in entries.items():
        new = name
        for old, today in family.renamed:
            new = new.removesuffix(old) + today if new.endswith(old) else new
        if new in found or (new != name and new in entries):
            problems.append(f"{entry.file.name}: {name} and {new} are two names of one tensor")
        found[new] = entry
    return found


def _absurd(config: ModelConfig, tensors: int) -> Iterator[str]:
    """Sizes that no folder has, and whose table alone could not be made."""
    if tensors and config.layers > tensors:
        yield f"asks for {config.layers} layers, the folder holds {tensors} tensors"
    rows = (config.vocabulary, config.max_positions, config.feed_forward, config.heads * config.head_size)
    if max(rows) * config.hidden > _VALUES or config.layers > _LAYERS:
        yield "asks for a model of impossible size"


def _account(
    family: Family | EncoderFamily,
    tied: bool,
    table: Mapping[str, tuple[Part, ...]],
    entries: Mapping[str, Entry],
    complete: bool,
) -> Iterator[str]:
    """What is missing, what is too much, what does not fit."""
    expected = {part.name: (ours, part) for ours, held in table.items() for part in held}
    ignored = [re.compile(pattern) for pattern in family.ignored]
    if complete:
        yield from _first(
            [f"{name} is missing ({expected[name][0]})" for name in expected if name not in entries], "tensors"
        )
    unexpected = [
        f"{entry.file.name}: {name} is not a tensor of this {family.model_type} model{nearest(name, expected)}"
        for name, entry in entries.items()
        if name not in expected and not (name == HEAD and tied) and not any(pattern.search(name) for pattern in ignored)
    ]
    yield from _first(unexpected, "unexpected tensors")
    misshapen: list[str] = []
    untyped: list[str] = []
    for name, (ours, part) in expected.items():
        if (entry := entries.get(name)) is None:
            continue
        if entry.shape != part.shape:
            stored = " (stored transposed)" if part.transposed else ""
            misshapen.append(
                f"{entry.file.name}: {name} has shape {list(entry.shape)}; by config.json it is "
                f"{list(part.shape)}{stored} ({ours})"
            )
        if entry.kind not in _FLOATS:
            untyped.append(f"{entry.file.name}: {name} has type {entry.kind}; {', '.join(_FLOATS)} are read")
    yield from _first(misshapen, "tensors of the wrong shape")
    yield from _first(untyped, "tensors of the wrong type")


def _first(problems: list[str], kind: str) -> list[str]:
    more = len(problems) - _SHOWN
    return problems if more <= 0 else [*problems[:_SHOWN], f"... and {more} more {kind}"]


def _head_problems(head: Entry, embedding: Entry) -> Iterator[str]:
    """Why a head that is stored beside the embedding it is tied to cannot be left unread."""
    tied = f"{head.file.name}: {HEAD} differs from {embedding.name}, although config.json ties them"
    if head.shape != embedding.shape or head.kind not in _FLOATS:
        yield f"{tied}: {head.kind} {list(head.shape)} and {embedding.kind} {list(embedding.shape)}"
        return
    with safe_open(head.file, "pt") as a, safe_open(embedding.file, "pt") as b:
        ours, theirs = a.get_slice(head.name), b.get_slice(embedding.name)
        for first in range(0, head.shape[0], _ROWS):
            rows = slice(first, min(first + _ROWS, head.shape[0]))
            if not torch.equal(ours[rows].double(), theirs[rows].double()):
                yield tied
                return
