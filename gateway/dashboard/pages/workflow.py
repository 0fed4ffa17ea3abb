"""Page of one workflow: its graph with figures, a node to look at and mend, a form that runs it, and its runs."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final

from gateway.dashboard.addresses import page_address
from gateway.dashboard.form_fields import list_inputs
from gateway.dashboard.formats import show_duration, show_moment, show_share, show_whole_json
from gateway.dashboard.graph_map import draw_graph
from gateway.dashboard.page import Page, PageData, PageFrame
from gateway.dashboard.pages.run_node import MODEL_TYPES
from gateway.dashboard.resource_fields import list_resource_fields, load_resources
from gateway.dashboard.version_query import query_newest_versions
from gateway.dashboard.visibility import list_names, list_users, may_change

if TYPE_CHECKING:
    from gateway.dashboard.page_request import PageRequest

SHOWN_ROWS: Final = 10
SHOWN_VERSIONS: Final = 5
NAMED_MODELS: Final = 100
VALIDATED_NODES: Final = 300
"""Number of nodes up to which each load of the page validates the graph."""
MAX_INPUT_CHARACTERS: Final = 200_000
"""Length of an input up to which it fills the form."""
LAST: Final = "last"
EXAMPLE_INPUT: Final = "exampleInput"
"""Key of a workflow's config with inputs for its first run."""
RECENT_SECONDS: Final = 60
"""Age of the names of users that the page may show again."""
UNRESOLVED: Final = "unresolved-mapping"
"""Type of the findings about paths that find nothing."""
PATH: Final = "/dashboard/workflows/{id}"
KEPT: Final = ("node", "view", "at", "input")
OBJECTS: Final = ("why", "lifecycle", "statistics", "log-level")
TIMES: Final = {"why": "asOf", "statistics": "since"}
"""Fields with the time of the answer, or of its begin, which no page shows, by objects."""
INTAKE_TRIGGERS: Final = frozenset({"webhook", "queue-trigger", "email-trigger", "event-trigger"})
OF_INTAKE: Final[Mapping[str, Mapping[str, object]]] = {
    "deliveries": {"limit": SHOWN_ROWS, "after": "start"},
    "dead-letters": {"limit": SHOWN_ROWS},
    "inbound-address": {},
}
"""Queries of the lists and objects of workflows whose runs come from outside; a cursor avoids counting all rows."""


async def load(page: PageRequest) -> PageData:
    """Ask the API for a workflow, and for the related objects that its visitor may see; others are None.

    They are ten runs, lifecycle with deployment, its explanation, statistics, log level, deliveries, dead letters, five
    versions, users, address, schedule, the last run's graph and (by the query) input, findings (of graphs of up to 300
    nodes, or with a selected node), models and their costs of the month for a graph with such nodes, the selected
    node's schema, and the data sources and models that its config may name. Raises `ApiError`.
    """
    workflow_id = page.parameters["id"]
    path = f"/api/v1/workflows/{workflow_id}"
    workflow, runs, *objects = await asyncio.gather(
        page.get(path),
        page.get_if_present("/api/v1/executions", workflow_id=workflow_id, after="start", limit=SHOWN_ROWS),
        *(page.get_if_present(f"{path}/{name}") for name in OBJECTS),
    )
    # The times of these answers would change the tag of an unchanged page.
    for answer, name in zip(objects, OBJECTS, strict=True):
        if answer and name in TIMES:
            answer.pop(TIMES[name], None)
    asked: dict[str, Any] = {}
    types = {node["type"] for node in workflow["nodes"]}
    if types & INTAKE_TRIGGERS:
        asked |= {name: page.get_if_present(f"{path}/{name}", **query) for name, query in OF_INTAKE.items()}
    if types & MODEL_TYPES:
        asked["model_costs"] = page.get_if_present("/api/v1/ai/costs", workflow_id=workflow_id)
        asked["models"] = page.get_if_present("/api/v1/ai/models", limit=NAMED_MODELS)
    if "schedule-trigger" in types:
        asked["schedule"] = page.get_if_present(f"{path}/schedule")
    newest = query_newest_versions(workflow, SHOWN_VERSIONS)
    asked["versions"] = page.get_if_present(f"{path}/versions", **newest)
    asked["users"] = page.get_recent("/api/v1/auth/users", seconds=RECENT_SECONDS)
    last = runs["executions"][0]["id"] if runs and runs["executions"] else None
    if last:
        asked["graph"] = page.get_if_present(f"/api/v1/executions/{last}/graph")
        if page.query.get("input") == LAST:
            asked["last_run"] = page.get_if_present(f"/api/v1/executions/{last}")
    if workflow["nodes"] and (len(workflow["nodes"]) <= VALIDATED_NODES or page.query.get("node")):
        asked["validation"] = page.preview_if_allowed(f"{path}/validate")
    node = _find_node(workflow, page.query)
    if node is not None:
        asked["type"] = page.get_if_present(f"/api/v1/workflow-nodes/{node['type']}/schema")
    answers = await asyncio.gather(*asked.values())
    found = {name.replace("-", "_"): answer for name, answer in zip(asked, answers, strict=True)}
    trigger = (found.pop("last_run", None) or {}).get("trigger")
    resources = await load_resources(page, (found.get("type") or {}).get("config"))
    return {
        "workflow": workflow,
        "tag": page.tags.get(path, ""),
        "runs": runs,
        "deliveries": None,
        "dead_letters": None,
        "inbound_address": None,
        "schedule": None,
        "graph": None,
        "validation": None,
        "model_costs": None,
        "models": None,
        "type": None,
        "resources": resources,
        "input": trigger and trigger.get("data"),
        **{name.replace("-", "_"): answer for name, answer in zip(OBJECTS, objects, strict=True)},
        **found,
    }


