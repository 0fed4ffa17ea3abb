"""Validation of graphs over HTTP, their required scopes, and the node catalog."""

import threading
from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from typing import Any

import jsonschema_rs
import msgspec
import pytest
from sqlalchemy import insert, select
from sqlalchemy.ext.asyncio import AsyncConnection
from sqlmodel import col

from engine.findings import ValidationResult
from engine.graph import GraphNode
from engine.program import compile_node
from engine.validation import validate_graph
from gateway.workflows import output_samples, validation
from gateway.workflows.output_samples import MAX_CHARACTERS, MAX_OUTPUT_CHARACTERS
from models import ids
from models.access import ApiCaller, KeyScope, UserRole
from models.execution import Execution, ExecutionData, SpanRow
from models.workflow import Workflow
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

CATALOGUE = "/api/v1/workflow-nodes"
SOURCE = {
    "id": "node_1",
    "nodeId": "mysql-source",
    "label": "Extract Orders",
    "config": {"dataSource": "ds_001"},
}
MODEL = {"id": "model", "nodeId": "llm", "config": {"model": "model_001"}}
CALL = {"id": "call", "nodeId": "http-request", "label": "Call", "config": {"url": "https://a.b"}}
READ = {"id": "read", "nodeId": "template", "label": "Read", "config": {"text": "{{ data.body.name }}"}}
CALLING = {
    "nodes": [TRIGGER, CALL, READ],
    "connections": [
        {"sourceNodeId": "start", "targetNodeId": "call"},
        {"sourceNodeId": "call", "targetNodeId": "read"},
    ],
}


@pytest.fixture(scope="module")
async def people(harness: GatewayHarness) -> OrganizationUsers:
    return await harness.people()


async def validate_workflow(person: UserClient, workflow_id: str) -> dict[str, Any]:
    response = await person.api.post(f"/api/v1/workflows/{workflow_id}/validate")
    assert response.status_code == 200, response.text
    shown: dict[str, Any] = response.json()
    return shown


# ── validate ────────────────────────────────────────────────────────────────────────────────────────────────


async def test_a_sound_workflow_is_valid(people: OrganizationUsers) -> None:
    workflow_id = await people.owner.create(**GRAPH)
    response = await people.owner.api.post(f"/api/v1/workflows/{workflow_id}/validate")
    assert response.json() == {
        "workflowId": workflow_id,
        "valid": True,
        "errors": [],
        "warnings": [],
        "nodeCount": 2,
        "connectionCount": 1,
        "truncated": False,
    }
    shown = await people.owner.api.get(f"/api/v1/workflows/{workflow_id}")
    assert response.headers["ETag"] == shown.headers["ETag"]


async def test_every_finding_has_a_message_a_place_and_a_suggestion_and_some_a_fix(
    people: OrganizationUsers,
) -> None:
    workflow_id = await people.owner.create(
        nodes=[TRIGGER, SOURCE, STEP],
        connections=[EDGE, {"id": "lost", "sourceNodeId": "step", "targetNodeId": "gone"}],
    )
    found = await validate_workflow(people.owner, workflow_id)
    assert (found["valid"], found["nodeCount"], found["connectionCount"]) == (False, 3, 2)
    (error,) = found["errors"]
    assert error == {
        "type": "broken-connection",
        "message": error["message"],
        "suggestion": error["suggestion"],
        "connectionId": "lost",
        "fix": {"action": "remove-connection", "connectionId": "lost"},
    }
    assert {(warning["type"], warning["nodeId"]) for warning in found["warnings"]} == {
        ("disconnected-node", "node_1"),
        ("missing-config", "node_1"),
    }
    assert all(finding["message"] and finding["suggestion"] for finding in (error, *found["warnings"]))
    response = await people.owner.api.delete(f"/api/v1/workflows/{workflow_id}/connections/lost")
    assert response.status_code == 200
    assert (await validate_workflow(people.owner, workflow_id))["valid"]


TOOL = {"id": "tool", "nodeId": "tool", "config": {"name": "t", "description": "d"}}


