"""Test runs over HTTP: a graph up to a node, nodes with given outputs, and a single node."""

import json
from collections.abc import AsyncIterator
from itertools import pairwise
from typing import Any

import httpx2
import pytest
from sqlalchemy import select
from sqlmodel import col

from gateway.http import limits
from models.execution import Execution
from models.workflow import Definition
from tests.integration.gateway_harness import (
    GRAPH,
    TRIGGER,
    GatewayHarness,
    OrganizationUsers,
    UserClient,
    assert_refused,
)
from workers.main import run_worker
from workers.settings import WorkerSettings

pytestmark = pytest.mark.anyio

WORKFLOWS = "/api/v1/workflows"
EXECUTIONS = "/api/v1/executions"


@pytest.fixture(scope="module", autouse=True)
async def worker(harness: GatewayHarness) -> AsyncIterator[None]:
    gateway = harness.gateway
    settings = WorkerSettings(
        **gateway.settings.model_dump(include={"data_dir", "database_url", "secret_key"}),
        lease_seconds=5,
        sweep_seconds=60,
    )
    async with run_worker(settings, gateway.store, gateway.broker, gateway.database):
        yield


def set_node(node_id: str, **values: Any) -> dict[str, Any]:  # noqa: ANN401 - any JSON value
    """Return a node that adds values to its input."""
    return {"id": node_id, "nodeId": "set", "config": {"values": values}}


def chain_graph(*nodes: dict[str, Any]) -> dict[str, Any]:
    """Return a graph in which each node leads to the next."""
    ids = [node["id"] for node in nodes]
    edges = [{"source": source, "target": target} for source, target in pairwise(ids)]
    return {"nodes": list(nodes), "connections": edges}


async def execute_workflow(person: UserClient, workflow_id: str, **body: Any) -> httpx2.Response:  # noqa: ANN401 - any JSON value
    return await person.api.post(f"{WORKFLOWS}/{workflow_id}/execute", json=body)


async def wait_until_ended(person: UserClient, response: httpx2.Response) -> dict[str, Any]:
    """Wait until an accepted execution has ended, and return it."""
    assert response.status_code in {201, 202}, response.text
    path = f"{EXECUTIONS}/{response.json()['executionId']}/progress"
    progress: dict[str, Any] = (await person.api.get(path)).json()
    return progress


async def request_node_test(
    person: UserClient,
    workflow_id: str,
    node_id: str,
    **body: Any,  # noqa: ANN401 - any JSON value
) -> httpx2.Response:
    return await person.api.post(f"{WORKFLOWS}/{workflow_id}/nodes/{node_id}/test", json=body)


async def run_node_test(person: UserClient, node: dict[str, Any], **body: Any) -> dict[str, Any]:  # noqa: ANN401 - any JSON value
    """Try a node of a workflow of its own, and return the answer."""
    workflow_id = await person.create(**chain_graph(TRIGGER, node))
    response = await request_node_test(person, workflow_id, node["id"], **body)
    assert response.status_code == 200, response.text
    answer: dict[str, Any] = response.json()
    return answer


def error_details(response: httpx2.Response) -> list[tuple[str, str]]:
    assert_refused(response, 422, "validation-failed")
    return [(detail["path"], detail["code"]) for detail in response.json()["error"]["details"]]


# ── execute, up to a node ───────────────────────────────────────────────────────────────────────────────────

UNFINISHED = {"id": "later", "nodeId": "sort", "config": {"itmes": []}}


async def test_a_draft_that_is_broken_elsewhere_runs_up_to_a_node_that_is_fine(
    harness: GatewayHarness, people: OrganizationUsers
) -> None:
    graph = chain_graph(TRIGGER, set_node("first", a=1), set_node("second", b=2), UNFINISHED)
    graph["connections"].append({"source": "first", "target": "gone"})
    graph["nodes"].append(set_node("beside", c=3))
    graph["connections"].append({"source": "first", "target": "beside"})
    workflow_id = await people.owner.create(**graph)
    before = await people.owner.workflow(workflow_id)
    assert_refused(await execute_workflow(people.owner, workflow_id), 422, "validation-failed")
    response = await execute_workflow(people.owner, workflow_id, upTo="second")
    progress = await wait_until_ended(people.owner, response)
    assert (progress["status"], progress["completedNodes"], progress["totalNodes"]) == ("completed", 3, 3)
    assert set(progress["outputs"]) == {"start", "first", "second"}
    assert progress["outputs"]["second"] == {"body": {}, "a": 1, "b": 2}
    assert await people.owner.workflow(workflow_id) == before
    pinned = await read_definition(harness, response.json()["executionId"])
    assert pinned["upTo"] == "second"


