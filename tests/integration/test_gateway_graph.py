"""Whole graphs: positions of nodes without one, automatic layout, and a graph built in a single call."""

import asyncio
from collections.abc import Callable
from itertools import combinations
from threading import Thread, current_thread
from typing import Any

import httpx2
import pytest
from sqlalchemy import select
from sqlmodel import col

from engine.canvas_layout import CARD_HEIGHT, CARD_WIDTH
from gateway.workflows import graph_shapes
from journal import definition_snapshot
from models.audit import AuditEntry
from tests.integration.gateway_harness import (
    EDGE,
    GRAPH,
    STEP,
    TRIGGER,
    GatewayHarness,
    OrganizationUsers,
    UserClient,
    assert_refused,
)

WORKFLOWS = "/api/v1/workflows"
BUILD = f"{WORKFLOWS}/build"
STEPS = [{**STEP, "id": name} for name in ("b", "c", "d", "end")]
ENDS = ("start b", "start c", "b end", "c d", "d end")
EDGES = [dict(zip(("source", "target"), ends.split(), strict=True)) for ends in ENDS]
BRANCHES: dict[str, Any] = {"nodes": [TRIGGER, *STEPS], "connections": EDGES}
"""Two branches that meet again, one longer than the other."""


def node_positions(workflow: dict[str, Any]) -> dict[str, tuple[float, float]]:
    """Return the positions of a workflow's nodes."""
    return {node["id"]: (node["position"]["x"], node["position"]["y"]) for node in workflow["nodes"]}


def overlapping_nodes(workflow: dict[str, Any]) -> list[str]:
    return [
        f"{one['id']} {other['id']}"
        for one, other in combinations(workflow["nodes"], 2)
        if abs(one["position"]["x"] - other["position"]["x"]) < CARD_WIDTH
        and abs(one["position"]["y"] - other["position"]["y"]) < CARD_HEIGHT
    ]


def all_lead_right(workflow: dict[str, Any]) -> bool:
    at = node_positions(workflow)
    edges = workflow["connections"]
    return all(at[edge["sourceNodeId"]][0] < at[edge["targetNodeId"]][0] for edge in edges)


def stacked_graph(graph: dict[str, Any]) -> dict[str, Any]:
    """Return a graph with all nodes at the same position."""
    nodes = [{**node, "position": {"x": 7, "y": 7.5}} for node in graph["nodes"]]
    return {**graph, "nodes": nodes}


async def lay_out(person: UserClient, workflow_id: str, **headers: str) -> httpx2.Response:
    return await person.api.post(f"{WORKFLOWS}/{workflow_id}/layout", headers=headers)


async def list_actions(harness: GatewayHarness, workflow_id: str) -> list[str]:
    """Return the actions in a workflow's audit trail."""
    statement = select(col(AuditEntry.action)).where(col(AuditEntry.object_id) == workflow_id)
    async with harness.gateway.database.read() as connection:
        return [*await connection.scalars(statement.order_by(col(AuditEntry.id)))]


# ── positions that were not given ───────────────────────────────────────────────────────────────────────────


async def test_a_graph_without_positions_is_created_arranged(people: OrganizationUsers) -> None:
    workflow = await people.owner.workflow(await people.owner.create(**BRANCHES))
    assert overlapping_nodes(workflow) == []
    assert all_lead_right(workflow)
    again = (await lay_out(people.owner, workflow["id"])).json()
    assert again == {"workflowId": workflow["id"], "changed": False, "nodesRepositioned": 0}


async def test_nodes_without_a_position_stand_beside_those_that_have_one(people: OrganizationUsers) -> None:
    start, b, *others = BRANCHES["nodes"]
    placed = [start | {"position": {"x": 600, "y": -50.5}}, b | {"position": {"x": 850, "y": -50.5}}]
    edges = BRANCHES["connections"]
    workflow = await people.owner.workflow(
        await people.owner.create(nodes=[*placed, *others, STEP | {"id": "alone"}], connections=edges)
    )
    at = node_positions(workflow)
    assert (at["start"], at["b"]) == ((600, -50.5), (850, -50.5))
    assert overlapping_nodes(workflow) == []
    assert all_lead_right(workflow)
    assert at["alone"][1] > max(y for node, (_, y) in at.items() if node != "alone")


