"""List of runs, newest first."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final
from urllib.parse import quote

from gateway.dashboard import bulk_acts
from gateway.dashboard.addresses import list_address
from gateway.dashboard.formats import look_of_wait, parse_moment, show_moment
from gateway.dashboard.page import Page, PageData, PageFrame
from gateway.http import limits

if TYPE_CHECKING:
    from gateway.dashboard.page_request import PageRequest

LIMIT: Final = 50
START: Final = "start"
"""Cursor of the first page, as the API has it: pages by cursor cost the same however many runs there are."""
PATH: Final = "/dashboard/runs"
NAMED_WORKFLOWS: Final = 100
ALIKE: Final = "alike"
"""Parameter of the address: id of a failed run; the list then has the runs that failed in the same way."""
FILTERS: Final = ("status", "reason", "workflow_id", "trigger_type", "parent_id", "since", "until")
STATES: Final = (
    ("", "All"),
    ("running", "Running"),
    ("pending", "Pending"),
    ("waiting", "Waiting"),
    ("failed", "Failed"),
    ("completed", "Completed"),
)
BULK_ACTS: Final = {"pending": "cancel", "running": "cancel", "waiting": "cancel", "failed": "retry"}
"""Act of a bulk operation on all runs in a state."""
BULK_FIELDS: Final = {
    "status": "status",
    "workflow_id": "workflowId",
    "trigger_type": "triggerType",
    "since": "createdAfter",
    "until": "createdBefore",
}
"""Field of a bulk operation's filter for each filter of the list that it has."""


async def load(page: PageRequest) -> PageData:
    """Ask the API for 50 runs by the filters of the query, or for those that failed as one did, for the names of 100
    workflows, and for the latest bulk operations; with `act` in the query, also for the number of runs that such an
    act would change. Raises `ApiError`.
    """
    given = page.query
    filters = {name: given[name] for name in FILTERS if given.get(name)}
    if ALIKE in given:
        filters = {}
        listing = page.get(f"/api/v1/executions/{quote(given[ALIKE], safe='')}/same-failures")
    else:
        listing = page.get("/api/v1/executions", **filters, limit=LIMIT, after=given.get("after", START))
    runs, workflows, operations = await asyncio.gather(
        listing,
        page.get("/api/v1/workflows", limit=NAMED_WORKFLOWS),
        page.get_if_present(bulk_acts.PATH, limit=bulk_acts.RECENT_OPERATIONS),
    )
    act = find_bulk_act(filters)
    counted = None
    if act and given.get("act") == act:
        counted = await page.plan_if_allowed(
            f"/api/v1/executions/bulk-{act}", filter=select_runs(filters), limit=1
        )
    return {"runs": runs, "workflows": workflows, "operations": operations, "counted": counted}


def view(data: PageData, frame: PageFrame) -> Mapping[str, Any]:
    """Return the template values: the runs, the filters, the addresses of other pages of the list, and the act on all
    runs of the filter.
    """
    runs, counted = data["runs"], data["counted"]
    filters = {name: frame.query[name] for name in FILTERS if frame.query.get(name)}
    is_newest = frame.query.get("after", START) == START
    act = "" if ALIKE in frame.query else find_bulk_act(filters)
    operations = [
        one
        for one in bulk_acts.describe_operations(data["operations"])
        if one["action"].endswith("-executions")
    ]
    return {
        "title": "Runs",
        "crumbs": (("Runs", ""),),
        "runs": runs["executions"],
        "count": runs["count"],
        "count_is_lower_bound": runs["countIsLowerBound"],
        "names": {one["id"]: one["name"] for one in data["workflows"]["workflows"]},
        "filters": filters,
        "tags": [f"failed the same way as {frame.query[ALIKE]}"]
        if ALIKE in frame.query
        else describe_filters(filters, {one["id"]: one["name"] for one in data["workflows"]["workflows"]}),
        "states": [
            (
                label,
                list_address(frame, PATH, {**filters, "status": status}),
                filters.get("status", "") == status,
            )
            for status, label in STATES
        ],
        "older": list_address(frame, PATH, {**filters, "after": runs["next"]}) if runs.get("next") else "",
        "newest": "" if is_newest else list_address(frame, PATH, filters),
        "is_newest": is_newest,
        "act": act if frame.may("workflows:execute") else "",
        "act_address": list_address(frame, PATH, {**filters, "act": act}),
        "list_page": list_address(frame, PATH, filters),
        "selection": select_runs(filters) if counted else {},
        "act_count": min(counted["matched"], limits.BULK_OBJECTS) if counted else 0,
        "is_counted": counted is not None,
        "is_cut": counted is not None and counted["matched"] > limits.BULK_OBJECTS,
        "running": [one for one in operations if one["endedAt"] is None],
        "ended": [one for one in operations if one["endedAt"] is not None],
        "paces": bulk_acts.PACES,
        "may_run": frame.may("workflows:execute"),
    }


def find_bulk_act(filters: Mapping[str, str]) -> str:
    """Return the act on all runs of a filter: `cancel` for a state of unfinished ones, `retry` for failed ones.

    Empty without such a state, and for a filter that bulk operations lack, such as the reason of a wait.
    """
    if not filters.keys() <= BULK_FIELDS.keys():
        return ""
    return BULK_ACTS.get(filters.get("status", ""), "")


def select_runs(filters: Mapping[str, str]) -> Mapping[str, str]:
    """Return the filter of a bulk operation for the filters of the list, whose times may lack a zone."""
    return {
        BULK_FIELDS[name]: parse_moment(value).isoformat() if name in {"since", "until"} else value
        for name, value in filters.items()
    }


def describe_filters(filters: Mapping[str, str], names: Mapping[str, str]) -> Sequence[str]:
    """Return the filters besides the state in words, such as `wait for a free slot`; `names` are those of workflows."""
    words = {
        "reason": lambda value: " or ".join(f"wait {look_of_wait(one)[0]}" for one in value.split(",")),
        "workflow_id": lambda value: f"of {names.get(value, value)}",
        "trigger_type": lambda value: f"trigger {value}",
        "parent_id": lambda value: f"started by {value}",
        "since": lambda value: f"accepted from {_show_time(value)}",
        "until": lambda value: f"accepted before {_show_time(value)}",
    }
    return [words[name](value) for name, value in filters.items() if name in words]


def _show_time(text: str) -> str:
    """Return a time of the address as text in UTC; one that the API refuses as it is."""
    try:
        return show_moment(text)
    except ValueError:
        return text


PAGE: Final = Page(PATH, "run_list.html", load, view, "runs", ("executions",))
