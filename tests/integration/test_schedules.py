"""Schedules of workflows, from the graph to the runs, under a clock that the tests control."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from sqlalchemy import BigInteger, bindparam, delete, literal, select, update
from sqlmodel import col

from journal import concurrency_limits, scheduled_runs
from messages.broker_connection import connect_broker
from messages.local_broker import LocalBroker
from models.ai_model import AiSettings
from models.database import Database
from models.database_time import DatabaseTime
from models.execution import LIMITED_TARGET, SHARED_TARGET, Execution, ExecutionData
from models.execution_status import ExecutionStatus
from models.schedule import Schedule
from models.timestamps import to_microseconds
from models.workflow import Definition, Workflow
from models.workflow_triggers import WorkflowTrigger
from nodes import catalog
from scheduler.schedules import ScheduleRunner
from tests.integration import query_plans
from tests.integration.deployed_workflows import deploy_with_pod
from tests.integration.gateway_harness import (
    EDGE,
    STEP,
    GatewayHarness,
    OrganizationUsers,
    UserClient,
    assert_refused,
)
from tests.integration.lock_holders import hold_transaction_open, open_impatient_database, require_prompt

HOURLY = {"cron": "0 * * * *"}
HOUR = timedelta(hours=1)


class SchedulerKilled(BaseException):
    """End of a process, as seen by its tasks."""


@pytest.fixture(autouse=True)
async def only_ours(harness: GatewayHarness) -> None:
    """Ignore the schedules of other tests."""
    await harness.gateway.database.transaction(lambda connection: connection.execute(delete(Schedule)))


def schedule_graph(config: dict[str, Any], **step: Any) -> dict[str, Any]:  # noqa: ANN401 - any field of a node
    trigger = {"id": "clock", "nodeId": "schedule-trigger", "config": config}
    return {"nodes": [trigger, {**STEP, **step}], "connections": [{**EDGE, "sourceNodeId": "clock"}]}


async def create_active_workflow(person: UserClient, config: dict[str, Any], **fields: Any) -> str:  # noqa: ANN401 - any JSON value
    return await person.create(**schedule_graph(config), status="active", **fields)


async def get_schedule(person: UserClient, workflow_id: str) -> dict[str, Any]:
    response = await person.api.get(f"/api/v1/workflows/{workflow_id}/schedule")
    assert response.status_code == 200, response.text
    schedule: dict[str, Any] = response.json()
    return schedule


async def test_the_list_has_the_schedules_of_readable_workflows_the_next_run_first(
    people: OrganizationUsers,
) -> None:
    later = await create_active_workflow(people.owner, {"cron": "0 0 1 1 *"}, name="Later")
    sooner = await create_active_workflow(people.owner, {"intervalSeconds": 60}, name="Sooner")
    inactive = await create_active_workflow(people.owner, HOURLY, name="Inactive")
    await people.owner.api.put(f"/api/v1/workflows/{inactive}/status", json={"status": "paused"})
    listed = (await people.owner.api.get("/api/v1/schedules")).json()
    assert listed["count"] == 3
    assert [one["workflowId"] for one in listed["schedules"]] == [sooner, later, inactive]
    assert [one["inactiveReason"] for one in listed["schedules"]] == [None, None, "paused"]
    for one in listed["schedules"]:
        name = one.pop("workflowName")
        assert name in {"Later", "Sooner", "Inactive"}
        if one["isActive"]:
            assert one == await get_schedule(people.owner, one["workflowId"])
    page = (await people.owner.api.get("/api/v1/schedules?limit=1&offset=1")).json()
    assert [one["workflowId"] for one in page["schedules"]] == [later]
    assert (await people.colleague.api.get("/api/v1/schedules")).json()["schedules"] == []


async def test_a_preview_lists_the_next_times_of_an_edited_schedule_and_saves_nothing(
    people: OrganizationUsers,
) -> None:
    workflow_id = await create_active_workflow(people.owner, HOURLY)
    before = (await get_schedule(people.owner, workflow_id))["policy"]
    path = f"/api/v1/workflows/{workflow_id}/schedule/preview"
    edited = {"cron": "30 7 * * mon-fri", "timezone": "Europe/Berlin"}
    shown = await people.owner.api.post(path, json=edited)
    assert shown.status_code == 200, shown.text
    runs = [datetime.fromisoformat(run["localTime"]) for run in shown.json()["nextRuns"]]
    assert [(at.hour, at.minute, at.weekday() < 5) for at in runs] == [(7, 30, True)] * 5
    assert runs == sorted(set(runs))
    for wrong, field in (
        ({"cron": "0 25 * * *"}, "cron"),
        ({"cron": "0 7 * * *", "timezone": "Mars/Olympus"}, "timezone"),
        ({}, "intervalSeconds"),
    ):
        refused = await people.owner.api.post(path, json=wrong)
        assert_refused(refused, 422, "validation-failed")
        assert refused.json()["error"]["details"][0]["path"] == field
    assert (await get_schedule(people.owner, workflow_id))["policy"] == before


async def get_instants(person: UserClient, workflow_id: str) -> list[datetime]:
    """Return the next five instants."""
    return [
        datetime.fromisoformat(run["at"]) for run in (await get_schedule(person, workflow_id))["nextRuns"]
    ]


async def tick(harness: GatewayHarness, now: datetime, database: Database | None = None) -> int:
    """Let a scheduler start due schedules at a given time."""
    async with run_scheduler(harness, now, database) as schedules:
        return await schedules.start_due()


@asynccontextmanager
async def run_scheduler(
    harness: GatewayHarness, now: datetime, database: Database | None = None
) -> AsyncIterator[ScheduleRunner]:
    broker = await connect_broker(None)
    moment = literal(to_microseconds(now), BigInteger())
    yield ScheduleRunner(database or harness.gateway.database, broker, catalog.load_catalog(), moment)
    await broker.close()


async def read_runs(harness: GatewayHarness, workflow_id: str) -> list[Execution]:
    """Return the runs of a workflow, in the order of their instants."""
    async with harness.gateway.database.read() as connection:
        rows = await connection.execute(
            select(Execution).where(col(Execution.workflow_id) == workflow_id).order_by(col(Execution.id))
        )
        return [Execution(**row) for row in rows.mappings()]


async def read_instants(harness: GatewayHarness, workflow_id: str) -> list[datetime]:
    """Return the instants that a workflow's runs were given, in order."""
    async with harness.gateway.database.read() as connection:
        triggers = await connection.scalars(
            select(col(ExecutionData.trigger)).where(col(ExecutionData.workflow_id) == workflow_id)
        )
        given = [scheduled_at(trigger) for trigger in triggers]
    return sorted(given)


