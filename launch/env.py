"""Who am I: a rank's place, read from the variables of whatever started it.

Five starters are understood, the innermost first: our own local start (``LOCKSTEP_*``), torchrun, Open MPI, MPICH
and other PMI starters, SLURM. Variables that contradict one another or are only half there are refused; nothing is
guessed. SLURM yields to all others, since they may run inside its allocations and its variables then name the
allocation, not the rank.
"""

from __future__ import annotations

import math
import re
import socket
import zlib
from collections.abc import Mapping
from dataclasses import dataclass

from parallel.errors import ConfigError, refuse

__all__ = ["Placement", "detect", "expand_hosts"]

_DEFAULT_PORT = 29400
_MOST_HOSTS = 65536
_LOOPBACK = ("127.0.0.1", "localhost", "::1")


@dataclass(frozen=True, slots=True)
class Placement:
    """A rank's place in the world, and where the world meets.

    Attributes:
        rank: global rank, ``0 <= rank < world``.
        world: number of ranks.
        local_rank: rank among those on this machine.
        local_world: ranks on this machine; where the starter does not say, all of them if ``host`` is this very
            machine, else as many as ``local_rank`` proves.
        host: where the store is, which is rank 0's machine unless ``served``.
        port: the store's port.
        source: what the starter is called in messages ("torchrun").
        served: the starter itself serves the store; every rank is a client.
        round: names this start among restarts that share one store.
        listen_fd: rank 0 only: a socket that already listens on ``port``, inherited from the starter.
    """

    rank: int
    world: int
    local_rank: int
    local_world: int
    host: str
    port: int
    source: str
    served: bool = False
    round: str = "0"
    listen_fd: int | None = None


@dataclass(frozen=True, slots=True)
class _Starter:
    """The variables of one starter; of several names for one number the first that is set counts.

    ``marks`` are those that no other starter sets, ``meeting`` those that say where rank 0 is.
    """

    name: str
    rank: tuple[str, ...]
    world: tuple[str, ...]
    local_rank: tuple[str, ...]
    local_world: tuple[str, ...]
    marks: tuple[str, ...]
    meeting: tuple[str, ...] = ()

    def half_set(self, environ: Mapping[str, str]) -> str | None:
        """What is set and what is missing, if something is."""
        needed = [self.rank, self.world, self.local_rank, *((name,) for name in self.meeting)]
        missing = [names[0] for names in needed if not any(name in environ for name in names)]
        if not missing:
            return None
        present = [f"{name}={environ[name]}" for names in needed for name in names if name in environ]
        return f"{self.name} variables are half set: there are {', '.join(present)}; missing: {', '.join(missing)}"


def _starter(name: str, rank: str, world: str, local_rank: str, local_world: str, *meeting: str) -> _Starter:
    return _Starter(name, (rank,), (world,), (local_rank,), (local_world,), (rank, world, local_rank), meeting)


_OWN = _starter(
    "lockstep",
    *("LOCKSTEP_RANK", "LOCKSTEP_WORLD", "LOCKSTEP_LOCAL_RANK", "LOCKSTEP_LOCAL_WORLD"),
    *("LOCKSTEP_HOST", "LOCKSTEP_PORT"),
)
_TORCHRUN = _starter(
    "torchrun", *("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"), *("MASTER_ADDR", "MASTER_PORT")
)
_OPEN_MPI = _starter("Open MPI", *(f"OMPI_COMM_WORLD_{name}" for name in ("RANK", "SIZE", "LOCAL_RANK", "LOCAL_SIZE")))
_PMI = _Starter(
    *("PMI", ("PMI_RANK",), ("PMI_SIZE",)),
    ("MPI_LOCALRANKID", "PMI_LOCAL_RANK", "PALS_LOCAL_RANKID", "SLURM_LOCALID"),
    ("MPI_LOCALNRANKS", "PMI_LOCAL_SIZE"),
    ("PMI_RANK", "PMI_SIZE"),
)
_SLURM = _Starter(
    *("SLURM", ("SLURM_PROCID",), ("SLURM_STEP_NUM_TASKS", "SLURM_NTASKS", "SLURM_NPROCS")),
    *(("SLURM_LOCALID",), (), ("SLURM_PROCID", "SLURM_LOCALID")),
)


