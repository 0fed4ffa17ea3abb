"""Explanations over HTTP: of a run, a workflow, and the runs of an organization."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from functools import partial
from typing import Any

import pytest
from sqlalchemy import delete, func, insert, select, text, update
from sqlalchemy.ext.asyncio import AsyncConnection
from sqlmodel import col

from execution import due_runs
from journal import concurrency_limits, process_presence, wake_times, worker_presence
from journal.explanations import run_counts
from models import ids
from models.access import Organization
from models.blocked_interval import BlockedInterval
from models.database_time import read_database_time
from models.deployment import LifecycleDecision
from models.execution import Execution, Leadership
from models.schema_migration import HEAD_REVISION
from models.workflow import WorkflowShare
from telemetry.process_activity import ACTIVITY
from tests.integration.gateway_harness import (
    GRAPH,
    GatewayHarness,
    OrganizationUsers,
    UserClient,
    assert_refused,
)
from tests.integration.query_plans import explain_statement


async def start(person: UserClient, workflow_id: str) -> str:
    answer = await person.api.post(f"/api/v1/workflows/{workflow_id}/execute", json={})
    assert answer.status_code == 201, answer.text
    execution_id: str = answer.json()["executionId"]
    return execution_id


async def why(person: UserClient, subject: str) -> dict[str, Any]:
    answer = await person.api.get(f"/api/v1/{subject}/why".replace("//why", "/why"))
    assert answer.status_code == 200, answer.text
    explained: dict[str, Any] = answer.json()
    return explained


@pytest.fixture(scope="module", autouse=True)
def _no_failures() -> None:
    """Forget the failures of connections in tests of other files, before a gateway here reports them as its own."""
    ACTIVITY.connections.clear()


async def test_a_run_without_a_worker_says_so_and_a_worker_ends_it(
    harness: GatewayHarness, people: OrganizationUsers
) -> None:
    workflow_id = await people.owner.create(**GRAPH, status="active")
    execution_id = await start(people.owner, workflow_id)
    before = await why(people.owner, f"executions/{execution_id}")
    assert before["primary"] == "no-worker"
    assert before["blockers"][0]["kind"] == "escalate"
    assert before["blockers"][0]["details"] == {"queue": "shared", "lastSeen": None}
    assert before["timing"]["waitingFor"]["no-worker"] > 0

    database = harness.gateway.database

    async def report(connection: AsyncConnection) -> None:
        await worker_presence.store_presence(connection, owner="worker:a/1", concurrency=5, held_runs=0)

    await database.transaction(report)
    after = await why(people.owner, f"executions/{execution_id}")
    assert (after["primary"], after["progressing"], after["blockers"]) == ("none", True, [])

    second = await start(people.owner, workflow_id)
    behind = await why(people.owner, f"executions/{second}")
    assert (behind["primary"], behind["blockers"][0]["position"]) == ("queued-behind", 2)

    async def end(connection: AsyncConnection) -> None:
        await worker_presence.end_presence(connection, owner="worker:a/1")

    await database.transaction(end)
    assert (await why(people.owner, f"executions/{second}"))["primary"] == "no-worker"


@pytest.mark.every_database
async def test_a_run_shows_the_phases_of_the_wake_before_it(
    harness: GatewayHarness, people: OrganizationUsers
) -> None:
    workflow_id = await people.owner.create(**GRAPH, status="active")
    execution_id = await start(people.owner, workflow_id)
    assert (await why(people.owner, f"executions/{execution_id}"))["wake"] is None
    now = harness.gateway.clock().replace(microsecond=0)
    await record_wake(harness, people.owner, workflow_id, execution_id, now)
    await record_foreign_decision(harness, people.stranger, now + timedelta(seconds=2))
    shown = (await why(people.owner, f"executions/{execution_id}"))["wake"]
    assert shown["asleepSince"] == stamp(now - timedelta(hours=1))
    assert (shown["decidedAt"], shown["reason"]) == (stamp(now + timedelta(seconds=1)), "run-due")
    assert shown["podStartedAt"] == stamp(now + timedelta(seconds=2))
    assert shown["claimedAt"] == stamp(now + timedelta(seconds=3))
    assert shown["firstNodeAt"] is None
    browser = await harness.browser()
    assert (await browser.post("/session", json={"key": people.owner.key})).status_code == 201
    page = await browser.get(f"/dashboard/runs/{execution_id}")
    for word in ("Wake of its pod", "Pod asked for", "run-due", "+ 1 s"):
        assert word in page.text


async def record_wake(
    harness: GatewayHarness, person: UserClient, workflow_id: str, execution_id: str, now: datetime
) -> None:
    """Store a wake of a run that was accepted now: decided, started and claimed a second after another."""
    of_organization = {"organization_id": person.user.organization_id, "shard": person.user.shard}
    decision = {"workflow_id": workflow_id, "inputs": {}, **of_organization}
    stop = {"action": "stop", "reason": "idle", "replicas": 0, "at": now - timedelta(hours=1)}
    wake = {"action": "wake", "reason": "run-due", "replicas": 1, "at": now + timedelta(seconds=1)}
    later = {"action": "stop", "reason": "idle", "replicas": 0, "at": now + timedelta(hours=1)}
    again = {"action": "wake", "reason": "request", "replicas": 1, "at": now + timedelta(hours=2)}
    waking = {"started_at": now, "code": "waking", "execution_id": execution_id, **of_organization}
    times = {"pod_started_at": now + timedelta(seconds=2), "ended_at": now + timedelta(seconds=3)}

    async def record(connection: AsyncConnection) -> None:
        for one in (stop, wake, later, again):
            row = {"id": ids.new_id("dec"), **decision, **one}
            await connection.execute(insert(LifecycleDecision).values(row))
        await connection.execute(insert(BlockedInterval).values(**waking, **times))

    await harness.gateway.database.transaction(record)


async def record_foreign_decision(harness: GatewayHarness, person: UserClient, at: datetime) -> None:
    """Store a decision to start the pods of another workflow."""
    elsewhere = {"workflow_id": await person.create(**GRAPH), "inputs": {}, "replicas": 1, "at": at}
    elsewhere |= {"organization_id": person.user.organization_id, "shard": person.user.shard}
    start = {"id": ids.new_id("dec"), "action": "start", "reason": "requested", **elsewhere}

    async def record(connection: AsyncConnection) -> None:
        await connection.execute(insert(LifecycleDecision).values(start))

    await harness.gateway.database.transaction(record)


def stamp(moment: datetime) -> str:
    return moment.isoformat(timespec="milliseconds").replace("+00:00", "Z")


@pytest.mark.every_database
async def test_a_holder_that_the_caller_may_not_see_loses_its_id(
    harness: GatewayHarness, people: OrganizationUsers
) -> None:
    settings = {"concurrency": {"limit": 1}}
    workflow_id = await people.owner.create(**GRAPH, status="active", settings=settings)
    holder = await start(people.owner, workflow_id)
    # Admission skips locked rows: it must be over before the row changes below.
    await concurrency_limits.admit_waiting_runs(harness.gateway.database, workflow_id)
    blocked = await start(people.owner, workflow_id)

    async def work(connection: AsyncConnection) -> None:
        hide = update(Execution).where(col(Execution.id) == holder).values(is_private=True)
        await connection.execute(hide)
        share = {
            "workflow_id": workflow_id,
            "user_id": people.colleague.user.id,
            "shared_at": datetime.now(UTC),
        }
        await connection.execute(insert(WorkflowShare).values(share))

    await harness.gateway.database.transaction(work)
    for person, shown in ((people.owner, holder), (people.colleague, None)):
        (blocker,) = (await why(person, f"executions/{blocked}"))["blockers"]
        assert blocker["code"] == "waiting-for-slot"
        assert [one["id"] for one in blocker["by"]] == [shown]
        assert (blocker["position"], len(blocker["actions"])) == (1, 0 if shown is None else 1)
    assert (await people.stranger.api.get(f"/api/v1/executions/{blocked}/why")).status_code == 404


@pytest.mark.every_database
async def test_a_workflow_says_why_its_pods_are_up_or_down(
    harness: GatewayHarness, people: OrganizationUsers
) -> None:
    workflow_id = await people.owner.create(**GRAPH, status="active")
    path = f"/api/v1/workflows/{workflow_id}"
    absent = await why(people.owner, f"workflows/{workflow_id}")
    assert (absent["deploymentStatus"], absent["reason"]) == ("not-deployed", "not-deployed")
    assert [one["path"] for one in absent["actions"]] == [f"{path}/deploy"]
    assert absent["primary"] == "none"

    assert (await people.owner.api.post(f"{path}/deploy")).status_code == 202
    starting = await why(people.owner, f"workflows/{workflow_id}")
    assert (starting["primary"], starting["lastDecision"]["reason"]) == ("waking", "deployed")
    assert starting["lastDecision"]["userId"] == people.owner.user.id

    execution_id = await start(people.owner, workflow_id)

    async def work(connection: AsyncConnection) -> None:
        to_pods = {"target": workflow_id, "assigned_deployment_id": workflow_id}
        await connection.execute(update(Execution).where(col(Execution.id) == execution_id).values(to_pods))

    await harness.gateway.database.transaction(work)
    assert (await why(people.owner, f"executions/{execution_id}"))["primary"] == "waking"
    counts = await why(people.owner, "")
    assert {one["code"]: one["count"] for one in counts["reasons"]} == {"waking": 1}

    assert (await people.owner.api.put(f"{path}/lifecycle", json={"type": "always-on"})).status_code == 200
    assert (await people.owner.api.post(f"{path}/stop")).status_code in {200, 202}
    await due_runs.wake_due_deployments(harness.gateway.database, harness.gateway.broker)
    stopped = await why(people.owner, f"workflows/{workflow_id}")
    assert (stopped["primary"], stopped["stoppedReason"]) == ("stopped-manually", "manual")
    assert (await why(people.owner, f"executions/{execution_id}"))["primary"] == "stopped-manually"
    reason = await await_reason(people.owner, "stopped-manually")
    assert (reason["count"], reason["until"]) == (1, None)
    assert await list_by_reason(people.owner, "stopped-manually") == [execution_id]
    assert await list_by_reason(people.owner, "waking") == []

    soon = datetime.now(UTC) + timedelta(hours=36)
    window = {"days": [soon.isoweekday() % 7], "startTime": "08:00", "endTime": "09:00"}
    policy = {"type": "scheduled-window", "schedule": {"timezone": "UTC", "windows": [window]}}
    assert (await people.owner.api.put(f"{path}/lifecycle", json=policy)).status_code == 200
    reason = await await_reason(people.owner, "window-closed")
    assert reason["until"] == f"{soon:%Y-%m-%d}T08:00:00.000Z"
    assert await list_by_reason(people.owner, "window-closed,waking") == [execution_id]

    assert (await people.owner.api.put(f"{path}/status", json={"status": "paused"})).status_code == 200
    assert (await why(people.owner, f"workflows/{workflow_id}"))["primary"] == "workflow-paused"


@pytest.mark.every_database
async def test_counts_cover_every_unfinished_run_of_the_organization_alone(
    harness: GatewayHarness, people: OrganizationUsers
) -> None:
    limited = await people.owner.create(**GRAPH, status="active", settings={"concurrency": {"limit": 1}})
    free = await people.owner.create(**GRAPH, status="active")
    started = [await start(people.owner, limited)]
    await concurrency_limits.admit_waiting_runs(harness.gateway.database, limited)
    started += [await start(people.owner, limited) for _ in range(2)]
    started += [await start(people.owner, free) for _ in range(3)]
    running, lost, ending = started[-3:]

    async def work(connection: AsyncConnection) -> None:
        soon, past = datetime.now(UTC) + timedelta(minutes=1), datetime.now(UTC) - timedelta(minutes=1)
        for execution_id, lease_until, request in (
            (running, soon, None),
            (lost, past, None),
            (ending, soon, "stop"),
        ):
            changes = {"status": "running", "lease_until": lease_until, "request": request}
            await connection.execute(
                update(Execution).where(col(Execution.id) == execution_id).values(changes)
            )

    await harness.gateway.database.transaction(work)
    counts = await why(people.owner, "")
    assert {one["code"]: one["count"] for one in counts["reasons"]} == {
        "no-worker": 1,
        "waiting-for-slot": 2,
        "node-running": 1,
        "worker-lost": 1,
        "cancel-requested": 1,
    }
    for reason in counts["reasons"]:
        assert reason["oldestSince"] is not None
        assert not reason["countIsLowerBound"]
        assert len(await list_by_reason(people.owner, reason["code"])) == reason["count"]
    assert sorted(await list_by_reason(people.owner, "no-worker,waiting-for-slot")) == sorted(started[:3])
    assert await list_by_reason(people.owner, "no-worker", status="running") == []
    assert await list_by_reason(people.stranger, "no-worker") == []
    assert (await why(people.stranger, ""))["reasons"] == []


async def test_private_runs_are_in_neither_the_counts_nor_the_list_by_reason(
    harness: GatewayHarness, people: OrganizationUsers
) -> None:
    workflow_id = await people.owner.create(**GRAPH, status="active")
    soon = datetime.now(UTC) + timedelta(hours=1)
    states: Sequence[dict[str, Any]] = (
        {"status": "pending"},
        {"status": "running", "lease_until": soon},
        {"status": "waiting", "due_at": soon, "target": "delayed"},
        {"status": "waiting", "started_at": datetime.now(UTC)},
    )
    public = [await start(people.owner, workflow_id) for _ in states]
    private = [await start(people.owner, workflow_id) for _ in states]

    async def change(connection: AsyncConnection) -> None:
        for is_private, started in ((False, public), (True, private)):
            for execution_id, state in zip(started, states, strict=True):
                of_run = update(Execution).where(col(Execution.id) == execution_id)
                await connection.execute(of_run.values(is_private=is_private, **state))
            interval = BlockedInterval(
                execution_id=started[-1],
                started_at=datetime.now(UTC),
                shard=people.owner.user.shard,
                organization_id=people.owner.user.organization_id,
                code="awaiting-input",
            )
            await connection.execute(insert(BlockedInterval).values(interval.model_dump()))

    await harness.gateway.database.transaction(change)
    codes = ("no-worker", "node-running", "timer", "awaiting-input")
    for person in (people.admin, people.owner):
        counts = await why(person, "")
        assert {one["code"]: one["count"] for one in counts["reasons"]} == dict.fromkeys(codes, 1)
        for code, execution_id in zip(codes, public, strict=True):
            assert await list_by_reason(person, code) == [execution_id]
    hidden = people.owner.user.organization_id
    plan = await explain_statement(harness.gateway.database, run_counts.live_private_statement(hidden))
    assert "ix_execution_private" in plan


async def await_reason(person: UserClient, code: str) -> dict[str, Any]:
    """Return the only reason of an organization's runs once it has this code: an answer is given for a second."""
    while True:
        reason: dict[str, Any]
        [reason] = (await why(person, ""))["reasons"]
        if reason["code"] == code:
            return reason
        await asyncio.sleep(0.1)


