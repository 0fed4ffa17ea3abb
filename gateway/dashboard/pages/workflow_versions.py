"""Versions of a workflow: two of them compared, as a graph and by the paths of their configs."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final

from msgspec import Struct

from engine.values import MISSING, compare_values
from gateway.dashboard.addresses import page_address
from gateway.dashboard.formats import show_value
from gateway.dashboard.graph_map import draw_graph
from gateway.dashboard.page import Page, PageData, PageFrame
from gateway.dashboard.version_query import query_newest_versions
from gateway.dashboard.visibility import list_names

if TYPE_CHECKING:
    from engine.values import PathChange
    from gateway.dashboard.page_request import PageRequest

PATH: Final = "/dashboard/workflows/{id}/versions"
CURRENT: Final = "current"
SHOWN_VERSIONS: Final = 1_000
"""Newest versions that are listed, as many as the API lists at once."""
ACTS: Final = ("restore", "deploy")
"""Acts on a version, which show its findings first."""
RECENT_SECONDS: Final = 60
"""Age of the names of users that the page may show again."""
MAX_CHANGES: Final = 100
"""Changes that are shown of each node, or of the settings."""
CONTAINERS: Final = (("settings", "Settings"), ("config", "Config of the workflow"), ("fields", "Workflow"))


class VersionValueChange(Struct, frozen=True):
    """Changed value of a path; None on a side without one."""

    path: str
    before: str | None
    after: str | None


class ChangedPart(Struct, frozen=True):
    """Node, connections or settings that differ, with the changes in them."""

    title: str
    state: str
    """`added`, `removed`, or `changed`."""
    changes: Sequence[VersionValueChange]
    node_id: str = ""


async def load(page: PageRequest) -> PageData:
    """Ask the API for the workflow, its newest versions and the users, then for the two versions that the query
    chooses, their differences, and the findings of the version to restore or deploy.

    Without versions, all but the first three are None; the findings also without a version to restore or deploy.
    Raises `ApiError`.
    """
    path = f"/api/v1/workflows/{page.parameters['id']}"
    workflow = await page.get(path)
    versions, users = await asyncio.gather(
        page.get(f"{path}/versions", **query_newest_versions(workflow, SHOWN_VERSIONS)),
        page.get_recent("/api/v1/auth/users", seconds=RECENT_SECONDS),
    )
    before, after = choose_versions(versions["versions"], page.query)
    if not before:
        none = dict.fromkeys(("diff", "before", "after", "findings"))
        return {"workflow": workflow, "versions": versions, "users": users, **none}
    chosen = find_chosen_version(versions["versions"], page.query)
    diff, first, last, findings = await asyncio.gather(
        page.get(f"{path}/versions/{before}/diff/{after}"),
        _load_snapshot(page, path, before, workflow),
        _load_snapshot(page, path, after, workflow),
        page.preview(f"{path}/versions/{chosen}/validate") if chosen else _no_findings(),
    )
    return {
        "workflow": workflow,
        "versions": versions,
        "users": users,
        "diff": diff,
        "before": first,
        "after": last,
        "findings": findings,
    }


async def _no_findings() -> None:
    """Return None, in place of the findings of a version that nobody wants to restore or deploy."""


async def _load_snapshot(
    page: PageRequest, path: str, version: str, workflow: Mapping[str, Any]
) -> Mapping[str, Any]:
    """Return the definition of a version; `current` is the workflow as it is now."""
    if version == CURRENT:
        return workflow
    snapshot: Mapping[str, Any] = (await page.get(f"{path}/versions/{version}"))["snapshot"]
    return snapshot


def choose_versions(versions: Sequence[Mapping[str, Any]], query: Mapping[str, str]) -> tuple[str, str]:
    """Return the two versions to compare by the query; by default the newest one and `current`, the workflow as it is
    now.

    `versions` begin with the oldest. The first is empty if there is no version.
    """
    known = [CURRENT, *(str(one["version"]) for one in versions)]
    newest = known[-1] if len(known) > 1 else ""
    before, after = query.get("from", newest), query.get("to", CURRENT)
    return (before if before in known else newest, after if after in known else CURRENT)


def find_chosen_version(versions: Sequence[Mapping[str, Any]], query: Mapping[str, str]) -> str:
    """Return the number of the version that the query wants to restore or deploy; empty without a known one."""
    chosen = query.get("version", "")
    is_known = any(str(one["version"]) == chosen for one in versions)
    return chosen if is_known and query.get("act") in ACTS else ""


def view(data: PageData, frame: PageFrame) -> Mapping[str, Any]:
    """Return the template values: the graph of both versions as one, and the changes by part and path."""
    workflow, versions, diff = data["workflow"], data["versions"]["versions"], data["diff"]
    before, after = choose_versions(versions, frame.query)
    page_path = f"/dashboard/workflows/{workflow['id']}"
    return {
        "title": f"Versions of {workflow['name']}",
        "crumbs": (
            ("Workflows", f"{frame.root}/dashboard/workflows"),
            (workflow["name"], frame.root + page_path),
            ("Versions", ""),
        ),
        "workflow": workflow,
        "versions": versions[::-1],
        "user_names": list_names(data["users"], frame),
        "current_version": data["versions"]["currentVersion"],
        "from_version": before,
        "to_version": after,
        "choices": [(CURRENT, "as it is now")]
        + [(str(one["version"]), f"{one['version']} {one['versionTag']}".strip()) for one in versions[::-1]],
        "map": draw_difference(data["before"], data["after"], diff, frame.query.get("at", ""))
        if diff
        else None,
        "here": page_address(frame, f"{page_path}/versions", {"from": before, "to": after}),
        "parts": list_parts(data["before"], data["after"], diff) if diff else (),
        "page_path": frame.root + page_path,
        "api": f"/api/v1/workflows/{workflow['id']}",
        "may_write": frame.may("workflows:write"),
        "is_active": workflow["status"] == "active",
        "chosen": find_chosen_version(versions, frame.query),
        "act": frame.query.get("act", ""),
        "errors": data["findings"]["errors"] if data["findings"] else (),
        "cautions": data["findings"]["warnings"] if data["findings"] else (),
    }


def draw_difference(
    before: Mapping[str, Any], after: Mapping[str, Any], diff: Mapping[str, Any], at: str = ""
) -> Any:  # noqa: ANN401 - drawn shapes
    """Return the map of the later graph with the removed nodes of the earlier one, each with its change as state.

    States are `same`, `added`, `removed` and `changed`. A large graph is shown around the first change, or around the
    position `at` of the overview.
    """
    removed = {node["id"] for node in diff["nodes"]["removed"]}
    states = dict.fromkeys((node["id"] for node in after["nodes"]), "same")
    states |= dict.fromkeys(removed, "removed")
    states |= dict.fromkeys((node["id"] for node in diff["nodes"]["added"]), "added")
    states |= dict.fromkeys((one["id"] for one in diff["nodes"]["changed"] if one["changes"]), "changed")
    nodes = [*after["nodes"], *(node for node in before["nodes"] if node["id"] in removed)]
    connections = [*after["connections"], *diff["connections"]["removed"]]
    focus = next((node_id for node_id, state in states.items() if state != "same"), "")
    return draw_graph(nodes, connections, states, focus="" if at else focus, at=at)


def list_parts(
    before: Mapping[str, Any], after: Mapping[str, Any], diff: Mapping[str, Any]
) -> Sequence[ChangedPart]:
    """Return every part that differs between two versions: nodes, then connections, then settings and other
    containers.
    """
    labels = {node["id"]: node["label"] for graph in (before, after) for node in graph["nodes"]}
    parts = [ChangedPart(node["label"], "added", (), node["id"]) for node in diff["nodes"]["added"]]
    parts += [ChangedPart(node["label"], "removed", (), node["id"]) for node in diff["nodes"]["removed"]]
    parts += [
        ChangedPart(labels[one["id"]], "changed", _list_changes(one["changes"]), one["id"])
        for one in diff["nodes"]["changed"]
        if one["changes"]
    ]
    connections = _list_connections(before, after, labels)
    if connections:
        parts.append(ChangedPart("Connections", "changed", connections))
    parts += [
        ChangedPart(title, "changed", _list_changes(diff[name])) for name, title in CONTAINERS if diff[name]
    ]
    return parts


def _list_connections(
    before: Mapping[str, Any], after: Mapping[str, Any], labels: Mapping[str, str]
) -> Sequence[VersionValueChange]:
    """Return the connections that one side lacks; a connection with another id alone is the same."""
    old, new = [
        dict.fromkeys(
            (edge["sourceNodeId"], edge["sourcePort"], edge["targetNodeId"], edge["targetPort"])
            for edge in graph["connections"]
        )
        for graph in (before, after)
    ]

    def show(ends: tuple[str, str, str, str]) -> str:
        source, port, target, _ = ends
        by_port = "" if port == "output" else f" ({port})"
        return f"{labels.get(source, source)}{by_port} → {labels.get(target, target)}"

    return [
        *(VersionValueChange("", show(ends), None) for ends in old if ends not in new),
        *(VersionValueChange("", None, show(ends)) for ends in new if ends not in old),
    ]


def _list_changes(changes: Mapping[str, Mapping[str, Any]]) -> Sequence[VersionValueChange]:
    """Return the changes of fields, each down to the paths that differ; at most 100."""
    found: list[VersionValueChange] = []
    for name, change in changes.items():
        difference = compare_values(
            change.get("before", MISSING), change.get("after", MISSING), at_most=MAX_CHANGES
        )
        found += [_show_change(name, one) for one in difference.changes]
    return found[:MAX_CHANGES]


def _show_change(name: str, change: PathChange) -> VersionValueChange:
    """Return a change as text: its path prefixed with the field's name, the old and the new value.

    The old value of an addition and the new value of a removal are None.
    """
    joint = "" if not change.path or change.path.startswith("[") else "."
    return VersionValueChange(
        f"{name}{joint}{change.path}",
        None if change.before is MISSING else show_value(change.before),
        None if change.after is MISSING else show_value(change.after),
    )


PAGE: Final = Page(PATH, "workflow_versions.html", load, view, "workflows")
