"""Deployers beside a gateway, with small programs as pods: their effects on the cluster are real."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any

from pydantic import SecretStr
from sqlalchemy import select, update
from sqlmodel import col

from journal.deployments import desired_state
from models.deployment import Deployment, ObservedState
from tests.cluster.cluster_harness import PROGRAM
from tests.integration.gateway_harness import SECRET, GatewayHarness, UserClient
from workers.cluster import local_driver
from workers.cluster.driver import ClusterDriver
from workers.deployer.deployer import Deployer, run_deployer
from workers.deployer.main import end_pods
from workers.deployer.settings import DeployerSettings

PATIENCE_SECONDS = 60.0
POD = (sys.executable, "-S", "-c", PROGRAM)
BROKEN_POD = (sys.executable, "-S", "-c", "raise SystemExit('it was built broken')")


@asynccontextmanager
async def run_test_deployer(
    harness: GatewayHarness,
    open_driver: Callable[[], Awaitable[ClusterDriver]],
    *,
    command: Sequence[str] = POD,
    **settings: Any,  # noqa: ANN401 - any setting
) -> AsyncIterator[Deployer]:
    """Run a deployer on a gateway's database and broker during the block; its pods end with it."""
    gateway = harness.gateway
    async with run_deployer(
        deployer_settings(**settings),
        gateway.database,
        gateway.store,
        gateway.broker,
        open_driver,
        command=command,
        close_driver=end_pods,
    ) as found:
        yield found


def build_deployer(
    harness: GatewayHarness,
    open_driver: Callable[[], Awaitable[ClusterDriver]],
    *,
    command: Sequence[str] = POD,
    **settings: Any,  # noqa: ANN401 - any setting
) -> Deployer:
    """Return a deployer that isn't started: it reconciles only when a test calls it."""
    gateway = harness.gateway
    return Deployer(
        deployer_settings(**settings),
        gateway.database,
        gateway.store,
        gateway.broker,
        open_driver,
        command=command,
    )


def deployer_settings(**settings: Any) -> DeployerSettings:  # noqa: ANN401 - any setting
    """Return settings of a deployer for tests, with these changed."""
    given = {"cluster": "local", "deployer_sweep_seconds": 0.5, "runner_gateway_url": "http://127.0.0.1:1"}
    return DeployerSettings(secret_key=SecretStr(SECRET), **{**given, **settings})


@asynccontextmanager
async def run_local_deployer(
    harness: GatewayHarness,
    folder: Path,
    *,
    command: Sequence[str] = POD,
    **settings: Any,  # noqa: ANN401 - any setting
) -> AsyncIterator[Deployer]:
    """Run a deployer with pods as processes of this machine, without isolation, during the block."""
    open_driver = partial(local_driver.open_local, folder, runs_without_isolation=True)
    async with run_test_deployer(harness, open_driver, command=command, **settings) as found:
        yield found


async def forget_deployments(harness: GatewayHarness) -> None:
    """Mark all deployments in the database as undeployed and absent."""
    gone = update(Deployment).values(is_deployed=False, observed=ObservedState.ABSENT)
    await harness.gateway.database.transaction(lambda connection: connection.execute(gone))


async def read_deployment(harness: GatewayHarness, workflow_id: str) -> Deployment:
    """Return a deployment's row; fails if there is none."""
    async with harness.gateway.database.read() as connection:
        found = await desired_state.find_deployment(connection, workflow_id)
    assert found is not None
    return found


async def read_deployments(harness: GatewayHarness, workflow_ids: Sequence[str]) -> list[Deployment]:
    """Return the rows of these deployments in one snapshot: separate reads would mix several states."""
    statement = select(Deployment).where(col(Deployment.workflow_id).in_(workflow_ids))
    async with harness.gateway.database.read() as connection:
        return [Deployment(**row) for row in (await connection.execute(statement)).mappings()]


async def wait_for_deployments(
    harness: GatewayHarness, workflow_ids: Sequence[str], holds: Callable[[list[Deployment]], bool]
) -> list[Deployment]:
    """Wait until `holds` is true of the rows of these deployments in one snapshot; return them.

    Fails after a minute.
    """
    found = await read_deployments(harness, workflow_ids)
    try:
        async with asyncio.timeout(PATIENCE_SECONDS):
            while not holds(found):
                await asyncio.sleep(0.01)
                found = await read_deployments(harness, workflow_ids)
    except TimeoutError as error:
        raise AssertionError(f"It never came to be so: {found!r}") from error
    return found


async def wait_for_deployment(
    harness: GatewayHarness, workflow_id: str, holds: Callable[[Deployment], bool]
) -> Deployment:
    """Wait until `holds` is true of a deployment's row; return it. Fails after a minute."""
    found = await read_deployment(harness, workflow_id)
    try:
        async with asyncio.timeout(PATIENCE_SECONDS):
            while not holds(found):
                await asyncio.sleep(0.02)
                found = await read_deployment(harness, workflow_id)
    except TimeoutError as error:
        raise AssertionError(f"It never came to be so: {found!r}") from error
    return found


async def request_lifecycle(
    person: UserClient,
    verb: str,
    workflow_id: str,
    status: int,
    **body: Any,  # noqa: ANN401 - any JSON value
) -> dict[str, Any]:
    """Post a lifecycle request (`start`, `deploy`, ...) for a deployment, check the status, and return the answer."""
    response = await person.api.post(f"/api/v1/workflows/{workflow_id}/{verb}", json=body)
    assert response.status_code == status, response.text
    answer: dict[str, Any] = response.json()
    return answer