async def list_by_reason(person: UserClient, reason: str, **filters: str) -> list[str]:
    """Return the ids of the runs that wait for a reason, which both ways to page through a list agree on."""
    query = {"reason": reason, "limit": "50", **filters}
    by_offset = (await person.api.get("/api/v1/executions", params=query)).json()
    by_cursor = (await person.api.get("/api/v1/executions", params={**query, "after": "start"})).json()
    found = [one["id"] for one in by_offset["executions"]]
    assert found == [one["id"] for one in by_cursor["executions"]]
    assert by_offset["count"] == by_cursor["count"] == len(found)
    return found


async def make_operator(harness: GatewayHarness, people: OrganizationUsers) -> None:
    """Make the organization of these users the oldest, which is the operator's."""

    async def predate(connection: AsyncConnection) -> None:
        oldest = await connection.scalar(select(func.min(col(Organization.created_at))))
        assert oldest is not None
        await connection.execute(
            update(Organization)
            .where(col(Organization.id) == people.admin.user.organization_id)
            .values(created_at=oldest - timedelta(days=1))
        )

    await harness.gateway.database.transaction(predate)


async def test_the_numbers_of_all_workers_are_for_the_organization_of_the_operator(
    harness: GatewayHarness, people: OrganizationUsers
) -> None:
    await make_operator(harness, people)
    store = partial(worker_presence.store_presence, owner="worker:why/1", concurrency=5, held_runs=5)
    await harness.gateway.database.transaction(store)
    workers = (await why(people.owner, ""))["workers"]
    assert workers["present"] >= 1
    assert workers["heldRuns"] <= workers["concurrency"]
    of_others = (await why(people.stranger, ""))["workers"]
    assert [of_others[name] for name in ("present", "concurrency", "heldRuns")] == [None] * 3
    assert of_others["state"] in {"free", "full"}


