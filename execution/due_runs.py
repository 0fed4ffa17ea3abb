"""Wakeups for deployments with runs that no pod claims."""

from __future__ import annotations

from typing import TYPE_CHECKING

from journal.deployments import wakes
from journal.deployments.wakes import WakeOutcome
from messages import wakeups
from telemetry import instruments

if TYPE_CHECKING:
    from messages.broker import Broker
    from models.database import Database

instruments.declare("wakes_total")


async def wake_due_deployments(database: Database, broker: Broker) -> None:
    """Wake deployments with due runs, release deferred runs that may start, and count the outcomes in the metrics.

    The deployer is notified of each woken deployment, and workers of runs left to them. Raises
    `DatabaseUnavailable`.
    """
    done = await wakes.wake_for_waiting_runs(database)
    for workflow_id, outcome in done.items():
        instruments.counter("wakes_total", outcome.name.lower().replace("_", "-")).inc()
        if outcome is WakeOutcome.WOKEN:
            await wakeups.wake_deployer(broker, workflow_id)
    if WakeOutcome.LEFT_TO_WORKERS in done.values():
        await wakeups.wake_workers(broker)
