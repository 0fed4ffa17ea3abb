"""Executions over HTTP: idempotent start, visibility, progress, cancellation and resume."""

import asyncio
import json
import re
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any

import httpx2
import pytest
from sqlalchemy import func, insert, select, update
from sqlalchemy.ext.asyncio import AsyncConnection
from sqlmodel import col
from starlette.applications import Starlette

from engine.agents.agent_steps import AgentStep, StepKind, StepStatus
from engine.run_errors import FailureCause
from engine.run_records import AttemptSpan, LogLine, NodeSpan, RunError, RunStatus, SpanStatus
from gateway import state
from gateway.executions import live_events, long_poll
from gateway.http import limits
from gateway.http.shared_allowance import SharedAllowance
from gateway.main import create_app
from gateway.state import GatewayState
from journal.store import ClaimedRun, ClaimQuery, RunWrite
from messages import redis_broker
from messages.broker import Broker, DirectMessage, Notification
from messages.broker_connection import connect_broker
from models.access import KeyScope, Organization
from models.execution import Execution, Idempotency, SpanRow
from models.workflow import Definition, Workflow, WorkflowShare
from tests.integration.gateway_harness import (
    EDGE,
    GRAPH,
    STEP,
    TRIGGER,
    GatewayHarness,
    OrganizationUsers,
    UserClient,
)
from tests.integration.task_workers import TaskWorkerClient
from tests.services import RedisServer
from workers.main import run_worker
from workers.settings import WorkerSettings

WORKFLOWS = "/api/v1/workflows"
EXECUTIONS = "/api/v1/executions"
TIME = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z")
EXECUTION = {
    "id", "workflowId", "version", "status", "startedAt", "endedAt", "durationMs", "trigger", "triggerType", "userId",
    "organizationId", "error", "progress", "completedNodes", "totalNodes", "resumedFrom", "createdAt", "updatedAt",
    "replayOf",
    "parentId", "rootId", "tags", "metadata",
}  # fmt: skip
SPAN = {
    "id", "executionId", "nodeId", "nodeLabel", "nodeType", "status", "startedAt", "endedAt", "durationMs", "inputData",
    "outputData", "error", "attempt", "port", "iteration", "unresolved", "reusedFrom", "hashes", "sequence", "wakeAt",
    "kind", "nextAttemptAt",
}  # fmt: skip
NOW = datetime(2026, 1, 1, tzinfo=UTC)
PATIENCE_SECONDS = 60.0
PROMPT_SECONDS = 15.0
"""Sooner than a poll times out; without a notification, a poll returns no earlier."""
LOOK_SECONDS = long_poll.LOOK_SECONDS


@pytest.fixture(scope="module", autouse=True)
def _disable_polling() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(long_poll, "LOOK_SECONDS", 3_600.0)
        yield


@pytest.fixture
def looks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Restore the default polling of gateways that start from now on."""
    assert LOOK_SECONDS <= 1
    monkeypatch.setattr(long_poll, "LOOK_SECONDS", 0.2)


@dataclass
class ClaimedTestRun:
    """Claimed run, and the records that a worker would write for it."""

    gateway: GatewayState
    claimed: ClaimedRun
    broker: Broker
    sequence: int = 0
    settled: set[str] = field(default_factory=set)
    percent: int = 0

    async def write(
        self,
        *records: NodeSpan | AttemptSpan | LogLine | AgentStep,
        end: RunStatus | None = None,
        error: RunError | None = None,
        is_told: bool = True,
    ) -> None:
        """Commit records and optionally the end, and publish that unless the notification is to be lost."""
        spans = [record for record in records if isinstance(record, NodeSpan)]
        attempts = [record for record in records if isinstance(record, AttemptSpan)]
        self.settled |= {span.node_id for span in spans if span.ended_at is not None}
        claimed = self.claimed
        write = RunWrite(
            claimed.execution_id,
            claimed.shard,
            claimed.token,
            spans,
            [record for record in records if isinstance(record, LogLine)],
            completed_nodes=len(self.settled),
            progress=self.percent or min(50 * len(self.settled), 99),
            end=end,
            error=error,
            attempts=attempts,
            steps=[record for record in records if isinstance(record, AgentStep)],
        )
        assert await self.gateway.store.record([write]) == {claimed.execution_id}
        if is_told:
            await self.broker.publish({claimed.execution_id: claimed.channel})

    def attempt(
        self,
        node_id: str,
        number: int,
        status: SpanStatus = SpanStatus.FAILED,
        **fields: Any,  # noqa: ANN401 - the other fields
    ) -> AttemptSpan:
        self.sequence += 1
        name = node_id.title()
        return AttemptSpan(node_id, name, "set", "", number, status, self.sequence, NOW, **fields)

    async def complete(self, *, is_told: bool = True) -> None:
        await self.write(
            self.span("start", output={"body": {"x": 1}}),
            self.span("step", output={"body": {"x": 1}, "a": 1}, input_node="start"),
            end=RunStatus.COMPLETED,
            is_told=is_told,
        )

    def span(self, node_id: str, status: SpanStatus = SpanStatus.COMPLETED, **fields: Any) -> NodeSpan:  # noqa: ANN401 - any JSON value
        """Return a node's next record; `output` and `input` are given as values."""
        self.sequence += 1
        for name in ("input", "output"):
            if name in fields:
                fields[name] = json.dumps(fields[name]).encode()
        has_ended = status in {SpanStatus.COMPLETED, SpanStatus.FAILED}
        return NodeSpan(
            node_id=node_id,
            label=node_id.title(),
            type="manual" if node_id == "start" else "set",
            status=status,
            sequence=self.sequence,
            started_at=None if status is SpanStatus.SKIPPED else NOW,
            ended_at=NOW + timedelta(milliseconds=250) if has_ended else None,
            **{"port": "output" if status is SpanStatus.COMPLETED else None, **fields},
        )

    def step(self, node_id: str, number: int, status: StepStatus, **fields: Any) -> AgentStep:  # noqa: ANN401 - the other fields
        self.sequence += 1
        kind, name = (StepKind.TOOL, "look") if number % 2 else (StepKind.MODEL, "echo")
        return AgentStep(node_id, "", number, self.sequence, kind, name, status, started_at=NOW, **fields)

    def line(self, level: str, message: str) -> LogLine:
        self.sequence += 1
        return LogLine(level, message, "step", self.sequence, NOW)


async def claim_run(
    harness: GatewayHarness, execution_id: str, *, broker: Broker | None = None
) -> ClaimedTestRun:
    """Claim a run as a worker would."""
    gateway = harness.gateway
    broker = broker or gateway.broker
    while True:
        claim = ClaimQuery(owner=broker.channel, lease_seconds=60, limit=50)
        claimed = {one.execution_id: one for one in await gateway.store.claim(claim)}
        assert claimed, f"{execution_id} is not pending"
        if execution_id in claimed:
            return ClaimedTestRun(gateway, claimed[execution_id], broker)


def assert_refused(response: httpx2.Response, status: int, code: str) -> None:
    assert (response.status_code, response.json()["error"]["code"]) == (status, code), response.text


async def execute_workflow(person: UserClient, workflow_id: str, **body: Any) -> str:  # noqa: ANN401 - any JSON value
    """Execute a workflow and return the execution's id."""
    response = await person.api.post(f"{WORKFLOWS}/{workflow_id}/execute", json=body)
    assert response.status_code == 201, response.text
    execution_id: str = response.json()["executionId"]
    return execution_id


async def get_json(person: UserClient, path: str) -> dict[str, Any]:
    response = await person.api.get(f"{EXECUTIONS}{path}")
    assert response.status_code == 200, response.text
    body: dict[str, Any] = response.json()
    return body


async def list_ids(person: UserClient, query: str = "") -> list[str]:
    """Return the ids that a list shows."""
    return [execution["id"] for execution in (await get_json(person, f"?{query}"))["executions"]]


async def read_execution(harness: GatewayHarness, execution_id: str) -> Execution:
    statement = select(Execution).where(col(Execution.id) == execution_id)
    async with harness.gateway.database.read() as connection:
        return Execution(**(await connection.execute(statement)).mappings().one())


async def change_workflow(harness: GatewayHarness, workflow_id: str, **values: Any) -> None:  # noqa: ANN401 - columns of any type
    """Change a workflow behind the gateway's back, as another gateway would."""

    async def change(connection: AsyncConnection) -> None:
        statement = update(Workflow).where(col(Workflow.id) == workflow_id)
        await connection.execute(statement.values(revision=col(Workflow.revision) + 1, **values))

    await harness.gateway.database.transaction(change)


async def share(harness: GatewayHarness, workflow_id: str, person: UserClient) -> None:
    values = {"workflow_id": workflow_id, "user_id": person.user.id, "shared_at": datetime.now(UTC)}

    async def add(connection: AsyncConnection) -> None:
        await connection.execute(insert(WorkflowShare).values(values))

    await harness.gateway.database.transaction(add)
    await change_workflow(harness, workflow_id)


# ── execute ─────────────────────────────────────────────────────────────────────────────────────────────────


async def test_execute_answers_as_the_contract_says_and_the_row_is_there(
    harness: GatewayHarness, people: OrganizationUsers
) -> None:
    workflow_id = await people.owner.create(settings={"timeout": 60}, **GRAPH)
    response = await people.owner.api.post(
        f"{WORKFLOWS}/{workflow_id}/execute", json={"triggerInputs": {"key": "value"}}
    )
    assert response.status_code == 201
    assert set(response.json()) == {"executionId"}
    execution_id = response.json()["executionId"]
    assert re.fullmatch(r"exec_[0-9a-z]{26}", execution_id)
    assert response.headers["Location"] == f"{EXECUTIONS}/{execution_id}"
    assert "Idempotent-Replayed" not in response.headers
    stored = await read_execution(harness, execution_id)
    assert (stored.status, stored.total_nodes, stored.timeout_microseconds) == ("pending", 2, 60_000_000)


