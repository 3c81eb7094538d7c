"""What all bodies have in common."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from pydantic import BaseModel, ConfigDict, model_validator

__all__ = ["Body", "Lenient"]


class Body(BaseModel):
    """A field that is not known is an error, and so is a value of another type.

    Attributes:
        neutral: fields that are known but not honoured, and with which values they ask for nothing (as null does).
    """

    model_config = ConfigDict(extra="forbid", strict=True)
    neutral: ClassVar[Mapping[str, tuple[Any, ...]]] = {}


class Lenient(Body):
    """A part of a body that clients send with fields of OpenAI's that they left unset: null, or an empty list.

    Attributes:
        unset: these fields.
    """

    unset: ClassVar[tuple[str, ...]] = ()

    @model_validator(mode="before")
    @classmethod
    def _without_unset(cls, value: Any) -> Any:
        if isinstance(value, dict):
            return {name: own for name, own in value.items() if not (name in cls.unset and cls._nothing(name, own))}
        return value

    @classmethod
    def _nothing(cls, name: str, value: Any) -> bool:
        return value is None or (value == [] and name not in cls.model_fields)
