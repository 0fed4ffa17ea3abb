"""Simultaneous deployment of many workflows on a slow node, and the deployer's requests to the API server.

The tests' API server is used, whose node runs no programs. The figures show how starts are spread, and the
cost of starts and of rest; they don't show the speed of a machine. At first the node prepares two pods at a
time, in five seconds each. For the many workflows at rest it prepares all at once.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from time import perf_counter
from typing import Any

from benchmarks import deployed, load, processes, workflows
from benchmarks.http1 import ConnectionLost
from benchmarks.load import InstalledWorkflow, WrongAnswer
from benchmarks.processes import ServerUnderTest
from tests.cluster.cluster_harness import open_fake_cluster
from tests.cluster.fake_api import FakeApiServer
from tests.services import PostgresServer, RedisServer

WORKFLOWS_AT_ONCE = 50
PREPARE_SECONDS = 5.0
PREPARED_AT_ONCE = 2
WORKFLOWS_AT_REST = 500
DEPLOYS_AT_ONCE = 10
"""As many edits as a gateway has connections for; more at once get 503."""
CONTROLLER_SECONDS = 1.0
"""Delay until controllers notice a change. Listing so many objects more often would take all of the time."""
FAST = {"HEAD_SECONDS": "60", "KUBERNETES_REQUESTS_PER_SECOND": "300", "STARTS_AT_ONCE": "300"}
REST_SECONDS = 240.0
"""Two renewals of the watches of Deployments and pods, and one of that of quotas."""
PATIENCE_SECONDS = 600.0
POLL_SECONDS = 1.0


async def measure(postgres: PostgresServer, redis: RedisServer, folder: Path) -> dict[str, float]:
    """Return the figures of many workflows that start at once on a slow node, and of many without load, by name."""
    (folder / "starts").mkdir()
    (folder / "rest").mkdir()
    return {
        **await _measure_starts(postgres, redis, folder / "starts"),
        **await _measure_rest(postgres, redis, folder / "rest"),
    }


async def _measure_starts(postgres: PostgresServer, redis: RedisServer, folder: Path) -> dict[str, float]:
    """Deploy many workflows at once on a slow node; return the time until all run, and the requests per deployment."""
    async with run_deploying(postgres, redis, folder) as (api, pilotflame):
        api.node.start_seconds, api.node.starts_at_once = PREPARE_SECONDS, PREPARED_AT_ONCE
        installed = [
            await load.install_workflow(pilotflame.api, workflows.pure_workflow())
            for _ in range(WORKFLOWS_AT_ONCE)
        ]
        since = perf_counter()
        await asyncio.gather(*(deployed.send(one, "POST", "deploy") for one in installed))
        await _wait_until_all(installed, "running")
        all_run_seconds = perf_counter() - since
        histories = [await deployed.send(one, "GET", "lifecycle/history") for one in installed]
        given_up = sum(made["reason"] == "failed" for history in histories for made in history["decisions"])
        return {
            "all_run_seconds": all_run_seconds,
            "given_up": float(given_up),
            "requests_per_deploy": len(api.requests) / WORKFLOWS_AT_ONCE,
        }


async def _measure_rest(postgres: PostgresServer, redis: RedisServer, folder: Path) -> dict[str, float]:
    """Deploy many workflows; return the deployer's requests per minute without load, and for a stop."""
    async with run_deploying(postgres, redis, folder, **FAST) as (api, pilotflame):
        api.node.delay_seconds = CONTROLLER_SECONDS
        installed = [
            await load.install_workflow(pilotflame.api, workflows.pure_workflow())
            for _ in range(WORKFLOWS_AT_REST)
        ]
        places = asyncio.Semaphore(DEPLOYS_AT_ONCE)

        async def deploy(one: InstalledWorkflow) -> None:
            async with places:
                await _send(one, "POST", "deploy")

        await asyncio.gather(*map(deploy, installed))
        await _wait_until_all(installed, "running")
        at_rest = await _count_requests(api, REST_SECONDS)
        seen = len(api.requests)
        await deployed.send(installed[0], "POST", "stop")
        await _wait_until_all(installed[:1], "stopped")
        return {
            "deployed_at_rest": float(len(installed)),
            "requests_per_minute_at_rest": at_rest,
            "requests_per_stop": float(len(api.requests) - seen),
        }


@asynccontextmanager
async def run_deploying(
    postgres: PostgresServer, redis: RedisServer, folder: Path, **settings: str
) -> AsyncIterator[tuple[FakeApiServer, ServerUnderTest]]:
    """Run all processes on an empty database, with a fake API server of one large node, during the block."""
    database_url = await postgres.create_database(f"mass_starts_{folder.name}")
    async with open_fake_cluster(folder, second=1.0) as (_, api):
        api.node.runs_commands = False
        api.node.machines[0].cpu_millicores = 1_000_000
        settings = {
            "CLUSTER": "kubernetes",
            "KUBECONFIG": str(folder / "kubeconfig"),
            "SETTLE_SECONDS": "0.1",
            **settings,
        }
        async with processes.run_production(folder, database_url, redis.url, settings) as pilotflame:
            yield api, pilotflame


async def _wait_until_all(installed: list[InstalledWorkflow], status: str) -> None:
    async with asyncio.timeout(PATIENCE_SECONDS):
        for one in installed:
            while (shown := await _send(one, "GET", "status"))["deploymentStatus"] != status:
                if shown["deploymentStatus"] == "failed":  # unknown passes: this process may answer late
                    raise WrongAnswer(shown)
                await asyncio.sleep(POLL_SECONDS)


async def _send(installed: InstalledWorkflow, method: str, subpath: str) -> dict[str, Any]:
    """Send a request about a workflow, again if the gateway closes the connection, and return the answer."""
    while True:
        with suppress(ConnectionLost):
            return await deployed.send(installed, method, subpath)


async def _count_requests(api: FakeApiServer, seconds: float) -> float:
    """Wait, and return the requests per minute that the API server got meanwhile."""
    seen = len(api.requests)
    await asyncio.sleep(seconds)
    return (len(api.requests) - seen) * 60 / seconds
