"""Recovery from the rows: runs of dead workers, waits that are over, and lost wakeups."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import structlog

from journal import concurrency_limits
from messages import wakeups
from messages.broker import BrokerUnavailable

if TYPE_CHECKING:
    from journal.store import JournalStore
    from messages.broker import Broker
    from models.database import Database

log = structlog.get_logger()

SWEEP_ROWS: Final = 500


async def recover_runs(store: JournalStore, broker: Broker) -> None:
    """Make the runs of all expired leases pending, or end them; publish the ends, and wake workers for
    pending runs.

    An unavailable broker is ignored. Raises `DatabaseUnavailable`.
    """
    swept_rows = SWEEP_ROWS
    while swept_rows == SWEEP_ROWS:
        swept = await store.sweep(SWEEP_ROWS)
        swept_rows = swept.requeued + len(swept.ended)
        if swept_rows:
            log.info("leases reclaimed", requeued=swept.requeued, ended=len(swept.ended))
        try:
            await broker.publish(swept.ended)
            if swept.has_pending:
                await broker.wake_workers()
        except BrokerUnavailable as error:
            # Every worker sweeps too, and clients that wait for an execution poll its row.
            log.debug("broker not reached", reason=str(error))


async def promote_due_runs(store: JournalStore, broker: Broker) -> None:
    """Make runs pending whose wait, delay or deferral is over, and wake workers if there are any. Raises
    `DatabaseUnavailable`.
    """
    if await store.promote_due():
        await wakeups.wake_workers(broker)


async def admit_waiting(database: Database, broker: Broker) -> None:
    """Give the free slots of all concurrency keys to waiting runs, and wake workers for them. Raises
    `DatabaseUnavailable`.
    """
    admitted, after = await concurrency_limits.admit_waiting_keys(database)
    while after:
        more, after = await concurrency_limits.admit_waiting_keys(database, after)
        admitted += more
    if admitted:
        await wakeups.wake_workers(broker)
