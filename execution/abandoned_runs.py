"""Runs whose parent, which waited for them, has ended without them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from journal.waits import children
from messages import end_requests

if TYPE_CHECKING:
    from journal.store import JournalStore
    from messages.broker import Broker
    from models.database import Database


async def end_abandoned_runs(database: Database, store: JournalStore, broker: Broker) -> None:
    """Ask them to end, and tell those who hold or await them; raises `DatabaseUnavailable`."""
    for one in await children.request_abandoned_ends(database, store):
        told = one.requested
        await end_requests.notify_end_request(
            broker, one.execution_id, one.request, lease_owner=told.lease_owner, channel=told.channel
        )
