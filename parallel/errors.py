"""Every error that Lockstep raises on purpose.

    LockstepError
    ├── Refusal                 the input was wrong: nothing was started, nothing was written
    │   ├── ConfigError         an option, a recipe, a layout
    │   ├── ModelFolderError    a Hugging Face folder: absent, corrupt, incomplete
    │   ├── ScheduleError       a pipeline schedule that is incomplete, out of order or deadlocked
    │   ├── DataError           a corpus, a tokenizer, a token id
    │   ├── CheckpointError     a checkpoint that cannot be read or does not fit
    │   ├── RequestError        a prompt that cannot be continued as asked (infer/request.py)
    │   └── RunFolderError      a run folder that is held by another run, or belongs to another recipe
    ├── SaveError               a checkpoint that could not be written; the one before it stands
    ├── NotEnoughMemory         training state, or a step, that does not fit a rank (zero/memory.py)
    ├── NotFiniteError          gradients that are not finite, where a run is to stop for that (zero/loop.py)
    ├── CompileError            a C file that this machine cannot compile; something slower takes over (native.py)
    ├── ShardError              a tensor that does not fit its entry in the shard table
    └── RankError               a rank that raised, died or stopped answering
        └── PipelineError       the same inside a pipeline step; it names the action

A ``Refusal`` carries *all* the problems that were found, not the first. Programs print them and exit with
status 2.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable

__all__ = [
    "CheckpointError",
    "ConfigError",
    "DataError",
    "LockstepError",
    "ModelFolderError",
    "PipelineError",
    "RankError",
    "Refusal",
    "RunFolderError",
    "SaveError",
    "ScheduleError",
    "ShardError",
    "nearest",
    "refuse",
]


class LockstepError(Exception):
    """The root of the tree."""


class Refusal(LockstepError):
    """Input that cannot be honoured; ``problems`` lists every reason, one sentence each."""

    def __init__(self, problems: str | Iterable[str]) -> None:
        self.problems: tuple[str, ...] = (problems,) if isinstance(problems, str) else tuple(problems)
        super().__init__("\n".join(self.problems))


class ConfigError(Refusal):
    """An option, a recipe or a layout that cannot be honoured."""


class ScheduleError(Refusal):
    """A pipeline schedule that is incomplete, out of order or deadlocked."""


class ModelFolderError(Refusal):
    """A Hugging Face model folder that is absent, corrupt or incomplete."""


class DataError(Refusal):
    """A corpus, a tokenizer or a token id that cannot be used."""


class CheckpointError(Refusal):
    """A checkpoint that cannot be read, or does not belong to this model."""


class RunFolderError(Refusal):
    """A run folder that another run holds, or that was written by another recipe."""


class SaveError(LockstepError):
    """A checkpoint that could not be written, on some rank; the latest one is the one that it was."""


class ShardError(LockstepError):
    """A tensor whose shape contradicts its entry in the shard table."""


class RankError(LockstepError):
    """A rank that raised, died or stopped answering."""


class PipelineError(RankError):
    """A rank that raised, died or stopped answering inside a pipeline step; the message names rank and action."""


def refuse(error: type[Refusal], problems: Iterable[str]) -> None:
    """Raise ``error`` with all ``problems`` if there is at least one."""
    if found := tuple(problems):
        raise error(found)


def nearest(name: str, known: Iterable[str]) -> str:
    """A hint `` (did you mean 'x'?)`` naming the known name nearest to ``name``, or an empty string."""
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f" (did you mean {close[0]!r}?)" if close else ""
