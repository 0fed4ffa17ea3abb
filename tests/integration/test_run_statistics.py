"""Counts of runs by hour, the list of workflows with the worst first, and the list of deployments."""

from __future__ import annotations

import asyncio
from datetime import timedelta
from typing import TYPE_CHECKING, Any
from unittest.mock import ANY

import pytest
from sqlalchemy import delete, insert, update
from sqlalchemy.ext.asyncio import AsyncConnection
from sqlmodel import col

from gateway.deployments import deployment_list, lifecycle_rows, workflow_activity
from gateway.deployments.workflow_activity import ActivityOrder
from gateway.executions import failure_groups, model_hour_sums, run_statistics
from gateway.http.parameters import PageBounds
from gateway.workflows.workflow_rows import WorkflowFilter
from journal import failure_hours, run_hours
from models.access import ApiCaller, KeyScope, UserRole
from models.blocked_interval import BlockedInterval
from models.deployment import ObservedState
from models.execution import Execution, SpanRow
from models.failure_hour import FailureHour
from models.run_hour import ALL_WORKFLOWS, RunHour
from models.timestamps import format_timestamp, hour_of
from scheduler import run_hours as duty
from scheduler.run_hours import RunHourCounter
from tests.integration.deployed_workflows import deploy_with_pod, run
from tests.integration.gateway_harness import (
    GRAPH,
    GatewayHarness,
    OrganizationUsers,
    UserClient,
    assert_refused,
)
from tests.integration.query_plans import explain_statement

if TYPE_CHECKING:
    from datetime import datetime

SECOND = timedelta(seconds=1)
HOUR = timedelta(hours=1)


async def get_json(person: UserClient, path: str) -> Any:  # noqa: ANN401 - any JSON value
    response = await person.api.get(path)
    assert response.status_code == 200, response.text
    return response.json()


async def count_runs(harness: GatewayHarness) -> datetime:
    """Count all runs as the scheduler does, and return the begin of the present hour."""
    await RunHourCounter(harness.gateway.database).count_runs()
    return hour_of(harness.gateway.clock())


async def insert_row(harness: GatewayHarness, row: BlockedInterval | RunHour | SpanRow) -> None:
    statement = insert(type(row)).values(row.model_dump())
    await harness.gateway.database.transaction(lambda connection: connection.execute(statement))


async def end_run(
    harness: GatewayHarness,
    person: UserClient,
    workflow_id: str,
    status: str,
    accepted_at: datetime,
    *,
    seconds: float = 1,
) -> str:
    """Insert a run that took some seconds from its start to its end."""
    return await run(
        harness,
        person,
        workflow_id,
        target="shared",
        status=status,
        created_at=accepted_at,
        started_at=accepted_at + SECOND,
        ended_at=accepted_at + SECOND + timedelta(seconds=seconds),
    )