async def test_a_node_without_implementation_keeps_a_workflow_from_becoming_active(
    people: OrganizationUsers,
) -> None:
    workflow_id = await people.owner.create(nodes=[TRIGGER, TOOL], connections=[])
    found = await validate_workflow(people.owner, workflow_id)
    assert found["valid"]
    assert "not-runnable" in [warning["type"] for warning in found["warnings"]]
    path = f"/api/v1/workflows/{workflow_id}/status"
    response = await people.owner.api.put(path, json={"status": "active"})
    assert_refused(response, 422, "validation-failed")
    assert response.json()["error"]["details"][0]["type"] == "not-runnable"
    assert (await people.owner.api.put(path, json={"status": "archived"})).status_code == 200
    found = await validate_workflow(people.owner, workflow_id)
    assert (found["valid"], [error["type"] for error in found["errors"]]) == (False, ["not-runnable"])


async def test_a_workflow_as_a_tool_is_checked_by_its_nodes(people: OrganizationUsers) -> None:
    start = {"id": "start", "nodeId": "manual"}
    send = {"id": "send", "nodeId": "http-request", "config": {"url": "https://a.example"}}
    called = await people.owner.create(
        nodes=[start, send], connections=[{"source": "start", "target": "send"}]
    )
    tool = {"name": "report", "description": "Reports.", "target": {"workflowId": called}}
    agent = {"id": "agent", "nodeId": "agent", "config": {"prompt": "Report.", "model": "echo"}}
    caller = await people.owner.create(
        nodes=[start, agent, {"id": "report", "nodeId": "tool", "config": tool}],
        connections=[
            {"source": "start", "target": "agent"},
            {"source": "report", "target": "agent", "targetPort": "tools"},
        ],
    )
    assert (await validate_workflow(people.owner, caller))["warnings"] == []
    path = f"/api/v1/workflows/{called}/nodes/send"
    changed = await people.owner.api.put(path, json={"config": {"method": "POST"}})
    assert changed.status_code == 200, changed.text
    shown = await validate_workflow(people.owner, caller)
    assert (shown["valid"], [(one["type"], one["nodeId"]) for one in shown["warnings"]]) == (
        *(True, [("tool-withheld", "report")]),
    )


async def test_readers_of_a_workflow_may_validate_it(
    harness: GatewayHarness, people: OrganizationUsers
) -> None:
    workflow_id = await people.owner.create(**GRAPH)
    path = f"/api/v1/workflows/{workflow_id}"
    assert_refused(await people.colleague.api.post(f"{path}/validate"), 404, "not-found")
    await people.owner.api.post(f"{path}/share", json={"userId": people.colleague.user.id})
    assert (await validate_workflow(people.colleague, workflow_id))["valid"]
    assert_refused(await people.colleague.api.post(f"{path}/compute-scopes"), 403, "not-owner")
    assert_refused(await people.stranger.api.post(f"{path}/validate"), 404, "not-found")
    organization = await harness.organization()
    writer = await harness.person(organization, scopes=[KeyScope.WORKFLOWS_WRITE])
    assert_refused(await writer.api.post(f"{path}/validate"), 403, "scope-required")


# ── validate, by past runs ──────────────────────────────────────────────────────────────────────────────────


async def has_run(
    harness: GatewayHarness,
    person: UserClient,
    workflow_id: str,
    outputs: Mapping[str, Any],
    *,
    minutes_ago: int = 1,
    organization_id: str | None = None,
    is_private: bool = False,
) -> None:
    """Insert a run of the current workflow, with these outputs of its nodes."""
    shown = await person.workflow(workflow_id)
    nodes = {node["id"]: GraphNode.from_stored(node) for node in shown["nodes"]}
    created_at = datetime.now(UTC) - timedelta(minutes=minutes_ago)
    execution = Execution(
        id=ids.new_id("exec"),
        shard=person.user.shard,
        organization_id=organization_id or person.user.organization_id,
        workflow_id=workflow_id,
        user_id=person.user.id,
        is_private=is_private,
        status="completed",
        trigger_type="manual",
        definition_hash="",
        rank=0,
        queue_turn=0,
        timeout_microseconds=0,
        key_id="",
        channel="",
        created_at=created_at,
        updated_at=created_at,
    )
    data = ExecutionData(
        execution_id=execution.id,
        shard=execution.shard,
        trigger="{}",
        config="{}",
        organization_id=execution.organization_id,
        workflow_id=workflow_id,
        created_at=created_at,
    )
    spans = [
        SpanRow(
            execution_id=execution.id,
            node_id=node_id,
            shard=execution.shard,
            id=ids.new_id("span"),
            sequence=sequence,
            label="",
            type=nodes[node_id].type,
            status="completed",
            output=msgspec.json.encode(output).decode(),
            hashes=compile_node(nodes[node_id], harness.gateway.catalog).static_hashes + bytes(32),
        ).model_dump()
        for sequence, (node_id, output) in enumerate(outputs.items())
    ]

    async def write(connection: AsyncConnection) -> None:
        await connection.execute(insert(Execution).values(execution.model_dump()))
        await connection.execute(insert(ExecutionData).values(data.model_dump()))
        await connection.execute(insert(SpanRow), spans)

    await harness.gateway.database.transaction(write)


