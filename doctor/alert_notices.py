"""Texts of the alerts: the promise that is at risk, and the action of the person who is called."""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum
from typing import Final

from msgspec import Struct


class AlertSeverity(StrEnum):
    """Urgency of an alert."""

    PAGE = "page"
    """It wakes a person."""
    TICKET = "ticket"
    """It waits for the morning."""


class AlertNotice(Struct, frozen=True):
    """Severity and texts of an alert."""

    name: str
    severity: AlertSeverity
    summary: str
    remedy: str


_PAGE, _TICKET = AlertSeverity.PAGE, AlertSeverity.TICKET
_NOTICES: Final = (
    AlertNotice(
        "AcceptedRunsNotClaimed",
        _PAGE,
        "Accepted executions stand still although workers have free places.",
        "Run `pilotflame doctor`, then `pilotflame doctor --fix pending-unclaimed`.",
    ),
    AlertNotice(
        "NoWorker",
        _PAGE,
        "No worker answers: executions are accepted and not run.",
        "Start workers, and look into the log of those that ended.",
    ),
    AlertNotice(
        "NoLeader",
        _PAGE,
        "No scheduler leads: schedules, timers and lifecycle policies stand still.",
        "Start a scheduler; if one runs, its log says why it does not lead.",
    ),
    AlertNotice(
        "TwoLeaders",
        _TICKET,
        "Two schedulers believe that they lead. Their actions are harmless twice.",
        "Look for a scheduler that is frozen or cut off from the database, and restart it.",
    ),
    AlertNotice(
        "VersionsDiffer",
        _TICKET,
        "Processes of different versions run side by side.",
        "Finish the upgrade or roll it back; `pilotflame doctor` names the processes.",
    ),
    AlertNotice(
        "EventLoopBlocked",
        _TICKET,
        "The event loop of a process is held for over a second at a time.",
        "Give the process more CPU, or lower PILOTFLAME_CONCURRENCY.",
    ),
    AlertNotice(
        "OldestPendingOneMinute",
        _TICKET,
        "An execution has been ready for over a minute, and workers live.",
        "Look at `runs_held` and the CPU of the workers; add workers.",
    ),
    AlertNotice(
        "OldestPendingFiveMinutes",
        _PAGE,
        "An execution has been ready for over five minutes.",
        "`GET /why` counts the reasons; add workers if they are busy.",
    ),
    AlertNotice(
        "SchedulesLate",
        _TICKET,
        "A schedule has been due for over two minutes.",
        "Look into the log of the leading scheduler; `pilotflame doctor --fix schedule-overdue` starts the runs.",
    ),
    AlertNotice(
        "DeferredRunsLate",
        _TICKET,
        "A waiting execution has been due for over two minutes.",
        "`pilotflame doctor --fix deferred-overdue` wakes the deployments with due runs.",
    ),
    AlertNotice(
        "DeadLettersGrow",
        _TICKET,
        "Executions of inbound requests have failed for hours.",
        "`GET /dead-letters` lists them; redrive them after the cause is mended.",
    ),
    AlertNotice(
        "LeasesLost",
        _TICKET,
        "Workers lose the leases of over 1 % of the executions that they claim.",
        "Workers are frozen, short of CPU, or cut off from the database for longer than a lease.",
    ),
    AlertNotice(
        "CommitsSlow",
        _TICKET,
        "One commit of a hundred takes over a second.",
        "Look at the disk and the locks of the database.",
    ),
    AlertNotice(
        "AsleepAgainstWindow",
        _PAGE,
        "A window has opened, and its deployment has not started.",
        "`GET /workflows/{id}/why` names the reason; the log of the deployer has the details.",
    ),
    AlertNotice(
        "AwakeAgainstPolicy",
        _TICKET,
        "A deployment runs that its policy stops: it costs money.",
        "`pilotflame doctor --fix awake-against-policy` applies the lifecycle policies.",
    ),
)
NOTICES: Final[Mapping[str, AlertNotice]] = {notice.name: notice for notice in _NOTICES}
"""Alerts by name; those of error budgets exist for Prometheus alone, which has rates of requests and wakes."""
