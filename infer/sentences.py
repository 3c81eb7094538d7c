"""Folders of sentence-transformers: how they want texts read, hidden states pooled, and vectors scaled."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, normalizers

from infer.embed import Pooling
from parallel.errors import ConfigError, DataError, ModelFolderError, nearest, refuse

__all__ = ["Sentences", "encode_texts", "read_sentences", "text_tokenizer"]

_MODES = {"mean": "mean", "cls": "cls", "lasttoken": "last"}
_FLAGS = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
    "pooling_mode_weightedmean_tokens": "weightedmean",
    "pooling_mode_lasttoken": "lasttoken",
}
"""The keys of older releases, and what ``pooling_mode`` calls the same."""

_POOLING_KEYS = {"word_embedding_dimension", "embedding_dimension", "pooling_mode", "include_prompt", *_FLAGS}

# Keys of sentence_bert_config.json and of a normalization, and the values at which they ask for nothing.
_TEXT = {"text": {"method": "forward", "method_output_name": "last_hidden_state"}}
_TRANSFORMER: dict[str, tuple[Any, ...]] = {
    "transformer_task": (None, "feature-extraction"),
    "modality_config": (None, _TEXT),
    "module_output_name": (None, "token_embeddings"),
    "processing_kwargs": (None, {}),
    "unpad_inputs": (None, True, False),
    "query_length": (None,),
    "document_length": (None,),
    "query_expansion": (None,),
    "model_args": (None, {}),
    "tokenizer_args": (None, {}),
    "config_args": (None, {}),
}
_NORMALIZE: dict[str, tuple[Any, ...]] = {
    "module_input_name": (None, "sentence_embedding"),
    "module_output_name": (None, "sentence_embedding"),
}
_CONFIGS = ("bert", "roberta", "xlm-roberta", "camembert")


@dataclass(frozen=True, slots=True, kw_only=True)
class Sentences:
    """What a folder says about its embeddings.

    Attributes:
        pooling: what stands for a document.
        normalize: every vector has the length 1.
        max_tokens: where longer texts are cut, special tokens included; None: nothing is said.
        lowercase: texts are made lower case first.
        prompts: name -> what is put before a text.
        prompt: name of the one that is used unless another is asked for.
    """

    pooling: Pooling = "mean"
    normalize: bool = False
    max_tokens: int | None = None
    lowercase: bool = False
    prompts: Mapping[str, str] = field(default_factory=dict)
    prompt: str | None = None


def read_sentences(folder: Path) -> Sentences | None:
    """What modules.json and the files it names say; None where there is no modules.json.

    Raises:
        ModelFolderError: with every module, mode and option that is malformed or that we do not do.
    """
    folder = Path(folder)
    if not (folder / "modules.json").exists():
        return None
    problems: list[str] = []
    modules = list(_modules(folder, problems))
    refuse(ModelFolderError, problems)
    pooling = _pooling(folder / modules[1] / "config.json", problems)
    if len(modules) == 3 and modules[2] and (folder / modules[2] / "config.json").exists():
        path = folder / modules[2] / "config.json"
        problems += _settled(path, _object(path, problems), _NORMALIZE)
    texts = _texts(folder, problems)
    refuse(ModelFolderError, problems)
    return Sentences(pooling=pooling, normalize=len(modules) == 3, **texts)


def _modules(folder: Path, problems: list[str]) -> Iterator[str]:
    """The folders of the transformer, of its pooling, and of a normalization if there is one."""
    path = folder / "modules.json"
    listed = _read(path, problems)
    if not isinstance(listed, list) or not all(isinstance(module, dict) for module in listed):
        problems.append(f"{path}: must hold a list of modules")
        return
    kinds = [str(module.get("type")) for module in listed]
    names = ["Transformer", "Pooling", "Normalize"]
    for kind in kinds:
        place, _, name = kind.rpartition(".")
        if place.split(".")[0] != "sentence_transformers" or name not in names:
            problems.append(f"{path}: module {kind!r} is not supported; those that are: {', '.join(names)}")
    if not problems and [kind.rpartition(".")[2] for kind in kinds] not in (names[:2], names):
        problems.append(f"{path}: has the modules {', '.join(kinds)}; supported is the order {', '.join(names)}")
    for index, module in enumerate(listed):
        given = module.get("path", "")
        if not isinstance(given, str) or "/" in given or "\\" in given or given.startswith("."):
            problems.append(f"{path}: {given!r} is not the name of a folder in this one")
        elif not index and given:
            problems.append(f"{path}: keeps its transformer in {given!r}, not beside modules.json, where it is read")
        problems += _others(path, module, {"idx", "name", "path", "type"})
        yield str(given)


def _pooling(path: Path, problems: list[str]) -> Pooling:
    config = _object(path, problems)
    problems += _others(path, config, _POOLING_KEYS)
    if config.get("include_prompt", True) is not True:
        problems.append(
            f"{path}: include_prompt = {config['include_prompt']!r}: prompts are always pooled with the text"
        )
    asked = config.get("pooling_mode", [mode for key, mode in _FLAGS.items() if config.get(key)] or ["mean"])
    asked = asked if isinstance(asked, list) else [asked]
    modes = [_MODES.get(mode) if isinstance(mode, str) else None for mode in asked]
    if len(modes) == 1 and modes[0] in ("mean", "cls", "last"):
        return modes[0]
    text = " and ".join(map(str, asked))
    problems.append(f"{path}: pooling by {text} is not supported; one of {', '.join(_MODES)} is")
    return "mean"


def _texts(folder: Path, problems: list[str]) -> dict[str, Any]:
    """What is said about texts before they are tokens."""
    found: dict[str, Any] = {}
    paths = [folder / f"sentence_{name}_config.json" for name in _CONFIGS]
    path = next((path for path in paths if path.exists()), paths[0])
    config = _object(path, problems) if path.exists() else {}
    problems += _settled(path, config, _TRANSFORMER, {"max_seq_length", "do_lower_case"})
    limit, lower = config.get("max_seq_length"), config.get("do_lower_case", False)
    if limit is None:  # today's releases leave it with the tokenizer, whose huge numbers stand for no limit
        beside = folder / "tokenizer_config.json"
        limit = _object(beside, problems).get("model_max_length") if beside.exists() else None
        limit = None if isinstance(limit, int | float) and limit > 1 << 30 else limit
    if limit is not None and (isinstance(limit, bool) or not isinstance(limit, int) or limit < 1):
        problems.append(f"{path}: max_seq_length = {limit!r}: must be a whole number of at least 1")
    if not isinstance(lower, bool):
        problems.append(f"{path}: do_lower_case = {lower!r}: must be true or false")
    found["max_tokens"], found["lowercase"] = limit, lower is True
    path = folder / "config_sentence_transformers.json"
    config = _object(path, problems) if path.exists() else {}
    if (kind := config.get("model_type")) not in (None, "SentenceTransformer"):
        problems.append(f"{path}: model_type = {kind!r} is not supported, SentenceTransformer is")
    prompts, default = config.get("prompts") or {}, config.get("default_prompt_name")
    if not isinstance(prompts, dict) or not all(isinstance(text, str | None) for text in prompts.values()):
        problems.append(f"{path}: prompts must be texts")
        prompts = {}
    if default is not None and default not in prompts:
        problems.append(f"{path}: default_prompt_name = {default!r} is not one of its prompts")
    return found | {"prompts": {name: text or "" for name, text in prompts.items()}, "prompt": default}


def _read(path: Path, problems: list[str]) -> Any:
    try:
        return json.loads(path.read_bytes())
    except FileNotFoundError:
        problems.append(f"{path}: no such file")
    except (OSError, ValueError, RecursionError) as error:
        problems.append(f"{path}: {error}")
    return {}


def _object(path: Path, problems: list[str]) -> dict[str, Any]:
    value = _read(path, problems)
    if isinstance(value, dict):
        return value
    problems.append(f"{path}: must hold an object")
    return {}


def _others(path: Path, config: Mapping[str, Any], known: set[str]) -> list[str]:
    return [f"{path}: {key} is not supported{nearest(key, known)}" for key in config if key not in known]


def _settled(
    path: Path, config: Mapping[str, Any], neutral: Mapping[str, tuple[Any, ...]], known: Iterable[str] = ()
) -> list[str]:
    """Keys that are not known, and those that ask for what they do not ask for at their ``neutral`` values."""
    asking = [key for key, values in neutral.items() if config.get(key) not in values]
    found = _others(path, config, {*neutral, *known})
    return found + [f"{path}: {key} = {config[key]!r} is not supported" for key in asking]


def text_tokenizer(tokenizer: Tokenizer, sentences: Sentences | None = None, *, truncate: bool = False) -> Tokenizer:
    """A copy of a tokenizer that reads whole texts and adds no padding, whatever tokenizer.json asks for.

    Args:
        tokenizer: of the model.
        sentences: what the folder says about its texts.
        truncate: cut texts at ``sentences.max_tokens``.
    """
    sentences = Sentences() if sentences is None else sentences
    own = Tokenizer.from_str(tokenizer.to_str())
    own.no_padding()
    own.no_truncation()
    if truncate and sentences.max_tokens is not None:
        own.enable_truncation(sentences.max_tokens)
    if sentences.lowercase:
        own.normalizer = normalizers.Sequence(
            [normalizers.Lowercase(), *([own.normalizer] if own.normalizer is not None else [])]
        )
    return own


def encode_texts(
    tokenizer: Tokenizer, texts: Sequence[str], sentences: Sentences | None = None, *, prompt: str | None = None
) -> list[list[int]]:
    """Texts as token ids, special tokens included.

    Args:
        tokenizer: of :func:`text_tokenizer`.
        texts: one for each document.
        sentences: what the folder says about them.
        prompt: name of what to put before each text; None: the folder's default.

    Raises:
        ConfigError: a prompt that the folder does not have.
        DataError: every text that is too long.
    """
    sentences = Sentences() if sentences is None else sentences
    name, limit = sentences.prompt if prompt is None else prompt, sentences.max_tokens
    if name is not None and name not in sentences.prompts:
        known = ", ".join(sentences.prompts) or "none"
        raise ConfigError(f"unknown prompt {name!r}{nearest(name, sentences.prompts)}; there are: {known}")
    before = sentences.prompts[name] if name is not None else ""
    encoded = [encoding.ids for encoding in tokenizer.encode_batch([before + text for text in texts])]
    refuse(
        DataError,
        (
            f"text {index} has {len(ids)} tokens, the folder allows {limit}: shorten it, or ask for texts to be cut"
            for index, ids in enumerate(encoded)
            if limit is not None and len(ids) > limit
        ),
    )
    return encoded
