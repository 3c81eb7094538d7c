"""Training data: a corpus packed once into memory-mapped tokens."""

from __future__ import annotations

import fcntl
import hashlib
import json
import mmap
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor

from parallel.config import option
from parallel.errors import ConfigError, DataError, refuse
from parallel.models.batch import IGNORE
from parallel.tokenizer import end_of_text, load_tokenizer, vocabulary_size, write_tokenizer
from zero.corpus import STDLIB, Corpus, Progress, held_out, sample
from zero.tokenizer import SMALLEST_VOCABULARY, encode_documents, train_bpe

__all__ = ["DataConfig", "PackedTokens", "Prepared", "Split", "prepare"]

FORMAT = 1
SPLITS = ("train", "validation")
BPE_SAMPLE = 32 << 20  # characters of text a tokenizer is trained on, at most


@dataclass(frozen=True, slots=True)
class DataConfig:
    """Which text to train on, and how it becomes tokens."""

    source: str = option(STDLIB, f"{STDLIB}, or files, folders and globs separated by commas (text, .jsonl, .parquet)")
    text_key: str = option("text", "JSON key or Parquet column that holds the text")
    tokenizer: str = option("", "tokenizer.json or Hugging Face folder; empty: train a byte-level BPE on the corpus")
    vocabulary: int = option(4096, "size of the vocabulary of a tokenizer that is trained")
    skip_broken: bool = option(False, "leave out and count documents that cannot be decoded")
    validation: float = option(0.02, "share of documents held out, chosen by the hash of their text")

    def problems(self) -> list[str]:
        found = []
        if not self.source.strip():
            found.append("source must name a corpus")
        if not self.text_key:
            found.append("text_key must not be empty")
        if not self.tokenizer and not SMALLEST_VOCABULARY <= self.vocabulary <= 1 << 24:
            found.append(f"vocabulary = {self.vocabulary} must be at least {SMALLEST_VOCABULARY} and at most {1 << 24}")
        if not 0 <= self.validation < 1:
            found.append(f"validation = {self.validation} must be at least 0 and less than 1")
        return found

    def identity(self) -> dict[str, Any]:
        """The options that decide what the packed data is."""
        return {key: value for key, value in asdict(self).items() if not (key == "vocabulary" and self.tokenizer)}


@dataclass(frozen=True, slots=True)
class Split:
    """What one split holds: tokens (end-of-text tokens included), documents, bytes of UTF-8 text."""

    tokens: int
    documents: int
    bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Prepared:
    """A folder of packed tokens and the tokenizer that made them.

    Attributes:
        folder: where they are.
        vocabulary: number of token ids.
        end_of_text: id of the token that follows every document.
        dtype: of the token files, ``"<u2"`` or ``"<u4"``.
        splits: ``"train"`` and ``"validation"``.
        skipped: documents left out, by reason.
        made_from: the identity of the configuration, the fingerprint of the source, and of a tokenizer that was
            given its hash and its end-of-text token.
    """

    folder: Path
    vocabulary: int
    end_of_text: int
    dtype: str
    splits: dict[str, Split]
    skipped: dict[str, int]
    made_from: dict[str, Any]

    @staticmethod
    def load(folder: Path, *, hashes: bool = False) -> Prepared:
        """The data in ``folder``, after a check of every file's size and, with ``hashes``, its SHA-256.

        Raises:
            DataError: no data there, or each file that is missing or damaged.
        """
        record = folder / "data.json"
        try:
            table = json.loads(record.read_text(encoding="utf-8"))
            if table["format"] != FORMAT:
                raise DataError(f"{record}: format {table['format']!r}; this version reads format {FORMAT}")
            problems = [p for name, want in table["files"].items() if (p := _damage(folder / name, want, hashes))]
            refuse(DataError, problems)
            if table["dtype"] not in ("<u2", "<u4"):
                raise ValueError(f"dtype {table['dtype']!r}")
            return Prepared(
                folder=folder,
                vocabulary=table["vocabulary"],
                end_of_text=table["end_of_text"],
                dtype=table["dtype"],
                splits={name: Split(**table["splits"][name]) for name in SPLITS},
                skipped=table["skipped"],
                made_from=table["made_from"],
            )
        except OSError as error:
            raise DataError(f"{record}: no prepared data: {error.strerror}") from error
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise DataError(f"{record}: damaged: {error!r}") from error

    def bytes_per_token(self, split: str) -> float:
        """Bytes of text that a token of the split stands for, on average (0.0 for an empty split).

        A mean loss of L nats a token is L / ln 2 / bytes_per_token bits per byte.
        """
        part = self.splits[split]
        return part.bytes / part.tokens if part.tokens else 0.0

    def open(self, split: str) -> PackedTokens:
        """The tokens of ``"train"`` or ``"validation"``, memory-mapped."""
        return PackedTokens(self.folder, split, np.dtype(self.dtype), self.vocabulary)


