"""A graph edited piece by piece over HTTP, by one client and by many at once."""

import asyncio
import random
from collections.abc import AsyncIterator, Iterable
from datetime import UTC, datetime
from itertools import cycle
from typing import Any

import httpx2
import pytest
from sqlalchemy import insert, select, update
from sqlalchemy.ext.asyncio import AsyncConnection
from sqlmodel import col

from models.audit import AuditEntry
from models.workflow import WorkflowGraph, WorkflowShare
from tests.integration.gateway_harness import (
    GRAPH,
    STEP,
    TRIGGER,
    GatewayHarness,
    OrganizationUsers,
    UserClient,
    assert_refused,
)
from tests.integration.second_gateway import run_second_gateway

WORKFLOWS = "/api/v1/workflows"
CHOOSE = {"id": "choose", "nodeId": "conditional"}
LINE: dict[str, Any] = {
    "nodes": [TRIGGER, STEP, {"id": "last", "nodeId": "set"}],
    "connections": [
        {"id": "first", "sourceNodeId": "start", "targetNodeId": "step"},
        {"id": "second", "sourceNodeId": "step", "targetNodeId": "last"},
    ],
}
"""Three nodes in a row."""


@pytest.fixture(scope="module")
async def people(harness: GatewayHarness) -> OrganizationUsers:
    return await harness.people()


@pytest.fixture(scope="module")
async def other_gateway_client(
    harness: GatewayHarness, people: OrganizationUsers
) -> AsyncIterator[httpx2.AsyncClient]:
    """Client of the owner at a second gateway: order within one process alone is not enough."""
    async with run_second_gateway(harness) as client_of, client_of(people.owner) as client:
        yield client


def error_detail(response: httpx2.Response) -> dict[str, Any]:
    """Return the first detail of a refused body."""
    assert_refused(response, 422, "validation-failed")
    first: dict[str, Any] = response.json()["error"]["details"][0]
    return first


async def list_nodes(person: UserClient, workflow_id: str) -> list[dict[str, Any]]:
    response = await person.api.get(f"{WORKFLOWS}/{workflow_id}/nodes")
    assert response.status_code == 200, response.text
    nodes: list[dict[str, Any]] = response.json()["nodes"]
    return nodes


async def get_node(person: UserClient, workflow_id: str, node_id: str) -> dict[str, Any]:
    """Return a node as the workflow shows it."""
    nodes = (await person.workflow(workflow_id))["nodes"]
    return next(one for one in nodes if one["id"] == node_id)


def dangling_edges(workflow: dict[str, Any]) -> list[dict[str, Any]]:
    ids = {one["id"] for one in workflow["nodes"]}
    return [
        edge for edge in workflow["connections"] if not {edge["sourceNodeId"], edge["targetNodeId"]} <= ids
    ]


# ── nodes ───────────────────────────────────────────────────────────────────────────────────────────────────


async def test_a_node_is_added_as_the_catalogue_resolves_it(
    harness: GatewayHarness, people: OrganizationUsers
) -> None:
    workflow_id = await people.owner.create(**GRAPH)
    node_type = harness.gateway.catalog.get("mysql-source")
    given = {
        "label": "Extract Orders",
        "position": {"x": 100, "y": 900},
        "config": {"dataSource": "ds_001", "query": "SELECT * FROM orders"},
        "retry": {"maxAttempts": 3},
        "timeout": 30,
        "atMostOnce": True,
    }
    response = await people.owner.api.post(
        f"{WORKFLOWS}/{workflow_id}/nodes", json={"nodeId": "mysql-source", "version": "1.2.0", **given}
    )
    assert response.status_code == 201
    answer = response.json()
    node_id = answer["nodeId"]
    assert node_id.startswith("node-")
    assert (set(answer), answer["workflowId"]) == ({"nodeId", "workflowId", "node"}, workflow_id)
    assert answer["node"] == given | {
        "id": node_id,
        "type": "mysql-source",
        "category": "sources",
        "nodeVersion": "1.2.0",
        "data": {},
        "s3Location": node_type.s3_location,
        "resources": dict(node_type.resources),
        "inputMappings": {},
        "passThroughValues": {},
    }
    shown = await people.owner.workflow(workflow_id)
    assert [one["id"] for one in shown["nodes"]] == ["start", "step", node_id]
    assert response.headers["ETag"] == '"2"'


@pytest.mark.parametrize("alias", ["nodeId", "nodeType", "type"])
async def test_the_least_that_makes_a_node_is_its_type(people: OrganizationUsers, alias: str) -> None:
    workflow_id = await people.owner.create(**GRAPH)
    response = await people.owner.api.post(f"{WORKFLOWS}/{workflow_id}/nodes", json={alias: "http-request"})
    added = response.json()["node"]
    assert (added["type"], added["label"], added["config"]) == ("http-request", "HTTP request", {})
    assert added["nodeVersion"] == "1.0.0"
    assert not {"retry", "timeout"} & set(added)


