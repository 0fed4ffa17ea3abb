"""Dead letters of all workflows, grouped by cause: samples, replay after its plan, redrive, mute and discard."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from datetime import timedelta
from typing import TYPE_CHECKING, Any, Final
from urllib.parse import urlencode

from gateway.dashboard import bulk_acts, run_acts
from gateway.dashboard.addresses import page_address
from gateway.dashboard.formats import parse_instant
from gateway.dashboard.page import Page, PageData, PageFrame
from gateway.http import limits
from gateway.http.errors import ApiError

if TYPE_CHECKING:
    from datetime import datetime

    from gateway.dashboard.page_request import PageRequest

SHOWN_ROWS: Final = 5
PLANNED: Final = 50
"""Dead letters of a group that a plan is made for, the oldest."""
NODE_TYPES: Final = 100
SAMPLE_CHARACTERS: Final = 90
PATH: Final = "/dashboard/dead-letters"
FILTERS: Final = ("workflow_id", "trigger_type", "failure")
STATES: Final = ("redriving", "settled")
"""States other than open, whose dead letters are listed without groups."""
LISTED: Final = 50
MEANINGS: Final = {
    "rejected": "before a run began, such as those for a draft",
    "shed": "since the backlog of their workflow was full",
}
"""Outcomes of deliveries that have no run, each with its cause."""
REFUSED: Final = tuple(MEANINGS)
GROWING_SECONDS: Final = 600
"""Age of the newest dead letter up to which a group counts as growing."""
FAILURES: Final = (
    ("", "all", "all"),
    ("failed", "failed", "failed runs"),
    ("crashed", "crashed", "crashed 3 times"),
    ("timed-out", "timedOut", "timed out"),
)
"""Value of the filter, name of its number, and label, by kind of failure."""
KINDS: Final = (
    ("", "All triggers"),
    ("queue", "Messages"),
    ("email", "Mails"),
    ("webhook", "Webhooks"),
    ("event", "Events"),
    ("schedule", "Schedules"),
)


async def load(page: PageRequest) -> PageData:
    """Ask the API for the groups of dead letters, and for five samples, workflow and node types of the open group.

    Also for bulk operations and, without filters, for refused deliveries. With `plan` in the query, also for the plan
    of a replay of the group, and of its newest run alone. With `state`, the dead letters in that state replace all but
    groups and operations. Parts that are not asked for are None. Raises `ApiError`.
    """
    given = page.query
    filters = {name: given[name] for name in FILTERS if given.get(name)}
    nothing = dict.fromkeys(("rows", "workflow", "types", "plan", "newest", "settled"))
    recent = page.get_if_present(bulk_acts.PATH, limit=bulk_acts.RECENT_OPERATIONS)
    if given.get("state") in STATES:
        groups, operations, settled = await asyncio.gather(
            page.get("/api/v1/dead-letters/groups", **filters),
            recent,
            page.get(
                "/api/v1/dead-letters",
                **filters,
                state=given["state"],
                limit=LISTED,
                after=given.get("after"),
            ),
        )
        return {
            **nothing,
            "groups": groups,
            "operations": operations,
            "settled": settled,
            "without_run": {},
        }
    groups, operations, *refused = await asyncio.gather(
        page.get("/api/v1/dead-letters/groups", **filters, muted=given.get("muted")),
        recent,
        *(
            asyncio.sleep(0) if filters else page.get_if_present("/api/v1/deliveries", outcome=one, limit=1)
            for one in REFUSED
        ),
    )
    without_run = dict(zip(REFUSED, refused, strict=True))
    shown = _open_group(groups["groups"], given.get("group"))
    if shown is None:
        return {**nothing, "groups": groups, "operations": operations, "without_run": without_run}
    is_planned = bool(given.get("plan"))
    rows, workflow, types, plan, newest = await asyncio.gather(
        page.get(
            "/api/v1/dead-letters",
            workflow_id=shown["workflowId"],
            trigger_type=given.get("trigger_type"),
            group=shown["id"],
            # Newer ones of other groups would use up the rows that a list examines.
            until=_end_of(shown),
            limit=SHOWN_ROWS,
            after=given.get("after"),
        ),
        page.get_if_present(f"/api/v1/workflows/{shown['workflowId']}"),
        page.get("/api/v1/workflow-nodes", limit=NODE_TYPES),
        page.plan_if_allowed(
            "/api/v1/dead-letters/replay", filter=_select_planned(shown, given), limit=PLANNED
        )
        if is_planned
        else asyncio.sleep(0),
        _plan_newest(page, shown) if is_planned else asyncio.sleep(0),
    )
    return {
        "groups": groups,
        "operations": operations,
        "rows": rows,
        "workflow": workflow,
        "types": types,
        "plan": plan,
        "newest": newest,
        "settled": None,
        "without_run": without_run,
    }


async def _plan_newest(page: PageRequest, group: Mapping[str, Any]) -> Any:  # noqa: ANN401 - any JSON value
    """Return the plan of a replay of a group's newest run by the workflow as it is now; None if the API refuses it."""
    path = f"/api/v1/executions/{group['newestExecutionId']}/replay"
    try:
        return await page.plan_if_allowed(path, definition="current")
    except ApiError:
        # A workflow with errors, or a run that was taken up meanwhile: the plan of the group says so.
        return None


