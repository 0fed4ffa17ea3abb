"""List of workflows with their pods, newest runs and the counts of a day, the worst first."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final

from gateway.dashboard.addresses import page_address
from gateway.dashboard.formats import look_of, look_of_pod, show_count, show_share
from gateway.dashboard.hour_charts import SPARK_HEIGHT, draw_bars
from gateway.dashboard.page import Page, PageData, PageFrame

if TYPE_CHECKING:
    from gateway.dashboard.page_request import PageRequest

LIMIT: Final = 50
SHOWN_TEMPLATES: Final = 10
EXAMPLE_TEMPLATE: Final = "wf_tmpl_penguin-report"
"""Shipped template that brings its input, for a first run."""
PATH: Final = "/dashboard/workflows"
FILTERS: Final = ("status", "tag", "search", "state")
ORDERS: Final = (("", "Worst first"), ("last-run", "Last run"), ("name", "Name"))
STATES: Final = (
    ("failing", "failing"),
    ("unfinished", "unfinished"),
    ("awake", "awake"),
    ("asleep", "asleep"),
)
"""States of workflows by their runs and pods."""
STATUSES: Final = (
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
    none, or if the query asks for a new one.

    Raises `ApiError`.
    """
    given = page.query
    filters = {name: given[name] for name in FILTERS if given.get(name)}
    workflows, stats = await asyncio.gather(
        page.get(
            "/api/v1/workflows/activity",
            **filters,
            order=given.get("order"),
            limit=LIMIT,
            offset=given.get("offset"),
        ),
        page.get("/api/v1/workflows/stats"),
    )
    wants_new = "new" in given or (not filters and workflows["count"] == 0)
    templates = await page.get("/api/v1/workflows/templates", limit=SHOWN_TEMPLATES) if wants_new else None
    return {"workflows": workflows, "stats": stats, "templates": templates}


def view(data: PageData, frame: PageFrame) -> Mapping[str, Any]:
    """Return the template values: the workflows, each with its state, bars of its runs per hour and share of failures,
    and the filters.
    """
    listed = data["workflows"]
    filters = {name: frame.query[name] for name in FILTERS if frame.query.get(name)}
    kept = {**filters, **({"order": frame.query["order"]} if frame.query.get("order") else {})}
    shown = listed["offset"] + len(listed["workflows"])
    templates = [] if data["templates"] is None else data["templates"]["templates"]
    is_new = "new" in frame.query and frame.may("workflows:write")
    example = next((one for one in templates if one["id"] == EXAMPLE_TEMPLATE), None)
    return {
        "title": "Workflows",
        "crumbs": (("Workflows", ""),)
        if not is_new
        else (("Workflows", frame.root + PATH), ("New workflow", "")),
        "is_new": is_new,
        "new_page": page_address(frame, PATH, {"new": "1"}),
        "workflows": [describe_workflow(one) for one in listed["workflows"]],
        "count": listed["count"],
        "templates": [one for one in templates if one is not example],
        "example": example,
        "may_write": frame.may("workflows:write"),
        "may_run": frame.may("workflows:execute"),
        "shown": shown,
        "chips": list_chips(data, frame, kept),
        "orders": [
            (label, page_address(frame, PATH, {**filters, "order": order}), kept.get("order", "") == order)
            for order, label in ORDERS
        ],
        "filters": filters,
        "order": kept.get("order", ""),
        "next": page_address(frame, PATH, {**kept, "offset": str(shown)}) if shown < listed["count"] else "",
    }


def list_chips(
    data: PageData, frame: PageFrame, kept: Mapping[str, str]
) -> Sequence[tuple[str, int, str, bool]]:
    """Return label, number, address and whether it is chosen for each filter above the list: all, by state, and by
    status.

    States are those of runs and pods, such as `failing`; statuses are `active` and others. The numbers count workflows
    that the visitor may see. `kept` are the filters and the order of the page. The address of a chosen filter leads to
    the page without it.
    """
    everything = {name: value for name, value in kept.items() if name not in {"state", "status"}}
    states, statuses = data["workflows"]["states"], data["stats"]["readable"]
    is_whole = not {"state", "status"} & set(kept)
    chips = [("All", statuses["total"], page_address(frame, PATH, everything), is_whole)]
    for name, choices, numbers in (("state", STATES, states), ("status", STATUSES, statuses)):
        for value, label in choices:
            is_on = kept.get(name) == value
            address = page_address(frame, PATH, {**kept, name: "" if is_on else value})
            chips.append((label, numbers[value], address, is_on))
    return chips


def describe_workflow(workflow: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return a workflow with its first trigger, its pods and newest run as looks, its bars, and its share of failures.

    `state` is the look of the newest run, None without one. `needs_person` is true if that run failed or the pods can't
    start, which keeps runs waiting.
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
