"""Measurement of delays that other tasks of an event loop suffer."""

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

BEAT_SECONDS = 0.005


class LoopHeartbeat:
    """Longest delay of a task of the event loop so far, in seconds."""

    longest_delay_seconds = 0.0


@asynccontextmanager
async def measure_heartbeat() -> AsyncIterator[LoopHeartbeat]:
    """Measure during the block how late a task of this event loop wakes up that sleeps for 5 ms at a time.

    Time in which this process did not compute is left out.
    """
    heartbeat = LoopHeartbeat()

    async def beat() -> None:
        while True:
            began_at, used_before = time.monotonic(), time.process_time()
            await asyncio.sleep(BEAT_SECONDS)
            # CPU time of other processes is no delay of this loop.
            used = time.process_time() - used_before
            delay = min(time.monotonic() - began_at - BEAT_SECONDS, used)
            heartbeat.longest_delay_seconds = max(heartbeat.longest_delay_seconds, delay)

    task = asyncio.create_task(beat())
    await asyncio.sleep(0)
    try:
        yield heartbeat
    finally:
        await asyncio.sleep(0)
        task.cancel()
