"""The mesh: where every rank stands, whom it meets on each axis, and what cannot be built."""

from __future__ import annotations

import time
import tracemalloc

import numpy as np
import pytest
import torch
import torch.distributed as dist
from ranks import Ranks

from parallel import comm
from parallel.errors import ConfigError
from parallel.mesh import Layout, Mesh

LAYOUTS = [
    Layout(),
    Layout(tp=4),
    Layout(pp=2, dp=3, cp=2, tp=4),
    Layout(pp=2, dp=3, cp=2, tp=4, ep=6, etp=2),
    Layout(pp=3, dp=2, tp=2, ep=4),
    Layout(dp=4, cp=2, ep=2),
    Layout(dp=2, cp=2, tp=2, ep=2, etp=4),
]
KEPT_BY = {
    "pp": ("pp", "dp", "cp", "tp"),
    "dp": ("pp", "dp", "cp", "tp"),
    "cp": ("pp", "dp", "cp", "tp"),
    "tp": ("pp", "dp", "cp", "tp"),
    "data": ("pp", "dp", "cp", "tp"),
    "world": ("pp", "dp", "cp", "tp"),
    "edp": ("pp", "edp", "ep", "etp"),
    "ep": ("pp", "edp", "ep", "etp"),
    "etp": ("pp", "edp", "ep", "etp"),
}
JOINT = {"data": ("dp", "cp"), "world": ("pp", "dp", "cp", "tp")}


def groups_by_array(layout: Layout, axis: str) -> list[list[int]]:
    """The groups of an axis, read off an array of all ranks."""
    names = KEPT_BY[axis]
    array = np.arange(layout.world).reshape([getattr(layout, name) for name in names])
    moved = [names.index(name) for name in JOINT.get(axis, (axis,))]
    array = np.moveaxis(array, moved, range(array.ndim - len(moved), array.ndim))
    return array.reshape(-1, int(np.prod(array.shape[array.ndim - len(moved) :]))).tolist()


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("axis", KEPT_BY)
def test_groups_and_peers(layout: Layout, axis: str) -> None:
    expected = groups_by_array(layout, axis)
    assert sorted(list(group) for group in layout.groups(axis)) == sorted(expected)
    for group in expected:
        for index, rank in enumerate(group):
            assert list(layout.peers(axis, rank)) == group
            assert layout.place(rank)[axis] == (index, len(group))


