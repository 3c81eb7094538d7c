"""Local ranks: start them, watch them, show the one that failed first, and leave nothing behind.

The parent runs :func:`run_local` and imports no torch; each child wraps its program in :func:`run_rank`, which writes
what went wrong to a file that the parent left open for it. Every file between the two is already unlinked, so
nothing stays on the disk even when the parent is killed.
"""

from __future__ import annotations

import contextlib
import dataclasses
import faulthandler
import fcntl
import json
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import IO, Any

from launch.env import detect
from launch.failures import Failure, account, last_lines, read_account, says_echo, tail, told
from parallel.errors import ConfigError, RankError, Refusal

__all__ = ["FOREIGN", "report_environ", "report_failure", "report_file", "run_local", "run_rank", "tethered"]

_POLL_S = 0.02
_PATIENCE_S = 5.0
"""For the rank that failed first to say so, once others have lost touch with it."""
_AFTER_S = 0.3
"""That a rank waits before it says that it lost touch with another, which may have more to say."""
_KEPT_BYTES = 64 << 20
FOREIGN = re.compile(
    r"RANK|WORLD_SIZE|LOCAL_RANK|LOCAL_WORLD_SIZE|MASTER_ADDR|MASTER_PORT|TORCHELASTIC_.*|LOCKSTEP_.*"
    r"|OMPI_COMM_WORLD_.*|PMI_.*|MPI_LOCALRANKID|MPI_LOCALNRANKS|SLURM_PROCID|SLURM_LOCALID"
)
# A process that replaces itself keeps its death signal, so that any command can be tied to its parent this way.
_TETHER = """
import ctypes, os, signal, sys
parent, *command = sys.argv[1:]
if sys.platform == "linux":
    ctypes.CDLL(None).prctl(1, int(signal.SIGKILL))
if os.getppid() != int(parent):
    os._exit(1)
signal.signal(signal.SIGPIPE, signal.SIG_DFL)
try:
    os.execvp(command[0], command)
except OSError as error:
    sys.exit(f"cannot start {command[0]!r}: {error.strerror}")
"""


@dataclass(slots=True)
class _Rank:
    """A running rank: its process, and the files that its output (None: passed through) and its report go to."""

    number: int
    process: subprocess.Popen[bytes]
    report: IO[bytes]
    errors: IO[bytes] | None
    output: IO[bytes] | None
    ended_at: float = field(default=0.0)

    def ended(self) -> bool:
        if self.process.poll() is None:
            for file in (self.errors, self.output):
                if file is not None and os.fstat(file.fileno()).st_size > _KEPT_BYTES:
                    os.ftruncate(file.fileno(), 0)
            return False
        self.ended_at = self.ended_at or time.monotonic()
        return True

    def code(self) -> int:
        status = self.process.returncode
        return status if status >= 0 else 128 - status

    def failure(self) -> Failure | None:
        """What went wrong with this rank, by its own account or by its exit; None if nothing did so far."""
        ended = self.ended()
        if found := read_account(self.number, tail(self.report)):
            return found
        if not ended or self.process.returncode == 0:
            return None
        text = last_lines(tail(self.errors))
        echo = 2 * says_echo(text.splitlines()[-1] if text else "")
        return Failure(self.number, self.code(), self.ended_at, "", text, echo)


def run_local(
    command: Sequence[str],
    world: int,
    *,
    environ: Mapping[str, str],
    threads_per_rank: int | None = None,
    grace_s: float = 10.0,
) -> int:
    """Start ``world`` ranks of ``command`` on this machine, wait for them, and return the exit code.

    Rank 0 speaks live; of the others only what explains a failure is shown. The first rank that fails ends the rest.
    SIGINT and SIGTERM reach the ranks as one SIGTERM (a Python that is still loading dies of it at once and in
    silence), upon which they may finish their step; a second signal, or ``grace_s`` after SIGTERM, kills them.

    Args:
        command: an argument vector; no shell ever sees it.
        world: number of ranks.
        environ: what the ranks inherit, apart from the variables of other starters.
        threads_per_rank: value of ``OMP_NUM_THREADS``; by default the user's, or an equal share of the cores.
        grace_s: seconds between SIGTERM and SIGKILL.

    Returns:
        0; or that of the rank that failed first, 128 + n if signal n killed it; or 2 if the ranks refused their
        input; or 128 + n after signal n to the parent, 137 if ranks had to be killed then.

    Raises:
        ConfigError: a command that no system can take.
        RankError: a rank could not be started.
    """
    if not command or any("\0" in word for word in command):
        raise ConfigError("a command needs at least one word, and none may hold a NUL")
    with contextlib.ExitStack() as stack:
        received = stack.enter_context(_signals())
        listener = stack.enter_context(socket.create_server(("127.0.0.1", 0), backlog=world + 64))
        shared = _shared_environ(environ, world, listener.getsockname()[1], threads_per_rank)
        ranks: list[_Rank] = []
        stack.callback(_end, ranks, 0.0)
        for number in range(world):
            ranks.append(_start(number, command, shared, listener, stack))
        listener.close()
        return _watch(ranks, received, grace_s)


