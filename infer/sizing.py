"""How many pages of keys and values fit into memory, and the arithmetic in words."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from infer.policy import span
from parallel.errors import ConfigError

__all__ = ["GroupNeed", "Sizing", "free_memory", "in_units", "size_pages"]


_ANY = 1 << 40
"""Pages of a rank without layers: the others decide."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupNeed:
    """What the layers of one page group ask for.

    Attributes:
        window: tokens that they see; None: all.
        page_bytes: of a page, in all layers of this rank.
        arithmetic: how ``page_bytes`` comes about, in words.
    """

    window: int | None
    page_bytes: int
    arithmetic: str

    def pages_of(self, tokens: int, chunk: int, page_size: int) -> int:
        """Most pages that a request of so many tokens holds at a time, if at most ``chunk`` are computed in a step."""
        whole = -(-tokens // page_size)
        if self.window is None:
            return whole
        return min(whole, span(self.window - 1 + chunk, page_size))


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizing:
    """How many pages there are to be.

    Attributes:
        pages: for each group, on the device.
        host_pages: for each group, in the memory of the host.
        lines: the arithmetic, to be printed.
    """

    pages: tuple[int, ...]
    host_pages: tuple[int, ...]
    lines: tuple[str, ...]


def size_pages(
    needs: Sequence[GroupNeed],
    *,
    page_size: int,
    longest: int,
    chunk: int,
    memory: int,
    origin: str,
    host_memory: int = 0,
) -> Sizing:
    """Divide memory among the page groups, so that all are full at the same number of longest requests.

    Args:
        needs: the groups.
        page_size: tokens a page.
        longest: most tokens of a request.
        chunk: most tokens of a step.
        memory: bytes for pages on the device.
        origin: where that number comes from, for the lines.
        host_memory: bytes for pages of the second tier.

    Raises:
        ConfigError: one request of ``longest`` tokens does not fit; with the numbers.
    """
    each = [need.pages_of(longest, chunk, page_size) for need in needs]
    request = sum(count * need.page_bytes for count, need in zip(each, needs, strict=True))
    lines = [f"memory for keys and values: {origin} = {in_units(memory)}"]
    for index, (need, count) in enumerate(zip(needs, each, strict=True)):
        sees = "all tokens" if need.window is None else f"{need.window:,} tokens"
        lines.append(f"page group {index}, layers that see {sees}: a page of {page_size} tokens is {need.arithmetic}")
        lines.append(f"  a request of {longest:,} tokens has {count:,} pages = {in_units(count * need.page_bytes)}")
    if memory < request:
        raise ConfigError(
            f"not enough memory for one sequence: {longest:,} tokens need {in_units(request)} of keys and values, and "
            f"there are {in_units(memory)} ({origin}). Give more memory, shorter sequences or cached keys and values "
            f"in fewer bits"
        )
    pages = tuple(memory * count // request for count in each) if request else (_ANY,) * len(each)
    host = tuple(host_memory * count // request for count in each) if request else (_ANY,) * len(each)
    for index, (need, count, extra) in enumerate(zip(needs, pages, host, strict=True)):
        line = (
            f"page group {index}: {count:,} pages = {count * page_size:,} tokens = {in_units(count * need.page_bytes)}"
        )
        lines.append(line + (f", and {extra:,} pages in host memory" if extra else ""))
    lines.append(f"room for {memory / request if request else 0:,.1f} requests of {longest:,} tokens")
    return Sizing(pages=pages, host_pages=host, lines=tuple(lines))


def free_memory(device: torch.device, proc: Path = Path("/proc"), cgroup: Path = Path("/sys/fs/cgroup")) -> int:
    """Bytes that could be taken: on CUDA what the driver says and torch holds unused; on the CPU the least of what the
    system calls available and what the limit of the control group leaves."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    found: list[int] = []
    with contextlib.suppress(OSError, ValueError, IndexError):
        lines = (proc / "meminfo").read_text().splitlines()
        found += [int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")]
    with contextlib.suppress(OSError, ValueError):
        limit, used = (int((cgroup / name).read_text()) for name in ("memory.max", "memory.current"))
        found.append(max(0, limit - used))
    if not found:
        with contextlib.suppress(OSError, ValueError):
            found.append(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    return min(found, default=0)


def in_units(count: int) -> str:
    """Bytes in the unit that suits: ``512 B``, ``96.0 KiB``, ``1.5 GiB``."""
    if count < 1024:
        return f"{count} B"
    number, units = float(count), iter("KMGTPE")
    unit = ""
    while number >= 1024:
        number, unit = number / 1024, next(units)
    return f"{number:,.1f} {unit}iB"
