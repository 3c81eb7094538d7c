"""A model as a Hugging Face folder, written a parameter at a time and published whole or not at all."""

from __future__ import annotations

import json
import os
import secrets
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from parallel import comm
from parallel.errors import ConfigError, ModelFolderError, RankError, Refusal, ShardError, refuse
from parallel.hf.folder import INDEX, SINGLE
from parallel.hf.stream import write_file
from parallel.hf.table import ModelConfig, Part, parts, whole_shards
from parallel.holders import holders
from parallel.mesh import Mesh
from parallel.models.decoder import Decoder
from parallel.models.encoder import Encoder
from parallel.models.encoder_config import EncoderConfig
from parallel.models.families import ENCODERS, FAMILIES
from parallel.shard import Shard

__all__ = ["save_model", "write_folder"]

_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
    "chat_template.jinja",
)


def write_folder(
    config: ModelConfig,
    tensors: Callable[[str], Tensor],
    folder: Path,
    *,
    dtype: torch.dtype,
    max_file_bytes: int = 2 << 30,
    tokenizer: Path | None = None,
    bos: int | None = None,
    eos: int | Sequence[int] | None = None,
    overwrite: bool = False,
) -> None:
    """Write a Hugging Face folder, with no more than one parameter in memory.

    Everything is written beside ``folder``, which appears under its name when it is complete.

    Args:
        config: of the model.
        tensors: our parameter name -> the whole tensor; asked once for each, in the order of the model's parameters.
        folder: must not exist, or be empty.
        dtype: that floating-point values are converted to.
        max_file_bytes: more are written as several files with an index; a parameter is never divided.
        tokenizer: a folder whose tokenizer files are copied.
        bos, eos: ids of special tokens.
        overwrite: replace ``folder`` if it is a model folder.

    Raises:
        ConfigError: the family cannot express the model.
        ModelFolderError: the folder exists, or there is no tokenizer where one was promised.
        ShardError: a tensor of the wrong shape.
    """
    folder = Path(folder)
    _check(config, folder, tokenizer, overwrite)
    folder.parent.mkdir(parents=True, exist_ok=True)
    draft = folder.parent / f".{folder.name}.{secrets.token_hex(4)}"
    draft.mkdir()
    try:
        _write_tensors(config, tensors, draft, dtype, max_file_bytes)
        ids = {"bos_token_id": bos, "eos_token_id": list(eos) if isinstance(eos, Sequence) else eos}
        name = str(dtype).removeprefix("torch.")
        described = _described(config) | {"dtype": name, "torch_dtype": name} | ids
        _write_json(draft / "config.json", described)
        _write_json(draft / "generation_config.json", {key: value for key, value in ids.items() if value is not None})
        for file in _TOKENIZER_FILES if tokenizer is not None else ():
            if tokenizer is not None and (Path(tokenizer) / file).is_file():
                shutil.copyfile(Path(tokenizer) / file, draft / file)
        _publish(draft, folder)
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def _described(config: ModelConfig) -> dict[str, Any]:
    if isinstance(config, EncoderConfig):
        return ENCODERS[config.family].write(config)
    return FAMILIES[config.family].write(config)


def _check(config: ModelConfig, folder: Path, tokenizer: Path | None = None, overwrite: bool = False) -> None:
    """Refuse before anything is written."""
    refuse(ConfigError, _config_problems(config))
    refuse(ModelFolderError, _problems(folder, tokenizer, overwrite))


def _config_problems(config: ModelConfig) -> Iterator[str]:
    yield from config.problems()
    if isinstance(config, EncoderConfig):
        yield from ENCODERS[config.family].problems(config)
    else:
        yield from FAMILIES[config.family].problems(config)
    if config.vocabulary < 1:
        yield "vocabulary is not known"


def _problems(folder: Path, tokenizer: Path | None, overwrite: bool) -> Iterator[str]:
    if tokenizer is not None and not any((Path(tokenizer) / file).is_file() for file in _TOKENIZER_FILES):
        yield f"{tokenizer}: holds no tokenizer"
    if folder.exists() and not folder.is_dir():
        yield f"{folder}: is a file"
    elif folder.is_dir() and any(folder.iterdir()):
        if not overwrite:
            yield f"{folder}: exists and is not empty; to replace an exported folder, say overwrite"
        elif not (folder / "config.json").is_file() or any(path.is_dir() for path in folder.iterdir()):
            yield f"{folder}: is not a model folder, and is not overwritten"


def _write_tensors(
    config: ModelConfig, tensors: Callable[[str], Tensor], draft: Path, dtype: torch.dtype, limit: int
) -> None:
    shards, table = whole_shards(config), parts(config)
    files = _plan(shards, dtype.itemsize, limit)
    weight_map: dict[str, str] = {}
    for number, names in enumerate(files, start=1):
        file = SINGLE if len(files) == 1 else f"model-{number:05}-of-{len(files):05}.safetensors"
        shapes = {part.name: part.shape for name in names for part in table[name]}
        pieces = (_divided(name, tensors(name), shards[name], table[name], dtype).items() for name in names)
        write_file(draft / file, shapes, dtype, chain.from_iterable(pieces))
        weight_map |= dict.fromkeys(shapes, file)
    if len(files) > 1:
        total = sum(_numel(shard) for shard in shards.values()) * dtype.itemsize
        _write_json(draft / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})