async def test_a_node_that_comes_back_without_its_position_keeps_it(people: OrganizationUsers) -> None:
    nodes = [TRIGGER | {"position": {"x": -10, "y": 3}}, STEP | {"position": {"x": 40, "y": 900}}]
    workflow_id = await people.owner.create(nodes=nodes, connections=[EDGE])
    before = await people.owner.workflow(workflow_id)
    more = {"nodes": [*GRAPH["nodes"], STEP | {"id": "more"}], "connections": [EDGE]}
    after = (await people.owner.api.put(f"{WORKFLOWS}/{workflow_id}", json=more)).json()
    assert node_positions(after).items() >= node_positions(before).items()
    assert overlapping_nodes(after) == []


# ── layout ──────────────────────────────────────────────────────────────────────────────────────────────────


async def test_layout_arranges_the_nodes_and_counts_the_moved_ones(
    harness: GatewayHarness, people: OrganizationUsers
) -> None:
    workflow_id = await people.owner.create(**stacked_graph(BRANCHES))
    first = await lay_out(people.owner, workflow_id)
    assert first.status_code == 200
    assert first.json() == {"workflowId": workflow_id, "changed": True, "nodesRepositioned": 5}
    workflow = await people.owner.workflow(workflow_id)
    assert overlapping_nodes(workflow) == []
    assert all_lead_right(workflow)
    second = await lay_out(people.owner, workflow_id)
    assert second.json() == {"workflowId": workflow_id, "changed": False, "nodesRepositioned": 0}
    assert first.headers["ETag"] == second.headers["ETag"] == '"2"'
    assert await people.owner.workflow(workflow_id) == workflow
    assert await list_actions(harness, workflow_id) == ["workflow.created", "workflow.laid-out"]


async def test_only_the_node_that_was_dragged_away_is_counted(people: OrganizationUsers) -> None:
    workflow_id = await people.owner.create(**BRANCHES)
    before = await people.owner.workflow(workflow_id)
    nodes = [
        node if node["id"] != "c" else node | {"position": {"x": 999, "y": 999}} for node in before["nodes"]
    ]
    await people.owner.api.put(f"{WORKFLOWS}/{workflow_id}", json={"nodes": nodes})
    assert (await lay_out(people.owner, workflow_id)).json()["nodesRepositioned"] == 1
    assert node_positions(await people.owner.workflow(workflow_id)) == node_positions(before)


async def test_graphs_that_are_broken_are_arranged_too(people: OrganizationUsers) -> None:
    nobody = [{"source": "nobody", "target": "b"}, {"source": "c", "target": "nobody"}]
    circular = [{"source": "end", "target": "c"}, {"source": "d", "target": "d"}, EDGES[0]]
    twice = stacked_graph({"nodes": [TRIGGER, *STEPS, *STEPS], "connections": [*EDGES, *nobody, *circular]})
    workflow_id = await people.owner.create(**twice)
    assert (await lay_out(people.owner, workflow_id)).json()["nodesRepositioned"] == 9
    assert overlapping_nodes(await people.owner.workflow(workflow_id)) == []
    empty = await people.owner.create()
    assert (await lay_out(people.owner, empty)).json()["changed"] is False


async def test_places_at_the_end_of_the_world_do_no_harm(people: OrganizationUsers) -> None:
    corners = [(1e308, -1e308), (10**300, 0), (0, -(10**15)), (0.1, 2**53), (-1e-300, 5)]
    nodes = [
        node | {"position": {"x": x, "y": y}} for node, (x, y) in zip(BRANCHES["nodes"], corners, strict=True)
    ]
    workflow_id = await people.owner.create(nodes=[*nodes, STEP | {"id": "new"}], connections=EDGES)
    workflow = await people.owner.workflow(workflow_id)
    assert [*node_positions(workflow).values()][:5] == corners
    assert overlapping_nodes(workflow) == []
    assert (await lay_out(people.owner, workflow_id)).json()["nodesRepositioned"] == 6
    assert max(x for x, _ in node_positions(await people.owner.workflow(workflow_id)).values()) < 2_000