async def test_nodes_without_a_position_are_put_where_nothing_is(people: OrganizationUsers) -> None:
    workflow_id = await people.owner.create()
    for _ in range(5):
        await people.owner.api.post(f"{WORKFLOWS}/{workflow_id}/nodes", json={"nodeId": "set"})
    places = [
        (one["position"]["x"], one["position"]["y"]) for one in await list_nodes(people.owner, workflow_id)
    ]
    assert len(set(places)) == 5
    assert places == sorted(places)


async def test_a_node_may_bring_an_id_that_is_free(people: OrganizationUsers) -> None:
    workflow_id = await people.owner.create(**GRAPH)
    path = f"{WORKFLOWS}/{workflow_id}/nodes"
    assert (await people.owner.api.post(path, json={"id": "mine", "nodeId": "set"})).json()[
        "nodeId"
    ] == "mine"
    assert_refused(
        await people.owner.api.post(path, json={"id": "mine", "nodeId": "set"}), 409, "duplicate-node-id"
    )
    wrong = error_detail(await people.owner.api.post(path, json={"id": "no id", "nodeId": "set"}))
    assert (wrong["path"], wrong["code"]) == ("id", "invalid-id")


async def test_an_unknown_type_or_version_is_refused_with_the_known_ones(people: OrganizationUsers) -> None:
    workflow_id = await people.owner.create(**GRAPH)
    path = f"{WORKFLOWS}/{workflow_id}/nodes"
    unknown = error_detail(await people.owner.api.post(path, json={"nodeId": "http-requets"}))
    assert (unknown["path"], unknown["code"]) == ("nodeId", "unknown-node-type")
    assert "did you mean http-request" in unknown["message"]
    for response in (
        await people.owner.api.post(path, json={"nodeId": "set", "version": "9.9.9"}),
        await people.owner.api.put(f"{path}/step", json={"config": {}, "version": "9.9.9"}),
    ):
        assert "the catalog has 1.0.0" in error_detail(response)["message"]
    assert len(await list_nodes(people.owner, workflow_id)) == 2


async def test_a_list_shows_nodes_with_the_number_of_their_connections(people: OrganizationUsers) -> None:
    workflow_id = await people.owner.create(**LINE)
    response = await people.owner.api.get(f"{WORKFLOWS}/{workflow_id}/nodes")
    body = response.json()
    assert (body["workflowId"], body["count"], response.headers["ETag"]) == (workflow_id, 3, '"1"')
    assert body["nodes"][1] == {
        "id": "step",
        "type": "set",
        "label": "Step",
        "category": "transform",
        "position": body["nodes"][1]["position"],
        "hasConfig": True,
        "inboundConnections": 1,
        "outboundConnections": 1,
        "nodeVersion": "1.0.0",
    }
    assert [one["hasConfig"] for one in body["nodes"]] == [False, True, False]
    assert [one["inboundConnections"] for one in body["nodes"]] == [0, 1, 1]
    assert [one["outboundConnections"] for one in body["nodes"]] == [1, 1, 0]


async def test_a_type_that_left_the_catalogue_is_still_listed(
    harness: GatewayHarness, people: OrganizationUsers
) -> None:
    workflow_id = await people.owner.create(**GRAPH)
    gone = {"id": "old", "type": "gone", "label": "Old", "version": "0.1", "position": {"x": 0, "y": 0}}
    gone |= {"config": {}, "inputMappings": {}, "passThroughValues": {}}

    async def store(connection: AsyncConnection) -> None:
        statement = update(WorkflowGraph).where(col(WorkflowGraph.workflow_id) == workflow_id)
        await connection.execute(statement.values(nodes=[gone]))

    await harness.gateway.database.transaction(store)
    (shown,) = await list_nodes(people.owner, workflow_id)
    assert (shown["type"], shown["category"], shown["nodeVersion"]) == ("gone", "unknown", "0.1")
    response = await people.owner.api.put(f"{WORKFLOWS}/{workflow_id}/nodes/old", json={"label": "Older"})
    assert response.json()["node"]["category"] == "unknown"


# ── configuring ─────────────────────────────────────────────────────────────────────────────────────────────


