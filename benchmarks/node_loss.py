"""Loss of the node of an always-on workflow: the time until its status follows, and until it serves again.

The tests' API server is used, with two nodes and the times of a real control plane: a node is not ready
after 50 s without a renewal of its lease. Each node prepares a pod for three seconds.
"""

from __future__ import annotations

import asyncio
from pathlib import Path
from time import perf_counter

from benchmarks import deployed, load, mass_starts, workflows
from benchmarks.load import InstalledWorkflow
from tests.cluster.fake_api.machines import FakeMachine
from tests.services import PostgresServer, RedisServer

PREPARE_SECONDS = 3.0
PATIENCE_SECONDS = 180.0
POLL_SECONDS = 0.2


async def measure(postgres: PostgresServer, redis: RedisServer, folder: Path) -> dict[str, float]:
    """Return the seconds from the loss of a node until the workflow's status shows it,
    and until the workflow runs again.
    """
    async with mass_starts.run_deploying(postgres, redis, folder) as (api, pilotflame):
        api.node.start_seconds = PREPARE_SECONDS
        api.node.machines.append(FakeMachine("node-2"))
        installed = await load.install_workflow(pilotflame.api, workflows.pure_workflow())
        await deployed.send(installed, "PUT", "lifecycle", {"type": "always-on"})
        await deployed.send(installed, "POST", "deploy")
        await _wait_until(installed, is_running=True)
        (pod,) = api.store.every("pods", "user-workflows")
        since = perf_counter()
        await api.controllers.silence(pod["spec"]["nodeName"], is_powered=False)
        await _wait_until(installed, is_running=False)
        noticed = perf_counter()
        await _wait_until(installed, is_running=True)
        return {
            "status_follows_seconds": noticed - since,
            "serves_again_seconds": perf_counter() - since,
        }


async def _wait_until(installed: InstalledWorkflow, *, is_running: bool) -> None:
    async with asyncio.timeout(PATIENCE_SECONDS):
        status = await deployed.send(installed, "GET", "status")
        while (status["deploymentStatus"] == "running") != is_running:
            await asyncio.sleep(POLL_SECONDS)
            status = await deployed.send(installed, "GET", "status")
