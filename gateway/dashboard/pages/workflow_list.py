"""List of workflows with their pods, newest runs and the counts of a day, the worst first."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Final

from gateway.dashboard.addresses import list_address
from gateway.dashboard.formats import look_of, look_of_pod, show_count, show_share
from gateway.dashboard.hour_charts import SPARK_HEIGHT, draw_bars
from gateway.dashboard.page import Page, PageData, PageFrame

if TYPE_CHECKING:
    from gateway.dashboard.page_request import PageRequest

LIMIT: Final = 50
SHOWN_TEMPLATES: Final = 10
PATH: Final = "/dashboard/workflows"
FILTERS: Final = ("status", "tag", "search")
STATES: Final = (
    ("", "All"),
    ("active", "Active"),
    ("paused", "Paused"),
    ("draft", "Draft"),
    ("archived", "Archived"),
)
TRIGGERS: Final[Mapping[str, str]] = {
    "queue": "Queue",
    "email": "Mail",
    "event": "Event",
    "schedule": "Schedule",
    "webhook": "Webhook",
}
BY_HAND: Final = ("manual", "Manual")


async def load(page: PageRequest) -> PageData:
    """Ask the API for 50 workflows with their activity, and for their number by status; for templates if there are
    none.

    Raises `ApiError`.
    """
    given = page.query
    filters = {name: given[name] for name in FILTERS if given.get(name)}
    workflows, stats = await asyncio.gather(
        page.get("/api/v1/workflows/activity", **filters, limit=LIMIT, offset=given.get("offset")),
        page.get("/api/v1/workflows/stats"),
    )
    is_first = not filters and workflows["count"] == 0
    templates = await page.get("/api/v1/workflows/templates", limit=SHOWN_TEMPLATES) if is_first else None
    return {"workflows": workflows, "stats": stats, "templates": templates}


def view(data: PageData, frame: PageFrame) -> Mapping[str, Any]:
    """Return the template values: the workflows with state, bars and shares, and the filters."""
    listed = data["workflows"]
    filters = {name: frame.query[name] for name in FILTERS if frame.query.get(name)}
    shown = listed["offset"] + len(listed["workflows"])
    return {
        "title": "Workflows",
        "crumbs": (("Workflows", ""),),
        "workflows": [describe_workflow(one) for one in listed["workflows"]],
        "count": listed["count"],
        "templates": [] if data["templates"] is None else data["templates"]["templates"],
        "may_write": frame.may("workflows:write"),
        "shown": shown,
        "states": [
            (
                label,
                data["stats"].get(status or "total", 0),
                list_address(frame, PATH, {**filters, "status": status}),
                filters.get("status", "") == status,
            )
            for status, label in STATES
        ],
        "filters": filters,
        "next": list_address(frame, PATH, {**filters, "offset": str(shown)})
        if shown < listed["count"]
        else "",
    }


def describe_workflow(workflow: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return a workflow with its trigger, the looks of its pods and of its state, its bars, and its share of
    failures.

    The state is the worse of pods and newest run: pods that can't start keep runs waiting.
    """
    run = workflow["newestRun"]
    cannot_start = workflow["deploymentStatus"] == "failed"
    ended = workflow["completed"] + workflow["failed"]
    kinds = workflow["triggers"]
    return {
        **workflow,
        "trigger": (kinds[0], TRIGGERS[kinds[0]]) if kinds else BY_HAND,
        "pod": look_of_pod(workflow["deploymentStatus"]),
        "state": None if run is None else look_of(run["status"]),
        "cannot_start": cannot_start,
        "needs_person": cannot_start or (run is not None and run["status"] == "failed"),
        "bars": draw_bars(
            [hour["accepted"] for hour in workflow["hours"]],
            [hour["failed"] for hour in workflow["hours"]],
            height=SPARK_HEIGHT,
        ),
        "bars_say": f"{show_count(workflow['accepted'])} runs in 24 hours, {show_count(workflow['failed'])} failed",
        "share": show_share(workflow["failed"], ended) if ended else "",
    }


PAGE: Final = Page(PATH, "workflow_list.html", load, view, "workflows", ("executions",))