async def test_a_config_merges_and_null_takes_a_key_away(people: OrganizationUsers) -> None:
    config = {"url": "https://a.example", "query": {"a": 1}, "body": None}
    workflow_id = await people.owner.create(
        nodes=[{"id": "call", "nodeId": "http-request", "config": config}]
    )
    path = f"{WORKFLOWS}/{workflow_id}/nodes/call"
    changes = {"method": "POST", "query": {"b": 2}}
    response = await people.owner.api.put(path, json={"config": changes, "label": "Renamed"})
    assert response.status_code == 200
    answer = response.json()
    assert (answer["nodeId"], answer["workflowId"]) == ("call", workflow_id)
    assert answer["node"]["label"] == "Renamed"
    assert (answer["node"]["type"], answer["node"]["category"]) == ("http-request", "io")
    assert answer["node"]["config"] == config | changes
    response = await people.owner.api.put(path, json={"config": {"method": None, "absent": None}})
    assert response.json()["node"]["config"] == config | {"query": {"b": 2}}
    stored = await get_node(people.owner, workflow_id, "call")
    assert (stored["config"], stored["label"]) == (response.json()["node"]["config"], "Renamed")


@pytest.mark.parametrize(
    ("body", "label", "config"),
    [
        ({"label": "New"}, "New", {"values": {"a": 1}}),
        ({"config": {"b": 2}}, "Step", {"values": {"a": 1}, "b": 2}),
        ({"config": {"label": "inside"}, "label": "New"}, "New", {"values": {"a": 1}, "label": "inside"}),
        ({"values": None, "label": "inside"}, "Step", {"label": "inside"}),
        ({"values": {"b": 2}}, "Step", {"values": {"b": 2}}),
        ({"__proto__": {"a": 1}}, "Step", {"values": {"a": 1}, "__proto__": {"a": 1}}),
        ({"config": None}, "Step", {"values": {"a": 1}}),
        ({}, "Step", {"values": {"a": 1}}),
    ],
)
async def test_a_body_is_wrapped_or_is_the_config_itself(
    people: OrganizationUsers, body: dict[str, Any], label: str, config: dict[str, Any]
) -> None:
    workflow_id = await people.owner.create(**GRAPH)
    response = await people.owner.api.put(f"{WORKFLOWS}/{workflow_id}/nodes/step", json=body)
    assert response.status_code == 200
    assert (response.json()["node"]["label"], response.json()["node"]["config"]) == (label, config)


async def test_fields_of_a_node_are_no_config(people: OrganizationUsers) -> None:
    tool = {"id": "tool", "nodeId": "tool", "config": {}}
    workflow_id = await people.owner.create(**{**GRAPH, "nodes": [*GRAPH["nodes"], tool]})
    path = f"{WORKFLOWS}/{workflow_id}/nodes"
    before = (await people.owner.api.get(f"{WORKFLOWS}/{workflow_id}")).json()
    refusals: list[tuple[dict[str, Any], dict[str, str]]] = [
        ({"nodeId": "set"}, {"nodeId": "which does not change, so leave it out"}),
        (
            {"label": "New", "position": {"x": 1, "y": 2}},
            {
                "label": 'which {"config": {}, "label": …} changes',
                "position": 'which {"config": {}, "position": …} changes',
            },
        ),
        ({"inputMappings": {"a": "data.a"}}, {"inputMappings": "/input-mappings changes"}),
        ({"timeout": 5}, {"timeout": 'send {"config": {"timeout": …}}'}),
    ]
    for body, hints in refusals:
        refused = await people.owner.api.put(f"{path}/step", json=body)
        assert_refused(refused, 422, "validation-failed")
        details = refused.json()["error"]["details"]
        assert {one["path"] for one in details} == hints.keys()
        assert all(one["code"] == "config-required" for one in details)
        assert all(hints[one["path"]] in one["message"] for one in details)
    assert (await people.owner.api.get(f"{WORKFLOWS}/{workflow_id}")).json() == before
    # The config of a tool has a timeout of its own.
    answer = await people.owner.api.put(f"{path}/tool", json={"timeout": 5, "label": "inside"})
    assert answer.json()["node"]["config"] == {"timeout": 5, "label": "inside"}
    answer = await people.owner.api.put(f"{path}/step", json={"config": {"timeout": 5}, "nodeId": "set"})
    assert answer.json()["node"]["config"] == {"values": {"a": 1}, "timeout": 5}


async def test_fields_beside_the_config_are_set_and_removed(people: OrganizationUsers) -> None:
    workflow_id = await people.owner.create(**GRAPH)
    path = f"{WORKFLOWS}/{workflow_id}/nodes/step"
    beside: dict[str, Any] = {
        "retry": {"maxAttempts": 2},
        "timeout": 5,
        "version": "1.0.0",
        "atMostOnce": True,
    }
    place = {"position": {"x": -7, "y": 8.5}}
    await people.owner.api.put(path, json={"config": {}, **beside, **place})
    stored = await get_node(people.owner, workflow_id, "step")
    assert stored.items() >= (beside | place).items()
    await people.owner.api.put(path, json={"config": {}, **dict.fromkeys(beside), "position": None})
    stored = await get_node(people.owner, workflow_id, "step")
    assert not set(beside) & set(stored)
    assert stored["position"] == place["position"]


