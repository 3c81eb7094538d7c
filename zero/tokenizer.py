"""Byte-level BPE: train a tokenizer on a corpus, and encode documents with one."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from parallel.errors import ConfigError
from parallel.tokenizer import END_OF_TEXT

__all__ = ["SMALLEST_VOCABULARY", "encode_documents", "train_bpe"]

BATCH = 1 << 20  # characters of text encoded at once, about
SMALLEST_VOCABULARY = 257
"""All 256 bytes and the end-of-text token."""

# The split of GPT-4's cl100k_base, as Llama 3 writes it: words keep one leading character, numbers go by three digits,
# newlines end a piece together with the blanks before them, and an indentation stays one piece but for its last blank.
SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def train_bpe(documents: Iterator[str], vocabulary: int) -> Tokenizer:
    """A byte-level BPE tokenizer trained on ``documents``; the same documents give the same tokenizer.

    ``<|endoftext|>`` is id 0, and every text survives ``decode(encode(text))``. The vocabulary is smaller than asked
    for where the documents have too few distinct pieces.

    Raises:
        ConfigError: a vocabulary that does not hold all bytes and the end-of-text token.
    """
    if vocabulary < SMALLEST_VOCABULARY:
        raise ConfigError(f"a byte-level vocabulary needs at least {SMALLEST_VOCABULARY} entries, not {vocabulary}")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(documents, trainer)
    return tokenizer


def encode_documents(tokenizer: Tokenizer, documents: Iterable[str]) -> Iterator[tuple[str, list[int]]]:
    """Each document and its token ids, encoded a batch at a time.

    Nothing is added to a document or cut from it, and a special token that it spells out is plain text.
    """
    plain = Tokenizer.from_str(tokenizer.to_str())
    plain.no_truncation()
    plain.no_padding()
    plain.encode_special_tokens = True
    for texts in _batches(documents):
        encodings = plain.encode_batch_fast(texts, add_special_tokens=False)
        yield from ((text, encoding.ids) for text, encoding in zip(texts, encodings, strict=True))


def _batches(documents: Iterable[str]) -> Iterator[list[str]]:
    batch: list[str] = []
    size = 0
    for document in documents:
        batch.append(document)
        size += len(document)
        if size >= BATCH:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch
