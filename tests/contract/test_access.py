"""Access rules: every operation of the route table, requested by every kind of caller.

A refusal changes nothing in the database. Objects of others get the same answer as objects that don't exist.
"""

import sqlite3
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Mapping, Sequence
from contextlib import asynccontextmanager, closing
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from enum import StrEnum
from functools import cache
from hashlib import sha256
from typing import Any, TypeAlias
from uuid import uuid4

import httpx2
import pytest
from sqlalchemy import insert, select, text, update
from sqlalchemy.ext.asyncio import AsyncConnection
from sqlmodel import SQLModel, col

from gateway import routes
from gateway.http.endpoint import AccessRule
from gateway.ingest import hooks
from gateway.workflows import shipped_templates
from journal.blobs.blob_storage import BlobOwner
from models import access_store
from models.access import ALL_KEY_SCOPES, KeyScope, User, UserRole
from models.bulk_operation import BulkOperation
from models.data_source import DataSource, DataSourceShare
from models.database import is_sqlite
from models.execution import Execution, SpanRow
from models.execution_status import ExecutionStatus
from models.ids import new_id, shard_of
from models.task import Task
from models.workflow import Workflow, WorkflowShare
from tests.bulk_rows import build_operation
from tests.custom_types import custom_type
from tests.integration import input_waits
from tests.integration.deployed_workflows import answer_for_pods, mark_running, serve_as_pods
from tests.integration.gateway_harness import EDGE, GRAPH, SECRET, GatewayHarness, UserClient, create_gateway
from tests.services import PostgresServer
from tests.task_rows import make_task_row


class CallerKind(StrEnum):
    """Kinds of callers. Each with a valid key has a key with exactly the required scope."""

    NO_KEY = "nobody"
    UNKNOWN_KEY = "a key that was never made"
    REVOKED_KEY = "a revoked key of the owner"
    EXPIRED_KEY = "an expired key of the owner"
    WRONG_SCOPE = "an admin, with every scope but the needed one"
    STRANGER = "an admin of another organisation"
    COLLEAGUE = "a member of the organisation"
    GUEST = "a member with whom it is shared"
    OWNER = "its owner, who is a member"
    ADMIN = "an admin of the organisation"
    COLLEAGUE_OF_PUBLIC = "a member of the organisation, where it is public"


# ── expected answers ────────────────────────────────────────────────────────────────────────────────────────

Expected: TypeAlias = Mapping[CallerKind, str]
"""Expected answer for each caller: `ok`, or the status and code of a refusal."""

OK = "ok"
NO_VALID_KEY = "401 unauthorized"
WRONG_SCOPE = "403 scope-required"
NOT_OWNER = "403 not-owner"
NOT_ADMIN = "403 admin-required"
NOT_FOUND = "404 not-found"


def expect_access(
    *, stranger: str, colleague: str, guest: str, owner: str, colleague_of_public: str | None = None
) -> Expected:
    """Return the expectation for an operation with a scope; admins may do everything in their organization."""
    answers = {
        CallerKind.NO_KEY: NO_VALID_KEY,
        CallerKind.UNKNOWN_KEY: NO_VALID_KEY,
        CallerKind.REVOKED_KEY: NO_VALID_KEY,
        CallerKind.EXPIRED_KEY: NO_VALID_KEY,
        CallerKind.WRONG_SCOPE: WRONG_SCOPE,
        CallerKind.STRANGER: stranger,
        CallerKind.COLLEAGUE: colleague,
        CallerKind.GUEST: guest,
        CallerKind.OWNER: owner,
        CallerKind.ADMIN: OK,
    }
    if colleague_of_public is not None:
        answers[CallerKind.COLLEAGUE_OF_PUBLIC] = colleague_of_public
    return answers


OWN = expect_access(stranger=OK, colleague=OK, guest=OK, owner=OK)
"""Operations on the caller's own objects: all may list and create these."""
READERS = expect_access(
    stranger=NOT_FOUND, colleague=NOT_FOUND, guest=OK, owner=OK, colleague_of_public=OK
)  # fmt: skip
WRITERS = expect_access(
    stranger=NOT_FOUND, colleague=NOT_FOUND, guest=NOT_OWNER, owner=OK, colleague_of_public=NOT_OWNER
)
"""Callers that may read a workflow are told that only its owner and admins may do this."""
TEMPLATE_MAKERS = expect_access(
    stranger=NOT_FOUND, colleague=NOT_FOUND, guest=NOT_OWNER, owner=NOT_ADMIN, colleague_of_public=NOT_OWNER
)
"""Creation of objects that show a workflow to the whole organization, which requires an admin."""
COPYING_ADMINS = expect_access(
    stranger=NOT_FOUND, colleague=NOT_FOUND, guest=NOT_ADMIN, owner=NOT_ADMIN, colleague_of_public=NOT_ADMIN
)
"""The same for copies, which leave the workflow itself unchanged."""
TEMPLATE_READERS = expect_access(stranger=NOT_FOUND, colleague=OK, guest=OK, owner=OK)
TEMPLATE_WRITERS = expect_access(stranger=NOT_FOUND, colleague=NOT_OWNER, guest=NOT_OWNER, owner=OK)
KEY_HOLDERS = expect_access(stranger=NOT_FOUND, colleague=NOT_FOUND, guest=NOT_FOUND, owner=OK)
SESSION_HOLDERS: Expected = {**KEY_HOLDERS, CallerKind.WRONG_SCOPE: OK}
MODEL_USERS = expect_access(
    stranger=NOT_FOUND, colleague=NOT_FOUND, guest=OK, owner=OK, colleague_of_public=OK
)
MODEL_MAKERS: Expected = {
    caller: "422 validation-failed" if answer == OK else answer for caller, answer in OWN.items()
}
"""Creation of a model whose data source nobody may use."""
MODEL_OWNERS = expect_access(
    stranger=NOT_FOUND, colleague=NOT_FOUND, guest=NOT_OWNER, owner=OK, colleague_of_public=NOT_OWNER
)
NOTHING_MATCHES: Expected = {
    caller: "409 count-changed" if answer == OK else answer for caller, answer in OWN.items()
}
"""Begin of a bulk operation whose filter selects nothing of the caller."""
ADMINS = expect_access(stranger=OK, colleague=NOT_ADMIN, guest=NOT_ADMIN, owner=NOT_ADMIN)
"""Operations of admins in their own organization."""
TOKEN_HOLDERS = expect_access(stranger=NOT_FOUND, colleague=NOT_ADMIN, guest=NOT_ADMIN, owner=NOT_ADMIN)
"""Operations reserved to admins."""
TWO_SCOPES: Expected = {caller: WRONG_SCOPE if answer == OK else answer for caller, answer in READERS.items()}
"""Operations that require a second scope besides that of a reader."""
ANY_KEY: Expected = {**OWN, CallerKind.WRONG_SCOPE: OK}
EVERYBODY: Expected = dict.fromkeys(OWN, OK)
UNKNOWN_TO_ALL: Expected = dict.fromkeys(OWN, NOT_FOUND)
"""Operations that take a token, which none of the callers has."""


# ── requests ────────────────────────────────────────────────────────────────────────────────────────────────

READ, WRITE, EXECUTE = KeyScope.WORKFLOWS_READ, KeyScope.WORKFLOWS_WRITE, KeyScope.WORKFLOWS_EXECUTE
KEYS, USERS = KeyScope.KEYS_WRITE, KeyScope.USERS_WRITE
READ_SOURCES, WRITE_SOURCES = KeyScope.DATASOURCES_READ, KeyScope.DATASOURCES_WRITE
SCOPES = {
    AccessRule.ADMIN: USERS,
    AccessRule.ANY_KEY: None,
    AccessRule.PUBLIC: None,
    AccessRule.SENDER: EXECUTE,
}
"""Scope of the key for operations that no scope alone permits."""

