"""Cost of a dashboard without visitors: the path of a run on two servers, one with `PILOTFLAME_DASHBOARD=off`."""

from __future__ import annotations

from pathlib import Path
from statistics import median
from typing import Final

from benchmarks import load, processes, usage, workflows

ROUNDS: Final = 8
SECONDS: Final = 2.0
CLIENTS: Final = 20
WARM_UP_RUNS: Final = 200


async def measure(folder: Path) -> dict[str, float]:
    """Return the figures of an idle dashboard as multiples of those without one: medians of pairs of neighbors."""
    folders = {"off": folder / "off", "idle": folder / "idle"}
    for one in folders.values():
        one.mkdir()
    async with (
        processes.run_dev(folders["off"], {"DASHBOARD": "off"}) as without,
        processes.run_dev(folders["idle"]) as idle,
    ):
        servers = {"off": without, "idle": idle}
        installed = {
            name: await load.install_workflow(server.api, workflows.pure_workflow())
            for name, server in servers.items()
        }
        for workflow in installed.values():
            await load.run_sequentially(workflow, WARM_UP_RUNS)
        ratios: dict[str, list[float]] = {}
        for number in range(ROUNDS):
            found: dict[str, dict[str, float]] = {}
            # The order alternates too, so that neither always follows the other's load.
            for name in list(servers)[:: -1 if number % 2 else 1]:
                before = sum(usage.cpu_seconds(servers[name].process_ids).values())
                sample = await load.run_closed_loop(installed[name], CLIENTS, SECONDS)
                spent = sum(usage.cpu_seconds(servers[name].process_ids).values()) - before
                found[name] = {
                    "executions_per_second": sample.per_second,
                    "p50": sample.milliseconds(50),
                    "p99": sample.milliseconds(99),
                    "cpu_per_run": spent / max(sample.count, 1),
                }
            for figure, value in found["idle"].items():
                ratios.setdefault(figure, []).append(value / found["off"][figure])
    return {f"idle_times_off_{figure}": median(values) for figure, values in ratios.items()}
