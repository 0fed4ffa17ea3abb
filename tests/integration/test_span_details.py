"""Details of one span: the config that the node got, its attempts and log, and its duration in the run before."""

from __future__ import annotations

from typing import Any

import pytest
from sqlalchemy import update
from sqlalchemy.ext.asyncio import AsyncConnection
from sqlmodel import col

from models.execution import SpanRow
from tests.integration.gateway_harness import GatewayHarness, OrganizationUsers, UserClient
from tests.integration.test_waiting_runs import execute_workflow, get_json, serve_worker, wait_until_ended

UNREACHABLE = "http://127.0.0.1:9/orders"
NODES: list[dict[str, Any]] = [
    {"id": "start", "nodeId": "manual"},
    {"id": "fixed", "nodeId": "set", "config": {"values": {"a": 1}}},
    {"id": "note", "nodeId": "log", "config": {"message": "Order {{ trigger.body.id }}{{ data.none }}"}},
    {
        "id": "send",
        "nodeId": "http-request",
        "config": {
            "method": "POST",
            "url": UNREACHABLE,
            "headers": {"Authorization": "Bearer {{ trigger.body.token }}"},
            "body": {"order": "{{ trigger.body.id }}"},
        },
        "retry": {"maxAttempts": 2, "delaySeconds": 0.01},
    },
]
EDGES = [{"source": a, "target": b} for a, b in (("start", "fixed"), ("fixed", "note"), ("note", "send"))]
SECRET = "sk-live-0123456789abcdefghij"


async def span_of(person: UserClient, execution_id: str, name: str) -> dict[str, Any]:
    return await get_json(person, f"/{execution_id}/spans/{name}")


@pytest.mark.every_database
async def test_a_span_shows_the_config_with_which_its_node_ran(
    harness: GatewayHarness, people: OrganizationUsers
) -> None:
    workflow_id = await people.owner.create(
        nodes=NODES, connections=EDGES, settings={"strictMappings": False}
    )
    async with serve_worker(harness):
        runs = []
        for number in (6, 7):
            run = await execute_workflow(people.owner, workflow_id, id=number, token=SECRET)
            await wait_until_ended(people.owner, run)
            runs.append(run)
    run = runs[1]
    fixed = await span_of(people.owner, run, "fixed")
    assert fixed["config"]["values"] == {"a": 1}
    note = await span_of(people.owner, run, "note")
    assert note["config"] == {"message": "Order 7", "level": "info"}
    assert note["unresolved"] == ["data.none"]
    assert [line["message"] for line in note["logs"]] == ["Order 7"]
    assert note["previousDurationMs"] is not None
    assert note["hashes"]["config"]
    listed = (await get_json(people.owner, f"/{run}/spans?node_id=note"))["spans"][0]
    assert await span_of(people.owner, run, listed["id"]) == note
    assert (await span_of(people.owner, runs[0], "note"))["previousDurationMs"] is None
    sent = await span_of(people.owner, run, "send")
    assert sent["config"]["body"] == {"order": 7}
    assert sent["hiddenFields"] == ["headers.Authorization"]
    assert SECRET not in str(sent["config"])
    assert (fixed["effect"], sent["effect"]) == ("pure", "write")
    assert sent["idempotencyKey"] == f"{run}:send:0"

    async def take_key_of_earlier_run(connection: AsyncConnection) -> None:
        of_node = (col(SpanRow.execution_id) == run, col(SpanRow.node_id) == "send")
        await connection.execute(update(SpanRow).where(*of_node).values(key_id=runs[0]))

    # A replayed node writes with the key of the run that it repeats.
    await harness.gateway.database.transaction(take_key_of_earlier_run)
    assert (await span_of(people.owner, run, "send"))["idempotencyKey"] == f"{runs[0]}:send:0"
    assert (await people.stranger.api.get(f"/api/v1/executions/{run}/spans/note")).status_code == 404
    assert (await people.owner.api.get(f"/api/v1/executions/{run}/spans/none")).status_code == 404


async def test_a_large_config_is_kept_as_a_blob(harness: GatewayHarness, people: OrganizationUsers) -> None:
    nodes = [
        NODES[0],
        {"id": "note", "nodeId": "template", "config": {"text": "{{ trigger.body.text }}"}},
    ]
    workflow_id = await people.owner.create(nodes=nodes, connections=[{"source": "start", "target": "note"}])
    async with serve_worker(harness):
        run = await execute_workflow(people.owner, workflow_id, text="x" * 300_000)
        await wait_until_ended(people.owner, run)
    config = (await span_of(people.owner, run, "note"))["config"]
    assert config["$blob"]["size"] > 300_000
    blob = await people.owner.api.get(f"/api/v1/executions/{run}/blobs/{config['$blob']['sha256']}")
    assert blob.json()["text"] == "x" * 300_000
