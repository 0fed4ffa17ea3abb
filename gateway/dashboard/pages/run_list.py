"""List of runs, newest first."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final
from urllib.parse import quote

from gateway.dashboard import bulk_acts, run_acts
from gateway.dashboard.addresses import page_address
from gateway.dashboard.formats import look_of_wait, show_moment
from gateway.dashboard.page import Page, PageData, PageFrame

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


async def load(page: PageRequest) -> PageData:
    """Ask the API for 50 runs by the filters of the query, or for those that failed as the run `alike` did, for the
    names of 100 workflows, and for the latest bulk operations.

    With `act` in the query, also for the plan of that act on the runs that `only` names, or on all of the filters.
    Raises `ApiError`.
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
    chosen = run_acts.read_act(given, select_own(given))
    planned = await run_acts.plan(page, chosen) if chosen else None
    return {"runs": runs, "workflows": workflows, "operations": operations, "planned": planned}


def view(data: PageData, frame: PageFrame) -> Mapping[str, Any]:
    """Return the template values: the runs, the filters, the addresses of other pages of the list, and the acts on
    many runs with the plan of the chosen one.
    """
    runs = data["runs"]
    filters = {name: frame.query[name] for name in FILTERS if frame.query.get(name)}
    is_newest = frame.query.get("after", START) == START
    own = select_own(frame.query)
    may_run = frame.may("workflows:execute")
    operations = [
        one
        for one in bulk_acts.describe_operations(data["operations"])
        if one["action"].endswith("-executions")
    ]
    return {
        "title": "Runs",
        # A plan is made once: each hint about a run would make it again.
        "topics": () if data["planned"] else PAGE.topics,
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
                page_address(frame, PATH, {**filters, "status": status}),
                filters.get("status", "") == status,
            )
            for status, label in STATES
        ],
        "older": page_address(frame, PATH, {**filters, "after": runs["next"]}) if runs.get("next") else "",
        "newest": "" if is_newest else page_address(frame, PATH, filters),
        "is_newest": is_newest,
        "acts": [
            (verb, page_address(frame, PATH, {**own, "act": act})) for act, verb in run_acts.list_acts(own)
        ]
        if may_run
        else (),
        "picked_acts": [
            (verb, page_address(frame, PATH, {**own, "act": act}))
            for act, verb in run_acts.list_picked_acts(runs["executions"])
        ]
        if may_run
        else (),
        "list_page": page_address(frame, PATH, own),
        "act": run_acts.describe(data["planned"], frame.query, own) if may_run else None,
        "act_path": page_address(frame, PATH, {}),
        "act_filters": own,
        "running": [one for one in operations if one["endedAt"] is None],
        "ended": [one for one in operations if one["endedAt"] is not None],
        "paces": bulk_acts.PACES,
        "may_run": may_run,
    }


def select_own(query: Mapping[str, str]) -> Mapping[str, str]:
    """Return the parameters in the query of an address that choose the runs of the list: `alike`, or the
    filters that are set.
    """
    return (
        {ALIKE: query[ALIKE]}
        if ALIKE in query
        else {name: query[name] for name in FILTERS if query.get(name)}
    )


def describe_filters(filters: Mapping[str, str], names: Mapping[str, str]) -> Sequence[str]:
    """Return each filter besides `status` in words, such as `wait for a free slot` for a reason; `names` has the names
    of workflows by id, and an unknown id is shown itself.
    """
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
    """Return a time of the address as text in UTC; another text, which the API refuses, as it is."""
    try:
        return show_moment(text)
    except ValueError:
        return text


PAGE: Final = Page(PATH, "run_list.html", load, view, "runs", ("executions",))
