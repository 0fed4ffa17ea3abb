"""Workflows deployed and started on Kubernetes, by the processes of the Procfile and an API server of the tests.

That server schedules at once, has every image, and runs a container's command as a process of this machine: what is
measured is ours, and a real cluster adds its own time.
"""

from __future__ import annotations

import sys
from pathlib import Path
from statistics import median
from time import perf_counter

from benchmarks import deployed, load, machine, processes, workflows
from benchmarks.deployed import Callers
from benchmarks.load import Installed, Sample, WrongAnswer
from tests.cluster.world import on_fake
from tests.services import PostgreSQL, Redis

ROUNDS = 20
PROBE_SECONDS = 1.0
"""As the readiness probe of the manifests asks for: the least that Kubernetes allows."""


async def measure(postgres: PostgreSQL, redis: Redis, folder: Path) -> dict[str, float]:
    """Return milliseconds from asking for a deployment, or for a start of it, to the answer that its pod is ready."""
    database_url = await postgres.create_database("cluster")
    async with on_fake(folder, second=1.0) as (_, api):
        api.node.path = f"{Path(sys.executable).parent}:{api.node.path}"
        settings = {"CLUSTER": "kubernetes", "KUBECONFIG": str(folder / "kubeconfig")}
        async with processes.production(folder, database_url, redis.url, **settings) as pilotflame:
            installed = await load.create(pilotflame.api, workflows.pure())
            figures = {"calibration_ms": machine.calibration_ms()}
            # Whole seconds between probes would hide what a start is faster by.
            deploys, starts = await _rounds(installed)
            figures |= _figures("deploy_probed_often", deploys) | _figures("start_probed_often", starts)
            figures["start_by_deploy"] = median(starts) / median(deploys)
            api.node.probe_seconds = PROBE_SECONDS
            deploys, starts = await _rounds(installed)
            figures |= _figures("deploy", deploys) | _figures("start", starts)
    return figures


async def _rounds(installed: Installed) -> tuple[list[float], list[float]]:
    """Return the seconds of each deploy, and of the start that follows on a stop of it."""
    deploys: list[float] = []
    starts: list[float] = []
    for _ in range(ROUNDS):
        deploys.append(await _until_running(installed, "deploy"))
        await deployed.put_to_sleep(installed)
        starts.append(await _until_running(installed, "start"))
        callers = Callers(installed)
        await callers.call()
        callers.close()
        deployed.right(callers.calls)
        await deployed.sent(installed, "POST", "undeploy")
    return deploys, starts


async def _until_running(installed: Installed, what: str) -> float:
    since = perf_counter()
    answer = await deployed.sent(installed, "POST", what)
    if answer["deploymentStatus"] != "running":
        raise WrongAnswer(answer)
    return perf_counter() - since


def _figures(name: str, seconds: list[float]) -> dict[str, float]:
    sample = Sample(sum(seconds), len(seconds), sorted(seconds))
    return {f"{name}_p{percent}_ms": sample.milliseconds(percent) for percent in (50, 95)}