def tethered(command: Sequence[str]) -> list[str]:
    """The same command, which dies with this process on Linux, however that ends."""
    return [sys.executable, "-I", "-S", "-c", _TETHER, str(os.getpid()), *command]


def _shared_environ(environ: Mapping[str, str], world: int, port: int, threads: int | None) -> dict[str, str]:
    shared = {name: value for name, value in environ.items() if not FOREIGN.fullmatch(name)}
    shared |= {
        "LOCKSTEP_WORLD": str(world),
        "LOCKSTEP_LOCAL_WORLD": str(world),
        "LOCKSTEP_HOST": "127.0.0.1",
        "LOCKSTEP_PORT": str(port),
    }
    if threads is not None:
        shared["OMP_NUM_THREADS"] = str(threads)
    else:
        cores = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1
        shared.setdefault("OMP_NUM_THREADS", str(max(1, cores // world)))
    # gloo would ask what the host's name means, and many a host does not know its own.
    if "lo" in (name for _, name in socket.if_nameindex()):
        shared.setdefault("GLOO_SOCKET_IFNAME", "lo")
    return shared


def _start(
    number: int, command: Sequence[str], shared: Mapping[str, str], listener: socket.socket, stack: contextlib.ExitStack
) -> _Rank:
    report, *kept = (stack.enter_context(report_file()) for _ in range(1 if number == 0 else 3))
    errors, output = kept or (None, None)
    own = {
        "LOCKSTEP_RANK": str(number),
        "LOCKSTEP_LOCAL_RANK": str(number),
        **report_environ(report),
    }
    inherited = [report.fileno()]
    if number == 0:
        own["LOCKSTEP_LISTEN_FD"] = str(listener.fileno())
        inherited.append(listener.fileno())
    try:
        process = subprocess.Popen(
            tethered(command),
            stdin=None if number == 0 else subprocess.DEVNULL,
            stdout=output,
            stderr=errors,
            env={**shared, **own},
            pass_fds=inherited,
            start_new_session=True,
        )
    except OSError as error:
        raise RankError(f"rank {number} could not be started: {error}") from error
    return _Rank(number, process, report, errors, output)


def report_file() -> IO[bytes]:
    """A file without a name, to which whoever inherits it only appends; :func:`report_environ` tells of it."""
    file = tempfile.TemporaryFile(buffering=0)  # noqa: SIM115
    fcntl.fcntl(file, fcntl.F_SETFL, fcntl.fcntl(file, fcntl.F_GETFL) | os.O_APPEND)
    return file


def report_environ(file: IO[bytes]) -> dict[str, str]:
    """The variable that makes a child tell its failure to a file that it inherits, and not to stderr."""
    return {"LOCKSTEP_REPORT_FD": f"{file.fileno()}:{os.fstat(file.fileno()).st_ino}"}


@contextlib.contextmanager
def _signals() -> Iterator[list[int]]:
    """The SIGINT and SIGTERM that arrive, in order, instead of what they usually do (outside the main thread: none)."""
    received: list[int] = []
    previous: dict[int, Any] = {}
    try:
        with contextlib.suppress(ValueError):
            for number in (signal.SIGINT, signal.SIGTERM):
                previous[number] = signal.signal(number, lambda number, _: received.append(number))
        yield received
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _watch(ranks: list[_Rank], received: list[int], grace_s: float) -> int:
    """Wait for the ranks, forward the first signal, and return the exit code of the whole."""
    stop = 0
    deadline = float("inf")
    while not all(rank.ended() for rank in ranks):
        if stop and any(rank.ended() and rank.process.returncode != 0 for rank in ranks):
            deadline = min(deadline, time.monotonic() + grace_s)
        if any(_counts(rank.failure(), stop) for rank in ranks):
            break
        again = False
        while received:
            number = received.pop(0)
            again = again or (stop == number or (stop == signal.SIGTERM and number == signal.SIGINT))
            if not stop:
                for rank in ranks:
                    rank.process.send_signal(signal.SIGTERM)
            if number == signal.SIGTERM:
                deadline = min(deadline, time.monotonic() + grace_s)
            stop = stop or number
        if again or time.monotonic() > deadline:
            stubborn = ", ".join(str(rank.number) for rank in ranks if not rank.ended())
            why = "signalled again" if again else f"still there {grace_s:g} s after SIGTERM"
            print(f"killed rank {stubborn}: {why}", file=sys.stderr, flush=True)
            _end(ranks, 0.0)
            return 128 + signal.SIGKILL
        time.sleep(_POLL_S)
    if failures := _settle(ranks, stop):
        return _conclude(failures, ranks, grace_s)
    interrupted = stop and any(rank.code() != 0 for rank in ranks)
    return 128 + stop if interrupted else 0


def _counts(failure: Failure | None, stop: int) -> bool:
    """Whether this is a failure indeed, not an effect of the signal that we forwarded."""
    if failure is None:
        return False
    return not (stop and (failure.echo or failure.code in (128 + signal.SIGTERM, 128 + signal.SIGINT)))


def _settle(ranks: list[_Rank], stop: int) -> list[Failure]:
    """The failures, the first real one first: its echoes may have reached us long before it.

    A rank whose connections are gone may still be busy with its own end.
    """
    since = time.monotonic()
    while True:
        failures = [failure for rank in ranks if (failure := rank.failure()) and _counts(failure, stop)]
        patience_s = _PATIENCE_S if all(failure.echo for failure in failures) else 0.2
        if all(rank.ended() for rank in ranks) or time.monotonic() - since > patience_s:
            return sorted(failures, key=lambda failure: (failure.echo, failure.time))
        time.sleep(_POLL_S)


def _conclude(failures: list[Failure], ranks: list[_Rank], grace_s: float) -> int:
    """Show the first failure, end the other ranks, and return the exit code."""
    first = ranks[failures[0].rank]
    spoken = last_lines(tail(first.output), 10)
    if failures[0].problems and (fd := _report_fd()) is not None:  # who has started us may have heard it from others
        whole = dataclasses.replace(failures[0], problems=tuple(told(failures, None, "")))
        os.write(fd, json.dumps(dataclasses.asdict(whole)).encode())
    else:
        print(*told(failures, first.process.returncode, spoken), sep="\n", file=sys.stderr, flush=True)
    _end(ranks, min(grace_s, 3.0))
    return failures[0].code


def _end(ranks: list[_Rank], wait_s: float) -> None:
    """End the ranks that still run: SIGTERM, and after ``wait_s`` SIGKILL to them and what they started."""
    deadline = time.monotonic() + wait_s
    if wait_s > 0:
        for rank in ranks:
            rank.process.send_signal(signal.SIGTERM)
    while not all(rank.ended() for rank in ranks) and time.monotonic() < deadline:
        time.sleep(_POLL_S)
    for rank in ranks:
        if not rank.ended():
            with contextlib.suppress(ProcessLookupError):
                os.killpg(rank.process.pid, signal.SIGKILL)
            rank.process.wait()


def run_rank(main: Callable[[], int]) -> int:
    """Run a program and return its exit code; one of several ranks exits here and now.

    The error goes to the parent of a local start, which shows it once; to stderr under any other starter.
    """
    if not faulthandler.is_enabled():
        with contextlib.suppress(OSError, ValueError, AttributeError):
            faulthandler.enable()
    try:
        code = main()
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
        if stop.code is not None and not isinstance(stop.code, int):
            print(stop.code, file=sys.stderr)
    except KeyboardInterrupt:
        code = 128 + signal.SIGINT
    except BaseException as error:  # noqa: BLE001 - the other ranks must not wait for this one
        code = report_failure(error)
    if _is_one_of_many():
        # Taking a process group down may wait for ranks that are waiting for this one, and its threads may outlive the
        # interpreter they report to.
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError, ValueError):
                stream.flush()
        os._exit(code)
    return code


def _is_one_of_many() -> bool:
    with contextlib.suppress(Refusal):
        place = detect(os.environ)
        return place is not None and place.world > 1 and "torch.distributed" in sys.modules
    return False


def report_failure(error: BaseException) -> int:
    """Tell the parent of a local start, or else stderr, what went wrong; returns the exit code it deserves."""
    found = account(error)
    code, problems, text = found["code"], found["problems"], found["text"]
    if (fd := _report_fd()) is not None:
        os.write(fd, json.dumps(found).encode())
        return code
    with contextlib.suppress(Refusal):
        place = detect(os.environ)
        if place is not None and place.world > 1:
            where = f"rank {place.rank} of {place.world}:"
            if found["echo"] == 2:
                time.sleep(_AFTER_S)
                text = f"{where} lost touch with another rank: {found['summary']}"
            else:
                print(where, file=sys.stderr)
    print("\n".join(problems) or text, file=sys.stderr, flush=True)
    return code


def _report_fd() -> int | None:
    """The file that the parent left open for us, if the number still means that very file."""
    fd, _, inode = os.environ.get("LOCKSTEP_REPORT_FD", "").partition(":")
    try:
        return int(fd) if str(os.fstat(int(fd)).st_ino) == inode else None
    except (ValueError, OSError):
        return None