TASK_POLL = {"worker": {"id": "<worker>"}, "requestId": "c_1", "max": 0, "wait": 0}
LEASE_LOST = "409 lease-lost"
TASK_HOLDERS: Expected = {
    **expect_access(stranger=NOT_FOUND, colleague=LEASE_LOST, guest=LEASE_LOST, owner=LEASE_LOST),
    CallerKind.ADMIN: LEASE_LOST,
}
"""Operations with the lease of a task, which these callers don't have."""
NODE_TYPE = custom_type(type="<type>")

Make: TypeAlias = Callable[["AccessCast", bool], Awaitable[str]]
"""Creates an object of the owner, public or not, and returns its id."""


@dataclass(frozen=True)
class AccessRow:
    """Operation, or one use of it, with its expected answers."""

    method: str
    path: str
    scope: KeyScope | None
    expected: Expected
    make: Make | None = None
    """Maker of the target object; None if the operation has no target."""
    body: Mapping[str, Any] | None = None
    status: int = 200
    query: str = ""
    use: str = ""

    @property
    def name(self) -> str:
        return f"{self.method} {self.path} {self.use}".rstrip()


@dataclass
class AccessCast:
    """All callers, each with keys of every kind."""

    harness: GatewayHarness
    owner: UserClient
    users: Mapping[CallerKind, User]
    keys: Mapping[tuple[CallerKind, KeyScope | None], str]
    kept: dict[tuple[Make, bool], str] = field(default_factory=dict)
    """Targets of calls that change nothing or are refused."""
    views: tuple[sqlite3.Connection, sqlite3.Connection] | None = None
    """Two connections to an SQLite file, one of them for its rows of an earlier moment; opening one takes long."""

    async def target(self, row: AccessRow, caller: CallerKind) -> str:
        """Return the id of the target of a call: a new object if the call may change it."""
        if row.make is None:
            return "wf_absent"
        is_public = caller is CallerKind.COLLEAGUE_OF_PUBLIC
        if row.expected[caller] == OK and (row.method != "GET" or (row.make, is_public) not in self.kept):
            return await row.make(self, is_public)
        return self.kept[row.make, is_public]

    async def call(
        self, client: httpx2.AsyncClient, row: AccessRow, caller: CallerKind, target: str
    ) -> httpx2.Response:
        words = {
            "id": target,
            "worker": f"w_{caller.name}",
            "guest": self.users[CallerKind.GUEST].id,
            "colleague": self.users[CallerKind.COLLEAGUE].id,
            "type": f"acme/{_new_name()}",
            "address": f"{uuid4().hex}@example.com",
            "subscribed": self.kept.get((create_subscribed_workflow, True), ""),
        }
        steps = {"sub": "step", "subId": words["guest"], "version": "1", "other": "current", "type": "set"}
        steps |= {"sha256": NOTHING, "name": target}
        key = self.keys.get((caller, row.scope))
        return await client.request(
            row.method,
            (row.path + row.query).format(id=target, **steps),
            json=None if row.body is None else fill_names(row.body, words),
            headers={} if key is None else {"X-API-Key": key},
        )

    def hidden(self, caller: CallerKind) -> list[str]:
        """Return the ids of objects that a caller may not see: private ones for a colleague, all for a
        stranger.
        """
        return [
            kept
            for (make, is_public), kept in self.kept.items()
            if caller is CallerKind.STRANGER or not (is_public or make in SEEN_BY_ALL)
        ]


def fill_names(body: Mapping[str, Any], words: Mapping[str, str]) -> dict[str, Any]:
    """Return a body with words in the place of `<their names>`."""
    return {
        key: fill_names(value, words)
        if isinstance(value, Mapping)
        else words.get(value.strip("<>"), value)
        if isinstance(value, str)
        else value
        for key, value in body.items()
    }


async def create_workflow(cast: AccessCast, is_public: bool) -> str:  # noqa: FBT001 - every `Make` has it
    """Create a workflow without a layout, changed since its first version; a node and a connection are called
    `step`.
    """
    nodes = [{**node, "position": {"x": 7, "y": 7}} for node in GRAPH["nodes"]]
    workflow_id = await cast.owner.create(nodes=nodes, connections=[{**EDGE, "id": "step"}])
    share = {
        "workflow_id": workflow_id,
        "user_id": cast.users[CallerKind.GUEST].id,
        "shared_at": datetime.now(UTC),
    }

    async def open_up(connection: AsyncConnection) -> None:
        await connection.execute(insert(WorkflowShare).values(share))
        await connection.execute(
            update(Workflow)
            .where(col(Workflow.id) == workflow_id)
            .values(is_public=is_public, description="Changed since")
        )

    await cast.harness.gateway.database.transaction(open_up)
    return workflow_id


def _new_name() -> str:
    return f"x{uuid4().hex}"


async def create_node_type(cast: AccessCast, _is_public: bool) -> str:  # noqa: FBT001 - every `Make` has it
    """Create a custom node type of the namespace `set`; return its name in it."""
    name = _new_name()
    made = await cast.owner.api.post("/api/v1/workflow-nodes", json=custom_type(type=f"set/{name}"))
    assert made.status_code == 201, made.text
    return name


async def create_task(cast: AccessCast, is_public: bool) -> str:  # noqa: FBT001 - every `Make` has it
    """Create a task of a run of a workflow; nobody holds it."""
    execution_id = await create_failed_execution(cast, is_public)
    task_id = f"task_{uuid4().hex}"

    async def add(connection: AsyncConnection) -> None:
        run = (await connection.execute(select(Execution).where(col(Execution.id) == execution_id))).one()
        row = make_task_row(task_id, run, "step", state="completed", ended_at=datetime.now(UTC))
        await connection.execute(insert(Task).values(row))

    await cast.harness.gateway.database.transaction(add)
    return task_id


async def create_open_task(cast: AccessCast, is_public: bool) -> str:  # noqa: FBT001 - every `Make` has it
    """Make a task that waits for a worker, and return its id."""
    execution_id = await create_failed_execution(cast, is_public)
    task_id = f"task_{uuid4().hex}"

    async def add(connection: AsyncConnection) -> None:
        run = (await connection.execute(select(Execution).where(col(Execution.id) == execution_id))).one()
        row = make_task_row(task_id, run, "step", state="ready")
        await connection.execute(insert(Task).values(row))

    await cast.harness.gateway.database.transaction(add)
    return task_id


async def create_task_worker(cast: AccessCast, _is_public: bool) -> str:  # noqa: FBT001 - every `Make` has it
    """Let a worker poll once; return its id."""
    worker_id = f"w_{uuid4().hex}"
    polled = await cast.owner.api.post("/api/v1/tasks/claim", json={**TASK_POLL, "worker": {"id": worker_id}})
    assert polled.status_code == 200, polled.text
    return worker_id


async def create_template(cast: AccessCast, is_public: bool) -> str:  # noqa: FBT001 - every `Make` has it
    workflow_id = await create_workflow(cast, is_public)

    async def make_template(connection: AsyncConnection) -> None:
        await connection.execute(
            update(Workflow).where(col(Workflow.id) == workflow_id).values(is_template=True)
        )

    await cast.harness.gateway.database.transaction(make_template)
    return workflow_id


async def create_deployed_workflow(cast: AccessCast, is_public: bool) -> str:  # noqa: FBT001 - every `Make` has it
    workflow_id = await create_workflow(cast, is_public)
    await cast.owner.api.post(f"{WORKFLOW.format(id=workflow_id)}/deploy")
    await mark_running(cast.harness, workflow_id)
    return workflow_id


