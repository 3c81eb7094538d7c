"""Linear layers cut over the tensor-parallel axis (Megatron-LM, arXiv 1909.08053; sequence parallelism, 2205.05198).

A column-parallel layer cuts the output features, a row-parallel layer the input features, so that a column layer
followed
by a row layer communicates once each way. Under sequence parallelism the tokens outside the pair are cut as well: the
pair begins with an all-gather and ends with a reduce-scatter of tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from parallel import comm
from parallel.deferral import Deferral
from parallel.errors import ConfigError, refuse
from parallel.ledger import caller
from parallel.mesh import Axis
from parallel.shard import Section, Shard, fill
from parallel.tp.method import Dense, LinearMethod

__all__ = ["ColumnParallelLinear", "MergedColumnParallelLinear", "QKVParallelLinear", "RowParallelLinear"]


class _ColumnProduct(torch.autograd.Function):
    """Gather tokens or replicate, multiply. Backward: gather beside dgrad, reduction of dgrad beside wgrad."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        axis: Axis,
        method: LinearMethod,
        sequence: bool,
        tokens: int | None,
        deferral: Deferral,
    ) -> Tensor:
        ctx.axis, ctx.method, ctx.sequence, ctx.tokens = axis, method, sequence, tokens
        ctx.save_for_backward(x, weight)
        ctx.deferral, ctx.parameter = deferral, weight
        ctx.biased = bias is not None
        ctx.place = caller(__file__, comm.__file__) if axis.size > 1 else ""
        full = comm.start_all_gather(x, axis, tokens, ctx.place).wait() if sequence else x
        return method.product(full, weight, bias)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        gy, (x, weight), axis = grads[0], ctx.saved_tensors, ctx.axis
        needs_x, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        place, sequence, tokens, method = ctx.place + " (backward)", ctx.sequence, ctx.tokens, ctx.method

        def gather() -> comm.Pending:
            return comm.start_all_gather(x, axis, tokens, place) if sequence else comm.Pending(x)

        gathered = gather() if needs_weight and not ctx.deferral.keeps else None
        reduced = None
        if needs_x:
            gx = method.input_gradient(gy, weight)
            if sequence:
                reduced = comm.start_reduce_scatter(gx, axis, place)
            else:
                reduced = comm.start_all_reduce(gx, axis, place=place)
        gw = None
        if needs_weight:
            form = lambda: method.weight_gradient(gy, (gathered or gather()).wait())  # noqa: E731
            gw = ctx.deferral(ctx.parameter, form)
        gb = gy.sum(0) if ctx.biased and needs_bias else None
        return reduced.wait() if reduced else None, gw, gb, None, None, None, None, None


class _RowProduct(torch.autograd.Function):
    """Multiply, reduce or reduce-scatter. Backward gathers the gradient's tokens, then multiplies."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, axis: Axis, method: LinearMethod, sequence: bool, deferral: Deferral
    ) -> Tensor:
        ctx.axis, ctx.method, ctx.sequence = axis, method, sequence
        ctx.save_for_backward(x, weight)
        ctx.deferral, ctx.parameter = deferral, weight
        ctx.place = caller(__file__, comm.__file__) if axis.size > 1 else ""
        y = method.product(x, weight, None)
        if sequence:
            return comm.start_reduce_scatter(y, axis, ctx.place).wait()
        return comm.start_all_reduce(y, axis, place=ctx.place).wait()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        gy, (x, weight), method = grads[0], ctx.saved_tensors, ctx.method
        if ctx.sequence:
            gy = comm.start_all_gather(gy, ctx.axis, x.shape[0], ctx.place + " (backward)").wait()
        gx = method.input_gradient(gy, weight) if ctx.needs_input_grad[0] else None
        gw = None
        if ctx.needs_input_grad[1]:
            gw = ctx.deferral(ctx.parameter, lambda: method.weight_gradient(gy, x))
        return gx, gw, None, None, None, None


class _ParallelLinear(nn.Module):
    """What the column and the row layer share: weight, bias and their entries in the shard table."""

    weight: nn.Parameter
    bias: nn.Parameter | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        axis: Axis,
        *,
        bias: bool,
        sequence_parallel: bool,
        std: float | None,
        method: LinearMethod | None,
        deferral: Deferral | None,
        dtype: torch.dtype | None,
        device: torch.device | str | None,
    ) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.axis = axis
        self.sequence_parallel = sequence_parallel
        self.biased = bias
        self.std = in_features**-0.5 if std is None else std
        self.method: LinearMethod = Dense() if method is None else method
        self.deferral = Deferral() if deferral is None else deferral
        shards = self.shards()
        refuse(ConfigError, self._problems(shards["weight"]))
        dtype = torch.get_default_dtype() if dtype is None else dtype
        device = "cpu" if device is None else device
        out, in_ = shards["weight"].local_shape(axis.place)
        self.method.create(self, (out, in_), dtype, device)
        self.register_parameter(
            "bias",
            nn.Parameter(torch.empty(shards["bias"].local_shape(axis.place), dtype=dtype, device=device))
            if bias
            else None,
        )
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the weights anew: one number is taken from torch's generator, the rest follows from global indices.

        Ranks that were seeded alike (``torch.manual_seed``) get the same layer at every layout.
        """
        draw = int(torch.randint(1 << 62, ()).item())
        shards = self.shards()
        for name, parameter in self.named_parameters(recurse=False):
            if name in shards and not parameter.is_meta:
                fill(parameter.data, shards[name], self.axis.place, draw)

    def shards(self) -> dict[str, Shard]:
        """The layer's entries in the shard table."""
        raise NotImplementedError

    def _problems(self, shard: Shard) -> list[str]:
        sections = shard.sections or (Section(shard.shape[shard.dim]),)
        return [
            f"{type(self).__name__}: {self.axis.size} tensor-parallel ranks cannot share the "
            f"{section.size // section.unit} units of {section.name or 'its cut dim'} ({self.in_features} -> "
            f"{self.out_features})"
            for section in sections
            if not section.divides(self.axis.size)
        ]

    @property
    def _alone(self) -> bool:
        """Whether nothing but the product is left to do: one rank, no gradients."""
        return self.axis.size == 1 and not torch.is_grad_enabled()

    def extra_repr(self) -> str:
        """In and out features of the whole layer, and the axis."""
        return f"{self.in_features} -> {self.out_features}, {self.axis.name}={self.axis.size}, bias={self.biased}"


