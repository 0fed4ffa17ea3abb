"""Metrics of the executor."""

from __future__ import annotations

from datetime import timedelta
from typing import TYPE_CHECKING, Final

from models import ids
from models.pod_identity import POD_OWNER_PREFIX
from telemetry import instruments
from telemetry.metric_families import BY_WORKFLOW, GROUPS
from telemetry.process_activity import ACTIVITY

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


class WorkflowLabels:
    """Values of the label `workflow`: ids of the first workflows of this process, up to a limit."""

    def __init__(self) -> None:
        self._limit = 0
        self._known: set[str] = set()

    def allow(self, limit: int) -> None:
        """Set how many workflows get a label of their own; others share one. With 0, nothing is counted by
        workflow.
        """
        self._limit = limit
        if limit:
            instruments.declare(*(family.name for family in GROUPS[BY_WORKFLOW]))

    def label(self, workflow_id: str) -> str | None:
        """Return the value of the label `workflow`: the id of one of the first workflows up to the limit, or
        `other`.

        None if nothing is counted by workflow.
        """
        if not self._limit:
            return None
        if workflow_id not in self._known:
            if len(self._known) >= self._limit:
                return instruments.OTHER
            self._known.add(workflow_id)
        return workflow_id


workflow_labels: Final = WorkflowLabels()


def set_held_runs(count: int) -> None:
    """Set the metric of the number of runs that this process holds."""
    if instruments.is_exposed:
        instruments.gauge("runs_held").set(count)


def count_claims(claimed: Sequence[ClaimedRun], channel: str) -> None:
    """Count claimed runs; at the first claim of a run, also its time in the queue, unless that is negative or
    over 30 days.

    `channel` is that of this process, which tells whether it is a pod or a shared worker.
    """
    ACTIVITY.claims += len(claimed)
    if not instruments.is_exposed:
        return
    instruments.counter("claims_total").inc(len(claimed))
    target = "pod" if channel.startswith(POD_OWNER_PREFIX) else "shared"
    queue_seconds = instruments.histogram("execution_queue_seconds", target)
    for run in claimed:
        workflow = workflow_labels.label(run.workflow_id)
        if workflow is not None:
            instruments.counter("workflow_claims_total", workflow).inc()
        accepted_at = None if run.has_journal else ids.time_of(run.execution_id)
        if accepted_at is not None and timedelta() <= run.started_at - accepted_at <= MAX_QUEUE_TIME:
            seconds = (run.started_at - accepted_at).total_seconds()
            queue_seconds.observe(seconds)
            if workflow is not None:
                instruments.counter("workflow_queue_seconds_total", workflow).inc(seconds)


def count_end(run: ClaimedRun, status: RunStatus, now: datetime) -> None:
    """Count the end of one claim of a run by status, with the seconds since the run's first start."""
    if not instruments.is_exposed:
        return
    seconds = max((now - run.started_at).total_seconds(), 0.0)
    workflow = workflow_labels.label(run.workflow_id)
    if workflow is not None:
        instruments.counter("workflow_ends_total", workflow, status.value).inc()
        instruments.counter("workflow_run_seconds_total", workflow).inc(seconds)
    instruments.histogram("execution_duration_seconds", status.value).observe(seconds)


def count_lost_lease() -> None:
    """Count a run whose lease this process lost."""
    instruments.counter("leases_lost_total").inc()
