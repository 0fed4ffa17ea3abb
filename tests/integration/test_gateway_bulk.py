"""Bulk operations: executions are canceled, retried and deleted by a filter, with permission, once."""

import asyncio
from datetime import UTC, datetime
from typing import Any

import httpx2
import pytest
from sqlalchemy import func, insert, select, text, update
from sqlalchemy.ext.asyncio import AsyncConnection
from sqlmodel import SQLModel, col

from gateway.executions import bulk_actions
from gateway.http import limits
from journal.blobs.blob_storage import BlobLost, BlobOwner
from models.database import share_transaction
from models.errors import DatabaseUnavailable
from models.execution import Execution, ExecutionData, LogRow, SpanRow
from models.execution_status import ExecutionStatus
from models.workflow import WorkflowShare
from tests.integration.backlogs import BacklogRows, fill
from tests.integration.gateway_harness import (
    GRAPH,
    GatewayHarness,
    OrganizationUsers,
    UserClient,
    assert_refused,
)
from tests.integration.gateway_variants import execute_workflow, run_with_settings

EXECUTIONS = "/api/v1/executions"


async def start_runs(
    harness: GatewayHarness,
    person: UserClient,
    workflow_id: str,
    count: int,
    **columns: Any,  # noqa: ANN401 - columns
) -> list[str]:
    """Start runs as a user, set columns of their rows, and return their ids."""
    ids = [(await execute_workflow(harness, person, workflow_id)).json()["executionId"] for _ in range(count)]
    if columns:
        await change(harness, ids, **columns)
    return ids


async def change(harness: GatewayHarness, execution_ids: list[str], **columns: Any) -> None:  # noqa: ANN401 - columns
    statement = update(Execution).where(col(Execution.id).in_(execution_ids)).values(columns)

    async def work(connection: AsyncConnection) -> None:
        await connection.execute(statement)

    await harness.gateway.database.transaction(work)


FAILED = {"status": "failed", "ended_at": datetime(2026, 1, 1, tzinfo=UTC), "is_fresh": False}
COMPLETED = {**FAILED, "status": "completed"}


async def post_bulk(
    person: UserClient,
    what: str,
    headers: dict[str, str] | None = None,
    **body: Any,  # noqa: ANN401 - any JSON value
) -> httpx2.Response:
    return await person.api.post(f"{EXECUTIONS}/bulk-{what}", json=body, headers=headers)


async def post_bulk_successfully(
    person: UserClient,
    what: str,
    headers: dict[str, str] | None = None,
    **body: Any,  # noqa: ANN401 - any JSON value
) -> dict[str, Any]:
    response = await post_bulk(person, what, headers, **body)
    assert response.status_code == 200, response.text
    answer: dict[str, Any] = response.json()
    return answer


async def read_statuses(harness: GatewayHarness, execution_ids: list[str]) -> list[str]:
    statement = select(col(Execution.id), col(Execution.status))
    async with harness.gateway.database.read() as connection:
        found = {row.id: row.status for row in await connection.execute(statement)}
    return [found.get(execution_id, "gone") for execution_id in execution_ids]


async def count(harness: GatewayHarness, table: type[SQLModel], *conditions: Any) -> int:  # noqa: ANN401 - conditions
    async with harness.gateway.database.read() as connection:
        found = await connection.scalar(select(func.count()).select_from(table).where(*conditions))
    return found or 0


async def share_workflow(harness: GatewayHarness, workflow_id: str, person: UserClient) -> None:
    values = {"workflow_id": workflow_id, "user_id": person.user.id, "shared_at": datetime.now(UTC)}

    async def add(connection: AsyncConnection) -> None:
        await connection.execute(insert(WorkflowShare).values(values))

    await harness.gateway.database.transaction(add)


async def list_actions(people: OrganizationUsers, object_id: str) -> list[str]:
    response = await people.admin.api.get(f"/api/v1/audit?objectId={object_id}")
    return [
        entry["action"] for entry in response.json()["entries"] if entry["action"].startswith("executions.")
    ]


# ── cancel ──────────────────────────────────────────────────────────────────────────────────────────────────