def _find_node(workflow: Mapping[str, Any], query: Mapping[str, str]) -> Mapping[str, Any] | None:
    """Return the node that the query selects; None without one."""
    return next((node for node in workflow["nodes"] if node["id"] == query.get("node")), None)


def view(data: PageData, frame: PageFrame) -> Mapping[str, Any]:
    """Return the template values: the workflow, its map with the states of the last run, and the permitted actions.

    The map is None for the view as a table, and without nodes.
    """
    workflow, why = data["workflow"], data["why"]
    node = _find_node(workflow, frame.query)
    schema = (data["type"] or {}).get("config")
    figures = {one["nodeId"]: one for one in (data["statistics"] or {"nodes": ()})["nodes"]}
    states = _read_states(data["graph"], workflow)
    findings = data["validation"] or {"errors": (), "warnings": ()}
    status = why["deploymentStatus"] if why else "not-deployed"
    example = _given_input({"body": workflow["config"].get(EXAMPLE_INPUT)})
    has_run = bool(data["runs"] and data["runs"]["executions"])
    shows_example = bool(example) and frame.query.get("input") != LAST
    given = example if shows_example else _given_input(data["input"])
    shows_table = frame.query.get("view") == "table"
    return {
        "title": workflow["name"],
        "crumbs": (("Workflows", f"{frame.root}/dashboard/workflows"), (workflow["name"], "")),
        **data,
        "map": None
        if shows_table
        else draw_graph(
            workflow["nodes"],
            workflow["connections"],
            states,
            notes=list_notes(workflow["nodes"], figures, findings["warnings"], data["deliveries"]),
            focus=frame.query.get("node", ""),
            at=frame.query.get("at", ""),
        ),
        "address_of": lambda node_id: _build_address(frame, node=node_id, at="") + "#node",
        "here": _build_address(frame, node="", at=""),
        "views": (
            ("Map", _build_address(frame, view=""), not shows_table),
            ("Table", _build_address(frame, view="table"), shows_table),
        ),
        "shows_table": shows_table,
        "states": states or {},
        "labels": {one["id"]: one["label"] for one in workflow["nodes"]},
        "figures": figures,
        "node": node,
        "is_inbound": node is not None
        and node["type"] in INTAKE_TRIGGERS
        and bool(data["inbound_address"] and data["inbound_address"]["urls"]),
        "user_names": list_names(data["users"], frame),
        "closed": _build_address(frame, node=""),
        "findings": [("error", one) for one in findings["errors"]]
        + [("warning", one) for one in findings["warnings"]],
        "fields": list_inputs(workflow["nodes"]),
        "given": given,
        "given_texts": {
            name: value if isinstance(value, str) else show_whole_json(value) for name, value in given.items()
        },
        "model_names": {one["id"]: one["name"] for one in (data["models"] or {"models": ()})["models"]},
        "schema_fields": list_schema(schema),
        "resource_fields": ()
        if node is None
        else list_resource_fields(schema, node["config"], data["resources"]),
        "may_write_sources": frame.may("datasources:write"),
        "share": show_share,
        "input_address": _build_address(frame, input=LAST) + "#run" if has_run else "",
        "example_address": _build_address(frame, input="") + "#run" if example else "",
        "shows_example": shows_example,
        "api": f"/api/v1/workflows/{workflow['id']}",
        "page_path": f"{frame.root}/dashboard/workflows/{workflow['id']}",
        "may_write": frame.may("workflows:write"),
        "may_run": frame.may("workflows:execute"),
        "people": list_users(workflow, data["users"], frame),
        "may_share": may_change(workflow, "workflows:write", frame),
        "is_active": workflow["status"] == "active",
        "is_deployed": status != "not-deployed",
        "is_up": status in {"running", "starting", "deploying"},
    }