def _select_group(group: Mapping[str, Any], query: Mapping[str, str]) -> Mapping[str, str]:
    """Return the API filter that selects the dead letters of a group, by the trigger type of the page's query
    if it has one.
    """
    kind = {"triggerType": query["trigger_type"]} if query.get("trigger_type") else {}
    return {"workflowId": group["workflowId"], "group": group["id"], **kind}


def _select_planned(group: Mapping[str, Any], query: Mapping[str, str]) -> Mapping[str, Any]:
    """Return the filter of a replay: the dead letters of a group that `only` in the query names, else all of it."""
    chosen = [one for one in query.get("only", "").split(",") if one]
    selection = _select_group(group, query)
    return {**selection, "executionIds": chosen} if chosen else selection


def view(data: PageData, frame: PageFrame) -> Mapping[str, Any]:
    """Return the template values: the groups, and for the open one samples and the writes that a redrive may
    repeat.

    A redrive is a new attempt to process dead letters.
    """
    listed, rows = data["groups"], data["rows"]
    labels = {node["id"]: node.get("label") for node in (data["workflow"] or {}).get("nodes", ())}
    muted = "true" if frame.query.get("muted") == "true" else ""
    state = frame.query.get("state", "") if data["settled"] is not None else ""
    numbers = {"all": sum(listed["failures"].values()), **listed["failures"]}
    filters = {name: frame.query[name] for name in FILTERS if frame.query.get(name)}
    exported = {**filters, "state": state} if state else filters
    shown = _open_group(listed["groups"], frame.query.get("group"))
    operations = bulk_acts.describe_operations(data["operations"])
    return {
        "title": "Dead letters",
        "running": [one for one in operations if one["endedAt"] is None],
        "ended": [one for one in operations if one["endedAt"] is not None],
        "paces": bulk_acts.PACES,
        "crumbs": (("Dead letters", ""),),
        "count": listed["count"],
        "is_complete": listed["isComplete"],
        "oldest_at": listed["oldestAt"],
        "groups": [
            {
                **group,
                "is_open": group is shown,
                "bulk_count": min(group["count"], limits.BULK_OBJECTS),
                "selection": _select_group(group, frame.query),
                "is_growing": _is_growing(group, frame.now),
                "hit": describe_versions(group["versions"], group["definitions"]),
                "address": page_address(frame, PATH, {**filters, "muted": muted, "group": group["id"]}),
            }
            for group in listed["groups"]
        ],
        "rows": () if rows is None else rows["deadLetters"],
        "more": ""
        if shown is None or rows is None or not rows["next"]
        else page_address(
            frame, PATH, {**filters, "muted": muted, "group": shown["id"], "after": rows["next"]}
        ),
        "first": ""
        if shown is None or not frame.query.get("after")
        else page_address(frame, PATH, {**filters, "muted": muted, "group": shown["id"]}),
        "writes": list_writes(data["workflow"], data["types"]),
        "failures": [
            (
                label,
                numbers[name],
                page_address(frame, PATH, {**filters, "failure": failure}),
                not muted and not state and filters.get("failure", "") == failure,
            )
            for failure, name, label in FAILURES
        ],
        "kinds": [
            (
                label,
                page_address(frame, PATH, {**filters, "trigger_type": kind, "muted": muted, "state": state}),
                filters.get("trigger_type", "") == kind,
            )
            for kind, label in KINDS
        ],
        "state": state,
        "states": [
            (
                one.capitalize(),
                page_address(frame, PATH, {**filters, "failure": "", "state": one}),
                state == one,
            )
            for one in STATES
        ],
        "settled": data["settled"]["deadLetters"] if state else (),
        "more_settled": page_address(
            frame, PATH, {**filters, "state": state, "after": data["settled"]["next"]}
        )
        if state and data["settled"]["next"]
        else "",
        "without_run": [
            (outcome, MEANINGS[outcome], found)
            for outcome, found in data["without_run"].items()
            if found and found["count"]
        ],
        "planned_selection": _select_planned(shown, frame.query) if shown else {},
        "planned_count": min(data["plan"]["matched"], limits.BULK_OBJECTS) if data["plan"] else 0,
        "filters": filters,
        "export_query": f"?{urlencode(exported)}" if exported else "",
        "may_run": frame.may("workflows:execute"),
        "may_discard": frame.may("workflows:write"),
        "labels": labels,
        "is_muted": bool(muted),
        "muted_groups": listed["mutedGroups"],
        "muted_address": page_address(frame, PATH, {"muted": "true"}),
        "plan": describe_plan(data["plan"], data["newest"], labels),
        "user_id": frame.visitor["userId"] if frame.visitor else "",
        "sample_characters": SAMPLE_CHARACTERS,
    }