def scheduled_at(trigger: str) -> datetime:
    _, _, rest = trigger.partition('"scheduledAt":"')
    return datetime.fromisoformat(rest[: rest.index('"')])


async def end(harness: GatewayHarness, workflow_id: str) -> None:
    """Bring the runs of a workflow to their ends."""
    ended = {"status": ExecutionStatus.COMPLETED.value, "ended_at": DatabaseTime()}
    await change(harness, update(Execution).where(col(Execution.workflow_id) == workflow_id).values(ended))


async def change(harness: GatewayHarness, statement: Any) -> None:  # noqa: ANN401 - any statement
    await harness.gateway.database.transaction(lambda connection: connection.execute(statement))


# ── schedules of the graph ──────────────────────────────────────────────────────────────────────────────────


@pytest.mark.every_database
async def test_a_workflow_that_becomes_active_counts_from_then_on(
    harness: GatewayHarness, people: OrganizationUsers
) -> None:
    owner = people.owner
    workflow_id = await owner.create(**schedule_graph({"cron": "30 7 * * *", "timezone": "Asia/Kolkata"}))
    draft = await get_schedule(owner, workflow_id)
    assert (draft["isActive"], draft["inactiveReason"], draft["nodeId"]) == (False, "draft", "clock")
    assert len(draft["nextRuns"]) == 5
    before = datetime.now(UTC)
    await owner.api.put(f"/api/v1/workflows/{workflow_id}/status", json={"status": "active"})
    schedule = await get_schedule(owner, workflow_id)
    assert (schedule["isActive"], schedule["inactiveReason"], schedule["problem"]) == (True, None, None)
    assert schedule["policy"] == {
        "cron": "30 7 * * *",
        "intervalSeconds": None,
        "timezone": "Asia/Kolkata",
        "misfire": "run-once",
        "misfireLimit": 10,
        "overlap": "allow",
        "jitterSeconds": 0,
    }
    assert (schedule["lastRun"], schedule["lastPassedOver"]) == (None, None)
    first = schedule["nextRuns"][0]
    assert first["localTime"].endswith("T07:30:00+05:30")
    assert first["at"] == first["startsAt"]
    assert datetime.fromisoformat(first["at"]) == datetime.fromisoformat(first["localTime"])
    assert before < datetime.fromisoformat(first["at"]) <= datetime.now(UTC) + timedelta(days=1)
    assert await tick(harness, datetime.now(UTC)) == 0