async def test_bulk_cancel_ends_only_runs_in_progress_of_the_workflow(
    harness: GatewayHarness, people: OrganizationUsers
) -> None:
    workflow_id, other_id = [await people.owner.create(**GRAPH) for _ in range(2)]
    live = await start_runs(harness, people.owner, workflow_id, 3)
    ended = await start_runs(harness, people.owner, workflow_id, 1, **COMPLETED)
    others = await start_runs(harness, people.owner, other_id, 1)
    found = {"filter": {"workflowId": workflow_id}}
    assert await post_bulk_successfully(people.owner, "cancel", **found, dryRun=True) == {
        "dryRun": True, "matched": 3, "affected": 0, "remaining": 3, "executionIds": live,
    }  # fmt: skip
    assert await read_statuses(harness, live) == ["pending"] * 3
    assert await list_actions(people, workflow_id) == []
    assert await post_bulk_successfully(people.owner, "cancel", **found) == {
        "dryRun": False, "matched": 3, "affected": 3, "remaining": 0, "executionIds": live,
    }  # fmt: skip
    assert await read_statuses(harness, [*live, *ended, *others]) == ["cancelled"] * 3 + [
        "completed",
        "pending",
    ]
    assert await list_actions(people, workflow_id) == ["executions.cancelled"]
    assert (await post_bulk_successfully(people.owner, "cancel", **found))["matched"] == 0


async def test_a_run_that_somebody_holds_is_asked_to_end_once(
    harness: GatewayHarness, people: OrganizationUsers
) -> None:
    workflow_id = await people.owner.create(**GRAPH)
    (held,) = await start_runs(harness, people.owner, workflow_id, 1)
    lease = {"lease_owner": "worker", "lease_until": datetime(2100, 1, 1, tzinfo=UTC)}
    await change(harness, [held], status="running", **lease)
    assert (await post_bulk_successfully(people.owner, "cancel", filter={}))["affected"] == 1
    assert await read_statuses(harness, [held]) == ["running"]
    assert (await post_bulk_successfully(people.owner, "cancel", filter={}))["matched"] == 0


async def test_bulk_actions_take_the_oldest_first_and_count_the_remaining_ones(
    harness: GatewayHarness, people: OrganizationUsers
) -> None:
    workflow_id = await people.owner.create(**GRAPH)
    user = people.owner.user
    rows = BacklogRows(user.organization_id, workflow_id, 250, shard=user.shard, user_id=user.id)
    await fill(harness.gateway.database, rows)
    answer = await post_bulk_successfully(people.owner, "cancel", filter={}, limit=150)
    assert (answer["matched"], answer["affected"], answer["remaining"]) == (250, 150, 100)
    assert answer["executionIds"] == [
        f"{rows.prefix}_{number}" for number in range(1, limits.BULK_LISTED + 1)
    ]
    assert (await post_bulk_successfully(people.owner, "cancel", filter={}))["affected"] == 100


# ── the filter ──────────────────────────────────────────────────────────────────────────────────────────────


async def test_a_filter_finds_items_that_match_all_its_conditions(
    harness: GatewayHarness, people: OrganizationUsers
) -> None:
    workflow_id = await people.owner.create(**GRAPH)
    moments = [f"2026-01-0{day}T00:00:00Z" for day in (1, 2, 3)]
    ids = await start_runs(harness, people.owner, workflow_id, 3)
    for execution_id, moment, status in zip(ids, moments, ("failed", "completed", "cancelled"), strict=True):
        await change(harness, [execution_id], **{**FAILED, "status": status})

        async def accept_at(connection: AsyncConnection, one: str = execution_id, at: str = moment) -> None:
            values = {"created_at": datetime.fromisoformat(at)}
            await connection.execute(
                update(ExecutionData).where(col(ExecutionData.execution_id) == one).values(values)
            )

        await harness.gateway.database.transaction(accept_at)
    await change(harness, ids[:1], trigger_type="schedule")

    async def found(**wanted: Any) -> list[str]:  # noqa: ANN401 - any JSON value
        answer = await post_bulk_successfully(people.owner, "delete", filter=wanted, dryRun=True)
        listed: list[str] = answer["executionIds"]
        return listed

    assert await found() == ids
    assert await found(status="completed") == ids[1:2]
    assert await found(status=["failed", "cancelled"]) == [ids[0], ids[2]]
    assert await found(triggerType="schedule") == ids[:1]
    assert await found(createdAfter=moments[1]) == ids[1:]
    assert await found(createdBefore=moments[1]) == ids[:1]
    assert await found(createdAfter=moments[1], createdBefore=moments[2], workflowId=workflow_id) == ids[1:2]
    assert await found(workflowId="wf_absent") == []