def _plan(shards: Mapping[str, Shard], itemsize: int, limit: int) -> list[list[str]]:
    """The parameters of each file."""
    files: list[list[str]] = [[]]
    filled = 0
    for name, shard in shards.items():
        size = _numel(shard) * itemsize
        if files[-1] and filled + size > limit:
            files.append([])
            filled = 0
        files[-1].append(name)
        filled += size
    return files


def _numel(shard: Shard) -> int:
    return torch.Size(shard.shape).numel()


def _divided(name: str, whole: Tensor, shard: Shard, held: Sequence[Part], dtype: torch.dtype) -> dict[str, Tensor]:
    if tuple(whole.shape) != shard.shape:
        raise ShardError(f"{name}: expected the whole tensor {shard.shape}, got {tuple(whole.shape)}")
    whole = whole.detach().to(device="cpu", dtype=dtype)
    runs = {part: whole[part.first : part.first + part.rows] for part in held}
    return {part.name: (run.t() if part.transposed else run).contiguous() for part, run in runs.items()}


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n")


def _publish(draft: Path, folder: Path) -> None:
    """Give a complete draft its name; what bore it is removed afterwards."""
    for path in (*draft.iterdir(), draft):
        _sync(path)
    old = None
    if folder.exists() and any(folder.iterdir()):
        old = draft.with_name(draft.name + ".old")
        folder.rename(old)
    draft.rename(folder)
    _sync(folder.parent)
    if old is not None:
        shutil.rmtree(old)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def save_model(
    model: Decoder | Encoder,
    mesh: Mesh,
    folder: Path,
    *,
    dtype: torch.dtype | None = None,
    max_file_bytes: int = 2 << 30,
    tokenizer: Path | None = None,
    bos: int | None = None,
    eos: int | Sequence[int] | None = None,
    overwrite: bool = False,
) -> None:
    """Write a model that ranks share as a Hugging Face folder; every rank calls it, and rank 0 writes.

    Rank 0 receives one parameter at a time from the ranks of the first replica.

    Args:
        model: this rank's part.
        mesh: that it was built on.
        folder: on a file system that rank 0 sees; the other arguments as for :func:`write_folder`.
        dtype: of the values in the folder; default: the model's.

    Raises:
        ConfigError, ModelFolderError: as for :func:`write_folder`, on every rank.
        RankError: on the other ranks, where rank 0 could not write.
    """
    folder = Path(folder)
    _together(mesh, folder, lambda: _check(model.config, folder, tokenizer, overwrite))
    exchange = _Exchange(model, mesh, next(model.parameters()).dtype if dtype is None else dtype)

    def write() -> None:
        try:
            write_folder(
                model.config,
                exchange.receive,
                folder,
                dtype=exchange.dtype,
                max_file_bytes=max_file_bytes,
                tokenizer=tokenizer,
                bos=bos,
                eos=eos,
                overwrite=overwrite,
            )
        finally:
            exchange.drain()

    _together(mesh, folder, write, exchange.send_all)


def _together(mesh: Mesh, folder: Path, first: Callable[[], None], others: Callable[[], None] | None = None) -> None:
    """Run ``first`` on rank 0 and ``others`` on the rest; all learn of what rank 0 raised."""
    raised: Exception | None = None
    if mesh.rank == 0:
        try:
            first()
        except Exception as error:  # noqa: BLE001 - told to the other ranks, then raised
            raised = error
    elif others is not None:
        others()
    told = None
    if raised is not None:
        told = [type(raised).__name__, *(raised.problems if isinstance(raised, Refusal) else [repr(raised)])]
    told = comm.gather_json(told, mesh.world)[0]
    if raised is not None:
        raise raised
    if told is not None:
        kind = {"ConfigError": ConfigError, "ModelFolderError": ModelFolderError}.get(told[0])
        raise kind(told[1:]) if kind else RankError(f"rank 0 could not write {folder}: {told[1]}")


class _Exchange:
    """Who holds which parameter, and the way of each to rank 0."""

    def __init__(self, model: Decoder | Encoder, mesh: Mesh, dtype: torch.dtype) -> None:
        self.mesh, self.dtype = mesh, dtype
        self.shards = whole_shards(model.config)
        self.own = dict(model.named_parameters())
        self.stages = {name: ranks[0] for name, ranks in holders(self.own, mesh).items()}
        self.left = list(self.shards)

    def receive(self, name: str) -> Tensor:
        """On rank 0: the whole parameter. Every other rank sends them in the same order."""
        self.left.remove(name)
        shard = self.shards[name]
        pieces: list[tuple[Mapping[str, tuple[int, int]], Tensor]] = []
        for rank in self._holders(name):
            place = self.mesh.layout.place(rank)
            if rank == 0:
                local = self.own[name].detach().to(self.dtype)
            else:
                local = torch.empty(shard.local_shape(place), dtype=self.dtype, device=self.mesh.device)
                comm.receive_(local, self.mesh.world, rank)
            pieces.append((place, local.cpu()))
        return shard.join(pieces)

    def send_all(self) -> None:
        """On the other ranks: what rank 0 lacks, if it is ours to give."""
        for name in self.shards:
            if self.mesh.rank in self._holders(name):
                comm.send(self.own[name].detach().to(self.dtype), self.mesh.world, 0)

    def drain(self) -> None:
        """Receive what is left, for nothing."""
        for name in list(self.left):
            self.receive(name)

    def _holders(self, name: str) -> list[int]:
        """The global ranks that give their piece: of the stage that holds it, and of the first replica."""
        layout = self.mesh.layout
        first = self.stages[name] * layout.dp * layout.cp * layout.tp
        return [first + rank for rank in range(layout.tp if "tp" in self.shards[name].split else 1)]