async def create_queue_workflow(cast: AccessCast, is_public: bool) -> str:  # noqa: FBT001 - every `Make` has it
    """Create an active workflow with a queue trigger and without messages."""
    workflow_id = await create_workflow(cast, is_public)
    start = {"id": "start", "nodeId": "queue-trigger", "label": "Start"}
    nodes = {"nodes": [start, *GRAPH["nodes"][1:]], "connections": [{**EDGE, "id": "step"}]}
    await cast.owner.api.put(WORKFLOW.format(id=workflow_id), json=nodes)
    await cast.owner.api.put(f"{WORKFLOW.format(id=workflow_id)}/status", json={"status": "active"})
    return workflow_id


async def create_email_workflow(cast: AccessCast, is_public: bool) -> str:  # noqa: FBT001 - every `Make` has it
    """Create an active workflow with an email trigger and without mails."""
    workflow_id = await create_workflow(cast, is_public)
    start = {"id": "start", "nodeId": "email-trigger", "label": "Start"}
    nodes = {"nodes": [start, *GRAPH["nodes"][1:]], "connections": [{**EDGE, "id": "step"}]}
    await cast.owner.api.put(WORKFLOW.format(id=workflow_id), json=nodes)
    await cast.owner.api.put(f"{WORKFLOW.format(id=workflow_id)}/status", json={"status": "active"})
    return workflow_id


async def create_subscribed_workflow(cast: AccessCast, is_public: bool) -> str:  # noqa: FBT001 - every `Make` has it
    """Create an active workflow with an event trigger and without events."""
    workflow_id = await create_workflow(cast, is_public)
    config = {"event_type": "never.happens"}
    start = {"id": "start", "nodeId": "event-trigger", "label": "Start", "config": config}
    nodes = {"nodes": [start, *GRAPH["nodes"][1:]], "connections": [{**EDGE, "id": "step"}]}
    await cast.owner.api.put(WORKFLOW.format(id=workflow_id), json=nodes)
    await cast.owner.api.put(f"{WORKFLOW.format(id=workflow_id)}/status", json={"status": "active"})
    return workflow_id


async def create_webhook(cast: AccessCast, is_public: bool) -> str:  # noqa: FBT001 - every `Make` has it
    """Create an active workflow with a webhook trigger for anonymous senders; return the token of its URL."""
    workflow_id = await create_workflow(cast, is_public)
    config = {"verification": {"provider": "none"}, "methods": [*hooks.METHODS]}
    start = {"id": "start", "nodeId": "webhook", "label": "Start", "config": config}
    nodes = {"nodes": [start, *GRAPH["nodes"][1:]], "connections": [{**EDGE, "id": "step"}]}
    await cast.owner.api.put(WORKFLOW.format(id=workflow_id), json=nodes)
    await cast.owner.api.put(f"{WORKFLOW.format(id=workflow_id)}/status", json={"status": "active"})
    return await trigger_token(cast, workflow_id)


async def create_mail_address(cast: AccessCast, is_public: bool) -> str:  # noqa: FBT001 - every `Make` has it
    """Create an active workflow with an email trigger; return the token of its address."""
    return await trigger_token(cast, await create_email_workflow(cast, is_public))


async def trigger_token(cast: AccessCast, workflow_id: str) -> str:
    made = await cast.owner.api.post(f"{WORKFLOW.format(id=workflow_id)}/trigger-token", json={})
    token: str = made.json()["token"]
    return token


async def create_delivery(cast: AccessCast, is_public: bool) -> str:  # noqa: FBT001 - every `Make` has it
    workflow_id = await create_queue_workflow(cast, is_public)
    await cast.owner.api.post(f"{WORKFLOW.format(id=workflow_id)}/enqueue", json={"message": 1})
    listed = await cast.owner.api.get(f"{WORKFLOW.format(id=workflow_id)}/deliveries")
    delivery_id: str = listed.json()["deliveries"][0]["id"]
    return delivery_id


async def create_dead_letter_group(cast: AccessCast, is_public: bool) -> str:  # noqa: FBT001 - every `Make` has it
    workflow_id = await create_queue_workflow(cast, is_public)
    sent = await cast.owner.api.post(f"{WORKFLOW.format(id=workflow_id)}/enqueue", json={"message": 1})
    failed = update(Execution).where(col(Execution.id) == sent.json()["executionId"])

    async def fail(connection: AsyncConnection) -> None:
        await connection.execute(failed.values(status=ExecutionStatus.FAILED))

    await cast.harness.gateway.database.transaction(fail)
    listed = await cast.owner.api.get(f"/api/v1/dead-letters/groups?workflow_id={workflow_id}")
    group_id: str = listed.json()["groups"][0]["id"]
    return group_id


async def create_invitation(cast: AccessCast, is_public: bool) -> str:  # noqa: ARG001, FBT001 - every `Make` has it
    admin = await cast.harness.client(cast.keys[CallerKind.ADMIN, USERS])
    made = await admin.post("/api/v1/auth/invitations", json={"email": "ada@example.com"})
    invitation_id: str = made.json()["id"]
    return invitation_id


async def create_failed_execution(cast: AccessCast, is_public: bool) -> str:  # noqa: FBT001 - every `Make` has it
    workflow_id = await create_workflow(cast, is_public)
    response = await cast.owner.api.post(f"{WORKFLOW.format(id=workflow_id)}/execute", json={})
    execution_id: str = response.json()["executionId"]

    async def fail(connection: AsyncConnection) -> None:
        await connection.execute(
            update(Execution).where(col(Execution.id) == execution_id).values(status=ExecutionStatus.FAILED)
        )
        span = SpanRow(
            execution_id=execution_id,
            node_id="step",
            shard=shard_of(cast.owner.user.organization_id),
            id=new_id("span"),
            sequence=1,
            label="Step",
            type="set",
            status="failed",
        )
        await connection.execute(insert(SpanRow).values(span.model_dump()))

    await cast.harness.gateway.database.transaction(fail)
    owner = BlobOwner(cast.owner.user.organization_id, execution_id)
    await cast.harness.gateway.blobs.put(owner, b"", media_type="text/plain")
    return execution_id


async def create_waiting_execution(cast: AccessCast, is_public: bool) -> str:  # noqa: FBT001 - every `Make` has it
    workflow_id = await create_workflow(cast, is_public)
    response = await cast.owner.api.post(f"{WORKFLOW.format(id=workflow_id)}/execute", json={})
    execution_id: str = response.json()["executionId"]
    await input_waits.wait_for_input(cast.harness.gateway.database, execution_id)
    return execution_id


async def create_signalled_execution(cast: AccessCast, is_public: bool) -> str:  # noqa: FBT001 - every `Make` has it
    workflow_id = await create_workflow(cast, is_public)
    node = {"id": "wait", "nodeId": "wait-for-signal", "config": {"name": SIGNAL["name"]}}
    response = await cast.owner.api.post(f"{WORKFLOW.format(id=workflow_id)}/nodes", json=node)
    assert response.is_success, response.text
    response = await cast.owner.api.post(f"{WORKFLOW.format(id=workflow_id)}/execute", json={})
    execution_id: str = response.json()["executionId"]
    return execution_id


async def create_key(cast: AccessCast, is_public: bool) -> str:  # noqa: ARG001, FBT001 - every `Make` has it
    response = await cast.owner.api.post("/api/v1/auth/keys", json={"name": "A key"})
    key_id: str = response.json()["id"]
    return key_id


async def create_bulk_operation(cast: AccessCast, is_public: bool) -> str:  # noqa: ARG001, FBT001 - every `Make` has it
    """Insert a bulk operation that has ended, so that no gateway changes its row."""
    operation = build_operation(cast.owner.user, datetime.now(UTC))

    async def add(connection: AsyncConnection) -> None:
        await connection.execute(insert(BulkOperation).values(operation.model_dump()))

    await cast.harness.gateway.database.transaction(add)
    return operation.id


