"""Pods that are killed during runs: their runs continue elsewhere long before their leases expire."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from ipaddress import IPv4Network
from pathlib import Path
from typing import Any

import psutil
import pytest
from sqlalchemy import select
from sqlmodel import col

from models.deployment import ObservedState
from models.execution import Execution
from models.pod_identity import PodProcess, lease_owner_prefix
from tests import relays
from tests.cluster.cluster_harness import open_fake_cluster
from tests.http_receiver import run_receiver
from tests.integration.deployers import (
    request_lifecycle,
    run_local_deployer,
    run_test_deployer,
    wait_for_deployment,
)
from tests.integration.gateway_harness import EDGE, GatewayHarness, create_gateway
from tests.integration.simulated_cluster import listen_for_pods
from tests.integration.test_deployer import is_running
from tests.services import PostgresServer
from workers.deployer.main import LOCAL_COMMAND

PATIENCE_SECONDS = 60.0
LEASE_SECONDS = 60.0
"""A renewed lease outlasts the patience of the tests: a run that continues sooner was reclaimed."""
DATABASES = {"local": "sqlite", "kubernetes": "postgresql"}


@pytest.fixture(scope="module", params=["local", "kubernetes"])
def driver(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
async def harness(
    driver: str, postgres: PostgresServer, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[GatewayHarness]:
    """Yield a gateway on one kind of database for each driver: neither knows the other."""
    async with create_gateway(DATABASES[driver], postgres, tmp_path_factory.mktemp("gateway")) as harness:
        yield harness


@asynccontextmanager
async def run_pods(harness: GatewayHarness, driver: str, folder: Path, url: str) -> AsyncIterator[None]:
    """Bring pods that are the real runner to this driver's cluster; those of the local one are executed as by `dev`."""
    settings: dict[str, Any] = {
        "runner_gateway_url": url,
        "lease_seconds": LEASE_SECONDS,
        "outbound_allowed_networks": (IPv4Network("127.0.0.1/32"),),
    }
    if driver == "local":
        async with run_local_deployer(harness, folder, command=LOCAL_COMMAND, **settings):
            yield
        return
    async with (
        open_fake_cluster(folder) as (cluster, _),
        run_test_deployer(
            harness, cluster.reopen, command=relays.find_pod_command(), cluster="kubernetes", **settings
        ),
    ):
        yield


async def wait_until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(PATIENCE_SECONDS):
        while not condition():  # noqa: ASYNC110 - of other processes, which set no event of ours
            await asyncio.sleep(0.02)


async def wait_for_holder(harness: GatewayHarness, workflow_id: str, execution_id: str) -> str:
    """Return the pod that holds a run."""
    statement = select(col(Execution.lease_owner)).where(col(Execution.id) == execution_id)
    async with harness.gateway.database.read() as connection:
        owner = str(await connection.scalar(statement))
    process = PodProcess.from_name(owner.removeprefix(lease_owner_prefix(workflow_id)))
    assert process is not None
    return process.pod


def kill(pod: str) -> None:
    (process,) = (
        child
        for child in psutil.Process().children()
        if child.status() != psutil.STATUS_ZOMBIE and child.environ().get("PILOTFLAME_RUNNER_POD") == pod
    )
    process.kill()


async def test_runs_of_a_killed_pod_continue_in_another_at_once(
    harness: GatewayHarness, driver: str, tmp_path: Path
) -> None:
    owner = (await harness.people()).owner
    async with (
        run_receiver() as receiver,
        listen_for_pods(harness) as url,
        run_pods(harness, driver, tmp_path, url),
    ):
        receiver.may_answer.clear()
        asks = {"id": "step", "nodeId": "http-request", "config": {"url": receiver.url(), "method": "POST"}}
        workflow_id = await owner.create(
            nodes=[{"id": "start", "nodeId": "manual"}, asks], connections=[EDGE]
        )
        await request_lifecycle(owner, "deploy", workflow_id, 202)
        await wait_for_deployment(harness, workflow_id, is_running)
        await request_lifecycle(owner, "start", workflow_id, 202, replicas=2)
        await wait_for_deployment(
            harness, workflow_id, lambda one: is_running(one) and len(one.ready_addresses) == 2
        )
        execution_id = (await request_lifecycle(owner, "trigger", workflow_id, 200))["execution_id"]
        await wait_until(lambda: len(receiver.received) == 1)
        first = await wait_for_holder(harness, workflow_id, execution_id)

        kill(first)
        await wait_until(lambda: len(receiver.received) == 2)
        second = await wait_for_holder(harness, workflow_id, execution_id)
        assert second != first
        assert len({one.headers["idempotency-key"] for one in receiver.received}) == 1
        receiver.may_answer.set()
        done = await owner.api.get(f"/api/v1/executions/{execution_id}/progress", params={"wait": 9})
        assert done.json()["status"] == "completed"
        await request_lifecycle(owner, "undeploy", workflow_id, 202)
        await wait_for_deployment(harness, workflow_id, lambda one: one.observed == ObservedState.ABSENT)
