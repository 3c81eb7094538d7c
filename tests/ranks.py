"""A pool of gloo ranks for tests: started once, on the first test that asks; it runs functions of test modules by name.

One process imports torch and forks the ranks, so that a pool costs one import. Functions travel as
``module:qualname``, arguments and results as JSON; nothing is pickled. The pool dies with pytest, whatever kills that.
"""

from __future__ import annotations

import contextlib
import ctypes
import faulthandler
import gc
import importlib
import json
import os
import random
import select
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import IO, Any

__all__ = ["Ranks", "RanksFailed"]

SIZE = 4
AFTER_FAILURE_S = 5.0
SHOWN_CHARACTERS = 8000


class RanksFailed(AssertionError):
    """A function failed, hung or died on some rank; the message holds what every rank has to say about it."""


@dataclass
class _Channel:
    """One JSON value a line over a socket."""

    socket: socket.socket
    unread: bytes = b""

    def send(self, value: Any) -> None:
        self.socket.sendall(json.dumps(value).encode() + b"\n")

    def receive(self) -> Any:
        """The next value, or None at the end; blocks."""
        while b"\n" not in self.unread:
            try:
                more = self.socket.recv(1 << 16)
            except ConnectionError:
                more = b""
            if not more:
                return None
            self.unread += more
        line, _, self.unread = self.unread.partition(b"\n")
        return json.loads(line)


@dataclass
class _Pool:
    """The running processes: one that forked the ranks and tells how they ended, and the ranks."""

    parent: subprocess.Popen[bytes]
    control: _Channel
    ranks: list[_Channel]
    outputs: list[IO[bytes]]
    stacks: list[IO[bytes]]
    pids: list[int] = field(default_factory=list)

    @staticmethod
    def start(settings: dict[str, Any]) -> _Pool:
        ours, theirs = zip(*(socket.socketpair() for _ in range(SIZE + 1)), strict=True)
        files: list[IO[bytes]] = [tempfile.TemporaryFile(buffering=0) for _ in range(2 * SIZE)]  # noqa: SIM115 - closed by stop
        settings = settings | {"sockets": [s.fileno() for s in theirs], "files": [f.fileno() for f in files]}
        parent = subprocess.Popen(
            [sys.executable, str(Path(__file__).resolve()), str(os.getpid()), json.dumps(settings)],
            stdin=subprocess.DEVNULL,
            pass_fds=settings["sockets"] + settings["files"],
            start_new_session=True,
        )
        for end in theirs:
            end.close()
        control, *ranks = map(_Channel, ours)
        pool = _Pool(parent, control, ranks, files[:SIZE], files[SIZE:])
        pool.pids = control.receive() or []
        if not pool.pids:
            pool.stop()
            raise RanksFailed("the ranks could not be started; see stderr")
        return pool

    def stop(self) -> None:
        """Kill everything and wait for it; all processes share the session of the parent."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.parent.pid, signal.SIGKILL)
        self.parent.wait()
        for channel in (self.control, *self.ranks):
            channel.socket.close()
        for file in (*self.outputs, *self.stacks):
            file.close()

    def dump_stacks(self, rank: int) -> str:
        """The Python stacks of a rank that is still running, whatever it is doing."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pids[rank], signal.SIGUSR1)
        before = size = -1
        deadline = time.monotonic() + 2
        while (size <= 0 or size != before) and time.monotonic() < deadline:
            time.sleep(0.05)
            before, size = size, os.fstat(self.stacks[rank].fileno()).st_size
        return _read_from(self.stacks[rank], 0)

    def ends(self) -> dict[int, int]:
        """How ranks have ended: rank -> exit code, negative for signals."""
        ended: dict[int, int] = {}
        while select.select([self.control.socket], [], [], 0.5)[0] and (message := self.control.receive()):
            ended[message["rank"]] = message["status"]
        return ended


