"""Metrics of the executor."""

from __future__ import annotations

from datetime import timedelta
from typing import TYPE_CHECKING, Final

from models import ids
from models.workflow_names import POD_OWNER_PREFIX
from telemetry import instruments

if TYPE_CHECKING:
    from collections.abc import Sequence
    from datetime import datetime

    from engine.run_records import RunStatus
    from journal.store import ClaimedRun

MAX_QUEUE_TIME: Final = timedelta(days=30)
"""Longest plausible time in the queue: ids that are derived from others don't begin with their time."""

instruments.declare(
    *("runs_held", "claims_total", "leases_lost_total", "execution_queue_seconds"),
    "execution_duration_seconds",
)


def set_held_runs(count: int) -> None:
    """Set the metric of the number of runs that this process holds."""
    instruments.gauge("runs_held").set(count)


def count_claims(claimed: Sequence[ClaimedRun], channel: str) -> None:
    """Count claimed runs; the first claim of a run ends its time in the queue."""
    if not instruments.is_exposed:
        return
    instruments.counter("claims_total").inc(len(claimed))
    target = "pod" if channel.startswith(POD_OWNER_PREFIX) else "shared"
    queue_seconds = instruments.histogram("execution_queue_seconds", target)
    for run in claimed:
        accepted_at = None if run.has_journal else ids.time_of(run.execution_id)
        if accepted_at is not None and timedelta() <= run.started_at - accepted_at <= MAX_QUEUE_TIME:
            queue_seconds.observe((run.started_at - accepted_at).total_seconds())


def count_end(status: RunStatus, started_at: datetime, now: datetime) -> None:
    """Count the end of one claim of a run by status, with its duration in seconds since `started_at`."""
    if not instruments.is_exposed:
        return
    seconds = max((now - started_at).total_seconds(), 0.0)
    instruments.histogram("execution_duration_seconds", status.value).observe(seconds)


def count_lost_lease() -> None:
    """Count a run whose lease this process lost."""
    instruments.counter("leases_lost_total").inc()
