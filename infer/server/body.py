"""What all bodies have in common."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from pydantic import BaseModel, ConfigDict

__all__ = ["Body"]


class Body(BaseModel):
    """A field that is not known is an error, and so is a value of another type.

    Attributes:
        neutral: fields that are known but not honoured, and with which values they ask for nothing (as null does).
    """

    model_config = ConfigDict(extra="forbid", strict=True)
    neutral: ClassVar[Mapping[str, tuple[Any, ...]]] = {}
