"""Registries: a name, and where the object behind it lives; imported when it is first asked for."""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Mapping
from typing import Generic, TypeVar

from parallel.errors import ConfigError, nearest

__all__ = ["Registry"]

T = TypeVar("T")


class Registry(Generic[T]):
    """A read-only table from names to objects that are imported on first use.

    Args:
        kind: what the entries are, for messages ("model family").
        places: name -> ``"module:object"``.
    """

    def __init__(self, kind: str, places: Mapping[str, str]) -> None:
        self.kind = kind
        self._places = dict(places)
        self._loaded: dict[str, T] = {}

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __contains__(self, name: object) -> bool:
        return name in self._places

    def __getitem__(self, name: str) -> T:
        """The object behind ``name``.

        Raises:
            ConfigError: no such entry; the message lists the names there are.
        """
        if name not in self._places:
            known = ", ".join(self._places)
            raise ConfigError(f"unknown {self.kind} {name!r}{nearest(name, self._places)}; there are: {known}")
        if name not in self._loaded:
            module, _, attribute = self._places[name].partition(":")
            self._loaded[name] = getattr(importlib.import_module(module), attribute)
        return self._loaded[name]
