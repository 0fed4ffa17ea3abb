"""States of the alerts as the stores show them now, for a server without Prometheus."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from enum import StrEnum
from typing import TYPE_CHECKING, Final

from msgspec import Struct

from doctor import deployment_checks, row_checks
from doctor.alert_notices import NOTICES, AlertNotice
from doctor.findings import DriftClass
from journal import queue_delays

if TYPE_CHECKING:
    from sqlalchemy.ext.asyncio import AsyncConnection

BLOCKED_LOOP_MS: Final = 1_000
LATE_SECONDS: Final = 120


class AlertState(StrEnum):
    """State of an alert."""

    FIRING = "firing"
    UNKNOWN = "unknown"
    """It needs rates or a history, which Prometheus alone has."""
    QUIET = "quiet"


class ProcessFacts(Struct, frozen=True):
    """Facts about the processes of the server that report."""

    has_worker: bool
    has_leader: bool
    versions: frozenset[str | None]
    longest_loop_lag_ms: int


class QueueFacts(Struct, frozen=True):
    """Facts about the rows of all organizations; times are in seconds."""

    drift: frozenset[DriftClass]
    oldest_pending: float
    schedule_lag: float
    deferred_delay: float


class Alert(Struct, frozen=True):
    """Alert with its present state."""

    notice: AlertNotice
    state: AlertState


_RULES: Final[Mapping[str, Callable[[ProcessFacts, QueueFacts], bool]]] = {
    "AcceptedRunsNotClaimed": lambda _, queue: DriftClass.PENDING_UNCLAIMED in queue.drift,
    "NoWorker": lambda processes, _: not processes.has_worker,
    "NoLeader": lambda processes, _: not processes.has_leader,
    "VersionsDiffer": lambda processes, _: len(processes.versions) > 1,
    "EventLoopBlocked": lambda processes, _: processes.longest_loop_lag_ms > BLOCKED_LOOP_MS,
    "OldestPendingOneMinute": lambda processes, queue: queue.oldest_pending > 60 and processes.has_worker,  # noqa: PLR2004 - as the name says
    "OldestPendingFiveMinutes": lambda _, queue: queue.oldest_pending > 300,  # noqa: PLR2004 - as the name says
    "SchedulesLate": lambda _, queue: queue.schedule_lag > LATE_SECONDS,
    "DeferredRunsLate": lambda _, queue: queue.deferred_delay > LATE_SECONDS,
    "AsleepAgainstWindow": lambda _, queue: DriftClass.ASLEEP_AGAINST_WINDOW in queue.drift,
    "AwakeAgainstPolicy": lambda _, queue: DriftClass.AWAKE_AGAINST_POLICY in queue.drift,
}
"""Conditions of the alerts that the stores can tell; the rules of Prometheus have the same, for some time."""


async def read_queue_facts(connection: AsyncConnection) -> QueueFacts:
    """Return the delays of the queues and the classes of drift found in the database, of all organizations."""
    findings = [
        *await row_checks.find_overdue_rows(connection),
        *deployment_checks.check_deployments(await deployment_checks.read_deployments(connection)),
    ]
    return QueueFacts(
        drift=frozenset(finding.drift_class for finding in findings),
        oldest_pending=max(
            await queue_delays.read_oldest_pending_age(connection, queue_delays.SHARED),
            await queue_delays.read_oldest_pending_age(connection, queue_delays.OF_PODS),
        ),
        schedule_lag=await queue_delays.read_schedule_lag(connection),
        deferred_delay=await queue_delays.read_deferred_delay(connection),
    )


def evaluate(processes: ProcessFacts, queue: QueueFacts) -> Sequence[Alert]:
    """Return all alerts with their states: firing ones first, then unknown ones, which only Prometheus can tell, then
    quiet ones.
    """
    order = list(AlertState)
    alerts = [Alert(notice, _determine_state(notice.name, processes, queue)) for notice in NOTICES.values()]
    return sorted(alerts, key=lambda alert: order.index(alert.state))


def _determine_state(name: str, processes: ProcessFacts, queue: QueueFacts) -> AlertState:
    """Return the state of an alert by its name: unknown if the stores can't tell it."""
    is_firing = _RULES.get(name)
    if is_firing is None:
        return AlertState.UNKNOWN
    return AlertState.FIRING if is_firing(processes, queue) else AlertState.QUIET