async def test_layout_is_an_edit_like_any(people: OrganizationUsers) -> None:
    workflow_id = await people.owner.create(**stacked_graph(GRAPH))
    before = await people.owner.workflow(workflow_id)
    assert_refused(await lay_out(people.stranger, workflow_id), 404, "not-found")
    assert_refused(await lay_out(people.colleague, workflow_id), 404, "not-found")
    share = {"userId": people.colleague.user.id}
    await people.owner.api.post(f"{WORKFLOWS}/{workflow_id}/share", json=share)
    assert_refused(await lay_out(people.colleague, workflow_id), 403, "not-owner")
    assert_refused(
        await lay_out(people.owner, workflow_id, **{"If-Match": '"1"'}), 412, "precondition-failed"
    )
    assert node_positions(await people.owner.workflow(workflow_id)) == node_positions(before)
    assert (await lay_out(people.admin, workflow_id, **{"If-Match": '"2"'})).json()["changed"] is True


async def test_nodes_that_are_added_during_a_layout_stay(people: OrganizationUsers) -> None:
    workflow_id = await people.owner.create(**stacked_graph(BRANCHES))
    path = f"{WORKFLOWS}/{workflow_id}"
    answers = await asyncio.gather(
        *(people.owner.api.post(f"{path}/nodes", json=STEP | {"id": f"new-{n}"}) for n in range(4)),
        *(lay_out(people.owner, workflow_id) for _ in range(2)),
        *(people.owner.api.post(f"{path}/nodes", json=STEP | {"id": f"late-{n}"}) for n in range(4)),
    )
    assert {answer.status_code for answer in answers} == {200, 201}
    await lay_out(people.owner, workflow_id)
    workflow = await people.owner.workflow(workflow_id)
    assert len(workflow["nodes"]) == 13
    assert overlapping_nodes(workflow) == []


# ── build ───────────────────────────────────────────────────────────────────────────────────────────────────


async def build(person: UserClient, body: object, query: str = "", **headers: str) -> httpx2.Response:
    return await person.api.post(f"{BUILD}{query}", json=body, headers=headers)


async def test_a_whole_workflow_is_built_in_one_call(
    harness: GatewayHarness, people: OrganizationUsers
) -> None:
    body = {
        "name": "Whole",
        "description": "In one call",
        "tags": ["a", "b"],
        "settings": {"timeout": 60},
        "config": {"appId": "app_1"},
        **BRANCHES,
    }
    response = await build(people.owner, body)
    assert response.status_code == 201, response.text
    built = response.json()
    workflow = await people.owner.workflow(built["workflowId"])
    assert built == {
        "workflowId": workflow["id"],
        "status": "draft",
        "version": 1,
        "nodes": workflow["nodes"],
        "connections": workflow["connections"],
        "warnings": [],
        "nodeCount": 5,
        "connectionCount": 5,
    }
    assert response.headers["ETag"] == '"1"'
    assert [node["id"] for node in built["nodes"]] == ["start", "b", "c", "d", "end"]
    assert built["connections"][0] == {
        "id": "conn-1",
        "sourceNodeId": "start",
        "sourcePort": "output",
        "targetNodeId": "b",
        "targetPort": "input",
    }
    assert overlapping_nodes(workflow) == []
    assert all_lead_right(workflow)
    assert workflow["settings"]["timeout"] == 60
    assert {name: workflow[name] for name in ("name", "description", "tags", "config")} == {
        name: body[name] for name in ("name", "description", "tags", "config")
    }
    assert await list_actions(harness, workflow["id"]) == ["workflow.built"]


async def test_an_active_workflow_that_was_built_runs_at_once(people: OrganizationUsers) -> None:
    built = (await build(people.owner, {"name": "Active", "status": "active", **GRAPH})).json()
    assert built["status"] == "active"
    started = await people.owner.api.post(f"{WORKFLOWS}/{built['workflowId']}/execute", json={})
    assert started.status_code == 201, started.text


