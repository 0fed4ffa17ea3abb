"""Workflows that are deployed at once on a slow node, and the requests that a deployer sends to the API server.

The API server is that of the tests. Its node prepares two pods at a time, five seconds each, and runs no programs: what
is measured is how starts are spread, and what they cost, not how fast a machine is.
"""

from __future__ import annotations

import asyncio
from pathlib import Path
from time import perf_counter

from benchmarks import deployed, load, processes, workflows
from benchmarks.load import Installed, WrongAnswer
from tests.cluster.fake_api import FakeApi
from tests.cluster.world import on_fake
from tests.services import PostgreSQL, Redis

WORKFLOWS = 50
PREPARE_SECONDS = 5.0
PREPARED_AT_ONCE = 2
REST_SECONDS = 240.0
"""Two renewals of the watches of Deployments and pods, and one of that of quotas."""
PATIENCE_SECONDS = 600.0
POLL_SECONDS = 1.0


async def measure(postgres: PostgreSQL, redis: Redis, folder: Path) -> dict[str, float]:
    """Return how many of the workflows run in the end and how many were given up, and requests by what was done."""
    database_url = await postgres.create_database("mass_starts")
    async with on_fake(folder, second=1.0) as (_, api):
        api.node.runs_commands = False
        api.node.start_seconds, api.node.starts_at_once = PREPARE_SECONDS, PREPARED_AT_ONCE
        api.node.machines[0].cpu_millicores = 1_000_000
        settings = {
            "CLUSTER": "kubernetes",
            "KUBECONFIG": str(folder / "kubeconfig"),
            "SETTLE_SECONDS": "0.1",
        }
        async with processes.production(folder, database_url, redis.url, **settings) as pilotflame:
            installed = [await load.create(pilotflame.api, workflows.pure()) for _ in range(WORKFLOWS)]
            since = perf_counter()
            await asyncio.gather(*(deployed.sent(one, "POST", "deploy") for one in installed))
            await _until_all(installed, "running")
            figures = {"all_run_seconds": perf_counter() - since}
            histories = [await deployed.sent(one, "GET", "lifecycle/history") for one in installed]
            figures["given_up"] = float(
                sum(made["reason"] == "failed" for history in histories for made in history["decisions"])
            )
            figures["requests_per_deploy"] = len(api.requests) / WORKFLOWS
            figures["requests_per_minute_at_rest"] = await _requests_in(api, REST_SECONDS)
            seen = len(api.requests)
            await deployed.sent(installed[0], "POST", "stop")
            await _until_all(installed[:1], "stopped")
            figures["requests_per_stop"] = float(len(api.requests) - seen)
    return figures


async def _until_all(installed: list[Installed], status: str) -> None:
    async with asyncio.timeout(PATIENCE_SECONDS):
        for one in installed:
            while (shown := await deployed.sent(one, "GET", "status"))["deploymentStatus"] != status:
                if shown["deploymentStatus"] in {"failed", "unknown"}:
                    raise WrongAnswer(shown)
                await asyncio.sleep(POLL_SECONDS)


async def _requests_in(api: FakeApi, seconds: float) -> float:
    """Return requests per minute while nothing happens."""
    seen = len(api.requests)
    await asyncio.sleep(seconds)
    return (len(api.requests) - seen) * 60 / seconds
