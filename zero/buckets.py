"""All parameters of a model that are trained, in flat buckets: gradients are summed while backward goes on."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Mapping, Set

import torch
from torch import Tensor, nn

from parallel import comm
from parallel.holders import holders
from parallel.mesh import Axis, Mesh
from parallel.shard import Shard, param_shards
from zero import compress
from zero.bucket import Bucket
from zero.fragment import Fragment
from zero.plan import Slot, plan, runs_once
from zero.residue import residue
from zero.sharing import Sharing
from zero.turns import Turns

__all__ = ["Buckets"]

_PIECE = 1 << 16

_VISITORS = 4


class Buckets:
    """All parameters of a model that are trained.

    Args:
        model: its parameters become views of the buckets.
        mesh: gradients are summed over ``mesh.data`` (tp where they arrive in parts, pp where stages share them); every
            rank makes its buckets at the same time.
        sharing: how the buckets are cut.
        units: parameter -> the part of the model that it is gathered with.
        bucket_bytes: of gradients; a larger parameter has a bucket of its own.

    Attributes:
        buckets: in the order in which backward reaches them.
        frozen: parameters that are not trained, by name.
        shards: the shard table of all.
        holders: parameter -> pipeline ranks that hold it, for those of all stages.
        where: parameter -> its bucket, and its place in it.
        arriving: called with every gradient before it is added to others.
    """

    def __init__(
        self, model: nn.Module, mesh: Mesh, sharing: Sharing, units: Mapping[nn.Parameter, str], bucket_bytes: int
    ) -> None:
        self.mesh, self.sharing = mesh, sharing
        self.shards = param_shards(model)
        self.frozen = {name: parameter for name, parameter in model.named_parameters() if not parameter.requires_grad}
        self.holders = holders(self.shards, mesh)
        trained = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
        groups = plan(
            trained,
            self.holders,
            units,
            bucket_bytes,
            sharing.shard.size,
            exact=self._exact() if sharing.compressed else frozenset(),
            whole=sharing.whole_matrices,
        )
        self.buckets = [Bucket(group, sharing) for group in groups]
        self.where = {slot.parameter: (b, p) for b in self.buckets for p, slot in enumerate(b.slots)}
        self.turns = Turns(self.buckets, self.where, sharing)
        self._all = frozenset(self.where)
        self._finished = False
        self.arriving: Callable[[Tensor], None] | None = None
        arrived = weakref.WeakMethod(self._arrived)  # the garbage collector does not see hooks: a cycle would stay
        for parameter in self.where:
            parameter.register_post_accumulate_grad_hook(lambda p: method(p) if (method := arrived()) else None)
        for shared in sorted({ranks for ranks in self.holders.values() if len(ranks) > 1 and mesh.pp.rank in ranks}):
            mesh.among("pp", shared)
        self._sums = self._extra_sums()
        self._counted = self._counted_runs()

    def _exact(self) -> Set[str]:
        """Parameters that are never compressed.

        What several tensor-parallel ranks hold would part, rounded among other neighbours; and where several ranks form
        parts of one gradient there is no one residue of it.
        """
        whole = {n for n, shard in self.shards.items() if self.mesh.tp.size > 1 and "tp" not in shard.split}
        if not self.sharing.top_k:
            return whole
        parts = {n for n, shard in self.shards.items() if shard.repeated(self.mesh.tp.size)}
        return whole | parts | {n for n, ranks in self.holders.items() if len(ranks) > 1}

    def begin(self) -> None:
        """Forget the gradients of the last step."""
        self._finished = False
        self.turns.begin()
        for bucket in self.buckets:
            bucket.begin()

    def expect_last(self, last: bool, of: Set[nn.Parameter] | None = None, whole: bool = True) -> None:
        """Say whether the next backward pass gives the step's last gradients: buckets are reduced as they fill then.

        From stage 2 on they are in every pass that is announced so.

        Args:
            of: the parameters of which that is said; default: all.
            whole: whether none of their gradients is put off to a later pass.
        """
        self.turns.expect(last, self._all if of is None else of, whole)

    def _arrived(self, parameter: Tensor) -> None:
        assert isinstance(parameter, nn.Parameter)
        if parameter.grad is None:  # put off: autograd calls the hook of a weight whose gradient was left out
            return
        if self.arriving is not None:
            self.arriving(parameter.grad)
        bucket, position = self.where[parameter]
        bucket.arrive(position, parameter.grad)
        parameter.grad = None
        self.turns.arrived(bucket, position)

    @torch.no_grad()
    def finish(self) -> None:
        """Wait until every gradient is the whole sum, on every rank that holds the parameter; once a step."""
        if self._finished:
            return
        self._finished = True
        self.turns.finish()
        for bucket in self.buckets:
            bucket.settle()
        for bucket in self.buckets:
            if bucket.landing is not None:
                bucket.landing.done()
        self._sum_copies()
        for axis, parts in self._sums:
            views = [self.own(bucket)[run] for bucket, run in parts]
            message = torch.cat(views).to(self.mesh.device)
            for view, summed in zip(views, comm.sum_(message, axis).split([len(v) for v in views]), strict=True):
                view.copy_(summed)
        for bucket in self.buckets:
            if bucket.shared:
                own = self.own(bucket)
                own.copy_(comm.sum_(own.to(bucket.device), self.mesh.among("pp", bucket.shared)))

    def _sum_copies(self) -> None:
        """Sum over the ranks that hold the same runs; those in CPU memory visit the device, a few at a time."""
        axis, bits = self.sharing.replica, self.sharing.gradient_bits
        if axis.size == 1 or not self.sharing.stage:
            return
        few = len(self.buckets) if self.sharing.offload == "none" else _VISITORS
        for first in range(0, len(self.buckets), few):
            some = self.buckets[first : first + few]
            there = {bucket: self.own(bucket).to(bucket.device) for bucket in some}
            exact = [run for bucket, run in there.items() if bucket.exact or not bits]
            pending = [comm.start_all_reduce(run, axis) for run in exact]
            if bits:
                compress.all_reduce([run for bucket, run in there.items() if not bucket.exact], axis, bits)
            for arrival in pending:
                arrival.wait()
            for bucket, run in there.items():
                if run is not self.own(bucket):
                    self.own(bucket).copy_(run)

    def own(self, bucket: Bucket) -> Tensor:
        """This rank's run of the reduced gradient."""
        return bucket.reduced

    def _slots(self) -> Iterator[tuple[Bucket, Slot, Shard]]:
        for bucket in self.buckets:
            for slot in bucket.slots:
                yield bucket, slot, self.shards[slot.name]

    def _extra_sums(self) -> list[tuple[Axis, list[tuple[Bucket, slice]]]]:
        """Runs that are summed over more than the data axis: gradients that arrive in parts, repeated heads."""
        sums: dict[str, tuple[Axis, list[tuple[Bucket, slice]]]] = {}

        def note(axis: Axis, key: str, bucket: Bucket, run: slice) -> None:
            sums.setdefault(key, (axis, []))
            if run.start < run.stop:
                sums[key][1].append((bucket, run))

        for bucket, slot, shard in self._slots():
            for name in shard.partial:
                if self.mesh.axes[name].size > 1:
                    note(self.mesh.axes[name], name, bucket, bucket.part(slot)[1])
            axis = self.mesh.axes[shard.split[shard.dim] or "tp"] if shard.sections else None
            if axis is None or not shard.repeated(axis.size):
                continue
            first, each = 0, slot.parameter.numel() // slot.parameter.shape[0]
            for section in shard.sections:
                rows, units = section.rows(axis.size), section.size // section.unit
                if section.repeat and units < axis.size:
                    sub = self.mesh.subaxis(axis.name, axis.size // units)
                    note(
                        sub,
                        f"{axis.name}/{sub.size}",
                        bucket,
                        bucket.part(slot, first * each, (first + rows) * each)[1],
                    )
                first += rows
        return [entry for entry in sums.values() if entry[1]]

    def _counted_runs(self) -> list[tuple[Bucket, list[slice]]]:
        """What of each bucket's own run this rank counts: over all ranks, every value once."""
        place = {"tp": (self.mesh.tp.rank, self.mesh.tp.size)}
        counted = []
        for bucket in self.buckets:
            if bucket.shared and bucket.shared[0] != self.mesh.pp.rank:
                continue
            runs = [
                bucket.part(slot, start, stop)[1]
                for slot in bucket.slots
                for start, stop in runs_once(self.shards[slot.name], place)
            ]
            counted.append((bucket, _joined(runs)))
        return counted

    def residues(self) -> Iterator[Fragment]:
        """What top-k keeps back on this rank, as views."""
        data = self.mesh.data
        for bucket, slot, _ in self._slots():
            if bucket.top is not None:
                kept = bucket.top.kept[slot.start : slot.stop]
                yield Fragment(slot.name, residue(data.rank, data.size), 0, kept)

    @torch.no_grad()
    def norm(self) -> Tensor:
        """The 2-norm of all gradients of all ranks, every value counted once; a scalar."""
        total = torch.zeros((), dtype=torch.float64, device=self.mesh.device)
        for bucket, runs in self._counted:
            for run in runs:
                total += _square(self.own(bucket)[run]).to(total.device)
        for axis in (self.sharing.shard, self.mesh.tp, self.mesh.pp):
            comm.sum_(total, axis)
        return total.sqrt()

    def not_finite(self) -> list[str]:
        """Parameters of which this rank's own gradient, before any sum, was not finite."""
        bad: list[str] = []
        for bucket in self.buckets:
            names = [slot.name for slot in bucket.slots]
            passes = len(bucket.highest) // len(names)
            bad += [n for n, high in zip(names * passes, bucket.highest, strict=True) if not torch.isfinite(high)]
        return list(dict.fromkeys(bad))

    @torch.no_grad()
    def publish(self) -> None:
        """Give the model the values of the master weights."""
        for bucket in self.buckets:
            bucket.land()
        for pending in [bucket.publish() for bucket in self.buckets]:
            if pending is not None:
                pending.wait()


def _square(values: Tensor) -> Tensor:
    """The squared 2-norm, float64; summed in float32 a long vector's would be off by 1e-4."""
    return torch.stack(torch._foreach_norm(values.split(_PIECE))).double().square().sum()


def _joined(runs: list[slice]) -> list[slice]:
    """Neighbouring runs as one, empty ones left out."""
    joined: list[slice] = []
    for run in runs:
        if run.start >= run.stop:
            continue
        if joined and joined[-1].stop == run.start:
            joined[-1] = slice(joined[-1].start, run.stop)
        else:
            joined.append(run)
    return joined