async def create_session(cast: AccessCast, is_public: bool) -> str:  # noqa: ARG001, FBT001 - every `Make` has it
    browser = await cast.harness.browser()
    response = await browser.post("/session", json={"key": cast.owner.key})
    session_id: str = response.json()["id"]
    return session_id


async def create_event_token(cast: AccessCast, is_public: bool) -> str:  # noqa: ARG001, FBT001 - every `Make` has it
    client = await cast.harness.client(cast.keys[CallerKind.ADMIN, KEYS])
    response = await client.post("/api/v1/auth/event-tokens", json={"name": "Hooks"})
    token_id: str = response.json()["id"]
    return token_id


async def create_event(cast: AccessCast, is_public: bool) -> str:  # noqa: ARG001, FBT001 - every `Make` has it
    response = await cast.owner.api.post("/api/v1/workflows/events", json={"event_type": "a.b"})
    event_id: str = response.json()["event_id"]
    return event_id


async def create_data_source(cast: AccessCast, is_public: bool) -> str:  # noqa: FBT001 - every `Make` has it
    return await share_new_source(cast, {**TOKEN, "name": uuid4().hex}, is_public=is_public)


async def create_provider_key(cast: AccessCast, is_public: bool) -> str:  # noqa: FBT001 - every `Make` has it
    settings = {"baseUrl": "http://127.0.0.1:9/v1"}
    body = {"name": uuid4().hex, "type": "ai-provider", "settings": settings}
    return await share_new_source(cast, body, is_public=is_public)


async def create_tool_server(cast: AccessCast, is_public: bool) -> str:  # noqa: FBT001 - every `Make` has it
    body = {"name": uuid4().hex, "type": "mcp-server", "settings": {"url": "http://127.0.0.1:9/mcp"}}
    return await share_new_source(cast, body, is_public=is_public)


async def share_new_source(cast: AccessCast, body: Mapping[str, Any], *, is_public: bool) -> str:
    """Create a data source of the owner that is shared with the guest, and return its id."""
    response = await cast.owner.api.post("/api/v1/datasources", json=body)
    source_id: str = response.json()["dataSourceId"]
    share = {
        "data_source_id": source_id,
        "user_id": cast.users[CallerKind.GUEST].id,
        "shared_at": datetime.now(UTC),
    }

    async def open_up(connection: AsyncConnection) -> None:
        await connection.execute(insert(DataSourceShare).values(share))
        await connection.execute(
            update(DataSource).where(col(DataSource.id) == source_id).values(is_public=is_public)
        )

    await cast.harness.gateway.database.transaction(open_up)
    return source_id


async def create_ai_model(cast: AccessCast, is_public: bool) -> str:  # noqa: FBT001 - every `Make` has it
    provider = {"name": uuid4().hex, "type": "ai-provider", "settings": {"baseUrl": "http://127.0.0.1:9/v1"}}
    source = await cast.owner.api.post("/api/v1/datasources", json=provider)
    body = {
        "name": uuid4().hex,
        "vendorModelId": "m",
        "dataSourceId": source.json()["dataSourceId"],
        "isShared": is_public,
        "sharedWith": [cast.users[CallerKind.GUEST].id],
    }
    response = await cast.owner.api.post(MODELS, json=body)
    model_id: str = response.json()["modelId"]
    return model_id


SEEN_BY_ALL: Collection[Make] = (create_template, create_node_type, create_task_worker)
"""Makers of objects that the whole organization sees."""
MADE: Sequence[Make] = (
    *(
        create_bulk_operation,
        create_invitation,
        create_workflow,
        create_deployed_workflow,
        create_queue_workflow,
        create_email_workflow,
        create_template,
        create_delivery,
        create_dead_letter_group,
        create_node_type,
        create_task,
        create_open_task,
        create_task_worker,
    ),
    *(
        create_failed_execution,
        create_waiting_execution,
        create_signalled_execution,
        create_key,
        create_session,
        create_data_source,
    ),
    *(create_ai_model, create_provider_key, create_tool_server),
    *(create_subscribed_workflow, create_event, create_event_token, create_mail_address),
)
WORKFLOW = "/api/v1/workflows/{id}"
EXECUTION = "/api/v1/executions/{id}"
GROUP = "/api/v1/dead-letters/groups/{id}"
MUTE = {"reason": "Known", "expiresInSeconds": 86_400}
NOTHING = sha256(b"").hexdigest()
MODELS = "/api/v1/ai/models"
PROVIDER_KEYS = "/api/v1/ai/provider-keys"
PROVIDER_KEY = {"name": "A key", "provider": "openai", "apiKey": "a-key"}
TOOL_SERVERS = "/api/v1/ai/tool-servers"
TOOL_SERVER = {"name": "Tools", "url": "https://tools.example.com/mcp", "apiKey": "a-key"}
MODEL = {"name": "Small", "vendorModelId": "m", "dataSourceId": "ds_absent"}
SOURCE = "/api/v1/datasources/{id}"
TOKEN = {"name": "A token", "type": "http-bearer", "secrets": {"token": "a-token"}}


def read_row(method: str, path: str, *, scope: KeyScope = READ, status: int = 200) -> AccessRow:
    """Return a row for an operation on a workflow that requires read access."""
    return AccessRow(method, WORKFLOW + path, scope, READERS, create_workflow, status=status)


def write_row(
    method: str, path: str, body: Mapping[str, Any] | None = None, *, status: int = 200
) -> AccessRow:
    """Return a row for an operation that changes a workflow."""
    return AccessRow(method, WORKFLOW + path, WRITE, WRITERS, create_workflow, body, status)


def run_row(
    method: str, path: str, *, scope: KeyScope = READ, status: int = 200, query: str = ""
) -> AccessRow:
    """Return a row for an operation on executions that requires read access to the workflow."""
    return AccessRow(
        method, EXECUTION + path, scope, READERS, create_failed_execution, status=status, query=query
    )


def use_row(method: str, path: str) -> AccessRow:
    """Return a row for an operation on a data source that requires read access."""
    return AccessRow(method, SOURCE + path, READ_SOURCES, READERS, create_data_source)


def change_row(
    method: str, path: str, body: Mapping[str, Any] | None = None, *, status: int = 200
) -> AccessRow:
    """Return a row for an operation that changes a data source."""
    return AccessRow(method, SOURCE + path, WRITE_SOURCES, WRITERS, create_data_source, body, status)


NEW = {"name": "Mine", **GRAPH}
DRY_RUN_ONLY: Mapping[str, Any] = {"dryRun": True}
DRY_RUN = {"filter": {}, "dryRun": True}
BULK_CANCEL = {"action": "cancel", "filter": {"workflowId": "wf_absent"}, "count": 1}
BULK_PURGE = {**BULK_CANCEL, "action": "purge"}
REPLAY = {"workflowId": "<subscribed>"}
SIGNAL = {"name": "shipped", "payload": {"parcel": "P-12"}}
ANSWER = {"nodeId": "approval", "choice": "approve", "data": {}}
ASSIGNEES = {"nodeId": "approval", "assignees": ["role:admin"]}
DOCUMENT = {"document": {"format": "pilotflame/workflow", "formatVersion": 1, **NEW}, "references": {}}

