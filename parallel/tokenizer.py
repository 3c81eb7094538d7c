"""Tokenizers of model folders: load one, and write one that `transformers` reads."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from parallel.errors import DataError

__all__ = ["END_OF_TEXT", "end_of_text", "load_tokenizer", "vocabulary_size", "write_tokenizer"]

END_OF_TEXT = "<|endoftext|>"

KNOWN_ENDS = (
    END_OF_TEXT,
    "</s>",
    "<|end_of_text|>",
    "<eos>",
    "<|im_end|>",
    "[EOS]",
    "<\uff5cend\u2581of\u2581sentence\uff5c>",
)


def load_tokenizer(path: Path | str) -> Tokenizer:
    """The tokenizer in a ``tokenizer.json`` file, or in a Hugging Face folder.

    A folder without ``tokenizer.json`` is read through `transformers`, which must then be installed.

    Raises:
        DataError: no such path, or nothing in it that can be read as a tokenizer.
    """
    path = Path(path)
    if not path.exists():
        raise DataError(f"{path}: no such tokenizer file or folder")
    file = path / "tokenizer.json" if path.is_dir() else path
    if not file.exists():
        return _load_with_transformers(path)
    try:
        return Tokenizer.from_file(str(file))
    except Exception as error:  # the package raises nothing more specific
        raise DataError(f"{file}: not a tokenizer: {error}") from error


def _load_with_transformers(folder: Path) -> Tokenizer:
    try:
        from transformers import AutoTokenizer
    except ImportError as error:
        raise DataError(f"{folder}: without tokenizer.json, reading it needs the package transformers") from error
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
    except Exception as error:  # whatever the model's own tokenizer code raises
        raise DataError(f"{folder}: no tokenizer.json, and transformers finds no tokenizer: {error}") from error
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if not isinstance(backend, Tokenizer):
        raise DataError(f"{folder}: its tokenizer ({type(tokenizer).__name__}) has no tokenizer.json form")
    return backend


def vocabulary_size(tokenizer: Tokenizer) -> int:
    """One more than the largest token id, added tokens included (ids may have gaps)."""
    return max(tokenizer.get_vocab(with_added_tokens=True).values(), default=-1) + 1


def end_of_text(tokenizer: Tokenizer, folder: Path | None = None) -> int:
    """The id of the token that ends a document.

    A Hugging Face folder says which: ``eos_token`` of tokenizer_config.json, else ``eos_token_id`` of
    generation_config.json, else of config.json. Otherwise the first of the customary names that the tokenizer has.

    Raises:
        DataError: a configured token that the tokenizer lacks, a file that is not JSON, or no such token at all.
    """
    if folder is not None:
        for name, key in (
            ("tokenizer_config.json", "eos_token"),
            ("generation_config.json", "eos_token_id"),
            ("config.json", "eos_token_id"),
        ):
            given = _read_object(folder / name).get(key)
            if given is not None:
                return _as_id(tokenizer, given, f"{folder / name}: {key}")
    for name in KNOWN_ENDS:
        token = tokenizer.token_to_id(name)
        if token is not None:
            return token
    raise DataError(f"the tokenizer{f' of {folder}' if folder else ''} has none of the tokens {', '.join(KNOWN_ENDS)}")


def _read_object(path: Path) -> dict[str, Any]:
    if not path.exists():
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: {error}") from error
    if not isinstance(value, dict):
        raise DataError(f"{path}: must hold a JSON object")
    return value


def _as_id(tokenizer: Tokenizer, given: Any, place: str) -> int:
    """A token that is given by name, as a table with its ``content``, by id, or as a list of ids (the first counts)."""
    if isinstance(given, dict):
        given = given.get("content")
    if isinstance(given, list) and given:
        given = given[0]
    if isinstance(given, str):
        token = tokenizer.token_to_id(given)
    elif isinstance(given, int) and not isinstance(given, bool) and 0 <= given < 2**32:
        token = given if tokenizer.id_to_token(given) is not None else None
    else:
        token = None
    if token is None:
        raise DataError(f"{place} = {given!r} is not a token of the tokenizer")
    return token


def write_tokenizer(
    tokenizer: Tokenizer, folder: Path, *, end: int | None = None, longest: int | None = None
) -> tuple[Path, Path]:
    """Write ``tokenizer.json`` and ``tokenizer_config.json``, which ``AutoTokenizer.from_pretrained`` loads.

    Args:
        end: id of the end-of-text token, which becomes ``eos_token`` and ``bos_token``; None: a customary one.
        longest: ``model_max_length``, in tokens; None: not written.

    Returns:
        the paths of the two files.
    """
    name = tokenizer.id_to_token(end_of_text(tokenizer) if end is None else end)
    if name is None:
        raise DataError(f"end-of-text token {end} is not a token of the tokenizer")
    config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": name,
        "eos_token": name,
        "clean_up_tokenization_spaces": False,
    }
    if longest is not None:
        config["model_max_length"] = longest
    folder.mkdir(parents=True, exist_ok=True)
    paths = folder / "tokenizer.json", folder / "tokenizer_config.json"
    paths[0].write_text(tokenizer.to_str(pretty=True), encoding="utf-8")
    paths[1].write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    return paths