@pytest.mark.parametrize(
    "body",
    [
        {},
        {"filter": {"workflow_id": "wf_1"}},
        {"filter": {}, "dryrun": True},
        {"filter": {"status": "over"}},
        {"filter": {"status": []}},
        {"filter": {"createdAfter": "2026-01-01T00:00:00"}},
        {"filter": {}, "limit": 1_001},
    ],
)
async def test_invalid_fields_are_refused(people: OrganizationUsers, body: dict[str, Any]) -> None:
    for what in ("cancel", "retry", "delete"):
        assert_refused(await post_bulk(people.owner, what, **body), 422, "validation-failed")


@pytest.mark.every_database
async def test_bulk_actions_affect_only_permitted_executions(
    harness: GatewayHarness, people: OrganizationUsers
) -> None:
    workflow_id = await people.owner.create(**GRAPH)
    (live,) = await start_runs(harness, people.owner, workflow_id, 1)
    (failed,) = await start_runs(harness, people.owner, workflow_id, 1, **FAILED)

    async def matched(person: UserClient) -> list[int]:
        return [
            (await post_bulk_successfully(person, what, filter={}, dryRun=True))["matched"]
            for what in ("cancel", "retry", "delete")
        ]

    assert await matched(people.owner) == await matched(people.admin) == [1, 1, 1]
    assert await matched(people.colleague) == await matched(people.stranger) == [0, 0, 0]
    await share_workflow(harness, workflow_id, people.colleague)
    assert await matched(people.colleague) == [1, 1, 0], "only the owner and admins may delete"
    for what in ("cancel", "retry", "delete"):
        await post_bulk_successfully(people.stranger, what, filter={})
    await post_bulk_successfully(people.colleague, "delete", filter={})
    assert await read_statuses(harness, [live, failed]) == ["pending", "failed"]


# ── retry ───────────────────────────────────────────────────────────────────────────────────────────────────


async def test_failed_runs_are_resumed_from_their_commits_once(
    harness: GatewayHarness, people: OrganizationUsers
) -> None:
    workflow_id = await people.owner.create(**GRAPH)
    failed = await start_runs(harness, people.owner, workflow_id, 2, **FAILED)
    await start_runs(harness, people.owner, workflow_id, 1, **COMPLETED)

    async def settle(connection: AsyncConnection) -> None:
        span = {
            "execution_id": failed[0], "node_id": "start", "iteration": "", "shard": people.owner.user.shard,
            "id": f"span_{failed[0]}", "sequence": 1, "label": "Start", "type": "manual", "status": "completed",
            "attempt": 1, "output": "{}",
        }  # fmt: skip
        await connection.execute(insert(SpanRow).values(span))

    await harness.gateway.database.transaction(settle)
    answer = await post_bulk_successfully(people.owner, "retry", filter={"workflowId": workflow_id})
    assert (answer["matched"], answer["affected"], answer["executionIds"]) == (2, 2, failed)
    for execution_id, new_id in zip(failed, answer["newExecutionIds"], strict=True):
        shown = (await people.owner.api.get(f"{EXECUTIONS}/{new_id}")).json()
        assert (shown["status"], shown["resumedFrom"]) == ("pending", execution_id)
    assert await count(harness, SpanRow, col(SpanRow.execution_id) == answer["newExecutionIds"][0]) == 1
    assert (await post_bulk_successfully(people.owner, "retry", filter={}))["matched"] == 0
    await change(harness, answer["newExecutionIds"][:1], **FAILED)
    again = await post_bulk_successfully(people.owner, "retry", filter={})
    assert again["executionIds"] == answer["newExecutionIds"][:1]
    assert await list_actions(people, workflow_id) == ["executions.retried"]


