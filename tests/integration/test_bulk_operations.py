"""Bulk operations: acts on many objects at a pace, which survive their gateway, with one entry in the audit trail."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Mapping
from datetime import timedelta
from functools import partial
from typing import Any, Final

import pytest
from sqlalchemy import delete
from sqlalchemy.ext.asyncio import AsyncConnection
from sqlmodel import col

from gateway.executions import bulk_actions, cancellation
from gateway.http import idempotency, limits
from gateway.ingest import bulk_operation_steps, dead_letter_rows
from models import access_store, bulk_operation, ids
from models.access import KeyScope
from models.bulk_operation import BulkAction, BulkOperation, BulkStatus
from models.errors import LockWaitTimeout
from models.execution import ExecutionData
from tests.bulk_rows import build_operation
from tests.integration.gateway_harness import (
    GRAPH,
    GatewayHarness,
    OrganizationUsers,
    UserClient,
    assert_refused,
)
from tests.integration.query_plans import explain_statement
from tests.integration.test_gateway_bulk import FAILED, start_runs
from tests.integration.test_gateway_deliveries import enqueue, get_json
from tests.integration.test_gateway_enqueue import create_active_workflow
from tests.integration.test_organization_intake import DEAD_LETTERS, fail_alike, walk
from tests.integration.test_waiting_runs import serve_worker

OPERATIONS: Final = "/api/v1/bulk-operations"
OF_DEAD_LETTERS: Final = f"{DEAD_LETTERS}/bulk-operations"
OF_EXECUTIONS: Final = "/api/v1/executions/bulk-operations"
FASTEST: Final = {"perSecond": limits.BULK_PER_SECOND}
ENDED: Final = {"completed", "stopped", "failed"}


async def begin(person: UserClient, path: str, **body: Any) -> dict[str, Any]:  # noqa: ANN401 - any JSON value
    answer = await person.api.post(path, json={**FASTEST, **body})
    assert answer.status_code == 202, answer.text
    shown: dict[str, Any] = answer.json()
    return shown


async def wait_for_end(person: UserClient, operation: Mapping[str, Any]) -> dict[str, Any]:
    """Wait until a bulk operation has ended, and return it."""
    async with asyncio.timeout(200):
        while (shown := await get_json(person, f"{OPERATIONS}/{operation['id']}"))["status"] not in ENDED:  # noqa: ASYNC110 - another task performs it
            await asyncio.sleep(0.02)
    return shown


async def create_dead_letters(
    harness: GatewayHarness, person: UserClient, count: int
) -> tuple[str, list[str]]:
    """Return a new workflow, and failed runs of messages for it."""
    workflow_id = await create_active_workflow(person)
    runs = [await enqueue(person, workflow_id, number) for number in range(count)]
    await fail_alike(harness, runs, "Broken")
    return workflow_id, runs


async def list_open(person: UserClient, workflow_id: str) -> set[str]:
    """Return the dead letters of a workflow that nobody has acted on."""
    found = await walk(person, f"{DEAD_LETTERS}?workflow_id={workflow_id}", "deadLetters")
    return {one["executionId"] for one in found}


async def list_audited(people: OrganizationUsers, workflow_id: str, action: str) -> list[dict[str, Any]]:
    """Return the values that the audit trail names of each act on a workflow, by path."""
    found = await walk(people.admin, f"/api/v1/audit?objectId={workflow_id}&action={action}", "entries")
    return [{change["path"]: change["after"] for change in one["changes"]} for one in found]


async def store_operation(
    harness: GatewayHarness,
    person: UserClient,
    workflow_id: str,
    **columns: Any,  # noqa: ANN401 - any column
) -> BulkOperation:
    """Store an open redrive of the dead letters of a workflow that no gateway performs, unless `columns` say otherwise.

    It is left alone until the gateway is woken, or looks by itself.
    """
    now = harness.gateway.clock()
    operation = build_operation(
        person.user,
        now,
        **{
            "key_id": await read_key_id(person),
            "action": BulkAction.REDRIVE_DEAD_LETTERS.value,
            "selection": {"workflowId": workflow_id},
            "per_second": limits.BULK_PER_SECOND,
            "status": BulkStatus.RUNNING.value,
            "leased_until": now - timedelta(seconds=1),
            "ended_at": None,
            **columns,
        },
    )
    await harness.gateway.database.transaction(partial(bulk_operation.insert_operation, operation=operation))
    return operation


async def test_a_redrive_of_many_is_one_operation_with_one_entry_in_the_audit_trail(
    harness: GatewayHarness, people: OrganizationUsers
) -> None:
    workflow_id, runs = await create_dead_letters(harness, people.owner, 25)
    lost = delete(ExecutionData).where(col(ExecutionData.execution_id) == runs[3])
    await harness.gateway.database.transaction(lambda connection: connection.execute(lost))
    chosen = {"action": "redrive", "filter": {"workflowId": workflow_id}}
    refused = await people.owner.api.post(OF_DEAD_LETTERS, json={**chosen, "count": 26})
    assert_refused(refused, 409, "count-changed")
    # Of more than are confirmed, the oldest are taken.
    key = {"Idempotency-Key": ids.new_id("key")}
    body = {**chosen, **FASTEST, "count": 24}
    first, second = [await people.owner.api.post(OF_DEAD_LETTERS, json=body, headers=key) for _ in range(2)]
    assert (first.status_code, second.status_code) == (202, 202)
    assert first.json()["id"] == second.json()["id"]
    assert second.headers["Idempotent-Replayed"] == "true"

    ended = await wait_for_end(people.owner, first.json())
    assert (ended["status"], ended["done"], ended["refused"]) == ("completed", 23, 1)
    assert ended["refusals"] == {"not-redrivable": 1}
    assert await list_open(people.owner, workflow_id) == {runs[3], runs[24]}
    [entry] = await list_audited(people, workflow_id, "dead-letters.redriven")
    assert entry == {
        "operation": f'"{ended["id"]}"',
        "filter.workflowId": f'"{workflow_id}"',
        "total": "24",
        "done": "23",
        "refused": "1",
        "status": '"completed"',
    }
    [shown] = await walk(
        people.admin, f"/api/v1/audit?objectId={workflow_id}&action=dead-letters.redriven", "entries"
    )
    assert shown["userId"] == people.owner.user.id
    assert shown["requestId"] == first.headers["X-Request-Id"]


async def test_another_gateway_repeats_the_step_of_a_dead_one_and_counts_each_object_once(
    harness: GatewayHarness, people: OrganizationUsers
) -> None:
    workflow_id, runs = await create_dead_letters(harness, people.owner, 6)
    gateway, owner = harness.gateway, people.owner
    # The dead gateway has stored a step of three and redriven one of them.
    found = await access_store.find_keys_by_id(gateway.database, [await read_key_id(owner)])
    [caller] = [one.caller for one in found.values()]
    async with gateway.database.read() as connection:
        failed = await dead_letter_rows.read_runs(connection, caller, runs)
    redrive_key = idempotency.redrive_key(workflow_id, runs[1])
    await gateway.redriver.redrive_dead_letter(caller, failed[runs[1]], redrive_key)
    operation = await store_operation(
        harness,
        owner,
        workflow_id,
        total=6,
        step=runs[:3],
        cursor_at=failed[runs[2]].created_at,
        cursor_id=runs[2],
        # The clock of the gateway may be behind that of the database, by which the runs were accepted.
        created_at=failed[runs[-1]].created_at + timedelta(seconds=1),
    )
    gateway.bulk_operations.wake()
    ended = await wait_for_end(owner, {"id": operation.id})
    assert (ended["status"], ended["done"], ended["refused"]) == ("completed", 6, 0)
    assert await list_open(owner, workflow_id) == set()
    listed = await get_json(owner, f"/api/v1/executions?workflow_id={workflow_id}&limit=100")
    assert listed["count"] == 12, "each was run again once"


async def read_key_id(person: UserClient) -> str:
    key_id: str = (await get_json(person, "/api/v1/auth/whoami"))["keyId"]
    return key_id


async def test_a_stopped_operation_leaves_the_rest_and_others_may_not_see_it(
    harness: GatewayHarness, people: OrganizationUsers
) -> None:
    workflow_id, _ = await create_dead_letters(harness, people.owner, 3)
    database = harness.gateway.database
    # Another gateway performs it.
    held = harness.gateway.clock() + timedelta(hours=1)
    operation = await store_operation(harness, people.owner, workflow_id, total=3, leased_until=held)
    path = f"{OPERATIONS}/{operation.id}"
    for stranger in (people.colleague, people.stranger):
        assert_refused(await stranger.api.get(path), 404, "not-found")
        assert_refused(await stranger.api.post(f"{path}/stop"), 404, "not-found")
        assert (await get_json(stranger, OPERATIONS))["operations"] == []
    seen = (await get_json(people.admin, OPERATIONS))["operations"]
    assert [one["id"] for one in seen] == [operation.id]
    stopped = await people.admin.api.post(f"{path}/stop")
    assert stopped.json()["status"] == "stopping"
    await database.transaction(partial(bulk_operation.release, operation=operation))
    harness.gateway.bulk_operations.wake()
    ended = await wait_for_end(people.owner, {"id": operation.id})
    assert (ended["status"], ended["done"]) == ("stopped", 0)
    assert len(await list_open(people.owner, workflow_id)) == 3
    [entry] = await list_audited(people, workflow_id, "dead-letters.redriven")
    assert (entry["done"], entry["status"]) == (str(ended["done"]), f'"{ended["status"]}"')
    assert (await get_json(people.owner, f"{OPERATIONS}?open=true"))["operations"] == []


@pytest.mark.parametrize(
    ("scopes", "is_revoked", "reason"),
    [
        ([KeyScope.WORKFLOWS_READ, KeyScope.WORKFLOWS_EXECUTE], True, "key-not-valid"),
        ([KeyScope.WORKFLOWS_READ], False, "scope-required"),
    ],
    ids=["revoked", "without-scope"],
)
async def test_an_operation_ends_with_the_right_of_its_user(
    harness: GatewayHarness,
    people: OrganizationUsers,
    *,
    scopes: list[KeyScope],
    is_revoked: bool,
    reason: str,
) -> None:
    workflow_id, runs = await create_dead_letters(harness, people.owner, 3)
    made = await people.owner.api.post("/api/v1/auth/keys", json={"name": "For a while", "scopes": scopes})
    key_id = made.json()["id"]
    if is_revoked:
        assert (await people.owner.api.delete(f"/api/v1/auth/keys/{key_id}")).is_success
    operation = await store_operation(
        harness, people.owner, workflow_id, total=3, key_id=key_id, step=runs[:1]
    )
    harness.gateway.bulk_operations.wake()
    ended = await wait_for_end(people.owner, {"id": operation.id})
    assert (ended["status"], ended["endReason"], ended["done"]) == ("failed", reason, 0)
    assert await list_open(people.owner, workflow_id) == set(runs)


@pytest.mark.every_database
async def test_a_gateway_that_has_lost_its_lease_changes_nothing(
    harness: GatewayHarness, people: OrganizationUsers
) -> None:
    workflow_id, _ = await create_dead_letters(harness, people.owner, 1)
    held = harness.gateway.clock() + timedelta(hours=1)
    lost = await store_operation(harness, people.owner, workflow_id, leased_until=held)

    async def progress(connection: AsyncConnection) -> list[BulkOperation | None]:
        change = partial(bulk_operation.store_progress, connection, values={"done": 1}, lease_seconds=3_600)
        present = await change(operation=lost)
        assert present is not None
        assert not await bulk_operation.store_end(connection, lost, BulkStatus.COMPLETED, None)
        return [await change(operation=lost), await change(operation=present)]

    late, present = await harness.gateway.database.transaction(progress)
    assert late is None
    assert present is not None
    shown = await get_json(people.owner, f"{OPERATIONS}/{lost.id}")
    assert (shown["status"], shown["done"]) == ("running", 1)


async def test_bulk_operations_purge_dead_letters_and_cancel_and_retry_executions(
    harness: GatewayHarness, people: OrganizationUsers
) -> None:
    workflow_id, _ = await create_dead_letters(harness, people.owner, 2)
    everything = {"workflowId": workflow_id}
    refused = await people.colleague.api.post(
        OF_DEAD_LETTERS, json={"action": "purge", "filter": everything, "count": 2}
    )
    assert_refused(refused, 409, "count-changed")
    purged = await begin(people.owner, OF_DEAD_LETTERS, action="purge", filter=everything, count=2)
    assert (await wait_for_end(people.owner, purged))["done"] == 2
    assert await list_open(people.owner, workflow_id) == set()
    assert len(await list_audited(people, workflow_id, "dead-letters.purged")) == 1

    manual = await people.owner.create(status="active", **GRAPH)
    pending = await start_runs(harness, people.owner, manual, 3)
    # Chosen ones alone; ids of another organization, or of none, select nothing.
    foreign = await start_runs(harness, people.stranger, await people.stranger.create(**GRAPH), 1)
    chosen = {"executionIds": [pending[1], *foreign, "exec_none"]}
    first = await begin(people.owner, OF_EXECUTIONS, action="cancel", filter=chosen, count=1)
    assert (await wait_for_end(people.owner, first))["done"] == 1
    for run, status in zip(pending, ("pending", "cancelled", "pending"), strict=True):
        assert (await get_json(people.owner, f"/api/v1/executions/{run}"))["status"] == status
    none = {"action": "cancel", "filter": {"executionIds": []}, "count": 1}
    assert_refused(await people.owner.api.post(OF_EXECUTIONS, json=none), 422, "validation-failed")
    canceled = await begin(
        people.owner, OF_EXECUTIONS, action="cancel", filter={"workflowId": manual}, count=2
    )
    assert (await wait_for_end(people.owner, canceled))["done"] == 2
    for run in pending:
        assert (await get_json(people.owner, f"/api/v1/executions/{run}"))["status"] == "cancelled"
    failed = await start_runs(harness, people.owner, manual, 2, **FAILED)
    retried = await begin(
        people.owner,
        OF_EXECUTIONS,
        action="retry",
        filter={"workflowId": manual, "status": "failed"},
        count=2,
    )
    ended = await wait_for_end(people.owner, retried)
    assert (ended["done"], ended["refused"]) == (2, 0)
    listed = await get_json(people.owner, f"/api/v1/executions?workflow_id={manual}&limit=100")
    assert {one["resumedFrom"] for one in listed["executions"]} == {None, *failed}


async def test_runs_that_are_locked_are_acted_on_later(
    harness: GatewayHarness, people: OrganizationUsers, monkeypatch: pytest.MonkeyPatch
) -> None:
    workflow_id = await people.owner.create(name="By hand", **GRAPH)
    pending = await start_runs(harness, people.owner, workflow_id, 2)
    failures = {pending[1]: 1}  # by run, the calls that still find it locked
    ask_to_end, resume = cancellation.request_end_of_run, bulk_actions.__dict__["_resume"]

    def require_unlocked(execution_ids: Iterable[str]) -> None:
        for execution_id in execution_ids:
            if failures.get(execution_id):
                failures[execution_id] -= 1
                raise LockWaitTimeout("locked by another")

    async def ask_unless_locked(*given: Any) -> Any:  # noqa: ANN401 - passed on
        require_unlocked([given[2].execution_id])
        return await ask_to_end(*given)

    async def resume_unless_locked(connection: AsyncConnection, **given: Any) -> Any:  # noqa: ANN401 - passed on
        require_unlocked(given["new_ids"])
        return await resume(connection, **given)

    monkeypatch.setattr(bulk_operation_steps, "POSTPONED_SECONDS", 0.05)
    monkeypatch.setattr(bulk_actions, "request_end_of_run", ask_unless_locked)
    monkeypatch.setattr(bulk_actions, "_resume", resume_unless_locked)
    chosen = {"workflowId": workflow_id}
    canceled = await begin(people.owner, OF_EXECUTIONS, action="cancel", filter=chosen, count=2)
    ended = await wait_for_end(people.owner, canceled)
    assert (ended["done"], ended["refused"]) == (2, 0)

    failed = await start_runs(harness, people.owner, workflow_id, 2, **FAILED)
    failures[failed[1]] = 2  # among others, and alone
    retried = await begin(
        people.owner, OF_EXECUTIONS, action="retry", filter={**chosen, "status": "failed"}, count=2
    )
    ended = await wait_for_end(people.owner, retried)
    assert (ended["done"], ended["refused"]) == (2, 0)


async def test_the_first_alone_decides_about_the_others(
    harness: GatewayHarness, people: OrganizationUsers
) -> None:
    good, _ = await create_dead_letters(harness, people.owner, 3)
    bad = await people.owner.create(
        name="Fails",
        status="active",
        nodes=[
            {"id": "start", "nodeId": "queue-trigger"},
            {"id": "step", "nodeId": "template", "config": {"text": "{{ data.missing }}"}},
        ],
        connections=[{"sourceNodeId": "start", "targetNodeId": "step"}],
    )
    runs = [await enqueue(people.owner, bad, number) for number in range(3)]
    await fail_alike(harness, runs, "Broken")
    async with serve_worker(harness):
        begun = [
            await begin(
                people.owner,
                OF_DEAD_LETTERS,
                action=act,
                filter={"workflowId": one},
                count=3,
                firstAlone=True,
            )
            for act, one in (("redrive", good), ("replay", bad))
        ]
        ended = [await wait_for_end(people.owner, one) for one in begun]
    assert [(one["status"], one["done"], one["endReason"]) for one in ended] == [
        ("completed", 3, None),
        ("failed", 1, "first-failed"),
    ]
    assert ended[1]["firstExecutionId"] is not None
    assert set(runs[1:]) <= await list_open(people.owner, bad)


async def test_open_operations_are_limited_and_bodies_checked(
    harness: GatewayHarness, people: OrganizationUsers, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limits, "BULK_OPEN", 0)
    workflow_id, _ = await create_dead_letters(harness, people.owner, 1)
    body = {"action": "redrive", "filter": {"workflowId": workflow_id}, "count": 1}
    assert_refused(await people.owner.api.post(OF_DEAD_LETTERS, json=body), 409, "too-many-bulk-operations")
    for wrong in ({"count": 0}, {"perSecond": 0}, {"action": "drop"}, {"filter": {"workflow": workflow_id}}):
        assert_refused(
            await people.owner.api.post(OF_DEAD_LETTERS, json={**body, **wrong}), 422, "validation-failed"
        )


async def test_operations_are_found_by_their_indexes(harness: GatewayHarness) -> None:
    plan = await explain_statement(harness.gateway.database, bulk_operation.due_statement(4))
    assert "ix_bulk_operation_open" in plan
