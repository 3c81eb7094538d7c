"""Losses that jump, data that is passed over, gradients at which a run stops: what the fault suite does not reach."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from launch.train import _alarms
from parallel.errors import CheckpointError
from parallel.mesh import Mesh
from tests.test_trainer import batches, trainer_on, weights
from zero.checkpoint.manifest import Manifest, _digest
from zero.data import DataConfig, prepare
from zero.loader import Loader, Sample
from zero.metrics import Metrics, MetricsLog, Rewound
from zero.run import RunFolder
from zero.spikes import Past, Spikes
from zero.trainer import NotFiniteError, TrainerConfig


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def test_a_spike_is_so_many_times_the_median_of_the_losses_before() -> None:
    generator = np.random.default_rng(0)
    losses = generator.lognormal(0.0, 0.8, 300).tolist()
    spikes, before = Spikes(3.0), list[float]()
    for loss in losses:
        middle = statistics.median(before[-16:]) if len(before) >= 3 else float("inf")
        assert spikes.judge(loss) == (loss / middle if loss > 3.0 * middle else None)
        before.append(loss)
    assert spikes.past.losses == tuple(losses[-16:])


def test_no_spike_without_a_past_without_a_limit_and_without_a_number() -> None:
    early = Spikes(3.0)
    assert [early.judge(loss) for loss in (1.0, 100.0, 1.0, 100.0)] == [None, None, None, 100.0]
    for loss in (float("nan"), float("inf")):
        past = early.past
        assert early.judge(loss) is None and early.past == past
    never = Spikes(0.0)
    assert [never.judge(loss) for loss in (1.0, 1.0, 1.0, 1e9)] == [None] * 4


def test_shares_of_the_data_in_order_without_those_passed_over() -> None:
    generator = np.random.default_rng(1)
    for _ in range(50):
        passed = sorted({int(share) for share in generator.integers(0, 30, 6)})
        spikes = Spikes(3.0)
        spikes.pass_over(*passed)
        spikes.pass_over(*passed[:2])
        expected = [share for share in range(60) if share not in passed]
        assert [spikes.share(step) for step in range(50)] == expected[:50]


def test_the_past_is_in_the_manifest_and_old_manifests_have_none(tmp_path: Path) -> None:
    trainer = trainer_on(Mesh.single(), folder=RunFolder(tmp_path))
    trainer.spikes.pass_over(7, 3)
    trainer.step(batches(0))
    trainer.save()
    again = trainer_on(Mesh.single(), folder=RunFolder(tmp_path))
    assert again.resume() and again.spikes.past == trainer.spikes.past == Past(trainer.spikes.past.losses, (3, 7))
    file = tmp_path / "checkpoints" / "step-00000001" / "manifest.json"
    manifest = json.loads(file.read_text())
    for past, ok in ((None, True), ({"losses": ["x"]}, False), ({"passed_over": [-1]}, False), ({"odd": 1}, False)):
        data = {key: value for key, value in manifest.items() if key not in ("sha256", "past")}
        data |= {} if past is None else {"past": past}
        file.write_text(json.dumps({"sha256": _digest(data), **data}))
        if ok:
            assert Manifest.read(file.parent).past == Past()
        else:
            with pytest.raises(CheckpointError, match=r"manifest\.json"):
                Manifest.read(file.parent)


def test_samples_are_the_windows_and_documents_of_a_step(tmp_path: Path) -> None:
    lines = [json.dumps({"text": f"{chr(97 + i % 26)}" * (3 + 7 * i % 23)}) for i in range(90)]
    (tmp_path / "rows.jsonl").write_text("\n".join(lines))
    config = DataConfig(source=str(tmp_path / "rows.jsonl"), vocabulary=257, validation=0.0)
    tokens = prepare(config, tmp_path / "data").open("train")
    whole = torch.from_numpy(np.fromfile(tmp_path / "data" / "train.tokens", "<u2").astype(np.int64))
    end = int(whole[-1])
    document_of = [0, *(whole == end).cumsum(0).tolist()]
    loaders = [Loader(tokens, sequence=11, sequences=6, microbatches=3, rank=r, size=2, seed=4) for r in range(2)]
    spanning = 0
    for step in range(9):
        samples = loaders[0].samples(step)
        assert samples == loaders[1].samples(step)
        for sample in samples:
            inside = document_of[sample.window * 11 : sample.window * 11 + 11]
            assert (sample.first_document, sample.last_document) == (inside[0], inside[-1])
            spanning += sample.first_document < sample.last_document
        held = [b.tokens_T.split(11) for part in range(3) for loader in loaders for b in [loader.step(step)[part]]]
        rows = [row for split in held for row in split]
        assert [row.tolist() for row in rows] == [whole[s.window * 11 : s.window * 11 + 11].tolist() for s in samples]
    assert spanning > 10


def test_a_run_stops_before_a_step_whose_gradients_are_not_finite(tmp_path: Path) -> None:
    trainer = trainer_on(
        Mesh.single(),
        folder=RunFolder(tmp_path),
        loop=TrainerConfig(on_not_finite="stop", fault="inf@0,2,step.backward"),
    )
    once = trainer_on(Mesh.single())
    once.step(batches(0))
    before = weights(once)
    with pytest.raises(NotFiniteError, match=r"step 2: gradients are not finite \(rank 0: [a-z0-9_.]+\); nothing"):
        trainer.run()
    assert trainer.done == 1 and all(torch.equal(before[name], w) for name, w in weights(trainer).items())
    assert [path.name for path in (tmp_path / "checkpoints").glob("step*")] == ["step-00000001"]
    assert trainer.step(batches(1)).skipped is False


def test_without_a_checkpoint_a_spike_is_told_and_the_run_goes_on() -> None:
    options: dict[str, Any] = {"steps": 6, "samples": lambda step: [Sample(step, 0, 0)]}
    seen: list[Metrics] = []
    loop = TrainerConfig(rewind=1, fault="spike@0,5,step.forward")
    assert trainer_on(Mesh.single(), loop=loop, report=seen.append, **options).run()
    assert [m.step for m in seen if m.spike] == [5] and len(seen) == 6
    assert seen[4].samples == [Sample(4, 0, 0)] and 9 < (seen[4].spike or 0) < 12


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"spike": 0.5}, "spike = 0.5: must be above 1, or 0"),
        ({"slow": float("inf")}, "slow = inf: must be above 1, or 0"),
        ({"rewind": -1}, "rewind = -1: must not be negative"),
        ({"rewind": 2, "spike": 0.0}, "rewind = 2 without spikes: the nearest that works is spike = 3.0"),
        ({"fault": "nan@0,1,save.write"}, "fault 'nan@0,1,save.write': nan strikes at step.backward"),
        ({"fault": "spike@0,1,step.update"}, "fault 'spike@0,1,step.update': spike strikes at step.forward"),
        ({"fault": "slow@0,1,step.data"}, "slow strikes at step.backward or step.update"),
    ],
)
def test_options_that_cannot_be(options: dict[str, Any], expected: str) -> None:
    (problem,) = TrainerConfig(**options).problems()
    assert expected in problem


def test_what_must_not_be_overlooked_is_in_the_log_and_on_the_terminal(tmp_path: Path) -> None:
    samples = [Sample(window, window, window + 1) for window in range(10)]
    rewound = Rewound(from_step=9, to_step=4, share=8, loss=30.0, spike=10.0, samples=samples)
    plain = {"loss": 1.0, "grad_norm": 1.0, "lr": 1.0, "tokens": 1, "skipped": False, "seconds": 1.0}
    plain |= {"tokens_per_second": 1.0, "mfu": 0.0, "peak_memory": 1}
    first = Metrics(step=5, rewound=rewound, slow_ranks={3: 2.5}, **plain)
    second = Metrics(step=6, spike=3.5, samples=samples[:1], slow_ranks={3: 2.6, 1: 2.1}, save_failed="no", **plain)
    log = MetricsLog(tmp_path / "metrics.jsonl", 0)
    log.write(first)
    log.write(second)
    log.close()
    one, two = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert one["rewound"]["samples"][2] == {"window": 2, "first_document": 2, "last_document": 3}
    assert (one["slow_ranks"], two["slow_ranks"], two["spike"]) == ({"3": 2.5}, {"3": 2.6, "1": 2.1}, 3.5)
    assert "spike" not in one and "rewound" not in two
    told = set[int]()
    lines = [*_alarms(first, told), *_alarms(second, told)]
    assert [line.partition(":")[0] for line in lines] == ["SPIKE", "SLOW", "SAVE FAILED", "SPIKE", "SLOW"], lines
    assert "Back at step 4; share 8" in lines[0] and "7 (7-8) and 2 more" in lines[0], lines[0]
    assert "rank 3 computes 2.5 times" in lines[1] and "rank 1 " in lines[4], lines
