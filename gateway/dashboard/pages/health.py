"""Health of the server: findings of drift, processes, database, and the reasons for which runs wait."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Final

from gateway.dashboard.formats import is_moment
from gateway.dashboard.page import Page, PageData, PageFrame
from gateway.dashboard.pages.overview import RECENT_SECONDS
from models.timestamps import parse_timestamp

if TYPE_CHECKING:
    from gateway.dashboard.page_request import PageRequest

HEALTH_SECONDS: Final = 5.0
"""Age up to which processes and sizes are shown again, while hints of runs update the page."""
SHOWN_FIXES: Final = 10
SLOW_LOOP_MS: Final = 1_000
"""Delay of an event loop from which requests visibly wait; the shipped alert has the same bound."""
QUEUES: Final = {
    "workers": "for any worker",
    "pods": "for the pods of their workflows",
    "limited": "for a free slot",
    "delayed": "for their time",
    "intake": "mails to parse",
    "isolated": "on trial after lost workers",
    "isolated-intake": "mails to parse, on trial after lost workers",
}
"""Words behind the number of pending runs of a queue."""
PHASES: Final = {
    "decide": "Accepted to pod asked for",
    "start": "To the start of the pod",
    "claim": "To the claim",
    "total": "Whole",
}
AGES: Final = (
    ("oldestPendingSeconds", "Oldest pending run"),
    ("scheduleLagSeconds", "latest schedule"),
    ("deferredDelaySeconds", "latest waiting run"),
)
NO_HEALTH: Final[Mapping[str, Any]] = {"database": {"tables": ()}, "cluster": None}


async def load(page: PageRequest) -> PageData:
    """Ask the API for reasons why runs wait and for the workers; also for drift, its last ten fixes, processes and the
    database.

    These are None unless the visitor is an admin. Drift is a contradiction between stores. Raises `ApiError`.
    """
    drift, why, health, fixes = await asyncio.gather(
        page.get_recent("/api/v1/admin/drift", seconds=RECENT_SECONDS),
        page.get("/api/v1/why"),
        page.get_recent("/api/v1/admin/health", seconds=HEALTH_SECONDS),
        page.get_if_present("/api/v1/audit", action="drift.fixed", limit=SHOWN_FIXES),
    )
    return {"drift": drift, "why": why, "health": health, "fixes": fixes}


def view(data: PageData, frame: PageFrame) -> Mapping[str, Any]:
    """Return the template values: findings, stores, workers, and reasons why runs don't move."""
    drift, why = data["drift"], data["why"]
    alerts = [] if data["health"] is None else data["health"]["alerts"]
    return {
        "title": "Health",
        "crumbs": (("Health", ""),),
        "drift": drift,
        "is_moment": is_moment,
        "health": data["health"],
        "fixes": [] if data["fixes"] is None else data["fixes"]["entries"],
        "firing_alerts": [one for one in alerts if one["state"] == "firing"],
        "quiet_alerts": sum(one["state"] == "quiet" for one in alerts),
        "unknown_alerts": sum(one["state"] == "unknown" for one in alerts),
        "queue_words": QUEUES,
        "phase_words": PHASES,
        "ages": [
            (label, figures[name])
            for figures in [(data["health"] or {}).get("figures")]
            if figures
            for name, label in AGES
        ],
        "slow_loop_ms": SLOW_LOOP_MS,
        "largest": max(
            (one["bytes"] for one in (data["health"] or NO_HEALTH)["database"]["tables"]), default=1
        ),
        "cluster_fails": does_cluster_fail((data["health"] or NO_HEALTH)["cluster"]),
        "workers": why["workers"],
        "reasons": why["reasons"],
        "unknown": why["unknown"],
        "runs_address": f"{frame.root}/dashboard/runs",
    }


def does_cluster_fail(cluster: Mapping[str, Any] | None) -> bool:
    """Return whether the last request to a cluster has failed; None is no cluster."""
    if cluster is None or cluster["lastFailure"] is None:
        return False
    answered_at, failed_at = cluster["answeredAt"], cluster["lastFailure"]["at"]
    return answered_at is None or parse_timestamp(answered_at) < parse_timestamp(failed_at)


PAGE: Final = Page("/dashboard/health", "health.html", load, view, "health", ("executions",))