async def test_mappings_are_set_in_place_of_those_before(people: OrganizationUsers) -> None:
    workflow_id = await people.owner.create(**GRAPH)
    path = f"{WORKFLOWS}/{workflow_id}/nodes/step/input-mappings"
    await people.owner.api.put(path, json={"mappings": {"old": "data.old"}})
    mappings = {
        "userId": "data.user.id",
        "greeting": "Hello {{ trigger.body.name }}",
        "row": 'nodes.start["odd key"][0]',
        "limit": 5,
        "nothing": None,
        "list": [True, "{{ data.x }}"],
    }
    response = await people.owner.api.put(path, json={"mappings": mappings})
    assert response.status_code == 200
    assert response.json() == {"nodeId": "step", "workflowId": workflow_id, "inputMappings": mappings}
    assert (await get_node(people.owner, workflow_id, "step"))["inputMappings"] == mappings


async def test_mappings_that_no_run_could_read_are_refused_each_with_its_field(
    people: OrganizationUsers,
) -> None:
    workflow_id = await people.owner.create(**GRAPH)
    mappings = {
        "a": "user.id",
        "b": "data..x",
        "c": "{{ data.x",
        "d": "data.fine",
        "e": "",
        "f": {"g": "{{}}"},
    }
    response = await people.owner.api.put(
        f"{WORKFLOWS}/{workflow_id}/nodes/step/input-mappings", json={"mappings": mappings}
    )
    assert_refused(response, 422, "validation-failed")
    details = response.json()["error"]["details"]
    assert [one["path"] for one in details] == [f"mappings.{field}" for field in "abcef"]
    assert {one["code"] for one in details} == {"invalid-expression"}
    assert "did you mean data.user.id?" in details[0]["message"]
    assert (await get_node(people.owner, workflow_id, "step"))["inputMappings"] == {}


async def test_pass_through_values_replace_earlier_ones(people: OrganizationUsers) -> None:
    workflow_id = await people.owner.create(**GRAPH)
    path = f"{WORKFLOWS}/{workflow_id}/nodes/step/passthrough-values"
    await people.owner.api.put(path, json={"values": {"old": "old"}})
    values = {"correlationId": "correlationId", "tenant": "tenantId"}
    response = await people.owner.api.put(path, json={"values": values})
    assert response.status_code == 200
    assert response.json() == {"nodeId": "step", "workflowId": workflow_id, "passThroughValues": values}
    assert (await get_node(people.owner, workflow_id, "step"))["passThroughValues"] == values


# ── removing and connecting ─────────────────────────────────────────────────────────────────────────────────


async def test_a_removed_node_takes_its_connections_along(people: OrganizationUsers) -> None:
    workflow_id = await people.owner.create(**LINE)
    response = await people.owner.api.delete(f"{WORKFLOWS}/{workflow_id}/nodes/step")
    assert response.status_code == 200
    assert response.json() == {
        "removed": True,
        "nodeId": "step",
        "removedConnections": 2,
        "workflowId": workflow_id,
    }
    shown = await people.owner.workflow(workflow_id)
    assert ([one["id"] for one in shown["nodes"]], shown["connections"]) == (["start", "last"], [])
    again = await people.owner.api.delete(f"{WORKFLOWS}/{workflow_id}/nodes/last")
    assert again.json()["removedConnections"] == 0


async def test_two_nodes_are_connected_in_either_spelling(people: OrganizationUsers) -> None:
    workflow_id = await people.owner.create(nodes=[TRIGGER, STEP, CHOOSE, STEP | {"id": "yes"}])
    path = f"{WORKFLOWS}/{workflow_id}/connections"
    response = await people.owner.api.post(path, json={"sourceNodeId": "start", "targetNodeId": "step"})
    assert response.status_code == 201
    answer = response.json()
    assert answer["connectionId"].startswith("conn-")
    ports = {"sourcePort": "output", "targetPort": "input"}
    assert answer == {
        "connectionId": answer["connectionId"],
        "workflowId": workflow_id,
        "connection": {"id": answer["connectionId"], "source": "start", "target": "step", **ports},
    }
    for body in (
        {"source": "step", "target": "choose"},
        {"source": "choose", "target": "yes", "sourcePort": "true", "id": "mine"},
        {"source": "choose", "target": "yes", "sourcePort": "error"},
    ):
        assert (await people.owner.api.post(path, json=body)).status_code == 201
    connections = (await people.owner.workflow(workflow_id))["connections"]
    assert [edge["sourcePort"] for edge in connections] == ["output", "output", "true", "error"]
    assert connections[2]["id"] == "mine"


