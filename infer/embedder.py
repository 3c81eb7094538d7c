"""Texts or token ids in, vectors out, as a model folder says."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from tokenizers import Tokenizer
from torch import Tensor

from infer.embed import Pooling, embed
from infer.sentences import Sentences, encode_texts, read_sentences, text_tokenizer
from parallel.errors import DataError
from parallel.models.decoder import Decoder
from parallel.models.encoder import Encoder

__all__ = ["Embedder"]


class Embedder:
    """A model and what its folder says about embeddings.

    Args:
        folder: of the model.
        model: loaded from it.
        tokenizer: of the folder; None: documents are token ids.

    Raises:
        ModelFolderError: the folder asks for something that we do not do.
    """

    def __init__(self, folder: Path, model: Decoder | Encoder, tokenizer: Tokenizer | None) -> None:
        self.model, self.tokenizer = model, tokenizer
        self.how = read_sentences(folder) or Sentences(pooling="mean" if isinstance(model, Encoder) else "last")

    def __call__(
        self,
        documents: Sequence[str | Sequence[int]],
        *,
        pooling: Pooling | None = None,
        normalize: bool | None = None,
        prompt: str | None = None,
        truncate: bool = False,
        budget: int = 2048,
    ) -> Tensor:
        """(n, D) in the order of the documents, as :func:`~infer.embed.embed`.

        Args:
            documents: texts, or token ids with special tokens.
            pooling, normalize: as there; None: as the folder says (else the mean of an encoder's hidden states, and the
                last one of a decoder's).
            prompt: name of what the folder puts before a text.
            truncate: cut texts that are too long, instead of refusing them.
            budget: most tokens a step.

        Raises:
            ConfigError, DataError: as there.
        """
        texts = [document for document in documents if isinstance(document, str)]
        if texts and self.tokenizer is None:
            raise DataError("the model folder has no tokenizer: give documents as token ids")
        encoded: list[list[int]] = []
        if self.tokenizer is not None and texts:
            tokenizer = text_tokenizer(self.tokenizer, self.how, truncate=truncate)
            encoded = encode_texts(tokenizer, texts, self.how, prompt=prompt)
        of_texts = iter(encoded)
        ids = [next(of_texts) if isinstance(document, str) else document for document in documents]
        return embed(
            self.model,
            ids,
            pooling=self.how.pooling if pooling is None else pooling,
            normalize=self.how.normalize if normalize is None else normalize,
            budget=budget,
        )
