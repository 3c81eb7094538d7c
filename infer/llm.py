"""Generation: prompts in, completions out, at any layout."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer

from infer.build import EngineConfig, build_engine, load_text
from infer.chat import ChatTemplate
from infer.completion import Completion, Event
from infer.embedder import Embedder
from infer.engine import Engine
from infer.params import SamplingParams
from infer.request import RequestError
from parallel import comm
from parallel.errors import ConfigError, DataError
from parallel.hf import load_model, read_config
from parallel.mesh import Mesh
from parallel.models.build import Build
from parallel.models.encoder_config import EncoderConfig

__all__ = ["LLM"]


class LLM:
    """A model folder, ready to continue prompts and to embed documents (encoders: only that).

    Every rank of the mesh calls the same methods with the same arguments and gets the same results. Data-parallel
    replicas share the prompts of a call.

    Args:
        folder: a Hugging Face model folder.
        mesh: the ranks that share the model; None: this process alone.
        dtype: of weights and activations.
        config: of the engine.
        ranks: processes that share this device's memory.

    Attributes:
        embed: documents -> vectors; see :class:`~infer.embedder.Embedder`. Nothing is cached.
        notes: lines that say how memory was divided.

    Raises:
        ModelFolderError: every problem of the folder.
        ConfigError: the mesh cannot share the model, or there is not enough memory for one sequence.
    """

    def __init__(
        self,
        folder: Path | str,
        *,
        mesh: Mesh | None = None,
        dtype: torch.dtype = torch.float32,
        config: EngineConfig | None = None,
        ranks: int = 1,
    ) -> None:
        self.folder, self.mesh = Path(folder), Mesh.single() if mesh is None else mesh
        self.config = EngineConfig() if config is None else config
        self.tokenizer: Tokenizer | None = load_text(self.folder)
        self.notes: tuple[str, ...] = ()
        self._engine: Engine | None = None
        if isinstance(read_config(self.folder, encoders=True), EncoderConfig):
            model = load_model(self.folder, Build(mesh=self.mesh, dtype=dtype), encoders=True).eval()
            embedder = Embedder(self.folder, model, self.tokenizer)
        else:
            self._engine, sizing = build_engine(
                self.folder, self.mesh, dtype, self.config, tokenizer=self.tokenizer, ranks=ranks
            )
            embedder, self.notes = self._engine.embedder, sizing.lines
            assert embedder is not None
        self.embed = embedder

    @property
    def engine(self) -> Engine:
        """Does the work; only between two calls may others use it.

        Raises:
            ConfigError: the model is an encoder.
        """
        if self._engine is None:
            raise ConfigError(f"{self.folder} is an encoder: it embeds texts, and cannot continue them")
        return self._engine

    def generate(
        self,
        prompts: Sequence[str | Sequence[int]],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        priorities: Sequence[int] | None = None,
        watch: Callable[[Event], None] | None = None,
    ) -> list[Completion]:
        """Continue every prompt, many at a time; completions come in the order of the prompts.

        Args:
            prompts: texts, or token ids.
            params: for all, or one for each.
            priorities: of each; the lower, the sooner.
            watch: called with everything that this replica generates, as it comes.

        Returns:
            of each prompt; one that cannot be continued as asked is refused alone, and has ``error`` with every reason.

        Raises:
            RequestError: there are not as many parameters or priorities as prompts.
            DataError: the prompts are texts, and the model has no tokenizer.
        """
        own, done = self._add(prompts, params, priorities)
        while self.engine.busy:
            for event in self.engine.step():
                if event.completion is not None:
                    done[own[event.id]] = event.completion
                if watch is not None:
                    watch(event)
        return self._of_all(done, len(prompts))

    def stream(self, prompt: str | Sequence[int], params: SamplingParams | None = None) -> Iterator[Event]:
        """Continue one prompt, piece by piece; the last event has the whole. Whoever stops early ends the request.

        Raises:
            RequestError: it cannot be continued, with every reason.
        """
        engine, seed = self.engine, self._seed()
        id = engine.add(self._encode(prompt), params, seed=seed)
        try:
            while engine.busy:
                yield from engine.step()
        finally:
            engine.abort(id)

    def chat(
        self,
        conversations: Sequence[Sequence[Mapping[str, Any]]],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        **variables: Any,
    ) -> list[Completion]:
        """Answer conversations: :meth:`generate` of what the model's chat template makes of them.

        Args:
            conversations: messages of each, with ``role`` and ``content``.
            params: for all, or one for each.
            tools: descriptions of functions that the model may call.
            variables: others of the template.

        Raises:
            ModelFolderError: the model has no chat template.
            RequestError: a conversation that the template refuses, and as :meth:`generate`.
        """
        template = ChatTemplate(self.folder)
        texts = [template.render(messages, tools=tools, **variables) for messages in conversations]
        if self.tokenizer is None:
            raise DataError("the model folder has no tokenizer")
        encode = self.tokenizer.encode
        return self.generate([encode(text, add_special_tokens=False).ids for text in texts], params)

    def _add(
        self,
        prompts: Sequence[str | Sequence[int]],
        params: SamplingParams | Sequence[SamplingParams] | None,
        priorities: Sequence[int] | None,
    ) -> tuple[dict[int, int], dict[int, Completion]]:
        """Queue what is this replica's: engine's number -> place among the prompts; and what was refused, by place."""
        given = [params or SamplingParams()] * len(prompts) if not isinstance(params, Sequence) else list(params)
        ranks = [0] * len(prompts) if priorities is None else list(priorities)
        if len(given) != len(prompts) or len(ranks) != len(prompts):
            raise RequestError(f"{len(prompts)} prompts, {len(given)} parameters and {len(ranks)} priorities")
        encoded = [self._encode(prompt) for prompt in prompts]
        seed, dp = self._seed(), self.mesh.dp
        own: dict[int, int] = {}
        refused: dict[int, Completion] = {}
        for place in range(dp.rank, len(prompts), dp.size):
            try:
                own_seed = (seed + place) % 2**63
                id = self.engine.add(encoded[place], given[place], priority=ranks[place], seed=own_seed)
                own[id] = place
            except RequestError as error:
                refused[place] = Completion.refused(encoded[place], error.problems)
        return own, refused

    def _encode(self, prompt: str | Sequence[int]) -> list[int]:
        if not isinstance(prompt, str):
            return list(prompt)
        if self.tokenizer is None:
            raise DataError("the model folder has no tokenizer: give prompts as token ids")
        return self.tokenizer.encode(prompt).ids

    def _seed(self) -> int:
        """One that nobody knows, the same on every rank."""
        return comm.gather_json(secrets.randbits(62), self.mesh.world)[0]

    def _of_all(self, own: dict[int, Completion], count: int) -> list[Completion]:
        """The completions of every replica."""
        found = own
        if self.mesh.dp.size > 1:
            told: list[Any] = [[place, completion.to_json()] for place, completion in own.items()]
            found = {
                place: Completion.from_json(values)
                for part in comm.gather_json(told, self.mesh.dp)
                for place, values in part
            }
        return [found[place] for place in range(count)]
