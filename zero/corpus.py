"""Corpus: a source of text, read document by document, never held in memory as a whole."""

from __future__ import annotations

import glob
import hashlib
import heapq
import json
import os
import sysconfig
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from parallel.errors import DataError, nearest, refuse

__all__ = ["STDLIB", "Corpus", "Progress", "SourceFile", "held_out", "sample"]

STDLIB = "python-stdlib"
"""The source that is always there: the standard library of the running Python."""

TEXT_SUFFIXES = (
    ".txt .text .md .rst .tex .py .pyi .c .h .cc .cpp .hpp .cu .cuh .java .js .ts .go .rs .rb .jl .sh .sql"
    " .toml .yaml .yml .ini .cfg .html .css .xml"
)
SUFFIXES = frozenset(f"{TEXT_SUFFIXES} .jsonl .parquet".split())
STDLIB_SKIPPED = frozenset(
    {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__", "encodings", "pydoc_data"}
)
"""Folders of the standard library that are left out: tests, other people's packages, and generated tables."""
SHOWN = 20


@dataclass(frozen=True, slots=True)
class SourceFile:
    """One file of a corpus: the name it goes by in messages, where it is, and whether it may be broken."""

    name: str
    path: Path
    may_be_broken: bool = False


@dataclass(frozen=True, slots=True)
class Broken:
    """A document that cannot be read: where it is, and why."""

    place: str
    reason: str

    def __str__(self) -> str:
        return f"{self.place}: {self.reason}"


Progress = Callable[[str, float], None]
"""Called with what is being done, and the share of it that is done, 0 to 1."""

Reader = Callable[[SourceFile, str], Iterator[tuple[int, str | Broken]]]
"""From a file and the text key: bytes of the file consumed so far, and a document."""


class Corpus:
    """The documents of a source, in a fixed order; iterating again reads the files again.

    Args:
        source: files, folders and glob patterns separated by commas, and ``"python-stdlib"``. Folders are searched
            recursively for supported files (hidden ones are left out), in the order of their relative paths. A file
            that is named twice is read once. A text file is one document; ``.jsonl`` holds one object a line;
            ``.parquet`` one row a document.
        text_key: the key of a JSON object, or the column of a Parquet file, that holds the text.
        skip_broken: leave out and count what cannot be decoded, instead of refusing the corpus. Files of the
            standard library that are not UTF-8 are always left out.

    Attributes:
        files: the files, in reading order.
        skipped: of the latest pass: how many documents were ``empty`` (nothing but white space) or ``broken``;
            and how many files of searched folders were ``unsupported``.
        share: of the latest pass: the share of all bytes read so far, 0 to 1.

    Raises:
        DataError: a path that does not exist or whose suffix is not supported.
    """

    def __init__(self, source: str, *, text_key: str = "text", skip_broken: bool = False) -> None:
        self.source = source
        self.text_key = text_key
        self.files, unsupported = _find(source, skip_broken)
        self.skipped = {"empty": 0, "broken": 0, "unsupported": unsupported}
        self.share = 0.0

    def __iter__(self) -> Iterator[str]:
        """Every document that is not empty.

        Raises:
            DataError: with the first 20 broken documents and their number, once all files have been read (no
                document is yielded after the first broken one); a file that cannot be read at all; no document.
        """
        self.skipped |= {"empty": 0, "broken": 0}
        sizes = [_stat(file).st_size for file in self.files]
        total, before, found, refused = max(sum(sizes), 1), 0, 0, 0
        shown: list[str] = []
        for file, size in zip(self.files, sizes, strict=True):
            for offset, document in _reader(file)(file, self.text_key):
                self.share = min((before + offset) / total, 1.0)
                if isinstance(document, Broken):
                    self.skipped["broken"] += 1
                    refused += not file.may_be_broken
                    if len(shown) < min(refused, SHOWN):
                        shown.append(str(document))
                elif not document or document.isspace():
                    self.skipped["empty"] += 1
                elif not refused:
                    found += 1
                    yield document
            before += size
        self.share = 1.0
        if refused:
            _refuse_broken(self.source, shown, refused)
        if not found:
            left_out = ", ".join(f"{count} {kind}" for kind, count in self.skipped.items())
            raise DataError(f"{self.source}: no document that is not empty ({len(self.files)} files; {left_out})")

    def fingerprint(self) -> str:
        """SHA-256 (hex) over the name, size and time of modification of every file, in reading order."""
        digest = hashlib.sha256()
        for file in self.files:
            stat = _stat(file)
            digest.update(json.dumps([file.name, stat.st_size, stat.st_mtime_ns]).encode())
        return digest.hexdigest()


def held_out(index: int, text: str, share: float) -> bool:
    """Whether a document is for validation: by the hash of its text, so that copies of it stay together.

    The first document of a corpus (``index`` 0) always trains.
    """
    return index > 0 and int.from_bytes(_digest(text)[:8]) < share * 2.0**64


def sample(corpus: Corpus, share: float, size: int, progress: Progress) -> list[str]:
    """The training documents with the smallest hashes, about ``size`` characters of them.

    It reads the whole corpus and holds ``size`` characters and one document. ``share`` is as in :func:`held_out`.
    """
    heap: list[tuple[int, int, str]] = []
    held = 0
    for index, document in enumerate(corpus):
        if held_out(index, document, share):
            continue
        text = document[:size]
        heapq.heappush(heap, (-int.from_bytes(_digest(document)[8:]), index, text))
        held += len(text)
        while held - len(heap[0][2]) >= size:
            held -= len(heapq.heappop(heap)[2])
        progress("sampling text for the tokenizer", corpus.share)
    return [text for _, _, text in sorted(heap, reverse=True)]


def _digest(text: str) -> bytes:
    return hashlib.blake2b(text.encode(), digest_size=16).digest()


def _refuse_broken(source: str, shown: list[str], count: int) -> NoReturn:
    listed = f" (the first {len(shown)} are listed)" if count > len(shown) else ""
    raise DataError([*shown, f"{source}: {count} broken documents{listed}; data.skip_broken = true leaves them out"])


def _stdlib() -> list[SourceFile]:
    root = Path(sysconfig.get_paths()["stdlib"])
    files = [SourceFile(name, root / name, True) for name in _walk(root, STDLIB_SKIPPED) if name.endswith(".py")]
    if not files:
        raise DataError(f"{STDLIB}: this Python has no *.py files in {root}")
    return files


def _find(source: str, skip_broken: bool) -> tuple[list[SourceFile], int]:
    """The files of a source, and how many files of its folders are not supported."""
    problems: list[str] = []
    found: dict[Path, SourceFile] = {}
    unsupported = 0
    items = [source] if os.path.exists(source) else [item.strip() for item in source.split(",") if item.strip()]
    for item in items:
        if item == STDLIB:
            found |= {file.path.resolve(): file for file in _stdlib()}
            continue
        matches = [item] if os.path.exists(item) else sorted(glob.glob(item, recursive=True))
        if not matches:
            problems.append(f"{item}: no such file or folder{nearest(item, [STDLIB])}")
        for match in map(Path, matches):
            inside = [match / name for name in _walk(match, frozenset(), hidden=False)] if match.is_dir() else [match]
            supported = [path for path in inside if _supported(path)]
            if match.is_dir():
                unsupported += len(inside) - len(supported)
                if not supported and match == Path(item):
                    problems.append(f"{match}: no file of a supported kind ({len(inside)} files)")
            elif not supported:
                problems.append(f"{match}: unsupported suffix {match.suffix!r}; {_kinds()}")
            for path in supported:
                found.setdefault(path.resolve(), SourceFile(str(path), path, skip_broken))
    if not items:
        problems.append("data.source names no file")
    elif not problems and not found:
        problems.append(f"{source}: no file of a supported kind; {_kinds()}")
    refuse(DataError, problems)
    return list(found.values()), unsupported


def _walk(root: Path, skipped: frozenset[str], *, hidden: bool = True) -> list[str]:
    """The relative POSIX paths of all files below ``root``, sorted, without folders named in ``skipped``."""

    def fail(error: OSError) -> None:
        raise DataError(f"{error.filename}: {error.strerror}") from error

    names: list[str] = []
    for folder, folders, files in os.walk(root, onerror=fail):
        folders[:] = [name for name in folders if name not in skipped and (hidden or not name.startswith("."))]
        names += [
            (Path(folder) / name).relative_to(root).as_posix() for name in files if hidden or not name.startswith(".")
        ]
    return sorted(names)


def _kinds() -> str:
    return f"supported are .jsonl, .parquet and text ({TEXT_SUFFIXES})"


def _supported(path: Path) -> bool:
    return path.suffix.lower() in SUFFIXES


def _reader(file: SourceFile) -> Reader:
    return {".jsonl": _read_jsonl, ".parquet": _read_parquet}.get(file.path.suffix.lower(), _read_text)


def _stat(file: SourceFile) -> os.stat_result:
    try:
        return file.path.stat()
    except OSError as error:
        raise DataError(f"{file.name}: {error.strerror}") from error


def _read_text(file: SourceFile, text_key: str) -> Iterator[tuple[int, str | Broken]]:
    try:
        data = file.path.read_bytes()
    except OSError as error:
        raise DataError(f"{file.name}: {error.strerror}") from error
    try:
        yield len(data), data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        yield len(data), Broken(file.name, f"not UTF-8 (byte {error.start})")


def _read_jsonl(file: SourceFile, text_key: str) -> Iterator[tuple[int, str | Broken]]:
    try:
        with file.path.open("rb") as lines:
            offset = 0
            for number, line in enumerate(lines, 1):
                offset += len(line)
                if line := line.strip():
                    yield offset, _parse(line, f"{file.name}:{number}", text_key)
    except OSError as error:
        raise DataError(f"{file.name}: {error.strerror}") from error


def _parse(line: bytes, place: str, text_key: str) -> str | Broken:
    try:
        record = json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        return Broken(place, f"not UTF-8 (byte {error.start} of the line)")
    except json.JSONDecodeError as error:
        return Broken(place, f"not JSON: {error.msg} (column {error.colno})")
    except (ValueError, RecursionError) as error:
        return Broken(place, f"not JSON that can be read: {error}")
    if not isinstance(record, dict):
        return Broken(place, f"must be a JSON object, is {type(record).__name__}")
    if text_key not in record:
        return Broken(place, f"no key {text_key!r}{nearest(text_key, record)}")
    return _checked(record[text_key], place, text_key)


def _checked(text: Any, place: str, text_key: str) -> str | Broken:
    if not isinstance(text, str):
        return Broken(place, f"{text_key!r} must be text, is {type(text).__name__}")
    try:
        text.encode()
    except UnicodeEncodeError:
        return Broken(place, f"{text_key!r} holds half of a surrogate pair, which is not text")
    return text


def _read_parquet(file: SourceFile, text_key: str) -> Iterator[tuple[int, str | Broken]]:
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError as error:
        raise DataError(f"{file.name}: reading Parquet needs the package pyarrow") from error
    size, row = _stat(file).st_size, 0
    try:
        with pq.ParquetFile(file.path) as table:
            schema = table.schema_arrow
            if text_key not in schema.names:
                raise DataError(f"{file.name}: no column {text_key!r}{nearest(text_key, schema.names)}")
            kind = schema.field(text_key).type
            kind = kind.value_type if pa.types.is_dictionary(kind) else kind
            if not (pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)):
                raise DataError(f"{file.name}: column {text_key!r} must hold text, holds {kind}")
            for group in range(table.num_row_groups):
                for batch in table.iter_batches(batch_size=256, row_groups=[group], columns=[text_key]):
                    for value in batch.column(0):
                        row += 1
                        yield size * row // table.metadata.num_rows, _cell(value, f"{file.name}:row {row}", text_key)
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{file.name}: cannot be read as Parquet: {error}") from error


def _cell(value: Any, place: str, text_key: str) -> str | Broken:
    try:
        return _checked(value.as_py(), place, text_key)
    except UnicodeDecodeError as error:
        return Broken(place, f"{text_key!r} is not UTF-8 (byte {error.start})")
