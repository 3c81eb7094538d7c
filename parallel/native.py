"""Small C files beside the Python that calls them: compiled once by the system's compiler, kept in the user's cache."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import os
import platform
import shutil
import stat
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

from parallel.errors import LockstepError

__all__ = ["COMPILERS", "CompileError", "compiled", "let_go_of_threads", "thread_limit"]

COMPILERS = ("cc", "gcc", "clang")
_ALWAYS = ("-O3", "-std=gnu11", "-shared", "-fPIC")
_TIMEOUT_S = 120


class CompileError(LockstepError):
    """The library cannot be had on this machine; the message says why."""


@functools.cache
def compiled(
    source: Path,
    attempts: tuple[tuple[str, ...], ...] = ((),),
    *,
    folder: Path | None = None,
    compilers: tuple[str, ...] = COMPILERS,
) -> ctypes.CDLL:
    """A C file as a library.

    Args:
        source: the file.
        attempts: flags to compile it with, the first that work; those with ``-fopenmp`` only where that is torch's.
        folder: where libraries are kept; None: ``~/.cache/lockstep``. One that others may write to, or that cannot
            be written, is not used: the file is then compiled for this process alone.
        compilers: tried in turn.

    Raises:
        CompileError: there is no compiler, or none of them can compile it.
    """
    compiler = next((path for name in compilers if (path := shutil.which(name))), None)
    if compiler is None:
        raise CompileError(f"no C compiler ({', '.join(compilers)}) on the PATH")
    problem = ""
    with _kept_in(folder) as place:
        for flags in attempts:
            if "-fopenmp" in flags and not _shares_openmp():
                continue
            command = [compiler, *_ALWAYS, *flags]
            path = place / f"{source.stem}-{_fingerprint(source, command)}.so"
            for fresh in (False, True):  # a kept file may be broken: then it is compiled again
                if fresh or not path.exists():
                    problem = _compile(source, command, path)
                if not problem:
                    with contextlib.suppress(OSError):
                        return ctypes.CDLL(str(path))
                    problem = f"{path.name} cannot be loaded"
    raise CompileError(f"{compiler}: {problem}")


def _shares_openmp() -> bool:
    """Whether a library of gcc would use the OpenMP threads that torch has already; two pools would fight."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL("libgomp.so.1", mode=os.RTLD_NOLOAD | os.RTLD_NOW)
        return True
    return False


def let_go_of_threads() -> None:
    """End the OpenMP threads that wait for this thread's next piece of work; that would start others.

    Every thread that computes has such threads of its own, for good. Where those of all together are more than the
    processors, gcc's OpenMP lets them sleep between two pieces of work instead of looking out for the next, which takes
    longer than most pieces do. So who has loaded a model lets go before another thread computes with it.
    """
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL("libgomp.so.1", mode=os.RTLD_NOLOAD | os.RTLD_NOW).omp_pause_resource_all(1)


def thread_limit() -> int:
    """Most threads that OpenMP gives at a time (``OMP_THREAD_LIMIT``); 0: not known.

    oneDNN, which multiplies for torch, reckons with all that torch has, and gives wrong numbers when it gets fewer.
    """
    with contextlib.suppress(OSError, AttributeError):
        return ctypes.CDLL("libgomp.so.1", mode=os.RTLD_NOLOAD | os.RTLD_NOW).omp_get_thread_limit()
    return 0


def _fingerprint(source: Path, command: list[str]) -> str:
    """Of everything that decides what comes out: source, command, compiler, processor."""
    found = Path(command[0]).resolve()
    about = found.stat()
    parts = [source.read_text(), *command, str(found), str(about.st_size), str(about.st_mtime_ns), platform.machine()]
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        parts += sorted(
            {line for line in lines if line.startswith(("model", "cpu family", "flags", "CPU", "Features"))}
        )
    return hashlib.blake2b("\0".join(parts).encode(), digest_size=12).hexdigest()


def _compile(source: Path, command: list[str], path: Path) -> str:
    """Compile to ``path`` in one move; returns what went wrong, or an empty string."""
    handle, draft = tempfile.mkstemp(suffix=".so", dir=path.parent)
    os.close(handle)
    try:
        done = subprocess.run(
            [*command, str(source), "-o", draft, "-lm"],
            capture_output=True,
            text=True,
            timeout=_TIMEOUT_S,
            check=False,
        )
        if done.returncode:
            return (done.stderr.strip() or f"exit status {done.returncode}").splitlines()[0]
        if "-fopenmp" in command and b"libgomp.so.1" not in Path(draft).read_bytes():
            return "its OpenMP is not that of torch"
        os.replace(draft, path)
        return ""
    except (OSError, subprocess.TimeoutExpired) as error:
        return str(error)
    finally:
        Path(draft).unlink(missing_ok=True)


@contextlib.contextmanager
def _kept_in(folder: Path | None) -> Iterator[Path]:
    """The folder for libraries, or one for the time of this call."""
    with contextlib.suppress(OSError, RuntimeError):
        kept = Path.home() / ".cache" / "lockstep" if folder is None else folder
        kept.mkdir(mode=0o700, parents=True, exist_ok=True)
        about = kept.stat()
        ours = about.st_uid == os.getuid() and not about.st_mode & (stat.S_IWGRP | stat.S_IWOTH)
        if ours and os.access(kept, os.W_OK):
            yield kept
            return
    with tempfile.TemporaryDirectory(prefix="lockstep-") as own:
        yield Path(own)