@pytest.mark.every_database
async def test_an_admin_sees_processes_and_sizes_of_the_database(
    harness: GatewayHarness, people: OrganizationUsers
) -> None:
    path, owner = "/api/v1/admin/health", "worker:health/1"
    database = harness.gateway.database

    async def report(connection: AsyncConnection) -> None:
        await worker_presence.store_presence(
            connection, owner=owner, concurrency=5, held_runs=2, loop_lag_ms=1_250
        )

    async def report_all_roles(connection: AsyncConnection) -> None:
        ended = {"name": "health", "owner": "a", "epoch": 1, "lease_until": datetime(2000, 1, 1, tzinfo=UTC)}
        await connection.execute(insert(Leadership).values(ended))
        await worker_presence.store_presence(connection, owner="dev_health", concurrency=5, held_runs=0)

    async def forget_all_roles(connection: AsyncConnection) -> None:
        await connection.execute(delete(Leadership).where(col(Leadership.name) == "health"))
        await worker_presence.end_presence(connection, owner="dev_health")

    async def show_worker() -> list[dict[str, Any]]:
        health = (await people.admin.api.get(path)).json()
        return [one for one in health["processes"] if one["name"] == owner]

    await make_operator(harness, people)
    await database.transaction(report)
    await database.transaction(
        partial(process_presence.store_process, owner="gateway:health", role="gateway")
    )
    health = (await people.admin.api.get(path)).json()
    gateway = health["processes"][0]
    assert (gateway["role"], gateway["version"], gateway["isPresent"]) == ("gateway", health["version"], True)
    [worker] = await show_worker()
    assert (worker["role"], worker["version"], worker["isPresent"]) == ("worker", health["version"], True)
    assert (worker["heldRuns"], worker["concurrency"]) == (2, 5)
    assert (worker["host"], worker["loopLagMs"]) == (socket.gethostname(), 1_250)
    assert (gateway["host"], gateway["loopLagMs"]) == (socket.gethostname(), 0)
    assert gateway["startedAt"] is not None
    states = {one["name"]: one["state"] for one in health["alerts"]}
    assert (states["EventLoopBlocked"], states["NoWorker"], states["CommitsSlow"]) == (
        "firing",
        "quiet",
        "unknown",
    )
    # A server of one process needs no lead, also on the database of one whose scheduler led before.
    await database.transaction(report_all_roles)
    states = {one["name"]: one["state"] for one in (await people.admin.api.get(path)).json()["alerts"]}
    assert states["NoLeader"] == "quiet"
    sizes = [one["bytes"] for one in health["database"]["tables"]]
    names = {one["name"] for one in health["database"]["tables"]}
    assert health["database"]["revision"] == HEAD_REVISION
    assert health["database"]["programRevision"] == HEAD_REVISION
    assert health["database"]["bytes"] > 0
    assert sizes == sorted(sizes, reverse=True)
    assert ("execution" in names) is (health["database"]["kind"] == "postgresql")
    assert health["brokerLatencyMs"] is not None
    # The work of all organizations is in processes, figures and sizes: admins of others see none.
    elsewhere = (await people.stranger.api.get(path)).json()
    assert (elsewhere["isOperator"], elsewhere["processes"], elsewhere["alerts"]) == (False, [], [])
    assert (elsewhere["database"]["bytes"], elsewhere["database"]["tables"]) == (None, [])
    assert elsewhere["figures"] is None
    assert elsewhere["lead"]["name"] is None
    assert (await people.admin.api.get(path)).json()["lead"]["name"]
    assert elsewhere["database"]["revision"] == HEAD_REVISION
    # A worker that has ended in order is no process of the server any more.
    await database.transaction(partial(worker_presence.end_presence, owner=owner))
    await database.transaction(forget_all_roles)
    await database.transaction(partial(process_presence.forget_process, owner="gateway:health"))
    assert await show_worker() == []
    assert_refused(await people.owner.api.get(path), 403, "admin-required")


