"""Runs whose worker has died, waits that are over, wake-ups that were lost: found in the rows and set going again."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import structlog

from messages.broker import BrokerUnavailable

if TYPE_CHECKING:
    from journal.store import Store
    from messages.broker import Broker

log = structlog.get_logger()

SWEEP_ROWS: Final = 500


async def recover(store: Store, broker: Broker) -> None:
    """Take back all leases that have run out, and say that there is work; raises `DatabaseUnavailable`."""
    swept_rows = SWEEP_ROWS
    while swept_rows == SWEEP_ROWS:
        swept = await store.sweep(SWEEP_ROWS)
        swept_rows = swept.requeued + len(swept.ended)
        if swept_rows:
            log.info("leases taken back", requeued=swept.requeued, ended=len(swept.ended))
        try:
            await broker.announce(swept.ended)
            if swept.has_pending:
                await broker.wake()
        except BrokerUnavailable as error:
            # Every worker sweeps too, and who polls an execution looks at its row.
            log.debug("broker not reached", reason=str(error))
