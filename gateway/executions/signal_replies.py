"""Wait for the reply of an execution to a signal."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING

from gateway.executions import change_polls
from gateway.http import errors, limits
from journal.waits import signals

if TYPE_CHECKING:
    from gateway.executions.long_poll import ExecutionPollHub
    from journal.store import ExecutionKey
    from journal.waits.signals import SignalProgress
    from models.access import ApiCaller
    from models.database import Database
    from models.signal import Signal


@contextmanager
def reserve_wait(waiting: ExecutionPollHub, key: ExecutionKey, seconds: int) -> Iterator[None]:
    """Reserve one of the ten waits for replies of an execution until the block ends; none for a wait of 0 seconds.

    Raises a 409 error if all are taken.
    """
    if seconds == 0:
        yield
        return
    counts = waiting.awaited_replies
    if counts[key.execution_id] >= limits.REPLIES_AWAITED:
        raise errors.conflict(
            "too-many-signals",
            f"{limits.REPLIES_AWAITED} requests wait for replies of the execution: send the signal without wait",
        )
    counts[key.execution_id] += 1
    try:
        yield
    finally:
        counts[key.execution_id] -= 1
        if not counts[key.execution_id]:
            del counts[key.execution_id]


async def wait_for_reply(
    database: Database,
    waiting: ExecutionPollHub,
    key: ExecutionKey,
    caller: ApiCaller,
    sent: Signal,
    seconds: int,
) -> Signal:
    """Wait until a node has replied to a signal or the run has ended, at most `seconds`, and return the signal as it is
    then; with 0, return `sent` at once.

    Raises 404 if the run is gone, and 503 if too many requests wait here.
    """
    if seconds == 0:
        return sent
    found = await change_polls.read_until(
        waiting,
        key.execution_id,
        caller,
        seconds,
        partial(_read, database, key, sent.number),
        lambda progress: progress.has_ended or progress.signal.replied_at is not None,
    )
    return found.signal


async def _read(database: Database, key: ExecutionKey, number: int) -> SignalProgress:
    async with database.read() as connection:
        found = await signals.read_progress(connection, key, number)
    if found is None:
        raise errors.not_found("execution")
    return found