ROWS = [
    AccessRow("GET", "/healthz", None, EVERYBODY),
    AccessRow("GET", "/readyz", None, EVERYBODY),
    AccessRow("GET", "/openapi.json", None, EVERYBODY),
    AccessRow("GET", "/api/v1/auth/whoami", None, ANY_KEY),
    AccessRow("GET", "/api/v1/auth/keys", KEYS, OWN),
    AccessRow("POST", "/api/v1/auth/keys", KEYS, OWN, body={"name": "Mine"}, status=201),
    AccessRow("GET", "/api/v1/auth/sessions", None, ANY_KEY),
    AccessRow("GET", "/api/v1/auth/sessions/{id}", None, SESSION_HOLDERS, create_session),
    AccessRow("DELETE", "/api/v1/auth/sessions/{id}", None, SESSION_HOLDERS, create_session, status=204),
    AccessRow("DELETE", "/api/v1/auth/keys/{id}", KEYS, KEY_HOLDERS, create_key, status=204),
    AccessRow("GET", "/api/v1/auth/signing-secret", KEYS, ADMINS),
    AccessRow("POST", "/api/v1/auth/signing-secret", KEYS, ADMINS, status=201),
    AccessRow("GET", "/api/v1/auth/event-tokens", KEYS, ADMINS),
    AccessRow("POST", "/api/v1/auth/event-tokens", KEYS, ADMINS, body={"name": "Hooks"}, status=201),
    AccessRow(
        "DELETE", "/api/v1/auth/event-tokens/{id}", KEYS, TOKEN_HOLDERS, create_event_token, status=204
    ),
    AccessRow("POST", "/api/v1/workflows/events", EXECUTE, OWN, body={"event_type": "a.b"}),
    AccessRow("OPTIONS", "/api/v1/workflows/events", None, EVERYBODY, status=204),
    AccessRow("GET", "/api/v1/events", READ, OWN),
    AccessRow("GET", "/api/v1/events/{id}", READ, KEY_HOLDERS, create_event),
    AccessRow("POST", "/api/v1/events/{id}/replay", EXECUTE, KEY_HOLDERS, create_event, REPLAY, status=201),
    AccessRow("GET", "/api/v1/auth/users", USERS, ADMINS),
    AccessRow("POST", "/api/v1/auth/users", USERS, ADMINS, body={"email": "<address>"}, status=201),
    AccessRow("GET", "/api/v1/audit", USERS, ADMINS),
    AccessRow("GET", "/api/v1/auth/invitations", USERS, ADMINS),
    AccessRow("POST", "/api/v1/auth/invitations", USERS, ADMINS, body={"email": "<address>"}, status=201),
    AccessRow("DELETE", "/api/v1/auth/invitations/{id}", USERS, TOKEN_HOLDERS, create_invitation, status=204),
    AccessRow("GET", "/api/v1/admin/drift", USERS, ADMINS),
    AccessRow("GET", "/api/v1/admin/health", USERS, ADMINS),
    AccessRow("GET", "/api/v1/intake-samples", USERS, ADMINS),
    AccessRow("GET", "/api/v1/datasources", READ_SOURCES, OWN),
    use_row("GET", "/usage"),
    AccessRow("POST", "/api/v1/datasources", WRITE_SOURCES, OWN, body=TOKEN, status=201),
    use_row("GET", ""),
    change_row("PUT", "", {"name": "<address>"}),
    change_row("DELETE", "", status=204),
    use_row("POST", "/test"),
    use_row("GET", "/share"),
    change_row("POST", "/share", {"userId": "<colleague>"}),
    change_row("DELETE", "/share/{subId}", status=204),
    change_row("PUT", "/visibility", {"isPublic": True}),
    AccessRow("GET", MODELS, KeyScope.MODELS_READ, OWN),
    AccessRow("GET", "/api/v1/ai/costs", KeyScope.MODELS_READ, OWN),
    AccessRow("GET", "/api/v1/ai/settings", KeyScope.MODELS_READ, OWN),
    AccessRow(
        "PUT", "/api/v1/ai/settings", KeyScope.MODELS_WRITE, ADMINS, body={"monthBudget": {"maxTokens": 9}}
    ),
    AccessRow("POST", MODELS, KeyScope.MODELS_WRITE, MODEL_MAKERS, body=MODEL),
    AccessRow("GET", f"{MODELS}/{{id}}", KeyScope.MODELS_READ, MODEL_USERS, create_ai_model),
    AccessRow(
        "PUT", f"{MODELS}/{{id}}", KeyScope.MODELS_WRITE, MODEL_OWNERS, create_ai_model, {"price": None}
    ),
    AccessRow("DELETE", f"{MODELS}/{{id}}", KeyScope.MODELS_WRITE, MODEL_OWNERS, create_ai_model, status=204),
    AccessRow("POST", f"{MODELS}/{{id}}/test", KeyScope.MODELS_WRITE, MODEL_USERS, create_ai_model),
    AccessRow("GET", f"{MODELS}/{{id}}/status", KeyScope.MODELS_READ, MODEL_USERS, create_ai_model),
    AccessRow("GET", f"{MODELS}/{{id}}/metrics", KeyScope.MODELS_READ, MODEL_OWNERS, create_ai_model),
    AccessRow("GET", f"{MODELS}/{{id}}/permissions", KeyScope.MODELS_READ, MODEL_USERS, create_ai_model),
    AccessRow(
        "PUT",
        f"{MODELS}/{{id}}/permissions",
        KeyScope.MODELS_WRITE,
        MODEL_OWNERS,
        create_ai_model,
        {"isShared": True},
    ),
    AccessRow("GET", "/api/v1/ai-models", KeyScope.MODELS_READ, OWN),
    AccessRow("GET", PROVIDER_KEYS, READ_SOURCES, OWN),
    AccessRow("POST", PROVIDER_KEYS, WRITE_SOURCES, OWN, body=PROVIDER_KEY, status=201),
    AccessRow("GET", f"{PROVIDER_KEYS}/{{id}}", READ_SOURCES, READERS, create_provider_key),
    AccessRow(
        "PUT", f"{PROVIDER_KEYS}/{{id}}", WRITE_SOURCES, WRITERS, create_provider_key, {"keyHeader": None}
    ),
    AccessRow("DELETE", f"{PROVIDER_KEYS}/{{id}}", WRITE_SOURCES, WRITERS, create_provider_key, status=204),
    AccessRow("POST", f"{PROVIDER_KEYS}/{{id}}/test", READ_SOURCES, READERS, create_provider_key),
    AccessRow("GET", TOOL_SERVERS, READ_SOURCES, OWN),
    AccessRow("POST", TOOL_SERVERS, WRITE_SOURCES, OWN, body=TOOL_SERVER, status=201),
    AccessRow("GET", f"{TOOL_SERVERS}/{{id}}", READ_SOURCES, READERS, create_tool_server),
    AccessRow(
        "PUT", f"{TOOL_SERVERS}/{{id}}", WRITE_SOURCES, WRITERS, create_tool_server, {"keyHeader": None}
    ),
    AccessRow("DELETE", f"{TOOL_SERVERS}/{{id}}", WRITE_SOURCES, WRITERS, create_tool_server, status=204),
    AccessRow("POST", f"{TOOL_SERVERS}/{{id}}/test", READ_SOURCES, READERS, create_tool_server),
    AccessRow("POST", f"{TOOL_SERVERS}/{{id}}/refresh", WRITE_SOURCES, WRITERS, create_tool_server),
    AccessRow(
        "POST", f"{TOOL_SERVERS}/{{id}}/accept", WRITE_SOURCES, WRITERS, create_tool_server, {"tools": []}
    ),
    AccessRow("GET", "/api/v1/openapi.json", READ, OWN),
    AccessRow("GET", "/api/v1/workflow-nodes", READ, OWN),
    AccessRow("GET", "/api/v1/workflow-nodes/{type}/schema", READ, OWN),
    AccessRow("POST", "/api/v1/workflow-nodes", KeyScope.NODES_WRITE, OWN, body=NODE_TYPE, status=201),
    AccessRow("POST", "/api/v1/tasks/claim", KeyScope.TASKS_WORK, OWN, body=TASK_POLL),
    AccessRow("POST", "/api/v1/tasks/report", KeyScope.TASKS_WORK, OWN, body={"worker": "<worker>"}),
    AccessRow("POST", "/api/v1/tasks/stop", KeyScope.TASKS_WORK, OWN, body={"worker": "<worker>"}),
    AccessRow("GET", "/api/v1/tasks", READ, OWN),
    AccessRow("GET", "/api/v1/tasks/{id}", READ, READERS, create_task),
    AccessRow("POST", "/api/v1/tasks/{id}/retry", EXECUTE, READERS, create_open_task),
    AccessRow("POST", "/api/v1/tasks/{id}/cancel", EXECUTE, READERS, create_open_task),
    AccessRow("GET", "/api/v1/tasks/{id}/input", KeyScope.TASKS_WORK, TASK_HOLDERS, create_task),
    AccessRow("PUT", "/api/v1/tasks/{id}/output", KeyScope.TASKS_WORK, TASK_HOLDERS, create_task, body={}),
    AccessRow("GET", "/api/v1/workers", READ, OWN),
    AccessRow("POST", "/api/v1/workers/{id}/drain", WRITE, TEMPLATE_READERS, create_task_worker),
    AccessRow("GET", "/api/v1/workflow-nodes/{type}/{name}", READ, TEMPLATE_READERS, create_node_type),
    AccessRow("GET", "/api/v1/workflow-nodes/{type}/{name}/schema", READ, TEMPLATE_READERS, create_node_type),
    AccessRow(
        "GET", "/api/v1/workflow-nodes/{type}/{name}/versions", READ, TEMPLATE_READERS, create_node_type
    ),
    AccessRow(
        "DELETE",
        "/api/v1/workflow-nodes/{type}/{name}",
        KeyScope.NODES_WRITE,
        TEMPLATE_READERS,
        create_node_type,
        status=204,
        query="?all=true",
    ),
    AccessRow("GET", "/api/v1/workflows", READ, OWN),
    AccessRow("GET", "/api/v1/workflows/stats", READ, OWN),
    AccessRow("GET", "/api/v1/workflows/activity", READ, OWN),
    AccessRow("GET", "/api/v1/deployments", READ, OWN),
    AccessRow("GET", "/api/v1/deployments/summary", READ, OWN),
    AccessRow("GET", "/api/v1/deployments/usage", READ, OWN),
    AccessRow("GET", "/api/v1/workflows/templates", READ, OWN),
    AccessRow("POST", "/api/v1/workflows", WRITE, OWN, body=NEW, status=201),
    AccessRow("POST", "/api/v1/workflows/build", WRITE, OWN, body=NEW, status=201),
    AccessRow("POST", "/api/v1/workflows/apply", WRITE, OWN, body={"workflows": [], "dryRun": True}),
    AccessRow("POST", "/api/v1/workflows/import", WRITE, OWN, body=DOCUMENT, status=201),
    AccessRow(
        "POST",
        "/api/v1/workflows/from-template",
        WRITE,
        TEMPLATE_READERS,
        create_template,
        {"templateId": "<id>"},
        201,
    ),
    AccessRow("GET", WORKFLOW, READ, TEMPLATE_READERS, create_template, use="of a template"),
    AccessRow(
        "PUT", WORKFLOW, WRITE, TEMPLATE_WRITERS, create_template, {"name": "Other"}, use="of a template"
    ),
    read_row("GET", ""),
    write_row("PUT", "", {"name": "Other"}),
    write_row("DELETE", "", status=204),
    write_row("PUT", "/status", {"status": "active"}),
    write_row("PUT", "/visibility", {"isPublic": True}),
    AccessRow(
        "PUT",
        f"{WORKFLOW}/visibility",
        WRITE,
        TEMPLATE_MAKERS,
        create_workflow,
        {"isTemplate": True},
        use="as a template",
    ),
    AccessRow("POST", f"{WORKFLOW}/save-as-template", WRITE, COPYING_ADMINS, create_workflow, status=201),
    read_row("POST", "/duplicate", scope=WRITE, status=201),
    read_row("GET", "/export"),
    read_row("POST", "/execute", scope=EXECUTE, status=201),
    AccessRow(
        "POST",
        f"{WORKFLOW}/execute",
        EXECUTE,
        TWO_SCOPES,
        create_workflow,
        {"definition": GRAPH},
        use="with a definition",
    ),
    read_row("GET", "/inbound-address"),
    write_row("POST", "/trigger-token", status=201),
    write_row("DELETE", "/trigger-token", status=204),
    read_row("GET", "/deliveries"),
    AccessRow("GET", f"{WORKFLOW}/intake-samples", READ, WRITERS, create_workflow),
    read_row("POST", "/deliveries/redrive", scope=EXECUTE),
    read_row("GET", "/dead-letters"),
    read_row("POST", "/dead-letters/redrive", scope=EXECUTE),
    AccessRow("POST", f"{WORKFLOW}/dead-letters/purge", EXECUTE, WRITERS, create_workflow),
    AccessRow("GET", "/api/v1/auth/trigger-tokens", READ, OWN),
    AccessRow("GET", "/api/v1/schedules", READ, OWN),
    AccessRow("GET", "/api/v1/schedules/timeline", READ, OWN),
    AccessRow("GET", "/api/v1/deliveries", READ, OWN),
    AccessRow("POST", "/api/v1/deliveries/redrive", EXECUTE, OWN, body={"filter": {"outcome": "rejected"}}),
    AccessRow("GET", "/api/v1/dead-letters", READ, OWN),
    AccessRow("GET", "/api/v1/dead-letters/groups", READ, OWN),
    AccessRow("POST", f"{GROUP}/mute", WRITE, WRITERS, create_dead_letter_group, MUTE),
    AccessRow("DELETE", f"{GROUP}/mute", WRITE, WRITERS, create_dead_letter_group, status=204),
    AccessRow("POST", "/api/v1/dead-letters/redrive", EXECUTE, OWN, body={"filter": {}}),
    AccessRow("POST", "/api/v1/dead-letters/replay", EXECUTE, OWN, body={"filter": {}}),
    AccessRow("POST", "/api/v1/dead-letters/purge", EXECUTE, OWN, body={"filter": {}}),
    AccessRow("GET", "/api/v1/deliveries/{id}", READ, READERS, create_delivery),
    AccessRow("POST", "/api/v1/deliveries/{id}/redrive", EXECUTE, READERS, create_delivery, status=201),
    *(
        AccessRow(method, "/hooks/{id}", None, EVERYBODY, create_webhook, status=202)
        for method in hooks.METHODS
    ),
    AccessRow("OPTIONS", "/hooks/{id}", None, EVERYBODY, create_webhook, status=204),
    AccessRow("GET", "/mail/{id}", None, EVERYBODY, create_mail_address),
    AccessRow("POST", "/mail/{id}", None, EVERYBODY, create_mail_address, {"subject": "Hello"}, 201),
    AccessRow("POST", f"{WORKFLOW}/enqueue", EXECUTE, READERS, create_queue_workflow, {"message": 1}, 201),
    AccessRow(
        "POST",
        f"{WORKFLOW}/email-trigger",
        EXECUTE,
        READERS,
        create_email_workflow,
        {"subject": "Hello"},
        201,
    ),
    AccessRow(
        "POST",
        f"{WORKFLOW}/enqueue-batch",
        EXECUTE,
        READERS,
        create_queue_workflow,
        {"messages": [{"message": 1}]},
        201,
    ),
    read_row("POST", "/validate"),
    write_row("POST", "/layout"),
    write_row("POST", "/compute-scopes"),
    read_row("GET", "/nodes"),
    write_row("POST", "/nodes", {"nodeId": "set"}, status=201),
    write_row("PUT", "/nodes/{sub}", {"label": "Other"}),
    write_row("DELETE", "/nodes/{sub}"),
    write_row("PUT", "/nodes/{sub}/input-mappings", {"mappings": {"a": "data"}}),
    write_row("PUT", "/nodes/{sub}/passthrough-values", {"values": {"a": "a"}}),
    AccessRow(
        "POST", f"{WORKFLOW}/nodes/{{sub}}/test", EXECUTE, READERS, create_workflow, {"wait": 0}, status=202
    ),
    AccessRow(
        "POST",
        f"{WORKFLOW}/nodes/{{sub}}/test",
        EXECUTE,
        TWO_SCOPES,
        create_workflow,
        {"wait": 0, "config": {"values": {"a": 2}}},
        use="with a config",
    ),
    write_row("POST", "/connections", {**EDGE, "sourcePort": "error"}, status=201),
    write_row("DELETE", "/connections/{sub}"),
    read_row("GET", "/versions"),
    write_row("POST", "/versions", {"versionTag": "v2.0.0"}, status=201),
    read_row("GET", "/versions/{version}"),
    read_row("POST", "/versions/{version}/validate"),
    write_row("POST", "/versions/{version}/restore"),
    read_row("GET", "/versions/{version}/diff/{other}"),
    read_row("GET", "/share"),
    write_row("POST", "/share", {"userId": "<colleague>"}),
    write_row("DELETE", "/share/{subId}", status=204),
    write_row("POST", "/deploy", status=202),
    write_row("POST", "/deploy-version", {"version": 1}, status=202),
    write_row("POST", "/undeploy"),
    AccessRow("POST", f"{WORKFLOW}/stop", WRITE, WRITERS, create_deployed_workflow, status=202),
    AccessRow(
        "POST", f"{WORKFLOW}/start", WRITE, WRITERS, create_deployed_workflow, {"replicas": 2}, status=202
    ),
    read_row("GET", "/status"),
    AccessRow("GET", f"{WORKFLOW}/logs", READ, READERS, create_deployed_workflow),
    AccessRow("POST", f"{WORKFLOW}/trigger", EXECUTE, READERS, create_deployed_workflow),
    AccessRow("GET", "/api/v1/workflows/discover", READ, OWN, query="?appId=app_001"),
    read_row("GET", "/schedule"),
    read_row("GET", "/statistics"),
    read_row("GET", "/lifecycle"),
    write_row("PUT", "/lifecycle", {"type": "always-on"}),
    AccessRow(
        "POST",
        f"{WORKFLOW}/lifecycle/hold",
        WRITE,
        WRITERS,
        create_deployed_workflow,
        {"expiresInSeconds": 60},
    ),
    AccessRow("DELETE", f"{WORKFLOW}/lifecycle/hold", WRITE, WRITERS, create_deployed_workflow, status=204),
    read_row("GET", "/log-level"),
    write_row("PUT", "/log-level", {"level": "debug"}),
    read_row("GET", "/lifecycle/history"),
    read_row("GET", "/lifecycle/calendar"),
    AccessRow("POST", f"{WORKFLOW}/lifecycle/preview", READ, READERS, create_workflow, {"type": "always-on"}),
    AccessRow("POST", f"{WORKFLOW}/schedule/preview", READ, READERS, create_workflow, {"cron": "0 7 * * *"}),
    AccessRow("POST", "/api/v1/executions/bulk-cancel", EXECUTE, OWN, body=DRY_RUN),
    AccessRow("POST", "/api/v1/executions/bulk-retry", EXECUTE, OWN, body=DRY_RUN),
    AccessRow("POST", "/api/v1/executions/bulk-delete", WRITE, OWN, body=DRY_RUN),
    AccessRow("POST", "/api/v1/executions/bulk-replay", EXECUTE, OWN, body=DRY_RUN),
    AccessRow("POST", "/api/v1/executions/bulk-operations", EXECUTE, NOTHING_MATCHES, body=BULK_CANCEL),
    AccessRow("POST", "/api/v1/dead-letters/bulk-operations", EXECUTE, NOTHING_MATCHES, body=BULK_PURGE),
    AccessRow("GET", "/api/v1/bulk-operations", READ, OWN),
    AccessRow("GET", "/api/v1/bulk-operations/{id}", READ, KEY_HOLDERS, create_bulk_operation),
    AccessRow("POST", "/api/v1/bulk-operations/{id}/stop", EXECUTE, KEY_HOLDERS, create_bulk_operation),
    AccessRow(
        "POST",
        "/api/v1/bulk-operations/{id}/pace",
        EXECUTE,
        KEY_HOLDERS,
        create_bulk_operation,
        {"perSecond": 1},
    ),
    AccessRow("GET", "/api/v1/executions", READ, OWN),
    AccessRow("GET", "/api/v1/executions/statistics", READ, OWN),
    AccessRow("GET", "/api/v1/executions/failures", READ, OWN),
    run_row("GET", ""),
    AccessRow("GET", "/api/v1/pending-inputs", EXECUTE, OWN),
    AccessRow("GET", "/api/v1/answered-inputs", READ, OWN),
    run_row("GET", "/progress", query="?wait=0"),
    run_row("GET", "/spans"),
    run_row("GET", "/spans/{sub}"),
    run_row("GET", "/spans/{sub}/diff"),
    run_row("GET", "/graph"),
    run_row("GET", "/same-failures"),
    run_row("GET", "/logs"),
    run_row("GET", "/steps"),
    run_row("GET", "/blobs/{sha256}"),
    run_row("GET", "/events"),
    AccessRow(
        "GET", "/live", READ, READERS, create_failed_execution, status=204, query="?topics=execution:{id}"
    ),
    run_row("GET", "/why"),
    read_row("GET", "/why"),
    AccessRow("GET", "/api/v1/why", READ, OWN),
    AccessRow("GET", f"{EXECUTION}/pending-inputs", READ, READERS, create_waiting_execution),
    AccessRow("POST", f"{EXECUTION}/input", EXECUTE, READERS, create_waiting_execution, ANSWER),
    AccessRow("POST", f"{EXECUTION}/reassign-input", EXECUTE, READERS, create_waiting_execution, ASSIGNEES),
    run_row("GET", "/signals"),
    run_row("GET", "/state"),
    AccessRow("POST", f"{EXECUTION}/signals", EXECUTE, READERS, create_signalled_execution, SIGNAL, 202),
    AccessRow("POST", f"{EXECUTION}/callback", None, UNKNOWN_TO_ALL, create_failed_execution),
    run_row("POST", "/stop", scope=EXECUTE),
    run_row("POST", "/cancel", scope=EXECUTE),
    AccessRow("POST", f"{EXECUTION}/replay", EXECUTE, READERS, create_failed_execution, DRY_RUN_ONLY),
    run_row("POST", "/resume", scope=EXECUTE, status=201),
]

