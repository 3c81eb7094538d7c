"""The pool of ranks: results, failures, hangs and deaths, and that the next test is none the wiser."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import Ranks, RanksFailed


def add_up(factor: int = 1) -> dict[str, Any]:
    total = torch.tensor([factor * (dist.get_rank() + 1)])
    dist.all_reduce(total)
    return {"total": int(total), "world": dist.get_world_size(), "rank": dist.get_rank()}


def echo(value: Any) -> Any:
    return value


def draw() -> list[float]:
    return [random.random(), float(torch.rand(()))]


def fail_on(culprit: int) -> None:
    held = dist.group.WORLD
    if dist.get_rank() == culprit:
        print("said before failing")
        raise ValueError(f"the culprit is {culprit}, {held is not None}")
    dist.all_reduce(torch.ones(1))


def sleep_on(lazy: int) -> None:
    if dist.get_rank() == lazy:
        oversleep()
    dist.all_reduce(torch.ones(1))


def oversleep() -> None:
    time.sleep(1000)


def die_on(victim: int) -> None:
    if dist.get_rank() == victim:
        os.kill(os.getpid(), signal.SIGKILL)
    dist.all_reduce(torch.ones(1))


def leave_groups() -> int:
    for _ in range(3):
        dist.new_group([0, 1])
    return len(dist.distributed_c10d._world.pg_map)


def return_tensor() -> torch.Tensor:
    return torch.ones(1)


def thread_count() -> int:
    return torch.get_num_threads()


def test_every_world_has_its_own_group(ranks: Ranks) -> None:
    for world in (1, 2, 4, 2, 1, 4):
        answers = ranks.run(add_up, world=world, factor=10)
        total = 10 * world * (world + 1) // 2
        assert answers == [{"total": total, "world": world, "rank": rank} for rank in range(world)]


def test_arguments_and_results_are_json_values(ranks: Ranks) -> None:
    value = {"a": [1, 2.5, None, True], "odd; $()\n": "ü\ud800"}
    assert ranks.run(echo, value=value) == [value, value]
    assert ranks.run(echo, value=(1, (2, 3))) == [[1, [2, 3]]] * 2
    with pytest.raises(TypeError, match="not JSON serializable"):
        ranks.run(echo, value=torch.ones(1))
    with pytest.raises(RanksFailed, match="Tensor is not JSON serializable"):
        ranks.run(return_tensor)
    with pytest.raises(TypeError, match="no name"):
        ranks.run(lambda: None)


def test_every_call_begins_with_the_same_seed_and_one_thread(ranks: Ranks) -> None:
    first = ranks.run(draw)
    assert first[0] == first[1]
    assert ranks.run(draw) == first
    assert ranks.run(thread_count) == [1, 1]


@pytest.mark.parametrize("culprit", [0, 3])
def test_a_failure_shows_its_own_traceback_before_its_echoes(ranks: Ranks, culprit: int) -> None:
    started = time.monotonic()
    with pytest.raises(RanksFailed) as failure:
        ranks.run(fail_on, world=4, culprit=culprit)
    message = str(failure.value)
    assert message.splitlines()[2] == f"rank {culprit} raised:"
    assert f"ValueError: the culprit is {culprit}, True" in message
    assert "in fail_on" in message
    assert f"rank {culprit} printed:\nsaid before failing" in message
    assert message.count("Connection closed by peer") == 3
    assert time.monotonic() - started < 5
    assert ranks.run(add_up, world=4)[0]["total"] == 10


def test_a_hang_shows_the_stacks_of_all_ranks(ranks: Ranks) -> None:
    with pytest.raises(RanksFailed) as failure:
        ranks.run(sleep_on, lazy=1, timeout=1)
    message = str(failure.value)
    assert "rank 1 hangs: no answer within 1 s" in message
    assert "in oversleep" in message
    assert "in all_reduce" in message
    assert ranks.run(add_up)[1]["total"] == 3


def test_a_death_is_named(ranks: Ranks) -> None:
    with pytest.raises(RanksFailed) as failure:
        ranks.run(die_on, victim=1)
    assert "\n\nrank 1 was killed by SIGKILL" in str(failure.value)
    assert ranks.run(add_up)[1]["total"] == 3


def test_groups_left_behind_do_not_add_up(ranks: Ranks) -> None:
    assert ranks.run(leave_groups) == ranks.run(leave_groups) == [4, 4]
    assert ranks.run(leave_groups, world=4) == [4, 4, 1, 1]


def test_no_rank_outlives_pytest(tmp_path: Path) -> None:
    script = tmp_path / "hold.py"
    script.write_text(
        "import os, signal\nfrom ranks import Ranks\nranks = Ranks()\n"
        "print(*ranks.run(os.getpid, world=4), flush=True)\nranks.run(signal.pause, world=4)\n"
    )
    folder = Path(__file__).parent
    environ = {**os.environ, "PYTHONPATH": f"{folder}:{folder.parent}"}
    with subprocess.Popen([sys.executable, str(script)], stdout=subprocess.PIPE, text=True, env=environ) as holder:
        assert holder.stdout is not None
        pids = list(map(int, holder.stdout.readline().split()))
        holder.kill()
    assert len(pids) == 4
    deadline = time.monotonic() + 5
    while (alive := [pid for pid in pids if is_alive(pid)]) and time.monotonic() < deadline:
        time.sleep(0.02)
    for pid in alive:
        os.kill(pid, signal.SIGKILL)
    assert not alive


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False
