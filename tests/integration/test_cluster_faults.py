"""Deployers of a cluster in trouble: no capacity, no image, lost nodes, lost namespaces, an unavailable etcd.

Faults that an operator can cause in any cluster are also caused in a real one, if `TEST_KUBECONFIG` names it.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import timedelta
from ipaddress import IPv4Network
from pathlib import Path
from typing import Any

import pytest
from kubernetes.aio import client

from models.deployment import Deployment, DeploymentStatus, ObservedState, status_of
from scheduler import lifecycle_policies, recovery
from tests import relays
from tests.cluster import cluster_harness as clusters
from tests.cluster.cluster_harness import NAMESPACE, PROGRAM, DriverUnderTest, turn_until
from tests.cluster.conftest import REAL
from tests.cluster.fake_api import FakeApiServer, machines
from tests.cluster.fake_api.machines import FakeMachine
from tests.cluster.fake_api.schema import KINDS
from tests.http_receiver import run_receiver
from tests.integration.deployers import (
    build_deployer,
    forget_deployments,
    request_lifecycle,
    run_test_deployer,
    wait_for_deployment,
)
from tests.integration.gateway_harness import (
    EDGE,
    GRAPH,
    TRIGGER,
    GatewayHarness,
    OrganizationUsers,
    create_gateway,
)
from tests.integration.simulated_cluster import listen_for_pods
from tests.integration.test_deployer import has_failed, is_running
from tests.services import PostgresServer
from workers.cluster.driver import ClusterDriver
from workers.cluster.kubernetes_api import KubernetesApi
from workers.cluster.kubernetes_driver import KubernetesDriver
from workers.cluster.manifests import DEFINITION_ANNOTATION
from workers.deployer import deployment_rows, reconcile, reconcile_queue
from workers.deployer.deployer import Deployer

PATIENCE_SECONDS = 60.0
CURED_SECONDS = 20.0
"""Limit for a start to continue after the cure, without a real cluster's own share."""