def prepare(config: DataConfig, folder: Path, progress: Progress | None = None) -> Prepared:
    """The packed data of ``config`` in ``folder``, made if it is not there yet.

    It is built beside ``folder`` and renamed into place when complete. Processes that prepare the same folder at once
    take turns: one builds, the others use what it built.

    Raises:
        ConfigError: options that cannot be honoured.
        DataError: a corpus or tokenizer that cannot be used; a folder that holds something else, with what differs.
    """
    refuse(ConfigError, config.problems())
    folder = folder.resolve()
    corpus, given = _inputs(config)
    made_from = config.identity() | {"fingerprint": corpus.fingerprint()}
    if given is not None:
        made_from["tokenizer_sha256"] = hashlib.sha256(given[0].to_str().encode()).hexdigest()
        made_from["end_of_text"] = given[1]
    if not (folder / "data.json").exists():
        folder.parent.mkdir(parents=True, exist_ok=True)
        with _locked(folder.parent / f".{folder.name}.lock"):
            if not (folder / "data.json").exists():
                _build(config, folder, corpus, given, made_from, _by_percent(progress))
    prepared = Prepared.load(folder)
    there = prepared.made_from
    differ = [key for key in made_from | there if there.get(key) != made_from.get(key)]
    differ = [key for key in differ if key in there and key in made_from] or differ
    refuse(DataError, [_difference(folder, key, there.get(key), made_from.get(key)) for key in differ])
    return prepared


def _by_percent(progress: Progress | None) -> Progress:
    """``progress``, called only where a whole percent is reached."""
    latest: tuple[str, int] | None = None

    def report(what: str, share: float) -> None:
        nonlocal latest
        if progress is not None and latest != (what, int(share * 100)):
            latest = (what, int(share * 100))
            progress(what, share)

    return report


def _difference(folder: Path, key: str, there: Any, asked: Any) -> str:
    if key == "fingerprint":
        return f"{folder}: made from other files (their names, sizes or times differ); remove it to make it anew"
    return f"{folder}: made with data.{key} = {there!r}, asked for is {asked!r}; remove it to make it anew"


