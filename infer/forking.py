"""Requests that begin as another, and requests that are told their next token."""

from __future__ import annotations

from infer.prefix import first_page
from infer.request import Life, Request
from infer.running import Held, Running, columns

__all__ = ["extend", "fork"]


def fork(running: Running, parent: Request, child: Request, common: int) -> bool:
    """Seat ``child`` on the pages of its parent; False: that cannot be now.

    Full pages are shared. Of the page in which the child goes on, it gets a copy, since both write there next.

    Args:
        running: the requests that have rows.
        parent: need not have one.
        child: it has none yet.
        common: tokens with which both begin.
    """
    rows, size = running.rows, running.page_size
    if parent.life is not Life.RUNNING or not rows.free:
        return False
    computed = min(int(rows.computed[parent.row]), common, len(child.tokens) - 1)
    full, upto = computed // size, columns(computed, size)
    firsts = [first_page(group.window, computed, size) for group in running.groups]
    if not computed or any(int(have[parent.row]) > first for have, first in zip(rows.first, firsts, strict=True)):
        return False
    quotas = running.quotas(len(child.tokens), computed, child.most)
    pinned = [quota + (group.window is not None) for quota, group in zip(quotas, running.groups, strict=True)]
    if not running.fits(pinned, [max(0, full - first) for first in firsts], 0.0):
        return False
    held: list[Held] = []
    for group, first in enumerate(firsts):
        pages = rows.tables[group][parent.row, first:upto].tolist()
        for page in pages[: full - first]:
            running.memory.device[group].share(page)
        if upto > full:
            pages[-1] = running.memory.copy(group, pages[-1])
        held.append((first, pages))
    child.keys = parent.keys[:full]
    child.named = min(parent.named, full)
    running.seat(child, computed, held)
    return True


def extend(running: Running, request: Request, token: int) -> None:
    """Append a token to a paused request, and let it go on."""
    request.tokens.append(token)
    request.paused = False
    if request.life is Life.RUNNING:
        rows, row = running.rows, request.row
        rows.last[row] = token
        if rows.computed[row] < rows.final[row]:
            running.decode(request)
