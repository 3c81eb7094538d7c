"""Actions of a pipeline schedule, their grammar, and what each kind takes and gives.

An action prints as stage, kind, microbatch: ``2F0`` is the forward pass of microbatch 0 through stage 2.

====  ==========================  =====================================================
F     forward                     input and parameters -> output
B     backward                    gradient of the output -> of the input and the weights
I     backward of the input       the first half of B
W     backward of the weights     the second half of B, at any later time
SF    send forward                the output of F, to the rank of the next stage
RF    receive forward             the input of F, from the rank of the stage before
SB    send backward               the gradient that B or I formed, to the stage before
RB    receive backward            the gradient that B or I needs, from the next stage
====  ==========================  =====================================================

A new kind is one entry of :data:`KINDS` (what it takes, gives and holds) and one handler of the executor.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal, NamedTuple

from parallel.errors import ScheduleError, nearest

__all__ = ["KINDS", "TRANSFERS", "Action", "Kind", "Value", "parse_action"]


class Action(NamedTuple):
    """One cell of a schedule."""

    stage: int
    op: str
    microbatch: int

    def __str__(self) -> str:
        return f"{self.stage}{self.op}{self.microbatch}"


class Value(NamedTuple):
    """Something that exists for a stage and a microbatch: its input, what backward needs, ...

    Attributes:
        name: ``input`` of the stage, ``saved`` for backward, ``output_gradient`` of the stage, ``kept`` for W,
            ``gradient`` of the weights.
        offset: of its stage from that of the action. ``input`` of the first stage and ``output_gradient`` of the last
            come from outside; what lies beyond the first and the last stage is given to nobody.
    """

    name: str
    offset: int = 0


@dataclass(frozen=True, slots=True)
class Kind:
    """What schedules, the simulator and pictures know about a kind of action.

    Attributes:
        code: in the grammar.
        name: for people.
        stream: what it occupies: the rank's computation, or the link that it sends or receives over.
        takes: values that must be there, and are used up.
        gives: values that exist afterwards.
        activations: change of the number of activations that the stage holds.
        kept: change of the number of inputs kept for W.
        peer: of a send or receive: offset of the stage at the other end.
        needed_by: kinds of the same stage and microbatch that may only come after it, where it is in the table.
    """

    code: str
    name: str
    stream: Literal["compute", "send", "receive"] = "compute"
    takes: tuple[Value, ...] = ()
    gives: tuple[Value, ...] = ()
    activations: int = 0
    kept: int = 0
    peer: int = 0
    needed_by: tuple[str, ...] = ()


_INPUT, _SAVED, _GRADIENT_IN, _KEPT = (Value(name) for name in ("input", "saved", "output_gradient", "kept"))
_OUTPUT, _GRADIENT_OUT, _WEIGHTS = Value("input", 1), Value("output_gradient", -1), Value("gradient")

KINDS: dict[str, Kind] = {
    kind.code: kind
    for kind in (
        Kind("F", "forward", takes=(_INPUT,), gives=(_OUTPUT, _SAVED), activations=1),
        Kind("B", "backward", takes=(_GRADIENT_IN, _SAVED), gives=(_GRADIENT_OUT, _WEIGHTS), activations=-1),
        Kind(
            "I",
            "backward of the input",
            takes=(_GRADIENT_IN, _SAVED),
            gives=(_GRADIENT_OUT, _KEPT),
            activations=-1,
            kept=1,
        ),
        Kind("W", "backward of the weights", takes=(_KEPT,), gives=(_WEIGHTS,), kept=-1),
        Kind("SF", "send forward", "send", takes=(_OUTPUT,), peer=1),
        Kind("RF", "receive forward", "receive", gives=(_INPUT,), peer=-1),
        Kind("SB", "send backward", "send", takes=(_GRADIENT_OUT,), peer=-1),
        Kind("RB", "receive backward", "receive", gives=(_GRADIENT_IN,), peer=1),
    )
}

TRANSFERS: dict[str, tuple[str, str]] = {"input": ("SF", "RF"), "output_gradient": ("SB", "RB")}
"""Value that may have to travel -> the kinds that send and receive it."""

_GRAMMAR = re.compile(r"(\d+)([A-Za-z]+)(\d+)")


def parse_action(text: str) -> Action:
    """The action that prints as ``text``.

    Raises:
        ScheduleError: it is not stage, kind, microbatch, or there is no such kind.
    """
    match = _GRAMMAR.fullmatch(text)
    if match is None:
        raise ScheduleError(f"{text!r} is not an action: stage, kind, microbatch, as in 2F0")
    stage, op, microbatch = match.groups()
    if op not in KINDS:
        raise ScheduleError(f"{text!r}: no kind of action {op!r}{nearest(op, KINDS)}; there are: {', '.join(KINDS)}")
    return Action(int(stage), op, int(microbatch))