def test_tp_is_innermost_and_experts_reuse_the_ranks_of_a_stage() -> None:
    layout = Layout(pp=2, dp=3, cp=2, tp=4, ep=6, etp=2)
    assert (layout.world, layout.edp) == (48, 2)
    for rank in range(layout.world):
        place = {name: index for name, (index, _) in layout.place(rank).items()}
        assert rank == ((place["pp"] * 3 + place["dp"]) * 2 + place["cp"]) * 4 + place["tp"]
        assert rank == ((place["pp"] * 2 + place["edp"]) * 6 + place["ep"]) * 2 + place["etp"]
        assert place["world"] == rank
        assert place["data"] == place["dp"] * 2 + place["cp"]
        assert {peer // 24 for peer in layout.peers("ep", rank)} == {place["pp"]}


@pytest.mark.parametrize(
    ("layout", "words"),
    [
        (Layout(tp=0), "tp = 0"),
        (Layout(dp=-2), "dp = -2"),
        (Layout(dp=2, ep=4), "ep \\* etp = 4 does not divide dp \\* cp \\* tp = 2"),
        (Layout(pp=4, dp=2, ep=2, etp=3), "6 does not divide"),
    ],
)
def test_impossible_degrees_are_refused(layout: Layout, words: str) -> None:
    assert list(layout.problems())
    with pytest.raises(ConfigError, match=words):
        Mesh.fake(layout, 0)
    with pytest.raises(ConfigError, match=words):
        Mesh.build(layout)


def test_one_process_is_a_world_of_one() -> None:
    for mesh in (Mesh.build(), Mesh.build(Layout()), Mesh.single()):
        assert mesh.layout.world == 1
        assert {axis.size for axis in mesh.axes.values()} == {1}
        assert all(axis.group is None for axis in mesh.axes.values())
    with pytest.raises(ConfigError, match="needs 2 ranks, there are 1"):
        Mesh.build(Layout(tp=2))


def test_all_of_4096_fake_ranks_in_one_process() -> None:
    layout = Layout(pp=8, dp=16, cp=4, tp=8, ep=32, etp=2)
    tracemalloc.start()
    started = time.monotonic()
    meshes = [Mesh.fake(layout, rank) for rank in range(4096)]
    seconds, (_, peak) = time.monotonic() - started, tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len({tuple(sorted(mesh.place.items())) for mesh in meshes}) == 4096
    assert [mesh.world.rank for mesh in meshes] == list(range(4096))
    for name, axis in meshes[1234].axes.items():
        assert axis.ranks[axis.rank] == 1234
        assert [meshes[peer].axes[name].rank for peer in axis.ranks] == list(range(axis.size))
    assert seconds < 5
    assert peak < 100 << 20


def test_fake_axes_do_not_communicate() -> None:
    mesh = Mesh.fake(Layout(tp=4, dp=2), 5)
    assert (mesh.tp.rank, mesh.tp.size, mesh.dp.rank, list(mesh.tp.ranks)) == (1, 4, 1, [4, 5, 6, 7])
    assert all(axis.group is None for axis in mesh.axes.values())
    assert comm.all_gather(torch.ones(2, 3), mesh.tp).shape == (8, 3)
    assert mesh.ledger.calls("all_gather", "tp") == 1


def test_subaxis() -> None:
    mesh = Mesh.fake(Layout(dp=2, tp=8), 13)
    pair = mesh.subaxis("tp", 2)
    assert (pair.name, pair.rank, pair.size, list(pair.ranks)) == ("tp/2", 1, 2, [12, 13])
    assert pair.ledger is mesh.ledger
    assert mesh.subaxis("tp", 2) is pair
    assert mesh.subaxis("tp", 8) is mesh.tp
    assert list(mesh.subaxis("tp", 4).ranks) == [12, 13, 14, 15]
    assert mesh.subaxis("tp", 1).size == 1
    with pytest.raises(ConfigError, match="runs of 3 ranks do not divide axis tp of 8"):
        mesh.subaxis("tp", 3)


def sum_of_ranks(layout: dict[str, int]) -> dict[str, float]:
    mesh = Mesh.build(Layout(**layout))
    assert mesh.rank == dist.get_rank()
    return {name: float(comm.sum_(torch.tensor([2.0**mesh.rank]), axis)) for name, axis in mesh.axes.items()}


@pytest.mark.parametrize(
    "layout", [{"dp": 2, "tp": 2, "ep": 2}, {"pp": 2, "cp": 2, "etp": 2}, {"cp": 2, "dp": 2, "ep": 4}]
)
def test_axes_join_the_right_ranks(ranks: Ranks, layout: dict[str, int]) -> None:
    for rank, sums in enumerate(ranks.run(sum_of_ranks, world=4, layout=layout)):
        for axis, total in sums.items():
            assert total == sum(2.0**peer for peer in Layout(**layout).peers(axis, rank)), (axis, rank)


def sum_over_pairs() -> list[float]:
    mesh = Mesh.build(Layout(tp=4))
    pair = mesh.subaxis("tp", 2)
    return [float(comm.sum_(torch.tensor([2.0**mesh.rank]), axis)) for axis in (pair, mesh.subaxis("tp", 1))]


def test_subaxis_joins_neighbours(ranks: Ranks) -> None:
    assert ranks.run(sum_over_pairs, world=4) == [[3, 1], [3, 2], [12, 4], [12, 8]]


def build_too_large() -> list[str]:
    assert Mesh.build().dp.size == 2
    refused = []
    for layout in (Layout(tp=3), Layout(tp=2, dp=2), Layout()):
        try:
            Mesh.build(layout)
        except ConfigError as error:
            refused += error.problems
    return refused


def test_degrees_must_multiply_to_the_world(ranks: Ranks) -> None:
    for refused in ranks.run(build_too_large):
        assert [text.split(" needs ")[1] for text in refused] == [
            "3 ranks, there are 2",
            "4 ranks, there are 2",
            "1 ranks, there are 2",
        ]