def answer(body: Any) -> dict[str, Any]:  # noqa: ANN401 - any JSON value
    return {"status": 200, "headers": {}, "url": "https://a.b", "body": body}


async def test_paths_are_checked_against_outputs_of_past_runs(
    harness: GatewayHarness, people: OrganizationUsers
) -> None:
    workflow_id = await people.owner.create(**CALLING)
    assert (await validate_workflow(people.owner, workflow_id))["warnings"] == []
    await has_run(harness, people.owner, workflow_id, {"call": answer({"nme": "Ada"})})
    (warning,) = (await validate_workflow(people.owner, workflow_id))["warnings"]
    assert (warning["type"], warning["nodeId"]) == ("unresolved-mapping", "read")
    assert "found nothing in past runs" in warning["message"]
    assert warning["suggestion"] == "Did you mean data.body.nme?"
    fix = {"action": "set-config", "nodeId": "read", "path": ["text"], "value": "{{ data.body.nme }}"}
    assert warning["fix"] == fix
    await has_run(harness, people.owner, workflow_id, {"call": answer({"name": "Ada"})})
    assert (await validate_workflow(people.owner, workflow_id))["warnings"] == []


async def test_an_output_from_before_a_change_of_the_node_is_no_evidence(
    harness: GatewayHarness, people: OrganizationUsers
) -> None:
    workflow_id = await people.owner.create(**CALLING)
    await has_run(harness, people.owner, workflow_id, {"call": answer({"x": 1})})
    assert len((await validate_workflow(people.owner, workflow_id))["warnings"]) == 1
    path = f"/api/v1/workflows/{workflow_id}/nodes/call"
    assert (await people.owner.api.put(path, json={"config": {"url": "https://c.d"}})).status_code == 200
    assert (await validate_workflow(people.owner, workflow_id))["warnings"] == []


async def test_runs_of_another_organisation_tell_nothing(
    harness: GatewayHarness, people: OrganizationUsers
) -> None:
    workflow_id = await people.owner.create(**CALLING)
    elsewhere = people.stranger.user.organization_id
    outputs = {"call": answer({"x": 1})}
    await has_run(harness, people.owner, workflow_id, outputs, organization_id=elsewhere)
    assert (await validate_workflow(people.owner, workflow_id))["warnings"] == []


async def test_private_runs_tell_their_callers_and_the_owner_alone(
    harness: GatewayHarness, people: OrganizationUsers
) -> None:
    workflow_id = await people.owner.create(**CALLING)
    await people.owner.api.put(f"/api/v1/workflows/{workflow_id}/visibility", json={"isPublic": True})
    await has_run(harness, people.admin, workflow_id, {"call": answer({"nme": "Ada"})}, is_private=True)
    assert (await validate_workflow(people.colleague, workflow_id))["warnings"] == []
    assert len((await validate_workflow(people.owner, workflow_id))["warnings"]) == 1


