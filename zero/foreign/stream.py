"""A pickle read as data: its instructions are followed, and none of what they ask for is done.

A pickle is a program. Most of its instructions put values together; some ask the reader to import a name, to call it,
to fill an object. Here a name becomes a :class:`Symbol`, a call a :class:`Call` that lists what was to be called with
what: nothing is imported, called or filled, whatever the file says. ``pickletools.genops`` cuts the stream into
instructions, and it decodes, but executes nothing either.
"""

from __future__ import annotations

import pickletools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from parallel.errors import CheckpointError

__all__ = ["Call", "Made", "Stored", "Symbol", "Table", "read_stream", "shown"]

_LONGEST = 1 << 30  # bytes
_MOST = 1 << 26  # instructions
_DEEPEST = 1 << 12  # open marks


@dataclass(frozen=True, slots=True)
class Symbol:
    """A name that the pickle wanted imported."""

    module: str
    name: str

    @property
    def path(self) -> str:
        """``module.name``."""
        return f"{self.module}.{self.name}"


@dataclass(slots=True, eq=False, repr=False)
class Call:
    """A call that was not made.

    Attributes:
        function: what was to be called.
        arguments: with what.
        state: what was to be put into the result; None if nothing.
        items: what was to be appended to it, or set in it as (key, value).
    """

    function: Any
    arguments: Any
    state: Any = None
    items: list[Any] = field(default_factory=list)

    @property
    def path(self) -> str:
        """Of the function, or an empty string if that is no name."""
        return self.function.path if isinstance(self.function, Symbol) else ""

    def attribute(self, name: str, default: Any = None) -> Any:
        """What was to become an attribute of the object."""
        return self.state.get(name, default) if isinstance(self.state, Table) else default


@dataclass(slots=True, eq=False, repr=False)
class Stored:
    """What stands outside the stream, under an identifier."""

    identifier: Any


class Table:
    """A dictionary whose keys may be anything, since what they are is not known."""

    def __init__(self, pairs: Iterable[tuple[Any, Any]] = ()) -> None:
        self.pairs = [*pairs]
        self._named: dict[str, Any] = {}
        self._counted = 0

    def __len__(self) -> int:
        return len(self.pairs)

    def named(self) -> dict[str, Any]:
        """The entries whose keys are strings; of equal keys the last."""
        if self._counted != len(self.pairs):
            self._named = {key: value for key, value in self.pairs if isinstance(key, str)}
            self._counted = len(self.pairs)
        return self._named

    def get(self, key: str, default: Any = None) -> Any:
        """The entry of a string."""
        return self.named().get(key, default)


Made = Callable[[str, Any], Any]
"""(path of a name, arguments) -> what such a call stands for, or None: then it stays a :class:`Call`."""


def read_stream(data: bytes, where: str, made: Made | None = None) -> Any:
    """The value that a pickle describes: numbers, strings, lists, tuples, sets as lists, and the types of this module.

    Args:
        data: the whole pickle.
        where: names it in errors.
        made: values of ours for calls that are known; it must look at its arguments and at nothing else.

    Raises:
        CheckpointError: it is damaged, is longer than any that is written, or asks for what no checkpoint needs.
    """
    if len(data) > _LONGEST:
        raise CheckpointError(f"{where}: a pickle of {len(data)} bytes; {_LONGEST} are the most that are read")
    reader = _Reader(made)
    try:
        for count, (opcode, argument, position) in enumerate(pickletools.genops(data)):
            if count == _MOST:
                raise _WrongError(f"more than {_MOST} instructions")
            reader.follow(opcode.name, argument)
            reader.ended = None if position is None else position + 1
        return reader.result(len(data))
    except (_WrongError, ValueError, IndexError, KeyError, OverflowError) as error:
        text = str(error) if isinstance(error, _WrongError | ValueError) else f"{type(error).__name__} {error}"
        raise CheckpointError(f"{where}: not a pickle that can be read as data: {text[:200]}") from None