async def test_an_agent_is_given_its_model_and_its_tools(people: OrganizationUsers) -> None:
    types = ("manual", "agent", "llm", "tool")
    workflow_id = await people.owner.create(nodes=[{"id": kind, "nodeId": kind} for kind in types])
    path = f"{WORKFLOWS}/{workflow_id}/connections"
    for source, port in (("manual", "input"), ("llm", "ai"), ("tool", "tools")):
        body = {"sourceNodeId": source, "targetNodeId": "agent", "targetPort": port}
        assert (await people.owner.api.post(path, json=body)).json()["connection"]["targetPort"] == port
    flaw = error_detail(await people.owner.api.post(path, json=body | {"targetPort": "memory"}))
    assert flaw["suggestion"] == "Use one of: input, ai, tools."


async def test_a_connection_is_removed(people: OrganizationUsers) -> None:
    workflow_id = await people.owner.create(**LINE)
    response = await people.owner.api.delete(f"{WORKFLOWS}/{workflow_id}/connections/first")
    assert response.status_code == 200
    assert response.json() == {"removed": True, "connectionId": "first", "workflowId": workflow_id}
    assert [one["id"] for one in (await people.owner.workflow(workflow_id))["connections"]] == ["second"]


@pytest.mark.parametrize(
    ("body", "path", "code", "hint"),
    [
        ({"source": "start", "target": "stp"}, "targetNodeId", "broken-connection", "Did you mean step"),
        (
            {"source": "nobody", "target": "step"},
            "sourceNodeId",
            "broken-connection",
            "GET the workflow's nodes",
        ),
        (
            {"source": "start", "target": "last", "sourcePort": "true"},
            "sourcePort",
            "invalid-port",
            "output, error",
        ),
        ({"source": "step", "target": "last", "targetPort": "ai"}, "targetPort", "invalid-port", "input"),
        ({"source": "step", "target": "start"}, "targetPort", "invalid-port", "with an input"),
        ({"source": "last", "target": "step"}, "targetNodeId", "cycle", "Remove a connection"),
        ({"source": "step", "target": "step"}, "targetNodeId", "cycle", "another node"),
    ],
)
async def test_a_connection_that_leads_nowhere_is_refused(
    people: OrganizationUsers, body: dict[str, str], path: str, code: str, hint: str
) -> None:
    workflow_id = await people.owner.create(**LINE)
    flaw = error_detail(await people.owner.api.post(f"{WORKFLOWS}/{workflow_id}/connections", json=body))
    assert (flaw["path"], flaw["code"]) == (path, code)
    assert hint in flaw["suggestion"]
    assert len((await people.owner.workflow(workflow_id))["connections"]) == 2


async def test_a_switch_is_connected_by_the_ports_of_its_cases(people: OrganizationUsers) -> None:
    cases = [{"port": "gold", "equals": 1}]
    switch = {"id": "choose", "type": "switch", "config": {"cases": cases}}
    workflow_id = await people.owner.create(nodes=[switch, {"id": "end", "type": "log"}])
    path = f"{WORKFLOWS}/{workflow_id}/connections"
    body = {"source": "choose", "target": "end"}
    flaw = error_detail(await people.owner.api.post(path, json=body | {"sourcePort": "silver"}))
    assert (flaw["code"], flaw["suggestion"]) == ("invalid-port", "Use one of: gold, default, error.")
    for port in ("gold", "default"):
        assert (await people.owner.api.post(path, json=body | {"sourcePort": port})).status_code == 201


async def test_the_same_connection_is_made_once(people: OrganizationUsers) -> None:
    workflow_id = await people.owner.create(**LINE)
    path = f"{WORKFLOWS}/{workflow_id}/connections"
    for body in (
        {"source": "start", "target": "step"},
        {"source": "start", "target": "last", "id": "first"},
    ):
        assert_refused(await people.owner.api.post(path, json=body), 409, "duplicate-connection")


# ── permissions and states ──────────────────────────────────────────────────────────────────────────────────


def edit_all(person: UserClient, workflow_id: str, **headers: str) -> Iterable[Any]:
    """Every edit of the three nodes in a row."""
    path = f"{WORKFLOWS}/{workflow_id}"
    request = person.api.request
    return [
        request("POST", f"{path}/nodes", json={"nodeId": "set"}, headers=headers),
        request("PUT", f"{path}/nodes/step", json={"label": "New"}, headers=headers),
        request("PUT", f"{path}/nodes/step/input-mappings", json={"mappings": {"a": 1}}, headers=headers),
        request("PUT", f"{path}/nodes/step/passthrough-values", json={"values": {"a": "b"}}, headers=headers),
        request("POST", f"{path}/connections", json={"source": "start", "target": "last"}, headers=headers),
        request("DELETE", f"{path}/connections/second", headers=headers),
        request("DELETE", f"{path}/nodes/last", headers=headers),
    ]


