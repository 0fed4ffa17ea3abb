"""Asking an execution to end: in its row first, then by a notice to whoever would otherwise hear of it later."""

from __future__ import annotations

from contextlib import suppress
from typing import TYPE_CHECKING

from messages.broker import BrokerUnavailable

if TYPE_CHECKING:
    from gateway.state import State
    from journal.store import ExecutionKey, Requested


async def ask_to_end(gateway: State, key: ExecutionKey, wish: str) -> Requested | None:
    """Ask an execution to `stop` or `cancel`; None where there is no such execution."""
    requested = await gateway.store.request_end(key, wish)
    if requested is None:
        return None
    # With the broker away, the worker hears of it when it renews its lease, and who waits looks every second.
    with suppress(BrokerUnavailable):
        if requested.lease_owner is None:
            await gateway.broker.announce({key.execution_id: requested.inbox})
        else:
            await gateway.broker.send(
                requested.lease_owner, {"execution_id": key.execution_id, "request": wish}
            )
    return requested