async def read_definition(harness: GatewayHarness, execution_id: str) -> dict[str, Any]:
    """Return the definition snapshot of an execution."""
    statement = (
        select(col(Definition.body))
        .join(Execution, col(Execution.definition_hash) == col(Definition.hash))
        .where(
            col(Execution.id) == execution_id,
            col(Execution.organization_id) == col(Definition.organization_id),
        )
    )
    async with harness.gateway.database.read() as connection:
        found: dict[str, Any] = json.loads(await connection.scalar(statement) or "")
        return found


async def test_an_invalid_node_before_the_last_one_is_refused(people: OrganizationUsers) -> None:
    workflow_id = await people.owner.create(**chain_graph(TRIGGER, UNFINISHED, set_node("last", a=1)))
    found = error_details(await execute_workflow(people.owner, workflow_id, upTo="last"))
    assert found == [("nodes.later", "invalid-config")]


# ── execute, with pinned outputs ────────────────────────────────────────────────────────────────────────────

FAILING = {"id": "fails", "nodeId": "stop-with-error", "config": {"message": "never run"}}


async def test_nothing_before_a_pinned_node_runs(harness: GatewayHarness, people: OrganizationUsers) -> None:
    agent = {"id": "agent", "nodeId": "agent", "config": {"model": "{{ what", "no": "field"}}
    workflow_id = await people.owner.create(
        **chain_graph(TRIGGER, FAILING, agent, set_node("last", a="{{ data.x }}"))
    )
    response = await execute_workflow(people.owner, workflow_id, pinned={"agent": {"x": [7]}})
    progress = await wait_until_ended(people.owner, response)
    assert (progress["status"], progress["totalNodes"]) == ("completed", 2)
    assert progress["outputs"] == {"agent": {"x": [7]}, "last": {"x": [7], "a": [7]}}
    assert (await read_definition(harness, response.json()["executionId"]))["pinned"] == {"agent": {"x": [7]}}


async def test_nodes_with_other_successors_still_run(people: OrganizationUsers) -> None:
    graph = chain_graph(TRIGGER, set_node("first", a=1), set_node("pinned", b=2), set_node("last", c=3))
    graph["nodes"].append(set_node("beside", d=4))
    graph["connections"].append({"source": "first", "target": "beside"})
    workflow_id = await people.owner.create(**graph)
    progress = await wait_until_ended(
        people.owner, await execute_workflow(people.owner, workflow_id, pinned={"pinned": {"y": 5}})
    )
    assert progress["outputs"]["beside"] == {"body": {}, "a": 1, "d": 4}
    progress = await wait_until_ended(
        people.owner, await execute_workflow(people.owner, workflow_id, pinned={"pinned": {}}, upTo="last")
    )
    assert progress["outputs"] == {"pinned": {}, "last": {"c": 3}}


async def test_a_pinned_trigger_replaces_the_trigger_of_the_run(people: OrganizationUsers) -> None:
    workflow_id = await people.owner.create(
        **chain_graph(TRIGGER, set_node("first", a="{{ trigger.x }}", b="{{ nodes.start.x }}"))
    )
    response = await execute_workflow(
        people.owner, workflow_id, pinned={"start": {"x": 1}}, triggerInputs={"y": 2}
    )
    progress = await wait_until_ended(people.owner, response)
    assert progress["outputs"]["first"] == {"x": 1, "a": 1, "b": 1}
    shown = (await people.owner.api.get(f"{EXECUTIONS}/{progress['executionId']}")).json()
    assert shown["trigger"] == {"type": "manual", "data": {"x": 1}}


async def test_a_definition_of_ones_own_is_tried_in_pieces_too(people: OrganizationUsers) -> None:
    workflow_id = await people.owner.create()
    graph = chain_graph(set_node("first", a=1), set_node("second", b=2), FAILING)
    response = await execute_workflow(
        people.owner, workflow_id, definition=graph, upTo="second", pinned={"first": {"x": 0}}
    )
    assert (await wait_until_ended(people.owner, response))["outputs"]["second"] == {"x": 0, "b": 2}


@pytest.mark.parametrize(
    ("body", "found"),
    [
        ({"upTo": "stap"}, [("upTo", "unknown-node")]),
        ({"upTo": ""}, [("upTo", "unknown-node")]),
        ({"upTo": 7}, [("upTo", "invalid-type")]),
        ({"pinned": []}, [("pinned", "invalid-type")]),
        ({"pinned": {"a": 1, "b": 2}}, [("pinned.a", "unknown-node"), ("pinned.b", "unknown-node")]),
        ({"pinned": {"step": "x" * 100}}, [("pinned", "too-large")]),
    ],
)
async def test_a_piece_is_one_of_the_workflow_and_bounded(
    people: OrganizationUsers,
    monkeypatch: pytest.MonkeyPatch,
    body: dict[str, Any],
    found: list[tuple[str, str]],
) -> None:
    monkeypatch.setattr(limits, "PINNED_BYTES", 100)
    workflow_id = await people.owner.create(**GRAPH)
    assert error_details(await execute_workflow(people.owner, workflow_id, **body)) == found