async def test_only_the_owner_and_admins_edit(harness: GatewayHarness, people: OrganizationUsers) -> None:
    workflow_id = await people.owner.create(**LINE)
    for person in (people.stranger, people.colleague):
        for edit in edit_all(person, workflow_id):
            assert_refused(await edit, 404, "not-found")
    row = {"workflow_id": workflow_id, "user_id": people.colleague.user.id, "shared_at": datetime.now(UTC)}

    async def share(connection: AsyncConnection) -> None:
        await connection.execute(insert(WorkflowShare).values(row))

    await harness.gateway.database.transaction(share)
    for edit in edit_all(people.colleague, workflow_id):
        assert_refused(await edit, 403, "not-owner")
    assert len(await list_nodes(people.colleague, workflow_id)) == 3
    for edit in edit_all(people.admin, workflow_id):
        assert (await edit).is_success


async def test_every_edit_answers_with_the_next_tag_and_leaves_a_trace(
    harness: GatewayHarness, people: OrganizationUsers
) -> None:
    workflow_id = await people.owner.create(**LINE)
    tags = [(await edit).headers["ETag"] for edit in edit_all(people.owner, workflow_id)]
    assert tags == [f'"{revision}"' for revision in range(2, 9)]
    response = await people.owner.api.get(f"{WORKFLOWS}/{workflow_id}/nodes")
    assert response.headers["ETag"] == tags[-1]
    async with harness.gateway.database.read() as connection:
        statement = (
            select(AuditEntry).where(col(AuditEntry.object_id) == workflow_id).order_by(col(AuditEntry.id))
        )
        trace = (await connection.execute(statement)).all()
    assert [entry.action for entry in trace[1:]] == [
        "node.added", "node.configured", "node.configured", "node.configured",
        "connection.added", "connection.removed", "node.removed",
    ]  # fmt: skip
    assert [entry.before_hash for entry in trace[1:]] == [entry.after_hash for entry in trace[:-1]]


async def test_an_edit_of_a_state_that_is_past_changes_nothing(people: OrganizationUsers) -> None:
    workflow_id = await people.owner.create(**LINE)
    await people.owner.api.put(f"{WORKFLOWS}/{workflow_id}/nodes/step", json={"label": "Newer"})
    before = await people.owner.workflow(workflow_id)
    for edit in edit_all(people.owner, workflow_id, **{"If-Match": '"1"'}):
        response = await edit
        assert_refused(response, 412, "precondition-failed")
        assert response.headers["ETag"] == '"2"'
    assert await people.owner.workflow(workflow_id) == before


async def test_setting_the_present_value_changes_no_state(people: OrganizationUsers) -> None:
    workflow_id = await people.owner.create(**GRAPH)
    path = f"{WORKFLOWS}/{workflow_id}/nodes/step"
    for url, body in (
        (path, {"values": {"a": 1}}),
        (path, {"label": "Step"}),
        (f"{path}/input-mappings", {"mappings": {}}),
    ):
        response = await people.owner.api.put(url, json=body)
        assert (response.status_code, response.headers["ETag"]) == (200, '"1"')


@pytest.mark.parametrize("value", [1, 1.0, True])
async def test_one_and_true_are_not_the_same(people: OrganizationUsers, value: object) -> None:
    for other in (1, 1.0, True):
        workflow_id = await people.owner.create(nodes=[STEP | {"config": {"values": {"a": other}}}])
        path = f"{WORKFLOWS}/{workflow_id}/nodes/step"
        await people.owner.api.put(path, json={"values": {"a": value}})
        stored = await get_node(people.owner, workflow_id, "step")
        assert repr(stored["config"]) == repr({"values": {"a": value}})


async def test_missing_nodes_cannot_be_edited(people: OrganizationUsers) -> None:
    workflow_id = await people.owner.create(**GRAPH)
    path = f"{WORKFLOWS}/{workflow_id}"
    for method, below, body in (
        ("PUT", "nodes/nobody", {"label": "x"}),
        ("DELETE", "nodes/nobody", None),
        ("PUT", "nodes/nobody/input-mappings", {"mappings": {}}),
        ("PUT", "nodes/nobody/passthrough-values", {"values": {}}),
    ):
        response = await people.owner.api.request(method, f"{path}/{below}", json=body)
        assert_refused(response, 404, "not-found")
        assert response.json()["error"]["message"] == "There is no such node"
    response = await people.owner.api.delete(f"{path}/connections/nobody")
    assert response.json()["error"]["message"] == "There is no such connection"


