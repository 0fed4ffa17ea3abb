"""Long polls for a change of an execution that a request reads by itself, such as its state."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, TypeVar

from gateway.http import errors, limits

if TYPE_CHECKING:
    from gateway.executions.long_poll import ExecutionPollHub, ExecutionWaiter

Found = TypeVar("Found")


async def read_until(
    waiting: ExecutionPollHub,
    execution_id: str,
    wait_seconds: float,
    read: Callable[[], Awaitable[Found]],
    is_awaited: Callable[[Found], bool],
) -> Found:
    """Call `read` until `is_awaited` accepts its result, and return that; after `wait_seconds`, the last result.

    It is called at once and after each commit of the run; only once for a wait of 0. Raises 503 if 10,000 requests wait
    here, and the errors of `read`.
    """
    found = await read()
    if wait_seconds == 0 or is_awaited(found):
        return found
    if waiting.polls >= limits.POLLS_WAITING:
        raise errors.not_ready("Too many requests wait here for executions to change: ask with wait=0")
    waiting.polls += 1
    with waiting.waiter(execution_id) as waiter:
        timer = asyncio.get_running_loop().call_later(wait_seconds, waiter.end)
        try:
            return await _read_changes(waiting, execution_id, read, is_awaited, waiter)
        finally:
            timer.cancel()
            waiting.polls -= 1


async def _read_changes(
    waiting: ExecutionPollHub,
    execution_id: str,
    read: Callable[[], Awaitable[Found]],
    is_awaited: Callable[[Found], bool],
    waiter: ExecutionWaiter,
) -> Found:
    """Call `read` at once and after each change of the run until its result is awaited or the wait has ended; return
    the last result.

    The commit that records a node notifies the waiter; a lost notification delays it by a second.
    """
    while True:
        waiter.changed.clear()
        if not waiting.is_watched(execution_id):
            await waiting.watch([execution_id])
        found = await read()
        if waiter.is_over or is_awaited(found):
            return found
        await waiter.changed.wait()
