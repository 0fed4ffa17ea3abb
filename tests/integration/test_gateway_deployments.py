"""Deployments over HTTP, with a deployer and pods on this machine, on both databases."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import select, update
from sqlmodel import col

from models.audit import AuditEntry
from models.deployment import LifecycleDecision, ObservedState
from models.deployment_token import DeploymentToken
from models.execution import DELAYED_TARGET, LIMITED_TARGET, SHARED_TARGET, UNPARSED_TARGET, Execution
from models.execution_status import ExecutionStatus
from tests.integration.deployed_workflows import run
from tests.integration.deployers import (
    read_deployment,
    request_lifecycle,
    run_local_deployer,
    wait_for_deployment,
)
from tests.integration.gateway_harness import (
    GRAPH,
    STEP,
    TRIGGER,
    GatewayHarness,
    OrganizationUsers,
    assert_refused,
    create_gateway,
)
from tests.services import PostgresServer
from workers.deployer.deployer import Deployer

API = "/api/v1/workflows"
PATIENCE_SECONDS = 60.0
"""Less than answers wait for the cluster here."""


@pytest.fixture(scope="module", params=["sqlite", "postgresql"])
async def harness(
    request: pytest.FixtureRequest, postgres: PostgresServer, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[GatewayHarness]:
    folder: Path = tmp_path_factory.mktemp("deployments")
    async with create_gateway(request.param, postgres, folder, settle_seconds=30) as harness:
        yield harness


@pytest.fixture
async def deployer(harness: GatewayHarness, tmp_path: Path) -> AsyncIterator[Deployer]:
    async with run_local_deployer(harness, tmp_path / "pods") as found:
        yield found


@pytest.fixture
async def workflow_id(people: OrganizationUsers) -> str:
    return await people.owner.create(**GRAPH)


async def get_workflow(people: OrganizationUsers, workflow_id: str) -> dict[str, Any]:
    response = await people.owner.api.get(f"{API}/{workflow_id}/status")
    assert response.status_code == 200
    found: dict[str, Any] = response.json()
    return found


async def read_tokens(harness: GatewayHarness, workflow_id: str) -> list[DeploymentToken]:
    statement = select(DeploymentToken).where(col(DeploymentToken.workflow_id) == workflow_id)
    async with harness.gateway.database.read() as connection:
        return [DeploymentToken(**one) for one in (await connection.execute(statement)).mappings()]


@pytest.mark.usefixtures("deployer")
async def test_a_workflow_is_deployed_stopped_started_and_undeployed(
    harness: GatewayHarness, people: OrganizationUsers, workflow_id: str
) -> None:
    owner = people.owner
    deployed = await request_lifecycle(owner, "deploy", workflow_id, 200)
    assert deployed == {
        "message": "Workflow deployed successfully",
        "workflowId": workflow_id,
        "status": "active",
        "deploymentStatus": "running",
        "version": 1,
    }
    again = await request_lifecycle(owner, "deploy", workflow_id, 200)
    assert (again, (await read_deployment(harness, workflow_id)).generation) == (deployed, 1)

    stopped = await request_lifecycle(owner, "stop", workflow_id, 200)
    assert stopped == {"workflowId": workflow_id, "deploymentStatus": "stopped"}
    assert await request_lifecycle(owner, "stop", workflow_id, 200) == stopped
    status = await get_workflow(people, workflow_id)
    assert (status["stoppedReason"], status["replicas"], status["readyReplicas"]) == ("manual", 0, 0)

    started = await request_lifecycle(owner, "start", workflow_id, 200, replicas=2)
    assert started == {"workflowId": workflow_id, "deploymentStatus": "running", "replicas": 2}
    assert (await get_workflow(people, workflow_id))["readyReplicas"] == 2
    assert (await request_lifecycle(owner, "start", workflow_id, 200))["replicas"] == 1

    logs = await owner.api.get(f"{API}/{workflow_id}/logs", params={"limit": 5})
    assert {line["text"] for line in logs.json()["lines"]} == {"started"}

    undeployed = await request_lifecycle(owner, "undeploy", workflow_id, 200)
    assert undeployed == {
        "message": "Workflow undeployed successfully",
        "workflowId": workflow_id,
        "status": "draft",
        "deploymentStatus": "not-deployed",
    }
    assert await request_lifecycle(owner, "undeploy", workflow_id, 200) == undeployed
    assert all(token.revoked_at for token in await read_tokens(harness, workflow_id))
    for verb in ("stop", "start"):
        assert_refused(await owner.api.post(f"{API}/{workflow_id}/{verb}"), 409, "not-deployed")
    assert_refused(await owner.api.get(f"{API}/{workflow_id}/logs"), 409, "not-deployed")


@pytest.mark.usefixtures("deployer")
async def test_a_request_to_end_leaves_a_trace_with_its_user(
    harness: GatewayHarness, people: OrganizationUsers, workflow_id: str
) -> None:
    for verb in ("deploy", "stop", "start", "undeploy"):
        await request_lifecycle(people.owner, verb, workflow_id, 200)
    async with harness.gateway.database.read() as connection:
        actions = await connection.scalars(
            select(col(AuditEntry.action))
            .where(col(AuditEntry.object_id) == workflow_id)
            .order_by(col(AuditEntry.id))
        )
        decisions = await connection.execute(
            select(
                col(LifecycleDecision.action), col(LifecycleDecision.reason), col(LifecycleDecision.user_id)
            )
            .where(col(LifecycleDecision.workflow_id) == workflow_id)
            .order_by(col(LifecycleDecision.at), col(LifecycleDecision.id))
        )
        by_whom = [(*row[:2], row[2] == people.owner.user.id) for row in decisions]
    assert [
        action
        for action in actions
        if action.split(".")[1] in {"deployed", "stopped", "started", "undeployed"}
    ] == [
        "workflow.deployed",
        "workflow.stopped",
        "workflow.started",
        "workflow.undeployed",
    ]
    assert by_whom == [
        ("start", "deployed", True),
        ("stop", "by-hand", True),
        ("start", "by-hand", True),
        ("stop", "undeployed", True),
    ]


@pytest.mark.usefixtures("deployer")
async def test_a_new_version_replaces_pods_and_their_token_and_an_old_one_comes_back(
    harness: GatewayHarness, people: OrganizationUsers, workflow_id: str
) -> None:
    owner = people.owner
    await request_lifecycle(owner, "deploy", workflow_id, 200)
    first = await read_deployment(harness, workflow_id)
    changed = {**STEP, "config": {"values": {"a": 2}}}
    await owner.api.put(f"{API}/{workflow_id}", json={"nodes": [TRIGGER, changed]})
    await owner.api.post(f"{API}/{workflow_id}/versions", json={"versionTag": "v2.0.0"})
    assert (await request_lifecycle(owner, "deploy", workflow_id, 200))["version"] == 2
    second = await read_deployment(harness, workflow_id)
    assert second.observed_definition_hash == second.definition_hash != first.definition_hash
    assert len([one for one in await read_tokens(harness, workflow_id) if one.revoked_at is None]) == 2

    assert (await request_lifecycle(owner, "deploy-version", workflow_id, 200, version=1))["version"] == 1
    assert (await read_deployment(harness, workflow_id)).definition_hash == first.definition_hash
    workflow = await owner.workflow(workflow_id)
    assert (workflow["version"], workflow["nodes"][1]["config"]) == (2, changed["config"])
    assert_refused(
        await owner.api.post(f"{API}/{workflow_id}/deploy-version", json={"version": 9}), 404, "not-found"
    )
    await request_lifecycle(owner, "undeploy", workflow_id, 200)


async def test_only_runnable_workflows_are_deployed(people: OrganizationUsers) -> None:
    workflow_id = await people.owner.create(nodes=[STEP])
    response = await people.owner.api.post(f"{API}/{workflow_id}/deploy")
    assert_refused(response, 422, "validation-failed")
    assert "missing-trigger" in {one["type"] for one in response.json()["error"]["details"]}
    assert (await get_workflow(people, workflow_id))["deploymentStatus"] == "not-deployed"
    assert (await people.owner.workflow(workflow_id))["status"] == "draft"


@pytest.mark.parametrize("replicas", [0, 11, 1.5, "2"])
async def test_there_are_one_to_ten_pods(
    people: OrganizationUsers, workflow_id: str, replicas: object
) -> None:
    response = await people.owner.api.post(f"{API}/{workflow_id}/start", json={"replicas": replicas})
    assert_refused(response, 422, "validation-failed")


@pytest.mark.parametrize("version", [0, 10_001, 2**31, 2**64, "1"])
async def test_a_version_is_a_number_that_there_can_be(
    people: OrganizationUsers, workflow_id: str, version: object
) -> None:
    response = await people.owner.api.post(f"{API}/{workflow_id}/deploy-version", json={"version": version})
    assert_refused(response, 422, "validation-failed")


@pytest.mark.usefixtures("deployer")
async def test_runs_that_pods_were_to_take_are_left_to_the_workers(
    harness: GatewayHarness, people: OrganizationUsers, workflow_id: str
) -> None:
    await request_lifecycle(people.owner, "deploy", workflow_id, 200)
    kinds: dict[str, dict[str, Any]] = {
        "pending": {},
        "deferred": {"status": ExecutionStatus.WAITING},
        "waiting": {
            "status": ExecutionStatus.WAITING,
            "started_at": (await read_deployment(harness, workflow_id)).created_at,
        },
        "limited": {"target": LIMITED_TARGET, "assigned_deployment_id": workflow_id},
        "delayed": {"target": DELAYED_TARGET, "status": ExecutionStatus.WAITING},
        "unread": {"target": UNPARSED_TARGET},
        "being read": {"target": UNPARSED_TARGET, "status": ExecutionStatus.RUNNING},
        "ended": {"status": ExecutionStatus.COMPLETED},
    }
    made = {
        name: await run(
            harness, people.owner, workflow_id, **{"assigned_deployment_id": workflow_id, **columns}
        )
        for name, columns in kinds.items()
    }
    await request_lifecycle(people.owner, "undeploy", workflow_id, 200)
    statement = select(Execution).where(col(Execution.workflow_id) == workflow_id)
    async with harness.gateway.database.read() as connection:
        found = {one["id"]: Execution(**one) for one in (await connection.execute(statement)).mappings()}
    after = {
        name: (found[made[name]].target, found[made[name]].assigned_deployment_id, found[made[name]].status)
        for name in made
    }
    assert after == {
        "pending": (SHARED_TARGET, None, "pending"),
        "deferred": (SHARED_TARGET, None, "pending"),
        "waiting": (SHARED_TARGET, None, "waiting"),
        "limited": (LIMITED_TARGET, None, "pending"),
        "delayed": (DELAYED_TARGET, None, "waiting"),
        "unread": (UNPARSED_TARGET, None, "pending"),
        "being read": (UNPARSED_TARGET, None, "running"),
        "ended": (workflow_id, workflow_id, "completed"),
    }


@pytest.mark.every_database
@pytest.mark.usefixtures("deployer")
async def test_an_archived_or_deleted_workflow_has_no_pods(
    harness: GatewayHarness, people: OrganizationUsers, workflow_id: str
) -> None:
    owner = people.owner
    await request_lifecycle(owner, "deploy", workflow_id, 200)
    assert_refused(await owner.api.delete(f"{API}/{workflow_id}"), 409, "workflow-deployed")
    archived = await owner.api.put(f"{API}/{workflow_id}/status", json={"status": "archived"})
    assert archived.status_code == 200
    await wait_for_deployment(harness, workflow_id, lambda one: one.observed == ObservedState.ABSENT)
    assert (await request_lifecycle(owner, "undeploy", workflow_id, 200))["status"] == "archived"

    await request_lifecycle(owner, "deploy", workflow_id, 200)
    assert (await owner.api.delete(f"{API}/{workflow_id}", params={"force": "true"})).status_code == 204
    await wait_for_deployment(harness, workflow_id, lambda one: one.observed == ObservedState.ABSENT)


@pytest.mark.usefixtures("deployer")
async def test_a_stop_lets_runs_end_and_takes_no_further_ones(
    harness: GatewayHarness, people: OrganizationUsers, workflow_id: str
) -> None:
    await request_lifecycle(people.owner, "deploy", workflow_id, 200)
    execution_id = await run(
        harness, people.owner, workflow_id, status=ExecutionStatus.RUNNING, lease_owner=f"pod:{workflow_id}:a"
    )
    stop = asyncio.create_task(request_lifecycle(people.owner, "stop", workflow_id, 200))
    draining = await wait_for_deployment(harness, workflow_id, lambda one: one.drain_until is not None)
    assert (draining.replicas, (await get_workflow(people, workflow_id))["deploymentStatus"]) == (
        1,
        "stopping",
    )
    ended = update(Execution).where(col(Execution.id) == execution_id)
    await harness.gateway.database.transaction(
        lambda connection: connection.execute(
            ended.values(status=ExecutionStatus.COMPLETED, ended_at=draining.updated_at)
        )
    )
    assert (await stop)["deploymentStatus"] == "stopped"


@pytest.mark.every_database
@pytest.mark.usefixtures("deployer")
async def test_a_change_overtaken_by_its_opposite_is_no_longer_awaited(
    harness: GatewayHarness, people: OrganizationUsers, workflow_id: str
) -> None:
    owner = people.owner
    await request_lifecycle(owner, "deploy", workflow_id, 200)
    pod = f"pod:{workflow_id}:a"
    await run(harness, owner, workflow_id, status=ExecutionStatus.RUNNING, lease_owner=pod)
    async with asyncio.timeout(PATIENCE_SECONDS):
        stop = asyncio.create_task(request_lifecycle(owner, "stop", workflow_id, 202))
        await wait_for_deployment(harness, workflow_id, lambda one: one.drain_until is not None)
        started = asyncio.create_task(request_lifecycle(owner, "start", workflow_id, 200))
        assert (await stop)["deploymentStatus"] in {"starting", "running"}
        assert (await started)["deploymentStatus"] == "running"
        stop = asyncio.create_task(request_lifecycle(owner, "stop", workflow_id, 202))
        await wait_for_deployment(harness, workflow_id, lambda one: one.drain_until is not None)
        undeployed = await request_lifecycle(owner, "undeploy", workflow_id, 200)
        assert (await stop)["deploymentStatus"] in {"undeploying", "not-deployed"}
    assert undeployed["deploymentStatus"] == "not-deployed"
