"""Family: what the project knows about one Hugging Face architecture."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from parallel.errors import ConfigError, ModelFolderError, refuse
from parallel.models.config import DecoderConfig
from parallel.models.families.keys import Keys

__all__ = ["Family", "Stored"]


@dataclass(frozen=True, slots=True)
class Stored:
    """Where a folder holds one of our parameters.

    Attributes:
        names: the tensors, one for each section of the parameter's entry in the shard table, or one for the whole.
        transposed: the tensors are stored (in, out).
    """

    names: tuple[str, ...]
    transposed: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """One Hugging Face architecture.

    Attributes:
        model_type: its name in config.json, and ``DecoderConfig.family``.
        architecture: the class that ``transformers`` has for it.
        prefix: what the names of all tensors but the head's begin with; folders saved without a head lack it.
        reader: fields of the configuration from config.json; problems are left with the keys.
        writer: the keys of config.json that describe such a model.
        misfits: why the family has no place for a (resolved) configuration.
        names: our parameter name -> where it is stored.
        ignored: regular expressions of tensors that hold nothing a model needs (masks, frequencies).
    """

    model_type: str
    architecture: str
    prefix: str
    reader: Callable[[Keys], dict[str, Any]]
    writer: Callable[[DecoderConfig], dict[str, Any]]
    misfits: Callable[[DecoderConfig], Iterator[str]]
    names: Callable[[DecoderConfig], dict[str, Stored]]
    ignored: tuple[str, ...] = ()

    def read(self, config: Mapping[str, Any]) -> DecoderConfig:
        """The (resolved) configuration that a config.json stands for; missing keys mean what they mean to transformers.

        Raises:
            ModelFolderError: with every key that is missing, malformed, or asks for what we do not do.
        """
        keys = Keys(config)
        keys.refuse_unsupported(self.architecture)
        fields = self.reader(keys)
        refuse(ModelFolderError, keys.problems)
        decoder = DecoderConfig(family=self.model_type, **fields)
        refuse(ModelFolderError, decoder.problems())
        decoder = decoder.resolved()
        refuse(ModelFolderError, self.problems(decoder))
        return decoder

    def problems(self, config: DecoderConfig) -> Iterator[str]:
        """Why the family cannot express a configuration; dropout and initial values are not part of the question."""
        yield from (f"family {self.model_type!r} {problem}" for problem in self.misfits(config.resolved()))

    def write(self, config: DecoderConfig) -> dict[str, Any]:
        """The config.json that releases 4 and 5 of transformers, and :meth:`read`, take for the same function.

        Raises:
            ConfigError: the family cannot express it.
        """
        refuse(ConfigError, config.problems())
        refuse(ConfigError, self.problems(config))
        head = {"architectures": [self.architecture], "model_type": self.model_type}
        # Absent ids of special tokens would take the family's defaults.
        special = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
        return head | self.writer(config.resolved()) | special

    def stored(self, config: DecoderConfig) -> dict[str, Stored]:
        """Our parameter name -> where a folder holds it; the head is absent where it is the embedding."""
        table = self.names(config.resolved())
        if config.tied:
            del table["head.weight"]
        return table
