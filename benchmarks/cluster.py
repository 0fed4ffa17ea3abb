"""Deployments and starts on Kubernetes, with the processes of the Procfile and the tests' API server.

That server schedules at once, has every image, and runs a container's command as a process of this machine.
The figures measure Pilotflame only; a real cluster adds its own time.
"""

from __future__ import annotations

import sys
from pathlib import Path
from statistics import median
from time import perf_counter

from benchmarks import deployed, load, machine, processes, workflows
from benchmarks.deployed import TriggerCallers
from benchmarks.load import InstalledWorkflow, LatencySample, WrongAnswer
from tests.cluster.cluster_harness import open_fake_cluster
from tests.services import PostgresServer, RedisServer

ROUNDS = 20
PROBE_SECONDS = 1.0
"""Interval of the manifests' readiness probe, the shortest that Kubernetes permits."""


async def measure(postgres: PostgresServer, redis: RedisServer, folder: Path) -> dict[str, float]:
    """Return milliseconds from the request to deploy, or to start, a workflow to the answer that its pod is ready."""
    database_url = await postgres.create_database("cluster")
    async with open_fake_cluster(folder, second=1.0) as (_, api):
        api.node.path = f"{Path(sys.executable).parent}:{api.node.path}"
        settings = {"CLUSTER": "kubernetes", "KUBECONFIG": str(folder / "kubeconfig")}
        async with processes.run_production(folder, database_url, redis.url, settings) as pilotflame:
            installed = await load.install_workflow(pilotflame.api, workflows.pure_workflow())
            figures = {"calibration_ms": machine.measure_calibration_ms()}
            # Whole seconds between probes would hide differences between start times.
            deploys, starts = await _measure_rounds(installed)
            figures |= _summarize("deploy_probed_often", deploys) | _summarize("start_probed_often", starts)
            figures["start_by_deploy"] = median(starts) / median(deploys)
            api.node.probe_seconds = PROBE_SECONDS
            deploys, starts = await _measure_rounds(installed)
            figures |= _summarize("deploy", deploys) | _summarize("start", starts)
    return figures


async def _measure_rounds(installed: InstalledWorkflow) -> tuple[list[float], list[float]]:
    """Return the seconds of each deploy, and of each start after a stop of the deployed workflow."""
    deploys: list[float] = []
    starts: list[float] = []
    for _ in range(ROUNDS):
        deploys.append(await _wait_until_running(installed, "deploy"))
        await deployed.put_to_sleep(installed)
        starts.append(await _wait_until_running(installed, "start"))
        callers = TriggerCallers(installed)
        await callers.call()
        callers.close()
        deployed.correct_calls(callers.calls)
        await deployed.send(installed, "POST", "undeploy")
    return deploys, starts


async def _wait_until_running(installed: InstalledWorkflow, request: str) -> float:
    since = perf_counter()
    answer = await deployed.send(installed, "POST", request)
    if answer["deploymentStatus"] != "running":
        raise WrongAnswer(answer)
    return perf_counter() - since


def _summarize(name: str, seconds: list[float]) -> dict[str, float]:
    sample = LatencySample(sum(seconds), len(seconds), sorted(seconds))
    return {f"{name}_p{percent}_ms": sample.milliseconds(percent) for percent in (50, 95)}