async def test_two_nodes_of_one_id_are_removed_together_and_configured_never(
    people: OrganizationUsers,
) -> None:
    workflow_id = await people.owner.create(nodes=[TRIGGER, STEP, STEP])
    path = f"{WORKFLOWS}/{workflow_id}/nodes/step"
    assert_refused(await people.owner.api.put(path, json={"label": "Which?"}), 409, "duplicate-node-id")
    assert (await people.owner.api.delete(path)).status_code == 200
    assert [one["id"] for one in await list_nodes(people.owner, workflow_id)] == ["start"]


async def test_an_active_workflow_takes_no_edit_that_would_break_it(people: OrganizationUsers) -> None:
    workflow_id = await people.owner.create(status="active", **GRAPH)
    before = await people.owner.workflow(workflow_id)
    path = f"{WORKFLOWS}/{workflow_id}/nodes"
    for response in (
        await people.owner.api.delete(f"{path}/start"),
        await people.owner.api.post(path, json={"nodeId": "manual"}),
        await people.owner.api.put(f"{path}/step", json={"config": {"values": 5}}),
    ):
        assert_refused(response, 422, "validation-failed")
    assert await people.owner.workflow(workflow_id) == before
    assert (await people.owner.api.put(f"{path}/step", json={"values": {"b": 1}})).status_code == 200


# ── many at once ────────────────────────────────────────────────────────────────────────────────────────────


async def test_fifty_clients_that_add_nodes_at_once_are_all_heard(
    people: OrganizationUsers, other_gateway_client: httpx2.AsyncClient
) -> None:
    workflow_id = await people.owner.create(**GRAPH)
    path = f"{WORKFLOWS}/{workflow_id}/nodes"
    api = cycle([people.owner.api, other_gateway_client])
    labels = [f"Node {number}" for number in range(50)]
    answers = await asyncio.gather(
        *(next(api).post(path, json={"nodeId": "set", "label": label}) for label in labels)
    )
    assert {answer.status_code for answer in answers} == {201}
    shown = await list_nodes(people.owner, workflow_id)
    assert sorted(one["label"] for one in shown) == sorted(["Start", "Step", *labels])
    assert len({one["id"] for one in shown}) == 52
    assert len({(one["position"]["x"], one["position"]["y"]) for one in shown}) == 52


async def test_adders_removers_and_connectors_at_once_leave_no_end_loose(
    people: OrganizationUsers, other_gateway_client: httpx2.AsyncClient
) -> None:
    passing = [f"passing{number}" for number in range(12)]
    workflow_id = await people.owner.create(
        nodes=[TRIGGER, *({"id": node_id, "nodeId": "set"} for node_id in passing)]
    )
    path = f"{WORKFLOWS}/{workflow_id}"
    api = cycle([people.owner.api, other_gateway_client])
    added = [next(api).post(f"{path}/nodes", json={"nodeId": "set"}) for _ in range(25)]
    connected = [
        next(api).post(f"{path}/connections", json={"source": "start", "target": node_id})
        for node_id in [*passing, passing[0]]
    ]
    removed = [next(api).delete(f"{path}/nodes/{node_id}") for node_id in passing]
    edits = [*connected, *removed]
    random.shuffle(edits)
    answers = await asyncio.gather(*added, *edits)
    assert {answer.status_code for answer in answers} <= {200, 201, 409, 422}
    shown = await people.owner.workflow(workflow_id)
    assert len(shown["nodes"]) == 1 + 25
    assert (shown["connections"], dangling_edges(shown)) == ([], [])
    made = sum("connectionId" in answer.json() for answer in answers)
    assert made == sum(answer.json().get("removedConnections", 0) for answer in answers)


async def test_of_two_clients_with_one_tag_exactly_one_wins(
    people: OrganizationUsers, other_gateway_client: httpx2.AsyncClient
) -> None:
    workflow_id = await people.owner.create(**GRAPH)
    path = f"{WORKFLOWS}/{workflow_id}/nodes/step"
    api = cycle([people.owner.api, other_gateway_client])
    answers = await asyncio.gather(
        *(
            next(api).put(path, json={"label": name}, headers={"If-Match": '"1"'})
            for name in ("One's", "The other's")
        )
    )
    winner, loser = sorted(answers, key=lambda answer: answer.status_code)
    assert winner.status_code == 200
    assert_refused(loser, 412, "precondition-failed")
    assert (await get_node(people.owner, workflow_id, "step"))["label"] == winner.json()["node"]["label"]


# ── invalid edits ───────────────────────────────────────────────────────────────────────────────────────────