@pytest.mark.every_database
async def test_figures_of_the_whole_server_add_up_reports_queues_and_wakes(
    harness: GatewayHarness, people: OrganizationUsers
) -> None:
    workflow_id = await people.owner.create(**GRAPH, status="active")
    run = await start(people.owner, workflow_id)
    await record_wake(harness, people.owner, workflow_id, run, harness.gateway.clock())
    owner = "worker:figures/1"
    activity: dict[str, Any] = {"claims": 12.5, "commits": 4.0, "commitSize": 3.0, "streams": 7}
    activity |= {"duties": {"count of the test": {"every": 5.0, "seconds": 0.25, "age": 2.0}}}
    activity |= {"retention": {"executions": 14, "events": 14}}

    async def report(connection: AsyncConnection) -> None:
        await worker_presence.store_presence(
            connection, owner=owner, concurrency=5, held_runs=2, activity=activity
        )

    await make_operator(harness, people)
    await harness.gateway.database.transaction(report)
    health = (await people.admin.api.get("/api/v1/admin/health")).json()
    [shown] = [one for one in health["processes"] if one["name"] == owner]
    assert shown["claimsPerSecond"] == 12.5
    [duty] = [one for one in health["duties"] if one["name"] == "count of the test"]
    assert (duty["everySeconds"], duty["seconds"]) == (5, 0.25)
    age = datetime.fromisoformat(shown["seenAt"]) - datetime.fromisoformat(duty["lastAt"])
    assert age == timedelta(seconds=2)
    schedule = await harness.browser()
    assert (await schedule.post("/session", json={"key": people.admin.key})).status_code == 201
    assert "count of the test" in (await schedule.get("/dashboard/schedule")).text
    figures = health["figures"]
    assert figures["claimsPerSecond"] >= 12.5
    assert figures["eventStreams"] >= 7
    assert figures["commitSize"] > 0
    assert {one["target"] for one in figures["queues"]} >= {"workers", "pods", "limited"}
    assert sum(one["count"] for one in figures["queues"] if one["target"] == "workers") >= 1
    phases = {one["phase"]: one for one in figures["wakes"]}
    assert list(phases) == ["decide", "start", "claim", "total"]
    assert all(one["count"] >= 1 and one["p50"] <= one["p95"] for one in phases.values())
    oldest = {one["kind"]: one for one in figures["retention"]}
    assert oldest["executions"]["days"] == 14
    assert oldest["executions"]["oldestAt"] is not None
    browser = await harness.browser()
    assert (await browser.post("/session", json={"key": people.admin.key})).status_code == 201
    page = (await browser.get("/dashboard/health")).text
    for word in ("claims a second", "open event streams", "for any worker", "To the start of the pod"):
        assert word in page
    assert "are kept for 14 days" in page
    await harness.gateway.database.transaction(partial(worker_presence.end_presence, owner=owner))


