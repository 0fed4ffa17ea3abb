"""Cancellation of sub-workflow runs after the end of their parent."""

from __future__ import annotations

from typing import TYPE_CHECKING

from journal.waits import children
from messages import wakeups

if TYPE_CHECKING:
    from journal.store import JournalStore
    from messages.broker import Broker
    from models.database import Database


async def end_abandoned_runs(database: Database, store: JournalStore, broker: Broker) -> None:
    """Request the unfinished awaited sub-workflow runs of failed or stopped parents to stop, and those of canceled ones
    to cancel.

    The processes that execute them are notified, without waiting for their ends; lost notifications are ignored.
    Raises `DatabaseUnavailable`.
    """
    for child in await children.request_abandoned_ends(database, store):
        requested = child.requested
        await wakeups.notify_end_request(
            broker,
            child.execution_id,
            child.request,
            lease_owner=requested.lease_owner,
            channel=requested.channel,
        )