def detect(environ: Mapping[str, str]) -> Placement | None:
    """The place that the starter's variables give this process, or None if it was started bare.

    A lone SLURM task (``srun --pty bash``, ``salloc``, the batch script itself) counts as bare: it may start local
    ranks of its own.

    Raises:
        ConfigError: variables that are half set, that no number can be read from, or that contradict one another;
            several machines and no word on where to meet.
    """
    problems: list[str] = []
    found: list[Placement] = []
    for starter in (_OWN, _TORCHRUN, _OPEN_MPI, _PMI):
        if not any(name in environ for name in starter.marks):
            continue
        if half := starter.half_set(environ):
            problems.append(half)
        elif place := _read(starter, environ, problems):
            found.append(place)
    problems += _contradictions(found, environ)
    refuse(ConfigError, problems)
    return found[0] if found else _read_slurm(environ)


def _contradictions(found: list[Placement], environ: Mapping[str, str]) -> list[str]:
    """What the complete starters disagree on; an agent of torchrun may itself be a rank of MPI."""
    if not found or (found[0].source == _TORCHRUN.name and "TORCHELASTIC_RUN_ID" in environ):
        return []
    first, *others = found
    return [
        f"{first.source} says rank {first.rank} of {first.world}, but {other.source} says rank {other.rank} of"
        f" {other.world}: unset the variables of the one that did not start this process"
        for other in others
        if (first.rank, first.world) != (other.rank, other.world)
    ]


def _read_slurm(environ: Mapping[str, str]) -> Placement | None:
    in_batch_script = environ.get("ENVIRONMENT") == "BATCH" and "SLURM_STEP_ID" not in environ
    if in_batch_script or not any(name in environ for name in _SLURM.marks):
        return None
    problems = [half] if (half := _SLURM.half_set(environ)) else []
    place = None if problems else _read(_SLURM, environ, problems)
    refuse(ConfigError, problems)
    return None if place is None or place.world == 1 else place


def _read(starter: _Starter, environ: Mapping[str, str], problems: list[str]) -> Placement | None:
    """The placement of a starter whose variables are all there, or None and at least one more problem."""
    before = len(problems)
    world = _number(environ, starter.world, problems, least=1)
    rank = _number(environ, starter.rank, problems, below=world)
    local_rank = _number(environ, starter.local_rank, problems, below=world)
    local_world = _local_world(starter, environ, problems, world=world, local_rank=local_rank)
    host = environ.get(starter.meeting[0]) if starter.meeting else _mpi_host(starter, environ, world, local_world)
    if not host:
        problems.append(
            f"{starter.name} started {world} ranks on several machines without saying where rank 0 is: set MASTER_ADDR"
        )
    port_name = starter.meeting[1] if starter.meeting else "MASTER_PORT"
    given = port_name in environ
    port = _number(environ, (port_name,), problems, least=1, below=65536) if given else _derived_port(environ)
    if len(problems) > before:
        return None
    local_world = local_world or (world if host in _LOOPBACK else local_rank + 1)
    if local_rank >= local_world:
        problems.append(f"{starter.name} says local rank {local_rank} of {local_world}")
        return None
    return Placement(
        *(rank, world, local_rank, local_world, host or "", port, starter.name),
        served=starter is _TORCHRUN and environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True",
        round=environ.get("TORCHELASTIC_RESTART_COUNT" if starter is _TORCHRUN else "LOCKSTEP_ROUND", "0"),
        listen_fd=_inherited_socket(environ, port) if starter is _OWN and rank == 0 else None,
    )


def _number(
    environ: Mapping[str, str], names: tuple[str, ...], problems: list[str], *, least: int = 0, below: int = 0
) -> int:
    name = next(name for name in names if name in environ)
    text = environ[name].strip()
    if not re.fullmatch(r"[0-9]{1,9}", text):
        problems.append(f"{name}={environ[name]!r} is not a whole number")
        return least
    if int(text) < least or (below and int(text) >= below):
        problems.append(f"{name}={text} is out of range: must be at least {least}" + (f", below {below}" * bool(below)))
        return least
    return int(text)


