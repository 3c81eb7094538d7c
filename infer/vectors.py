"""An engine that makes vectors and nothing else: no cache, no scheduler."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, NoReturn

import torch
from tokenizers import Tokenizer

from infer.audit import Stats
from infer.completion import Event
from infer.embedder import Embedder
from infer.limits import Limits
from infer.request import RequestError
from parallel.errors import ConfigError, ModelFolderError, Refusal, refuse
from parallel.hf import load_model, read_config
from parallel.mesh import Mesh
from parallel.models.build import Build
from parallel.models.decoder import Decoder
from parallel.models.encoder_config import EncoderConfig
from parallel.tp.method import Packed

__all__ = ["Task", "VectorEngine", "build_vectors", "makes_vectors", "trained_sizes"]

Task = Literal["auto", "generate", "embed"]


class VectorEngine:
    """Has the face of :class:`~infer.engine.Engine`, but refuses to continue prompts; every rank makes the same calls.

    Args:
        embedder: makes the vectors.
        limits: of the model.
        budget: most tokens that are computed at a time, but for a document that is longer.
    """

    busy = False
    """Nothing is left between two calls."""

    def __init__(self, embedder: Embedder, limits: Limits, budget: int) -> None:
        self.embedder, self.limits, self.budget = embedder, limits, budget
        self._steps = self._computed = 0

    @property
    def stats(self) -> Stats:
        """What was computed so far; there are no pages."""
        none: tuple[int, ...] = ()
        return Stats(0, 0, 0, none, none, none, none, none, none, 0, self._steps, self._computed, 0, 0, 0, none)

    @property
    def probe(self) -> int:
        """A token that every model here can embed."""
        config = self.embedder.model.config
        return int(isinstance(config, EncoderConfig) and config.first_position == 1)  # 0 is padding then

    def add(self, *prompt: object, **options: object) -> NoReturn:
        """Refuse a prompt.

        Raises:
            RequestError: always.
        """
        raise RequestError("this engine makes vectors and cannot continue texts")

    def abort(self, id: int) -> bool:
        """False: there is nothing to end."""
        return False

    def embed(self, documents: Sequence[Sequence[int]]) -> list[list[float]]:
        """One vector for each document.

        Args:
            documents: token ids of each.

        Raises:
            RequestError: these documents cannot be embedded, with every reason; nothing is computed.
        """
        longest = max(map(len, documents), default=0)
        try:
            vectors = self.embedder(documents, budget=max(self.budget, longest))
        except Refusal as error:
            raise RequestError(error.problems) from None
        self._steps += 1
        self._computed += sum(map(len, documents))
        return vectors.float().tolist()

    def step(self) -> list[Event]:
        """Nothing is left to do."""
        return []

    def close(self) -> None:
        """There is nothing to let go of."""


def makes_vectors(folder: Path, task: Task) -> bool:
    """Whether a folder is served for vectors only; ``auto``: encoders and folders of sentence-transformers are.

    Raises:
        ModelFolderError: the configuration of the model cannot be read.
        ConfigError: an encoder is to generate.
    """
    encoder = isinstance(read_config(folder, encoders=True), EncoderConfig)
    if task == "generate" and encoder:
        raise ConfigError("task = generate: the model is an encoder: it embeds texts, and cannot continue them")
    return task == "embed" or (task == "auto" and (encoder or (folder / "modules.json").exists()))


def build_vectors(
    folder: Path, mesh: Mesh, dtype: torch.dtype, *, tokenizer: Tokenizer | None, context: int = 0, budget: int = 2048
) -> VectorEngine:
    """Load a model for its vectors; every rank of the mesh calls it.

    Args:
        folder: a Hugging Face model folder, of an encoder or a decoder.
        mesh: the ranks that share it.
        dtype: of weights and activations.
        tokenizer: None: there is no text.
        context: most tokens of a document; 0: what the model was made for.
        budget: most tokens that are computed at a time.

    Raises:
        ModelFolderError: every problem of the folder.
        ConfigError: the mesh cannot share the model.
    """
    if mesh.pp.size > 1:
        raise ConfigError(f"layout.pp = {mesh.pp.size}: vectors need the whole model on each rank; use layout.tp")
    build = Build(mesh=mesh, dtype=dtype, linear=lambda _name: Packed())
    model = load_model(folder, build, encoders=True).eval()
    if isinstance(model, Decoder):
        model.head = None
    for module in model.modules():
        method = getattr(module, "method", None)
        if isinstance(method, Packed):
            method.finish(module.weight, keep=False)  # pyright: ignore[reportArgumentType]
    limits = Limits.of(folder, model.config, context=context, text=tokenizer is not None)
    return VectorEngine(Embedder(folder, model, tokenizer), limits, budget)


def trained_sizes(folder: Path) -> Sequence[int]:
    """The sizes to which a model's vectors may be cut (arXiv 2205.13147), as its config.json says; none: whole only.

    Raises:
        ModelFolderError: it says so in a way that cannot be.
    """
    path, width = folder / "config.json", read_config(folder, encoders=True).hidden
    config = json.loads(path.read_bytes())
    sizes = config.get("matryoshka_dimensions")
    problems: list[str] = []
    if sizes is not None and not (
        isinstance(sizes, list)
        and all(isinstance(size, int) and not isinstance(size, bool) and 0 < size <= width for size in sizes)
    ):
        problems.append(f"{path}: matryoshka_dimensions = {sizes!r}: must be sizes of at most {width}")
    if not isinstance(config.get("is_matryoshka", False), bool | None):
        problems.append(f"{path}: is_matryoshka = {config['is_matryoshka']!r}: must be true or false")
    refuse(ModelFolderError, problems)
    if sizes is not None:
        return tuple(sizes)
    return range(1, width + 1) if config.get("is_matryoshka") else ()