async def test_every_wrong_field_and_every_error_of_the_graph_is_told_at_once(
    people: OrganizationUsers,
) -> None:
    body = {
        "name": "x" * 201,
        "status": "paused",
        "tags": ["a", 7],
        "settings": {"timeout": -1},
        "nodes": [
            TRIGGER,
            TRIGGER | {"id": "other"},
            STEP | {"nodeId": "sett"},
            STEP | {"id": "twice", "timeout": "5"},
            STEP | {"id": "twice", "config": {"values": 5}},
            STEP | {"id": "not an id", "position": {"x": 1}},
            {"id": "untyped"},
        ],
        "connections": [
            EDGE | {"sourcePort": "nowhere"},
            {"source": "step", "target": "nobody"},
            {"source": "twice"},
            {"source": 5, "target": "step"},
        ],
    }
    response = await build(people.owner, body)
    assert_refused(response, 422, "validation-failed")
    details = response.json()["error"]["details"]
    assert {(detail["path"], detail["code"]) for detail in details} == {
        ("name", "too-long"),
        ("status", "invalid-value"),
        ("tags.1", "invalid-type"),
        ("settings.timeout", "invalid-value"),
        ("nodes.1", "multiple-triggers"),
        ("nodes.2", "unknown-node-type"),
        ("nodes.3.timeout", "invalid-type"),
        ("nodes.4", "duplicate-node-id"),
        ("nodes.4", "invalid-config"),
        ("nodes.5.id", "invalid-id"),
        ("nodes.5.position.y", "required"),
        ("nodes.6.nodeId", "required"),
        ("connections.0", "invalid-port"),
        ("connections.1", "broken-connection"),
        ("connections.2.targetNodeId", "required"),
        ("connections.3.source", "invalid-type"),
    }
    assert len(details) == 16
    assert all(detail["message"] for detail in details)
    suggested = {detail["code"]: detail["suggestion"] for detail in details if "suggestion" in detail}
    assert suggested["unknown-node-type"] == "Use the type set."
    assert (await people.owner.api.get(WORKFLOWS)).json()["count"] == 0


async def test_consequences_of_an_invalid_field_are_not_reported(people: OrganizationUsers) -> None:
    nodes = [TRIGGER, {"id": 5, "nodeId": "set", "config": 1}, STEP]
    edges = [{"source": "start", "target": "5"}, {"source": "start", "target": ["step"]}]
    body = {"name": "x", "nodes": nodes, "connections": edges}
    findings = (await build(people.owner, body, "?dryRun=true")).json()
    assert [error["path"] for error in findings["errors"]] == [
        "nodes.1.id",
        "nodes.1.config",
        "connections.1.target",
    ]
    assert findings["warnings"] == []


@pytest.mark.parametrize(
    ("graph", "finding"),
    [
        ({"nodes": []}, "empty-workflow"),
        ({"nodes": [STEP]}, "missing-trigger"),
        ({"nodes": [TRIGGER, STEP], "connections": [EDGE, {"source": "step", "target": "step"}]}, "cycle"),
    ],
)
async def test_a_warning_of_a_draft_is_an_error_in_an_active_workflow(
    people: OrganizationUsers, graph: dict[str, Any], finding: str
) -> None:
    response = await build(people.owner, {"name": "x", **graph})
    assert_refused(response, 422, "validation-failed")
    assert [detail["code"] for detail in response.json()["error"]["details"]] == [finding]


async def test_unrunnable_nodes_are_warnings_in_drafts_and_errors_in_active_workflows(
    people: OrganizationUsers,
) -> None:
    target = {"node": {"type": "json-parse"}}
    tool = {"id": "tool", "nodeId": "tool", "config": {"name": "t", "description": "d", "target": target}}
    body = {"name": "x", "nodes": [TRIGGER, STEP, tool], "connections": [EDGE]}
    draft = await build(people.owner, body)
    assert draft.status_code == 201, draft.text
    assert ("nodes.2", "not-runnable") in [
        (found["path"], found["code"]) for found in draft.json()["warnings"]
    ]
    assert_refused(await build(people.owner, body | {"status": "active"}), 422, "validation-failed")


