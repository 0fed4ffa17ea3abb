"""Stop and cancel requests: stored in the row of the execution, then published to the process that runs it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from messages import wakeups

if TYPE_CHECKING:
    from journal.store import EndRequestOutcome, ExecutionKey, JournalStore
    from messages.broker import Broker


async def request_end_of_run(
    store: JournalStore, broker: Broker, key: ExecutionKey, action: str
) -> EndRequestOutcome | None:
    """Request the end of an execution by the action `stop` or `cancel`, notify the process that executes it, and return
    its status; None if it does not exist.

    It does not wait for the end; an ended execution does not change. The result also has the owner and the channel that
    were notified. Raises `LockWaitTimeout` if another transaction locks the execution.
    """
    requested = await store.request_end(key, action)
    if requested is not None:
        await wakeups.notify_end_request(
            broker,
            key.execution_id,
            action,
            lease_owner=requested.lease_owner,
            channel=requested.channel,
            organization_id=requested.organization_id,
        )
    return requested
