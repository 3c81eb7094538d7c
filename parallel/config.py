"""Configuration: frozen dataclasses, filled from TOML tables and dotted command-line overrides.

A component declares its own few options as a frozen dataclass with :func:`option`; a program nests them.
:func:`resolve` lays any number of tables over the defaults, later ones winning, and reports every problem at
once: unknown keys with the nearest known name, values of the wrong type, values outside their choices, and
whatever the dataclasses' own ``problems()`` methods add.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import types
import typing
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from parallel.errors import ConfigError, nearest, refuse

__all__ = ["Option", "option", "options", "parse_flags", "read_toml", "resolve", "to_table", "to_toml"]

C = TypeVar("C")


def option(default: Any, doc: str) -> Any:
    """A dataclass field with a default and one line of documentation, shown by ``--help``."""
    if dataclasses.is_dataclass(default) and not isinstance(default, type):
        return dataclasses.field(default_factory=lambda: default, metadata={"doc": doc})
    return dataclasses.field(default=default, metadata={"doc": doc})


@dataclass(frozen=True, slots=True)
class Option:
    """One leaf of a configuration: its dotted name, type, default and documentation."""

    name: str
    type: Any
    default: Any
    doc: str


def options(config: Any, prefix: str = "") -> list[Option]:
    """Every leaf option of a configuration value, depth first, with its current value as the default."""
    hints = get_type_hints(type(config))
    leaves: list[Option] = []
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            leaves += options(value, f"{prefix}{field.name}.")
        else:
            leaves.append(Option(prefix + field.name, hints[field.name], value, field.metadata.get("doc", "")))
    return leaves


def resolve(base: C, *tables: Mapping[str, Any], extra: Iterable[str] = ()) -> C:
    """``base`` with the tables laid over it, later ones winning.

    Args:
        base: a frozen dataclass value; what no table mentions keeps its value.
        tables: nested mappings, as read from TOML or from :func:`parse_flags`. Strings are converted only where
            they come from flags (see :class:`Flag`).
        extra: problems found elsewhere that belong in the same report.

    Raises:
        ConfigError: with every problem of every table, and those that ``problems()`` of the result names.
    """
    problems = list(extra)
    value = base
    for table in tables:
        value = _overlay(value, table, "", problems)
    problems += _own_problems(value, "")
    refuse(ConfigError, dict.fromkeys(problems))
    return value


class Flag(str):
    """A value that came from the command line, still to be converted to its option's type.

    Attributes:
        bare: there was no value, which stands for ``true``.
    """

    bare: bool = False


class _Bare(Flag):
    bare = True


def parse_flags(arguments: Sequence[str]) -> tuple[list[str], dict[str, Any], list[str]]:
    """Split a command line into positional arguments and a nested table of ``--a.b value`` overrides.

    ``--a.b=value`` and ``--a.b value`` are the same; a flag that is followed by another flag, or by nothing,
    stands for ``true``. ``-h`` is ``--help``.

    Returns:
        positional arguments, overrides (leaves are :class:`Flag`), problems.
    """
    positional: list[str] = []
    table: dict[str, Any] = {}
    problems: list[str] = []
    rest = list(arguments)
    while rest:
        word = rest.pop(0)
        if word == "-h":
            word = "--help"
        if not word.startswith("--"):
            if word.startswith("-") and word != "-":
                problems.append(f"{word}: options begin with two hyphens; a file of that name is ./{word}")
            else:
                positional.append(word)
            continue
        name, equals, value = word[2:].partition("=")
        bare = not equals and (not rest or rest[0].startswith("--"))
        if not equals and not bare:
            value = rest.pop(0)
        if problem := _put(table, name.replace("-", "_").split("."), _Bare("true") if bare else Flag(value)):
            problems.append(f"--{name} {problem}")
    return positional, table, list(dict.fromkeys(problems))


def read_toml(path: Path) -> dict[str, Any]:
    """The table in a TOML file.

    Raises:
        ConfigError: the file is absent or is not TOML.
    """
    import tomllib

    try:
        return tomllib.loads(path.read_text())
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, OSError) as error:
        raise ConfigError(f"{path}: {error}") from None


def to_table(config: Any) -> dict[str, Any]:
    """The configuration as nested plain values; ``resolve(type(config)(), to_table(config)) == config``."""
    table: dict[str, Any] = {}
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            table[field.name] = to_table(value)
        elif value is not None:
            table[field.name] = list(value) if isinstance(value, tuple) else value
    return table


def to_toml(config: Any) -> str:
    """The configuration as a TOML document that :func:`read_toml` and :func:`resolve` read back unchanged."""
    lines: list[str] = []
    _write_toml(to_table(config), "", lines)
    return "\n".join(lines).strip() + "\n"


def _write_toml(table: Mapping[str, Any], name: str, lines: list[str]) -> None:
    leaves = {k: v for k, v in table.items() if not isinstance(v, Mapping)}
    if name and leaves:
        lines += ["", f"[{name}]"]
    for key, value in leaves.items():
        lines.append(f"{key} = {_toml_value(value)}")
    for key, value in table.items():
        if isinstance(value, Mapping):
            _write_toml(value, f"{name}.{key}" if name else key, lines)


def _toml_value(value: Any) -> str:
    if isinstance(value, float):
        return repr(value)
    if isinstance(value, list):
        return "[" + ", ".join(_toml_value(item) for item in value) + "]"
    return json.dumps(value, ensure_ascii=False)


def _put(table: dict[str, Any], path: list[str], value: Flag) -> str:
    """Note a value; why that cannot be, or an empty string."""
    for key in path[:-1]:
        inner = table.setdefault(key, {})
        if not isinstance(inner, dict):
            return f"is given, and so is --{key} as a single option"
        table = inner
    if path[-1] in table:
        return "is given twice" if isinstance(table[path[-1]], Flag) else "is given both as a value and as a group"
    table[path[-1]] = value
    return ""


def _overlay(config: Any, table: Mapping[str, Any], prefix: str, problems: list[str]) -> Any:
    hints = get_type_hints(type(config))
    known = [field.name for field in dataclasses.fields(config)]
    changes: dict[str, Any] = {}
    for key, given in table.items():
        name = prefix + key
        if key not in known:
            problems.append(f"unknown option {name!r}{_nearest_option(name, config, prefix)}")
            continue
        current = getattr(config, key)
        if dataclasses.is_dataclass(current):
            if isinstance(given, Mapping):
                changes[key] = _overlay(current, given, name + ".", problems)
            else:
                inner = ", ".join(f"{name}.{field.name}" for field in dataclasses.fields(current))
                problems.append(f"{name} is a group of options ({inner}), not a value")
        elif isinstance(given, Mapping):
            problems.append(f"{name} is a single option, not a group ({', '.join(given)})")
        else:
            try:
                changes[key] = _convert(given, hints[key])
            except ValueError as error:
                bare = isinstance(given, Flag) and given.bare
                problems.append(f"{name}{' is given without a value' if bare else f' = {given!r}'}: {error}")
    return dataclasses.replace(config, **changes)


def _nearest_option(name: str, config: Any, prefix: str) -> str:
    """A hint: the options that end in that name, further down, or else the nearest name."""
    inner = [leaf.name for leaf in options(config, prefix) if leaf.name.endswith("." + name.removeprefix(prefix))]
    if inner:
        return f" (did you mean {' or '.join(map(repr, inner[:3]))}?)"
    return nearest(name, [prefix + field.name for field in dataclasses.fields(config)])


def _own_problems(config: Any, prefix: str) -> list[str]:
    found: list[str] = []
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            found += _own_problems(value, f"{prefix}{field.name}.")
    if hasattr(config, "problems"):
        found += [prefix + problem for problem in config.problems()]
    return found


def _convert(given: Any, kind: Any) -> Any:
    """``given`` as a value of type ``kind``; strings are parsed only if they are :class:`Flag`."""
    origin = get_origin(kind)
    if origin is Literal:
        if (str(given) if isinstance(given, Flag) else given) in get_args(kind):
            return str(given)
        choices = ", ".join(map(repr, get_args(kind)))
        raise ValueError(f"must be one of {choices}{nearest(str(given), get_args(kind))}")
    if origin in (Union, types.UnionType):
        inner = [item for item in get_args(kind) if item is not type(None)]
        if given is None or (isinstance(given, Flag) and given == "none"):
            return None
        return _convert(given, inner[0])
    if origin is tuple:
        parts: Any = given
        if isinstance(given, Flag) and not given.bare:
            parts = [Flag(part) for part in given.split(",") if part]
        if not isinstance(parts, list | tuple):
            raise ValueError("must be a list")
        return tuple(_convert(part, get_args(kind)[0]) for part in parts)
    return _convert_scalar(given, kind)


def _convert_scalar(given: Any, kind: Any) -> Any:
    if kind is bool:
        words = {"true": True, "false": False, "1": True, "0": False, "yes": True, "no": False}
        if isinstance(given, Flag) and given.lower() in words:
            return words[given.lower()]
        if isinstance(given, bool):
            return given
        raise ValueError("must be true or false")
    if kind is int:
        return _integer(given)
    if kind is float:
        if isinstance(given, Flag | int | float) and not isinstance(given, bool):
            with contextlib.suppress(ValueError):
                if math.isfinite(value := float(given)):
                    return value
        raise ValueError("must be a finite number")
    if kind is str:
        if isinstance(given, str) and not (isinstance(given, Flag) and given.bare):
            return str(given)
        raise ValueError("must be text")
    raise typing.assert_never(kind)


def _integer(given: Any) -> int:
    if isinstance(given, Flag):
        try:
            return int(given.replace("_", ""))
        except ValueError:
            raise ValueError("must be a whole number") from None
    if isinstance(given, int) and not isinstance(given, bool):
        return given
    raise ValueError("must be a whole number")