@pytest.mark.every_database
async def test_only_an_edit_of_the_timing_moves_the_next_instant(
    harness: GatewayHarness, people: OrganizationUsers
) -> None:
    owner = people.owner
    workflow_id = await create_active_workflow(owner, {"intervalSeconds": 3_600})
    long_ago = datetime(2026, 1, 1, tzinfo=UTC)
    moved = {"anchor_at": long_ago, "next_run_at": long_ago + HOUR, "due_at": long_ago + HOUR}
    await change(harness, update(Schedule).where(col(Schedule.workflow_id) == workflow_id).values(moved))
    edits = [
        schedule_graph({"intervalSeconds": 3_600}, label="Another step"),
        schedule_graph({"intervalSeconds": 3_600, "misfire": "skip", "overlap": "queue"}),
        {"name": "Another name"},
    ]
    for edit in edits:
        assert (await owner.api.put(f"/api/v1/workflows/{workflow_id}", json=edit)).status_code == 200
        assert (await get_instants(owner, workflow_id))[0] == long_ago + HOUR
    assert (await get_schedule(owner, workflow_id))["policy"]["overlap"] == "queue"
    faster = schedule_graph({"intervalSeconds": 1_800})
    assert (await owner.api.put(f"/api/v1/workflows/{workflow_id}", json=faster)).status_code == 200
    (first, second, *_) = await get_instants(owner, workflow_id)
    assert abs(first - datetime.now(UTC) - HOUR / 2) < timedelta(seconds=30)
    assert second - first == HOUR / 2


@pytest.mark.every_database
async def test_schedules_of_paused_and_deleted_workflows_have_no_instants_and_miss_none(
    harness: GatewayHarness, people: OrganizationUsers
) -> None:
    owner = people.owner
    workflow_id = await create_active_workflow(owner, {"intervalSeconds": 60})
    due_at = (await get_instants(owner, workflow_id))[0]
    status = f"/api/v1/workflows/{workflow_id}/status"
    await owner.api.put(status, json={"status": "paused"})
    assert (await get_schedule(owner, workflow_id))["inactiveReason"] == "paused"
    assert await tick(harness, due_at + HOUR) == 0
    assert (await get_schedule(owner, workflow_id))["lastPassedOver"] is None
    began = datetime(2026, 1, 1, tzinfo=UTC)  # a long pause
    await change(harness, update(Schedule).values(anchor_at=began, planned_at=began))
    paused_at = datetime.now(UTC)
    passed_over = (await get_schedule(owner, workflow_id))["lastPassedOver"]
    assert passed_over["reason"] == "paused"
    assert abs(paused_at - datetime.fromisoformat(passed_over["at"])) <= timedelta(minutes=1)
    await owner.api.put(status, json={"status": "active"})
    stored = (await get_schedule(owner, workflow_id))["lastPassedOver"]
    assert (stored["reason"], stored["at"] >= passed_over["at"]) == ("paused", True)
    before = datetime.now(UTC)
    (first, *_) = await get_instants(owner, workflow_id)
    assert before < first <= datetime.now(UTC) + timedelta(minutes=1)
    await owner.api.delete(f"/api/v1/workflows/{workflow_id}")
    assert await tick(harness, first + HOUR) == 0
    assert await read_runs(harness, workflow_id) == []


