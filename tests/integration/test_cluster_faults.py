"""Deployers while their cluster is in trouble: no room, no image, lost nodes, lost namespaces, an etcd that is away.

What an operator can do to any cluster is done to a real one too, where `TEST_KUBECONFIG` names one.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from models.deployment import Deployment, DeploymentStatus, Observed, status_of
from scheduler import lifecycle
from tests.cluster import world as clusters
from tests.cluster.conftest import REAL
from tests.cluster.fake_api import FakeApi
from tests.cluster.fake_api.machines import Machine
from tests.cluster.world import NAMESPACE, PROGRAM, Cluster, turn_until
from tests.integration.deployers import asked, deployer, forget_deployments, until
from tests.integration.gateway_world import GRAPH, People, World, open_world
from tests.integration.test_deployer import has_failed, is_running
from tests.services import PostgreSQL
from workers.deployer.deployer import Deployer

CURED_SECONDS = 5.0
"""How long a start may take to go on after the cure; the real cluster's own part comes on top."""


@pytest.fixture(scope="module")
async def world(postgres: PostgreSQL, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[World]:
    async with open_world("sqlite", postgres, tmp_path_factory.mktemp("world")) as world:
        yield world


@pytest.fixture(autouse=True)
async def _nothing_is_left_deployed(world: World) -> AsyncIterator[None]:
    yield
    await forget_deployments(world)


@pytest.fixture
async def workflow_id(people: People) -> str:
    workflow_id = await people.owner.create(**GRAPH)
    policy = {"type": "always-on"}
    changed = await people.owner.api.put(f"/api/v1/workflows/{workflow_id}/lifecycle", json=policy)
    assert changed.status_code == 200
    return workflow_id


@pytest.fixture(params=["fake", pytest.param("real", marks=REAL)])
async def cluster(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Cluster]:
    """A Kubernetes cluster, whichever it is."""
    if request.param == "fake":
        async with clusters.on_fake(tmp_path) as (found, api):
            api.node.runs_commands = False
            api.node.pull_seconds = 3_600  # as good as the five minutes of a real one
            yield found
    else:
        assert clusters.TEST_KUBECONFIG is not None
        async with clusters.on_real(Path(clusters.TEST_KUBECONFIG)) as found:
            yield found


@dataclass
class FakeCluster:
    """A fake cluster with two machines, whose seconds are short."""

    cluster: Cluster
    api: FakeApi

    def pods(self) -> list[dict[str, Any]]:
        return [
            pod
            for pod in self.api.store.every("pods", NAMESPACE)
            if "deletionTimestamp" not in pod["metadata"]
        ]

    @property
    def used(self) -> str:
        """The machine of the one pod that is not being stopped."""
        (pod,) = self.pods()
        return str(pod["spec"]["nodeName"])


@pytest.fixture
async def fake(tmp_path: Path) -> AsyncIterator[FakeCluster]:
    async with clusters.on_fake(tmp_path, second=0.005) as (found, api):
        api.node.runs_commands = False
        api.node.machines.append(Machine("node-2"))
        yield FakeCluster(found, api)


@asynccontextmanager
async def deploying(
    world: World,
    cluster: Cluster,
    **settings: Any,  # noqa: ANN401 - any setting
) -> AsyncIterator[Deployer]:
    command = (cluster.python, "-S", "-c", PROGRAM)
    given: dict[str, Any] = {"cluster": "kubernetes", "runner_image": cluster.image, **settings}
    async with deployer(world, cluster.reopen, command=command, **given) as found:
        yield found


async def undeployed(world: World, people: People, workflow_id: str) -> None:
    await asked(people.owner, "undeploy", workflow_id, 202)
    await until(world, workflow_id, lambda one: one.observed == Observed.ABSENT)


async def trigger(people: People, workflow_id: str) -> tuple[int, str, str]:
    """Return status, code and message of the answer to whoever waits for a run."""
    answer = await people.owner.api.post(f"/api/v1/workflows/{workflow_id}/trigger", json={"sync": True})
    error = answer.json()["error"]
    assert int(answer.headers["Retry-After"]) > 0
    return answer.status_code, error["code"], error["message"]


def is_blocked_by(code: str) -> Callable[[Deployment], bool]:
    return lambda one: one.observed_reason_code == code and status_of(one) is DeploymentStatus.STARTING


# ── why pods do not start ─────────────────────────────────────────────────────────────────────────────────────


async def test_an_image_that_is_nowhere_fails_at_once_and_its_reason_outlives_the_pods(
    world: World, people: People, workflow_id: str, fake: FakeCluster
) -> None:
    fake.api.node.missing_images.add(fake.cluster.image)
    fake.api.node.terminate_seconds = 0.3
    await asked(people.owner, "deploy", workflow_id, 202)
    async with deploying(world, fake.cluster) as found:
        await until(world, workflow_id, has_failed)
        # What the kubelet says last is what is kept.
        failed = await until(world, workflow_id, lambda one: "BackOff" in (one.observed_reason or ""))
        assert failed.observed_reason is not None
        assert fake.cluster.image in failed.observed_reason
        await lifecycle.keep_policies(world.gateway.database, world.gateway.broker)
        seen = [
            await until(world, workflow_id, lambda one: one.observed == Observed.STOPPING),
            await until(world, workflow_id, lambda one: one.observed == Observed.STOPPED),
        ]
        fake.api.lose_etcd()
        found.look_at(workflow_id)
        unknown = await until(world, workflow_id, lambda one: one.observed == Observed.UNKNOWN)
        assert unknown.observed_reason != failed.observed_reason
        fake.api.restart_etcd()
        found.look_at(workflow_id)
        seen.append(await until(world, workflow_id, lambda one: one.observed == Observed.STOPPED))
        for one in seen:
            assert status_of(one) is DeploymentStatus.FAILED
            assert (one.observed_reason_code, one.observed_reason) == ("image-pull", failed.observed_reason)
        shown = (await people.owner.api.get(f"/api/v1/workflows/{workflow_id}/status")).json()
        assert (shown["deploymentStatus"], shown["reasonCode"]) == ("failed", "image-pull")


async def test_a_start_over_the_quota_says_so_at_once_and_goes_on_when_there_is_room(
    world: World, people: People, workflow_id: str, cluster: Cluster
) -> None:
    await cluster.set_quota({"pods": "0"})
    async with deploying(world, cluster, start_seconds=0.1):
        await asked(people.owner, "deploy", workflow_id, 202)
        blocked = await until(world, workflow_id, is_blocked_by("quota"))
        status, code, message = await trigger(people, workflow_id)
        assert (status, code) == (503, "not-ready")
        assert blocked.observed_reason is not None
        assert blocked.observed_reason in message
        await cluster.set_quota(None)
        running = await until(world, workflow_id, is_running)
        assert (running.observed_reason, running.observed_reason_code) == (None, None)
        await undeployed(world, people, workflow_id)


async def test_a_start_that_no_node_has_room_for_says_so_at_once_and_goes_on_when_one_has(
    world: World, people: People, workflow_id: str, fake: FakeCluster
) -> None:
    machines = fake.api.node.machines
    for machine in machines:
        machine.cpu_millicores = 1
    async with deploying(world, fake.cluster, start_seconds=0.1):
        await asked(people.owner, "deploy", workflow_id, 202)
        await until(world, workflow_id, is_blocked_by("unschedulable"))
        status, code, message = await trigger(people, workflow_id)
        assert (status, code) == (503, "not-ready")
        assert "0/2 nodes are available: 2 Insufficient cpu." in message
        machines.append(Machine("node-3"))
        fake.api.store.touch()
        running = await until(world, workflow_id, is_running)
        assert (running.observed_reason, running.observed_reason_code) == (None, None)


# ── nodes ─────────────────────────────────────────────────────────────────────────────────────────────────────


async def test_a_drained_node_is_left_for_another_and_nothing_has_failed(
    world: World, people: People, workflow_id: str, fake: FakeCluster
) -> None:
    await asked(people.owner, "deploy", workflow_id, 202)
    async with deploying(world, fake.cluster):
        before = await until(world, workflow_id, is_running)
        assert fake.used == "node-1"
        fake.api.controllers.drain("node-1")
        await turn_until(lambda: len(fake.pods()) == 1 and fake.used == "node-2")
        after = await until(world, workflow_id, is_running)
        assert after.generation == before.generation


async def test_a_program_that_takes_too_much_memory_is_named_and_started_again(
    world: World, people: People, workflow_id: str, tmp_path: Path
) -> None:
    async with clusters.on_fake(tmp_path) as (cluster, api):
        api.node.delay_seconds = 0.2  # so long it stays down
        await asked(people.owner, "deploy", workflow_id, 202)
        async with deploying(world, cluster):
            (address,) = (await until(world, workflow_id, is_running)).ready_addresses
            await cluster.get(f"{address}/exit?code=137")
            killed = await until(world, workflow_id, lambda one: one.observed_reason_code == "out-of-memory")
            assert killed.observed_reason == "The pod used more memory than it is granted"
            again = await until(world, workflow_id, is_running)
            assert (again.observed_reason, again.generation) == (None, killed.generation)


# ── the cluster itself ────────────────────────────────────────────────────────────────────────────────────────


async def test_an_etcd_that_was_away_has_cost_no_pod_and_no_wish(
    world: World, people: People, workflow_id: str, fake: FakeCluster
) -> None:
    await asked(people.owner, "deploy", workflow_id, 202)
    async with deploying(world, fake.cluster):
        await until(world, workflow_id, is_running)
        (before,) = fake.pods()
        fake.api.lose_etcd()
        await asked(people.owner, "start", workflow_id, 202, replicas=2)
        unknown = await until(world, workflow_id, lambda one: one.observed == Observed.UNKNOWN)
        assert "etcdserver: request timed out" in str(unknown.observed_reason)
        fake.api.restart_etcd()
        await until(world, workflow_id, lambda one: is_running(one) and one.ready_replicas == 2)
        assert before["metadata"]["uid"] in {pod["metadata"]["uid"] for pod in fake.pods()}
