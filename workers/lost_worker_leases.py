"""Leases of a dead worker, released by its parent or successor before they expire."""

from __future__ import annotations

import asyncio
from contextlib import AsyncExitStack
from typing import TYPE_CHECKING, Final

import structlog

from journal import out_of_memory_reclaim, worker_leases
from journal.store_factory import open_store
from messages import wakeups
from messages.broker import BrokerError, BrokerUnavailable
from messages.broker_connection import connect_broker
from models import database as databases
from models.database import Database
from models.errors import DatabaseUnavailable

if TYPE_CHECKING:
    from journal.store import JournalStore
    from messages.broker import Broker
    from workers.settings import WorkerSettings

log = structlog.get_logger()

RELEASE_SECONDS: Final = 5.0
"""After a longer outage of the database, the leases have expired anyway."""


async def release_leases(
    settings: WorkerSettings, owner: str, exit_code: int, *, is_out_of_memory: bool = False
) -> None:
    """Make the runs of a dead worker process of this machine pending, and wake other workers.

    Runs of a process that was killed for lack of memory become suspects; `exit_code` is only logged. It takes five
    seconds at most and raises nothing: a sweep finds the rest.
    """
    log.warning("worker died", owner=owner, exit_code=exit_code, is_out_of_memory=is_out_of_memory)
    try:
        async with asyncio.timeout(RELEASE_SECONDS), AsyncExitStack() as stack:
            url = databases.parse_url(settings.database_url)
            store = await open_store(url, connections=1)
            stack.push_async_callback(store.close)
            if is_out_of_memory:
                database = Database(url)
                stack.push_async_callback(database.close)
                count = await out_of_memory_reclaim.reclaim_out_of_memory(database, store, owner)
            else:
                count = await store.reclaim(owner)
            log.warning("executions reclaimed", owner=owner, count=count)
            if count:
                broker = await connect_broker(settings.broker_url)
                stack.push_async_callback(broker.close)
                await wakeups.wake_workers(broker)
    except (DatabaseUnavailable, BrokerError, TimeoutError) as error:
        log.warning("leases left to a sweep", owner=owner, error=str(error) or type(error).__name__)


async def reclaim_predecessor_leases(
    database: Database, store: JournalStore, broker: Broker, name: str
) -> None:
    """Make the runs of dead processes of this worker's name pending; raises `DatabaseUnavailable`.

    A process that still listens on its channel is alive: several workers of one machine may share a name.
    Without the broker, living and dead processes can't be told apart, so the leases expire.
    """
    try:
        for owner in sorted(await worker_leases.worker_lease_owners(database, name)):
            if owner == broker.channel or await broker.is_heard(owner):
                continue
            log.info("executions reclaimed", owner=owner, count=await store.reclaim(owner))
    except BrokerUnavailable as error:
        log.warning("leases left to a sweep", reason=str(error))