async def test_a_workflow_without_a_usable_schedule_says_so(people: OrganizationUsers) -> None:
    admin = people.admin
    plain = await get_schedule(admin, await admin.create())
    assert (plain["isActive"], plain["inactiveReason"], plain["nextRuns"]) == (False, "no-schedule", [])
    for wrong in ({"cron": "* * * * *", "timezone": ["UTC"]}, {"intervalSeconds": 1, "misfire": "whatever"}):
        assert (await get_schedule(admin, await admin.create(**schedule_graph(wrong))))["problem"]
    impossible = await admin.create(**schedule_graph({"cron": "0 0 30 2 *", "timezone": "Mars"}))
    schedule = await get_schedule(admin, impossible)
    assert (schedule["inactiveReason"], schedule["policy"]) == ("draft", None)
    assert schedule["problem"]
    response = await admin.api.put(f"/api/v1/workflows/{impossible}/status", json={"status": "active"})
    assert_refused(response, 422, "validation-failed")
    (cron, zone) = [detail["message"] for detail in response.json()["error"]["details"]]
    assert "cron: must be a cron expression of five fields" in cron
    assert "timezone: must be an IANA time zone" in zone
    template = await create_active_workflow(admin, HOURLY)
    await admin.api.put(f"/api/v1/workflows/{template}/visibility", json={"isTemplate": True})
    assert (await get_schedule(admin, template))["inactiveReason"] == "template"


# ── started runs ────────────────────────────────────────────────────────────────────────────────────────────


async def test_a_run_has_its_instant_and_is_its_owners(
    harness: GatewayHarness, people: OrganizationUsers
) -> None:
    workflow_id = await create_active_workflow(people.owner, {**HOURLY, "timezone": "Europe/Berlin"})
    (first, second, *_) = await get_instants(people.owner, workflow_id)
    assert await tick(harness, first - timedelta(milliseconds=1)) == 0
    assert await tick(harness, first + timedelta(milliseconds=700)) == 1
    assert await tick(harness, first + timedelta(seconds=1)) == 0
    (run,) = await read_runs(harness, workflow_id)
    assert (run.trigger_type, run.user_id, run.status) == ("schedule", people.owner.user.id, "pending")
    assert (run.target, run.assigned_deployment_id, run.total_nodes) == (SHARED_TARGET, None, 2)
    response = await people.owner.api.get(f"/api/v1/executions/{run.id}")
    assert response.json()["trigger"]["data"] == {
        "scheduledAt": first.isoformat(timespec="milliseconds").replace("+00:00", "Z"),
        "timezone": "Europe/Berlin",
    }
    async with harness.gateway.database.read() as connection:
        stored = select(col(Definition.body)).where(col(Definition.hash) == run.definition_hash)
        assert '"schedule-trigger"' in (await connection.scalar(stored) or "")
    schedule = await get_schedule(people.owner, workflow_id)
    assert schedule["lastRun"]["executionId"] == run.id
    assert datetime.fromisoformat(schedule["lastRun"]["scheduledAt"]) == first
    assert schedule["lastRun"]["status"] == "pending"
    assert datetime.fromisoformat(schedule["nextRuns"][0]["at"]) == second


async def test_two_schedulers_start_each_instant_once(
    harness: GatewayHarness, people: OrganizationUsers
) -> None:
    workflow_ids = [await create_active_workflow(people.owner, {"intervalSeconds": 30}) for _ in range(8)]
    starts = [(await get_instants(people.owner, workflow_id))[0] for workflow_id in workflow_ids]
    other = Database(harness.gateway.database.url)
    now = max(starts)
    for step in range(4):
        moment = now + step * timedelta(seconds=20)
        await asyncio.gather(
            *(tick(harness, moment, database) for database in (harness.gateway.database, other) * 2)
        )
    # Schedules locked by one of them, or lost in a race, stay unclaimed until the next tick.
    await tick(harness, now + timedelta(seconds=60))
    await other.close()
    for workflow_id, first in zip(workflow_ids, starts, strict=True):
        expected = [
            first + turn * timedelta(seconds=30)
            for turn in range(4)
            if first + turn * timedelta(seconds=30) <= now + timedelta(seconds=60)
        ]
        assert Counter(await read_instants(harness, workflow_id)) == Counter(expected)