class ColumnParallelLinear(_ParallelLinear):
    """``y = x W^T + b`` with the output features cut over the axis.

    Args:
        in_features: size of the input, whole on every rank.
        out_features: size of the output of all ranks together.
        axis: the tensor-parallel axis.
        bias: whether there is one; it is cut like the output.
        sequence_parallel: the input holds this rank's piece of the tokens; they are gathered first.
        gather_output: return all output features on every rank.
        sections: runs of output features that are cut each by itself.
        std: of the initial weights; default ``in_features ** -0.5``.
        method: how the weight is held and multiplied; default :class:`~parallel.tp.method.Dense`.
        deferral: asked in backward whether the gradient of the weight is wanted at once; default: it is.

    Raises:
        ConfigError: the axis does not divide the output features.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        axis: Axis,
        *,
        bias: bool = True,
        sequence_parallel: bool = False,
        gather_output: bool = False,
        sections: Sequence[Section] = (),
        std: float | None = None,
        method: LinearMethod | None = None,
        deferral: Deferral | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        self.sections = tuple(sections)
        self.gather_output = gather_output
        super().__init__(
            in_features,
            out_features,
            axis,
            bias=bias,
            sequence_parallel=sequence_parallel,
            std=std,
            method=method,
            deferral=deferral,
            dtype=dtype,
            device=device,
        )

    def shards(self) -> dict[str, Shard]:
        """``weight`` (out, in) and ``bias`` (out), cut along out."""
        name, out, in_ = self.axis.name, self.out_features, self.in_features
        shards = {"weight": Shard(shape=(out, in_), split=(name, None), sections=self.sections, std=self.std)}
        if self.biased:
            shards["bias"] = Shard(shape=(out,), split=(name,), sections=self.sections)
        return shards

    def forward(self, x_TI: Tensor, tokens: int | None = None) -> Tensor:
        """(T, in) -> (T, out / size), or (T, out) with ``gather_output``.

        Args:
            x_TI: all tokens; under sequence parallelism this rank's piece of them.
            tokens: how many tokens there are on all ranks, where the axis does not divide them.
        """
        if self._alone:
            return self.method.product(x_TI, self.weight, self.bias)
        how = self.axis, self.method, self._sequence, tokens, self.deferral
        y = comm.apply(_ColumnProduct, x_TI, self.weight, self.bias, *how)
        if not self.gather_output:
            return y
        y = comm.all_gather(y, self.axis, dim=1, grad="replicated")
        return y.index_select(1, self._order().to(y.device)) if self.sections and self.axis.size > 1 else y

    def _order(self) -> Tensor:
        """Where each output feature stands once the ranks' outputs are joined, which is by rank, not by section."""
        shard, size = self.shards()["weight"], self.axis.size
        order = torch.empty(self.out_features, dtype=torch.int64)
        for rank in range(size):
            for piece in shard.pieces({self.axis.name: (rank, size)}):
                full, local = piece.full[0], piece.local[0]
                if piece.first:
                    order[full] = torch.arange(local.start, local.stop) + rank * self.weight.shape[0]
        return order

    @property
    def _sequence(self) -> bool:
        return self.sequence_parallel and self.axis.size > 1