def _is_growing(group: Mapping[str, Any], now: datetime) -> bool:
    """Return whether a group has several dead letters, and the newest has arrived within ten minutes."""
    newest = parse_instant(group["lastAt"])
    return group["count"] > 1 and newest is not None and (now - newest).total_seconds() < GROWING_SECONDS


def describe_versions(versions: Sequence[int], definitions: int) -> str:
    """Return the versions that failed in words, such as `versions 13, 14 and 1 other definition`.

    `definitions` is the number of definitions that failed, of which some may be edits that no version has.
    """
    others = definitions - len(versions)
    if not versions:
        return "one definition" if definitions == 1 else f"{definitions} different definitions"
    numbers = ", ".join(map(str, versions))
    if not others:
        return f"only version {numbers}" if len(versions) == 1 else f"versions {numbers}"
    named = f"version {numbers}" if len(versions) == 1 else f"versions {numbers}"
    return f"{named} and {others} other definition{'' if others == 1 else 's'}"


def _end_of(group: Mapping[str, Any]) -> str | None:
    """Return the time, in the format of a query, before which all dead letters of a group were accepted."""
    newest = parse_instant(group["lastAt"])
    return None if newest is None else (newest + timedelta(milliseconds=1)).isoformat()


def _open_group(groups: Sequence[Mapping[str, Any]], group_id: str | None) -> Mapping[str, Any] | None:
    """Return the group with an id, else the first one; None without groups."""
    named = (group for group in groups if group["id"] == group_id)
    return next(named, groups[0] if groups else None)


def describe_plan(
    plan: Mapping[str, Any] | None, newest: Mapping[str, Any] | None, labels: Mapping[str, str | None]
) -> Mapping[str, Any] | None:
    """Return the plan of a group's replay for the page: counts of nodes, and the nodes that run again in its newest
    run.

    `newest` is the plan of that run, None if it was refused; `labels` are those of nodes by id. None without a plan.
    """
    if plan is None:
        return None
    nodes = [] if newest is None else [one for one in newest["nodes"] if one["decision"] != "reuse"]
    return {
        **run_acts.describe_plans(plan, labels),
        "matched": plan["matched"],
        "nodes": [(labels.get(one["nodeId"]) or one["nodeId"], one["effect"] == "write") for one in nodes],
        "seconds": None if newest is None else newest["predictedSeconds"],
    }


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
    """Return whether a node may write outside, by the effect of its type, which may depend on a field of its config."""
    chosen = config.get(effect.get("field", ""))
    cases = effect.get("cases") or {}
    found: str = (
        cases.get(chosen, effect["default"]) if isinstance(chosen, str | bool | int) else effect["default"]
    )
    return found == "write"


PAGE: Final = Page(PATH, "dead_letter_list.html", load, view, "dead-letters", ("executions",))
