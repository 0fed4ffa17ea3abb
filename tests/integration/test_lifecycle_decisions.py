"""Lifecycle decisions in the database: their inputs, their effects, and races."""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any

import pytest
from sqlalchemy import select, update
from sqlmodel import col

from journal.deployments import activity, wakes
from journal.deployments.activity import DecidedDeployment, DeploymentChanged, decide_by_policy
from models import lifecycle_policy
from models.deployment import Deployment, LifecycleDecision
from models.execution import Execution
from models.execution_status import ExecutionStatus
from models.lifecycle_policy import LifecycleAction, LifecycleReason, StoppedReason
from scheduler.lifecycle_policies import keep_policies
from tests.integration.deployed_workflows import deploy_with_pod, run
from tests.integration.gateway_harness import GRAPH, GatewayHarness, OrganizationUsers
from tests.integration.lock_holders import hold_transaction_open, open_impatient_database, require_prompt
from tests.integration.query_plans import explain_statement

if TYPE_CHECKING:
    from collections.abc import Sequence

    from sqlalchemy.ext.asyncio import AsyncConnection

    from journal.deployments.activity import DeploymentActivity

HOUR = timedelta(hours=1)
NONE, STOP, WAKE = LifecycleAction.NONE, LifecycleAction.STOP, LifecycleAction.WAKE


@pytest.fixture
async def workflow_id(people: OrganizationUsers) -> str:
    return await people.owner.create(**GRAPH)


async def read_activity(harness: GatewayHarness, workflow_id: str) -> DeploymentActivity:
    async with harness.gateway.database.read() as connection:
        found = await activity.read_activity(connection, workflow_id)
    assert found is not None
    return found


async def decide_now(harness: GatewayHarness, workflow_id: str) -> DecidedDeployment:
    found = await activity.decide_and_apply(harness.gateway.database, workflow_id, decide_by_policy)
    assert found is not None
    return found


async def read_decisions(harness: GatewayHarness, workflow_id: str) -> Sequence[LifecycleDecision]:
    statement = select(LifecycleDecision).where(col(LifecycleDecision.workflow_id) == workflow_id)
    async with harness.gateway.database.read() as connection:
        rows = await connection.execute(statement.order_by(col(LifecycleDecision.at)))
        return [LifecycleDecision(**row) for row in rows.mappings()]


async def test_an_idle_deployment_is_stopped_once_and_the_decision_is_kept_with_its_inputs(
    harness: GatewayHarness, people: OrganizationUsers, workflow_id: str
) -> None:
    before = await deploy_with_pod(harness, people.owner, workflow_id, replicas=3, last_replicas=3)
    both = await asyncio.gather(*(decide_now(harness, workflow_id) for _ in range(2)))
    assert sorted(one.decision.action for one in both) == [NONE, STOP]
    after = (await read_activity(harness, workflow_id)).deployment
    assert (after.replicas, after.last_replicas, after.generation) == (0, 3, before.generation + 1)
    assert after.stopped_reason == StoppedReason.IDLE
    (decision,) = await read_decisions(harness, workflow_id)
    assert (decision.action, decision.reason, decision.replicas) == (STOP, LifecycleReason.IDLE, 0)
    assert decision.inputs["lifecyclePolicy"] == {"type": "idle-shutdown", "idleTimeoutMinutes": 30}
    assert (decision.inputs["hasDue"], decision.inputs["hasRunning"]) == (False, False)


@pytest.mark.parametrize(
    "columns",
    [
        pytest.param({"status": ExecutionStatus.PENDING}, id="one is to be taken up"),
        pytest.param({"status": ExecutionStatus.RUNNING}, id="one goes on"),
        pytest.param({"status": ExecutionStatus.WAITING, "due_at": -HOUR}, id="the timer of one is due"),
        pytest.param({"status": ExecutionStatus.COMPLETED, "ended_at": -HOUR / 60}, id="one has just ended"),
    ],
)
async def test_a_deployment_with_runs_is_not_idle(
    harness: GatewayHarness, people: OrganizationUsers, workflow_id: str, columns: dict[str, Any]
) -> None:
    await deploy_with_pod(harness, people.owner, workflow_id)
    await run(harness, people.owner, workflow_id, **relative_columns(columns))
    assert (await decide_now(harness, workflow_id)).decision.action is NONE