@pytest.mark.every_database
async def test_reports_show_queues_leases_and_failures_that_other_processes_know(
    harness: GatewayHarness, people: OrganizationUsers
) -> None:
    await start(people.owner, await people.owner.create(**GRAPH, status="active"))
    owner = "worker:reports/1"
    failed = {"failure": "ConnectionResetError: figures", "failureAge": 30.0}
    activity = {
        "queues": {"workers": None, "deployments": 3},
        "renewalAge": 4.0,
        "lead": {"owner": "scheduler_figures", "age": 600.0},
        "connections": {"kubernetes": {"ms": 4.5, "age": 1.0, **failed}, "broker": failed},
    }

    async def report(connection: AsyncConnection) -> None:
        until = await read_database_time(connection) + timedelta(hours=1)
        lead = {"name": "figures", "owner": "scheduler_figures", "epoch": 1, "lease_until": until}
        await connection.execute(insert(Leadership).values(lead))
        await worker_presence.store_presence(
            connection, owner=owner, concurrency=5, held_runs=2, activity=activity
        )

    async def forget(connection: AsyncConnection) -> None:
        await connection.execute(delete(Leadership).where(col(Leadership.name) == "figures"))
        await worker_presence.end_presence(connection, owner=owner)

    await make_operator(harness, people)
    await harness.gateway.database.transaction(report)
    health = (await people.admin.api.get("/api/v1/admin/health")).json()
    [shown] = [one for one in health["processes"] if one["name"] == owner]
    queues = {one["name"]: one["length"] for one in shown["queues"]}
    assert (queues["deployments"], queues["workers"] >= 1) == (3, True)
    seen_at = datetime.fromisoformat(shown["seenAt"])
    assert seen_at - datetime.fromisoformat(shown["leaseRenewedAt"]) == timedelta(seconds=4)
    assert seen_at - datetime.fromisoformat(health["lead"]["since"]) == timedelta(minutes=10)
    failure = health["cluster"].pop("lastFailure")
    assert seen_at - datetime.fromisoformat(failure.pop("at")) == timedelta(seconds=30)
    assert failure == {"message": failed["failure"], "role": "worker", "host": socket.gethostname()}
    assert health["brokerLastFailure"]["message"] == failed["failure"]
    answered_at = datetime.fromisoformat(health["cluster"].pop("answeredAt"))
    assert seen_at - answered_at == timedelta(seconds=1)
    assert health["cluster"] == {"kind": "kubernetes", "latencyMs": 4.5}
    elsewhere = (await people.stranger.api.get("/api/v1/admin/health")).json()
    hidden = ("cluster", "brokerLastFailure")
    assert (*(elsewhere[name] for name in hidden), elsewhere["lead"]["since"]) == (None, None, None)
    browser = await harness.browser()
    assert (await browser.post("/session", json={"key": people.admin.key})).status_code == 201
    page = (await browser.get("/dashboard/health")).text
    for word in ("ConnectionResetError: figures", "Kubernetes: last answer", "a scheduler leads, since"):
        assert word in page
    await harness.gateway.database.transaction(forget)


