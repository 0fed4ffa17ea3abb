"""Runs whose worker has died, waits that are over, wake-ups that were lost: found in the rows and set going again."""

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
    """Take back all leases that have run out, and say that there is work; raises `DatabaseUnavailable`."""
    swept_rows = SWEEP_ROWS
    while swept_rows == SWEEP_ROWS:
        swept = await store.sweep(SWEEP_ROWS)
        swept_rows = swept.requeued + len(swept.ended)
        if swept_rows:
            log.info("leases taken back", requeued=swept.requeued, ended=len(swept.ended))
        try:
            await broker.publish(swept.ended)
            if swept.has_pending:
                await broker.wake_workers()
        except BrokerUnavailable as error:
            # Every worker sweeps too, and who polls an execution looks at its row.
            log.debug("broker not reached", reason=str(error))


async def promote_due_runs(store: JournalStore, broker: Broker) -> None:
    """Put what was delayed until now in the queue, and say that there is work; raises `DatabaseUnavailable`."""
    if await store.promote_due():
        await wakeups.wake_workers(broker)


async def admit_waiting(database: Database, broker: Broker) -> None:
    """Let runs go on for which a place is free that nobody has given; raises `DatabaseUnavailable`."""
    admitted, after = await concurrency_limits.admit_waiting_keys(database)
    while after:
        more, after = await concurrency_limits.admit_waiting_keys(database, after)
        admitted += more
    if admitted:
        await wakeups.wake_workers(broker)