async def test_failed_tests_of_nodes_are_not_retried(
    harness: GatewayHarness, people: OrganizationUsers
) -> None:
    workflow_id = await people.owner.create(**GRAPH)
    await start_runs(harness, people.owner, workflow_id, 1, **FAILED, trigger_type="test", is_private=True)
    named_so = await start_runs(harness, people.owner, workflow_id, 1, **FAILED, trigger_type="test")
    answer = await post_bulk_successfully(people.owner, "retry", filter={"workflowId": workflow_id})
    assert (answer["matched"], answer["executionIds"]) == (1, named_so)


async def test_a_repeated_request_retries_nothing_twice_and_gets_the_same_answer(
    harness: GatewayHarness, people: OrganizationUsers
) -> None:
    workflow_id = await people.owner.create(**GRAPH)
    await start_runs(harness, people.owner, workflow_id, 3, **FAILED)
    once, body = {"Idempotency-Key": workflow_id}, {"filter": {"workflowId": workflow_id}, "limit": 2}
    answers = await asyncio.gather(*(post_bulk(people.owner, "retry", once, **body) for _ in range(5)))
    assert {answer.text for answer in answers} == {answers[0].text}
    assert sum("Idempotent-Replayed" not in answer.headers for answer in answers) == 1
    is_resumed = col(Execution.resumed_from).is_not(None) & (col(Execution.workflow_id) == workflow_id)
    assert await count(harness, Execution, is_resumed) == 2
    assert await list_actions(people, workflow_id) == ["executions.retried"]
    assert_refused(await post_bulk(people.owner, "retry", once, filter={}), 422, "idempotency-mismatch")
    assert (
        await post_bulk_successfully(people.owner, "retry", {"Idempotency-Key": f"{workflow_id}2"}, **body)
    )["affected"] == 1


async def test_two_simultaneous_retries_start_no_run_twice(
    harness: GatewayHarness, people: OrganizationUsers
) -> None:
    workflow_id = await people.owner.create(**GRAPH)
    await start_runs(harness, people.owner, workflow_id, 5, **FAILED)
    answers = await asyncio.gather(
        *(post_bulk_successfully(person, "retry", filter={}) for person in (people.owner, people.admin) * 2)
    )
    assert sum(answer["affected"] for answer in answers) == 5
    assert await count(harness, Execution, col(Execution.workflow_id) == workflow_id) == 10


async def test_a_request_that_broke_off_is_finished_by_its_repetition(
    harness: GatewayHarness, people: OrganizationUsers, monkeypatch: pytest.MonkeyPatch
) -> None:
    workflow_id = await people.owner.create(**GRAPH)
    failed = await start_runs(harness, people.owner, workflow_id, 3, **FAILED)
    monkeypatch.setattr(bulk_actions, "RETRIES_AT_ONCE", 2)
    resume, calls = bulk_actions._resume, 0  # noqa: SLF001 - breaks off between its transactions

    async def break_off(connection: AsyncConnection, **arguments: Any) -> dict[str, str | None]:  # noqa: ANN401 - its own
        nonlocal calls
        calls += 1
        if calls == 2:
            raise DatabaseUnavailable("the database is away")
        return await resume(connection, **arguments)

    monkeypatch.setattr(bulk_actions, "_resume", break_off)
    once, body = {"Idempotency-Key": workflow_id}, {"filter": {"workflowId": workflow_id}}
    assert_refused(await post_bulk(people.owner, "retry", once, **body), 503, "not-ready")
    answer = await post_bulk_successfully(people.owner, "retry", once, **body)
    assert (answer["affected"], sorted(answer["executionIds"])) == (3, sorted(failed))
    assert await count(harness, Execution, col(Execution.workflow_id) == workflow_id) == 6