async def test_the_body_of_execute_may_be_left_out(people: OrganizationUsers) -> None:
    workflow_id = await people.owner.create(**GRAPH)
    response = await people.owner.api.post(f"{WORKFLOWS}/{workflow_id}/execute")
    assert response.status_code == 201
    shown = await get_json(people.owner, f"/{response.json()['executionId']}")
    assert shown["trigger"] == {"type": "manual", "data": {"body": {}}}


async def test_trigger_inputs_reach_the_run_as_the_trigger_node_gives_them_out(
    harness: GatewayHarness, people: OrganizationUsers
) -> None:
    nodes = [TRIGGER | {"nodeId": "webhook"}, STEP]
    workflow_id = await people.owner.create(nodes=nodes, connections=[EDGE])
    execution_id = await execute_workflow(people.owner, workflow_id, triggerInputs={"x": 1.0, "y": "é\u0301"})
    run = await claim_run(harness, execution_id)
    assert json.loads(run.claimed.trigger) == {"body": {"x": 1.0, "y": "é\u0301"}, "headers": {}, "query": {}}


@pytest.mark.parametrize(
    ("body", "path"),
    [
        ({"triggerInputs": [1]}, "triggerInputs"),
        ({"triggerInputs": "x"}, "triggerInputs"),
        ({"definition": []}, "definition"),
        ({"definition": {"nodes": {}}}, "definition.nodes"),
    ],
)
async def test_wrong_fields_of_execute_are_named(
    people: OrganizationUsers, body: dict[str, Any], path: str
) -> None:
    workflow_id = await people.owner.create(**GRAPH)
    response = await people.owner.api.post(f"{WORKFLOWS}/{workflow_id}/execute", json=body)
    assert_refused(response, 422, "validation-failed")
    assert [detail["path"] for detail in response.json()["error"]["details"]] == [path]


@pytest.mark.parametrize(
    ("status", "code"), [("paused", "workflow-paused"), ("archived", "workflow-archived")]
)
async def test_a_workflow_that_is_closed_takes_nothing_in(
    people: OrganizationUsers, status: str, code: str
) -> None:
    workflow_id = await people.owner.create(**GRAPH)
    await people.owner.api.put(f"{WORKFLOWS}/{workflow_id}/status", json={"status": status})
    assert_refused(await people.owner.api.post(f"{WORKFLOWS}/{workflow_id}/execute"), 409, code)


@pytest.mark.parametrize("status", ["draft", "active"])
async def test_drafts_and_active_workflows_are_executed(people: OrganizationUsers, status: str) -> None:
    workflow_id = await people.owner.create(status=status, **GRAPH)
    assert await execute_workflow(people.owner, workflow_id)


async def test_an_invalid_graph_is_refused_with_its_findings(people: OrganizationUsers) -> None:
    workflow_id = await people.owner.create(
        nodes=[TRIGGER, STEP], connections=[EDGE | {"targetNodeId": "gone"}]
    )
    response = await people.owner.api.post(f"{WORKFLOWS}/{workflow_id}/execute")
    assert_refused(response, 422, "validation-failed")
    [finding] = response.json()["error"]["details"]
    assert (finding["type"], finding["code"]) == ("broken-connection", "broken-connection")
    assert finding["connectionId"].startswith("conn-")


async def test_execute_needs_its_scope_and_a_workflow_that_one_may_read(
    harness: GatewayHarness, people: OrganizationUsers
) -> None:
    workflow_id = await people.owner.create(**GRAPH)
    reader = await harness.person(await harness.organization(), scopes=[KeyScope.WORKFLOWS_READ])
    assert_refused(await reader.api.post(f"{WORKFLOWS}/{workflow_id}/execute"), 403, "scope-required")
    for person in (people.colleague, people.stranger):
        assert_refused(await person.api.post(f"{WORKFLOWS}/{workflow_id}/execute"), 404, "not-found")
    await share(harness, workflow_id, people.colleague)
    harness.gateway.workflows.forget(people.owner.user.organization_id, workflow_id)
    assert await execute_workflow(people.colleague, workflow_id)
    assert await execute_workflow(people.admin, workflow_id)


# ── a definition of one's own ───────────────────────────────────────────────────────────────────────────────

OTHER = {
    "nodes": [TRIGGER | {"id": "t", "nodeId": "rest-api"}, STEP | {"id": "u"}, STEP | {"id": "v"}],
    "connections": [{"source": "t", "target": "u"}, {"source": "u", "target": "v"}],
}


async def test_a_definition_is_run_in_the_place_of_the_workflow_s_and_never_saved(
    harness: GatewayHarness, people: OrganizationUsers
) -> None:
    workflow_id = await people.owner.create(settings={"timeout": 7}, **GRAPH)
    before = await people.owner.workflow(workflow_id)
    execution_id = await execute_workflow(people.owner, workflow_id, definition=OTHER, triggerInputs={"x": 1})
    assert await people.owner.workflow(workflow_id) == before
    stored = await read_execution(harness, execution_id)
    statement = select(col(Definition.body)).where(col(Definition.hash) == stored.definition_hash)
    async with harness.gateway.database.read() as connection:
        pinned = json.loads(await connection.scalar(statement) or "")
    assert [node["id"] for node in pinned["nodes"]] == ["t", "u", "v"]
    assert [(edge["source"], edge["target"]) for edge in pinned["connections"]] == [("t", "u"), ("u", "v")]
    assert pinned["settings"]["timeout"] == 7
    assert (stored.total_nodes, stored.trigger_type) == (3, "rest-api")


async def test_a_definition_needs_the_scope_to_write(harness: GatewayHarness) -> None:
    organization = await harness.organization()
    owner = await harness.person(organization)
    workflow_id = await owner.create(**GRAPH)
    await change_workflow(harness, workflow_id, is_public=True)
    runner = await harness.person(organization, scopes=[KeyScope.WORKFLOWS_EXECUTE, KeyScope.WORKFLOWS_READ])
    response = await runner.api.post(f"{WORKFLOWS}/{workflow_id}/execute", json={"definition": OTHER})
    assert_refused(response, 403, "scope-required")
    assert "workflows:write" in response.json()["error"]["message"]
    assert await execute_workflow(runner, workflow_id)


@pytest.mark.parametrize(
    ("definition", "code", "path"),
    [
        ({"connections": [EDGE]}, "empty-workflow", "nodes"),
        ({"nodes": [STEP]}, "missing-trigger", "nodes"),
        ({"nodes": [{"id": "x", "nodeId": "sett"}]}, "unknown-node-type", "definition.nodes.0.nodeId"),
        ({"nodes": [TRIGGER | {"id": "a b"}]}, "invalid-id", "definition.nodes.0.id"),
    ],
)
async def test_a_definition_is_checked_like_any_graph(
    people: OrganizationUsers, definition: dict[str, Any], code: str, path: str
) -> None:
    workflow_id = await people.owner.create(**GRAPH)
    response = await people.owner.api.post(
        f"{WORKFLOWS}/{workflow_id}/execute", json={"definition": definition}
    )
    assert_refused(response, 422, "validation-failed")
    assert (code, path) in [
        (detail["code"], detail["path"]) for detail in response.json()["error"]["details"]
    ]


@pytest.mark.parametrize("definition", [{}, {"nodes": [], "connections": []}])
async def test_a_definition_without_a_graph_replaces_nothing(
    harness: GatewayHarness, people: OrganizationUsers, definition: dict[str, Any]
) -> None:
    execution_id = await execute_workflow(
        people.owner, await people.owner.create(**GRAPH), definition=definition
    )
    assert (await read_execution(harness, execution_id)).total_nodes == len(GRAPH["nodes"])


async def test_nothing_is_refused_from_memory(harness: GatewayHarness, people: OrganizationUsers) -> None:
    workflow_id = await people.owner.create(nodes=[STEP])

    async def told(person: UserClient = people.owner) -> int:
        return (await person.api.post(f"{WORKFLOWS}/{workflow_id}/execute", json={})).status_code

    assert await told() == 422
    assert (await people.owner.api.put(f"{WORKFLOWS}/{workflow_id}", json=GRAPH)).status_code == 200
    assert await told() == 201
    await change_workflow(harness, workflow_id, status="paused")
    assert await told() == 409
    await change_workflow(harness, workflow_id, status="draft")
    assert await told() == 201
    assert await told(people.colleague) == 404
    await share(harness, workflow_id, people.colleague)
    assert await told(people.colleague) == 201


async def test_a_definition_s_text_is_stored_once_however_often_it_runs(
    harness: GatewayHarness, people: OrganizationUsers
) -> None:
    workflow_id = await people.owner.create(**GRAPH)
    for _ in range(3):
        await execute_workflow(
            people.owner,
            workflow_id,
            definition=OTHER
            | {
                "connections": [
                    {"id": "c1", "source": "t", "target": "u"},
                    {"id": "c2", "source": "u", "target": "v"},
                ]
            },
        )
    organization_id = people.owner.user.organization_id
    statement = select(func.count()).where(col(Definition.organization_id) == organization_id)
    async with harness.gateway.database.read() as connection:
        assert await connection.scalar(statement) == 1


# ── repeated requests ───────────────────────────────────────────────────────────────────────────────────────


async def test_of_many_equal_requests_at_once_one_is_run_and_all_are_told_which(
    people: OrganizationUsers,
) -> None:
    workflow_id = await people.owner.create(**GRAPH)
    responses = await asyncio.gather(
        *(
            people.owner.api.post(
                f"{WORKFLOWS}/{workflow_id}/execute",
                json={"triggerInputs": {"x": 1}},
                headers={"Idempotency-Key": "once"},
            )
            for _ in range(50)
        )
    )
    assert {response.status_code for response in responses} == {201}
    [execution_id] = {response.json()["executionId"] for response in responses}
    replayed = [response.headers.get("Idempotent-Replayed") for response in responses]
    assert sorted(replayed, key=str) == [None, *["true"] * 49]
    assert {response.headers["Location"] for response in responses} == {f"{EXECUTIONS}/{execution_id}"}
    assert await list_ids(people.owner, f"workflow_id={workflow_id}") == [execution_id]


