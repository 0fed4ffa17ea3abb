"""Overview: problems that need a person, reasons of waits, failures of a day by cause, and the next schedules."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from datetime import timedelta
from typing import TYPE_CHECKING, Any, Final

from gateway.dashboard.page import Page, PageData, PageFrame
from models.timestamps import format_timestamp

if TYPE_CHECKING:
    from gateway.dashboard.page_request import PageRequest

DAY: Final = timedelta(days=1)
NAMED_WORKFLOWS: Final = 100
GROUPED_FAILURES: Final = 100
"""Number of the newest failed runs that are grouped."""
DRIFT_SECONDS: Final = 10.0
"""Time for which the findings of drift are shown again: an open page loads itself up to four times a second."""
SHOWN_SCHEDULES: Final = 5
PATH: Final = "/dashboard/overview"
NEEDS_PERSON: Final = frozenset({"change", "escalate"})
"""Kinds of reasons that do not end by themselves."""


async def load(page: PageRequest) -> PageData:
    """Ask the API for reasons, drift, workflow counts and names, and the runs of the last 24 hours with 100
    failures.

    Also for the next five schedules. Drift is None unless the visitor is an admin. Raises `ApiError`.
    """
    # Whole minutes, so that an unchanged page keeps its tag for a minute.
    since = format_timestamp((page.now - DAY).replace(second=0, microsecond=0))
    why, drift, stats, failed, completed, started, schedules = await asyncio.gather(
        page.get("/api/v1/why"),
        page.get_recent("/api/v1/admin/drift", seconds=DRIFT_SECONDS),
        page.get("/api/v1/workflows/stats"),
        page.get("/api/v1/executions", status="failed", since=since, after="start", limit=GROUPED_FAILURES),
        page.get("/api/v1/executions", status="completed", since=since, after="start", limit=1),
        page.get("/api/v1/executions", since=since, after="start", limit=1),
        page.get("/api/v1/schedules", limit=SHOWN_SCHEDULES),
    )
    # Names are needed for failures alone.
    names = failed["executions"] and await page.get("/api/v1/workflows", limit=NAMED_WORKFLOWS)
    return {
        "why": why,
        "drift": drift,
        "stats": stats,
        "workflows": names or {"workflows": ()},
        "failed": failed,
        "completed": completed,
        "started": started,
        "schedules": schedules,
    }


def view(data: PageData, frame: PageFrame) -> Mapping[str, Any]:  # noqa: ARG001 - the signature of views
    """Return the template values: problems, counts of the last 24 hours, reasons of waits, and failures by cause."""
    reasons = data["why"]["reasons"]
    findings = [] if data["drift"] is None else data["drift"]["findings"]
    return {
        "title": "Overview",
        "crumbs": (("Overview", ""),),
        "needs": [reason for reason in reasons if reason["kind"] in NEEDS_PERSON],
        "waits": [reason for reason in reasons if reason["kind"] not in NEEDS_PERSON],
        "findings": [finding for finding in findings if finding["severity"] == "critical"],
        "workers": data["why"]["workers"],
        "stats": data["stats"],
        "counts": [
            ("runs in 24 h", show_bounded(data["started"]), ""),
            ("completed", show_bounded(data["completed"]), "completed"),
            ("failed", show_bounded(data["failed"]), "failed"),
        ],
        "failures": group_failures(data["failed"]["executions"]),
        "names": {one["id"]: one["name"] for one in data["workflows"]["workflows"]},
        "schedules": [one for one in data["schedules"]["schedules"] if one["isActive"] and one["nextRuns"]],
    }


def show_bounded(listed: Mapping[str, Any]) -> str:
    """Return the count of a list as text, such as `10,000+` where only a lower bound is known."""
    return f"{listed['count']:,}" + ("+" if listed.get("countIsLowerBound") else "")


def group_failures(runs: Sequence[Mapping[str, Any]]) -> Sequence[Mapping[str, Any]]:
    """Return failed runs, the newest first, grouped by workflow, node and error code, in the order of their
    newest failure.

    Each group has its count, first and last time, and the id of its newest run as a sample.
    """
    groups: dict[tuple[str, str | None, str], dict[str, Any]] = {}
    for run in runs:
        error = run["error"] or {"code": "unknown", "message": "", "nodeId": None}
        cause = error.get("cause") or error
        key = (run["workflowId"], cause.get("nodeId") or error.get("nodeId"), cause["code"])
        newest = {
            "workflowId": key[0],
            "nodeId": key[1],
            "code": key[2],
            "message": cause["message"],
            "sample": run["id"],
            "last": run["createdAt"],
            "count": 0,
        }
        group = groups.setdefault(key, newest)
        group["count"] += 1
        group["first"] = run["createdAt"]
    return list(groups.values())


PAGE: Final = Page(PATH, "overview.html", load, view, "overview", ("executions",))