def shown(value: Any) -> str:
    """A foreign value in a message: short, on one line, printable."""
    if isinstance(value, Symbol):
        value = value.path
    elif isinstance(value, Call):
        value = f"{value.path or 'something'}(...)"
    elif isinstance(value, list | tuple | Table) and len(value) > 8:
        return f"{len(value)} values"
    elif not isinstance(value, str | int | float | bytes | bool | type(None)):
        return type(value).__name__
    text = ascii(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


class _WrongError(Exception):
    """The stream contradicts itself."""


class _Reader:
    """The stack and the memory of a stream."""

    def __init__(self, made: Made | None) -> None:
        self._made: Made = made or (lambda path, arguments: None)
        self._stack: list[Any] = []
        self._below: list[list[Any]] = []
        self._memory: dict[int, Any] = {}
        self.ended: int | None = None

    def result(self, length: int) -> Any:
        """What is left when a stream of so many bytes has ended."""
        if self.ended != length:
            raise _WrongError("it goes on behind its end")
        if self._below or len(self._stack) != 1:
            raise _WrongError("it does not end with one value")
        return self._stack[0]

    def follow(self, name: str, argument: Any) -> None:
        """One instruction."""
        if name in _VALUES:
            self._push(argument)
        elif name in _CONSTANTS:
            self._push(_CONSTANTS[name])
        elif (step := _STEPS.get(name)) is not None:
            step(self)
        elif name in _READS:
            self._push(self._memory[int(argument)])
        elif name in _WRITES:
            self._memory[int(argument)] = self._stack[-1]
        elif name in ("GLOBAL", "INST"):
            module, _, member = argument.partition(" ")
            value = Symbol(module, member)
            self._push(value if name == "GLOBAL" else self._call(value, tuple(self._popped())))
        elif name == "PERSID":
            self._push(Stored(argument))
        elif name == "PROTO":
            if argument > 5:
                raise _WrongError(f"protocol {argument}")
        elif name not in ("FRAME", "STOP"):
            raise _WrongError(f"{name} has no place in a checkpoint")

    def _push(self, value: Any) -> None:
        self._stack.append(value)

    def _popped(self) -> list[Any]:
        """What stands above the last mark, which goes."""
        if not self._below:
            raise _WrongError("no mark")
        above, self._stack = self._stack, self._below.pop()
        return above

    def _call(self, function: Any, arguments: Any) -> Any:
        made = self._made(function.path, arguments) if isinstance(function, Symbol) else None
        return Call(function, arguments) if made is None else made

    def mark(self) -> None:
        if len(self._below) == _DEEPEST:
            raise _WrongError(f"more than {_DEEPEST} open marks")
        self._below.append(self._stack)
        self._stack = []

    def pop(self) -> None:
        if self._stack:
            self._stack.pop()
        else:
            self._popped()

    def pop_mark(self) -> None:
        self._popped()

    def dup(self) -> None:
        self._push(self._stack[-1])

    def memoize(self) -> None:
        self._memory[len(self._memory)] = self._stack[-1]

    def empty_list(self) -> None:
        self._push([])

    def empty_table(self) -> None:
        self._push(Table())

    def list_(self) -> None:
        self._push(self._popped())

    def table(self) -> None:
        self._push(Table(_pairs(self._popped())))

    def tuple_(self) -> None:
        self._push(tuple(self._popped()))

    def tuple1(self) -> None:
        self._last(1)

    def tuple2(self) -> None:
        self._last(2)

    def tuple3(self) -> None:
        self._last(3)

    def _last(self, count: int) -> None:
        if len(self._stack) < count:
            raise _WrongError("a value is missing")
        self._stack[-count:] = [tuple(self._stack[-count:])]

    def append(self) -> None:
        value = self._stack.pop()
        self._extend([value])

    def appends(self) -> None:
        self._extend(self._popped())

    def _extend(self, values: list[Any]) -> None:
        target = self._stack[-1]
        if isinstance(target, Call):
            target.items += values
        elif isinstance(target, list):
            target += values
        else:
            raise _WrongError(f"{type(target).__name__} takes no values")

    def set_item(self) -> None:
        value, key = self._stack.pop(), self._stack.pop()
        self._set([(key, value)])

    def set_items(self) -> None:
        self._set(_pairs(self._popped()))

    def _set(self, pairs: Iterable[tuple[Any, Any]]) -> None:
        target = self._stack[-1]
        if isinstance(target, Call):
            target.items += pairs
        elif isinstance(target, Table):
            target.pairs += pairs
        else:
            raise _WrongError(f"{type(target).__name__} takes no entries")

    def stack_global(self) -> None:
        name, module = self._stack.pop(), self._stack.pop()
        if not isinstance(name, str) or not isinstance(module, str):
            raise _WrongError("a name that is no string")
        self._push(Symbol(module, name))

    def reduce(self) -> None:
        arguments, function = self._stack.pop(), self._stack.pop()
        self._push(self._call(function, arguments))

    def new_with_keywords(self) -> None:
        keywords, arguments, function = self._stack.pop(), self._stack.pop(), self._stack.pop()
        self._push(Call(function, (arguments, keywords)))

    def object(self) -> None:
        function, *arguments = self._popped()
        self._push(self._call(function, tuple(arguments)))

    def build(self) -> None:
        """Attributes of a dictionary (torch keeps the versions of modules there) say nothing about its entries."""
        state = self._stack.pop()
        target = self._stack[-1]
        if isinstance(target, Call):
            target.state = state
        elif not isinstance(target, Table):
            raise _WrongError(f"{type(target).__name__} takes no state")

    def stored(self) -> None:
        self._push(Stored(self._stack.pop()))


def _pairs(values: list[Any]) -> Iterator[tuple[Any, Any]]:
    if len(values) % 2:
        raise _WrongError("a key without a value")
    return iter([*zip(values[::2], values[1::2], strict=True)])


_VALUES = frozenset(
    (
        *("INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT"),
        *("STRING", "BINSTRING", "SHORT_BINSTRING", "BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "BYTEARRAY8"),
        *("UNICODE", "SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8"),
    )
)
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "EMPTY_TUPLE": ()}
_READS = frozenset(("GET", "BINGET", "LONG_BINGET"))
_WRITES = frozenset(("PUT", "BINPUT", "LONG_BINPUT"))
_STEPS: dict[str, Callable[[_Reader], None]] = {
    "MARK": _Reader.mark,
    "POP": _Reader.pop,
    "POP_MARK": _Reader.pop_mark,
    "DUP": _Reader.dup,
    "MEMOIZE": _Reader.memoize,
    "EMPTY_LIST": _Reader.empty_list,
    "EMPTY_SET": _Reader.empty_list,
    "ADDITEMS": _Reader.appends,
    "FROZENSET": _Reader.list_,
    "EMPTY_DICT": _Reader.empty_table,
    "LIST": _Reader.list_,
    "DICT": _Reader.table,
    "TUPLE": _Reader.tuple_,
    "TUPLE1": _Reader.tuple1,
    "TUPLE2": _Reader.tuple2,
    "TUPLE3": _Reader.tuple3,
    "APPEND": _Reader.append,
    "APPENDS": _Reader.appends,
    "SETITEM": _Reader.set_item,
    "SETITEMS": _Reader.set_items,
    "STACK_GLOBAL": _Reader.stack_global,
    "REDUCE": _Reader.reduce,
    "NEWOBJ": _Reader.reduce,
    "NEWOBJ_EX": _Reader.new_with_keywords,
    "OBJ": _Reader.object,
    "BUILD": _Reader.build,
    "BINPERSID": _Reader.stored,
}
