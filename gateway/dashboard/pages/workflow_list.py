"""List of workflows."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Final

from gateway.dashboard.addresses import list_address
from gateway.dashboard.page import Page, PageData, PageFrame

if TYPE_CHECKING:
    from gateway.dashboard.page_request import PageRequest

LIMIT: Final = 50
PATH: Final = "/dashboard/workflows"
FILTERS: Final = ("status", "tag", "search")
STATES: Final = (
    ("", "All"),
    ("active", "Active"),
    ("paused", "Paused"),
    ("draft", "Draft"),
    ("archived", "Archived"),
)


async def load(page: PageRequest) -> PageData:
    """Ask the API for 50 workflows, their number by status, and the 50 newest failed runs; raises `ApiError`."""
    given = page.query
    filters = {name: given[name] for name in FILTERS if given.get(name)}
    workflows, stats, failed = await asyncio.gather(
        page.get(
            "/api/v1/workflows", **filters, limit=LIMIT, offset=given.get("offset"), sort="updatedAt:desc"
        ),
        page.get("/api/v1/workflows/stats"),
        page.get("/api/v1/executions", status="failed", after="start", limit=LIMIT),
    )
    return {"workflows": workflows, "stats": stats, "failed": failed}


def view(data: PageData, frame: PageFrame) -> Mapping[str, Any]:
    """Return the template values: the workflows, each with its last of the newest failures, and the filters."""
    listed = data["workflows"]
    filters = {name: frame.query[name] for name in FILTERS if frame.query.get(name)}
    shown = listed["offset"] + len(listed["workflows"])
    failures: dict[str, Mapping[str, Any]] = {}
    for run in data["failed"]["executions"]:
        failures.setdefault(run["workflowId"], run)
    return {
        "title": "Workflows",
        "crumbs": (("Workflows", ""),),
        "workflows": [{**one, "failure": failures.get(one["id"])} for one in listed["workflows"]],
        "count": listed["count"],
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


PAGE: Final = Page(PATH, "workflow_list.html", load, view, "workflows", ("executions",))