# ── one node alone ──────────────────────────────────────────────────────────────────────────────────────────


async def test_a_tested_node_runs_on_the_given_input(people: OrganizationUsers) -> None:
    config = {"message": "{{ data.x }} {{ trigger.body.y }} {{ nodes.start.z }} {{ data.none }}"}
    graph = chain_graph(TRIGGER, FAILING, {"id": "says", "nodeId": "log", "config": config}, UNFINISHED)
    workflow_id = await people.owner.create(**graph, settings={"strictMappings": False})
    given = {"input": {"x": 1}, "trigger": {"y": 2}, "nodes": {"fails": {}, "later": {"z": 3}}}
    config["message"] = config["message"].replace("start", "later")
    response = await request_node_test(people.owner, workflow_id, "says", config=config, **given)
    assert response.status_code == 200, response.text
    answer = response.json()
    (line,) = answer.pop("logs")
    assert (line["level"], line["message"], line["nodeId"]) == ("info", "1 2 3 ", "says")
    assert response.headers["Location"].endswith(answer["executionId"])
    assert isinstance(answer.pop("durationMs"), int)
    assert answer == {
        "executionId": answer["executionId"],
        "status": "completed",
        "output": {"x": 1},
        "port": "output",
        "error": None,
        "unresolved": ["data.none"],
    }
    shown = (await people.owner.api.get(f"{EXECUTIONS}/{answer['executionId']}")).json()
    assert (shown["triggerType"], shown["workflowId"]) == ("test", workflow_id)
    assert "retryOnFailure" not in shown["config"]
    listed = (await people.owner.api.get(f"{EXECUTIONS}?trigger_type=test&workflow_id={workflow_id}")).json()
    assert [execution["id"] for execution in listed["executions"]] == [answer["executionId"]]


async def test_mappings_and_ports_are_the_nodes_own(people: OrganizationUsers) -> None:
    node = {
        "id": "asks",
        "nodeId": "conditional",
        "inputMappings": {"total": "data.order.total"},
        "passThroughValues": {"sum": "total"},
        "config": {"condition": {"left": "{{ data.total }}", "operator": "greater-than", "right": 5}},
    }
    answer = await run_node_test(people.owner, node, input={"order": {"total": 7}})
    assert answer["port"] == "true"
    assert answer["output"] == {"order": {"total": 7}, "total": 7, "sum": 7}


async def test_an_object_keeps_the_order_of_its_fields(people: OrganizationUsers) -> None:
    config = {"items": "{{ data.rows }}"}
    rows = [{"name": "Oslo", "celsius": 12, "at": "noon"}]
    answer = await run_node_test(
        people.owner, {"id": "csv", "nodeId": "csv-format", "config": config}, input={"rows": rows}
    )
    assert answer["output"]["columns"] == ["name", "celsius", "at"]


async def test_a_loop_is_run_with_its_body(people: OrganizationUsers) -> None:
    inner = {"id": "inner", "nodeId": "loop", "config": {"items": "{{ item.list }}"}}
    graph = chain_graph(
        TRIGGER,
        {"id": "outer", "nodeId": "loop"},
        inner,
        set_node("first", a="{{ nodes.beside.x }}"),
        set_node("last"),
    )
    for edge in graph["connections"]:
        if edge["source"] in {"outer", "inner"}:
            edge["sourcePort"] = "continue"
    graph["nodes"] += [set_node("beside"), FAILING]
    graph["connections"].append({"source": "outer", "target": "fails", "sourcePort": "done"})
    workflow_id = await people.owner.create(**graph)
    items = [{"list": [{"n": 1}, {"n": 2}]}, {"list": []}]
    response = await request_node_test(
        people.owner, workflow_id, "outer", input=items, nodes={"beside": {"x": 7}}
    )
    answer = response.json()
    assert (answer["status"], answer["port"], answer["error"]) == ("completed", "done", None), answer
    turns = [result["results"] for result in answer["output"]["results"]]
    assert turns == [[{"n": 1, "a": 7}, {"n": 2, "a": 7}], []]


async def test_a_node_that_fails_says_why(people: OrganizationUsers) -> None:
    answer = await run_node_test(people.owner, {"id": "sorts", "nodeId": "sort", "config": {}}, input="text")
    assert (answer["status"], answer["output"], answer["port"]) == ("failed", None, None)
    assert (answer["error"]["code"], answer["error"]["nodeId"]) == ("invalid-config", "sorts")