async def test_a_dry_run_tells_the_findings_and_creates_nothing(people: OrganizationUsers) -> None:
    lonely = {"name": "x", "nodes": [*GRAPH["nodes"], STEP | {"id": "lonely"}], "connections": [EDGE]}
    answer = await build(people.owner, lonely, "?dryRun=true", **{"Idempotency-Key": "dry"})
    assert answer.status_code == 200
    findings = answer.json()
    assert (findings["valid"], findings["errors"]) == (True, [])
    assert [found["code"] for found in findings["warnings"]] == ["disconnected-node"]
    invalid = (await build(people.owner, {"name": 1, "nodes": [STEP]}, "?dryRun=true")).json()
    assert invalid["valid"] is False
    assert [found["code"] for found in invalid["errors"]] == ["invalid-type", "missing-trigger"]
    assert_refused(await build(people.owner, lonely, "?dryRun=maybe"), 400, "invalid-query")
    assert (await people.owner.api.get(WORKFLOWS)).json()["count"] == 0
    assert (await build(people.owner, lonely, **{"Idempotency-Key": "dry"})).status_code == 201


async def test_a_build_that_is_repeated_gets_the_first_answer_again(people: OrganizationUsers) -> None:
    body = {"name": "Once", **BRANCHES}
    answers = await asyncio.gather(
        *(build(people.owner, body, **{"Idempotency-Key": "once"}) for _ in range(3))
    )
    assert [answer.status_code for answer in answers] == [201] * 3
    assert answers[0].json() == answers[1].json() == answers[2].json()
    assert sorted(answer.headers.get("Idempotent-Replayed", "") for answer in answers) == ["", "true", "true"]
    other = await build(people.owner, body | {"name": "Twice"}, **{"Idempotency-Key": "once"})
    assert_refused(other, 422, "idempotency-mismatch")
    assert (await people.owner.api.get(WORKFLOWS)).json()["count"] == 1


@pytest.mark.parametrize(
    "body",
    [
        [],
        "name",
        None,
        {},
        {"name": "x"},
        {"name": "x", "nodes": None},
        {"name": "x", "nodes": {}},
        {"name": "x", "nodes": [None, [], "set", 5]},
        {"name": "x", "nodes": [TRIGGER], "connections": {"source": "start"}},
        {"name": "x", "nodes": [TRIGGER], "connections": [None, "start"]},
        {"name": "x", "nodes": [TRIGGER] * 10_001},
        {"name": "x", "nodes": [{"nodeId": "x" * 100_000, "version": "9" * 1_000, "id": "\u202e"}]},
        {"name": "x", "nodes": [{"timeout": "5"}] * 300},
        {
            "name": ["x"],
            "nodes": [{"position": {"x": [], "y": {}}, "retry": 5}],
            "config": "x",
            "settings": [],
        },
    ],
)
async def test_bodies_that_are_no_workflow_are_refused(people: OrganizationUsers, body: object) -> None:
    response = await build(people.owner, body)
    assert_refused(response, 422, "validation-failed")
    details = response.json()["error"]["details"]
    assert 1 <= len(details) <= 100
    assert all({"path", "code", "message"} <= set(detail) for detail in details)
    paths = [(detail["path"], detail["code"]) for detail in details]
    assert len(paths) == len(set(paths))


# ── beside others ───────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("operation", ["create", "update", "activate", "execute"])
async def test_others_are_served_while_a_graph_is_gone_through(
    people: OrganizationUsers, monkeypatch: pytest.MonkeyPatch, operation: str
) -> None:
    workflow_id = await people.owner.create(**GRAPH)
    path = f"{WORKFLOWS}/{workflow_id}"
    api = people.owner.api
    busy: set[Thread] = set()

    def seen(step: Callable[..., Any]) -> Callable[..., Any]:
        def watched(*args: Any, **options: Any) -> Any:  # noqa: ANN401 - passed through unchanged
            busy.add(current_thread())
            return step(*args, **options)

        return watched

    for module, step in (
        (graph_shapes, "stored_nodes"),
        (graph_shapes, "with_all_positions"),
        (definition_snapshot, "check_graph"),
    ):
        monkeypatch.setattr(module, step, seen(getattr(module, step)))
    response = await {
        "create": lambda: api.post(WORKFLOWS, json={"name": "Large", "status": "active", **GRAPH}),
        "update": lambda: api.put(path, json=GRAPH),
        "activate": lambda: api.put(f"{path}/status", json={"status": "active"}),
        "execute": lambda: api.post(f"{path}/execute", json={"definition": GRAPH}),
    }[operation]()
    assert response.is_success, response.text
    assert busy
    assert current_thread() not in busy