def _build_address(frame: PageFrame, **changes: str) -> str:
    query = {name: frame.query.get(name, "") for name in KEPT} | changes
    return page_address(frame, f"/dashboard/workflows/{frame.parameters['id']}", query)


def _read_states(graph: Mapping[str, Any] | None, workflow: Mapping[str, Any]) -> Mapping[str, str] | None:
    """Return the states of the workflow's nodes in its last run by id; None if it has not run.

    Nodes that were deleted since, or that the run did not reach, are left out.
    """
    if graph is None:
        return None
    present = {node["id"] for node in workflow["nodes"]}
    return {one["nodeId"]: one["status"] for one in graph["states"] if one["nodeId"] in present}


def describe_figures(figures: Mapping[str, Any]) -> str:
    """Return the figures of a node as one line, such as `p95 120 ms · 2 % failed`; empty without any."""
    parts = []
    if figures["p95Ms"] is not None:
        parts.append(f"p95 {show_duration(figures['p95Ms'])}")
    if figures["failed"]:
        parts.append(f"{show_share(figures['failed'], figures['ended'])} failed")
    return " · ".join(parts)


def list_notes(
    nodes: Sequence[Mapping[str, Any]],
    figures: Mapping[str, Mapping[str, Any]],
    warnings: Sequence[Mapping[str, Any]],
    deliveries: Mapping[str, Any] | None,
) -> Mapping[str, str]:
    """Return a note below each node of the map, by node id: its figures, or below a trigger the time of the last
    delivery.

    A warning of a path that finds nothing takes their place. Nodes without any are left out, or have an empty note.
    """
    unresolved = {one.get("nodeId") for one in warnings if one["type"] == UNRESOLVED}
    newest = deliveries["deliveries"][0] if deliveries and deliveries["deliveries"] else None
    notes = {}
    for node in nodes:
        if node["id"] in unresolved:
            notes[node["id"]] = "a path is unresolved"
        elif newest and node["type"] in INTAKE_TRIGGERS:
            notes[node["id"]] = f"last delivery {show_moment(newest['createdAt'])[5:16]}"
        elif node["id"] in figures:
            notes[node["id"]] = describe_figures(figures[node["id"]])
    return notes


def _given_input(data: Any) -> Mapping[str, Any]:  # noqa: ANN401 - any JSON value
    """Return the `body` in the output `data` of a trigger, to fill the form; empty for no object and for more than
    200,000 characters.
    """
    body = data.get("body") if isinstance(data, dict) else None
    if not isinstance(body, dict) or len(str(body)) > MAX_INPUT_CHARACTERS:
        return {}
    return body


def list_schema(schema: Mapping[str, Any] | None) -> Sequence[tuple[str, str, bool]]:
    """Return name, description and whether it is required of each field of a config's JSON Schema; empty for None."""
    given = schema or {}
    required = given.get("required", ())
    return [
        (name, str(one.get("description", "")) if isinstance(one, dict) else "", name in required)
        for name, one in given.get("properties", {}).items()
    ]


PAGE: Final = Page(PATH, "workflow.html", load, view, "workflows", ("executions",))
