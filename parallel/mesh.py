"""The mesh: ranks arranged in named axes, and the process group of each axis."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
import torch.distributed as dist

from parallel.config import option
from parallel.errors import ConfigError, refuse
from parallel.ledger import Ledger

__all__ = ["Axis", "Layout", "Mesh", "Place"]

Place = Mapping[str, tuple[int, int]]
"""Where a rank stands: axis name -> (rank in the axis, size of the axis)."""

_DENSE = ("pp", "dp", "cp", "tp")
_EXPERT = ("pp", "edp", "ep", "etp")
_JOINT = {"data": ("dp", "cp"), "world": _DENSE}


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """The degree of every kind of parallelism.

    The world is ``pp * dp * cp * tp`` ranks, tp innermost: rank = ((pp_rank * dp + dp_rank) * cp + cp_rank) * tp +
    tp_rank. Experts re-use the ranks of dp, cp and tp: ``ep * etp`` divides ``dp * cp * tp``, and what is left is
    ``edp``.
    """

    pp: int = option(1, "pipeline stages")
    dp: int = option(1, "data-parallel replicas")
    cp: int = option(1, "context parallelism: ranks that share one sequence")
    tp: int = option(1, "tensor parallelism: ranks that share one layer")
    ep: int = option(1, "expert parallelism, inside dp * cp * tp")
    etp: int = option(1, "tensor parallelism of the experts")
    sequence_parallel: bool = option(True, "keep norm, dropout and residual on 1/tp of the tokens")

    @property
    def world(self) -> int:
        """The number of ranks."""
        return self.pp * self.dp * self.cp * self.tp

    @property
    def edp(self) -> int:
        """Replicas of each expert."""
        return self.dp * self.cp * self.tp // (self.ep * self.etp)

    def problems(self) -> Iterator[str]:
        """Why these degrees cannot be."""
        for name in ("pp", "dp", "cp", "tp", "ep", "etp"):
            if getattr(self, name) < 1:
                yield f"{name} = {getattr(self, name)}: a degree is at least 1"
                return
        dense = self.dp * self.cp * self.tp
        if dense % (self.ep * self.etp):
            yield f"ep * etp = {self.ep * self.etp} does not divide dp * cp * tp = {dense}"

    def place(self, rank: int) -> dict[str, tuple[int, int]]:
        """Where global rank ``rank`` stands on every axis, joint axes included."""
        place: dict[str, tuple[int, int]] = {}
        for names in (_DENSE, _EXPERT):
            rest = rank
            for name in reversed(names):
                rest, index = divmod(rest, getattr(self, name))
                place[name] = (index, getattr(self, name))
        for joint, names in _JOINT.items():
            index, size = 0, 1
            for name in names:
                index = index * place[name][1] + place[name][0]
                size *= place[name][1]
            place[joint] = (index, size)
        return place

    def peers(self, axis: str, rank: int) -> range:
        """The global ranks on the same axis as ``rank``, in the order of the axis."""
        names, stride = _JOINT.get(axis, (axis,)), 1
        for name in reversed(_EXPERT if axis in _EXPERT else _DENSE):
            if name == names[-1]:
                break
            stride *= getattr(self, name)
        index, size = self.place(rank)[axis]
        first = rank - index * stride
        return range(first, first + size * stride, stride)

    def groups(self, axis: str) -> list[range]:
        """The global ranks of every group of an axis, each in the order of the axis."""
        seen: set[int] = set()
        groups: list[range] = []
        for rank in range(self.world):
            if rank not in seen:
                groups.append(self.peers(axis, rank))
                seen.update(groups[-1])
        return groups


@dataclass(frozen=True, eq=False, slots=True)
class Axis:
    """The ranks that take part in one kind of parallelism, as one of them sees it.

    Attributes:
        name: ``tp``, ``dp``, ...
        rank: this rank's index in the axis.
        size: how many ranks; 1 means that every collective is the identity.
        group: the process group; None where the axis does not communicate: size 1, or a fake mesh, whose collectives
            give results of the right shape only.
        ranks: global ranks of the axis, in order.
        ledger: where collectives are recorded.
    """

    name: str
    rank: int = 0
    size: int = 1
    group: dist.ProcessGroup | None = None
    ranks: Sequence[int] = range(1)
    ledger: Ledger = field(default_factory=Ledger)

    @property
    def place(self) -> Place:
        """This axis alone, in the form the shard table takes."""
        return {self.name: (self.rank, self.size)}


class Mesh:
    """Every axis of one rank.

    Attributes:
        layout: the degrees.
        rank: this rank among all.
        device: where this rank computes.
        ledger: shared by all axes.
        pp, dp, cp, tp, ep, etp, edp: the axes; ``data`` is dp x cp, ``world`` is all ranks.
    """

    def __init__(
        self, layout: Layout, rank: int, device: torch.device, axes: Mapping[str, Axis], ledger: Ledger
    ) -> None:
        self.layout = layout
        self.rank = rank
        self.device = device
        self.ledger = ledger
        self.axes = dict(axes)
        self.pp, self.dp, self.cp, self.tp = (self.axes[name] for name in _DENSE)
        self.edp, self.ep, self.etp = (self.axes[name] for name in _EXPERT[1:])
        self.data, self.world = self.axes["data"], self.axes["world"]
        self._subaxes: dict[tuple[str, tuple[int, ...], str], Axis] = {}

    @property
    def place(self) -> Place:
        """Where this rank stands on every axis."""
        return {name: (axis.rank, axis.size) for name, axis in self.axes.items()}

    @staticmethod
    def build(layout: Layout | None = None, device: torch.device | str = "cpu") -> Mesh:
        """The mesh of this rank over the initialized default process group; every rank must call it.

        Args:
            layout: the degrees; None puts all ranks on dp.
            device: ``cpu`` (gloo) or ``cuda:i`` (NCCL).

        Raises:
            ConfigError: the degrees do not multiply to the world.
        """
        world = dist.get_world_size() if dist.is_initialized() else 1
        layout = layout if layout is not None else Layout(dp=world)
        refuse(ConfigError, layout.problems())
        if layout.world != world:
            raise ConfigError(
                f"layout pp={layout.pp} dp={layout.dp} cp={layout.cp} tp={layout.tp} needs {layout.world} ranks, "
                f"there are {world}"
            )
        rank = dist.get_rank() if world > 1 else 0
        return Mesh._assemble(layout, rank, torch.device(device), connect=True)

    @staticmethod
    def single(device: torch.device | str = "cpu") -> Mesh:
        """One rank alone."""
        return Mesh._assemble(Layout(), 0, torch.device(device), connect=False)

    @staticmethod
    def fake(layout: Layout, rank: int, device: torch.device | str = "cpu") -> Mesh:
        """Rank ``rank`` of a world that does not exist: shapes and traffic are right, values are not."""
        refuse(ConfigError, layout.problems())
        return Mesh._assemble(layout, rank, torch.device(device), connect=False)

    @staticmethod
    def _assemble(layout: Layout, rank: int, device: torch.device, connect: bool) -> Mesh:
        ledger = Ledger()
        groups: dict[range, dist.ProcessGroup | None] = {}
        if connect and layout.world > 1:
            groups[range(layout.world)] = dist.group.WORLD
        axes: dict[str, Axis] = {}
        for name, (index, size) in layout.place(rank).items():
            ranks = layout.peers(name, rank)
            group = _join(layout.groups(name), ranks, groups) if connect and size > 1 else None
            axes[name] = Axis(name, index, size, group, ranks, ledger)
        return Mesh(layout, rank, device, axes, ledger)

    def subaxis(self, name: str, size: int) -> Axis:
        """Runs of ``size`` neighbouring ranks of an axis, as an axis; every rank of the run must call it.

        Raises:
            ConfigError: ``size`` does not divide the axis.
        """
        axis = self.axes[name]
        if axis.size % size:
            raise ConfigError(f"runs of {size} ranks do not divide axis {name} of {axis.size}")
        first = axis.rank - axis.rank % size
        return self.among(name, range(first, first + size))

    def among(self, name: str, members: Sequence[int], use: str = "") -> Axis:
        """Some ranks of an axis, this one among them, as an axis; each of them must call it.

        Ranks that share several such axes must first call for them in the same order.

        Args:
            name: of the axis.
            members: indices on it, ascending.
            use: distinguishes axes over the same ranks whose messages must not wait for one another.
        """
        axis = self.axes[name]
        if len(members) == axis.size and not use:
            return axis
        key = (name, tuple(members), use)
        if key not in self._subaxes:
            ranks, group = tuple(axis.ranks[member] for member in members), None
            if axis.group is not None and len(members) > 1:
                made = dist.new_group(list(ranks), use_local_synchronization=True)
                group = made if isinstance(made, dist.ProcessGroup) else None
            label = f"{name}/{len(members)}"
            self._subaxes[key] = Axis(label, members.index(axis.rank), len(members), group, ranks, self.ledger)
        return self._subaxes[key]


def _join(groups: list[range], own: range, made: dict[range, dist.ProcessGroup | None]) -> dist.ProcessGroup | None:
    """Create the groups that are not ``made`` yet; return the group ``own``."""
    for ranks in groups:
        if ranks not in made:
            group = dist.new_group(list(ranks))
            made[ranks] = group if isinstance(group, dist.ProcessGroup) else None
    return made[own]