@pytest.mark.parametrize(
    "columns",
    [
        pytest.param({"status": ExecutionStatus.PENDING, "due_at": HOUR}, id="one that is deferred"),
        pytest.param({"status": ExecutionStatus.WAITING, "due_at": HOUR}, id="one that waits"),
        pytest.param({"status": ExecutionStatus.WAITING}, id="one that waits for somebody"),
        pytest.param({"status": ExecutionStatus.COMPLETED, "ended_at": -HOUR}, id="one that ended long ago"),
        pytest.param({"status": ExecutionStatus.RUNNING, "target": "shared"}, id="one on a shared worker"),
    ],
)
async def test_runs_that_need_no_pod_now_keep_none_up(
    harness: GatewayHarness, people: OrganizationUsers, workflow_id: str, columns: dict[str, Any]
) -> None:
    await deploy_with_pod(harness, people.owner, workflow_id)
    await run(harness, people.owner, workflow_id, **relative_columns(columns))
    assert (await decide_now(harness, workflow_id)).decision.action is STOP


def relative_columns(columns: dict[str, Any]) -> dict[str, Any]:
    now = datetime.now(UTC)
    return {name: now + value if isinstance(value, timedelta) else value for name, value in columns.items()}


async def test_a_due_run_wakes_a_sleeping_deployment_with_as_many_pods_as_before(
    harness: GatewayHarness, people: OrganizationUsers, workflow_id: str
) -> None:
    stopped: dict[str, Any] = {"stopped_reason": StoppedReason.IDLE, "stopped_at": datetime.now(UTC)}
    await deploy_with_pod(harness, people.owner, workflow_id, replicas=0, last_replicas=4, **stopped)
    assert (await decide_now(harness, workflow_id)).decision.action is NONE
    await run(harness, people.owner, workflow_id)
    woken = await decide_now(harness, workflow_id)
    assert woken.decision.action is WAKE
    assert (woken.deployment.replicas, woken.deployment.stopped_reason) == (4, None)
    assert [one.action for one in await read_decisions(harness, workflow_id)] == [WAKE]


async def test_activity_before_the_check_keeps_the_deployment(
    harness: GatewayHarness, people: OrganizationUsers, workflow_id: str
) -> None:
    await deploy_with_pod(harness, people.owner, workflow_id)
    assert workflow_id in await wakes.record_activities(harness.gateway.database, [workflow_id])
    assert (await decide_now(harness, workflow_id)).decision.action is NONE


async def test_a_request_between_check_and_stop_finds_the_deployment_stopped(
    harness: GatewayHarness, people: OrganizationUsers, workflow_id: str
) -> None:
    await deploy_with_pod(harness, people.owner, workflow_id)
    came: list[asyncio.Task[dict[str, Deployment]]] = []

    async def stop(connection: AsyncConnection) -> None:
        await activity.lock_deployment(connection, workflow_id)
        found = await activity.read_activity(connection, workflow_id)
        assert found is not None
        recording = wakes.record_activities(harness.gateway.database, [workflow_id])
        came.append(asyncio.create_task(recording))
        # Let the new activity get as far as the locked row.
        async with harness.gateway.database.read() as other:
            await activity.read_activity(other, workflow_id)
        await activity.apply_decision(connection, found, decide_by_policy(found))

    await harness.gateway.database.transaction(stop)
    (recorded,) = await asyncio.gather(*came)
    assert recorded.keys() == {workflow_id}
    after = await read_activity(harness, workflow_id)
    assert not after.situation.is_up
    assert lifecycle_policy.start_refusal(after.policy, after.situation, after.now) is None


