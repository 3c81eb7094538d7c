"""Tries forms in a process of its own, with bounds of time and memory, before an engine sees them."""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from functools import partial
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from infer.apart import Apart, Died
from infer.constraint import Constraint

__all__ = ["Checker"]

_PROGRAM = Path(__file__).with_name("compile.py")
_ENTRY = 200
"""Bytes that are kept of a form that was tried, besides what was wrong with it."""


class Checker:
    """Says of forms whether they can be kept; what was said is remembered.

    The process is started when the first form comes, killed when a form takes too long, and started again for the next.
    It ends with this one, and with this object.

    Args:
        tokenizer: of the model; None: there is no text.
        vocabulary: of the model.
        seconds: that a form may take.
        memory: bytes that it may take.
        kept_bytes: that may be remembered.
    """

    def __init__(
        self,
        tokenizer: Tokenizer | None,
        vocabulary: int,
        *,
        seconds: float = 1.0,
        memory: int = 512 << 20,
        kept_bytes: int = 1 << 20,
    ) -> None:
        self.seconds, self.memory, self.vocabulary, self.kept_bytes = seconds, memory, vocabulary, kept_bytes
        self.waiting = self.kept = 0
        self._tokenizer = tokenizer
        self._known: OrderedDict[bytes, str] = OrderedDict()
        self._apart = Apart(_PROGRAM, partial(_about, tokenizer, vocabulary), memory=memory)

    @property
    def starts(self) -> int:
        """How often the process was started."""
        return self._apart.starts

    @property
    def pid(self) -> int | None:
        """Of the process, if there is one."""
        return self._apart.pid

    def close(self) -> None:
        """End the process."""
        self._apart.close()

    async def problem(self, constraint: Constraint) -> str:
        """Why a form cannot be kept; nothing if it can. One form is tried at a time, off the event loop."""
        key = hashlib.sha256(f"{constraint.kind}\0{constraint.text}".encode(errors="surrogatepass")).digest()
        found = self._known.get(key)
        if found is not None:
            self._known.move_to_end(key)
            return found
        if self._tokenizer is None:
            return "there is no tokenizer, so there is no text"
        self.waiting += 1
        try:
            found = await self._apart.turn(self._try, constraint)
        finally:
            self.waiting -= 1
        self._remember(key, found)
        return found

    def _remember(self, key: bytes, problem: str) -> None:
        if key not in self._known:
            self._known[key] = problem
            self.kept += _ENTRY + len(problem)
        while self.kept > self.kept_bytes:
            self.kept -= _ENTRY + len(self._known.popitem(last=False)[1])

    def _try(self, constraint: Constraint) -> str:
        try:
            told = self._apart.ask({"kind": constraint.kind, "text": constraint.text}, self.seconds)
        except Died as died:
            if died.why == "refused":
                return f"forms cannot be tried: {died}"
            late = f"it takes more than {self.seconds:g} s to compile"
            return late if died.why == "late" else "it needs too much memory, or is nested too deeply"
        slow = told.get("cpu_s", 0.0) > self.seconds / 4
        return str(told["problem"]) or ("it takes too long to compile, and to follow" if slow else "")


def _about(tokenizer: Tokenizer | None, vocabulary: int) -> dict[str, Any]:
    """What the process is told first."""
    assert tokenizer is not None
    ids = tokenizer.get_vocab(with_added_tokens=True).values()
    return {"tokenizer": tokenizer.to_str(), "vocabulary": vocabulary, "ends": [min(ids, default=0)]}
