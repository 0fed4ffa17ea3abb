"""Dead letters of all workflows, grouped by cause: samples, redrive with the count typed, and discard."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final
from urllib.parse import urlencode

from gateway.dashboard.addresses import list_address
from gateway.dashboard.page import Page, PageData, PageFrame

if TYPE_CHECKING:
    from gateway.dashboard.page_request import PageRequest

SHOWN_ROWS: Final = 5
NODE_TYPES: Final = 100
SAMPLE_CHARACTERS: Final = 90
PATH: Final = "/dashboard/dead-letters"
FILTERS: Final = ("workflow_id", "trigger_type")
KINDS: Final = (
    ("", "All"),
    ("queue", "Messages"),
    ("email", "Mails"),
    ("webhook", "Webhooks"),
    ("event", "Events"),
    ("schedule", "Schedules"),
)


async def load(page: PageRequest) -> PageData:
    """Ask the API for the groups of dead letters, and for five samples, workflow and node types of the open group.

    Without groups, the others are None. Raises `ApiError`.
    """
    given = page.query
    filters = {name: given[name] for name in FILTERS if given.get(name)}
    groups = await page.get("/api/v1/dead-letters/groups", **filters)
    shown = _open_group(groups["groups"], given.get("group"))
    if shown is None:
        return {"groups": groups, "rows": None, "workflow": None, "types": None}
    rows, workflow, types = await asyncio.gather(
        page.get(
            "/api/v1/dead-letters",
            workflow_id=shown["workflowId"],
            group=shown["id"],
            limit=SHOWN_ROWS,
            after=given.get("after"),
        ),
        page.get_if_present(f"/api/v1/workflows/{shown['workflowId']}"),
        page.get("/api/v1/workflow-nodes", limit=NODE_TYPES),
    )
    return {"groups": groups, "rows": rows, "workflow": workflow, "types": types}


def view(data: PageData, frame: PageFrame) -> Mapping[str, Any]:
    """Return the template values: the groups, and for the open one samples and the writes that a redrive may
    repeat.

    A redrive is a new attempt to process dead letters.
    """
    listed, rows = data["groups"], data["rows"]
    filters = {name: frame.query[name] for name in FILTERS if frame.query.get(name)}
    shown = _open_group(listed["groups"], frame.query.get("group"))
    return {
        "title": "Dead letters",
        "crumbs": (("Dead letters", ""),),
        "count": listed["count"],
        "count_is_lower_bound": listed["countIsLowerBound"],
        "oldest_at": listed["oldestAt"],
        "groups": [
            {
                **group,
                "is_open": group is shown,
                "address": list_address(frame, PATH, {**filters, "group": group["id"]}),
            }
            for group in listed["groups"]
        ],
        "rows": () if rows is None else rows["deadLetters"],
        "more": ""
        if shown is None or rows is None or not rows["next"]
        else list_address(frame, PATH, {**filters, "group": shown["id"], "after": rows["next"]}),
        "first": "" if not frame.query.get("after") else list_address(frame, PATH, filters),
        "writes": list_writes(data["workflow"], data["types"]),
        "kinds": [
            (
                label,
                list_address(frame, PATH, {**filters, "trigger_type": kind}),
                filters.get("trigger_type", "") == kind,
            )
            for kind, label in KINDS
        ],
        "filters": filters,
        "export_query": f"?{urlencode(filters)}" if filters else "",
        "may_run": frame.may("workflows:execute"),
        "may_discard": frame.may("workflows:write"),
        "labels": {node["id"]: node.get("label") for node in (data["workflow"] or {}).get("nodes", ())},
        "sample_characters": SAMPLE_CHARACTERS,
    }


def _open_group(groups: Sequence[Mapping[str, Any]], group_id: str | None) -> Mapping[str, Any] | None:
    """Return the group with an id, else the first one; None without groups."""
    named = (group for group in groups if group["id"] == group_id)
    return next(named, groups[0] if groups else None)


def list_writes(workflow: Mapping[str, Any] | None, types: Mapping[str, Any] | None) -> Sequence[str]:
    """Return the labels of the nodes of a workflow that may write outside, in the order of the graph.

    `types` is the API's list of node types. Empty if one of both is None, that is, not visible.
    """
    if workflow is None or types is None:
        return ()
    effects = {one["type"]: one["effect"] for one in types["nodes"]}
    return [
        str(node.get("label") or node["id"])
        for node in workflow["nodes"]
        if _may_write(effects.get(node["nodeId"], {"default": "write"}), node.get("config") or {})
    ]


def _may_write(effect: Mapping[str, Any], config: Mapping[str, Any]) -> bool:
    """Return whether a node writes outside by the effect of its type, which may depend on a field of its config."""
    chosen = config.get(effect.get("field", ""))
    cases = effect.get("cases") or {}
    found: str = (
        cases.get(chosen, effect["default"]) if isinstance(chosen, str | bool | int) else effect["default"]
    )
    return found == "write"


PAGE: Final = Page(PATH, "dead_letter_list.html", load, view, "dead-letters", ("executions",))