@pytest.mark.every_database
async def test_a_locked_deployment_holds_up_no_other(
    harness: GatewayHarness, people: OrganizationUsers, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = sorted([await people.owner.create(**GRAPH) for _ in range(2)])
    for workflow_id in (first, second):
        await deploy_with_pod(harness, people.owner, workflow_id)
    lock = "SELECT FROM deployment WHERE workflow_id = $1 FOR UPDATE"
    url = harness.gateway.database.url
    async with open_impatient_database(url, monkeypatch) as database, hold_transaction_open(url, lock, first):
        # The activity is not counted then, and still finds the deployment.
        assert (await require_prompt(wakes.record_activities(database, [first, second]))).keys() == {
            first,
            second,
        }
        await harness.gateway.database.transaction(
            lambda connection: connection.execute(
                update(Deployment)
                .where(col(Deployment.workflow_id) == second)
                .values(last_activity_at=datetime.now(UTC) - HOUR)
            )
        )
        await require_prompt(keep_policies(database, harness.gateway.broker))
        assert [(await read_activity(harness, one)).situation.is_up for one in (first, second)] == [
            True,
            False,
        ]
        await run(harness, people.owner, second)
        await require_prompt(wakes.wake_for_waiting_runs(database))
        assert (await read_activity(harness, second)).situation.is_up
    await keep_policies(harness.gateway.database, harness.gateway.broker)
    assert not (await read_activity(harness, first)).situation.is_up


@pytest.mark.every_database
async def test_a_decision_about_a_changed_deployment_is_not_applied(
    harness: GatewayHarness, people: OrganizationUsers, workflow_id: str
) -> None:
    await deploy_with_pod(harness, people.owner, workflow_id)
    before = await read_activity(harness, workflow_id)
    await decide_now(harness, workflow_id)
    with pytest.raises(DeploymentChanged):
        await harness.gateway.database.transaction(
            lambda connection: activity.apply_decision(connection, before, decide_by_policy(before))
        )
    assert len(await read_decisions(harness, workflow_id)) == 1


async def test_a_manual_stop_lets_runs_end_first_and_records_its_user(
    harness: GatewayHarness, people: OrganizationUsers, workflow_id: str
) -> None:
    await deploy_with_pod(harness, people.owner, workflow_id)
    execution_id = await run(harness, people.owner, workflow_id, status=ExecutionStatus.RUNNING)
    database, user_id = harness.gateway.database, people.owner.user.id
    await activity.decide_and_apply(
        database,
        workflow_id,
        lambda found: lifecycle_policy.stop_decision(
            found.situation, LifecycleReason.BY_HAND, StoppedReason.MANUAL
        ),
        user_id=user_id,
    )
    drains = (await read_activity(harness, workflow_id)).deployment
    assert drains.drain_until is not None
    assert drains.replicas == 1
    assert (await decide_now(harness, workflow_id)).decision.action is NONE
    end = update(Execution).where(col(Execution.id) == execution_id)
    ended = end.values(status=ExecutionStatus.COMPLETED, ended_at=datetime.now(UTC))
    await database.transaction(lambda connection: connection.execute(ended))
    stopped = (await decide_now(harness, workflow_id)).deployment
    assert (stopped.replicas, stopped.drain_until, stopped.stopped_at) == (0, None, drains.stopped_at)
    assert stopped.stopped_reason == StoppedReason.MANUAL
    assert [(one.action, one.user_id) for one in await read_decisions(harness, workflow_id)] == [
        (LifecycleAction.DRAIN, user_id),
        (STOP, None),
    ]


async def test_deployments_are_looked_at_in_batches(
    harness: GatewayHarness, people: OrganizationUsers, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(activity, "BATCH_DEPLOYMENTS", 2)
    made = [await people.owner.create(**GRAPH) for _ in range(3)]
    for workflow_id in made:
        await deploy_with_pod(harness, people.owner, workflow_id)
    gone = await people.owner.create(**GRAPH)
    await deploy_with_pod(harness, people.owner, gone, is_deployed=False)
    found: list[str] = []
    after = min(made)[:-1]
    while True:
        async with harness.gateway.database.read() as connection:
            batch = await activity.read_all_activities(connection, after)
        found += [one.deployment.workflow_id for one in batch]
        if len(batch) < activity.BATCH_DEPLOYMENTS:
            break
        after = found[-1]
    assert found == sorted(made)


@pytest.mark.every_database
async def test_the_check_reads_no_table_of_runs_from_end_to_end(harness: GatewayHarness) -> None:
    wanted = activity.activity_statement().where(col(Deployment.workflow_id) == "wf_1")
    plan = await explain_statement(harness.gateway.database, wanted)
    # The index of all runs that have not ended is as good.
    for indexes in (("pending", "live"), ("waiting", "live"), ("running", "live"), ("deployed",)):
        assert any(f"ix_execution_{index}" in plan for index in indexes), plan
