"""A rank's pieces of a model, read from a Hugging Face folder."""

from __future__ import annotations

from contextlib import ExitStack
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, overload

import torch
from safetensors import safe_open
from torch import Tensor

from parallel.errors import ConfigError, refuse
from parallel.hf.folder import Folder, inspect
from parallel.models.build import Build
from parallel.models.decoder import Decoder, empty_model
from parallel.models.encoder import Encoder, empty_encoder
from parallel.models.encoder_config import EncoderConfig
from parallel.shard import Box, assemble, param_shards

__all__ = ["FolderReader", "load_model"]


class FolderReader:
    """The open files of an inspected folder; a context manager."""

    def __init__(self, folder: Folder) -> None:
        self._folder = folder
        self._stack = ExitStack()
        self._files: dict[Path, Any] = {}

    def __enter__(self) -> FolderReader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._files.clear()
        self._stack.close()

    def read(self, name: str, box: Box) -> Tensor:
        """A box of one of our parameters, in the type that is stored; no other bytes are read."""
        rows, rest = box[0], box[1:]
        found: list[Tensor] = []
        for part in self._folder.parts[name]:
            first, end = max(rows.start, part.first), min(rows.stop, part.first + part.rows)
            if first < end:
                own = (slice(first - part.first, end - part.first), *rest)
                found.append(self._slice(part.name, own[::-1]).t() if part.transposed else self._slice(part.name, own))
        return found[0] if len(found) == 1 else torch.cat(found)

    def _slice(self, name: str, box: Box) -> Tensor:
        entry = self._folder.entries[name]
        if entry.file not in self._files:
            self._files[entry.file] = self._stack.enter_context(safe_open(entry.file, "pt"))
        return self._files[entry.file].get_slice(entry.name)[box]


@overload
def load_model(folder: Path, build: Build, *, encoders: Literal[False] = False) -> Decoder: ...
@overload
def load_model(folder: Path, build: Build, *, encoders: bool) -> Decoder | Encoder: ...
def load_model(folder: Path, build: Build, *, encoders: bool = False) -> Decoder | Encoder:
    """The model of a Hugging Face folder, of which this rank reads and holds its pieces only.

    Args:
        folder: config.json and safetensors files, one or many.
        build: the layout, and the type to convert to.
        encoders: whether the caller has a use for an encoder as well; config.json says which it is.

    Raises:
        ModelFolderError: with every problem of the folder, found before anything is allocated.
        ConfigError: the layout cannot share the model.
    """
    found = inspect(folder, encoders=encoders)
    model: Decoder | Encoder
    if isinstance(found.config, EncoderConfig):
        model = empty_encoder(found.config, build)
    else:
        model = empty_model(found.config, build)
    shards = param_shards(model)
    refuse(ConfigError, (f"{folder}: nothing there fills {name}" for name in shards if name not in found.parts))
    with FolderReader(found) as reader, torch.no_grad():
        for name, parameter in model.named_parameters():
            local = assemble(shards[name], build.mesh.place, partial(reader.read, name), parameter.dtype)
            parameter.copy_(local)
    return model
