"""Data for the examples of the OpenAPI document: an actual object for each of their ids."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, TypeVar

import msgspec
from sqlalchemy import insert, select, update
from sqlalchemy.ext.asyncio import AsyncConnection
from sqlmodel import col

from engine.run_records import SpanStatus
from gateway.ingest import hooks
from journal.blobs.blob_storage import BlobOwner
from journal.waits import callbacks
from journal.waits.callbacks import CallbackPlace
from models import ids
from models.access import User
from models.bulk_operation import BulkOperation
from models.data_source import DataSource
from models.execution import Execution, SpanRow
from models.execution_status import ExecutionStatus
from models.task import Task
from models.tool_server import ListedTools, to_stored
from nodes.mcp.tool_definitions import ToolDefinition
from tests.bulk_rows import build_operation
from tests.custom_types import RESIZE
from tests.integration import input_waits
from tests.integration.deployed_workflows import answer_for_pods, mark_running
from tests.integration.gateway_harness import GatewayHarness, OrganizationUsers
from tests.task_rows import held_by, make_task_row

Json = TypeVar("Json")
_EXAMPLE_ID = re.compile(r"[a-zA-Z]+[_-][a-zA-Z0-9_-]+|\b[0-9a-f]{16}\b")

STEP = {"nodeId": "set", "config": {"values": {"a": 1}}}
NODES = [
    {"id": "start", "nodeId": "manual"},
    *({"id": node_id, **STEP} for node_id in ("node_1", "node-xyz123")),
    # A write, which a replay may leave out.
    {"id": "node_2", "nodeId": "http-request", "config": {"method": "POST", "url": "https://example.com/"}},
]
HOOK = {
    "id": "start",
    "nodeId": "webhook",
    "config": {"verification": {"provider": "none"}, "methods": [*hooks.METHODS]},
}
DATABASE = {
    "settings": {"host": "127.0.0.1", "database": "shop", "user": "reader"},
    "secrets": {"password": "a-password"},
}
PROVIDER = {"type": "ai-provider", "settings": {"baseUrl": "http://127.0.0.1:9/v1"}}
CONNECTIONS = [
    {"source": "start", "target": "node_1"},
    {"id": "conn-abc123", "source": "node_1", "target": "node-xyz123"},
]
WAIT_FOR_SIGNAL = {"id": "wait", "type": "wait-for-signal", "config": {"name": "shipped"}}
WAIT_CONNECTION = {"source": "start", "target": "wait"}


async def create_examples(harness: GatewayHarness, people: OrganizationUsers) -> dict[str, str]:
    """Create the objects that the examples of the API's document name, for the admin;
    return the actual id for each example id.
    """
    admin = people.admin
    workflow_id = await admin.create(nodes=NODES, connections=CONNECTIONS)
    template_id = await admin.create(name="A template")
    await _send(people, "PUT", f"workflows/{template_id}/visibility", {"isTemplate": True})
    await _send(people, "POST", f"workflows/{workflow_id}/share", {"userId": people.owner.user.id})
    await _send(people, "POST", "workflow-nodes", RESIZE)
    key = await _send(people, "POST", "auth/keys", {"name": "a key to revoke"})
    body = {"name": f"For {workflow_id}", "type": "postgresql", **DATABASE}
    source = await _send(people, "POST", "datasources", body)
    await _send(
        people, "POST", f"datasources/{source['dataSourceId']}/share", {"userId": people.owner.user.id}
    )
    body = {"name": f"Models for {workflow_id}", **PROVIDER}
    provider = await _send(people, "POST", "datasources", body)
    model = {
        "name": f"Small for {workflow_id}",
        "vendorModelId": "gpt-5-mini",
        "dataSourceId": provider["dataSourceId"],
    }
    model = await _send(people, "POST", "ai/models", model)
    hook = await admin.create(nodes=[HOOK, NODES[1]], connections=CONNECTIONS[:1], status="active")
    token = await _send(people, "POST", f"workflows/{hook}/trigger-token", {})
    queue, mails, events = [
        await admin.create(nodes=[{**HOOK, **start}, NODES[1]], connections=CONNECTIONS[:1], status="active")
        for start in (
            {"nodeId": "queue-trigger", "config": {}},
            {"nodeId": "email-trigger", "config": {}},
            {"nodeId": "event-trigger", "config": {"event_type": "user.created"}},
        )
    ]
    await _send(people, "POST", f"workflows/{queue}/enqueue", {"message": 1})
    deliveries = await _send(people, "GET", f"workflows/{queue}/deliveries", None)
    letter = await _send(people, "POST", f"workflows/{queue}/enqueue", {"message": 2})
    await _fail(harness, letter["executionId"])
    groups = await _send(people, "GET", "dead-letters/groups", None)
    event = await _send(people, "POST", "workflows/events", {"event_type": "user.created"})
    mail_token = await _send(people, "POST", f"workflows/{mails}/trigger-token", {})
    invitation = await _send(people, "POST", "auth/invitations", {"email": "invited@example.com"})
    event_token = await _send(people, "POST", "auth/event-tokens", {"name": "To be revoked"})
    await _send(people, "POST", "auth/signing-secret", None)
    await _send(people, "POST", f"workflows/{workflow_id}/deploy", None)
    await mark_running(harness, workflow_id)
    await _send(people, "PUT", f"workflows/{workflow_id}/status", {"status": "draft"})
    answer_for_pods(harness)
    started = await _send(people, "POST", f"workflows/{workflow_id}/execute", {})
    await _fail(harness, started["executionId"])
    span_id = ids.new_id("span")
    span = SpanRow(
        execution_id=started["executionId"],
        node_id="node_1",
        shard=admin.user.shard,
        id=span_id,
        sequence=1,
        label="Keep",
        type="set",
        status=SpanStatus.COMPLETED,
    )
    await harness.gateway.database.transaction(
        lambda connection: connection.execute(insert(SpanRow).values(span.model_dump()))
    )
    owner = BlobOwner(admin.user.organization_id, started["executionId"])
    await harness.gateway.blobs.put(owner, b"", media_type="application/octet-stream", name="empty.bin")
    waiting = await _send(people, "POST", f"workflows/{workflow_id}/execute", {})
    await input_waits.wait_for_input(harness.gateway.database, waiting["executionId"])
    calling = CallbackPlace(
        (await _send(people, "POST", f"workflows/{workflow_id}/execute", {}))["executionId"], "node_1", ""
    )
    await input_waits.wait_for_input(
        harness.gateway.database, calling.execution_id, calling.node_id, request={}, kind="callback"
    )
    waiter = await admin.create(nodes=[NODES[0], WAIT_FOR_SIGNAL], connections=[WAIT_CONNECTION])
    signalled = await _send(people, "POST", f"workflows/{waiter}/execute", {})
    task_id = await _create_task(harness, started["executionId"])
    await _send(
        people, "POST", "tasks/claim", {"worker": {"id": "w_abc123"}, "requestId": "c_0", "max": 0, "wait": 0}
    )
    browser = await harness.browser()
    session = (await browser.post("/session", json={"key": admin.key})).json()
    return {
        "session_abc123": session["id"],
        "bulk_abc123": await _create_operation(harness, admin.user),
        "span_abc123": span_id,
        "wf_abc123": workflow_id,
        "wf_tmpl_001": template_id,
        "ds_001": source["dataSourceId"],
        "ds_provider": provider["dataSourceId"],
        "ds_tools": await _create_tool_server(harness, people, workflow_id),
        "model_001": model["modelId"],
        "wf_queue": queue,
        "wf_mails": mails,
        "wf_events": events,
        "5f0b3a1c9d2e4f68": groups["groups"][0]["id"],
        "dlv_abc123": deliveries["deliveries"][0]["id"],
        "event_abc123": event["event_id"],
        "invitation_abc123": invitation["id"],
        "tok_abc123": event_token["id"],
        "tt-abc123": token["token"],
        "tt-mail123": mail_token["token"],
        "task_abc123": task_id,
        "exec_xyz789": started["executionId"],
        "exec_asking": waiting["executionId"],
        "exec_waiting": signalled["executionId"],
        "exec_calling": calling.execution_id,
        "cb-abc123": callbacks.derive_token(harness.gateway.settings.secret, calling),
        "key_abc123": key["id"],
        "user_456": admin.user.id,
        "user_789": people.owner.user.id,
    }


async def _fail(harness: GatewayHarness, execution_id: str) -> None:
    """Mark a run as failed by an error of its first node."""
    failed = update(Execution).where(col(Execution.id) == execution_id)
    error = {"code": "node-error", "message": "No", "nodeId": "start", "attempt": 1}
    await harness.gateway.database.transaction(
        lambda connection: connection.execute(failed.values(status=ExecutionStatus.FAILED, error=error))
    )


async def _create_operation(harness: GatewayHarness, user: User) -> str:
    """Insert a bulk operation that has ended, and return its id."""
    operation = build_operation(user, harness.gateway.clock())
    await harness.gateway.database.transaction(
        lambda connection: connection.execute(insert(BulkOperation).values(operation.model_dump()))
    )
    return operation.id


async def _create_task(harness: GatewayHarness, execution_id: str) -> str:
    """Insert the task of the examples, which a worker holds; return its id."""
    task_id = ids.new_id("task")

    async def create(connection: AsyncConnection) -> None:
        found = await connection.execute(select(Execution).where(col(Execution.id) == execution_id))
        row = make_task_row(task_id, found.one(), "node_1", **held_by("w_abc123", "x9f0"))
        await connection.execute(insert(Task).values(row))

    await harness.gateway.database.transaction(create)
    return task_id


async def _send(people: OrganizationUsers, method: str, path: str, body: Any) -> dict[str, Any]:  # noqa: ANN401 - any JSON value
    """Send a request as the admin, and return its answer; an error fails the test."""
    response = await people.admin.api.request(method, f"/api/v1/{path}", json=body)
    assert response.is_success, f"{method} {path}: {response.text}"
    answer: dict[str, Any] = response.json()
    return answer


def replace_example_ids(value: Json, ids: Mapping[str, str]) -> Json:
    """Return JSON, also keys and texts in it, with actual ids in place of those of the examples."""
    placed: Any = value
    match value:
        case dict():
            placed = {ids.get(key, key): replace_example_ids(item, ids) for key, item in value.items()}
        case list():
            placed = [replace_example_ids(item, ids) for item in value]
        case str():
            placed = _EXAMPLE_ID.sub(lambda found: ids.get(found[0], found[0]), value)
    found: Json = placed
    return found


async def _create_tool_server(harness: GatewayHarness, people: OrganizationUsers, workflow_id: str) -> str:
    """Create a tool server that has listed the tool of the examples; return its id."""
    body = {"name": f"Tools for {workflow_id}", "url": "http://127.0.0.1:9/mcp"}
    source_id: str = (await _send(people, "POST", "ai/tool-servers", body))["dataSourceId"]
    tool = ToolDefinition(
        "search_notes",
        "5f2b1c0d9e8a7b6c5d4e3f2a1b0c9d8e7f6a5b4c3d2e1f0a9b8c7d6e5f4a3b2c",
        input_schema={"type": "object"},
    )
    tools = to_stored(ListedTools(offered=[msgspec.to_builtins(tool)]))

    async def work(connection: AsyncConnection) -> None:
        await connection.execute(
            update(DataSource).where(col(DataSource.id) == source_id).values(tools=tools)
        )

    await harness.gateway.database.transaction(work)
    return source_id
