"""Puts load on a server."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Coroutine, Sequence
from typing import Any

from launch.bench.client import Client, clock
from launch.bench.measure import Record

__all__ = ["closed_loop", "open_loop"]


async def open_loop(
    client: Client, requests: Sequence[bytes], dues: Sequence[float], stop: asyncio.Event, most: int | None = None
) -> tuple[list[Record], float, float]:
    """Send each request when it is due, however many are under way.

    Args:
        client: of the server.
        requests: as they are sent.
        dues: seconds from now, ascending; infinite: never.
        stop: ends it at once; what is under way is cut.
        most: requests at a time; the wait for a place counts as theirs.

    Returns:
        what became of each, seconds to the last answer, seconds of this process's own CPU.
    """
    records = [Record(due=due) for due in dues]
    places = asyncio.Semaphore(most) if most else None

    async def one(record: Record, request: bytes) -> None:
        if places is None:
            await _send(client, record, request, start)
        else:
            async with places:
                await _send(client, record, request, start)

    async def all_of_them() -> None:
        async with asyncio.TaskGroup() as group:
            for record, request in zip(records, requests, strict=True):
                if math.isinf(record.due):
                    break
                if (wait := start + record.due - clock()) > 0:
                    await asyncio.sleep(wait)
                group.create_task(one(record, request))

    start, cpu = clock(), time.process_time()
    await _until(all_of_them(), stop)
    return records, _elapsed(records, start, stop), time.process_time() - cpu


async def closed_loop(
    client: Client, requests: Sequence[bytes], many: int, stop: asyncio.Event, seconds: float | None = None
) -> tuple[list[Record], float, float]:
    """Keep so many requests under way: each is sent when one before it has ended. Else as :func:`open_loop`.

    Args:
        client: of the server.
        requests: as they are sent.
        many: at a time.
        stop: ends it at once; what is under way is cut.
        seconds: after which none is begun.
    """
    records = [Record() for _ in requests]
    waiting = iter(zip(records, requests, strict=True))

    async def worker() -> None:
        for record, request in waiting:
            record.due = clock() - start
            if seconds is not None and record.due >= seconds:
                record.due = 0.0
                return
            await _send(client, record, request, start)

    async def all_of_them() -> None:
        async with asyncio.TaskGroup() as group:
            for _ in range(min(many, len(records))):
                group.create_task(worker())

    start, cpu = clock(), time.process_time()
    await _until(all_of_them(), stop)
    return records, _elapsed(records, start, stop), time.process_time() - cpu


async def _send(client: Client, record: Record, request: bytes, start: float) -> None:
    record.sent = clock() - start
    record.outcome = "cut"
    record.take(await client.send(request), start)


async def _until(work: Coroutine[Any, Any, None], stop: asyncio.Event) -> None:
    """Until it is done, or ``stop``."""
    task = asyncio.create_task(work)
    stopped = asyncio.create_task(stop.wait())
    try:
        await asyncio.wait([task, stopped], return_when=asyncio.FIRST_COMPLETED)
    finally:
        stopped.cancel()
        if not task.done():
            task.cancel()
        await asyncio.wait([task])
    if not task.cancelled():
        task.result()


def _elapsed(records: Sequence[Record], start: float, stop: asyncio.Event) -> float:
    ends = [record.ended for record in records if not math.isnan(record.ended)]
    return clock() - start if stop.is_set() or not ends else max(ends)