@pytest.fixture(scope="module")
async def harness(
    postgres: PostgresServer, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[GatewayHarness]:
    async with create_gateway("sqlite", postgres, tmp_path_factory.mktemp("gateway")) as harness:
        yield harness


@pytest.fixture(autouse=True)
async def _nothing_is_left_deployed(harness: GatewayHarness) -> AsyncIterator[None]:
    yield
    await forget_deployments(harness)


@pytest.fixture
async def workflow_id(people: OrganizationUsers) -> str:
    workflow_id = await people.owner.create(**GRAPH)
    policy = {"type": "always-on"}
    changed = await people.owner.api.put(f"/api/v1/workflows/{workflow_id}/lifecycle", json=policy)
    assert changed.status_code == 200
    return workflow_id


@pytest.fixture(params=["fake", pytest.param("real", marks=REAL)])
async def cluster(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[DriverUnderTest]:
    """A Kubernetes cluster, whichever it is."""
    if request.param == "fake":
        async with clusters.open_fake_cluster(tmp_path) as (found, api):
            api.node.runs_commands = False
            api.node.first_retry_seconds = 3_600  # a real one gets to a quarter of an hour
            yield found
    else:
        assert clusters.TEST_KUBECONFIG is not None
        async with clusters.open_real_cluster(Path(clusters.TEST_KUBECONFIG)) as found:
            yield found


@dataclass
class TwoMachineCluster:
    """Fake cluster with two machines and short seconds."""

    cluster: DriverUnderTest
    api: FakeApiServer

    def pods(self) -> list[dict[str, Any]]:
        return [
            pod
            for pod in self.api.store.every("pods", NAMESPACE)
            if "deletionTimestamp" not in pod["metadata"]
        ]

    @property
    def used(self) -> str:
        """Machine of the only pod that is not terminating."""
        (pod,) = self.pods()
        return str(pod["spec"]["nodeName"])


@pytest.fixture
async def two_machine_cluster(tmp_path: Path) -> AsyncIterator[TwoMachineCluster]:
    async with clusters.open_fake_cluster(tmp_path, second=0.005) as (found, api):
        api.node.runs_commands = False
        api.node.pull_seconds = 3_600  # a real one gets to five minutes
        api.node.machines.append(FakeMachine("node-2"))
        yield TwoMachineCluster(found, api)


@asynccontextmanager
async def run_deployer_on(
    harness: GatewayHarness,
    cluster: DriverUnderTest,
    **settings: Any,  # noqa: ANN401 - any setting
) -> AsyncIterator[Deployer]:
    command = (cluster.python, "-S", "-c", PROGRAM)
    given: dict[str, Any] = {"cluster": "kubernetes", "runner_image": cluster.image, **settings}
    async with run_test_deployer(harness, cluster.reopen, command=command, **given) as found:
        yield found


async def undeploy_and_wait(harness: GatewayHarness, people: OrganizationUsers, workflow_id: str) -> None:
    await request_lifecycle(people.owner, "undeploy", workflow_id, 202)
    await wait_for_deployment(harness, workflow_id, lambda one: one.observed == ObservedState.ABSENT)


async def trigger(people: OrganizationUsers, workflow_id: str) -> tuple[int, str, str]:
    """Return status, code and message of the answer to a trigger that waits for its run."""
    answer = await people.owner.api.post(f"/api/v1/workflows/{workflow_id}/trigger", json={"sync": True})
    error = answer.json()["error"]
    assert int(answer.headers["Retry-After"]) > 0
    return answer.status_code, error["code"], error["message"]


def is_blocked_by(code: str) -> Callable[[Deployment], bool]:
    return lambda one: one.observed_reason_code == code and status_of(one) is DeploymentStatus.STARTING


# ── why pods do not start ─────────────────────────────────────────────────────────────────────────────────────


async def test_an_image_that_is_nowhere_fails_at_once_and_its_reason_outlives_the_pods(
    harness: GatewayHarness,
    people: OrganizationUsers,
    workflow_id: str,
    two_machine_cluster: TwoMachineCluster,
) -> None:
    two_machine_cluster.api.node.missing_images.add(two_machine_cluster.cluster.image)
    two_machine_cluster.api.node.terminate_seconds = 0.3
    await request_lifecycle(people.owner, "deploy", workflow_id, 202)
    async with run_deployer_on(harness, two_machine_cluster.cluster) as found:
        await wait_for_deployment(harness, workflow_id, has_failed)
        # The same in other words, once the kubelet has given up for a while.
        failed = await wait_for_deployment(
            harness, workflow_id, lambda one: "Back-off" in (one.observed_reason or "")
        )
        assert two_machine_cluster.cluster.image in str(failed.observed_reason)
        await lifecycle_policies.keep_policies(harness.gateway.database, harness.gateway.broker)
        seen = [
            await wait_for_deployment(
                harness, workflow_id, lambda one: one.observed == ObservedState.STOPPING
            ),
            await wait_for_deployment(
                harness, workflow_id, lambda one: one.observed == ObservedState.STOPPED
            ),
        ]
        two_machine_cluster.api.lose_etcd()
        found.request_reconcile(workflow_id)
        unknown = await wait_for_deployment(
            harness, workflow_id, lambda one: one.observed == ObservedState.UNKNOWN
        )
        assert unknown.observed_reason != failed.observed_reason
        two_machine_cluster.api.restart_etcd()
        found.request_reconcile(workflow_id)
        seen.append(
            await wait_for_deployment(harness, workflow_id, lambda one: one.observed == ObservedState.STOPPED)
        )
        for one in seen:
            assert status_of(one) is DeploymentStatus.FAILED
            assert (one.observed_reason_code, one.observed_reason) == ("image-pull", failed.observed_reason)
        shown = (await people.owner.api.get(f"/api/v1/workflows/{workflow_id}/status")).json()
        assert (shown["deploymentStatus"], shown["reasonCode"]) == ("failed", "image-pull")


async def test_a_start_that_has_failed_goes_on_for_the_next_call_after_the_cure(
    harness: GatewayHarness,
    people: OrganizationUsers,
    workflow_id: str,
    two_machine_cluster: TwoMachineCluster,
) -> None:
    image = two_machine_cluster.cluster.image
    two_machine_cluster.api.node.missing_images.add(image)
    await request_lifecycle(people.owner, "deploy", workflow_id, 202)
    async with run_deployer_on(harness, two_machine_cluster.cluster):
        failed = await wait_for_deployment(harness, workflow_id, has_failed)
        status, code, message = await trigger(people, workflow_id)
        assert (status, code) == (503, "start-failed")
        assert image in message
        again = await wait_for_deployment(harness, workflow_id, has_failed)
        assert again.generation > failed.generation, "it was tried once more for the call"
        two_machine_cluster.api.node.missing_images.discard(image)
        async with asyncio.timeout(CURED_SECONDS):
            await request_lifecycle(people.owner, "start", workflow_id, 202)
            running = await wait_for_deployment(harness, workflow_id, is_running)
        assert (running.observed_reason, running.failed_reason) == (None, None)


async def test_a_start_over_the_quota_says_so_at_once_and_goes_on_when_there_is_room(
    harness: GatewayHarness, people: OrganizationUsers, workflow_id: str, cluster: DriverUnderTest
) -> None:
    await cluster.set_quota({"pods": "0"})
    async with run_deployer_on(harness, cluster, start_seconds=0.1):
        await request_lifecycle(people.owner, "deploy", workflow_id, 202)
        blocked = await wait_for_deployment(harness, workflow_id, is_blocked_by("quota"))
        status, code, message = await trigger(people, workflow_id)
        assert (status, code) == (503, "not-ready")
        assert blocked.observed_reason is not None
        assert blocked.observed_reason in message
        async with asyncio.timeout(CURED_SECONDS + (cluster.patience_seconds if cluster.is_real else 0)):
            await cluster.set_quota(None)
            running = await wait_for_deployment(harness, workflow_id, is_running)
        assert (running.observed_reason, running.observed_reason_code) == (None, None)
        await undeploy_and_wait(harness, people, workflow_id)


async def test_a_deploy_is_answered_as_soon_as_it_is_known_that_there_is_no_room(
    postgres: PostgresServer, tmp_path: Path, cluster: DriverUnderTest
) -> None:
    async with create_gateway("sqlite", postgres, tmp_path, settle_seconds=300) as harness:
        owner = (await harness.people()).owner
        workflow_id = await owner.create(**GRAPH)
        await cluster.set_quota({"pods": "0"})
        async with run_deployer_on(harness, cluster):
            answer = await request_lifecycle(owner, "deploy", workflow_id, 202)
            assert answer["deploymentStatus"] == "starting"
            assert "exceeded quota" in answer["reason"]
            await cluster.set_quota(None)
            await request_lifecycle(owner, "undeploy", workflow_id, 200)


async def test_a_start_that_no_node_has_room_for_says_so_at_once_and_goes_on_when_one_has(
    harness: GatewayHarness,
    people: OrganizationUsers,
    workflow_id: str,
    two_machine_cluster: TwoMachineCluster,
) -> None:
    for machine in two_machine_cluster.api.node.machines:
        machine.cpu_millicores = 1
    async with run_deployer_on(harness, two_machine_cluster.cluster, start_seconds=0.1):
        await request_lifecycle(people.owner, "deploy", workflow_id, 202)
        await wait_for_deployment(harness, workflow_id, is_blocked_by("unschedulable"))
        status, code, message = await trigger(people, workflow_id)
        assert (status, code) == (503, "not-ready")
        assert "0/2 nodes are available: 2 Insufficient cpu." in message
        two_machine_cluster.api.node.machines.append(FakeMachine("node-3"))
        two_machine_cluster.api.store.touch()
        running = await wait_for_deployment(harness, workflow_id, is_running)
        assert (running.observed_reason, running.observed_reason_code) == (None, None)


# ── nodes ─────────────────────────────────────────────────────────────────────────────────────────────────────


async def test_a_drained_node_is_left_for_another_and_nothing_has_failed(
    harness: GatewayHarness,
    people: OrganizationUsers,
    workflow_id: str,
    two_machine_cluster: TwoMachineCluster,
) -> None:
    await request_lifecycle(people.owner, "deploy", workflow_id, 202)
    async with run_deployer_on(harness, two_machine_cluster.cluster):
        before = await wait_for_deployment(harness, workflow_id, is_running)
        assert two_machine_cluster.used == "node-1"
        two_machine_cluster.api.controllers.drain("node-1")
        await turn_until(
            lambda: len(two_machine_cluster.pods()) == 1 and two_machine_cluster.used == "node-2"
        )
        after = await wait_for_deployment(harness, workflow_id, is_running)
        assert after.generation == before.generation


async def test_a_lost_node_is_told_of_and_its_workflow_serves_again_from_another(
    harness: GatewayHarness,
    people: OrganizationUsers,
    workflow_id: str,
    two_machine_cluster: TwoMachineCluster,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # By itself, the cluster would wait for the tolerations to be over.
    monkeypatch.setattr(machines, "toleration_seconds", lambda _: None)
    monkeypatch.setattr(reconcile, "LOST_NODE_TIME", timedelta(seconds=0.2))
    await request_lifecycle(people.owner, "deploy", workflow_id, 202)
    async with run_deployer_on(harness, two_machine_cluster.cluster):
        before = await wait_for_deployment(harness, workflow_id, is_running)
        (lost,) = two_machine_cluster.pods()
        await two_machine_cluster.api.controllers.silence("node-1", is_powered=False)
        told = await wait_for_deployment(harness, workflow_id, is_blocked_by("node-not-ready"))
        assert (told.ready_addresses, two_machine_cluster.used) == ([], "node-1")
        after = await wait_for_deployment(harness, workflow_id, is_running)
        assert (two_machine_cluster.used, after.generation) == ("node-2", before.generation)
        shown = two_machine_cluster.api.store.get(KINDS["pods"], NAMESPACE, lost["metadata"]["name"])
        assert "deletionTimestamp" in shown["metadata"], "its node can't tell yet that it has ended"


async def test_a_node_that_is_back_within_moments_keeps_its_pod(
    harness: GatewayHarness,
    people: OrganizationUsers,
    workflow_id: str,
    two_machine_cluster: TwoMachineCluster,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(machines, "toleration_seconds", lambda _: None)
    monkeypatch.setattr(reconcile, "LOST_NODE_TIME", timedelta(minutes=1))
    await request_lifecycle(people.owner, "deploy", workflow_id, 202)
    async with run_deployer_on(harness, two_machine_cluster.cluster):
        await wait_for_deployment(harness, workflow_id, is_running)
        (before,) = two_machine_cluster.pods()
        await two_machine_cluster.api.controllers.silence("node-1", is_powered=True)
        await wait_for_deployment(harness, workflow_id, is_blocked_by("node-not-ready"))
        status, code, message = await trigger(people, workflow_id)
        assert (status, code) == (503, "not-ready")
        assert "The node node-1 of the pod is not ready" in message
        two_machine_cluster.api.controllers.mend("node-1")
        await wait_for_deployment(harness, workflow_id, is_running)
        assert [pod["metadata"]["uid"] for pod in two_machine_cluster.pods()] == [before["metadata"]["uid"]]


async def test_a_pod_of_a_lost_node_is_left_to_the_cluster_while_another_serves(
    harness: GatewayHarness,
    people: OrganizationUsers,
    workflow_id: str,
    two_machine_cluster: TwoMachineCluster,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for machine in two_machine_cluster.api.node.machines:
        machine.cpu_millicores = 500  # capacity for one pod each
    tolerated = machines.toleration_seconds
    monkeypatch.setattr(machines, "toleration_seconds", lambda _: None)
    await request_lifecycle(people.owner, "deploy", workflow_id, 202)
    async with run_deployer_on(harness, two_machine_cluster.cluster):
        await request_lifecycle(people.owner, "start", workflow_id, 202, replicas=2)
        await wait_for_deployment(harness, workflow_id, lambda one: one.ready_replicas == 2)
        await two_machine_cluster.api.controllers.silence("node-1", is_powered=True)
        lost = await wait_for_deployment(
            harness, workflow_id, lambda one: one.observed_reason_code == "node-not-ready"
        )
        assert (status_of(lost), lost.ready_replicas) == (DeploymentStatus.RUNNING, 1)
        assert lost.observed_reason == "The node node-1 of the pod is not ready"
        assert len(two_machine_cluster.pods()) == 2, "nobody has deleted one"
        # From its toleration on, another pod is wanted in its place.
        two_machine_cluster.api.node.machines.append(FakeMachine("node-3", cpu_millicores=500))
        monkeypatch.setattr(machines, "toleration_seconds", tolerated)
        whole = await wait_for_deployment(harness, workflow_id, lambda one: one.ready_replicas == 2)
        assert whole.observed_reason is None
        assert {pod["spec"]["nodeName"] for pod in two_machine_cluster.pods()} == {"node-2", "node-3"}


async def test_a_node_that_is_lost_alone_is_waited_for_with_the_reason(
    harness: GatewayHarness,
    people: OrganizationUsers,
    workflow_id: str,
    two_machine_cluster: TwoMachineCluster,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(reconcile, "LOST_NODE_TIME", timedelta(seconds=0.2))
    two_machine_cluster.api.node.machines.pop()
    await request_lifecycle(people.owner, "deploy", workflow_id, 202)
    async with run_deployer_on(harness, two_machine_cluster.cluster, start_seconds=0.1):
        await wait_for_deployment(harness, workflow_id, is_running)
        await two_machine_cluster.api.controllers.silence("node-1", is_powered=False)
        blocked = await wait_for_deployment(harness, workflow_id, is_blocked_by("unschedulable"))
        assert "untolerated taint {node.kubernetes.io/unreachable" in str(blocked.observed_reason)
        status, code, _ = await trigger(people, workflow_id)
        assert (status, code) == (503, "not-ready")
        two_machine_cluster.api.controllers.mend("node-1")
        async with asyncio.timeout(CURED_SECONDS):
            await wait_for_deployment(harness, workflow_id, is_running)


async def test_a_program_that_takes_too_much_memory_is_named_and_started_again(
    harness: GatewayHarness, people: OrganizationUsers, workflow_id: str, tmp_path: Path
) -> None:
    async with clusters.open_fake_cluster(tmp_path) as (cluster, api):
        api.node.delay_seconds = 0.2  # so long it stays down
        await request_lifecycle(people.owner, "deploy", workflow_id, 202)
        async with run_deployer_on(harness, cluster):
            (address,) = (await wait_for_deployment(harness, workflow_id, is_running)).ready_addresses
            await cluster.get(f"{address}/exit?code=137")
            killed = await wait_for_deployment(
                harness, workflow_id, lambda one: one.observed_reason_code == "out-of-memory"
            )
            assert killed.observed_reason == "The pod exceeded its memory limit"
            again = await wait_for_deployment(harness, workflow_id, is_running)
            assert (again.observed_reason, again.generation) == (None, killed.generation)


# ── the cluster itself ────────────────────────────────────────────────────────────────────────────────────────


async def test_a_namespace_that_was_deleted_is_filled_again_once_it_is_there(
    harness: GatewayHarness,
    people: OrganizationUsers,
    workflow_id: str,
    cluster: DriverUnderTest,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(reconcile_queue, "SECONDS_PER_REQUEST", 0.1)
    await request_lifecycle(people.owner, "deploy", workflow_id, 202)
    async with run_deployer_on(harness, cluster) as found:
        before = await wait_for_deployment(harness, workflow_id, is_running)
        await cluster.delete_namespace()
        lost = await wait_for_deployment(
            harness, workflow_id, lambda one: not is_running(one) and one.observed_reason is not None
        )
        assert cluster.namespace in str(lost.observed_reason)
        await cluster.create_namespace()
        found.request_reconcile(workflow_id)  # it would look again within a minute
        again = await wait_for_deployment(harness, workflow_id, is_running)
        assert again.generation == before.generation
        await undeploy_and_wait(harness, people, workflow_id)


async def test_an_etcd_that_was_away_has_cost_no_pod_and_no_wish(
    harness: GatewayHarness,
    people: OrganizationUsers,
    workflow_id: str,
    two_machine_cluster: TwoMachineCluster,
) -> None:
    await request_lifecycle(people.owner, "deploy", workflow_id, 202)
    async with run_deployer_on(harness, two_machine_cluster.cluster):
        await wait_for_deployment(harness, workflow_id, is_running)
        (before,) = two_machine_cluster.pods()
        two_machine_cluster.api.lose_etcd()
        await request_lifecycle(people.owner, "start", workflow_id, 202, replicas=2)
        unknown = await wait_for_deployment(
            harness, workflow_id, lambda one: one.observed == ObservedState.UNKNOWN
        )
        assert "etcdserver: request timed out" in str(unknown.observed_reason)
        two_machine_cluster.api.restart_etcd()
        await wait_for_deployment(
            harness, workflow_id, lambda one: is_running(one) and one.ready_replicas == 2
        )
        assert before["metadata"]["uid"] in {pod["metadata"]["uid"] for pod in two_machine_cluster.pods()}


# ── deployers that race ───────────────────────────────────────────────────────────────────────────────────────


class FreezingApi(KubernetesApi):
    """An API server's client in a process that is frozen at one of its changes, and thawed later."""

    def __init__(self, api: FakeApiServer) -> None:
        configured = client.ApiClient(client.Configuration(host=api.url))
        configured.set_default_header("Authorization", f"Bearer {api.token}")
        super().__init__(configured, request_seconds=60)
        self.changes_left: int | None = None
        self.is_frozen = asyncio.Event()
        self.is_thawed = asyncio.Event()
        self.late: list[str] = []
        """Changes that were sent after the thaw."""

    async def send(self, method: str, path: str, **more: Any) -> Any:  # noqa: ANN401 - as it is
        if method in {"PATCH", "DELETE"} and self.changes_left is not None:
            self.changes_left -= 1
            if self.changes_left <= 0:
                self.is_frozen.set()
                await self.is_thawed.wait()
                self.late.append(f"{method} {path}")
        return await super().send(method, path, **more)


async def test_a_resumed_deployer_leaves_taken_over_deployments_to_others(
    harness: GatewayHarness,
    people: OrganizationUsers,
    workflow_id: str,
    two_machine_cluster: TwoMachineCluster,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(deployment_rows, "LOCK_SECONDS", 0.5)
    frozen_api = FreezingApi(two_machine_cluster.api)

    async def open_frozen() -> ClusterDriver:
        return KubernetesDriver(frozen_api, clusters.cluster_layout())

    await request_lifecycle(people.owner, "deploy", workflow_id, 202)
    async with run_deployer_on(harness, two_machine_cluster.cluster):
        first = await wait_for_deployment(harness, workflow_id, is_running)
    await edit_workflow(people, workflow_id, "second")
    await request_lifecycle(people.owner, "deploy", workflow_id, 202)
    frozen_api.changes_left = 3
    frozen = build_deployer(harness, open_frozen, cluster="kubernetes")
    look = asyncio.create_task(frozen.reconciler.reconcile(workflow_id))
    async with asyncio.timeout(PATIENCE_SECONDS):
        await frozen_api.is_frozen.wait()
    async with run_deployer_on(harness, two_machine_cluster.cluster):
        second = await wait_for_deployment(harness, workflow_id, is_running)
        assert second.definition_hash != first.definition_hash
        frozen_api.changes_left = None
        frozen_api.is_thawed.set()
        await look
        await turn_until(lambda: len(two_machine_cluster.pods()) == 1)
        (pod,) = two_machine_cluster.pods()
        assert pod["metadata"]["annotations"][DEFINITION_ANNOTATION] == second.definition_hash
    assert frozen_api.late == []
    await frozen.stop()
    await frozen_api.close()


async def edit_workflow(people: OrganizationUsers, workflow_id: str, text: str) -> None:
    edit = {"config": {"values": {"said": text}}}
    answer = await people.owner.api.put(f"/api/v1/workflows/{workflow_id}/nodes/step", json=edit)
    assert answer.is_success


# ── pods that are the real runner ─────────────────────────────────────────────────────────────────────────────


@pytest.fixture
async def gateway(postgres: PostgresServer, tmp_path: Path) -> AsyncIterator[GatewayHarness]:
    """A gateway of its own: it stops for good with the server that pods reach it at."""
    async with create_gateway("sqlite", postgres, tmp_path) as harness:
        yield harness


@asynccontextmanager
async def run_pods(
    harness: GatewayHarness,
    folder: Path,
    *,
    second: float,
    **settings: Any,  # noqa: ANN401 - any setting
) -> AsyncIterator[TwoMachineCluster]:
    """Bring real runners to two machines of a fake cluster."""
    async with (
        listen_for_pods(harness) as url,
        clusters.open_fake_cluster(folder, second=second) as (cluster, api),
    ):
        api.node.machines.append(FakeMachine("node-2"))
        given: dict[str, Any] = {
            "runner_gateway_url": url,
            "outbound_allowed_networks": (IPv4Network("127.0.0.1/32"),),
            **settings,
        }
        async with run_test_deployer(
            harness, cluster.reopen, command=relays.find_pod_command(), cluster="kubernetes", **given
        ):
            yield TwoMachineCluster(cluster, api)


async def test_callers_notification_neither_a_drain_nor_a_deploy_nor_a_rollback(
    gateway: GatewayHarness, tmp_path: Path
) -> None:
    people = await gateway.people()
    answers: list[tuple[int, Any]] = []

    async def call() -> None:
        while True:
            answer = await people.owner.api.post(
                f"/api/v1/workflows/{workflow_id}/trigger", json={"sync": True}
            )
            shown = answer.json()
            # A trigger during an edit is asked to try again, deployed or not.
            if answer.status_code != 409 or shown["error"]["code"] != "workflow-changed":
                answers.append((answer.status_code, shown))

    async def answered(count: int) -> None:
        wanted = len(answers) + count
        async with asyncio.timeout(PATIENCE_SECONDS):
            while len(answers) < wanted:  # noqa: ASYNC110 - a list has no event
                await asyncio.sleep(0.01)

    said_first = {"id": "step", "nodeId": "set", "config": {"values": {"said": "first"}}}
    workflow_id = await people.owner.create(nodes=[TRIGGER, said_first], connections=[EDGE])
    async with run_pods(gateway, tmp_path, second=0.1) as two_machine_cluster:
        await request_lifecycle(people.owner, "deploy", workflow_id, 202)
        first = await wait_for_deployment(gateway, workflow_id, is_running)
        callers = [asyncio.create_task(call()) for _ in range(3)]
        await answered(5)
        two_machine_cluster.api.controllers.drain("node-1")
        await wait_for_deployment(
            gateway, workflow_id, lambda one: one.ready_addresses != first.ready_addresses
        )
        await answered(5)
        await edit_workflow(people, workflow_id, "second")
        await people.owner.api.post(f"/api/v1/workflows/{workflow_id}/versions", json={"versionTag": "v2"})
        await request_lifecycle(people.owner, "deploy", workflow_id, 202)
        second = await wait_for_deployment(
            gateway, workflow_id, lambda one: is_running(one) and one.version > first.version
        )
        await answered(5)
        await request_lifecycle(people.owner, "deploy-version", workflow_id, 202, version=first.version)
        await wait_for_deployment(
            gateway, workflow_id, lambda one: is_running(one) and one.version < second.version
        )
        await answered(5)
        for caller in callers:
            caller.cancel()
        await asyncio.gather(*callers, return_exceptions=True)
        await undeploy_and_wait(gateway, people, workflow_id)
    wrong = [answer for status, answer in answers if (status, answer.get("status")) != (200, "completed")]
    assert wrong == []
    said = [answer["output"]["step"]["said"] for _, answer in answers]
    assert (said[0], said[-1], set(said)) == ("first", "first", {"first", "second"})


async def test_runs_of_a_pod_on_a_lost_node_continue_in_another(
    gateway: GatewayHarness, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reconcile, "LOST_NODE_TIME", timedelta(seconds=0.2))
    people = await gateway.people()
    async with (
        run_receiver() as receiver,
        run_pods(gateway, tmp_path, second=0.01, lease_seconds=1.5) as two_machine_cluster,
    ):
        receiver.may_answer.clear()
        asks = {"id": "step", "nodeId": "http-request", "config": {"url": receiver.url(), "method": "POST"}}
        workflow_id = await people.owner.create(
            nodes=[{"id": "start", "nodeId": "manual"}, asks], connections=[EDGE]
        )
        await request_lifecycle(people.owner, "deploy", workflow_id, 202)
        await wait_for_deployment(gateway, workflow_id, is_running)
        execution_id = (await request_lifecycle(people.owner, "trigger", workflow_id, 200))["execution_id"]

        async def asked_for(times: int) -> None:
            async with asyncio.timeout(PATIENCE_SECONDS):
                while len(receiver.received) < times:
                    await recovery.recover_runs(gateway.gateway.store, gateway.gateway.broker)
                    await asyncio.sleep(0.05)

        await asked_for(1)
        await two_machine_cluster.api.controllers.silence("node-1", is_powered=False)
        await asked_for(2)
        assert len({one.headers["idempotency-key"] for one in receiver.received}) == 1
        receiver.may_answer.set()
        progress = f"/api/v1/executions/{execution_id}/progress"
        async with asyncio.timeout(PATIENCE_SECONDS):
            while (await people.owner.api.get(progress)).json()["status"] != "completed":  # noqa: ASYNC110 - an API has no event
                await asyncio.sleep(0.05)
        assert two_machine_cluster.used == "node-2"
        two_machine_cluster.api.controllers.mend("node-1")
        await undeploy_and_wait(gateway, people, workflow_id)