async def test_an_edit_that_began_before_an_instant_ran_does_not_repeat_it(
    harness: GatewayHarness, people: OrganizationUsers
) -> None:
    workflow_id = await create_active_workflow(people.owner, HOURLY)
    (first, *_) = await get_instants(people.owner, workflow_id)
    assert await tick(harness, first) == 1
    edit = schedule_graph({"cron": "0,30 * * * *"})
    assert (await people.owner.api.put(f"/api/v1/workflows/{workflow_id}", json=edit)).status_code == 200
    assert await tick(harness, first + timedelta(seconds=1)) == 0
    assert (await get_instants(people.owner, workflow_id))[0] == first + HOUR / 2


async def test_one_that_dies_before_its_commit_leaves_the_instant_to_the_next(
    harness: GatewayHarness, people: OrganizationUsers, monkeypatch: pytest.MonkeyPatch
) -> None:
    workflow_id = await create_active_workflow(people.owner, HOURLY)
    (first, *_) = await get_instants(people.owner, workflow_id)
    write = scheduled_runs._ScheduleWriter.write  # noqa: SLF001 - the last moment before the commit

    async def die(entrance: Any) -> None:  # noqa: ANN401 - the type of the patched method
        await write(entrance)
        raise SchedulerKilled

    with monkeypatch.context() as patch:
        patch.setattr(scheduled_runs._ScheduleWriter, "write", die)  # noqa: SLF001 - its commit is where it dies
        with pytest.raises(SchedulerKilled):
            await tick(harness, first)
    assert await read_runs(harness, workflow_id) == []
    assert await tick(harness, first) == 1
    assert await read_instants(harness, workflow_id) == [first]


async def test_one_that_dies_after_its_commit_leaves_nothing_to_the_next(
    harness: GatewayHarness, people: OrganizationUsers, monkeypatch: pytest.MonkeyPatch
) -> None:
    workflow_id = await create_active_workflow(people.owner, HOURLY)
    (first, *_) = await get_instants(people.owner, workflow_id)

    async def die(_broker: LocalBroker) -> None:
        raise SchedulerKilled

    with monkeypatch.context() as patch:
        patch.setattr(LocalBroker, "wake_workers", die)
        with pytest.raises(SchedulerKilled):
            await tick(harness, first)
    assert await tick(harness, first + timedelta(seconds=1)) == 0
    assert await read_instants(harness, workflow_id) == [first]


@pytest.mark.parametrize(
    ("policy", "expected"),
    [({"misfire": "skip"}, 0), ({}, 1), ({"misfire": "run-all", "misfireLimit": 3}, 3)],
)
async def test_the_misfire_policy_applies_after_a_week_without_a_scheduler(
    harness: GatewayHarness, people: OrganizationUsers, policy: dict[str, Any], expected: int
) -> None:
    workflow_id = await create_active_workflow(people.owner, {**HOURLY, **policy})
    (first, *_) = await get_instants(people.owner, workflow_id)
    last = first + timedelta(weeks=1)
    assert await tick(harness, last + HOUR / 2) == expected
    assert await read_instants(harness, workflow_id) == [
        last - turn * HOUR for turn in reversed(range(expected))
    ]
    schedule = await get_schedule(people.owner, workflow_id)
    assert schedule["lastPassedOver"]["reason"] == "missed"
    assert await tick(harness, last + HOUR) == 1