async def test_a_key_with_another_body_is_refused(people: OrganizationUsers) -> None:
    workflow_id = await people.owner.create(**GRAPH)
    path, headers = f"{WORKFLOWS}/{workflow_id}/execute", {"Idempotency-Key": "k"}
    assert (await people.owner.api.post(path, json={}, headers=headers)).status_code == 201
    response = await people.owner.api.post(path, json={"triggerInputs": {"x": 2}}, headers=headers)
    assert_refused(response, 422, "idempotency-mismatch")


async def test_a_key_is_its_user_s_and_its_workflow_s_alone(
    harness: GatewayHarness, people: OrganizationUsers
) -> None:
    headers = {"Idempotency-Key": "k"}
    workflows = [await people.owner.create(**GRAPH) for _ in range(2)]
    await change_workflow(harness, workflows[0], is_public=True)
    started = [
        (await person.api.post(f"{WORKFLOWS}/{workflow_id}/execute", headers=headers)).json()["executionId"]
        for person, workflow_id in (
            (people.owner, workflows[0]),
            (people.owner, workflows[1]),
            (people.colleague, workflows[0]),
        )
    ]
    assert len(set(started)) == 3


async def test_a_request_that_was_answered_is_answered_the_same_when_the_workflow_is_closed(
    people: OrganizationUsers,
) -> None:
    workflow_id = await people.owner.create(**GRAPH)
    path, headers = f"{WORKFLOWS}/{workflow_id}/execute", {"Idempotency-Key": "k"}
    first = await people.owner.api.post(path, headers=headers)
    await people.owner.api.put(f"{WORKFLOWS}/{workflow_id}/status", json={"status": "paused"})
    again = await people.owner.api.post(path, headers=headers)
    assert (again.status_code, again.json()) == (201, first.json())
    assert again.headers["Idempotent-Replayed"] == "true"
    assert_refused(
        await people.owner.api.post(path, json={"triggerInputs": {}}, headers=headers),
        422,
        "idempotency-mismatch",
    )
    assert_refused(
        await people.owner.api.post(path, headers={"Idempotency-Key": "other"}), 409, "workflow-paused"
    )


async def test_a_key_is_free_again_after_its_time(harness: GatewayHarness, people: OrganizationUsers) -> None:
    workflow_id = await people.owner.create(**GRAPH)
    path, headers = f"{WORKFLOWS}/{workflow_id}/execute", {"Idempotency-Key": "old"}
    first = await people.owner.api.post(path, headers=headers)

    async def expire(connection: AsyncConnection) -> None:
        past = datetime.now(UTC) - timedelta(seconds=1)
        statement = update(Idempotency).where(col(Idempotency.resource_id) == first.json()["executionId"])
        await connection.execute(statement.values(expires_at=past))

    await harness.gateway.database.transaction(expire)
    second = await people.owner.api.post(path, json={"triggerInputs": {"x": 1}}, headers=headers)
    assert second.status_code == 201
    assert second.json() != first.json()


# ── workflows that change meanwhile ─────────────────────────────────────────────────────────────────────────


async def test_a_workflow_that_another_gateway_changed_is_loaded_again(
    harness: GatewayHarness, people: OrganizationUsers
) -> None:
    workflow_id = await people.owner.create(**GRAPH)
    await execute_workflow(people.owner, workflow_id)
    await change_workflow(harness, workflow_id, settings={"timeout": 5})
    stored = await read_execution(harness, await execute_workflow(people.owner, workflow_id))
    assert stored.timeout_microseconds == 5_000_000


@pytest.mark.parametrize(
    ("values", "status", "code"),
    [
        ({"status": "paused"}, 409, "workflow-paused"),
        ({"deleted_at": NOW}, 404, "not-found"),
    ],
)
async def test_a_workflow_closed_by_another_gateway_accepts_nothing(
    harness: GatewayHarness, people: OrganizationUsers, values: dict[str, Any], status: int, code: str
) -> None:
    workflow_id = await people.owner.create(**GRAPH)
    execution_id = await execute_workflow(people.owner, workflow_id)
    await change_workflow(harness, workflow_id, **values)
    assert_refused(await people.owner.api.post(f"{WORKFLOWS}/{workflow_id}/execute"), status, code)
    assert await list_ids(people.admin, f"workflow_id={workflow_id}") == [execution_id]


# ── looking ─────────────────────────────────────────────────────────────────────────────────────────────────


async def test_an_execution_is_shown_with_everything_that_belongs_to_it(
    harness: GatewayHarness, people: OrganizationUsers
) -> None:
    workflow_id = await people.owner.create(settings={"timeout": 60}, **GRAPH)
    execution_id = await execute_workflow(people.owner, workflow_id, triggerInputs={"x": 1})
    pending = await get_json(people.owner, f"/{execution_id}")
    assert set(pending) >= EXECUTION | {"config", "outputs"}
    assert (pending["status"], pending["progress"], pending["outputs"]) == ("pending", 0, {})
    assert pending["startedAt"] is pending["endedAt"] is pending["durationMs"] is pending["error"] is None
    assert pending["config"] == {
        "timeout": 60,
        "retryOnFailure": False,
        "maxRetries": 3,
        "parallelism": 16,
        "strictMappings": True,
    }
    assert pending["trigger"] == {"type": "manual", "data": {"body": {"x": 1}}}
    assert (pending["userId"], pending["workflowId"]) == (people.owner.user.id, workflow_id)
    run = await claim_run(harness, execution_id)
    await run.write(run.span("start", output={"body": {"x": 1}}), run.span("step", SpanStatus.RUNNING))
    running = await get_json(people.owner, f"/{execution_id}")
    assert (running["status"], running["progress"], running["completedNodes"]) == ("running", 50, 1)
    assert running["outputs"] == {"start": {"body": {"x": 1}}}
    await run.write(run.span("step", output=[1]), end=RunStatus.COMPLETED)
    completed = await get_json(people.owner, f"/{execution_id}")
    assert (completed["status"], completed["progress"], completed["totalNodes"]) == ("completed", 100, 2)
    assert completed["outputs"] == {"start": {"body": {"x": 1}}, "step": [1]}
    assert TIME.fullmatch(completed["endedAt"])
    assert completed["durationMs"] >= 0
    assert completed["organizationId"] == people.owner.user.organization_id


async def test_a_failed_execution_shows_its_error(harness: GatewayHarness, people: OrganizationUsers) -> None:
    execution_id = await execute_workflow(people.owner, await people.owner.create(**GRAPH))
    run = await claim_run(harness, execution_id)
    cause = FailureCause("http-404", "It broke", "step", "GET", "http://a.example/")
    error = RunError("node-error", "It broke", "step", 2, cause)
    await run.write(run.span("step", SpanStatus.FAILED, error=error), end=RunStatus.FAILED, error=error)
    shown = {
        "code": "node-error", "message": "It broke", "nodeId": "step", "attempt": 2,
        "cause": {
            "code": "http-404", "message": "It broke", "nodeId": "step", "method": "GET",
            "url": "http://a.example/",
        },
    }  # fmt: skip
    assert (await get_json(people.owner, f"/{execution_id}"))["error"] == shown
    assert (await get_json(people.owner, f"/{execution_id}/progress"))["error"] == shown
    told = await open_stream(harness, people.owner, execution_id).rest()
    assert [event.data["error"] for event in told] == [shown, shown]
    assert (await get_json(people.owner, f"?workflow_id={run.claimed.workflow_id}"))["executions"][0][
        "error"
    ] == shown


async def test_a_list_shows_the_total_count_and_one_page(people: OrganizationUsers) -> None:
    workflow_id = await people.owner.create(**GRAPH)
    made = [await execute_workflow(people.owner, workflow_id) for _ in range(3)]
    body = await get_json(people.owner, "?limit=2&offset=1")
    assert set(body) == {"count", "limit", "offset", "executions"}
    assert (body["count"], body["limit"], body["offset"]) == (3, 2, 1)
    assert [execution["id"] for execution in body["executions"]] == [made[1], made[0]]
    assert set(body["executions"][0]) >= EXECUTION
    assert body["executions"][0]["trigger"] == {"type": "manual"}


async def test_a_list_is_filtered_and_sorted(harness: GatewayHarness, people: OrganizationUsers) -> None:
    owner = people.owner
    one, other = (
        await owner.create(**GRAPH),
        await owner.create(nodes=[TRIGGER | {"nodeId": "webhook"}, STEP], connections=[EDGE]),
    )
    first, second, third = [await execute_workflow(owner, workflow_id) for workflow_id in (one, one, other)]
    run = await claim_run(harness, first)
    await run.complete()
    assert await list_ids(owner, f"workflow_id={one}") == [second, first]
    assert await list_ids(owner, "trigger_type=webhook") == [third]
    assert await list_ids(owner, "status=completed") == [first]
    assert await list_ids(owner, "status=completed,failed") == [first]
    assert await list_ids(owner, "status=failed&status=completed") == [first]
    assert await list_ids(owner, "sort=createdAt:asc") == [first, second, third]
    assert (await list_ids(owner, "sort=endedAt:desc"))[0] == first
    assert (await list_ids(owner, "sort=startedAt:asc"))[-1] in {first, second, third}
    moment = (await read_execution(harness, second)).created_at.isoformat().replace("+00:00", "Z")
    assert await list_ids(owner, f"since={moment}") == [third, second]
    assert await list_ids(owner, f"until={moment}") == [first]
    assert await list_ids(owner, "workflow_id=wf_unknown") == []


@pytest.mark.parametrize(
    "query",
    [
        "status=done",
        "since=yesterday",
        "until=x",
        "limit=0",
        "limit=101",
        "offset=-1",
        "sort=status",
        "sort=createdAt:up",
    ],
)
async def test_a_query_that_means_nothing_is_400(people: OrganizationUsers, query: str) -> None:
    assert_refused(await people.owner.api.get(f"{EXECUTIONS}?{query}"), 400, "invalid-query")