def nested_value(depth: int) -> Any:  # noqa: ANN401 - any JSON value
    value: Any = 1
    for _ in range(depth):
        value = {"a": value}
    return value


@pytest.mark.parametrize(
    ("method", "below", "body", "path"),
    [
        ("POST", "nodes", {}, "nodeId"),
        ("POST", "nodes", [], ""),
        ("POST", "nodes", {"nodeId": 5}, "nodeId"),
        ("POST", "nodes", {"nodeId": "x" * 100_000}, "nodeId"),
        ("POST", "nodes", {"nodeId": "__proto__"}, "nodeId"),
        ("POST", "nodes", {"nodeId": "set", "version": "x" * 100_000}, "nodeId"),
        ("POST", "nodes", {"nodeId": "set", "label": "x" * 100_000}, "label"),
        ("POST", "nodes", {"nodeId": "set", "label": "a\tb"}, "label"),
        ("POST", "nodes", {"nodeId": "set", "position": {"x": "left"}}, "position.x"),
        ("POST", "nodes", {"nodeId": "set", "config": "text"}, "config"),
        ("POST", "nodes", {"nodeId": "set", "config": nested_value(62)}, "nodes"),
        ("POST", "nodes", {"nodeId": "set", "retry": {"maxAttempts": 10**9}}, "retry.maxAttempts"),
        ("POST", "nodes", {"nodeId": "set", "inputMappings": {"a": "nowhere"}}, "inputMappings.a"),
        ("PUT", "nodes/step", [1], ""),
        ("PUT", "nodes/step", "text", ""),
        ("PUT", "nodes/step", {"config": "text"}, "config"),
        ("PUT", "nodes/step", {"config": {}, "timeout": -1}, "timeout"),
        ("PUT", "nodes/step", {"label": "x" * 100_000}, "label"),
        ("PUT", "nodes/step", nested_value(64), "nodes"),
        ("PUT", "nodes/step/input-mappings", {}, "mappings"),
        ("PUT", "nodes/step/input-mappings", {"mappings": []}, "mappings"),
        ("PUT", "nodes/step/input-mappings", {"mappings": {"a": nested_value(62)}}, "nodes"),
        ("PUT", "nodes/step/input-mappings", {"mappings": {"a": "{{" * 50_000}}, "mappings.a"),
        ("PUT", "nodes/step/passthrough-values", {"values": {"a": 1}}, "values.a"),
        ("PUT", "nodes/step/passthrough-values", {"values": None}, "values"),
        ("POST", "connections", {}, "sourceNodeId"),
        ("POST", "connections", {"source": {"id": "start"}, "target": "step"}, "source"),
        ("POST", "connections", {"source": "start", "target": "x" * 100_000}, "targetNodeId"),
        (
            "POST",
            "connections",
            {"source": "step", "target": "last", "targetPort": "__proto__"},
            "targetPort",
        ),
    ],
)
async def test_a_malformed_edit_is_refused_with_the_wrong_field(
    people: OrganizationUsers, method: str, below: str, body: object, path: str
) -> None:
    workflow_id = await people.owner.create(**LINE)
    response = await people.owner.api.request(method, f"{WORKFLOWS}/{workflow_id}/{below}", json=body)
    flaw = error_detail(response)
    assert flaw["path"] == path
    assert len(response.content) < 2_000
    assert (await people.owner.api.get(f"{WORKFLOWS}/{workflow_id}")).headers["ETag"] == '"1"'


@pytest.mark.parametrize(
    ("body", "code"),
    [
        (b'{"config": {"a": "\\u0000"}}', "nul-character"),
        (b'{"config": {}, "config": {}}', "duplicate-key"),
        (b'{"config": {"a": NaN}}', "not-finite"),
        (b"[" * 100 + b"]" * 100, "too-deep"),
        (b"config=1", "malformed-json"),
    ],
)
async def test_malformed_json_changes_no_node(people: OrganizationUsers, body: bytes, code: str) -> None:
    workflow_id = await people.owner.create(**GRAPH)
    response = await people.owner.api.put(
        f"{WORKFLOWS}/{workflow_id}/nodes/step", content=body, headers={"Content-Type": "application/json"}
    )
    assert_refused(response, 400, code)


async def test_the_deepest_config_that_is_taken_can_be_read_and_sent_back(people: OrganizationUsers) -> None:
    workflow_id = await people.owner.create(**GRAPH)
    path = f"{WORKFLOWS}/{workflow_id}"
    assert (
        await people.owner.api.put(f"{path}/nodes/step", json={"config": nested_value(61)})
    ).status_code == 200
    shown = await people.owner.workflow(workflow_id)
    assert (await people.owner.api.put(path, json=shown)).json() == shown