class Ranks:
    """The face of the pool: ``ranks.run(function, world=2, **arguments)``."""

    def __init__(self, warning_filters: Sequence[str] = ()) -> None:
        self._settings = {"filters": list(warning_filters), "path": sys.path}
        self._pool: _Pool | None = None
        self._world = 0
        self._group = 0

    def run(self, function: Callable[..., Any], world: int = 2, timeout: float = 60, **arguments: Any) -> list[Any]:
        """Call a module-level function on ranks 0 to ``world - 1``, each in a default gloo group of that size.

        Args:
            function: defined at the top of a module that the ranks can import.
            world: how many ranks, up to 4; the others idle.
            timeout: seconds until the ranks count as hung.
            arguments: JSON values, the same for every rank; tuples arrive as lists.

        Returns:
            what each rank returned, a JSON value.

        Raises:
            RanksFailed: with the traceback of every rank that raised, the stacks of those that hung, and their output.
        """
        __tracebackhide__ = True
        if "<" in function.__qualname__:
            raise TypeError(f"{function.__qualname__} has no name that a rank could import")
        if not 1 <= world <= SIZE:
            raise ValueError(f"world must be 1 to {SIZE}, not {world}")
        started = self._pool is None
        pool = self._pool = self._pool or _Pool.start(self._settings)
        if world != self._world or started:
            self._world, self._group = world, self._group + 1
        name = f"{function.__module__}:{function.__qualname__}"
        request = {"function": name, "world": world, "group": self._group, "arguments": arguments}
        starts = [os.fstat(file.fileno()).st_size for file in pool.outputs]
        json.dumps(request)
        for channel in pool.ranks[:world]:
            with contextlib.suppress(ConnectionError):
                channel.send(request)
        answers, silent = self._collect(pool, world, timeout)
        if not silent and all("result" in answer for answer in answers.values()):
            if any(answer["dirty"] for answer in answers.values()):
                self._world = 0
            return [answers[rank]["result"] for rank in range(world)]
        message = _explain(pool, name, timeout, answers, silent, starts)
        self._world = 0
        if silent:
            self.close()
        raise RanksFailed(message)

    def close(self) -> None:
        """End the pool; the next call starts another."""
        if self._pool is not None:
            self._pool.stop()
            self._pool = None

    @staticmethod
    def _collect(pool: _Pool, world: int, timeout: float) -> tuple[dict[int, dict[str, Any]], list[int]]:
        """The ranks' answers in the order they came, and the ranks that gave none: hung, dead or waiting."""
        answers: dict[int, dict[str, Any]] = {}
        deadline = time.monotonic() + timeout
        waiting = {pool.ranks[rank].socket: rank for rank in range(world)}
        while waiting and (left := deadline - time.monotonic()) > 0:
            for ready in select.select(list(waiting), [], [], left)[0]:
                rank = waiting.pop(ready)
                answer = pool.ranks[rank].receive()
                if answer is not None:
                    answers[rank] = answer
                if answer is None or "error" in answer:
                    deadline = min(deadline, time.monotonic() + AFTER_FAILURE_S)
        return answers, [rank for rank in range(world) if rank not in answers]


def _explain(
    pool: _Pool, name: str, timeout: float, answers: dict[int, dict[str, Any]], silent: list[int], starts: list[int]
) -> str:
    """The failures, the first one first and those that only lost a peer last; then stacks, deaths and output."""
    failed = [(rank, answer["error"]) for rank, answer in answers.items() if "error" in answer]
    failed.sort(key=lambda pair: "Connection closed by peer" in pair[1])
    parts = [f"rank {rank} raised:\n{error}" for rank, error in failed]
    ended = pool.ends() if silent else {}
    for rank in silent:
        if rank in ended:
            status = ended[rank]
            how = f"was killed by {signal.Signals(-status).name}" if status < 0 else f"exited with code {status}"
            parts.insert(0, f"rank {rank} {how}")
        else:
            verdict = "did not come back" if failed or ended else f"hangs: no answer within {timeout:g} s"
            parts.append(f"rank {rank} {verdict}; its stacks:\n{pool.dump_stacks(rank)}")
    for rank, start in enumerate(starts):
        if output := _read_from(pool.outputs[rank], start).strip():
            parts.append(f"rank {rank} printed:\n{output[-SHOWN_CHARACTERS:]}")
    return f"{name} failed\n\n" + "\n\n".join(parts)


def _read_from(file: IO[bytes], start: int) -> str:
    size = os.fstat(file.fileno()).st_size
    start = max(start, size - (1 << 18))
    return os.pread(file.fileno(), max(0, size - start), start).decode(errors="replace")


