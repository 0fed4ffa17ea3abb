"""Runs of deployments that nobody takes: what wakes those, told to whoever it concerns."""

from __future__ import annotations

from typing import TYPE_CHECKING

from journal import wakes
from journal.wakes import Done
from messages import hints

if TYPE_CHECKING:
    from messages.broker import Broker
    from models.database import Database


async def see_to(database: Database, broker: Broker) -> None:
    """Wake deployments for runs that are due, and let deferred ones go that may; raises `DatabaseUnavailable`."""
    done = await wakes.see_to_waiting(database)
    for workflow_id, what in done.items():
        if what is Done.WOKEN:
            await hints.deployment_changed(broker, workflow_id)
    if Done.LEFT_TO_WORKERS in done.values():
        await hints.wake(broker)