async def test_runs_of_closed_workflows_are_not_retried(
    harness: GatewayHarness, people: OrganizationUsers
) -> None:
    for status in ("paused", "archived"):
        workflow_id = await people.owner.create(**GRAPH)
        await start_runs(harness, people.owner, workflow_id, 1, **FAILED)
        response = await people.owner.api.put(
            f"/api/v1/workflows/{workflow_id}/status", json={"status": "active"}
        )
        assert response.status_code == 200, response.text
        await people.owner.api.put(f"/api/v1/workflows/{workflow_id}/status", json={"status": status})
    deleted = await people.owner.create(**GRAPH)
    await start_runs(harness, people.owner, deleted, 1, **FAILED)
    assert (await people.owner.api.delete(f"/api/v1/workflows/{deleted}")).status_code == 204
    assert (await post_bulk_successfully(people.owner, "retry", filter={}))["matched"] == 0
    assert (await post_bulk_successfully(people.owner, "delete", filter={}))["affected"] == 3


async def test_no_more_is_retried_than_may_wait(harness: GatewayHarness, people: OrganizationUsers) -> None:
    workflow_id = await people.owner.create(**GRAPH)
    await start_runs(harness, people.owner, workflow_id, 3, **FAILED)
    async with run_with_settings(harness, max_backlog_per_workflow=2) as gateway:
        owner = UserClient(people.owner.user, await gateway.client(people.owner.key), people.owner.key)
        assert_refused(await post_bulk(owner, "retry", filter={}), 429, "queue-full")
        assert (await post_bulk_successfully(owner, "retry", filter={}, limit=2))["affected"] == 2


# ── delete ──────────────────────────────────────────────────────────────────────────────────────────────────


async def test_an_ended_run_is_deleted_with_all_that_belongs_to_it(
    harness: GatewayHarness, people: OrganizationUsers
) -> None:
    workflow_id = await people.owner.create(**GRAPH)
    live = await start_runs(harness, people.owner, workflow_id, 1)
    ended = await start_runs(harness, people.owner, workflow_id, 2, **COMPLETED)
    untold = await start_runs(
        harness, people.owner, workflow_id, 1, **COMPLETED, completion_action={"callback": {}}
    )
    child = await start_runs(harness, people.owner, workflow_id, 1, **COMPLETED, parent_id=live[0])
    owner = BlobOwner(people.owner.user.organization_id, ended[0])
    reference = await harness.gateway.blobs.put(owner, b"content", media_type="text/plain")

    async def write(connection: AsyncConnection) -> None:
        line = {
            "execution_id": ended[0],
            "sequence": 1,
            "shard": people.owner.user.shard,
            "id": f"log_{ended[0]}",
        }
        values = {**line, "level": "info", "message": "a line", "created_at": datetime.now(UTC)}
        await connection.execute(insert(LogRow).values(values))

    await harness.gateway.database.transaction(write)
    answer = await post_bulk_successfully(people.owner, "delete", filter={"workflowId": workflow_id})
    assert (answer["matched"], answer["affected"]) == (2, 2)
    assert await read_statuses(harness, [*ended, *live, *untold, *child]) == [
        *("gone", "gone"), ExecutionStatus.PENDING, "completed", "completed",
    ]  # fmt: skip
    assert await count(harness, LogRow, col(LogRow.execution_id) == ended[0]) == 0
    assert await count(harness, ExecutionData, col(ExecutionData.execution_id).in_(ended)) == 0
    with pytest.raises(BlobLost):
        await harness.gateway.blobs.get(owner, reference.sha256)
    assert await list_actions(people, workflow_id) == ["executions.deleted"]


@pytest.mark.every_database
async def test_retries_are_looked_up_by_an_index(harness: GatewayHarness) -> None:
    later = "SELECT 1 FROM execution AS later WHERE later.key_id = e.key_id AND later.resumed_from = e.id"
    is_postgresql = harness.gateway.database.engine.dialect.name == "postgresql"
    async with harness.gateway.database.read() as connection:
        if is_postgresql:
            await share_transaction(connection)
            await connection.execute(text("SET LOCAL enable_seqscan = off"))
        explain = "EXPLAIN" if is_postgresql else "EXPLAIN QUERY PLAN"
        rows = await connection.execute(
            text(f"{explain} SELECT id FROM execution AS e WHERE e.id = 'exec_1' AND NOT EXISTS ({later})")
        )
        assert "ix_execution_resumed" in "\n".join(str(row) for row in rows)