async def test_a_run_that_goes_on_has_the_next_passed_over_or_wait_for_its_turn(
    harness: GatewayHarness, people: OrganizationUsers
) -> None:
    skipping = await create_active_workflow(people.owner, {**HOURLY, "overlap": "skip"})
    queueing = await create_active_workflow(people.owner, {**HOURLY, "overlap": "queue"})
    limited = await create_active_workflow(
        people.owner, {**HOURLY, "overlap": "queue"}, settings={"concurrency": {"limit": 5}}
    )
    (first, second, third, *_) = await get_instants(people.owner, skipping)
    assert await tick(harness, first) == 3
    assert await tick(harness, second) == 2
    schedule = await get_schedule(people.owner, skipping)
    assert schedule["lastPassedOver"]["reason"] == "overlap"
    assert datetime.fromisoformat(schedule["lastPassedOver"]["at"]) == second
    for workflow_id in (queueing, limited):
        assert [run.target for run in await read_runs(harness, workflow_id)] == [
            SHARED_TARGET,
            LIMITED_TARGET,
        ]
    await end(harness, skipping)
    assert await tick(harness, third) == 3
    assert await read_instants(harness, skipping) == [first, third]
    assert await read_instants(harness, queueing) == [first, second, third]


async def test_a_limit_of_the_workflow_that_refuses_further_runs_has_instants_passed_over(
    harness: GatewayHarness, people: OrganizationUsers
) -> None:
    settings = {"concurrency": {"limit": 1, "onLimit": "reject"}}
    workflow_id = await create_active_workflow(people.owner, HOURLY, settings=settings)
    (first, second, *_) = await get_instants(people.owner, workflow_id)
    assert (await tick(harness, first), await tick(harness, second)) == (1, 0)
    assert (await get_schedule(people.owner, workflow_id))["lastPassedOver"]["reason"] == "concurrency-limit"
    (run,) = await read_runs(harness, workflow_id)
    assert run.target == SHARED_TARGET


@pytest.mark.every_database
async def test_a_deployed_version_is_run_by_its_pods_as_it_was_deployed(
    harness: GatewayHarness, people: OrganizationUsers
) -> None:
    workflow_id = await create_active_workflow(people.owner, HOURLY)
    (first, second, *_) = await get_instants(people.owner, workflow_id)
    assert await tick(harness, first) == 1
    (own,) = await read_runs(harness, workflow_id)
    await deploy_with_pod(harness, people.owner, workflow_id, definition_hash=own.definition_hash)
    edit = schedule_graph(HOURLY, label="Another step")
    assert (await people.owner.api.put(f"/api/v1/workflows/{workflow_id}", json=edit)).status_code == 200
    assert await tick(harness, second) == 1
    (_, run) = await read_runs(harness, workflow_id)
    assert (run.target, run.assigned_deployment_id, run.definition_hash) == (
        workflow_id,
        workflow_id,
        own.definition_hash,
    )


async def test_a_run_has_the_default_model_of_its_instant(
    harness: GatewayHarness, people: OrganizationUsers
) -> None:
    """The definition is not kept from an earlier run, though the workflow is the same."""
    trigger = {"id": "clock", "nodeId": "schedule-trigger", "config": HOURLY}
    step = {"id": STEP["id"], "nodeId": "llm", "config": {"model": "default", "prompt": "Hi"}}
    graph = {"nodes": [trigger, step], "connections": [{**EDGE, "sourceNodeId": "clock"}]}
    settings = "/api/v1/ai/settings"
    assert (await people.admin.api.put(settings, json={"defaultModelId": "echo"})).status_code == 200
    workflow_id = await people.owner.create(**graph, status="active")
    (first, second, *_) = await get_instants(people.owner, workflow_id)
    broker = await connect_broker(None)
    present = [first]
    moment = bindparam("moment", callable_=lambda: to_microseconds(present[0]), type_=BigInteger())
    schedules = ScheduleRunner(harness.gateway.database, broker, catalog.load_catalog(), moment)
    assert await schedules.start_due() == 1
    await end(harness, workflow_id)
    is_ours = col(AiSettings.organization_id) == people.admin.user.organization_id
    await change(harness, update(AiSettings).where(is_ours).values(default_model_id="model_later"))
    present[0] = second
    assert await schedules.start_due() == 1
    await broker.close()
    hashes = [run.definition_hash for run in await read_runs(harness, workflow_id)]
    assert len({*hashes}) == 2


