"""Limits of pending runs at the gateway, and counts of pending rows."""

import time

import pytest
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncConnection

from gateway.executions import request_limits
from gateway.executions.request_limits import BacklogCount
from gateway.http import errors
from gateway.http.errors import ApiError
from journal import backlog
from models.database import Database
from models.execution import DELAYED_TARGET, LIMITED_TARGET, SHARED_TARGET, UNPARSED_TARGET
from models.ids import turn_of_workflow
from tests.integration.backlogs import BacklogRows, fill
from tests.integration.gateway_harness import GRAPH, GatewayHarness, OrganizationUsers, assert_refused
from tests.integration.gateway_variants import execute_workflow, run_with_settings
from tests.integration.query_plans import explain_statement


async def begin(harness: GatewayHarness, workflow_id: str) -> None:
    """Start all runs of a workflow, in place of a worker."""

    async def work(connection: AsyncConnection) -> None:
        await connection.execute(
            text(
                "UPDATE execution SET status = 'running', is_fresh = :fresh, started_at = 1 WHERE workflow_id = :id"
            ),
            {"id": workflow_id, "fresh": False},
        )

    await harness.gateway.database.transaction(work)


async def test_a_workflow_takes_in_as_much_as_may_wait_and_more_when_that_was_begun(
    harness: GatewayHarness, people: OrganizationUsers, monkeypatch: pytest.MonkeyPatch
) -> None:
    workflow_id, other_id = [await people.owner.create(**GRAPH) for _ in range(2)]
    async with run_with_settings(harness, max_backlog_per_workflow=3) as gateway:
        assert [
            (await execute_workflow(gateway, people.owner, workflow_id)).status_code for _ in range(3)
        ] == [201] * 3
        answer = await execute_workflow(gateway, people.owner, workflow_id)
        assert_refused(answer, 429, "queue-full")
        assert answer.headers["Retry-After"] == "5"
        assert (await execute_workflow(gateway, people.owner, other_id)).status_code == 201
        await begin(harness, workflow_id)
        # On a slow machine, a count takes long and stays fresh for twenty times as long.
        monkeypatch.setattr(request_limits, "monotonic", lambda: time.monotonic() + 3_600)
        assert (await execute_workflow(gateway, people.owner, workflow_id)).status_code == 201


async def test_an_organisation_takes_in_as_much_as_may_wait_of_all_its_workflows(
    harness: GatewayHarness, people: OrganizationUsers
) -> None:
    async with run_with_settings(harness, max_backlog_per_organization=2) as gateway:
        answers = [
            await execute_workflow(gateway, people.owner, await people.owner.create(**GRAPH))
            for _ in range(3)
        ]
        assert [answer.status_code for answer in answers] == [201, 201, 429]
        assert_refused(answers[-1], 429, "queue-full")
        theirs = await people.stranger.create(**GRAPH)
        assert (await execute_workflow(gateway, people.stranger, theirs)).status_code == 201


async def test_runs_that_waited_before_the_gateway_started_count(
    harness: GatewayHarness, people: OrganizationUsers
) -> None:
    workflow_id = await people.owner.create(**GRAPH)
    await fill(harness.gateway.database, BacklogRows(people.owner.user.organization_id, workflow_id, 5))
    async with run_with_settings(harness, max_backlog_per_workflow=5) as gateway:
        assert_refused(await execute_workflow(gateway, people.owner, workflow_id), 429, "queue-full")
    async with run_with_settings(harness, max_backlog_per_workflow=6) as gateway:
        assert (await execute_workflow(gateway, people.owner, workflow_id)).status_code == 201
        assert_refused(await execute_workflow(gateway, people.owner, workflow_id), 429, "queue-full")


async def test_a_request_that_was_answered_is_answered_the_same_when_the_queue_is_full(
    harness: GatewayHarness, people: OrganizationUsers
) -> None:
    workflow_id = await people.owner.create(**GRAPH)
    async with run_with_settings(harness, max_backlog_per_workflow=1) as gateway:
        first, again = [
            await execute_workflow(gateway, people.owner, workflow_id, headers={"Idempotency-Key": "once"})
            for _ in range(2)
        ]
        assert (again.status_code, again.json()) == (201, first.json())
        assert_refused(await execute_workflow(gateway, people.owner, workflow_id), 429, "queue-full")


async def test_several_at_once_are_taken_in_together_or_not_at_all(
    harness: GatewayHarness, people: OrganizationUsers
) -> None:
    organization_id = people.owner.user.organization_id
    async with run_with_settings(harness, max_backlog_per_organization=10) as gateway:
        room = gateway.gateway.backlog
        await room.require_capacity(organization_id, "wf_a", 8)
        with pytest.raises(ApiError):
            await room.require_capacity(organization_id, "wf_a", 3)
        await room.require_capacity(organization_id, "wf_a", 2)


# ── counting ────────────────────────────────────────────────────────────────────────────────────────────────