async def test_spans_contain_the_input_and_output_of_each_node(
    harness: GatewayHarness, people: OrganizationUsers
) -> None:
    execution_id = await execute_workflow(people.owner, await people.owner.create(**GRAPH))
    run = await claim_run(harness, execution_id)
    hashes = b"".join(bytes([number]) * 32 for number in range(4))
    await run.write(
        run.span("start", input={"body": {}}, output={"body": {}, "größe": 1.0}, hashes=hashes),
        run.span(
            "step",
            SpanStatus.FAILED,
            input_node="start",
            unresolved=("data.x",),
            attempt=3,
            error=RunError("node-error", "No", "step", 3),
        ),
        run.span("never", SpanStatus.SKIPPED),
    )
    body = await get_json(people.owner, f"/{execution_id}/spans")
    assert (body["count"], body["limit"], body["offset"]) == (3, 100, 0)
    start, step, never = body["spans"]
    assert set(start) == SPAN
    assert start["id"].startswith("span_")
    assert (start["executionId"], start["nodeLabel"], start["nodeType"]) == (execution_id, "Start", "manual")
    assert (start["startedAt"], start["durationMs"]) == ("2026-01-01T00:00:00.000Z", 250)
    assert start["hashes"] == {
        "type": "00" * 32,
        "config": "01" * 32,
        "mappings": "02" * 32,
        "input": "03" * 32,
    }
    assert (start["inputData"], start["port"], start["unresolved"]) == ({"body": {}}, "output", [])
    assert step["inputData"] == start["outputData"] == {"body": {}, "größe": 1.0}
    assert (step["status"], step["attempt"], step["unresolved"]) == ("failed", 3, ["data.x"])
    assert step["error"]["message"] == "No"
    assert (never["status"], never["startedAt"], never["inputData"], never["hashes"]) == (
        "skipped",
        None,
        None,
        None,
    )

    async def nodes(query: str) -> list[str]:
        return [
            span["nodeId"]
            for span in (await get_json(people.owner, f"/{execution_id}/spans?{query}"))["spans"]
        ]

    assert await nodes("node_id=step") == ["step"]
    assert await nodes("status=completed,skipped") == ["start", "never"]
    assert await nodes("limit=1&offset=1") == ["step"]
    assert_refused(
        await people.owner.api.get(f"{EXECUTIONS}/{execution_id}/spans?limit=1001"), 400, "invalid-query"
    )
    assert_refused(
        await people.owner.api.get(f"{EXECUTIONS}/{execution_id}/spans?status=done"), 400, "invalid-query"
    )


@pytest.mark.every_database
async def test_logs_are_listed_in_order_and_by_level(
    harness: GatewayHarness, people: OrganizationUsers
) -> None:
    execution_id = await execute_workflow(people.owner, await people.owner.create(**GRAPH))
    run = await claim_run(harness, execution_id)
    await run.write(run.line("info", "one"), run.line("error", "two\nlines"), run.line("debug", "three"))
    body = await get_json(people.owner, f"/{execution_id}/logs")
    assert body["count"] == 3
    assert [line["message"] for line in body["logs"]] == ["one", "two\nlines", "three"]
    assert set(body["logs"][0]) >= {"id", "executionId", "level", "message", "nodeId", "createdAt"}
    errors = await get_json(people.owner, f"/{execution_id}/logs?level=error,debug&limit=1")
    assert (errors["count"], [line["level"] for line in errors["logs"]]) == (2, ["error"])
    assert_refused(
        await people.owner.api.get(f"{EXECUTIONS}/{execution_id}/logs?level=loud"), 400, "invalid-query"
    )


# ── permissions ─────────────────────────────────────────────────────────────────────────────────────────────

PATHS = [
    ("GET", ""), ("GET", "/progress?wait=0"), ("GET", "/spans"), ("GET", "/logs"), ("GET", "/events"),
    ("GET", "/steps"), ("GET", "/steps?follow=true"),
    ("GET", "/pending-inputs"), ("GET", f"/blobs/{64 * '0'}"),
    ("POST", "/stop"), ("POST", "/cancel"), ("POST", "/resume"),
]  # fmt: skip


@pytest.mark.parametrize(("method", "path"), PATHS)
async def test_an_execution_that_one_may_not_see_is_not_there(
    people: OrganizationUsers, method: str, path: str
) -> None:
    execution_id = await execute_workflow(people.owner, await people.owner.create(**GRAPH))
    for person, wanted in (
        (people.stranger, execution_id),
        (people.colleague, execution_id),
        (people.owner, "exec_0"),
    ):
        assert_refused(await person.api.request(method, f"{EXECUTIONS}/{wanted}{path}"), 404, "not-found")
    assert execution_id not in await list_ids(people.stranger) + await list_ids(people.colleague)
    assert (await get_json(people.owner, f"/{execution_id}"))["status"] == "pending"


@pytest.mark.parametrize(("method", "path"), PATHS)
async def test_each_operation_needs_its_scope(harness: GatewayHarness, method: str, path: str) -> None:
    needed = KeyScope.WORKFLOWS_READ if method == "GET" else KeyScope.WORKFLOWS_EXECUTE
    others = [scope for scope in KeyScope if scope is not needed]
    person = await harness.person(await harness.organization(), scopes=others)
    response = await person.api.request(method, f"{EXECUTIONS}/exec_1{path}")
    assert_refused(response, 403, "scope-required")
    assert needed in response.json()["error"]["message"]


async def test_readers_of_a_workflow_see_its_executions(
    harness: GatewayHarness, people: OrganizationUsers
) -> None:
    workflow_id = await people.owner.create(**GRAPH)
    execution_id = await execute_workflow(people.owner, workflow_id)
    await share(harness, workflow_id, people.colleague)
    for person in (people.colleague, people.admin, people.owner):
        assert execution_id in await list_ids(person)
        assert (await get_json(person, f"/{execution_id}/progress?wait=0"))["status"] == "pending"
    assert await list_ids(people.stranger) == []


async def create_neighbor(harness: GatewayHarness, people: OrganizationUsers) -> UserClient:
    """Return one more member of the organization."""
    statement = select(Organization).where(col(Organization.id) == people.owner.user.organization_id)
    async with harness.gateway.database.read() as connection:
        found = Organization(**(await connection.execute(statement)).mappings().one())
    return await harness.person(found)


OWN_GRAPH = {"nodes": [TRIGGER, {**STEP, "config": {"values": {"mine": 1}}}], "connections": [EDGE]}


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("execute", {"definition": OWN_GRAPH}),
        ("execute", {"pinned": {"start": {"body": {"mine": 1}}}}),
        ("execute", {"definition": OWN_GRAPH, "upTo": "step"}),
        ("nodes/step/test", {"input": {"mine": 1}, "wait": 0}),
    ],
)
async def test_a_private_run_is_visible_to_its_caller_owner_and_admins_only(
    harness: GatewayHarness, people: OrganizationUsers, path: str, body: dict[str, Any]
) -> None:
    workflow_id = await people.owner.create(**GRAPH)
    url = f"{WORKFLOWS}/{workflow_id}"
    await people.owner.api.put(f"{url}/visibility", json={"isPublic": True})
    started = await people.colleague.api.post(f"{url}/{path}", json=body)
    execution_id = started.json()["executionId"]
    other = await create_neighbor(harness, people)
    for method, below in PATHS:
        assert_refused(
            await other.api.request(method, f"{EXECUTIONS}/{execution_id}{below}"), 404, "not-found"
        )
    assert execution_id not in await list_ids(other)
    for action in ("cancel", "delete"):
        found = await other.api.post(
            f"{EXECUTIONS}/bulk-{action}", json={"filter": {"workflowId": workflow_id}, "dryRun": True}
        )
        assert found.json()["matched"] == 0
    for person in (people.colleague, people.owner, people.admin):
        assert execution_id in await list_ids(person)
        assert (await get_json(person, f"/{execution_id}/progress?wait=0"))["status"] == "pending"
    for plain in ({}, {"upTo": "step"}):
        seen = await execute_workflow(people.colleague, workflow_id, **plain)
        assert seen in await list_ids(other)


async def test_a_private_run_stays_so_when_it_is_resumed_and_is_no_dead_letter(
    harness: GatewayHarness, people: OrganizationUsers
) -> None:
    trigger = {**TRIGGER, "nodeId": "queue-trigger"}
    workflow_id = await people.owner.create(nodes=[trigger, STEP], connections=[EDGE])
    url = f"{WORKFLOWS}/{workflow_id}"
    await people.owner.api.put(f"{url}/visibility", json={"isPublic": True})
    execution_id = await execute_workflow(people.colleague, workflow_id, pinned={"start": {"mine": 1}})
    run = await claim_run(harness, execution_id)
    await run.write(end=RunStatus.FAILED, error=RunError("node-error", "It broke", "step", 1))
    letters = await people.admin.api.get(f"{url}/dead-letters")
    assert (letters.status_code, letters.json()["count"]) == (200, 0)
    resumed = await people.colleague.api.post(f"{EXECUTIONS}/{execution_id}/resume")
    assert (await read_execution(harness, resumed.json()["executionId"])).is_private


async def test_the_history_of_a_deleted_workflow_stays_visible_to_its_owner_and_callers(
    harness: GatewayHarness, people: OrganizationUsers
) -> None:
    workflow_id = await people.owner.create(**GRAPH)
    await share(harness, workflow_id, people.colleague)
    of_owner, of_colleague = (
        await execute_workflow(people.owner, workflow_id),
        await execute_workflow(people.colleague, workflow_id),
    )
    await change_workflow(harness, workflow_id, deleted_at=NOW)
    assert set(await list_ids(people.owner)) == {of_owner, of_colleague}
    assert set(await list_ids(people.admin)) == {of_owner, of_colleague}
    assert await list_ids(people.colleague) == [of_colleague]
    assert_refused(await people.colleague.api.get(f"{EXECUTIONS}/{of_owner}"), 404, "not-found")


# ── progress ────────────────────────────────────────────────────────────────────────────────────────────────


async def measure_poll(poll: Awaitable[dict[str, Any]]) -> tuple[dict[str, Any], float]:
    """Return the result of a poll, and its duration in seconds."""
    began = time.monotonic()
    body = await poll
    return body, time.monotonic() - began


async def spin_until(condition: Callable[[], bool]) -> None:
    while not condition():  # noqa: ASYNC110 - nothing signals the change
        await asyncio.sleep(0.001)