@pytest.mark.every_database
async def test_runs_count_in_the_hour_of_their_acceptance_by_their_present_status(
    harness: GatewayHarness, people: OrganizationUsers, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(duty, "REST_FACTOR", 0)
    present = hour_of(harness.gateway.clock())
    workflow_id = await people.owner.create(status="active", **GRAPH)
    for seconds in (0.1, 0.2, 0.2, 10):
        await end_run(harness, people.owner, workflow_id, "completed", present - 2 * HOUR, seconds=seconds)
    await end_run(harness, people.owner, workflow_id, "failed", present, seconds=0.2)
    await end_run(harness, people.owner, workflow_id, "cancelled", present)
    await end_run(harness, people.owner, workflow_id, "completed", present - 24 * HOUR)
    pending = await run(harness, people.owner, workflow_id, created_at=present - HOUR)
    # The hour may end during the test.
    present = await count_runs(harness)

    shown = await get_json(people.colleague, "/api/v1/executions/statistics")
    assert len(shown["hours"]) == 24
    assert shown["hours"][0]["startsAt"] == shown["since"]
    total = shown["total"]
    assert {name: total[name] for name in ("accepted", "unfinished", "completed", "failed", "cancelled")} == {
        "accepted": 7,
        "unfinished": 1,
        "completed": 4,
        "failed": 1,
        "cancelled": 1,
    }
    assert total["runP50Ms"] == pytest.approx(200, rel=0.1)
    assert total["runP95Ms"] == pytest.approx(10_000, rel=0.1)
    assert total["queueP50Ms"] == pytest.approx(1_000, rel=0.1), "each starts a second after its acceptance"
    assert total["wakeP50Ms"] is None
    [busiest] = [hour for hour in shown["hours"] if hour["completed"]]
    assert (busiest["accepted"], busiest["completed"], busiest["failed"]) == (4, 4, 0)
    strange = await get_json(people.stranger, "/api/v1/executions/statistics")
    assert strange["total"]["accepted"] == 0

    async def count_until_ended() -> None:
        while True:
            await counter.count_runs()
            counted = (await get_json(people.owner, "/api/v1/executions/statistics"))["total"]
            if (counted["unfinished"], counted["failed"]) == (0, 2):
                return
            await asyncio.sleep(0.05)

    counter = RunHourCounter(harness.gateway.database)
    await counter.count_runs()
    ended = {"status": "failed", "started_at": present - HOUR, "ended_at": present - HOUR}
    await harness.gateway.database.transaction(
        lambda connection: connection.execute(
            update(Execution).where(col(Execution.id) == pending).values(ended)
        )
    )
    await asyncio.wait_for(count_until_ended(), 60)


async def test_slow_counts_reach_every_hour_in_time(
    harness: GatewayHarness, people: OrganizationUsers, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(duty, "TURN_SECONDS", 0.0)
    monkeypatch.setattr(duty, "REST_FACTOR", 0)
    present = hour_of(harness.gateway.clock())
    workflow_id = await people.owner.create(status="active", **GRAPH)
    for number in (0, 1, 22):
        await end_run(harness, people.owner, workflow_id, "completed", present - number * HOUR)
    counter = RunHourCounter(harness.gateway.database)
    for _ in range(run_hours.HOURS):
        await counter.count_runs()
    total = (await get_json(people.owner, "/api/v1/executions/statistics"))["total"]
    assert (total["accepted"], total["completed"]) == (3, 3)


async def test_the_first_turn_does_not_put_off_the_next_one(
    harness: GatewayHarness, people: OrganizationUsers, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(duty, "REST_FACTOR", 1_000_000)
    counter = RunHourCounter(harness.gateway.database)
    await counter.count_runs()
    workflow_id = await people.owner.create(status="active", **GRAPH)
    for expected in (1, 1):
        await fail_run(harness, people.owner, workflow_id, harness.gateway.clock())
        await counter.count_runs()
        assert (await list_groups(people.owner))["count"] == expected, (
            "only later turns are followed by a rest"
        )


async def test_private_runs_do_not_count(harness: GatewayHarness, people: OrganizationUsers) -> None:
    workflow_id = await people.owner.create(status="active", **GRAPH)
    await run(harness, people.owner, workflow_id, status="failed", is_private=True)
    await run(harness, people.owner, workflow_id)
    await count_runs(harness)
    total = (await get_json(people.owner, "/api/v1/executions/statistics"))["total"]
    assert (total["accepted"], total["failed"], total["unfinished"]) == (1, 0, 1)
    [shown] = (await get_json(people.owner, "/api/v1/workflows/activity"))["workflows"]
    assert (shown["accepted"], shown["failed"]) == (1, 0)


@pytest.mark.every_database
async def test_waits_for_pods_have_percentiles(harness: GatewayHarness, people: OrganizationUsers) -> None:
    present = hour_of(harness.gateway.clock())
    workflow_id = await people.owner.create(status="active", **GRAPH)
    await deploy_with_pod(harness, people.owner, workflow_id)
    for seconds, code in ((2, "waking"), (8, "waking"), (500, "window-closed")):
        execution_id = await end_run(harness, people.owner, workflow_id, "completed", present)
        interval = BlockedInterval(
            execution_id=execution_id,
            started_at=present,
            shard=people.owner.user.shard,
            organization_id=people.owner.user.organization_id,
            code=code,
            ended_at=present + timedelta(seconds=seconds),
        )
        await insert_row(harness, interval)
    await count_runs(harness)
    total = (await get_json(people.owner, "/api/v1/executions/statistics"))["total"]
    assert total["wakeP50Ms"] == pytest.approx(2_000, rel=0.1)
    assert total["wakeP95Ms"] == pytest.approx(8_000, rel=0.1)


@pytest.mark.every_database
async def test_the_worst_workflows_come_first(harness: GatewayHarness, people: OrganizationUsers) -> None:
    now = harness.gateway.clock()
    names = ("quiet", "busy", "waiting", "failed once", "failed lately", "stuck")
    by_name = {name: await people.owner.create(name=name, status="active", **GRAPH) for name in names}
    hidden = await people.admin.create(name="hidden", status="active", **GRAPH)
    await end_run(harness, people.owner, by_name["failed once"], "failed", now - 5 * HOUR)
    last = await end_run(harness, people.owner, by_name["failed lately"], "failed", now - 2 * HOUR, seconds=4)
    await end_run(harness, people.owner, by_name["failed lately"], "completed", now - 5 * HOUR, seconds=4)
    await run(harness, people.owner, by_name["waiting"], created_at=now - 3 * HOUR)
    await end_run(harness, people.owner, by_name["busy"], "completed", now - 2 * HOUR)
    await end_run(harness, people.admin, hidden, "failed", now)
    await deploy_with_pod(
        harness,
        people.owner,
        by_name["stuck"],
        observed=ObservedState.FAILED,
        observed_reason="the image can't be pulled",
        generation=1,
    )
    await deploy_with_pod(harness, people.owner, by_name["busy"])
    asleep = {"observed": ObservedState.STOPPED, "replicas": 0}
    await deploy_with_pod(harness, people.owner, by_name["quiet"], **asleep)
    await count_runs(harness)

    listed = await get_json(people.owner, "/api/v1/workflows/activity")
    assert [one["name"] for one in listed["workflows"]] == list(reversed(names))
    assert listed["count"] == len(names)
    stuck, lately, *_ = listed["workflows"]
    assert (stuck["deploymentStatus"], stuck["reason"]) == ("failed", "the image can't be pulled")
    assert (lately["accepted"], lately["failed"], lately["completed"]) == (2, 1, 1)
    assert lately["runP95Ms"] == pytest.approx(4_000, rel=0.1)
    assert (lately["newestRun"]["id"], lately["newestRun"]["status"]) == (last, "failed")
    assert [hour["failed"] for hour in lately["hours"]].count(1) == 1
    page = await get_json(people.owner, "/api/v1/workflows/activity?limit=2&offset=1&search=failed")
    assert [one["name"] for one in page["workflows"]] == ["failed once"]
    assert page["count"] == 2
    for user, number in ((people.owner, 0), (people.stranger, 0), (people.admin, 1)):
        page = await get_json(user, "/api/v1/workflows/activity?search=hidden")
        assert (page["count"], page["states"]["failing"], len(page["workflows"])) == (number, number, number)
    assert (await get_json(people.admin, "/api/v1/workflows/activity"))["count"] == len(names) + 1
    assert listed["states"] == {"failing": 3, "unfinished": 1, "awake": 1, "asleep": 1}
    assert lately["ownerName"] == people.owner.user.name
    ahead = RunHour(
        organization_id=people.owner.user.organization_id,
        workflow_id=by_name["failed lately"],
        starts_at=hour_of(now) + HOUR,
        accepted=5,
        completed=5,
        run_times={"127": 5},
        queue_times={},
        wake_times={},
    )
    await insert_row(harness, ahead)
    again = await get_json(people.owner, "/api/v1/workflows/activity")
    assert again["workflows"] == listed["workflows"], "the next hour is not among the 24"
    for query, expected in {
        "state=failing": ["stuck", "failed lately", "failed once"],
        "state=unfinished": ["waiting"],
        "state=awake": ["busy"],
        "state=asleep": ["quiet"],
        "order=name": sorted(names),
        "order=name&state=failing&limit=2&offset=1": ["failed once", "stuck"],
    }.items():
        found = await get_json(people.owner, f"/api/v1/workflows/activity?{query}")
        assert [one["name"] for one in found["workflows"]] == expected, query
        if "state" in query:
            assert found["count"] == listed["states"][query.partition("state=")[2].partition("&")[0]]
    latest = await get_json(people.owner, "/api/v1/workflows/activity?order=last-run")
    assert {one["name"] for one in latest["workflows"][:2]} == {"busy", "failed lately"}
    for whole in (listed, latest):
        order = "worst" if whole is listed else "last-run"
        pages = [
            await get_json(people.owner, f"/api/v1/workflows/activity?order={order}&limit=2&offset={offset}")
            for offset in range(0, len(names) + 2, 2)
        ]
        assert [one for page in pages for one in page["workflows"]] == whole["workflows"]
        assert {(page["count"], *page["states"].values()) for page in pages} == {(len(names), 3, 1, 1, 1)}
    assert (await get_json(people.stranger, "/api/v1/workflows/activity"))["workflows"] == []


@pytest.mark.every_database
async def test_a_workflow_is_listed_if_its_first_run_is_counted_meanwhile(
    harness: GatewayHarness, people: OrganizationUsers, monkeypatch: pytest.MonkeyPatch
) -> None:
    present = hour_of(harness.gateway.clock())
    workflow_id = await people.owner.create(status="active", **GRAPH)
    counted = RunHour(
        organization_id=people.owner.user.organization_id,
        workflow_id=workflow_id,
        starts_at=present,
        accepted=1,
    )
    quiet: list[Any] = []

    def build(*args: Any) -> Any:  # noqa: ANN401 - those of the statement
        quiet.append(build_quiet(*args))
        return quiet[0]

    async def execute(connection: AsyncConnection, statement: Any, *args: Any) -> Any:  # noqa: ANN401 - any statement
        if quiet and statement is quiet[0]:
            await insert_row(harness, counted)
        return await execute_statement(connection, statement, *args)

    build_quiet, execute_statement = workflow_activity.quiet_statement, AsyncConnection.execute
    monkeypatch.setattr(workflow_activity, "quiet_statement", build)
    monkeypatch.setattr(AsyncConnection, "execute", execute)
    listed = await get_json(people.owner, "/api/v1/workflows/activity")
    assert len(quiet) == 1
    assert [one["id"] for one in listed["workflows"]] == [workflow_id]


async def test_deployments_are_listed_with_their_next_transitions(
    harness: GatewayHarness, people: OrganizationUsers
) -> None:
    workflow_id = await people.owner.create(name="Mails", status="active", **GRAPH)
    hidden = await people.admin.create(status="active", **GRAPH)
    active_at = harness.gateway.clock() - timedelta(minutes=10)
    await deploy_with_pod(harness, people.owner, workflow_id, last_activity_at=active_at)
    await deploy_with_pod(harness, people.admin, hidden)
    listed = await get_json(people.owner, "/api/v1/deployments")
    [shown] = listed["deployments"]
    assert listed["isComplete"] is True
    assert (shown["workflowId"], shown["workflowName"]) == (workflow_id, "Mails")
    assert (shown["deploymentStatus"], shown["nextTransition"]) == ("running", "stop")
    lifecycle = await get_json(people.owner, f"/api/v1/workflows/{workflow_id}/lifecycle")
    assert shown["nextTransitionAt"] == lifecycle["nextTransitionAt"]
    assert len((await get_json(people.admin, "/api/v1/deployments"))["deployments"]) == 2


async def test_a_summary_counts_all_deployments_in_batches(
    harness: GatewayHarness, people: OrganizationUsers, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(deployment_list, "BATCH_DEPLOYMENTS", 2)
    monkeypatch.setattr(deployment_list, "SHOWN", 3)
    now = harness.gateway.clock()
    for number in range(5):
        workflow_id = await people.owner.create(name=f"Stops {number}", status="active", **GRAPH)
        active_at = now - timedelta(minutes=number)
        await deploy_with_pod(harness, people.owner, workflow_id, last_activity_at=active_at)
    stuck = await people.owner.create(name="Stuck", status="active", **GRAPH)
    observed = {"observed": ObservedState.FAILED, "observed_reason": "No such image", "generation": 1}
    await deploy_with_pod(harness, people.owner, stuck, last_activity_at=now, **observed)
    asleep = await people.owner.create(name="Asleep", status="active", **GRAPH)
    await deploy_with_pod(harness, people.owner, asleep, observed=ObservedState.STOPPED, replicas=0)
    hidden = await people.admin.create(status="active", **GRAPH)
    await deploy_with_pod(harness, people.admin, hidden, last_activity_at=now, **observed)

    shown = await get_json(people.owner, "/api/v1/deployments/summary")
    assert (shown["count"], shown["states"]) == (7, {"running": 5, "failed": 1, "stopped": 1})
    [failed] = shown["failed"]
    assert (failed["workflowName"], failed["reason"]) == ("Stuck", "No such image")
    assert [one["workflowName"] for one in shown["upcoming"]] == ["Stops 4", "Stops 3", "Stops 2"]
    listed = {
        one["workflowId"]: one for one in (await get_json(people.owner, "/api/v1/deployments"))["deployments"]
    }
    for one in [*shown["failed"], *shown["upcoming"]]:
        assert one == listed[one["workflowId"]]
    monkeypatch.setattr(deployment_list, "SHOWN", 1)
    of_all = await get_json(people.admin, "/api/v1/deployments/summary")
    assert (of_all["count"], of_all["states"]["failed"], len(of_all["failed"])) == (8, 2, 1)
    assert (await get_json(people.stranger, "/api/v1/deployments/summary"))["states"] == {}
    assert (await get_json(people.stranger, "/api/v1/deployments"))["deployments"] == []


async def test_counts_of_past_hours_are_deleted(harness: GatewayHarness, people: OrganizationUsers) -> None:
    long_ago = hour_of(harness.gateway.clock()) - 48 * HOUR
    database = harness.gateway.database
    await insert_row(
        harness,
        RunHour(organization_id=people.owner.user.organization_id, workflow_id="", starts_at=long_ago),
    )
    workflow_id = await people.owner.create(status="active", **GRAPH)
    await fail_run(harness, people.owner, workflow_id, long_ago)
    async with database.read() as connection:
        [failed] = await failure_hours.count_failures(connection, people.owner.user.organization_id, long_ago)
    await database.transaction(lambda connection: failure_hours.replace_hour(connection, long_ago, [failed]))
    await count_runs(harness)
    for table in (RunHour, FailureHour):
        old = delete(table).where(col(table.starts_at) == long_ago)
        assert (await database.transaction(lambda connection: connection.execute(old))).rowcount == 0  # noqa: B023 - at once


async def fail_run(
    harness: GatewayHarness,
    person: UserClient,
    workflow_id: str,
    accepted_at: datetime,
    message: str = "The disk is full",
    **values: Any,  # noqa: ANN401 - columns of the run
) -> str:
    """Insert a run that failed a minute after its acceptance, at the node `write`."""
    return await run(
        harness,
        person,
        workflow_id,
        **{
            "target": "shared",
            "status": "failed",
            "created_at": accepted_at,
            "ended_at": accepted_at + 60 * SECOND,
            "error": {"code": "node-error", "message": message, "nodeId": "write"},
            **values,
        },
    )


async def list_groups(person: UserClient, query: str = "") -> Any:  # noqa: ANN401 - any JSON value
    return await get_json(person, f"/api/v1/executions/failures{query}")


async def test_all_failures_of_a_day_are_grouped_by_cause(
    harness: GatewayHarness, people: OrganizationUsers, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(failure_hours, "BATCH_RUNS", 2)
    present = hour_of(harness.gateway.clock())
    workflow_id = await people.owner.create(name="Orders", status="active", **GRAPH)
    first = await fail_run(harness, people.owner, workflow_id, present - 3 * HOUR, "Row 12 of 'a' is wrong")
    for number in range(4):
        await fail_run(harness, people.owner, workflow_id, present - HOUR, f"Row {number} of 'b' is wrong")
    last = await fail_run(
        harness, people.owner, workflow_id, present - HOUR + SECOND, "Row 7 of 'c' is wrong"
    )
    inner = {"code": "http-status", "message": "It answered 500"}
    called = await fail_run(
        harness,
        people.owner,
        workflow_id,
        present - 2 * HOUR,
        error={"code": "sub-workflow-failed", "message": "", "nodeId": "call", "cause": inner},
    )
    await insert_row(
        harness,
        SpanRow(
            execution_id=last,
            node_id="write",
            shard=people.owner.user.shard,
            id="span_1",
            sequence=1,
            label="Write the row",
            type="set",
            status="failed",
        ),
    )
    await fail_run(harness, people.owner, workflow_id, present - 2 * HOUR, is_private=True)
    await end_run(harness, people.owner, workflow_id, "stopped", present - 2 * HOUR)
    await fail_run(harness, people.owner, workflow_id, present - 24 * HOUR)
    await count_runs(harness)

    found = await list_groups(people.owner)
    assert (found["count"], found["isComplete"]) == (7, True)
    newest = await list_groups(people.owner, "?limit=1")
    assert (newest["count"], newest["isComplete"], newest["groups"]) == (7, False, found["groups"][:1])
    assert await list_groups(people.owner, f"?limit={len(found['groups'])}") == {**found, "asOf": ANY}
    rows, http = found["groups"]
    assert (rows["workflowName"], rows["nodeId"], rows["code"]) == ("Orders", "write", "node-error")
    assert [group["workflowRuns"] for group in found["groups"]] == [8, 8], "one was stopped"
    assert (rows["count"], rows["executionId"], rows["message"]) == (6, last, "Row 7 of 'c' is wrong")
    assert rows["firstAt"] == format_timestamp(present - 3 * HOUR + 60 * SECOND)
    assert rows["lastAt"] == format_timestamp(present - HOUR + 61 * SECOND)
    assert (rows["nodeLabel"], http["nodeLabel"]) == ("Write the row", None)
    assert (http["nodeId"], http["code"], http["count"]) == ("call", "http-status", 1)
    assert http["executionId"] == called
    [same] = {
        one["fingerprint"]
        for one in found["groups"]
        if one["executionId"]
        in {
            alike["id"]
            for alike in (await get_json(people.owner, f"/api/v1/executions/{first}/same-failures"))[
                "executions"
            ]
        }
    }
    assert same == rows["fingerprint"]
    # Whole hours: those that the range touches.
    since, until = (format_timestamp(present - hours * HOUR + 30 * SECOND) for hours in (3, 2))
    earlier = await list_groups(people.owner, f"?since={since}&until={until}")
    assert [one["count"] for one in earlier["groups"]] == [1, 1]
    assert (earlier["since"], earlier["until"]) == (
        format_timestamp(present - 3 * HOUR),
        format_timestamp(present - HOUR),
    )
    long_ago = format_timestamp(present - 99 * HOUR)
    assert (await list_groups(people.owner, f"?since={long_ago}"))["count"] == 7
    assert (await list_groups(people.owner, f"?until={long_ago}"))["groups"] == []
    refused = await people.owner.api.get(f"/api/v1/executions/failures?since={until}&until={since}")
    assert_refused(refused, 400, "invalid-query")


async def test_failures_are_grouped_for_users_that_may_read_the_workflow(
    harness: GatewayHarness, people: OrganizationUsers
) -> None:
    now = harness.gateway.clock()
    own = await people.owner.create(name="Own", status="active", **GRAPH)
    hidden = await people.admin.create(name="Hidden", status="active", **GRAPH)
    for workflow_id, person in ((own, people.owner), (hidden, people.admin)):
        await fail_run(harness, person, workflow_id, now)
    await count_runs(harness)

    async def list_names(person: UserClient) -> list[str]:
        found = await list_groups(person)
        assert found["count"] == len(found["groups"])
        return sorted(one["workflowName"] for one in found["groups"])

    assert await list_names(people.owner) == ["Own"]
    assert await list_names(people.admin) == ["Hidden", "Own"]
    assert await list_names(people.colleague) == []
    assert await list_names(people.stranger) == []
    await people.owner.api.put(f"/api/v1/workflows/{own}/visibility", json={"isPublic": True})
    assert await list_names(people.colleague) == ["Own"]
    assert (await people.owner.api.delete(f"/api/v1/workflows/{own}")).status_code == 204
    assert await list_names(people.colleague) == []
    assert await list_names(people.owner) == ["Own"]


@pytest.mark.every_database
async def test_a_group_of_failures_names_the_completed_run_in_place_of_the_last(
    harness: GatewayHarness, people: OrganizationUsers
) -> None:
    owner, now = people.owner, harness.gateway.clock()
    workflow_id = await owner.create(name="Orders", status="active", **GRAPH)

    async def follow(first: str, status: str, seconds: int, **link: str) -> str:
        """Insert a run in the line of another one, which ends as soon as it is accepted."""
        at = now + seconds * SECOND
        values = {"target": "shared", "key_id": first, "status": status, "created_at": at, "ended_at": at}
        return await run(harness, owner, workflow_id, **values, **link)

    async def find_successor() -> str | None:
        await count_runs(harness)
        (group,) = (await list_groups(owner))["groups"]
        successor: str | None = group["completedSuccessorId"]
        return successor

    async def needs_person() -> bool:
        page = (await owner.api.get("/dashboard/overview")).text
        return "runs of Orders failed" in page or "run of Orders failed" in page

    earlier = await fail_run(harness, owner, workflow_id, now - 120 * SECOND)
    await follow(earlier, "completed", 0, replay_of=earlier)
    last = await fail_run(harness, owner, workflow_id, now - 60 * SECOND)
    assert await find_successor() is None, "an earlier run of the group is replayed"
    assert await needs_person()
    await follow(last, "completed", -90, replay_of=last)
    await follow(last, "cancelled", 1, resumed_from=last)
    assert await find_successor() is None, "runs in its place are older, or have not completed"
    replay = await follow(last, "stopped", 2, replay_of=last)
    resumed = await follow(last, "completed", 3, resumed_from=replay)
    assert await find_successor() == resumed, "through a replay"
    newest = await follow(last, "completed", 4, replay_of=last)
    assert await find_successor() == newest
    assert not await needs_person()
    assert f'/dashboard/runs/{newest}">Completed since<' in (await owner.api.get("/dashboard/overview")).text
    await fail_run(harness, owner, workflow_id, now)
    assert await find_successor() is None, "it has failed again"
    assert await needs_person()
    user = owner.user
    caller = ApiCaller("", user.id, user.organization_id, user.shard, UserRole.MEMBER, frozenset())
    statement = failure_groups.last_runs_statement(caller, [earlier, last])
    plan = await explain_statement(harness.gateway.database, statement)
    assert "ix_execution_resumed" in plan
    assert "ix_execution_line" in plan
    assert "Seq Scan on execution " not in plan
    assert "SCAN execution'" not in plan


async def test_groups_of_failures_are_bounded_and_follow_changes(
    harness: GatewayHarness, people: OrganizationUsers, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(failure_hours, "MAX_MESSAGES", 2)
    now = harness.gateway.clock()
    workflow_id = await people.owner.create(status="active", **GRAPH)
    messages = ["One", "Two", "Two", "Three", "Four", "Five"]
    failed = [await fail_run(harness, people.owner, workflow_id, now, message) for message in messages]
    await count_runs(harness)
    found = await list_groups(people.owner)
    assert sorted(one["count"] for one in found["groups"]) == [1, 2, 3], "further messages share a group"
    assert found["isComplete"] is True

    monkeypatch.setattr(failure_hours, "MAX_GROUPS", 2)
    await count_runs(harness)
    found = await list_groups(people.owner)
    assert sorted(one["count"] for one in found["groups"]) == [2, 3], "the most frequent are kept"
    assert (found["count"], found["isComplete"]) == (5, False)

    database = harness.gateway.database
    gone = delete(Execution).where(col(Execution.id).in_(failed[3:]))
    await database.transaction(lambda connection: connection.execute(gone))
    found = await list_groups(people.owner)
    assert {one["message"] for one in found["groups"]} == {"Two", None}, "the last run of a group is deleted"
    resumed = update(Execution).where(col(Execution.id).in_(failed)).values(status="running")
    await database.transaction(lambda connection: connection.execute(resumed))
    await count_runs(harness)
    assert (await list_groups(people.owner))["groups"] == []


@pytest.mark.every_database
async def test_counts_and_lists_are_read_by_indexes(
    harness: GatewayHarness, people: OrganizationUsers
) -> None:
    since = harness.gateway.clock() - 24 * HOUR
    user = people.owner.user
    caller = ApiCaller(
        key_id="key",
        user_id=user.id,
        organization_id=user.organization_id,
        shard=user.shard,
        role=UserRole.ADMIN,
        scopes=frozenset(KeyScope),
    )
    everything = WorkflowFilter(None, None, None)
    of_organization = [user.organization_id]
    statements = {
        "ix_execution_data_organization": run_hours.runs_statement(of_organization, since),
        "blocked_interval": run_hours.wakes_statement(of_organization, since),
        "ix_execution_live": run_hours.unfinished_statement(of_organization, since),
        "run_hour": run_statistics.hours_statement(user.organization_id, [ALL_WORKFLOWS], since),
        "model_hour": model_hour_sums.hours_statement(caller, since, since + 24 * HOUR),
        "ix_execution_unsuccessful": failure_hours.failures_statement(user.organization_id, since),
        "failure_hour": failure_groups.groups_statement(caller, since, since + HOUR, 20),
        "ix_workflow_listed_by": workflow_activity.page_statement(
            caller, everything, PageBounds(50, 0), since
        ),
        "ix_workflow_listed_by_updated_at": workflow_activity.quiet_statement(
            caller, everything, PageBounds(50, 9_000), since, ActivityOrder.WORST
        ),
        "workflow_id": workflow_activity.hours_statement(user.organization_id, ["one", "other"], since),
        "ix_execution_data_workflow": workflow_activity.newest_runs_statement(["one", "other"]),
        "ix_lifecycle_decision_workflow": lifecycle_rows.pod_time_statement(2).params(
            {
                "workflow_ids": ["one", "other"],
                "since_0": since,
                "until_0": since + HOUR,
                "since_1": since + HOUR,
                "until_1": since + 2 * HOUR,
            }
        ),
        "ix_deployment_organization": deployment_list.activities_statement(caller),
    }
    for index, statement in statements.items():
        plan = await explain_statement(harness.gateway.database, statement)
        assert index in plan
        for table in (
            "execution",
            "execution_data",
            "blocked_interval",
            "run_hour",
            "model_hour",
            "failure_hour",
            "workflow",
            "lifecycle_decision",
        ):
            assert f"SCAN {table}'" not in plan
            assert f"Seq Scan on {table} " not in plan
