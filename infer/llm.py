"""Generation: prompts in, completions out, at any tensor-parallel layout."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import torch
from tokenizers import Tokenizer

from infer.kv import CachedAttention, StepBatch
from infer.request import Completion, Request, SamplingParams, Slice, plan, prompt_problems
from parallel.errors import ConfigError, DataError, refuse
from parallel.hf import load_model
from parallel.mesh import Mesh
from parallel.models.build import Build
from parallel.models.config import DecoderConfig
from parallel.models.decoder import Decoder
from parallel.tokenizer import load_tokenizer

__all__ = ["LLM"]


class LLM:
    """A model folder, ready to continue prompts.

    Every rank of the mesh calls :meth:`generate` with the same prompts and gets the same completions.

    Args:
        folder: a Hugging Face model folder.
        mesh: the ranks that share the model; None: this process alone.
        dtype: of weights, activations and cache.
        budget: most tokens a step.
        requests: most requests a step.

    Raises:
        ModelFolderError: every problem of the folder.
        ConfigError: the mesh cannot share the model.
    """

    def __init__(
        self,
        folder: Path | str,
        *,
        mesh: Mesh | None = None,
        dtype: torch.dtype = torch.float32,
        budget: int = 2048,
        requests: int = 256,
    ) -> None:
        folder = Path(folder)
        self.mesh = Mesh.single() if mesh is None else mesh
        self._cores: list[CachedAttention] = []
        self.model: Decoder = load_model(folder, Build(mesh=self.mesh, dtype=dtype, attention=self._core))
        self.model.eval()
        self.tokenizer: Tokenizer | None = (
            load_tokenizer(folder) if (folder / "tokenizer.json").exists() or _other_tokenizer(folder) else None
        )
        self.ends = _end_tokens(folder)
        self.budget, self.requests = budget, requests

    @torch.inference_mode()
    def generate(
        self, prompts: Sequence[str | Sequence[int]], params: SamplingParams | None = None
    ) -> list[Completion]:
        """Continue every prompt, many at a time; completions come in the order of the prompts.

        Args:
            prompts: texts, or token ids.
            params: the same for all.

        Raises:
            ConfigError: parameters that cannot be honoured.
            DataError: an empty prompt, a token id outside the vocabulary, a text too long for learned positions.
        """
        params = SamplingParams() if params is None else params
        refuse(ConfigError, params.problems())
        encoded = [self._encode(prompt) for prompt in prompts]
        config = self.model.config
        longest = config.max_positions if config.positions == "learned" else None
        refuse(DataError, prompt_problems(encoded, params, vocabulary=config.vocabulary, longest=longest))
        requests = [Request(index, list(ids), len(ids), params) for index, ids in enumerate(encoded)]
        while slices := plan(requests, self.budget, self.requests):
            self._step(slices)
        return [self._completion(request) for request in requests]

    def _core(self, config: DecoderConfig, layer: int, build: Build) -> CachedAttention:
        self._cores.append(CachedAttention(config, layer, build))
        return self._cores[-1]

    def _encode(self, prompt: str | Sequence[int]) -> list[int]:
        if not isinstance(prompt, str):
            return list(prompt)
        if self.tokenizer is None:
            raise DataError("the model folder has no tokenizer: give prompts as token ids")
        return self.tokenizer.encode(prompt).ids

    def _step(self, slices: Sequence[Slice]) -> None:
        """Compute one packed step, and commit what it chose."""
        device, ends = self.mesh.device, [0]
        for piece in slices:
            ends.append(ends[-1] + piece.stop - piece.start)
        tokens = [token for piece in slices for token in piece.request.tokens[piece.start : piece.stop]]
        positions = [position for piece in slices for position in range(piece.start, piece.stop)]
        batch = StepBatch(
            tokens_T=torch.tensor(tokens, device=device),
            positions_T=torch.tensor(positions, device=device),
            boundaries=tuple(ends),
            requests=tuple(piece.request.id for piece in slices),
        )
        hidden = self.model.hidden(batch)
        sampled = [index for index, piece in enumerate(slices) if piece.samples]
        chosen: list[int] = []
        if sampled:
            rows = torch.tensor([ends[index + 1] - 1 for index in sampled], device=device)
            assert self.model.head is not None
            chosen = self.model.head(hidden[rows]).argmax(-1).tolist()
        for piece in slices:
            piece.request.computed = piece.stop
        for index, token in zip(sampled, chosen, strict=True):
            request = slices[index].request
            request.commit(token, self.ends)
            if request.finished is not None:
                for core in self._cores:
                    core.release(request.id)

    def _completion(self, request: Request) -> Completion:
        assert request.finished is not None
        prompt, tokens = tuple(request.tokens[: request.prompt]), tuple(request.tokens[request.prompt :])
        text = "" if self.tokenizer is None else self.tokenizer.decode(list(tokens), skip_special_tokens=True)
        return Completion(prompt, tokens, text, request.finished)


def _other_tokenizer(folder: Path) -> bool:
    return any((folder / name).exists() for name in ("tokenizer_config.json", "tokenizer.model", "vocab.json"))


def _end_tokens(folder: Path) -> tuple[int, ...]:
    """The ids that end a text: of generation_config.json, else of config.json."""
    for name in ("generation_config.json", "config.json"):
        path = folder / name
        given = json.loads(path.read_text()).get("eos_token_id") if path.exists() else None
        if given is not None:
            return tuple(given) if isinstance(given, list) else (given,)
    return ()