def _local_world(
    starter: _Starter, environ: Mapping[str, str], problems: list[str], *, world: int, local_rank: int
) -> int:
    """Ranks on this machine, or 0 if the starter does not say."""
    if any(name in environ for name in starter.local_world):
        return _number(environ, starter.local_world, problems, least=1, below=world + 1)
    if starter is not _SLURM:
        return 0
    tasks = environ.get("SLURM_STEP_TASKS_PER_NODE", environ.get("SLURM_TASKS_PER_NODE", ""))
    counts: list[int] = []
    for count, _, times in re.findall(r"(\d{1,6})(\(x(\d{1,6})\))?", tasks):
        counts += [int(count)] * int(times or 1)
    node = environ.get("SLURM_NODEID", "")
    if node.isdecimal() and int(node) < len(counts) and local_rank < counts[int(node)] <= world:
        return counts[int(node)]
    hosts = expand_hosts(environ.get("SLURM_STEP_NODELIST", environ.get("SLURM_JOB_NODELIST", "")))
    return max(local_rank + 1, math.ceil(world / len(hosts))) if hosts else 0


def _mpi_host(starter: _Starter, environ: Mapping[str, str], world: int, local_world: int) -> str | None:
    """Where rank 0 is, for the starters that do not say so themselves."""
    if given := environ.get("MASTER_ADDR"):
        return given
    if local_world == world:
        return "127.0.0.1"
    step = environ.get("SLURM_STEP_NODELIST", "") if starter is _SLURM else ""
    hosts = expand_hosts(step or environ.get("SLURM_JOB_NODELIST", ""))
    return hosts[0] if hosts else None


def _derived_port(environ: Mapping[str, str]) -> int:
    """A port that all ranks of one job derive alike, below the ports that systems give out by themselves."""
    job = environ.get("SLURM_JOB_ID", "") + "." + environ.get("SLURM_STEP_ID", "")
    if job == ".":
        job = environ.get("PMIX_NAMESPACE", environ.get("OMPI_MCA_ess_base_jobid", ""))
    return _DEFAULT_PORT + zlib.crc32(job.encode()) % 3000 if job else _DEFAULT_PORT


def expand_hosts(nodelist: str) -> list[str]:
    """The hosts of a SLURM node list: ``node[03-05,7],x`` is node03, node04, node05, node7, x.

    Raises:
        ConfigError: brackets that do not match, a range that is none, or more hosts than any cluster has.
    """
    wrong = ConfigError(f"SLURM node list {nodelist!r} cannot be read")
    hosts: list[str] = []
    for word in re.findall(r"(?:[^,\[\]]|\[[^\[\]]*\]|[\[\]])+", nodelist):
        expanded = [""]
        for plain, inside in re.findall(r"([^\[\]]+)|\[([^\[\]]+)\]|[\[\]]", word):
            if not plain and not inside:
                raise wrong
            parts = [plain] if plain else _expand_ranges(inside, wrong)
            if len(expanded) * len(parts) + len(hosts) > _MOST_HOSTS:
                raise wrong
            expanded = [start + part for start in expanded for part in parts]
        hosts += expanded
    return hosts


def _expand_ranges(text: str, wrong: ConfigError) -> list[str]:
    numbers: list[str] = []
    for part in text.split(","):
        match = re.fullmatch(r"([0-9]+)(?:-([0-9]+))?", part)
        if not match:
            raise wrong
        first, last = match[1], match[2] or match[1]
        if not 0 <= int(last) - int(first) < _MOST_HOSTS:
            raise wrong
        numbers += [str(number).zfill(len(first)) for number in range(int(first), int(last) + 1)]
    return numbers


def _inherited_socket(environ: Mapping[str, str], port: int) -> int | None:
    """The listening socket that the starter left us, if the number still means that very socket."""
    text = environ.get("LOCKSTEP_LISTEN_FD", "")
    if not text.isdecimal():
        return None
    try:
        listener = socket.socket(fileno=int(text))
    except OSError:
        return None
    name = listener.getsockname()
    fd = listener.detach()
    return fd if isinstance(name, tuple) and name[1] == port else None