NAMED = [pytest.param(number, id=row.name) for number, row in enumerate(ROWS)]
SAMPLE = [NAMED[number] for number in {id(row.expected): number for number, row in enumerate(ROWS)}.values()]
"""A row for each expectation."""


# ── the gateway ─────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture(scope="module")
async def on_sqlite(
    postgres: PostgresServer, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[AccessCast]:
    folder = tmp_path_factory.mktemp("access")
    async with create_gateway("sqlite", postgres, folder) as harness, serve_as_pods(harness):
        cast, file = await create_cast(harness), str(harness.gateway.database.url.database)
        with (
            closing(sqlite3.connect(file, isolation_level=None)) as now,
            closing(sqlite3.connect(file, isolation_level=None)) as earlier,
        ):
            cast.views = (now, earlier)
            yield cast


@pytest.fixture(scope="module")
async def on_postgres(
    postgres: PostgresServer, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[AccessCast]:
    folder = tmp_path_factory.mktemp("access")
    async with create_gateway("postgresql", postgres, folder) as harness, serve_as_pods(harness):
        yield await create_cast(harness)


async def create_cast(harness: GatewayHarness) -> AccessCast:
    here, elsewhere = await harness.organization(), await harness.organization()
    owner = await harness.person(here)
    users = {
        CallerKind.OWNER: owner.user,
        CallerKind.GUEST: (await harness.person(here)).user,
        CallerKind.COLLEAGUE: (await harness.person(here)).user,
        CallerKind.ADMIN: (await harness.person(here, UserRole.ADMIN)).user,
        CallerKind.STRANGER: (await harness.person(elsewhere, UserRole.ADMIN)).user,
    }
    cast = AccessCast(harness, owner, users, await create_keys(harness, users))
    answer_for_pods(harness)
    for make in MADE:
        for is_public in (False, True):
            cast.kept[make, is_public] = await make(cast, is_public)
    for admin in (CallerKind.ADMIN, CallerKind.STRANGER):
        client = await harness.client(cast.keys[admin, KEYS])
        await client.post("/api/v1/auth/signing-secret")
    return cast


async def create_keys(
    harness: GatewayHarness, users: Mapping[CallerKind, User]
) -> dict[tuple[CallerKind, KeyScope | None], str]:
    """Make a key for each caller and scope, and one without any; also those that aren't valid."""
    now = datetime.now(UTC)
    holders = {
        **users,
        CallerKind.COLLEAGUE_OF_PUBLIC: users[CallerKind.COLLEAGUE],
        CallerKind.WRONG_SCOPE: users[CallerKind.ADMIN],
        CallerKind.EXPIRED_KEY: users[CallerKind.OWNER],
        CallerKind.REVOKED_KEY: users[CallerKind.OWNER],
    }
    keys = {(CallerKind.UNKNOWN_KEY, scope): "sk-00" + "0" * 52 for scope in (*KeyScope, None)}

    async def make(connection: AsyncConnection) -> None:
        for caller, scope in [(caller, scope) for caller in holders for scope in (*KeyScope, None)]:
            user = holders[caller]
            made = await access_store.create_key(
                connection,
                user=user,
                name="A key",
                scopes=ALL_KEY_SCOPES - {scope} if caller is CallerKind.WRONG_SCOPE else {scope} - {None},
                secret=SECRET.encode(),
                now=now - timedelta(days=2),
                expires_at=now - timedelta(seconds=1) if caller is CallerKind.EXPIRED_KEY else None,
            )
            keys[caller, scope] = made.key
            if caller is CallerKind.REVOKED_KEY:
                await access_store.revoke_key(
                    connection, user.organization_id, made.row.id, user_id=None, now=now
                )

    await harness.gateway.database.transaction(make)
    return keys


WRITTEN_LATER = frozenset({"delivery", "intake_sample", "key_refusal", "process_presence"})
CHANGED_LATER = frozenset({"last_used_at", "last_route", "last_address_hash", "delivered_at"})


@asynccontextmanager
async def require_no_change(cast: AccessCast) -> AsyncIterator[None]:
    """Check that a block changes no row, except those written later: last use of keys, presence, and audit of refusals
    and events.
    """
    if not is_sqlite(cast.harness.gateway.database.url):
        before = await read_all_rows(cast.harness)
        yield
        assert await read_all_rows(cast.harness) == before
        return
    assert cast.views is not None
    now, earlier = cast.views
    version = now.execute("PRAGMA data_version").fetchall()
    earlier.execute("BEGIN")
    try:
        # The first read sets the moment of all.
        earlier.execute("SELECT count(*) FROM organization").fetchall()
        yield
        # Where nothing at all was written, no row has changed. Tables are read in the order of their row ids.
        if now.execute("PRAGMA data_version").fetchall() != version:
            for rows in select_rows().values():
                assert now.execute(rows).fetchall() == earlier.execute(rows).fetchall(), rows
    finally:
        earlier.execute("ROLLBACK")


@cache
def select_rows() -> dict[str, str]:
    """Return the statements that read the rows of each table, without columns that are written later."""
    return {
        table.name: f"SELECT {', '.join(one.name for one in table.columns if one.name not in CHANGED_LATER)}"
        f" FROM {table.name}"
        for table in SQLModel.metadata.sorted_tables
        if table.name not in WRITTEN_LATER
    }


async def read_all_rows(harness: GatewayHarness) -> list[str]:
    """Return all rows of all tables of a PostgreSQL database as text, except those written later."""
    tables = [f"SELECT '{name}' || one::text FROM ({rows}) AS one" for name, rows in select_rows().items()]
    async with harness.gateway.database.read() as connection:
        return sorted(await connection.scalars(text(" UNION ALL ".join(tables))))


# ── the tests ───────────────────────────────────────────────────────────────────────────────────────────────


def test_the_table_here_is_the_table_of_routes() -> None:
    assert {(row.method, row.path, row.scope) for row in ROWS} == {
        (
            line.method,
            line.path,
            SCOPES[line.access] if isinstance(line.access, AccessRule) else line.access,
        )
        for line in routes.TABLE
    }


@pytest.mark.parametrize("number", NAMED)
async def test_everybody_is_answered_as_the_table_says_and_a_refusal_changes_nothing(
    on_sqlite: AccessCast, number: int
) -> None:
    await ask_everybody(on_sqlite, number)


@pytest.mark.parametrize("number", SAMPLE)
async def test_it_is_the_same_on_postgresql(on_postgres: AccessCast, number: int) -> None:
    await ask_everybody(on_postgres, number)


async def ask_everybody(cast: AccessCast, number: int) -> None:
    """Send the request of every caller, refused callers first."""
    row = ROWS[number]
    # A separate address, because repeated requests with invalid keys are throttled by address.
    client = await cast.harness.client(address=f"10.1.1.{number}")
    targets = {caller: await cast.target(row, caller) for caller in row.expected}
    refused = [caller for caller, answer in row.expected.items() if answer != OK]
    allowed = [caller for caller, answer in row.expected.items() if answer == OK]

    async with require_no_change(cast):
        answers = {caller: await cast.call(client, row, caller, targets[caller]) for caller in refused}
    answers |= {caller: await cast.call(client, row, caller, targets[caller]) for caller in allowed}
    assert {caller: status_and_code(answer) for caller, answer in answers.items()} == {
        caller: f"{row.status}" if answer == OK else answer for caller, answer in row.expected.items()
    }
    if row.scope is not None:
        assert row.scope in answers[CallerKind.WRONG_SCOPE].json()["error"]["message"]
    if row.expected[CallerKind.STRANGER] == NOT_FOUND:
        absent = await cast.call(client, row, CallerKind.STRANGER, "wf_absent")
        assert absent.json()["error"] == answers[CallerKind.STRANGER].json()["error"]
    for caller in (CallerKind.STRANGER, CallerKind.COLLEAGUE):
        assert not [hidden for hidden in cast.hidden(caller) if hidden in answers[caller].text]


async def test_objects_of_other_organizations_are_not_counted(on_sqlite: AccessCast) -> None:
    harness = on_sqlite.harness
    newcomer = await harness.person(await harness.organization(), UserRole.ADMIN)
    counts = {
        "/api/v1/auth/keys": 1,
        "/api/v1/auth/users": 1,
        "/api/v1/audit": 0,
        "/api/v1/intake-samples": 0,
        "/api/v1/deliveries": 0,
        "/api/v1/dead-letters/groups": 0,
        "/api/v1/datasources": 0,
        MODELS: 0,
        PROVIDER_KEYS: 0,
        TOOL_SERVERS: 0,
        "/api/v1/workflows": 0,
        "/api/v1/workflows/stats": 0,
        "/api/v1/workflows/activity": 0,
        "/api/v1/workflows/templates": len(shipped_templates.load_templates()),
        "/api/v1/executions": 0,
        "/api/v1/bulk-operations": 0,
    }
    answers = {path: (await newcomer.api.get(path)).json() for path in counts}
    assert {path: answer.get("count", answer.get("total")) for path, answer in answers.items()} == counts


def status_and_code(answer: httpx2.Response) -> str:
    """Return the status of an answer, and the code of a refusal."""
    if answer.is_success:
        return f"{answer.status_code}"
    return f"{answer.status_code} {answer.json()['error']['code']}"
