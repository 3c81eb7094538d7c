"""ZeRO 3: parameters are gathered ahead of their use, and let go after it (arXiv 1910.02054, section 5.3)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from parallel import comm
from parallel.mesh import Axis
from zero.bucket import Bucket, Life
from zero.script import Script

__all__ = ["Live", "units_of"]

_Use = tuple[str, str]
"""A unit, and whether it runs forward or backward."""


def units_of(model: nn.Module) -> dict[str, nn.Module]:
    """The parts of a model that are gathered as one: the children of a model, and of its lists of blocks, by name."""
    units: dict[str, nn.Module] = {}
    for name, child in model.named_children():
        if isinstance(child, nn.ModuleList | nn.ModuleDict | nn.Sequential):
            units |= {f"{name}.{inner}": module for inner, module in child.named_children()}
        else:
            units[name] = child
    return {name: module for name, module in units.items() if any(True for _ in module.parameters())}


class Live:
    """Gathers the buckets of a unit before the unit runs, forward and backward, and releases them after.

    What follows a use is remembered, and gathered while that use computes. All ranks of the axis must run the same
    units in the same order, so that they remember and gather the same.

    Args:
        units: name -> module.
        buckets: name -> the buckets that the module's parameters are in.
        ahead: units that are gathered ahead of their use.
        axis: over which they are gathered.
        passed: told of every bucket that backward has left.

    Attributes:
        most: the most values that were whole, or on their way, at a time.
    """

    def __init__(
        self,
        units: Mapping[str, nn.Module],
        buckets: Mapping[str, Sequence[Bucket]],
        ahead: int,
        axis: Axis,
        passed: Callable[[Bucket], None],
    ) -> None:
        self.buckets, self.ahead, self._passed = buckets, ahead, passed
        self._script = Script(axis)
        self._next: dict[_Use, _Use] = {}
        self._previous: _Use | None = None
        self._users: dict[Bucket, int] = {}
        self._held = False
        self.most = 0
        for name, module in units.items():
            module.register_forward_pre_hook(self._before(name), with_kwargs=True)
            module.register_forward_hook(self._after(name), with_kwargs=True)
        for bucket in self._all():
            bucket.release()

    def _all(self) -> Iterator[Bucket]:
        seen: set[int] = set()
        for buckets in self.buckets.values():
            for bucket in buckets:
                if id(bucket) not in seen:
                    seen.add(id(bucket))
                    yield bucket

    def use(self, unit: str, phase: str) -> None:
        """Have a unit whole, and begin to gather what follows it.

        Raises:
            OutOfStep: other ranks use another unit.
        """
        use = (unit, phase)
        self._script.follow(f"{phase} of {unit}")
        if self._previous is not None:
            self._next[self._previous] = use
        self._previous = use
        for bucket in self.buckets[unit]:
            self._users[bucket] = self._users.get(bucket, 0) + 1
        expected = self._expected(use)
        self._release_all_but(expected)
        for bucket in self.buckets[unit]:
            bucket.gather()
        for bucket in self.buckets[unit]:
            self._script.wait(bucket.there, f"{phase} of {unit}")
            bucket.whole()
        for bucket in expected:
            bucket.gather()
        live = sum(bucket.length for bucket in self._all() if bucket.life is not Life.SHARDED)
        self.most = max(self.most, live)

    def _expected(self, use: _Use) -> list[Bucket]:
        found: list[Bucket] = []
        for _ in range(self.ahead):
            following = self._next.get(use)
            if following is None:
                break
            found += self.buckets[following[0]]
            use = following
        return found

    def _release_all_but(self, expected: Sequence[Bucket]) -> None:
        for bucket in self._all():
            if not self._users.get(bucket) and bucket not in expected and not self._held:
                bucket.release()

    def done(self, unit: str, phase: str) -> None:
        """Let a unit go, unless it is used next."""
        expected = self._expected(self._previous) if self._previous else []
        for bucket in self.buckets[unit]:
            self._users[bucket] = max(0, self._users.get(bucket, 0) - 1)
            if not self._users[bucket] and bucket not in expected and not self._held:
                bucket.release()
            if not self._users[bucket] and phase == "backward":
                self._passed(bucket)

    def begin(self) -> None:
        """A step begins: what one that was broken off still held is let go."""
        self._script.open("step")
        self._users.clear()
        self._previous = None
        self._release_all_but(())

    def end(self) -> None:
        """The step is over: nothing follows what was used last."""
        self._script.open("between steps")
        self._previous = None

    @contextmanager
    def whole(self) -> Iterator[None]:
        """All parameters, for as long as the context is open."""
        self._script.follow("all parameters")
        self._held, outer = True, self._held
        try:
            for bucket in self._all():
                bucket.gather()
            for bucket in self._all():
                self._script.wait(bucket.there, "all parameters")
                bucket.whole()
            yield
        finally:
            self._held = outer
            for bucket in self._all():
                if not self._users.get(bucket) and not outer:
                    bucket.release()

    def _before(self, unit: str) -> Any:
        def hook(module: nn.Module, arguments: tuple[Any, ...], options: dict[str, Any]) -> Any:
            self.use(unit, "forward")
            return _through(_Enter, (arguments, options), self, unit)[0]

        return hook

    def _after(self, unit: str) -> Any:
        def hook(module: nn.Module, arguments: tuple[Any, ...], options: dict[str, Any], output: Any) -> Any:
            inward = any(tensor.requires_grad for tensor in _tensors((arguments, options)))
            output, _ = _through(_Leave, output, self, unit, not inward)
            self.done(unit, "forward")
            return output

        return hook


class _Enter(torch.autograd.Function):
    """What goes into a unit. Its backward comes last: the unit may go."""

    @staticmethod
    def forward(ctx: Any, live: Live, unit: str, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.live, ctx.unit = live, unit
        return tuple(tensor.view_as(tensor) for tensor in tensors)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        ctx.live.done(ctx.unit, "backward")
        return None, None, *grads


class _Leave(torch.autograd.Function):
    """What comes out of a unit. Its backward comes first: the unit is needed, without ``_Enter`` till the end."""

    @staticmethod
    def forward(ctx: Any, live: Live, unit: str, last: bool, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.live, ctx.unit, ctx.last = live, unit, last
        return tuple(tensor.view_as(tensor) for tensor in tensors)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        ctx.live.use(ctx.unit, "backward")
        if ctx.last:
            engine: Any = torch.autograd.Variable._execution_engine
            engine.queue_callback(lambda: ctx.live.done(ctx.unit, "backward"))
        return None, None, None, *grads


def _through(function: type[torch.autograd.Function], value: Any, *leading: Any) -> tuple[Any, int]:
    """``value`` with the tensors in it that take part in backward passed through ``function``; how many they were."""
    tensors = [tensor for tensor in _tensors(value) if tensor.requires_grad] if torch.is_grad_enabled() else []
    if not tensors:
        return value, 0
    passed = iter(comm.apply(function, *leading, *tensors))
    return _replaced(value, passed), len(tensors)


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, tuple | list):
        for part in value:
            yield from _tensors(part)
    elif isinstance(value, dict):
        for part in value.values():
            yield from _tensors(part)


def _replaced(value: Any, tensors: Iterator[Tensor]) -> Any:
    if isinstance(value, Tensor):
        return next(tensors) if value.requires_grad else value
    if isinstance(value, tuple | list):
        parts = [_replaced(part, tensors) for part in value]
        return type(value)(*parts) if hasattr(value, "_fields") else type(value)(parts)
    if isinstance(value, dict):
        return {name: _replaced(part, tensors) for name, part in value.items()}
    return value
