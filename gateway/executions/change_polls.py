"""Long polls for a change of an execution that a request reads by itself, such as its state."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from gateway.executions.long_poll import ExecutionPollHub, ExecutionWaiter
    from models.access import ApiCaller

Found = TypeVar("Found")


async def read_until(
    waiting: ExecutionPollHub,
    execution_id: str,
    caller: ApiCaller,
    wait_seconds: float,
    read: Callable[[], Awaitable[Found]],
    is_awaited: Callable[[Found], bool],
) -> Found:
    """Call `read` until `is_awaited` accepts its result, and return that; after `wait_seconds`, the last result.

    It is called at once and after each commit of the run; only once for a wait of 0. Raises 503 if too many requests
    wait here, and the errors of `read`.
    """
    found = await read()
    if wait_seconds == 0 or is_awaited(found):
        return found
    with waiting.poll(execution_id, caller.organization_id, caller.key_id, wait_seconds) as waiter:
        return await _read_changes(waiting, execution_id, read, is_awaited, waiter)


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
