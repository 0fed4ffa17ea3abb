"""Pods that are killed with runs in hand: what they held goes on elsewhere long before its lease is over."""

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
from models.pod_processes import PodProcess, lease_owner_prefix
from tests.cluster.world import on_fake
from tests.integration.deployers import asked, deployer, on_this_machine, until
from tests.integration.gateway_world import EDGE, World, open_world
from tests.integration.standing_cluster import listening
from tests.integration.test_deployer import is_running
from tests.receiver import receiving
from tests.services import PostgreSQL
from workers.deployer.main import LOCAL_COMMAND

PATIENCE_SECONDS = 60.0
LEASE_SECONDS = 60.0
"""A renewal leaves more than the patience of it: what goes on sooner was taken back."""
DATABASES = {"local": "sqlite", "kubernetes": "postgresql"}


@pytest.fixture(scope="module", params=["local", "kubernetes"])
def driver(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
async def world(
    driver: str, postgres: PostgreSQL, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[World]:
    """Yield a gateway on one kind of database for each driver: neither knows the other."""
    async with open_world(DATABASES[driver], postgres, tmp_path_factory.mktemp("world")) as world:
        yield world


@asynccontextmanager
async def running_pods(world: World, driver: str, folder: Path, url: str) -> AsyncIterator[None]:
    """Bring pods that are the real runner to this driver's cluster."""
    settings: dict[str, Any] = {
        "runner_gateway_url": url,
        "lease_seconds": LEASE_SECONDS,
        "outbound_allowed_networks": (IPv4Network("127.0.0.1/32"),),
    }
    if driver == "local":
        async with on_this_machine(world, folder, command=LOCAL_COMMAND, **settings):
            yield
        return
    async with (
        on_fake(folder) as (cluster, _),
        deployer(world, cluster.reopen, command=LOCAL_COMMAND, cluster="kubernetes", **settings),
    ):
        yield


async def happens(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(PATIENCE_SECONDS):
        while not condition():  # noqa: ASYNC110 - of other processes, which set no event of ours
            await asyncio.sleep(0.02)


async def holder(world: World, workflow_id: str, execution_id: str) -> str:
    """Return the pod that holds a run."""
    statement = select(col(Execution.lease_owner)).where(col(Execution.id) == execution_id)
    async with world.gateway.database.read() as connection:
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


async def test_what_a_killed_pod_held_goes_on_in_another_at_once(
    world: World, driver: str, tmp_path: Path
) -> None:
    owner = (await world.people()).owner
    async with receiving() as receiver, listening(world) as url, running_pods(world, driver, tmp_path, url):
        receiver.may_answer.clear()
        asks = {"id": "step", "nodeId": "http-request", "config": {"url": receiver.url(), "method": "POST"}}
        workflow_id = await owner.create(
            nodes=[{"id": "start", "nodeId": "manual"}, asks], connections=[EDGE]
        )
        await asked(owner, "deploy", workflow_id, 202)
        await until(world, workflow_id, is_running)
        await asked(owner, "start", workflow_id, 202, replicas=2)
        await until(world, workflow_id, lambda one: is_running(one) and len(one.ready_addresses) == 2)
        execution_id = (await asked(owner, "trigger", workflow_id, 200))["execution_id"]
        await happens(lambda: len(receiver.received) == 1)
        first = await holder(world, workflow_id, execution_id)

        kill(first)
        await happens(lambda: len(receiver.received) == 2)
        second = await holder(world, workflow_id, execution_id)
        assert second != first
        assert len({one.headers["idempotency-key"] for one in receiver.received}) == 1
        receiver.may_answer.set()
        done = await owner.api.get(f"/api/v1/executions/{execution_id}/progress", params={"wait": 9})
        assert done.json()["status"] == "completed"
        await asked(owner, "undeploy", workflow_id, 202)
        await until(world, workflow_id, lambda one: one.observed == ObservedState.ABSENT)
