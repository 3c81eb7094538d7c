"""What went wrong with ranks: what was first, and what others only suffered because of it."""

from __future__ import annotations

import json
import os
import re
import signal
import time
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import IO, Any

from parallel.errors import PipelineError, RankError, Refusal

__all__ = ["Failure", "account", "is_echo", "last_lines", "read_account", "says_echo", "tail", "told"]

_SHOWN_LINES = 60
_ECHO = re.compile(
    r"Connection (closed by (remote )?peer|reset by peer|refused|was likely closed)|Broken pipe|gloo/transport/"
    r"|remote process (has )?exited|communicator was aborted|recvValue failed|Failed to recv|sendBytes failed"
)


@dataclass(frozen=True, slots=True)
class Failure:
    """What is known of a failed rank.

    Attributes:
        rank: that failed.
        code: it ended with, or will.
        time: when, by the monotonic clock.
        summary: one line, by its own account; empty: it left none.
        text: traceback, or the end of its stderr.
        echo: 0; 2 for what a rank suffers because another one failed; 1 where something else came before that.
        problems: of a refusal.
    """

    rank: int
    code: int
    time: float
    summary: str
    text: str
    echo: int
    problems: tuple[str, ...] = ()


def account(error: BaseException) -> dict[str, Any]:
    """What a rank says of its own failure, as a JSON value."""
    problems = error.problems if isinstance(error, Refusal) else ()
    before = [other for other in _interrupted_by(error) if not is_echo(other)]
    echo = (1 if before else 2) if is_echo(error) else 0
    shown = before[-1] if echo == 1 else error
    summary = "".join(traceback.format_exception_only(shown)).strip().splitlines()[0][:300]
    text = last_lines("".join(traceback.format_exception(error)))
    when = {"time": time.monotonic(), "code": 2 if problems else 1, "echo": echo}
    return {**when, "summary": summary, "text": text, "problems": problems}


def read_account(rank: int, text: str) -> Failure | None:
    """What :func:`account` said; None: nothing, so far."""
    try:
        told, _ = json.JSONDecoder().raw_decode(text)  # a rank may come to report twice
    except ValueError:
        return None
    what = (int(told["code"]), float(told["time"]), str(told["summary"]), str(told["text"]), int(told["echo"]))
    return Failure(rank, *what, tuple(map(str, told["problems"])))


def told(failures: Sequence[Failure], status: int | None, spoken: str) -> list[str]:
    """The first of the failures, and what came of it in one line.

    Args:
        failures: the first one first.
        status: of the first one's process; None: it still runs.
        spoken: the end of its output, if that was not shown.
    """
    first, *others = failures
    if first.problems:
        return list(dict.fromkeys(problem for failure in failures for problem in failure.problems))
    how, why = f"exit code {first.code}", first.summary
    if status is not None and status < 0 and first.code == 128 - status:
        how = f"killed by {signal.Signals(-status).name}, {how}"
        if status == -signal.SIGKILL:
            why = why or "if nobody did that, the system ran out of memory (dmesg says so)"
    lines = [f"rank {first.rank} failed ({how})" + f": {why}" * bool(why), *first.text.splitlines()]
    if spoken:
        lines += [f"the last output of rank {first.rank}:", *spoken.splitlines()]
    kinds = {"lost touch with it": list[str](), "failed alike": list[str](), "failed in another way": list[str]()}
    for other in sorted(others, key=lambda failure: failure.rank):
        alike = "failed alike" if other.summary == first.summary else "failed in another way"
        kinds["lost touch with it" if other.echo else alike].append(str(other.rank))
    effects = [f"rank {', '.join(ranks)} {what}" for what, ranks in kinds.items() if ranks]
    return lines + ([f"after that {'; '.join(effects)}"] if effects else [])


def is_echo(error: BaseException | None) -> bool:
    """Whether an error says only that another rank is gone."""
    while error is not None:
        if isinstance(error, BaseExceptionGroup):
            return all(map(is_echo, error.exceptions))
        if isinstance(error, PipelineError) and error.__cause__ is not None:
            error = error.__cause__
            continue
        if isinstance(error, ConnectionError | RankError) or type(error).__name__ == "DistNetworkError":
            return True
        if isinstance(error, RuntimeError) and says_echo(str(error)):
            return True
        error = error.__cause__
    return False


def says_echo(text: str) -> bool:
    """Whether that is what gloo, NCCL or a store says where another rank is gone."""
    return bool(_ECHO.search(text))


def _interrupted_by(error: BaseException) -> Iterator[BaseException]:
    """The errors that were being handled, the latest first, when this one came up by itself."""
    at: BaseException | None = error
    while at is not None:
        if at.__cause__ is not None:
            at = at.__cause__
        else:
            at = None if at.__suppress_context__ else at.__context__
            if at is not None:
                yield at


def tail(file: IO[bytes] | None) -> str:
    """The end of a file that somebody may be writing; empty without one."""
    if file is None:
        return ""
    size = os.fstat(file.fileno()).st_size
    return os.pread(file.fileno(), 1 << 18, max(0, size - (1 << 18))).decode(errors="replace")


def last_lines(text: str, count: int = _SHOWN_LINES) -> str:
    """Its last lines, none of them too long."""
    return "\n".join(line[:500] for line in text.splitlines()[-count:])