async def test_a_poll_is_answered_as_soon_as_the_run_has_ended(
    harness: GatewayHarness, people: OrganizationUsers
) -> None:
    execution_id = await execute_workflow(people.owner, await people.owner.create(**GRAPH))
    poll = asyncio.create_task(measure_poll(get_json(people.owner, f"/{execution_id}/progress")))
    run = await claim_run(harness, execution_id)
    await spin_until(lambda: harness.gateway.waiting.polls.taken > 0)
    began = time.monotonic()
    await run.complete()
    body, _ = await poll
    assert time.monotonic() - began < PROMPT_SECONDS
    assert body == {
        "executionId": execution_id,
        "status": "completed",
        "progress": 100,
        "completedNodes": 2,
        "totalNodes": 2,
        "outputs": {"start": {"body": {"x": 1}}, "step": {"body": {"x": 1}, "a": 1}},
        "error": None,
    }
    again, seconds = await measure_poll(get_json(people.owner, f"/{execution_id}/progress"))
    assert (again, seconds < PROMPT_SECONDS) == (body, True)


async def test_many_polls_of_one_run_are_all_answered(
    harness: GatewayHarness, people: OrganizationUsers
) -> None:
    execution_id = await execute_workflow(people.owner, await people.owner.create(**GRAPH))
    run = await claim_run(harness, execution_id)
    polls = [
        asyncio.create_task(measure_poll(get_json(people.owner, f"/{execution_id}/progress")))
        for _ in range(20)
    ]
    await spin_until(lambda: harness.gateway.waiting.polls.taken >= 20)
    await run.write(run.span("start", output=1))  # not the end: they watch and wait on
    await run.complete()
    answers = await asyncio.gather(*polls)
    assert [body["status"] for body, _ in answers] == ["completed"] * 20
    assert max(seconds for _, seconds in answers) < PROMPT_SECONDS