@pytest.mark.parametrize(
    ("node_type", "given", "output"),
    [
        ("webhook", {"input": {"x": 1}}, {"body": {"x": 1}, "headers": {}, "query": {}}),
        ("manual", {}, {"body": {}}),
        ("manual", {"trigger": {"x": 1}}, {"body": {"x": 1}}),
        ("queue-trigger", {"input": {"x": 1}}, {"message": {"x": 1}, "priority": 0, "source": "rest_api"}),
    ],
)
async def test_a_trigger_outputs_its_data(
    people: OrganizationUsers, node_type: str, given: dict[str, Any], output: dict[str, Any]
) -> None:
    workflow_id = await people.owner.create(
        **chain_graph({"id": "begin", "nodeId": node_type}, set_node("next", a=1))
    )
    response = await request_node_test(people.owner, workflow_id, "begin", **given)
    assert response.json()["output"] == output


async def test_an_answer_waits_only_as_long_as_it_is_told_to(people: OrganizationUsers) -> None:
    workflow_id = await people.owner.create(
        **chain_graph(TRIGGER, {"id": "waits", "nodeId": "wait", "config": {"seconds": 3600}})
    )
    response = await request_node_test(people.owner, workflow_id, "waits", wait=0)
    assert response.status_code == 202
    execution_id = response.json()["executionId"]
    assert set(response.json()) == {"executionId", "status"}
    assert response.headers["Location"].endswith(f"{EXECUTIONS}/{execution_id}")
    assert (await people.owner.api.post(f"{EXECUTIONS}/{execution_id}/cancel")).status_code == 200


async def test_a_config_is_tried_without_being_stored(people: OrganizationUsers) -> None:
    workflow_id = await people.owner.create(**GRAPH)
    before = await people.owner.workflow(workflow_id)
    response = await request_node_test(
        people.owner, workflow_id, "step", config={"values": {"b": "{{ data.x }}"}}, input={"x": 2}
    )
    assert response.json()["output"] == {"x": 2, "b": 2}
    assert await people.owner.workflow(workflow_id) == before
    found = error_details(await request_node_test(people.owner, workflow_id, "step", config={"valeus": {}}))
    assert ("nodes.step", "invalid-config") in found


async def test_a_repeated_try_gets_the_first_answer(people: OrganizationUsers) -> None:
    workflow_id = await people.owner.create(**GRAPH)
    path, key = f"{WORKFLOWS}/{workflow_id}/nodes/step/test", {"Idempotency-Key": "once"}
    first = await people.owner.api.post(path, json={"input": {"x": 1}}, headers=key)
    again = await people.owner.api.post(path, json={"input": {"x": 1}}, headers=key)
    assert (again.status_code, again.json()) == (200, first.json())
    assert again.headers["Idempotent-Replayed"] == "true"
    other = await people.owner.api.post(path, json={"input": {"x": 2}}, headers=key)
    assert_refused(other, 422, "idempotency-mismatch")


async def test_an_impossible_test_run_is_refused(people: OrganizationUsers) -> None:
    workflow_id = await people.owner.create(
        nodes=[
            TRIGGER,
            set_node("twin", a=1),
            set_node("twin", a=2),
            UNFINISHED,
            {"id": "tool", "nodeId": "tool"},
        ],
        connections=[],
    )
    assert_refused(await request_node_test(people.owner, workflow_id, "absent"), 404, "not-found")
    assert_refused(await request_node_test(people.owner, workflow_id, "twin"), 409, "duplicate-node-id")
    assert error_details(await request_node_test(people.owner, workflow_id, "later")) == [
        ("nodes.later", "invalid-config")
    ]
    assert ("nodes.tool", "not-runnable") in error_details(
        await request_node_test(people.owner, workflow_id, "tool")
    )
    given = {"nodes": {"start": 1, "later": 2, "lateer": 3}}
    found = error_details(await request_node_test(people.owner, workflow_id, "later", **given))
    assert found == [("nodes.later", "unknown-node"), ("nodes.lateer", "unknown-node")]
    assert error_details(await request_node_test(people.owner, workflow_id, "start", input=[1])) == [
        ("input", "invalid-type")
    ]
    assert error_details(await request_node_test(people.owner, workflow_id, "start", wait=31)) == [
        ("wait", "invalid-value")
    ]
    await people.owner.api.put(f"{WORKFLOWS}/{workflow_id}/status", json={"status": "paused"})
    assert_refused(await request_node_test(people.owner, workflow_id, "start"), 409, "workflow-paused")