def _die_with(parent: int) -> None:
    """Ask the kernel to kill this process when its parent ends, and make sure that it has not ended already."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, int(signal.SIGKILL))
    if os.getppid() != parent:
        os._exit(1)


def _serve(parent: int, settings: dict[str, Any]) -> None:
    """The process that forks the ranks and reports how they end."""
    _die_with(parent)
    sys.path[:] = settings["path"]
    import torch
    import torch.distributed

    torch.set_num_threads(1)
    control, *ends = [socket.socket(fileno=fd) for fd in settings["sockets"]]
    listener = socket.create_server(("127.0.0.1", 0), backlog=64)
    _filter_warnings(settings["filters"])
    me = os.getpid()
    pids: list[int] = []
    for rank, end in enumerate(ends):
        pid = os.fork()
        if pid == 0:
            _die_with(me)
            for other in (control, *(e for e in ends if e is not end)):
                other.close()
            output, stacks = settings["files"][rank], settings["files"][SIZE + rank]
            _be_rank(rank, _Channel(end), listener, output, stacks)
        pids.append(pid)
    for end in (*ends, listener):
        end.close()
    channel = _Channel(control)
    channel.send(pids)
    for _ in ends:
        pid, status = os.wait()
        channel.send({"rank": pids.index(pid), "status": os.waitstatus_to_exitcode(status)})
    signal.pause()


def _filter_warnings(filters: Sequence[str]) -> None:
    from _pytest.config import parse_warning_filter

    for text in filters:
        warnings.filterwarnings(*parse_warning_filter(text, escape=False))


def _be_rank(rank: int, channel: _Channel, listener: socket.socket, output: int, stacks: int) -> None:
    """Answer requests until pytest is gone. Never returns: what the forking process had begun is not ours to end."""
    os.dup2(output, 1)
    os.dup2(output, 2)
    sys.stdout = os.fdopen(1, "w", buffering=1, closefd=False)
    sys.stderr = os.fdopen(2, "w", buffering=1, closefd=False)
    faulthandler.enable(file=2)
    faulthandler.register(signal.SIGUSR1, file=stacks, all_threads=True)
    try:
        for answer in _answers(rank, channel, listener):
            channel.send(answer)
    except BaseException:  # noqa: BLE001 - there is nobody else to tell
        traceback.print_exc()
        os._exit(1)
    os._exit(0)


def _answers(rank: int, channel: _Channel, listener: socket.socket) -> Iterator[dict[str, Any]]:
    import torch.distributed as dist

    port = listener.getsockname()[1]
    served = listener.detach() if rank == 0 else None
    store = dist.TCPStore("127.0.0.1", port, is_master=rank == 0, wait_for_workers=False, master_listen_fd=served)
    if rank > 0:
        listener.close()
    group = 0
    while (request := channel.receive()) is not None:
        try:
            module, _, qualname = request["function"].partition(":")
            function: Any = importlib.import_module(module)
            for part in qualname.split("."):
                function = getattr(function, part)
            if request["group"] != group:
                _join(dist.PrefixStore(f"group{request['group']}", store), rank, request["world"])
                group = request["group"]
            yield _call(function, request["arguments"])
        except BaseException as error:  # noqa: BLE001 - every failure is the test's to see
            text = "".join(traceback.format_exception(error))
            # Peers wait for this rank until its connections close, and frames of the traceback may hold them open.
            del error
            _leave()
            group = 0
            yield {"error": text}


def _call(function: Callable[..., Any], arguments: dict[str, Any]) -> dict[str, Any]:
    import torch
    import torch.distributed as dist

    random.seed(0)
    torch.manual_seed(0)
    if numpy := sys.modules.get("numpy"):
        numpy.random.seed(0)
    result = function(**arguments)
    # Groups that a function made and left would add up over a run.
    dirty = not dist.is_initialized() or len(dist.distributed_c10d._world.pg_map) > 1
    answer = {"result": result, "dirty": dirty}
    json.dumps(answer)
    return answer


def _join(store: Any, rank: int, world: int) -> None:
    import torch.distributed as dist

    _leave()
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world, timeout=timedelta(seconds=600))


def _leave() -> None:
    import torch.distributed as dist

    gc.collect()
    if dist.is_initialized():
        dist.destroy_process_group()
        gc.collect()


if __name__ == "__main__":
    _serve(int(sys.argv[1]), json.loads(sys.argv[2]))
