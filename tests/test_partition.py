"""Layers on stages: by hand, even, and with ends that cost something."""

from __future__ import annotations

import itertools

import pytest

from parallel.errors import ConfigError
from parallel.pp import PipelineConfig, partition


def sizes(*arguments: object, **options: object) -> list[int]:
    return [len(cut.layers) for cut in partition(*arguments, **options)]  # type: ignore[arg-type]


@pytest.mark.parametrize(("layers", "stages"), [(1, 1), (4, 2), (5, 2), (7, 3), (8, 8), (30, 7), (61, 16)])
def test_every_layer_is_on_one_stage_and_stages_are_even(layers: int, stages: int) -> None:
    cuts = partition(layers, stages)
    assert [layer for cut in cuts for layer in cut.layers] == list(range(layers))
    assert [(cut.stage, cut.stages) for cut in cuts] == [(stage, stages) for stage in range(stages)]
    assert [cut.stage for cut in cuts if cut.first] == [0]
    assert [cut.stage for cut in cuts if cut.last] == [stages - 1]
    counts = [len(cut.layers) for cut in cuts]
    assert max(counts) - min(counts) <= 1


@pytest.mark.parametrize("ends", [(0.0, 0.0), (0.3, 2.2), (5.0, 0.0), (0.0, 1.0), (1.5, 1.5), (0.1, 9.0)])
def test_the_most_expensive_stage_is_as_cheap_as_can_be(ends: tuple[float, float]) -> None:
    """Against all ways to cut the model."""
    for layers, stages in itertools.product(range(2, 11), range(2, 5)):
        if layers < stages:
            continue

        def dearest(counts: tuple[int, ...] | list[int]) -> float:
            first, *middle, last = counts
            return max(first + ends[0], last + ends[1], *middle)

        ways = [way for way in itertools.product(range(1, layers + 1), repeat=stages) if sum(way) == layers]
        got = sizes(layers, stages, ends=ends)
        assert sum(got) == layers
        assert min(got) >= 1
        assert dearest(got) == pytest.approx(min(map(dearest, ways)))


def test_ends_that_cost_much_have_fewer_layers() -> None:
    assert sizes(12, 4, ends=(0.0, 2.0)) == [4, 3, 3, 2] or sizes(12, 4, ends=(0.0, 2.0)) == [4, 4, 3, 1]
    assert sizes(12, 4, ends=(3.0, 0.0))[0] < 3
    assert sizes(3, 1, ends=(3.0, 1.0)) == [3]


@pytest.mark.parametrize("counts", [(1, 7), (8, 0), (0, 8), (3, 1, 4), (0, 7, 1, 0), (2, 2, 2, 2)])
def test_by_hand(counts: tuple[int, ...]) -> None:
    assert sizes(8, len(counts), counts) == list(counts)
    assert sizes(8, len(counts), counts, ends=(9.0, 9.0)) == list(counts), "what is cut by hand is not balanced"
    assert [len(c.layers) for c in PipelineConfig(layers=counts).cuts(8, len(counts))] == list(counts)


@pytest.mark.parametrize(
    ("layers", "stages", "counts", "expected"),
    [
        (3, 4, (), ["3 layers are fewer than 4 pipeline stages", "3 stages"]),
        (4, 2, (1, 2), ["pp.layers = 1,2", "4 layers", "the nearest that works: 2,2"]),
        (4, 2, (1, 2, 1), ["3 stages with 4 layers", "the nearest that works: 2,2"]),
        (5, 3, (4, 1), ["2 stages with 5 layers", "the nearest that works: 2,2,1"]),
        (3, 4, (1, 1), ["the nearest that works: 3 stages"]),
        (4, 3, (2, 0, 2), ["stage 1 would hold nothing"]),
        (4, 3, (5, -1, 0), ["stage 1"]),
        (4, 2, (5, -1), ["stage 1"]),
        (4, 2, (-1, 5), ["stage 0"]),
    ],
)
def test_what_cannot_be_is_refused(layers: int, stages: int, counts: tuple[int, ...], expected: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        partition(layers, stages, counts)
    for part in expected:
        assert part in str(caught.value)


def test_options_that_cannot_be() -> None:
    assert list(PipelineConfig().problems()) == []
    assert ["virtual" in problem for problem in PipelineConfig(virtual=0, timeout_s=0).problems()] == [True, False]
    assert list(PipelineConfig().misfits(layers=4, ranks=4, microbatches=1)) == []
    (problem,) = PipelineConfig().misfits(layers=3, ranks=4, microbatches=1)
    assert "fewer than 4 pipeline stages" in problem
    (problem,) = PipelineConfig(schedule="zb-v").misfits(layers=4, ranks=4, microbatches=2)
    assert "fewer than 8 pipeline stages" in problem
    assert list(PipelineConfig(schedule="nonsense", layers=(1, 2)).misfits(layers=4, ranks=1, microbatches=1)) == []