async def test_polls_are_read_again_after_their_first_second_only(
    harness: GatewayHarness, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(long_poll, "LOOK_SECONDS", LOOK_SECONDS)
    polls = long_poll.ExecutionPollHub(harness.gateway.store, harness.gateway.broker)
    with polls.waiter("exec_1") as waiter:
        polls.wake_overdue(waiter.begun_at + LOOK_SECONDS / 2)
        assert not waiter.changed.is_set()
        polls.wake_overdue(waiter.begun_at + LOOK_SECONDS)
        assert waiter.changed.is_set()


@pytest.mark.usefixtures("looks")
async def test_a_notification_that_is_lost_costs_a_look(
    harness: GatewayHarness, people: OrganizationUsers
) -> None:
    async with run_second_gateway(harness, await connect_broker(None)) as there:
        owner = await as_client_of(people.owner, there)
        execution_id = await execute_workflow(owner, await owner.create(**GRAPH))
        poll = asyncio.create_task(measure_poll(get_json(owner, f"/{execution_id}/progress")))
        await (await claim_run(harness, execution_id)).complete(is_told=False)
        body, seconds = await poll
    assert (body["status"], seconds < PROMPT_SECONDS) == ("completed", True)


async def test_a_seen_end_ends_polls_despite_a_lost_notification(
    harness: GatewayHarness, people: OrganizationUsers
) -> None:
    workflow_id = await people.owner.create(**GRAPH)
    ended = []
    for _ in range(2):
        ended.append(await execute_workflow(people.owner, workflow_id))
        await (await claim_run(harness, ended[-1])).complete(is_told=False)
    polled, streamed = ended
    await get_json(people.owner, f"/{polled}/progress?wait=0")
    assert (await open_stream(harness, people.owner, streamed).rest())[-1].id == "end"
    for execution_id in ended:
        body, seconds = await measure_poll(get_json(people.owner, f"/{execution_id}/progress"))
        assert (body["status"], seconds < PROMPT_SECONDS) == ("completed", True)


async def test_a_poll_that_times_out_shows_the_progress_of_the_run(
    harness: GatewayHarness, people: OrganizationUsers
) -> None:
    execution_id = await execute_workflow(people.owner, await people.owner.create(**GRAPH))
    run = await claim_run(harness, execution_id)
    await run.write(run.span("start", output=1))
    body, seconds = await measure_poll(get_json(people.owner, f"/{execution_id}/progress?wait=1"))
    assert (body["status"], body["progress"], body["outputs"]) == ("running", 50, {})
    assert 0.9 < seconds < PROMPT_SECONDS
    body, seconds = await measure_poll(get_json(people.owner, f"/{execution_id}/progress?wait=0"))
    assert (body["completedNodes"], seconds < PROMPT_SECONDS) == (1, True)


@pytest.mark.parametrize("wait", ["31", "-1", "1.5", "x"])
async def test_wait_is_a_whole_number_of_seconds_up_to_thirty(people: OrganizationUsers, wait: str) -> None:
    assert_refused(
        await people.owner.api.get(f"{EXECUTIONS}/exec_1/progress?wait={wait}"), 400, "invalid-query"
    )


@asynccontextmanager
async def run_second_gateway(harness: GatewayHarness, broker: Broker) -> AsyncIterator[GatewayHarness]:
    """Run another gateway on the same database, which has a broker of its own."""
    here = harness.gateway
    async with AsyncExitStack() as stack:
        stack.push_async_callback(broker.close)
        app = create_app(lambda: state.assemble_state(here.settings, here.database, here.store, broker))
        await stack.enter_async_context(app.router.lifespan_context(app))
        yield GatewayHarness(app, app.state.gateway, stack)


async def as_client_of(person: UserClient, harness: GatewayHarness) -> UserClient:
    """Return a person as a client of another gateway."""
    return UserClient(person.user, await harness.client(person.key), person.key)


@pytest.mark.usefixtures("looks")
async def test_with_the_broker_away_runs_are_taken_in_and_polls_answered_by_looking(
    harness: GatewayHarness, people: OrganizationUsers, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(redis_broker, "LISTEN_SECONDS", 0.01)
    workflow_id = await people.owner.create(**GRAPH)
    async with run_second_gateway(harness, await connect_broker("redis://127.0.0.1:1")) as alone:
        owner = await as_client_of(people.owner, alone)
        execution_id = await execute_workflow(owner, workflow_id)
        poll = asyncio.create_task(measure_poll(get_json(owner, f"/{execution_id}/progress")))
        await (await claim_run(harness, execution_id)).complete()
        body, seconds = await poll
        assert (body["status"], seconds < PROMPT_SECONDS) == ("completed", True)
        response = await owner.api.post(f"{EXECUTIONS}/{await execute_workflow(owner, workflow_id)}/cancel")
        assert response.json()["status"] == "cancelled"


async def test_a_run_taken_in_at_one_gateway_is_followed_at_another(
    harness: GatewayHarness, people: OrganizationUsers, redis_server: RedisServer
) -> None:
    workflow_id = await people.owner.create(**GRAPH)
    async with AsyncExitStack() as stack:
        one, other = [
            await stack.enter_async_context(
                run_second_gateway(harness, await connect_broker(redis_server.url))
            )
            for _ in range(2)
        ]
        worker = await connect_broker(redis_server.url)
        stack.push_async_callback(worker.close)
        execution_id = await execute_workflow(await as_client_of(people.owner, one), workflow_id)
        persons = [await as_client_of(people.owner, gateway) for gateway in (one, other)]
        polls = [asyncio.create_task(get_json(person, f"/{execution_id}/progress")) for person in persons]
        run = await claim_run(harness, execution_id, broker=worker)
        await spin_until(lambda: other.gateway.waiting.is_watched(execution_id))
        await spin_until(lambda: one.gateway.waiting.polls.taken > 0)
        began = time.monotonic()
        await run.complete()
        assert [body["status"] for body in await asyncio.gather(*polls)] == ["completed"] * 2
        assert time.monotonic() - began < PROMPT_SECONDS


async def test_at_the_end_of_the_process_polls_are_answered_at_once(
    harness: GatewayHarness, people: OrganizationUsers
) -> None:
    execution_id = await execute_workflow(people.owner, await people.owner.create(**GRAPH))
    async with run_second_gateway(harness, await connect_broker(None)) as ending:
        owner = await as_client_of(people.owner, ending)
        poll = asyncio.create_task(measure_poll(get_json(owner, f"/{execution_id}/progress")))
        await spin_until(lambda: ending.gateway.waiting.polls.taken > 0)
        ending.gateway.waiting.release()
        body, seconds = await poll
        assert (body["status"], seconds < PROMPT_SECONDS) == ("pending", True)
        body, seconds = await measure_poll(get_json(owner, f"/{execution_id}/progress"))
        assert (body["status"], seconds < PROMPT_SECONDS) == ("pending", True)


async def test_too_many_polls_and_acceptances_are_told_to_come_again(
    harness: GatewayHarness, people: OrganizationUsers, monkeypatch: pytest.MonkeyPatch
) -> None:
    workflow_id = await people.owner.create(**GRAPH)
    execution_id = await execute_workflow(people.owner, workflow_id)
    monkeypatch.setattr(harness.gateway.waiting.polls, "limit", 0)
    monkeypatch.setattr(limits, "ACCEPTANCES_WAITING", 0)
    for response in (
        await people.owner.api.get(f"{EXECUTIONS}/{execution_id}/progress"),
        await people.owner.api.post(f"{WORKFLOWS}/{workflow_id}/execute"),
    ):
        assert_refused(response, 503, "not-ready")
        assert int(response.headers["Retry-After"]) > 0
    assert (await get_json(people.owner, f"/{execution_id}/progress?wait=0"))["status"] == "pending"


# ── events ──────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class StreamEvent:
    name: str
    data: Any
    id: str | None = None


class EventStreamClient:
    """A client of the event stream that reads while it is written."""

    def __init__(self, app: Starlette, path: str, headers: dict[str, str]) -> None:
        self._hung_up = asyncio.Event()
        self._chunks: asyncio.Queue[bytes] = asyncio.Queue()
        self._unread = b""
        self.status = 0
        self.headers: dict[str, str] = {}
        self.raw = b""
        scope = {
            "type": "http",
            "method": "GET",
            "path": path.partition("?")[0],
            "query_string": path.partition("?")[2].encode(),
            "headers": [(name.lower().encode(), value.encode()) for name, value in headers.items()],
            "client": ("10.0.0.1", 1234),
        }
        self.ended = asyncio.create_task(app(scope, self._receive, self._send))

    async def _receive(self) -> dict[str, Any]:
        await self._hung_up.wait()
        return {"type": "http.disconnect"}

    async def _send(self, message: Any) -> None:  # noqa: ANN401 - ASGI's message
        if message["type"] == "http.response.start":
            self.status = message["status"]
            self.headers = {name.decode(): value.decode() for name, value in message["headers"]}
        self.raw += message.get("body", b"")
        self._chunks.put_nowait(message.get("body", b""))

    async def next(self) -> StreamEvent:
        """Return the next event; comments are passed over."""
        while True:
            head, end, rest = self._unread.partition(b"\n\n")
            if not end:
                await spin_until(lambda: not self._chunks.empty() or self.ended.done())
                assert not self._chunks.empty(), f"The stream has ended: {self.ended}"
                self._unread += self._chunks.get_nowait()
                continue
            self._unread = rest
            fields = dict(
                line.split(": ", 1) for line in head.decode().split("\n") if not line.startswith(":")
            )
            if fields:
                return StreamEvent(fields["event"], json.loads(fields["data"]), fields.get("id"))

    async def rest(self) -> list[StreamEvent]:
        """Return everything up to the end of the stream."""
        await asyncio.wait_for(self.ended, PATIENCE_SECONDS)
        events = []
        while b"\n\n" in self._unread or not self._chunks.empty():
            if b"\n\n" not in self._unread:
                self._unread += self._chunks.get_nowait()
                continue
            events.append(await self.next())
        return events

    async def hang_up(self) -> None:
        self._hung_up.set()
        await asyncio.wait_for(self.ended, PATIENCE_SECONDS)


def open_stream(
    harness: GatewayHarness, person: UserClient, execution_id: str, last: str | None = None
) -> EventStreamClient:
    headers = {"X-API-Key": person.key} | ({"Last-Event-ID": last} if last is not None else {})
    return EventStreamClient(harness.app, f"{EXECUTIONS}/{execution_id}/events", headers)


async def test_live_events_report_commits_in_order_until_the_end(
    harness: GatewayHarness, people: OrganizationUsers
) -> None:
    execution_id = await execute_workflow(people.owner, await people.owner.create(**GRAPH))
    stream = open_stream(harness, people.owner, execution_id)
    first = await stream.next()
    assert (first.name, first.id, first.data["status"]) == ("execution", None, "pending")
    assert (stream.status, stream.headers["content-type"]) == (200, "text/event-stream; charset=utf-8")
    run = await claim_run(harness, execution_id)
    began = time.monotonic()
    await run.write(run.span("start", output={"a": "line\nbreak"}), run.line("info", "hello"))
    events = [await stream.next() for _ in range(3)]
    assert time.monotonic() - began < PROMPT_SECONDS
    span, line = [event for event in events if event.id is not None]
    assert [(event.name, event.id) for event in (span, line)] == [("span", "1"), ("log", "2")]
    assert span.data["outputData"] == {"a": "line\nbreak"}
    assert set(span.data) == SPAN
    assert line.data["message"] == "hello"
    [head] = [event for event in events if event.id is None]
    assert (head.name, head.data["status"], head.data["progress"]) == ("execution", "running", 50)
    run.percent = 75
    await run.write()
    moved = await stream.next()
    assert (moved.name, moved.id, moved.data["progress"]) == ("execution", None, 75)
    await run.write(run.span("step", output=1), end=RunStatus.COMPLETED)
    last, end = await stream.rest()
    assert (last.name, last.id, last.data["nodeId"]) == ("span", "3", "step")
    assert (end.name, end.id, end.data["status"], end.data["progress"]) == (
        "execution",
        "end",
        "completed",
        100,
    )


async def test_attempts_of_a_node_are_listed_and_told_as_spans(
    harness: GatewayHarness, people: OrganizationUsers, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(live_events, "EVENTS_AT_ONCE", 2)
    execution_id = await execute_workflow(people.owner, await people.owner.create(**GRAPH))
    run = await claim_run(harness, execution_id)
    later = NOW + timedelta(seconds=5)
    cause = FailureCause("http-503", "It was away", "step", "GET", "https://example.com")
    error = RunError("http-503", "It was away", "step", 1, cause)
    await run.write(
        run.span("start", output=1),
        run.attempt("step", 1, ended_at=NOW, next_attempt_at=later, error=error),
        run.span("step", SpanStatus.RETRYING, wake_at=later, error=error),
    )
    (retrying,) = (await get_json(people.owner, f"/{execution_id}/spans?node_id=step&status=retrying"))[
        "spans"
    ]
    assert (retrying["kind"], retrying["nextAttemptAt"]) == ("node", "2026-01-01T00:00:05.000Z")
    await run.write(
        run.attempt("step", 2, SpanStatus.COMPLETED, ended_at=later),
        run.span("step", output=2, attempt=2),
        end=RunStatus.COMPLETED,
    )

    listed = await get_json(people.owner, f"/{execution_id}/spans")
    assert listed["count"] == 4
    spans = listed["spans"]
    assert all(set(span) == SPAN for span in spans)
    assert [(span["nodeId"], span["kind"], span["attempt"], span["status"]) for span in spans] == [
        ("start", "node", 1, "completed"),
        ("step", "attempt", 1, "failed"),
        ("step", "attempt", 2, "completed"),
        ("step", "node", 2, "completed"),
    ]
    first = spans[1]
    assert (first["startedAt"], first["endedAt"], first["nextAttemptAt"]) == (
        "2026-01-01T00:00:00.000Z", "2026-01-01T00:00:00.000Z", "2026-01-01T00:00:05.000Z",
    )  # fmt: skip
    assert first["error"]["cause"]["url"] == "https://example.com"
    pages = [await get_json(people.owner, f"/{execution_id}/spans?limit=1&offset={n}") for n in range(4)]
    assert [page["spans"][0] for page in pages] == spans
    only = await get_json(people.owner, f"/{execution_id}/spans?node_id=step&status=failed")
    assert (only["count"], only["spans"]) == (1, [first])

    events = await open_stream(harness, people.owner, execution_id).rest()
    assert [event.data for event in events if event.name == "span"] == spans
    shown = await get_json(people.owner, f"/{execution_id}")
    assert shown["outputs"] == {"start": 1, "step": 2}


async def test_a_log_is_followed_to_the_end_of_its_run(
    harness: GatewayHarness, people: OrganizationUsers
) -> None:
    execution_id = await execute_workflow(people.owner, await people.owner.create(**GRAPH))
    run = await claim_run(harness, execution_id)
    await run.write(run.span("start", SpanStatus.RUNNING), run.line("info", "one"), run.line("debug", "two"))
    headers = {"X-API-Key": people.owner.key, "Accept": "text/event-stream"}
    followed = EventStreamClient(harness.app, f"{EXECUTIONS}/{execution_id}/logs", headers)
    events = [await followed.next() for _ in range(2)]
    assert [(event.name, event.data["message"]) for event in events] == [("log", "one"), ("log", "two")]
    await run.write(run.span("start"), run.line("info", "three"), end=RunStatus.COMPLETED)
    three, end = await followed.rest()
    assert three.data["message"] == "three"
    assert (end.name, end.id, end.data["status"]) == ("execution", "end", "completed")
    again = EventStreamClient(
        harness.app, f"{EXECUTIONS}/{execution_id}/logs", headers | {"Last-Event-ID": str(events[0].id)}
    )
    assert [event.data.get("message") for event in await again.rest()] == ["two", "three", None]
    path = f"{EXECUTIONS}/{execution_id}/logs?follow=true"
    text = (await people.owner.api.get(f"{path}&level=debug")).text
    assert (text.count("event: log"), text.count("two"), text.count("id: end")) == (1, 1, 1)
    assert (await people.owner.api.get(path, headers={"Last-Event-ID": "end"})).status_code == 204


@pytest.mark.every_database
async def test_steps_of_agents_are_listed_and_followed_to_the_end_of_their_run(
    harness: GatewayHarness, people: OrganizationUsers, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(live_events, "EVENTS_AT_ONCE", 2)
    execution_id = await execute_workflow(people.owner, await people.owner.create(**GRAPH))
    run = await claim_run(harness, execution_id)
    asked = run.step("step", 0, StepStatus.STARTED)
    await run.write(run.span("step", SpanStatus.RUNNING), asked, run.line("info", "no step"))
    path = f"{EXECUTIONS}/{execution_id}/steps"
    headers = {"X-API-Key": people.owner.key, "Accept": "text/event-stream"}
    followed = EventStreamClient(harness.app, path, headers)
    first = await followed.next()
    assert (first.name, first.id, first.data["status"]) == ("step", str(asked.sequence), "started")
    answer = json.dumps({"text": "<b>ä", "finishReason": "tool-calls"}).encode()
    await run.write(
        run.step("step", 0, StepStatus.COMPLETED, ended_at=NOW, result=answer),
        run.step("step", 1, StepStatus.STARTED, arguments=b'{"city":"Oslo"}', effect="read"),
        run.step("other", 0, StepStatus.STARTED),
    )
    answered, called, other = [await followed.next() for _ in range(3)]
    assert (answered.data["number"], answered.data["result"]["text"]) == (0, "<b>ä")
    assert (called.data["kind"], called.data["arguments"]) == ("tool", {"city": "Oslo"})
    assert other.data["nodeId"] == "other"
    reconnected = EventStreamClient(harness.app, path, headers | {"Last-Event-ID": str(answered.id)})
    assert [(await reconnected.next()).data for _ in range(2)] == [called.data, other.data]
    last = run.step("step", 1, StepStatus.COMPLETED, ended_at=NOW, result=b'"cold"')
    await run.write(last, run.span("step"), end=RunStatus.COMPLETED)
    for stream in (followed, reconnected):
        done, end = await stream.rest()
        assert (done.id, done.data["result"]) == (str(last.sequence), "cold")
        assert (end.name, end.id, end.data["status"]) == ("execution", "end", "completed")
    assert (await people.owner.api.get(path, headers=headers | {"Last-Event-ID": "end"})).status_code == 204
    listed = await get_json(people.owner, f"/{execution_id}/steps?node_id=step&iteration=&limit=1&offset=1")
    assert (listed["count"], listed["steps"]) == (2, [done.data])
    text = (await people.owner.api.get(f"{path}?follow=true&node_id=other")).text
    assert (text.count("event: step"), text.count("id: end")) == (1, 1)


async def test_a_reconnecting_client_continues_after_its_last_event(
    harness: GatewayHarness, people: OrganizationUsers
) -> None:
    execution_id = await execute_workflow(people.owner, await people.owner.create(**GRAPH))
    run = await claim_run(harness, execution_id)
    await run.write(run.span("start", SpanStatus.RUNNING), run.line("info", "one"), run.line("info", "two"))
    seen = open_stream(harness, people.owner, execution_id)
    assert [(await seen.next()).id for _ in range(4)] == [None, "1", "2", "3"]
    await seen.hang_up()
    await run.write(run.span("start", output=1), run.line("info", "three"), end=RunStatus.FAILED)
    events = await open_stream(harness, people.owner, execution_id, "2").rest()
    assert [(event.name, event.id) for event in events] == [
        ("log", "3"), ("span", "4"), ("log", "5"), ("execution", "end"),
    ]  # fmt: skip
    ended = open_stream(harness, people.owner, execution_id, "end")
    assert await ended.rest() == []
    assert ended.status == 204


async def test_a_long_history_is_told_in_order_and_whole(
    harness: GatewayHarness, people: OrganizationUsers, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(live_events, "EVENTS_AT_ONCE", 3)
    execution_id = await execute_workflow(people.owner, await people.owner.create(**GRAPH))
    run = await claim_run(harness, execution_id)
    spans_first = [run.span(f"n{number}", output=number) for number in range(4)]
    lines_then = [run.line("info", str(number)) for number in range(7)]
    await run.write(*spans_first, *lines_then, run.span("last", output=1), end=RunStatus.COMPLETED)
    events = await open_stream(harness, people.owner, execution_id).rest()
    assert [event.id for event in events] == [*map(str, range(1, 13)), "end"]


async def test_no_event_is_missed_while_the_run_goes_on_writing(
    harness: GatewayHarness, people: OrganizationUsers
) -> None:
    execution_id = await execute_workflow(people.owner, await people.owner.create(**GRAPH))
    stream = open_stream(harness, people.owner, execution_id)
    run = await claim_run(harness, execution_id)
    for number in range(30):
        await run.write(run.span(f"n{number}", output=number), run.line("info", str(number)))
    await run.write(end=RunStatus.COMPLETED)
    events = await stream.rest()
    assert [event.id for event in events if event.id is not None] == [*map(str, range(1, 61)), "end"]


@pytest.mark.parametrize("last", ["x", "-1", "1.5", "99999999999"])
async def test_an_event_id_that_is_none_is_400(people: OrganizationUsers, last: str) -> None:
    execution_id = await execute_workflow(people.owner, await people.owner.create(**GRAPH))
    response = await people.owner.api.get(
        f"{EXECUTIONS}/{execution_id}/events", headers={"Last-Event-ID": last}
    )
    assert_refused(response, 400, "invalid-last-event-id")


async def test_an_event_id_beyond_all_is_no_error(harness: GatewayHarness, people: OrganizationUsers) -> None:
    execution_id = await execute_workflow(people.owner, await people.owner.create(**GRAPH))
    await people.owner.api.post(f"{EXECUTIONS}/{execution_id}/cancel")
    events = await open_stream(harness, people.owner, execution_id, "9999999999").rest()
    assert [(event.name, event.data["status"]) for event in events] == [("execution", "cancelled")]


async def test_streams_are_bounded_and_a_client_that_leaves_makes_room(
    harness: GatewayHarness, people: OrganizationUsers, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(harness.gateway.live_events.streams, "limit", 1)
    execution_id = await execute_workflow(people.owner, await people.owner.create(**GRAPH))
    stream = open_stream(harness, people.owner, execution_id)
    await stream.next()
    response = await people.owner.api.get(f"{EXECUTIONS}/{execution_id}/events")
    assert_refused(response, 503, "not-ready")
    await stream.hang_up()
    again = open_stream(harness, people.owner, execution_id)
    assert (await again.next()).name == "execution"
    await again.hang_up()
    assert harness.gateway.live_events.streams.taken == 0


SHARED: Mapping[str, tuple[str, Callable[[GatewayState], SharedAllowance]]] = {
    "events": ("GET /api/v1/executions/{id}/events", lambda gateway: gateway.live_events.streams),
    "hints": ("GET /live?topics=executions", lambda gateway: gateway.live_hints.streams),
    "progress": ("GET /api/v1/executions/{id}/progress?wait=30", lambda gateway: gateway.waiting.polls),
    "tasks": ("POST /api/v1/tasks/claim", lambda gateway: gateway.task_hub._polls.places),  # noqa: SLF001 - loaded late
}
"""Requests that wait in a place that the clients of a gateway share."""


@pytest.mark.parametrize("kind", SHARED)
async def test_a_client_at_its_most_leaves_a_place_to_other_organizations(
    harness: GatewayHarness, people: OrganizationUsers, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    (method, _, path), find_allowance = SHARED[kind][0].partition(" "), SHARED[kind][1]
    allowance = find_allowance(harness.gateway)
    monkeypatch.setattr(allowance, "limit", 2)

    async def open_request(person: UserClient) -> asyncio.Task[httpx2.Response]:
        execution_id = await execute_workflow(person, await person.create(**GRAPH))
        body = TaskWorkerClient(person.api).poll(wait=30) if path.endswith("claim") else None
        url = path.format(id=execution_id)
        return asyncio.create_task(person.api.request(method, url, json=body, timeout=PATIENCE_SECONDS))

    greedy = [await open_request(people.owner) for _ in range(2)]
    async with asyncio.timeout(PATIENCE_SECONDS):
        await spin_until(lambda: allowance.taken == 2)
    assert_refused(await (await open_request(people.owner)), 503, "not-ready")
    other = await open_request(people.stranger)
    done, _ = await asyncio.wait(greedy, timeout=PATIENCE_SECONDS, return_when=asyncio.FIRST_COMPLETED)
    assert [task.result().status_code < 300 for task in done] == [True], "one ends early, without an error"
    assert (allowance.taken, other.done()) == (2, False)
    for task in (*greedy, other):
        task.cancel()
    await asyncio.gather(*greedy, other, return_exceptions=True)
    assert allowance.taken == 0


@pytest.mark.usefixtures("looks")
async def test_a_quiet_stream_is_kept_alive(
    harness: GatewayHarness, people: OrganizationUsers, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(live_events, "KEEP_ALIVE_SECONDS", 0.05)
    execution_id = await execute_workflow(people.owner, await people.owner.create(**GRAPH))
    async with run_second_gateway(harness, await connect_broker(None)) as there:
        stream = open_stream(there, people.owner, execution_id)
        await spin_until(lambda: stream.raw.endswith(b": keep-alive\n\n"))
        await stream.hang_up()


@pytest.mark.usefixtures("looks")
async def test_a_revoked_key_ends_its_streams(harness: GatewayHarness, people: OrganizationUsers) -> None:
    execution_id = await execute_workflow(people.owner, await people.owner.create(**GRAPH))
    key = (await people.owner.api.post("/api/v1/auth/keys", json={"name": "short-lived"})).json()
    async with run_second_gateway(harness, await connect_broker(None)) as there:
        stream = open_stream(there, UserClient(people.owner.user, people.owner.api, key["key"]), execution_id)
        await stream.next()
        await people.owner.api.delete(f"/api/v1/auth/keys/{key['id']}")
        assert await stream.rest() == []


async def test_the_head_of_a_stream_can_be_asked_for_alone(people: OrganizationUsers) -> None:
    execution_id = await execute_workflow(people.owner, await people.owner.create(**GRAPH))
    response = await people.owner.api.head(f"{EXECUTIONS}/{execution_id}/events")
    assert (response.status_code, response.headers["content-type"]) == (
        200,
        "text/event-stream; charset=utf-8",
    )


# ── stop and cancel ─────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(("wish", "status"), [("stop", "stopped"), ("cancel", "cancelled")])
async def test_pending_runs_end_at_once_on_request_and_keep_their_status(
    people: OrganizationUsers, wish: str, status: str
) -> None:
    execution_id = await execute_workflow(people.owner, await people.owner.create(**GRAPH))
    poll = asyncio.create_task(measure_poll(get_json(people.owner, f"/{execution_id}/progress")))
    for asked in (wish, "cancel", "stop"):
        response = await people.owner.api.post(f"{EXECUTIONS}/{execution_id}/{asked}")
        assert (response.status_code, response.json()) == (
            200,
            {"executionId": execution_id, "status": status},
        )
    body, seconds = await poll
    assert (body["status"], seconds < PROMPT_SECONDS) == (status, True)


async def test_the_worker_that_holds_a_run_is_told_to_end_it(
    harness: GatewayHarness, people: OrganizationUsers
) -> None:
    execution_id = await execute_workflow(people.owner, await people.owner.create(**GRAPH))
    run = await claim_run(harness, execution_id)
    heard: list[Notification] = []
    await harness.gateway.broker.listen(heard.append)
    response = await people.owner.api.post(f"{EXECUTIONS}/{execution_id}/cancel")
    assert (response.status_code, response.json()["status"]) == (200, "running")
    await spin_until(lambda: DirectMessage({"execution_id": execution_id, "request": "cancel"}) in heard)
    await people.owner.api.post(f"{EXECUTIONS}/{execution_id}/stop")
    assert (await read_execution(harness, execution_id)).request == "cancel"  # the stronger of the two
    await run.write(end=RunStatus.CANCELLED)
    assert (await get_json(people.owner, f"/{execution_id}"))["status"] == "cancelled"


# ── resume ──────────────────────────────────────────────────────────────────────────────────────────────────


async def create_failed_run(harness: GatewayHarness, person: UserClient, workflow_id: str) -> str:
    """Return an execution that has failed at its second node."""
    execution_id = await execute_workflow(person, workflow_id, triggerInputs={"x": 1})
    run = await claim_run(harness, execution_id)
    error = RunError("node-error", "It broke", "step", 1)
    await run.write(
        run.span("start", output={"body": {"x": 1}}, hashes=bytes(128)),
        run.span("away", SpanStatus.SKIPPED),
        run.attempt("handled", 1, error=error),
        run.attempt("handled", 2, error=error),
        run.span("handled", SpanStatus.FAILED, port="error", output={"error": {}}, error=error, attempt=2),
        run.attempt("step", 1, error=error),
        run.span("step", SpanStatus.FAILED, error=error),
        run.span("cut", SpanStatus.CANCELLED),
        run.span("sent", SpanStatus.RUNNING, resolved_config=b'{"body":1}'),
        run.line("info", "stays behind"),
        end=RunStatus.FAILED,
        error=error,
    )
    return execution_id


async def read_spans(harness: GatewayHarness, execution_id: str) -> dict[str, dict[str, Any]]:
    statement = select(SpanRow).where(col(SpanRow.execution_id) == execution_id)
    async with harness.gateway.database.read() as connection:
        return {found["node_id"]: dict(found) for found in (await connection.execute(statement)).mappings()}


async def test_a_resumed_run_starts_from_the_committed_results_of_the_failed_one(
    harness: GatewayHarness, people: OrganizationUsers
) -> None:
    failed_id = await create_failed_run(
        harness, people.owner, await people.owner.create(settings={"timeout": 60}, **GRAPH)
    )
    meant_for_replay = {"definition": "current", "from": ["a"]}
    refused = await people.owner.api.post(f"{EXECUTIONS}/{failed_id}/resume", json=meant_for_replay)
    assert_refused(refused, 422, "validation-failed")
    assert [one["path"] for one in refused.json()["error"]["details"]] == ["definition", "from"]
    assert "/replay" in refused.text
    response = await people.owner.api.post(f"{EXECUTIONS}/{failed_id}/resume", json={})
    assert response.status_code == 201
    resumed_id = response.json()["executionId"]
    assert response.json() == {"executionId": resumed_id, "resumedFrom": failed_id}
    assert response.headers["Location"] == f"{EXECUTIONS}/{resumed_id}"
    before, after = await read_execution(harness, failed_id), await read_execution(harness, resumed_id)
    assert (after.status, after.is_fresh, after.has_journal, after.attempt, after.token) == (
        "pending",
        True,
        True,
        0,
        0,
    )
    assert (after.key_id, after.resumed_from, after.error, after.ended_at) == (
        failed_id,
        failed_id,
        None,
        None,
    )
    for name in (
        "shard",
        "organization_id",
        "workflow_id",
        "definition_hash",
        "queue_turn",
        "timeout_microseconds",
        "total_nodes",
        "trigger_type",
        "target",
    ):
        assert getattr(after, name) == getattr(before, name)
    assert after.created_at > before.created_at
    old, new = await read_spans(harness, failed_id), await read_spans(harness, resumed_id)
    assert set(new) == {"start", "away", "handled", "sent"}
    # A retried node starts again from its first attempt.
    told = (await get_json(people.owner, f"/{resumed_id}/spans?status=failed"))["spans"]
    assert [(span["nodeId"], span["kind"], span["attempt"]) for span in told] == [
        ("handled", "attempt", 1), ("handled", "attempt", 2), ("handled", "node", 2),
    ]  # fmt: skip
    assert (after.completed_nodes, after.progress) == (3, 99 * 3 // after.total_nodes)
    for node_id, span in new.items():
        assert span["id"] != old[node_id]["id"]
        assert span | {"id": 0, "execution_id": 0} == old[node_id] | {"id": 0, "execution_id": 0}
    shown = await get_json(people.owner, f"/{resumed_id}")
    assert (shown["resumedFrom"], shown["trigger"]["data"]) == (failed_id, {"body": {"x": 1}})
    assert (await get_json(people.owner, f"/{resumed_id}/logs"))["count"] == 0
    assert (await get_json(people.owner, f"/{failed_id}"))["status"] == "failed"


async def test_a_run_resumed_twice_keeps_the_first_one_s_id_in_its_keys(
    harness: GatewayHarness, people: OrganizationUsers
) -> None:
    first = await create_failed_run(harness, people.owner, await people.owner.create(**GRAPH))
    second = (await people.owner.api.post(f"{EXECUTIONS}/{first}/resume")).json()["executionId"]
    run = await claim_run(harness, second)
    assert (run.claimed.key_id, run.claimed.has_journal) == (first, True)
    await run.write(end=RunStatus.FAILED, error=RunError("timeout", "Too long"))
    third = (await people.owner.api.post(f"{EXECUTIONS}/{second}/resume")).json()["executionId"]
    stored = await read_execution(harness, third)
    assert (stored.key_id, stored.resumed_from, stored.completed_nodes) == (first, second, 3)


async def test_a_failed_run_is_resumed_once_and_tells_of_the_newest_of_its_line(
    harness: GatewayHarness, people: OrganizationUsers
) -> None:
    first = await create_failed_run(harness, people.owner, await people.owner.create(**GRAPH))
    answers = await asyncio.gather(
        *(person.api.post(f"{EXECUTIONS}/{first}/resume") for person in (people.owner, people.admin) * 2)
    )
    made = {answer.json()["executionId"] for answer in answers if answer.status_code == 201}
    assert len(made) == 1
    (second,) = made
    for answer in answers:
        if answer.status_code != 201:
            assert_refused(answer, 409, "already-resumed")
            assert answer.json()["error"]["details"][0]["executionId"] == second
    run = await claim_run(harness, second)
    await run.write(end=RunStatus.FAILED, error=RunError("timeout", "Too long"))
    third = (await people.owner.api.post(f"{EXECUTIONS}/{second}/resume")).json()["executionId"]
    for execution_id in (first, second):
        again = await people.owner.api.post(f"{EXECUTIONS}/{execution_id}/resume")
        assert_refused(again, 409, "already-resumed")
        assert again.json()["error"]["details"][0]["executionId"] == third


@pytest.mark.every_database
async def test_a_repeated_request_to_resume_gets_the_first_answer(
    harness: GatewayHarness, people: OrganizationUsers
) -> None:
    workflow_id = await people.owner.create(**GRAPH)
    first, other = [await create_failed_run(harness, people.owner, workflow_id) for _ in range(2)]
    once = {"Idempotency-Key": "resume-once"}
    answers = await asyncio.gather(
        *(people.owner.api.post(f"{EXECUTIONS}/{first}/resume", headers=once) for _ in range(3))
    )
    assert {answer.status_code for answer in answers} == {201}
    assert len({answer.text for answer in answers}) == 1
    assert sum("Idempotent-Replayed" not in answer.headers for answer in answers) == 1
    without = await people.owner.api.post(f"{EXECUTIONS}/{first}/resume")
    assert_refused(without, 409, "already-resumed")
    elsewhere = await people.owner.api.post(f"{EXECUTIONS}/{other}/resume", headers=once)
    assert (elsewhere.status_code, elsewhere.json()["resumedFrom"]) == (201, other)


@pytest.mark.every_database
async def test_only_a_failed_run_of_an_open_workflow_can_be_resumed(
    harness: GatewayHarness, people: OrganizationUsers
) -> None:
    workflow_id = await people.owner.create(**GRAPH)
    pending = await execute_workflow(people.owner, workflow_id)
    assert_refused(await people.owner.api.post(f"{EXECUTIONS}/{pending}/resume"), 409, "execution-not-failed")
    await people.owner.api.post(f"{EXECUTIONS}/{pending}/stop")
    assert_refused(await people.owner.api.post(f"{EXECUTIONS}/{pending}/resume"), 409, "execution-not-failed")
    failed_id = await create_failed_run(harness, people.owner, workflow_id)
    await change_workflow(harness, workflow_id, status="paused")
    assert_refused(await people.owner.api.post(f"{EXECUTIONS}/{failed_id}/resume"), 409, "workflow-paused")
    await change_workflow(harness, workflow_id, deleted_at=NOW)
    assert_refused(await people.owner.api.post(f"{EXECUTIONS}/{failed_id}/resume"), 409, "workflow-deleted")


# ── with a worker ───────────────────────────────────────────────────────────────────────────────────────────


@asynccontextmanager
async def serve_worker(harness: GatewayHarness) -> AsyncIterator[None]:
    gateway = harness.gateway
    settings = WorkerSettings(
        **gateway.settings.model_dump(include={"data_dir", "database_url", "secret_key"}),
        lease_seconds=5,
        sweep_seconds=60,
    )
    async with run_worker(settings, gateway.store, gateway.broker, gateway.database):
        yield


async def test_a_worker_runs_ingested_and_resumed_executions(
    harness: GatewayHarness, people: OrganizationUsers
) -> None:
    workflow_id = await people.owner.create(**GRAPH)
    failed_id = await create_failed_run(harness, people.owner, workflow_id)
    async with serve_worker(harness):
        execution_id = await execute_workflow(people.owner, workflow_id, triggerInputs={"x": 1})
        body, seconds = await measure_poll(get_json(people.owner, f"/{execution_id}/progress"))
        assert (body["status"], seconds < PROMPT_SECONDS) == ("completed", True)
        assert body["outputs"] == {"start": {"body": {"x": 1}}, "step": {"body": {"x": 1}, "a": 1}}
        resumed_id = (await people.owner.api.post(f"{EXECUTIONS}/{failed_id}/resume")).json()["executionId"]
        resumed = await get_json(people.owner, f"/{resumed_id}/progress")
    assert (resumed["status"], resumed["outputs"]["step"]) == ("completed", {"body": {"x": 1}, "a": 1})
    spans = (await get_json(people.owner, f"/{execution_id}/spans"))["spans"]
    assert [(span["nodeId"], span["status"]) for span in spans] == [
        ("start", "completed"),
        ("step", "completed"),
    ]
    assert spans[1]["inputData"] == spans[0]["outputData"]
