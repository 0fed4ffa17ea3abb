"""Deployer on both databases: its effects, its reports of failures, and its recovery after a crash."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from kubernetes.aio import client
from sqlalchemy import func, insert, select, update
from sqlmodel import col

from models.database import Database
from models.deployment import (
    Deployment,
    DeploymentStatus,
    LifecycleDecision,
    ObservedState,
    is_ready,
    status_of,
)
from models.deployment_token import DeploymentToken
from models.ids import new_id
from models.lifecycle_policy import StoppedReason
from scheduler import lifecycle_policies
from tests.cluster.cluster_harness import NAMESPACE, DriverUnderTest, cluster_layout, open_fake_cluster
from tests.cluster.fake_api import FakeApiServer
from tests.cluster.fake_api.schema import KINDS
from tests.integration.deployed_workflows import deploy_with_pod
from tests.integration.deployers import (
    BROKEN_POD,
    forget_deployments,
    read_deployment,
    request_lifecycle,
    run_local_deployer,
    run_test_deployer,
    wait_for_deployment,
)
from tests.integration.gateway_harness import GRAPH, GatewayHarness, OrganizationUsers
from workers.cluster import local_driver
from workers.cluster.driver import ClusterDriver, ClusterUnavailable
from workers.cluster.driver import ObservedDeployment as Seen
from workers.cluster.kubernetes_api import KubernetesApi
from workers.cluster.kubernetes_driver import KubernetesDriver

PATIENCE_SECONDS = 60.0
DEATHS = ((1, 1), (4, 2), (6, 4), (7, 6))
"""At which change of a deploy, of seven, and of an undeploy, of six: before the first, among them, before the last."""
LONG_AGO = datetime(2020, 1, 1, tzinfo=UTC)


@pytest.fixture
async def workflow_id(people: OrganizationUsers) -> str:
    return await people.owner.create(**GRAPH)


@pytest.fixture(autouse=True)
async def _nothing_is_left_deployed(harness: GatewayHarness) -> AsyncIterator[None]:
    yield
    await forget_deployments(harness)


def is_running(deployment: Deployment) -> bool:
    return (
        status_of(deployment) is DeploymentStatus.RUNNING
        and deployment.observed_generation == deployment.generation
    )


def has_failed(deployment: Deployment) -> bool:
    return status_of(deployment) is DeploymentStatus.FAILED


def is_gone(deployment: Deployment) -> bool:
    return status_of(deployment) is DeploymentStatus.NOT_DEPLOYED


# ── failed starts ───────────────────────────────────────────────────────────────────────────────────────────


async def test_pods_that_cannot_start_are_given_up_with_the_reason_and_tried_again(
    harness: GatewayHarness, people: OrganizationUsers, workflow_id: str, tmp_path: Path
) -> None:
    database, broker = harness.gateway.database, harness.gateway.broker
    await request_lifecycle(people.owner, "deploy", workflow_id, 202)
    async with run_local_deployer(harness, tmp_path, command=BROKEN_POD, start_seconds=0.3):
        failed = await wait_for_deployment(harness, workflow_id, has_failed)
        assert "it was built broken" in (failed.observed_reason or "")
        answer = await request_lifecycle(people.owner, "deploy", workflow_id, 202)
        assert answer["deploymentStatus"] in {"failed", "starting", "deploying"}
        await wait_for_deployment(harness, workflow_id, has_failed)
        await lifecycle_policies.keep_policies(database, broker)
        stopped = await wait_for_deployment(
            harness, workflow_id, lambda one: one.observed == ObservedState.STOPPED
        )
        assert (stopped.replicas, stopped.stopped_reason) == (0, StoppedReason.FAILED)
        assert stopped.start_failures == 1
        assert has_failed(stopped)
        assert "it was built broken" in (stopped.observed_reason or "")
    async with run_local_deployer(harness, tmp_path):
        await request_lifecycle(people.owner, "start", workflow_id, 202)
        healed = await wait_for_deployment(harness, workflow_id, is_running)
        assert (healed.observed_reason, healed.stopped_reason, healed.start_failures) == (None, None, 0)


async def test_pods_that_cannot_be_replaced_serve_on_beside_the_failed_deploy(
    harness: GatewayHarness,
    people: OrganizationUsers,
    workflow_id: str,
    fake_cluster: tuple[DriverUnderTest, FakeApiServer],
) -> None:
    cluster, api = fake_cluster
    api.node.runs_commands = True
    database, owner = harness.gateway.database, people.owner
    await request_lifecycle(owner, "deploy", workflow_id, 202)
    async with run_test_deployer(harness, cluster.reopen, cluster="kubernetes"):
        before = await wait_for_deployment(harness, workflow_id, is_running)
    async with run_test_deployer(
        harness, cluster.reopen, command=BROKEN_POD, cluster="kubernetes", start_seconds=0.5
    ):
        edit = {"config": {"values": {"greeting": "Edited"}}}
        assert (await owner.api.put(f"/api/v1/workflows/{workflow_id}/nodes/step", json=edit)).is_success
        answer = await request_lifecycle(owner, "deploy", workflow_id, 202)
        assert answer["deploymentStatus"] == "deploying"
        failed = await wait_for_deployment(harness, workflow_id, has_failed)
        shown = (await owner.api.get(f"/api/v1/workflows/{workflow_id}/status")).json()
        assert (shown["deploymentStatus"], shown["replicas"], shown["readyReplicas"]) == ("failed", 1, 1)
        assert "it was built broken" in shown["reason"]
        assert shown["readyDefinitionHash"] == before.definition_hash != shown["definitionHash"]
        await lifecycle_policies.keep_policies(database, harness.gateway.broker)
        kept = await read_deployment(harness, workflow_id)
        assert (kept.generation, is_ready(kept)) == (failed.generation, True)
    async with run_test_deployer(harness, cluster.reopen, cluster="kubernetes"):
        healed = await wait_for_deployment(harness, workflow_id, is_running)
        assert (healed.observed_definition_hash, healed.observed_reason) == (failed.definition_hash, None)


class FlakyDriver(local_driver.LocalDriver):
    """A cluster that is away now and then."""

    is_away = False

    async def observe(self, workflow_id: str) -> Seen:
        if self.is_away:
            raise ClusterUnavailable("the cluster is away")
        return await super().observe(workflow_id)


async def test_desired_state_is_kept_while_the_cluster_is_unavailable_and_applied_later(
    harness: GatewayHarness,
    people: OrganizationUsers,
    workflow_id: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(local_driver, "LocalDriver", FlakyDriver)
    async with run_local_deployer(harness, tmp_path) as found:
        await request_lifecycle(people.owner, "deploy", workflow_id, 202)
        await wait_for_deployment(harness, workflow_id, is_running)
        monkeypatch.setattr(FlakyDriver, "is_away", True)
        await request_lifecycle(people.owner, "start", workflow_id, 202, replicas=2)
        unknown = await wait_for_deployment(
            harness, workflow_id, lambda one: one.observed == ObservedState.UNKNOWN
        )
        assert (unknown.replicas, unknown.observed_reason) == (2, "the cluster is away")
        assert status_of(unknown) is DeploymentStatus.UNKNOWN
        monkeypatch.setattr(FlakyDriver, "is_away", False)
        found.request_reconcile(workflow_id)
        await wait_for_deployment(
            harness, workflow_id, lambda one: is_running(one) and one.ready_replicas == 2
        )


async def test_a_pod_that_is_gone_is_noticed_without_anybody_asking(
    harness: GatewayHarness, people: OrganizationUsers, workflow_id: str, tmp_path: Path
) -> None:
    async with run_local_deployer(harness, tmp_path / "pods"):
        await request_lifecycle(people.owner, "deploy", workflow_id, 202)
        first = await wait_for_deployment(harness, workflow_id, is_running)
        (certificate,) = (tmp_path / "pods").glob("*/*/process")
        os.kill(int(certificate.read_text().split(" ", 1)[0]), signal.SIGKILL)
        await wait_for_deployment(harness, workflow_id, lambda one: one.observed == ObservedState.STARTING)
        again = await wait_for_deployment(harness, workflow_id, is_running)
        assert again.generation == first.generation


# ── crashes ─────────────────────────────────────────────────────────────────────────────────────────────────


class MortalApi(KubernetesApi):
    """API client of a process that dies at one of its changes: later requests are neither sent nor answered."""

    dies_at = 0

    def __init__(self, api: FakeApiServer) -> None:
        configured = client.ApiClient(client.Configuration(host=api.url))
        configured.set_default_header("Authorization", f"Bearer {api.token}")
        super().__init__(configured, request_seconds=60)
        self.changes = 0
        self.is_dead = asyncio.Event()

    async def send(self, method: str, path: str, **more: Any) -> Any:  # noqa: ANN401 - as it is
        if method in {"PATCH", "DELETE"}:
            self.changes += 1
            if self.changes == self.dies_at:
                self.is_dead.set()
        if self.is_dead.is_set():
            await asyncio.Event().wait()
        return await super().send(method, path, **more)


class MortalDriver(KubernetesDriver):
    """Driver that stops reading its cache, too, once its process is dead."""

    def __init__(self, api: MortalApi) -> None:
        super().__init__(api, cluster_layout())
        self._mortal = api

    async def observe(self, workflow_id: str) -> Seen:
        if self._mortal.is_dead.is_set():
            await asyncio.Event().wait()
        return await super().observe(workflow_id)


@pytest.fixture
async def fake_cluster(tmp_path: Path) -> AsyncIterator[tuple[DriverUnderTest, FakeApiServer]]:
    async with open_fake_cluster(tmp_path) as (cluster, api):
        api.node.runs_commands = False
        yield cluster, api


def list_objects(api: FakeApiServer) -> set[tuple[str, str]]:
    return {
        (kind.name, found["metadata"]["name"])
        for kind in KINDS.values()
        if kind.is_namespaced
        for found in api.store.every(kind.plural, NAMESPACE)
    }


async def expire(harness: GatewayHarness, workflow_id: str) -> None:
    """Let the lease of a dead deployer expire."""
    held = update(Deployment).where(col(Deployment.workflow_id) == workflow_id)
    await harness.gateway.database.transaction(
        lambda connection: connection.execute(held.values(held_until=LONG_AGO))
    )


async def deploy_and_die(
    harness: GatewayHarness, workflow_id: str, api: FakeApiServer, stack: AsyncExitStack, dies_at: int
) -> None:
    """Let a deployer reconcile a workflow, and die midway."""
    mortal = MortalApi(api)
    mortal.dies_at = dies_at

    async def open_driver() -> ClusterDriver:
        return MortalDriver(mortal)

    found = await stack.enter_async_context(
        run_test_deployer(harness, open_driver, cluster="kubernetes", deployer_sweep_seconds=60)
    )
    found.request_reconcile(workflow_id)
    async with asyncio.timeout(PATIENCE_SECONDS):
        await mortal.is_dead.wait()
    await expire(harness, workflow_id)


async def test_a_deployer_that_dies_half_way_is_followed_by_one_that_finishes_and_nothing_is_left(
    harness: GatewayHarness, people: OrganizationUsers, fake_cluster: tuple[DriverUnderTest, FakeApiServer]
) -> None:
    cluster, api = fake_cluster
    before = list_objects(api)
    async with AsyncExitStack() as dead:
        for in_a_deploy, in_an_undeploy in DEATHS:
            workflow_id = await people.owner.create(**GRAPH)
            await request_lifecycle(people.owner, "deploy", workflow_id, 202)
            await deploy_and_die(harness, workflow_id, api, dead, in_a_deploy)
            async with run_test_deployer(harness, cluster.reopen, cluster="kubernetes"):
                await wait_for_deployment(harness, workflow_id, is_running)
            await request_lifecycle(people.owner, "undeploy", workflow_id, 202)
            await deploy_and_die(harness, workflow_id, api, dead, in_an_undeploy)
            async with run_test_deployer(harness, cluster.reopen, cluster="kubernetes"):
                await wait_for_deployment(harness, workflow_id, is_gone)
            assert list_objects(api) == before
            assert await count_valid_tokens(harness, workflow_id) == 0


async def count_valid_tokens(harness: GatewayHarness, workflow_id: str) -> int:
    statement = select(func.count()).where(
        col(DeploymentToken.workflow_id) == workflow_id, col(DeploymentToken.revoked_at).is_(None)
    )
    async with harness.gateway.database.read() as connection:
        return await connection.scalar(statement) or 0


async def test_an_undeploy_before_anything_was_seen_leaves_nothing(
    harness: GatewayHarness,
    people: OrganizationUsers,
    workflow_id: str,
    fake_cluster: tuple[DriverUnderTest, FakeApiServer],
) -> None:
    cluster, api = fake_cluster
    before = list_objects(api)
    async with AsyncExitStack() as dead:
        await request_lifecycle(people.owner, "deploy", workflow_id, 202)
        await deploy_and_die(harness, workflow_id, api, dead, 3)
        await request_lifecycle(people.owner, "undeploy", workflow_id, 202)
        assert list_objects(api) != before
        async with run_test_deployer(harness, cluster.reopen, cluster="kubernetes"):
            await wait_for_deployment(harness, workflow_id, is_gone)
        assert list_objects(api) == before


async def test_blobs_without_a_row_are_removed(
    harness: GatewayHarness,
    people: OrganizationUsers,
    workflow_id: str,
    fake_cluster: tuple[DriverUnderTest, FakeApiServer],
) -> None:
    cluster, api = fake_cluster
    before = list_objects(api)
    await cluster.driver.apply(cluster.desired())
    await request_lifecycle(people.owner, "deploy", workflow_id, 202)
    async with run_test_deployer(harness, cluster.reopen, cluster="kubernetes"):
        await wait_for_deployment(harness, workflow_id, is_running)
        await request_lifecycle(people.owner, "undeploy", workflow_id, 202)
        await wait_for_deployment(harness, workflow_id, is_gone)
        async with asyncio.timeout(PATIENCE_SECONDS):
            while list_objects(api) != before:  # noqa: ASYNC110 - nothing signals the change
                await asyncio.sleep(0.01)


async def test_two_deployers_do_everything_once(
    harness: GatewayHarness,
    people: OrganizationUsers,
    workflow_id: str,
    fake_cluster: tuple[DriverUnderTest, FakeApiServer],
) -> None:
    cluster, _ = fake_cluster
    async with (
        run_test_deployer(harness, cluster.reopen, cluster="kubernetes", deployer_sweep_seconds=0.1),
        run_test_deployer(harness, cluster.reopen, cluster="kubernetes", deployer_sweep_seconds=0.1),
    ):
        await request_lifecycle(people.owner, "deploy", workflow_id, 202)
        await wait_for_deployment(harness, workflow_id, is_running)
        for replicas in (2, 1, 3):
            # One replica may still be there, or there again: nothing is to be done then, and the answer is 200.
            path = f"/api/v1/workflows/{workflow_id}/start"
            started = await people.owner.api.post(path, json={"replicas": replicas})
            assert started.is_success, started.text
        settled = await wait_for_deployment(
            harness,
            workflow_id,
            lambda one: is_running(one) and one.ready_replicas == one.replicas and one.held_by is None,
        )
        assert settled.replicas == 3
        await request_lifecycle(people.owner, "undeploy", workflow_id, 202)
        await wait_for_deployment(harness, workflow_id, is_gone)


# ── the scheduler's part ────────────────────────────────────────────────────────────────────────────────────


async def test_the_scheduler_stops_only_idle_deployments(
    harness: GatewayHarness, people: OrganizationUsers
) -> None:
    idle, busy = [await people.owner.create(**GRAPH) for _ in range(2)]
    await deploy_with_pod(harness, people.owner, idle)
    await deploy_with_pod(harness, people.owner, busy, last_activity_at=datetime.now(UTC))
    await lifecycle_policies.keep_policies(harness.gateway.database, harness.gateway.broker)
    await lifecycle_policies.keep_policies(harness.gateway.database, harness.gateway.broker)
    stopped, kept = await read_deployment(harness, idle), await read_deployment(harness, busy)
    assert (stopped.replicas, stopped.stopped_reason, stopped.generation) == (0, "idle", 2)
    assert (kept.replicas, kept.stopped_reason, kept.generation) == (1, None, 1)


async def test_missed_instants_are_made_up_for_once_by_several_schedulers(
    harness: GatewayHarness, people: OrganizationUsers
) -> None:
    owner = people.owner
    asleep = {"replicas": 0, "last_replicas": 2, "observed": ObservedState.STOPPED}
    by_schedule = {**asleep, "stopped_reason": StoppedReason.SCHEDULE}
    idle = {**asleep, "stopped_reason": StoppedReason.IDLE}
    closed_at, opened_at, changed = [await owner.create(**GRAPH) for _ in range(3)]
    in_three_days = (datetime.now(UTC).isoweekday() + 3) % 7
    for workflow_id, policy, columns in (
        (closed_at, window_policy([in_three_days], "09:00"), {}),
        (opened_at, window_policy(list(range(7)), "24:00"), by_schedule),
        (changed, {"type": "always-on"}, idle),
    ):
        await deploy_with_pod(harness, owner, workflow_id, **columns)
        set_to = await owner.api.put(f"/api/v1/workflows/{workflow_id}/lifecycle", json=policy)
        assert set_to.status_code == 200
    database, broker = harness.gateway.database, harness.gateway.broker
    await asyncio.gather(*(lifecycle_policies.keep_policies(database, broker) for _ in range(2)))
    found = [await read_deployment(harness, workflow_id) for workflow_id in (closed_at, opened_at, changed)]
    assert [(one.replicas, one.stopped_reason, one.generation) for one in found] == [
        (0, "schedule", 2),
        (2, None, 2),
        (2, None, 2),
    ]


def window_policy(days: list[int], until: str) -> dict[str, Any]:
    """Return a policy that opens at midnight of these days."""
    opens = {"days": days, "startTime": "00:00", "endTime": until}
    return {"type": "scheduled-window", "schedule": {"timezone": "UTC", "windows": [opens]}}


async def test_old_decisions_go_but_for_the_last_that_still_holds(
    harness: GatewayHarness, people: OrganizationUsers, workflow_id: str
) -> None:
    now = datetime.now(UTC)
    made = [
        await record_decision(harness.gateway.database, people, workflow_id, now - timedelta(days=days))
        for days in (60, 40, 20, 1)
    ]
    await lifecycle_policies.forget_decisions(harness.gateway.database)
    of_workflow = select(col(LifecycleDecision.id)).where(col(LifecycleDecision.workflow_id) == workflow_id)
    async with harness.gateway.database.read() as connection:
        assert set(await connection.scalars(of_workflow)) == set(made[1:])


async def record_decision(
    database: Database, people: OrganizationUsers, workflow_id: str, at: datetime
) -> str:
    kept = LifecycleDecision(
        id=new_id("decision"),
        organization_id=people.owner.user.organization_id,
        shard=people.owner.user.shard,
        workflow_id=workflow_id,
        at=at,
        action="start",
        reason="by-hand",
        replicas=1,
        inputs={},
    )
    await database.transaction(
        lambda connection: connection.execute(insert(LifecycleDecision).values(kept.model_dump()))
    )
    return kept.id
