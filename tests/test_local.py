"""Who am I, and the life of local ranks: started, watched, shown when they fail, and never left behind."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest
import torch.distributed as dist

from launch.env import Placement, detect, expand_hosts
from launch.local import run_local
from launch.meeting import connect, disconnect
from parallel.errors import ConfigError, RankError

ROOT = Path(__file__).resolve().parent.parent
ENVIRON = {**os.environ, "PYTHONPATH": str(ROOT)}
TORCHRUN = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"} | {
    "MASTER_ADDR": "head",
    "MASTER_PORT": "1234",
}
OPEN_MPI = {"OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_SIZE": "2"} | {
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
}
PMI = {"PMI_RANK": "2", "PMI_SIZE": "4", "MPI_LOCALRANKID": "0", "MPI_LOCALNRANKS": "2", "MASTER_ADDR": "a"}
SLURM = {"SLURM_PROCID": "5", "SLURM_NTASKS": "6", "SLURM_LOCALID": "1", "SLURM_JOB_NODELIST": "n[08-10]"}
OWN = {"LOCKSTEP_RANK": "0", "LOCKSTEP_WORLD": "2", "LOCKSTEP_LOCAL_RANK": "0", "LOCKSTEP_LOCAL_WORLD": "2"} | {
    "LOCKSTEP_HOST": "127.0.0.1",
    "LOCKSTEP_PORT": "77",
}


@pytest.mark.parametrize(
    ("environ", "expected"),
    [
        ({}, None),
        ({"MASTER_ADDR": "a", "MASTER_PORT": "1"}, None),
        (TORCHRUN, (3, 4, 1, 2, "head", 1234, "torchrun")),
        (OPEN_MPI, (1, 2, 1, 2, "127.0.0.1", 29400, "Open MPI")),
        ({**OPEN_MPI, "MASTER_ADDR": "b", "MASTER_PORT": "9"}, (1, 2, 1, 2, "b", 9, "Open MPI")),
        (PMI, (2, 4, 0, 2, "a", 29400, "PMI")),
        (SLURM, (5, 6, 1, 2, "n08", 29400, "SLURM")),
        ({**SLURM, "SLURM_NODEID": "2", "SLURM_TASKS_PER_NODE": "1(x2),4"}, (5, 6, 1, 4, "n08", 29400, "SLURM")),
        (OWN, (0, 2, 0, 2, "127.0.0.1", 77, "lockstep")),
        ({**SLURM, **TORCHRUN}, (3, 4, 1, 2, "head", 1234, "torchrun")),
        ({**SLURM, **OPEN_MPI}, (1, 2, 1, 2, "127.0.0.1", 29400, "Open MPI")),
        ({**OPEN_MPI, **TORCHRUN, "TORCHELASTIC_RUN_ID": "x"}, (3, 4, 1, 2, "head", 1234, "torchrun")),
        ({"SLURM_JOB_ID": "7", "SLURM_NTASKS": "8", "SLURM_JOB_NODELIST": "a"}, None),
        ({**SLURM, "SLURM_PROCID": "0", "SLURM_NTASKS": "1", "SLURM_LOCALID": "0"}, None),
        ({"SLURM_PROCID": "0", "SLURM_LOCALID": "0", "ENVIRONMENT": "BATCH", "SLURM_NTASKS": "8"}, None),
        ({"SLURM_PROCID": "0", "SLURM_LOCALID": "0", **TORCHRUN}, (3, 4, 1, 2, "head", 1234, "torchrun")),
    ],
)
def test_detect(environ: Mapping[str, str], expected: tuple[object, ...] | None) -> None:
    place = detect(environ)
    if expected is None or place is None:
        assert place == expected
    else:
        names = ("rank", "world", "local_rank", "local_world", "host", "port", "source")
        assert tuple(getattr(place, name) for name in names) == expected


def test_detect_reads_what_torchrun_says_of_its_store() -> None:
    served = {**TORCHRUN, "TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RESTART_COUNT": "2"}
    place = detect(served)
    assert place is not None
    assert (place.served, place.round) == (True, "2")


def test_a_job_has_one_port_and_another_job_another() -> None:
    ports = [
        place.port
        for job in ("100", "100", "101")
        if (place := detect({**SLURM, "SLURM_JOB_ID": job, "SLURM_STEP_ID": "0"}))
    ]
    assert ports[0] == ports[1] != ports[2]
    assert all(29400 <= port < 32768 for port in ports)


@pytest.mark.parametrize(
    ("environ", "words"),
    [
        (
            {"RANK": "0", "MASTER_PORT": "1"},
            ["RANK=0", "MASTER_PORT=1", "missing: WORLD_SIZE, LOCAL_RANK, MASTER_ADDR"],
        ),
        ({"WORLD_SIZE": "2", **SLURM}, ["torchrun", "WORLD_SIZE=2", "missing: RANK"]),
        ({"OMPI_COMM_WORLD_RANK": "0", "PMI_SIZE": "2"}, ["missing: OMPI_COMM_WORLD_SIZE", "missing: PMI_RANK"]),
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "2"}, ["SLURM_PROCID=0", "missing: SLURM_LOCALID"]),
        ({**TORCHRUN, **OPEN_MPI}, ["torchrun says rank 3 of 4", "Open MPI says rank 1 of 2"]),
        ({**TORCHRUN, **OWN}, ["lockstep says rank 0 of 2", "torchrun says rank 3 of 4"]),
        ({**TORCHRUN, "RANK": "4", "MASTER_PORT": "$(x)"}, ["RANK=4 is out of range", "MASTER_PORT='$(x)'"]),
        ({**TORCHRUN, "LOCAL_RANK": "2"}, ["local rank 2 of 2"]),
        ({**OPEN_MPI, "OMPI_COMM_WORLD_SIZE": "4"}, ["MASTER_ADDR"]),
        ({**SLURM, "SLURM_JOB_NODELIST": "n[1-"}, ["'n[1-'"]),
    ],
)
def test_detect_refuses_what_is_half_set_or_contradicts(environ: Mapping[str, str], words: list[str]) -> None:
    with pytest.raises(ConfigError) as refusal:
        detect(environ)
    for word in words:
        assert word in str(refusal.value)


@pytest.mark.parametrize(
    ("nodelist", "hosts"),
    [
        ("node[03-05,7],x", ["node03", "node04", "node05", "node7", "x"]),
        ("r[1-2]n[9-10]-ib", ["r1n9-ib", "r1n10-ib", "r2n9-ib", "r2n10-ib"]),
        ("a;$(b)", ["a;$(b)"]),
        ("", []),
    ],
)
def test_expand_hosts(nodelist: str, hosts: list[str]) -> None:
    assert expand_hosts(nodelist) == hosts


@pytest.mark.parametrize("nodelist", ["n[1", "n]1", "n[]", "n[3-1]", "n[1-999999999]", "n[a-b]", "n[1,,2]", "n[[1]]"])
def test_expand_hosts_refuses(nodelist: str) -> None:
    with pytest.raises(ConfigError, match="node list"):
        expand_hosts(nodelist)


def place(rank: int, world: int, port: int) -> Placement:
    return Placement(rank, world, rank, world, "127.0.0.1", port, "test")


def test_connect_names_the_place_it_cannot_reach() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        with pytest.raises(RankError, match=rf"cannot listen on 127.0.0.1:{port}.*in use"):
            connect(place(0, 2, port), "cpu", 1)
    started = time.monotonic()
    with pytest.raises(RankError, match=rf"rank 1 of 2 could not reach rank 0 at 127.0.0.1:{port} within 0.5 s"):
        connect(place(1, 2, port), "cpu", 0.5)
    assert time.monotonic() - started < 2
    with pytest.raises(RankError, match=rf"127.0.0.1:{port} for rank 1, 2 of 3"):
        connect(place(0, 3, port), "cpu", 0.5)


def test_connect_alone_and_disconnect() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    connect(place(0, 1, port), "cpu", 5)
    assert dist.get_world_size() == 1
    disconnect()
    assert not dist.is_initialized()
    disconnect()


RANK = "import os, sys, time, signal\nrank = int(os.environ['LOCKSTEP_RANK'])\n"
REPORTED = RANK + "from launch.local import run_rank\nfrom parallel.errors import ConfigError\n"


def python(code: str, *arguments: str) -> list[str]:
    return [sys.executable, "-c", code, *arguments]


def test_success_and_what_ranks_are_told(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    words = ["; $(touch x) '", "two\nlines", "--flag", ""]
    code = RANK + (
        "import json; names = ('LOCKSTEP_WORLD', 'LOCKSTEP_LOCAL_RANK', 'OMP_NUM_THREADS', 'RANK', 'ODD')\n"
        "told = [os.environ.get(name) for name in names]\n"
        f"open(f'{tmp_path}/{{rank}}', 'w').write(json.dumps([told, sys.argv[1:]])); print('I am', rank)"
    )
    before = os.listdir("/proc/self/fd"), os.listdir(tempfile.gettempdir())
    environ = {**ENVIRON, "RANK": "7", "ODD": "$(x)\n;"}
    environ.pop("OMP_NUM_THREADS", None)
    assert run_local(python(code, *words), 2, environ=environ) == 0
    assert (os.listdir("/proc/self/fd"), os.listdir(tempfile.gettempdir())) == before
    share = str(max(1, len(os.sched_getaffinity(0)) // 2))
    for rank in range(2):
        told = [["2", str(rank), share, None, "$(x)\n;"], words]
        assert json.loads((tmp_path / str(rank)).read_text()) == told
    assert capfd.readouterr().out == "I am 0\n"
    check = RANK + "sys.exit(int(os.environ['OMP_NUM_THREADS']))"
    assert run_local(python(check), 1, environ={**environ, "OMP_NUM_THREADS": "9"}) == 9
    assert run_local(python(check), 1, environ={**environ, "OMP_NUM_THREADS": "9"}, threads_per_rank=5) == 5


def test_the_first_failure_is_shown_first_and_echoes_are_not(capfd: pytest.CaptureFixture[str]) -> None:
    code = REPORTED + (
        "def main():\n"
        "    if rank == 2:\n"
        "        time.sleep(0.3); print('last words'); raise ValueError('boom')\n"
        "    if rank == 1:\n"
        "        time.sleep(1000)\n"
        "    raise RuntimeError('[gloo/transport/tcp/pair.cc:553] Connection closed by peer')\n"
        "sys.exit(run_rank(main))"
    )
    started = time.monotonic()
    assert run_local(python(code), 4, environ=ENVIRON) == 1
    assert time.monotonic() - started < 5
    lines = capfd.readouterr().err.splitlines()
    assert lines[0] == "rank 2 failed (exit code 1): ValueError: boom"
    assert lines[1].startswith("Traceback")
    assert "ValueError: boom" in lines[:20]
    assert lines[-3:] == ["the last output of rank 2:", "last words", "after that rank 0, 3 lost touch with it"]
    assert not any("Connection closed" in line for line in lines)


def test_what_a_rank_says_late_is_still_said_first(capfd: pytest.CaptureFixture[str]) -> None:
    """Its connections go while it still ends; and where its end itself is an echo, what came before that counts."""
    lost = "RuntimeError('[gloo/transport/tcp/pair.cc:553] Connection closed by peer')"
    for late in ("raise MemoryError('too much')", f"try: raise MemoryError('too much')\n    finally: raise {lost}"):
        code = REPORTED + f"def main():\n    if rank == 0: raise {lost}\n    time.sleep(2.5)\n    {late}\n"
        assert run_local(python(code + "sys.exit(run_rank(main))"), 2, environ=ENVIRON) == 1
        lines = capfd.readouterr().err.splitlines()
        assert lines[0] == "rank 1 failed (exit code 1): MemoryError: too much"
        assert lines[-1] == "after that rank 0 lost touch with it"
        assert len([line for line in lines if "rank 0" in line]) == 1


def test_under_another_starter_a_lost_connection_is_one_line() -> None:
    code = "import sys\nfrom launch.local import run_rank\n"
    code += "def main(): raise RuntimeError('gloo/transport: Connection closed by peer')\nsys.exit(run_rank(main))"
    done = subprocess.run(python(code), env={**ENVIRON, **TORCHRUN}, capture_output=True, text=True, check=False)
    said = "lost touch with another rank: RuntimeError: gloo/transport: Connection closed by peer"
    assert (done.returncode, done.stderr) == (1, f"rank 3 of 4: {said}\n")


def test_a_rank_without_a_report_is_shown_by_its_stderr(capfd: pytest.CaptureFixture[str]) -> None:
    code = (
        RANK + "\nif rank == 1:\n    for n in range(100): print(n, file=sys.stderr)\n    sys.exit(7)\ntime.sleep(100)"
    )
    assert run_local(python(code), 2, environ=ENVIRON) == 7
    assert capfd.readouterr().err.splitlines() == ["rank 1 failed (exit code 7)", *map(str, range(40, 100))]


def test_death_by_signal_is_named(capfd: pytest.CaptureFixture[str]) -> None:
    code = RANK + "\nif rank == 1: os.kill(os.getpid(), signal.SIGKILL)\ntime.sleep(100)"
    assert run_local(python(code), 2, environ=ENVIRON) == 137
    first = "rank 1 failed (killed by SIGKILL, exit code 137): "
    assert capfd.readouterr().err == f"{first}if nobody did that, the system ran out of memory (dmesg says so)\n"


def test_a_refusal_is_shown_once(capfd: pytest.CaptureFixture[str]) -> None:
    code = REPORTED + "def main(): raise ConfigError(['tp is odd', 'pp is even'])\nsys.exit(run_rank(main))"
    assert run_local(python(code), 3, environ=ENVIRON) == 2
    assert capfd.readouterr().err == "tp is odd\npp is even\n"
    alone = "import sys\nfrom launch.local import run_rank\nfrom parallel.errors import ConfigError\n"
    alone += "def main(): raise ConfigError(['tp is odd', 'pp is even'])\nsys.exit(run_rank(main))"
    bare = subprocess.run(python(alone), env=ENVIRON, capture_output=True, text=True, check=False)
    assert (bare.returncode, bare.stderr) == (2, "tp is odd\npp is even\n")


def test_a_command_that_is_not_there(capfd: pytest.CaptureFixture[str]) -> None:
    assert run_local(["/no/such; program"], 2, environ=ENVIRON) == 1
    assert "cannot start '/no/such; program': No such file" in capfd.readouterr().err
    with pytest.raises(ConfigError):
        run_local(["a\0b"], 1, environ=ENVIRON)


def test_ranks_meet(capfd: pytest.CaptureFixture[str]) -> None:
    code = (
        "import os, sys, torch, torch.distributed as dist\n"
        "from launch.env import detect\nfrom launch.local import run_rank\n"
        "from launch.meeting import connect, disconnect\n"
        "def main():\n"
        "    connect(detect(os.environ), 'cpu', 30); x = torch.ones(1); dist.all_reduce(x)\n"
        "    if sys.argv[1] == 'fail' and dist.get_rank() == 1: raise KeyError('late')\n"
        "    dist.all_reduce(x); print(int(x)); disconnect(); return 0\n"
        "sys.exit(run_rank(main))"
    )
    assert run_local(python(code, "succeed"), 2, environ=ENVIRON) == 0
    assert capfd.readouterr().out == "4\n"
    assert run_local(python(code, "fail"), 2, environ=ENVIRON) == 1
    assert capfd.readouterr().err.splitlines()[0] == "rank 1 failed (exit code 1): KeyError: 'late'"


PARENT = (
    "import os, sys\nfrom launch.local import run_local\n"
    "code = run_local([sys.executable, '-c', sys.argv[1]], 2, environ=os.environ, grace_s=float(sys.argv[2]))\n"
    "assert 'torch' not in sys.modules\nsys.exit(code)"
)


@pytest.fixture
def parents() -> Iterator[list[subprocess.Popen[str]]]:
    """Parents that a test starts; killed at its end, if they still live."""
    started: list[subprocess.Popen[str]] = []
    yield started
    for parent in started:
        parent.kill()


def start_parent(
    parents: list[subprocess.Popen[str]], folder: Path, code: str, grace_s: float = 10
) -> tuple[subprocess.Popen[str], list[int]]:
    """A parent in a process of its own, and its ranks once they have run ``code`` up to where they wait."""
    code = f"{RANK}{code}\nos.close(os.open(f'{folder}/{{os.getpid()}}', os.O_CREAT))\n" + (
        "while not stopped:\n    time.sleep(0.01)\n"
    )
    parent = subprocess.Popen(
        python(PARENT, "stopped = []\n" + code, str(grace_s)), env=ENVIRON, stderr=subprocess.PIPE, text=True
    )
    parents.append(parent)
    deadline = time.monotonic() + 20
    while len(pids := [int(path.name) for path in folder.iterdir() if path.name.isdecimal()]) < 2:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    return parent, pids


def alive(pids: list[int]) -> list[int]:
    def state(pid: int) -> str:
        try:
            return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        except OSError:
            return "Z"

    return [pid for pid in pids if state(pid) != "Z"]


IGNORES = "signal.signal(signal.SIGTERM, signal.SIG_IGN); signal.signal(signal.SIGINT, signal.SIG_IGN)"
COUNTS = "signal.signal(signal.SIGTERM, lambda *_: stopped.append(1)); signal.signal(signal.SIGINT, signal.SIG_DFL)"


def test_no_rank_outlives_a_killed_parent(parents: list[subprocess.Popen[str]], tmp_path: Path) -> None:
    parent, pids = start_parent(parents, tmp_path, IGNORES)
    assert len(alive(pids)) == 2
    parent.kill()
    parent.wait()
    deadline = time.monotonic() + 5
    while (orphans := alive(pids)) and time.monotonic() < deadline:
        time.sleep(0.01)
    for pid in orphans:
        os.kill(pid, signal.SIGKILL)
    parent.communicate()
    assert not orphans


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ranks_finish_by_themselves_when_told(
    parents: list[subprocess.Popen[str]], tmp_path: Path, number: int
) -> None:
    parent, pids = start_parent(parents, tmp_path, COUNTS)
    parent.send_signal(number)
    assert parent.communicate(timeout=10)[1] == ""
    assert parent.returncode == 0
    assert not alive(pids)


def test_ranks_that_do_not_listen_for_signals_just_end(parents: list[subprocess.Popen[str]], tmp_path: Path) -> None:
    parent, pids = start_parent(parents, tmp_path, "")
    parent.send_signal(signal.SIGINT)
    assert parent.communicate(timeout=5)[1] == ""
    assert parent.returncode == 130
    assert not alive(pids)


def test_a_rank_that_ignores_sigterm_is_killed_after_grace(
    parents: list[subprocess.Popen[str]], tmp_path: Path
) -> None:
    parent, pids = start_parent(parents, tmp_path, f"if rank == 1: {IGNORES}\nelse: {COUNTS}", grace_s=0.5)
    started = time.monotonic()
    parent.send_signal(signal.SIGTERM)
    assert parent.communicate(timeout=10)[1] == "killed rank 1: still there 0.5 s after SIGTERM\n"
    assert 0.4 < time.monotonic() - started < 4
    assert parent.returncode == 137
    assert not alive(pids)


def test_a_second_interrupt_kills_at_once(parents: list[subprocess.Popen[str]], tmp_path: Path) -> None:
    parent, pids = start_parent(parents, tmp_path, IGNORES, grace_s=60)
    parent.send_signal(signal.SIGINT)
    time.sleep(0.3)
    assert len(alive(pids)) == 2
    parent.send_signal(signal.SIGINT)
    assert "signalled again" in parent.communicate(timeout=5)[1]
    assert parent.returncode == 137
    assert not alive(pids)