class MergedColumnParallelLinear(ColumnParallelLinear):
    """Several column-parallel layers of one input as one product: gate and up.

    Each rank's output holds its pieces of all of them, one after the other.
    """

    def __init__(self, in_features: int, out_features: Sequence[int], axis: Axis, **options: Any) -> None:
        names = options.pop("names", None) or [str(index) for index in range(len(out_features))]
        sections = [Section(size, name=name) for size, name in zip(out_features, names, strict=True)]
        super().__init__(in_features, sum(out_features), axis, sections=sections, **options)


class QKVParallelLinear(ColumnParallelLinear):
    """Query, key and value projections as one product, cut by heads.

    With fewer key-value heads than ranks, each is held by several ranks; their gradients are summed by
    :func:`~parallel.shard.finalize_gradients`.

    Args:
        hidden: size of the input.
        head_size: size of a head.
        heads: query heads of all ranks.
        kv_heads: key-value heads of all ranks.

    Raises:
        ConfigError: the axis does not divide the heads, or neither divides nor is a multiple of the key-value heads.
    """

    def __init__(self, hidden: int, head_size: int, heads: int, kv_heads: int, axis: Axis, **options: Any) -> None:
        sections = (
            Section(heads * head_size, head_size, name="q"),
            Section(kv_heads * head_size, head_size, repeat=True, name="k"),
            Section(kv_heads * head_size, head_size, repeat=True, name="v"),
        )
        self.head_size = head_size
        self.local_heads = heads // axis.size
        self.local_kv_heads = max(1, kv_heads // axis.size)
        super().__init__(hidden, (heads + 2 * kv_heads) * head_size, axis, sections=sections, **options)

    def split_heads(self, qkv_TO: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The layer's output as q (T, N, H), k and v (T, K, H), views."""
        n, k = self.local_heads, self.local_kv_heads
        q, k_, v = qkv_TO.view(qkv_TO.shape[0], -1, self.head_size).split([n, k, k], dim=1)
        return q, k_, v


class RowParallelLinear(_ParallelLinear):
    """``y = x W^T + b`` with the input features cut over the axis; the ranks' products are summed.

    Args:
        in_features: size of the input of all ranks together.
        out_features: size of the output.
        axis: the tensor-parallel axis.
        bias: whether there is one; it is whole on every rank, and added after the sum.
        sequence_parallel: return this rank's piece of the tokens.
        input_is_parallel: the input is already cut, as a column-parallel layer leaves it; otherwise it is cut here.
        std, method, deferral: as in :class:`ColumnParallelLinear`.

    Raises:
        ConfigError: the axis does not divide the input features.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        axis: Axis,
        *,
        bias: bool = True,
        sequence_parallel: bool = False,
        input_is_parallel: bool = True,
        unit: int = 1,
        std: float | None = None,
        method: LinearMethod | None = None,
        deferral: Deferral | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        self.input_is_parallel = input_is_parallel
        self.unit = unit
        super().__init__(
            in_features,
            out_features,
            axis,
            bias=bias,
            sequence_parallel=sequence_parallel,
            std=std,
            method=method,
            deferral=deferral,
            dtype=dtype,
            device=device,
        )

    def shards(self) -> dict[str, Shard]:
        """``weight`` (out, in) cut along in; ``bias`` (out) whole."""
        name = self.axis.name
        section = (Section(self.in_features, self.unit),)
        weight = Shard(shape=(self.out_features, self.in_features), split=(None, name), sections=section, std=self.std)
        shards = {"weight": weight}
        if self.biased:
            shards["bias"] = Shard(shape=(self.out_features,), partial=(name,) if self.sequence_parallel else ())
        return shards

    def forward(self, x_TI: Tensor) -> Tensor:
        """(T, in / size) -> (T, out); under sequence parallelism this rank's piece of the tokens."""
        if self._alone:
            y = self.method.product(x_TI, self.weight, None)
        else:
            x_TI = x_TI if self.input_is_parallel else comm.split(x_TI, self.axis, dim=1)
            sequence = self.sequence_parallel and self.axis.size > 1
            y = comm.apply(_RowProduct, x_TI, self.weight, self.axis, self.method, sequence, self.deferral)
        return y if self.bias is None else y + self.bias