async def test_only_a_few_runs_of_late_and_small_outputs_are_looked_at(
    harness: GatewayHarness, people: OrganizationUsers
) -> None:
    workflow_id = await people.owner.create(**CALLING)
    for minutes_ago in range(1, 6):
        outputs = {"call": answer({"x": minutes_ago})}
        await has_run(harness, people.owner, workflow_id, outputs, minutes_ago=minutes_ago)
    await has_run(harness, people.owner, workflow_id, {"call": answer({"name": "Ada"})}, minutes_ago=9)
    assert len((await validate_workflow(people.owner, workflow_id))["warnings"]) == 1
    large = answer({"name": "x" * MAX_OUTPUT_CHARACTERS})
    await has_run(harness, people.owner, workflow_id, {"call": large}, minutes_ago=0)
    assert len((await validate_workflow(people.owner, workflow_id))["warnings"]) == 1


async def test_all_outputs_that_are_looked_at_have_a_bounded_size(
    harness: GatewayHarness, people: OrganizationUsers
) -> None:
    count = 2 * MAX_CHARACTERS // MAX_OUTPUT_CHARACTERS
    names = [f"n{number}" for number in range(count)]
    workflow_id = await people.owner.create(nodes=[{**CALL, "id": name} for name in names])
    output = "x" * (MAX_OUTPUT_CHARACTERS * 9 // 10)
    await has_run(harness, people.owner, workflow_id, dict.fromkeys(names, output))
    async with harness.gateway.database.read() as connection:
        rows = await connection.execute(select(Workflow).where(col(Workflow.id) == workflow_id))
        user = people.owner.user
        caller = ApiCaller("", user.id, user.organization_id, user.shard, UserRole.MEMBER, frozenset())
        past = await output_samples.recent_outputs(connection, Workflow(**rows.mappings().one()), caller)
    assert MAX_CHARACTERS * 0.9 < sum(len(row.output) for row in past) <= MAX_CHARACTERS


async def test_a_graph_is_checked_beside_the_loop_that_serves_others(
    people: OrganizationUsers, monkeypatch: pytest.MonkeyPatch
) -> None:
    threads: list[threading.Thread] = []

    def noted(*arguments: Any, **named: Any) -> ValidationResult:  # noqa: ANN401 - passed through unchanged
        threads.append(threading.current_thread())
        return validate_graph(*arguments, **named)

    monkeypatch.setattr(validation, "validate_graph", noted)
    assert (await validate_workflow(people.owner, await people.owner.create(**GRAPH)))["valid"]
    assert threads
    assert threading.current_thread() not in threads


# ── compute-scopes ──────────────────────────────────────────────────────────────────────────────────────────


async def test_scopes_are_computed_kept_and_shown(people: OrganizationUsers) -> None:
    workflow_id = await people.owner.create(nodes=[SOURCE, STEP, MODEL])
    path = f"/api/v1/workflows/{workflow_id}"
    assert (await people.owner.workflow(workflow_id))["scopes"] == []
    scopes = ["datasources:read:ds_001", "models:invoke:model_001"]
    response = await people.owner.api.post(f"{path}/compute-scopes")
    assert (response.status_code, response.json()) == (200, {"workflowId": workflow_id, "scopes": scopes})
    shown = await people.owner.api.get(path)
    assert (shown.json()["scopes"], shown.headers["ETag"]) == (scopes, response.headers["ETag"])
    again = await people.owner.api.post(f"{path}/compute-scopes")
    assert again.headers["ETag"] == response.headers["ETag"], "nothing was to change"
    trail = (await people.admin.api.get(f"/api/v1/audit?objectId={workflow_id}")).json()
    assert [entry["action"] for entry in trail["entries"]][:1] == ["workflow.scopes-computed"]


# ── the catalog ───────────────────────────────────────────────────────────────────────────────────────────


async def get_catalog(person: UserClient, query: str = "") -> dict[str, Any]:
    response = await person.api.get(f"{CATALOGUE}?{query}")
    assert response.status_code == 200, response.text
    shown: dict[str, Any] = response.json()
    return shown


async def test_a_node_type_is_listed_with_its_description(
    harness: GatewayHarness, people: OrganizationUsers
) -> None:
    listed = await get_catalog(people.owner, "limit=100")
    types = [node["type"] for node in listed["nodes"]]
    assert types == sorted(harness.gateway.catalog.types())
    assert (listed["count"], listed["limit"], listed["offset"]) == (len(types), 100, 0)
    assert listed["nodes"][types.index("mysql-source")] == {
        "type": "mysql-source",
        "name": "MySQL source",
        "version": "1.2.0",
        "category": "sources",
        "description": "Reads rows from a MySQL database.",
        "effect": {"default": "read"},
        "ports": {"inputs": ["input"], "outputs": ["output"]},
        "resources": {"cpu": "100m", "memory": "512Mi"},
        "s3Location": "s3://pilotflame-nodes/mysql-source/1.2.0",
        "runnable": True,
        "isTrigger": False,
    }


TRIGGERS = [
    "email-trigger",
    "event-trigger",
    "manual",
    "queue-trigger",
    "rest-api",
    "schedule-trigger",
    "webhook",
]


@pytest.mark.parametrize(
    ("query", "types"),
    [
        ("search=csv", ["csv-format", "csv-parse", "file-parse"]),
        ("search=LANGUAGE+MODEL", ["agent", "ai-gateway", "classifier", "extract", "llm", "llm-router"]),
        ("category=triggers", TRIGGERS),
        ("category=ai&search=node+of+the+catalog", ["tool"]),
        ("type=set", ["set"]),
        ("type=se", []),
        ("category=triggers&limit=1&offset=1", TRIGGERS[1:2]),
    ],
)
async def test_the_catalogue_is_searched(people: OrganizationUsers, query: str, types: list[str]) -> None:
    listed = await get_catalog(people.owner, query)
    assert [node["type"] for node in listed["nodes"]] == types
    assert listed["count"] == (len(TRIGGERS) if "offset" in query else len(types))


async def test_every_node_type_shows_its_config_schema(people: OrganizationUsers) -> None:
    for entry in (await get_catalog(people.owner, "limit=100"))["nodes"]:
        response = await people.owner.api.get(f"{CATALOGUE}/{entry['type']}/schema")
        shown = response.json()
        assert {name: shown[name] for name in entry} == entry
        config = jsonschema_rs.Draft202012Validator(shown["config"])
        output = jsonschema_rs.Draft202012Validator(shown["output"]["schema"])
        assert shown["defaults"].keys() <= shown["config"].get("properties", {}).keys()
        assert shown["examples"]
        for example in shown["examples"]:
            assert "error" in example or output.is_valid(example["output"])
            assert config.is_valid(example["config"]) or "{{" in str(example["config"])


async def test_the_schema_of_a_type_is_whole(people: OrganizationUsers) -> None:
    shown = (await people.owner.api.get(f"{CATALOGUE}/mysql-source/schema")).json()
    assert shown["config"]["properties"]["dataSource"]["x-resource"] == "datasources:read"
    assert shown["defaults"] == {"parameters": [], "maxRows": 10_000, "timeoutSeconds": 30}
    assert shown["output"]["schema"]["required"] == ["rows", "columns", "count"]
    shown = (await people.owner.api.get(f"{CATALOGUE}/set/schema")).json()
    assert shown["evaluated"] == {"values": "value"}
    assert shown["ports"] == {"inputs": ["input"], "outputs": ["output"]}
    assert shown["output"] == {
        "description": shown["output"]["description"],
        "schema": {},
        "keepsInput": True,
        "droppedBy": {"mode": "replace"},
        "fieldsOf": "values",
    }
    shown = (await people.owner.api.get(f"{CATALOGUE}/http-request/schema")).json()
    assert (shown["effect"]["default"], shown["effect"]["field"], shown["effect"]["cases"]["GET"]) == (
        "write",
        "method",
        "read",
    )


async def test_a_router_shows_where_its_ports_are_named(people: OrganizationUsers) -> None:
    shown = (await people.owner.api.get(f"{CATALOGUE}/switch/schema")).json()
    assert shown["ports"] == {"inputs": ["input"], "outputs": ["default"], "outputsFrom": "cases[].port"}
    assert shown["evaluated"] == {"cases[].condition": "condition"}


async def test_a_type_that_is_not_there_is_answered_with_the_nearest(people: OrganizationUsers) -> None:
    response = await people.owner.api.get(f"{CATALOGUE}/mysql-sorce/schema")
    assert_refused(response, 404, "not-found")
    assert "did you mean mysql-source" in response.json()["error"]["message"]