def _inputs(config: DataConfig) -> tuple[Corpus, tuple[Tokenizer, int] | None]:
    """The corpus, and the tokenizer that is given with its end-of-text token; the problems of both at once."""
    problems: list[str] = []
    corpus = given = None
    try:
        corpus = Corpus(config.source, text_key=config.text_key, skip_broken=config.skip_broken)
    except DataError as error:
        problems += error.problems
    try:
        if config.tokenizer:
            path = Path(config.tokenizer)
            tokenizer = load_tokenizer(path)
            given = tokenizer, end_of_text(tokenizer, path if path.is_dir() else None)
    except DataError as error:
        problems += error.problems
    if corpus is None or problems:
        raise DataError(problems)
    return corpus, given


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold the lock file; the system lets go of it when the process ends, however it ends."""
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _build(
    config: DataConfig,
    folder: Path,
    corpus: Corpus,
    given: tuple[Tokenizer, int] | None,
    made_from: dict[str, Any],
    progress: Progress,
) -> None:
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise DataError(f"{folder}: exists and is not prepared data; it is left as it is")
    partial = folder.parent / f".{folder.name}.partial"
    shutil.rmtree(partial, ignore_errors=True)  # of a process that was killed
    partial.mkdir()
    try:
        if given is None:
            texts = sample(corpus, config.validation, BPE_SAMPLE, progress)
            progress("training the tokenizer", 0.0)
            tokenizer = train_bpe(iter(texts), config.vocabulary)
            given = tokenizer, end_of_text(tokenizer)
            del texts
        tokenizer, end = given
        write_tokenizer(tokenizer, partial, end=end)
        vocabulary = vocabulary_size(tokenizer)
        dtype = "<u2" if vocabulary <= 1 << 16 else "<u4"
        with _Writer(partial, "train", dtype) as train, _Writer(partial, "validation", dtype) as validation:
            for index, (text, ids) in enumerate(encode_documents(tokenizer, corpus)):
                writer = validation if held_out(index, text, config.validation) else train
                writer.add([*ids, end], len(text.encode()))
                progress("encoding", corpus.share)
        splits = {"train": asdict(train.split), "validation": asdict(validation.split)}
        if corpus.fingerprint() != made_from["fingerprint"]:
            raise DataError(f"{config.source}: a file changed while it was read")
        files = {
            path.name: {"bytes": path.stat().st_size, "sha256": _sha256(path)} for path in sorted(partial.iterdir())
        }
        table = {"format": FORMAT, "made_from": made_from, "dtype": dtype, "vocabulary": vocabulary, "end_of_text": end}
        table |= {"splits": splits, "skipped": corpus.skipped, "files": files}
        (partial / "data.json").write_text(json.dumps(table, indent=2) + "\n", encoding="utf-8")
        for path in (*partial.iterdir(), partial):
            _sync(path)
        partial.rename(folder)
        _sync(folder.parent)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


class _Writer:
    """Appends documents to the files of one split; ``split`` says what they hold."""

    def __init__(self, folder: Path, split: str, dtype: str) -> None:
        self.split = Split(0, 0, 0)
        self._dtype = dtype
        self._tokens = (folder / f"{split}.tokens").open("wb")
        self._documents = (folder / f"{split}.documents").open("wb")

    def __enter__(self) -> _Writer:
        return self

    def __exit__(self, *exception: object) -> None:
        self._documents.write(self.split.tokens.to_bytes(8, "little"))
        self._documents.close()
        self._tokens.close()

    def add(self, ids: list[int], text_bytes: int) -> None:
        self._documents.write(self.split.tokens.to_bytes(8, "little"))
        self._tokens.write(np.asarray(ids, dtype=self._dtype).tobytes())
        done = self.split
        self.split = Split(done.tokens + len(ids), done.documents + 1, done.bytes + text_bytes)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _damage(path: Path, want: dict[str, Any], hashes: bool) -> str:
    """What is wrong with a file of prepared data, or an empty string."""
    if not path.is_file():
        return f"{path}: missing"
    if (size := path.stat().st_size) != want["bytes"]:
        return f"{path}: damaged: {size} bytes, expected {want['bytes']}"
    if hashes and _sha256(path) != want["sha256"]:
        return f"{path}: damaged: its SHA-256 is not the recorded one"
    return ""


class PackedTokens:
    """One split as a memory-mapped stream of tokens, documents one after the other.

    Args:
        folder: prepared data.
        split: ``"train"`` or ``"validation"``.
        dtype: of the token file.
        vocabulary: number of token ids; a larger one in the file is refused when it is read.

    Raises:
        DataError: a file that is missing, or documents that do not end where the tokens do.
    """

    def __init__(self, folder: Path, split: str, dtype: np.dtype[Any], vocabulary: int) -> None:
        self.path = folder / f"{split}.tokens"
        self.vocabulary = vocabulary
        self._files = _Mapped(self.path, dtype), _Mapped(folder / f"{split}.documents", np.dtype("<i8"))
        self._tokens, self._documents = (file.values for file in self._files)
        if not len(self._documents) or self._documents[0] != 0 or self._documents[-1] != len(self._tokens):
            raise DataError(f"{folder / split}.documents: damaged: does not span the {len(self)} tokens of {self.path}")

    def __len__(self) -> int:
        return len(self._tokens)

    def windows(self, length: int) -> int:
        """How many windows of ``length`` tokens there are; the labels of the last need one token more."""
        return max(len(self) - 1, 0) // length

    def window(self, index: int, length: int) -> tuple[Tensor, Tensor, list[int]]:
        """Tokens ``index * length`` and on.

        Returns:
            tokens (int64, ``length``); labels (the next token of each, :data:`IGNORE` where that begins another
            document); where documents begin in the window, 0 not counted.

        Raises:
            DataError: a token id outside the vocabulary, document boundaries out of order, a file that was cut short.
        """
        if not 0 <= index < self.windows(length):
            raise IndexError(f"window {index} of {self.windows(length)}")
        for file in self._files:
            file.check()
        start = index * length
        tokens = torch.from_numpy(self._tokens[start : start + length + 1].astype(np.int64))
        if int(tokens.max()) >= self.vocabulary:
            offset = int((tokens >= self.vocabulary).nonzero()[0])
            place = f"{self.path}: token {start + offset} (byte {(start + offset) * self._tokens.itemsize})"
            raise DataError(f"{place}: id {int(tokens[offset])} is outside the vocabulary of {self.vocabulary}")
        first, last = np.searchsorted(self._documents, (start + 1, start + length + 1))
        begins = self._documents[first:last].astype(np.int64) - start
        if np.any(np.diff(begins, prepend=0, append=length + 1) <= 0):
            raise DataError(f"{self.path.with_suffix('.documents')}: damaged: out of order near entry {first}")
        labels = tokens[1:].clone()
        labels[torch.from_numpy(begins - 1)] = IGNORE
        return tokens[:-1], labels, [begin for begin in begins.tolist() if begin < length]

    def documents(self, index: int, length: int) -> tuple[int, int]:
        """The numbers of the first and the last document of which a window holds tokens."""
        start = index * length
        first, last = np.searchsorted(self._documents, (start, start + length - 1), side="right")
        return int(first) - 1, int(last) - 1


class _Mapped:
    """A file of numbers as an array in memory that the system reads as it is used.

    Raises:
        DataError: it cannot be read.
    """

    def __init__(self, path: Path, dtype: np.dtype[Any]) -> None:
        self.path, self.values, self._map = path, np.empty(0, dtype), None
        try:
            if path.stat().st_size:
                with path.open("rb") as file:
                    self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
                self.values = np.frombuffer(self._map, dtype)
        except (OSError, ValueError) as error:
            raise DataError(f"{path}: cannot be read: {error}") from error

    def check(self) -> None:
        """To be called before reading: where a file has become shorter, the system ends who reads beyond its end.

        Raises:
            DataError: it has.
        """
        if self._map is not None and (left := self._map.size()) < self.values.nbytes:
            raise DataError(f"{self.path}: cut short while it is in use: {left} of {self.values.nbytes} bytes are left")