async def count_backlog(
    database: Database, organization_id: str, workflow_id: str = "", at_most: int = 1_000
) -> int:
    async with database.read() as connection:
        if workflow_id:
            return await backlog.count_workflow_backlog(
                connection, organization_id, workflow_id, at_most=at_most
            )
        return await backlog.count_organization_backlog(connection, organization_id, at_most=at_most)


async def test_the_backlog_counts_exactly_the_runs_that_have_not_begun(
    harness: GatewayHarness, people: OrganizationUsers
) -> None:
    organization_id, database = people.owner.user.organization_id, harness.gateway.database
    workflow_id, other_id = [await people.owner.create(**GRAPH) for _ in range(2)]
    for target in (SHARED_TARGET, LIMITED_TARGET, UNPARSED_TARGET):
        await fill(database, BacklogRows(organization_id, workflow_id, 2, target=target))
    await fill(
        database, BacklogRows(organization_id, workflow_id, 2, target=DELAYED_TARGET, status="waiting")
    )
    await fill(database, BacklogRows(organization_id, workflow_id, 4, status="waiting", started_at=1))
    await fill(database, BacklogRows(organization_id, workflow_id, 4, is_fresh=False, started_at=1))
    for status in ("running", "completed", "cancelled"):
        await fill(database, BacklogRows(organization_id, workflow_id, 4, status=status))
    await fill(database, BacklogRows(organization_id, other_id, 16, turn=turn_of_workflow(workflow_id)))
    await fill(database, BacklogRows(people.stranger.user.organization_id, workflow_id, 32))
    assert await count_backlog(database, organization_id, workflow_id) == 8
    assert await count_backlog(database, organization_id) == 24
    assert await count_backlog(database, organization_id, at_most=20) == 20


async def test_runs_that_wait_for_pods_count_for_their_organization(
    harness: GatewayHarness, people: OrganizationUsers
) -> None:
    organization_id, database = people.owner.user.organization_id, harness.gateway.database
    workflow_id = await people.owner.create(**GRAPH)
    assert (await people.owner.api.post(f"/api/v1/workflows/{workflow_id}/deploy")).status_code in {200, 202}
    await fill(database, BacklogRows(organization_id, workflow_id, 3, target=workflow_id))
    await fill(database, BacklogRows(organization_id, workflow_id, 2, target=workflow_id, status="waiting"))
    assert (
        await count_backlog(database, organization_id, workflow_id)
        == await count_backlog(database, organization_id)
        == 5
    )


@pytest.fixture
async def crowded_database(harness: GatewayHarness) -> Database:
    """Return a database where much has ended, and some waits, for its start or in its middle."""
    database = harness.gateway.database
    await fill(database, BacklogRows("org_crowd", "wf_1", 2_000, status="completed", started_at=1))
    await fill(database, BacklogRows("org_crowd", "wf_1", 2_000, status="waiting", started_at=1))
    for status in ("pending", "waiting"):
        await fill(database, BacklogRows("org_crowd", "wf_1", 250, status=status))

    async def analyze(connection: AsyncConnection) -> None:
        await connection.execute(text("ANALYZE execution"))

    await database.transaction(analyze)
    return database


async def test_rows_are_counted_in_the_indexes_of_those_that_wait(crowded_database: Database) -> None:
    in_organization = backlog.organization_statements("org_crowd", [SHARED_TARGET, LIMITED_TARGET, "wf_1"])
    in_workflow = backlog.workflow_statements("org_crowd", "wf_1")
    for pending, deferred in (in_organization, in_workflow):
        # Both have the rows of a status.
        plan = await explain_statement(crowded_database, pending.limit(1_000))
        assert "ix_execution_pending" in plan or "ix_execution_live" in plan
        plan = await explain_statement(crowded_database, deferred.limit(1_000))
        assert "ix_execution_deferred" in plan or "ix_execution_waiting" in plan
    assert await count_backlog(crowded_database, "org_crowd", at_most=5_000) == 500


# ── Retry-After ─────────────────────────────────────────────────────────────────────────────────────────────


def test_retry_after_follows_the_recent_rate_of_starts() -> None:
    tally = BacklogCount()
    tally.recount(100, added_before=0, began=0.0, ended=0.1)
    assert tally.retry_seconds(1, 100) == request_limits.UNKNOWN_RETRY_SECONDS
    tally.added = 50
    tally.recount(100, added_before=50, began=10.0, ended=10.1)  # 5 a second were started
    tally.added = 9
    assert (tally.size, tally.retry_seconds(1, 100)) == (109, 2)
    assert tally.retry_seconds(1_000, 100) == errors.MAX_RETRY_SECONDS


def test_a_count_that_takes_long_is_made_seldom() -> None:
    tally = BacklogCount()
    tally.recount(1_000_000, added_before=0, began=0.0, ended=0.01)
    assert tally.fresh_until == 1.01
    tally.recount(1_000_000, added_before=0, began=0.0, ended=0.5)
    assert tally.fresh_until == 10.5