@pytest.mark.every_database
async def test_a_schedule_that_cannot_be_followed_is_put_off_and_keeps_no_other_from_its_runs(
    harness: GatewayHarness, people: OrganizationUsers
) -> None:
    broken, lost, sound = [await create_active_workflow(people.owner, HOURLY) for _ in range(3)]
    (first, *_) = await get_instants(people.owner, sound)
    elsewhere = {"cron": "0 * * * *", "timezone": "Mars/Olympus"}
    of_broken = col(WorkflowTrigger.workflow_id) == broken
    await change(harness, update(WorkflowTrigger).where(of_broken).values(config=elsewhere))
    await deploy_with_pod(harness, people.owner, lost, definition_hash="1" * 64)
    assert await tick(harness, first) == 1
    assert await tick(harness, first + timedelta(seconds=1)) == 0
    schedule = await get_schedule(people.owner, lost)
    assert (schedule["isActive"], schedule["inactiveReason"]) == (False, "invalid-schedule")
    assert "not stored" in schedule["problem"]
    # Mended, it is run when it is looked at again.
    await change(harness, update(WorkflowTrigger).where(of_broken).values(config=HOURLY))
    assert await tick(harness, first + timedelta(minutes=2)) == 1
    assert await read_instants(harness, broken) == [first]
    assert (await get_schedule(people.owner, broken))["isActive"]


@pytest.mark.every_database
async def test_a_clock_that_was_far_ahead_keeps_nothing_from_being_run_once_it_is_right(
    harness: GatewayHarness, people: OrganizationUsers
) -> None:
    workflow_id = await create_active_workflow(people.owner, HOURLY)
    (first, second, *_) = await get_instants(people.owner, workflow_id)
    ahead = first + timedelta(days=400)
    assert await tick(harness, ahead) == 1
    assert await tick(harness, second) == 0
    async with run_scheduler(harness, first + HOUR / 2) as schedules:
        await schedules.reset_ahead()
    assert await tick(harness, second) == 1
    assert await read_instants(harness, workflow_id) == [second, ahead]


@pytest.mark.every_database
async def test_a_due_schedule_of_an_inactive_workflow_does_not_start(
    harness: GatewayHarness, people: OrganizationUsers
) -> None:
    workflow_id = await create_active_workflow(people.owner, HOURLY)
    (first, *_) = await get_instants(people.owner, workflow_id)
    await change(harness, update(Workflow).where(col(Workflow.id) == workflow_id).values(status="paused"))
    assert await tick(harness, first) == 0
    async with harness.gateway.database.read() as connection:
        due_at = select(col(Schedule.due_at)).where(col(Schedule.workflow_id) == workflow_id)
        assert await connection.scalar(due_at) is None


@pytest.mark.every_database
async def test_due_runs_are_found_by_an_index(harness: GatewayHarness) -> None:
    plan = await query_plans.explain_statement(
        harness.gateway.database, scheduled_runs.due_statement(DatabaseTime())
    )
    assert "ix_schedule_due" in plan
    assert "SCAN workflow" not in plan
    assert "Seq Scan" not in plan


# ── locks of others ─────────────────────────────────────────────────────────────────────────────────────────


async def test_locked_concurrency_slots_delay_no_schedule_of_other_workflows(
    harness: GatewayHarness, people: OrganizationUsers, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {"concurrency": {"limit": 1, "onLimit": "reject"}}
    locked, other = [await create_active_workflow(people.owner, HOURLY, settings=settings) for _ in range(2)]
    url = harness.gateway.database.url
    lock = "SELECT pg_advisory_xact_lock($1)"
    async with (
        open_impatient_database(url, monkeypatch) as database,
        hold_transaction_open(url, lock, concurrency_limits.advisory_lock_id(locked)),
    ):
        assert await require_prompt(tick(harness, datetime.now(UTC) + HOUR, database)) == 1
        assert len(await read_runs(harness, other)) == 1
    assert await tick(harness, datetime.now(UTC) + HOUR) == 1
    assert len(await read_runs(harness, locked)) == 1