@pytest.mark.every_database
async def test_the_operator_sees_the_workflows_with_the_most_runs(
    harness: GatewayHarness, people: OrganizationUsers
) -> None:
    ours = await people.owner.create(**GRAPH, name="Ours", status="active")
    theirs = await people.stranger.create(**GRAPH, name="Theirs", status="active")
    for person, workflow_id, runs in ((people.owner, ours, 40), (people.stranger, theirs, 30)):
        await asyncio.gather(*(start(person, workflow_id) for _ in range(runs)))
    await make_operator(harness, people)
    database = harness.gateway.database

    async def analyze(connection: AsyncConnection) -> None:
        await connection.execute(text("ANALYZE execution"))

    await database.transaction(analyze)
    listed = (await people.admin.api.get("/api/v1/admin/health")).json()["figures"]["largestWorkflows"]
    assert [one["runs"] for one in listed] == sorted((one["runs"] for one in listed), reverse=True)
    found = {one["workflowId"]: one for one in listed}
    assert (found[ours]["name"], found[ours]["runs"]) == ("Ours", 40)
    assert (found[theirs]["name"], found[theirs]["runs"]) == (None, 30)
    assert found[theirs]["organizationId"] == people.stranger.user.organization_id
    elsewhere = (await people.stranger.api.get("/api/v1/admin/health")).json()
    assert elsewhere["figures"] is None


async def test_wakes_are_timed_by_the_decisions_of_their_own_workflow(
    harness: GatewayHarness, people: OrganizationUsers
) -> None:
    workflow_id = await people.owner.create(**GRAPH, status="active")
    now = harness.gateway.clock().replace(microsecond=0) + timedelta(days=30)
    for number in range(2):
        run, accepted_at = await start(people.owner, workflow_id), now + timedelta(minutes=number)
        await record_wake(harness, people.owner, workflow_id, run, accepted_at)
        await record_foreign_decision(harness, people.stranger, accepted_at + timedelta(seconds=2.5))
    async with harness.gateway.database.read() as connection:
        times = await wake_times.read_wake_times(connection, now + timedelta(hours=1))
        earlier = await wake_times.read_wake_times(connection, now + timedelta(days=2))
    assert times == {"decide": [1, 1], "start": [1, 1], "claim": [1, 1], "total": [3, 3]}
    assert earlier == {"decide": [], "start": [], "claim": [], "total": []}
