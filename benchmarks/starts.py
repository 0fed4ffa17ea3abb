"""Starts of the processes: CPU time of their imports, time until they are ready, and memory at rest."""

from __future__ import annotations

import asyncio
import resource
import secrets
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from time import perf_counter

import psutil

from benchmarks import processes, usage
from benchmarks.http1 import BenchmarkApi
from benchmarks.processes import ProcessEnded
from tests.services import PostgresServer, RedisServer

IMPORTS: Mapping[str, Sequence[str]] = {
    "gateway": ("gateway.settings", "gateway.main"),
    "worker": ("workers.settings", "workers.main"),
    "scheduler": ("scheduler.settings", "scheduler.main"),
    "deployer": ("workers.deployer.settings", "workers.deployer.main"),
    "runner": ("runner.settings", "runner.main"),
    "dev": ("pilotflame.cli", "pilotflame.dev", "pilotflame.all_in_one"),
}
"""Modules that each command loads before it serves, besides those of the command itself."""
READY_LINES: Mapping[str, str] = {
    "worker": "worker ready",
    "scheduler": "scheduler ready",
    "server": "scheduler ready",
}
"""Events in the log of processes that listen on no port, and of the child that a server starts last."""
TUNING = "from concurrency import gc_tuning; gc_tuning.postpone_until_loaded()\n"
"""First step of every process."""
ROUNDS = 9
STARTS = 3
REST_SECONDS = 5.0
POLL_SECONDS = 0.005


async def measure(postgres: PostgresServer, redis: RedisServer, folder: Path) -> dict[str, float]:
    """Return CPU time of imports, time until ready, and memory of each process, by name.

    Import times are also given as multiples of `python -c pass`.
    """
    return {
        **_measure_imports(),
        **await _measure_processes(await postgres.create_database("starts"), redis.url, folder),
        **await _measure_dev(folder),
    }


def _measure_imports() -> dict[str, float]:
    """Return the least CPU time of each import; they alternate, so that all run at the same speed of the machine."""
    programs = {"python": "pass"} | {
        name: f"{TUNING}import pilotflame.command, pilotflame.log_lines, {', '.join(modules)}"
        for name, modules in IMPORTS.items()
    }
    seconds: dict[str, list[float]] = {name: [] for name in programs}
    for _ in range(ROUNDS):
        for name, program in programs.items():
            seconds[name].append(_cpu_seconds_of(program))
    least = {name: min(values) for name, values in seconds.items()}
    figures = {"python_cpu_seconds": least["python"]}
    for name in IMPORTS:
        figures[f"{name}_import_cpu_seconds"] = least[name]
        figures[f"{name}_import_times_python"] = least[name] / least["python"]
    return figures


def _cpu_seconds_of(program: str) -> float:
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    environment = processes.environment_as_installed()
    subprocess.run([sys.executable, "-c", program], cwd=processes.PROJECT, env=environment, check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime


async def _measure_processes(database_url: str, redis_url: str, folder: Path) -> dict[str, float]:
    api = BenchmarkApi(processes.find_free_port(), f"sk-{secrets.token_urlsafe(32)}")
    variables = processes.build_environment(api, folder) | {
        "PILOTFLAME_DATABASE_URL": database_url,
        "PILOTFLAME_REDIS_URL": redis_url,
        "PILOTFLAME_SECRET_KEY": secrets.token_urlsafe(48),
    }
    subprocess.run(["pilotflame", "migrate"], env=variables, check=True, stdout=subprocess.DEVNULL)  # noqa: ASYNC221 - nothing else is under way
    figures = await _measure_starts(("gateway", "worker", "scheduler", "server"), api, variables, folder)
    return figures | await _measure_children(api, variables, folder)


async def _measure_children(
    api: BenchmarkApi, variables: Mapping[str, str], folder: Path
) -> dict[str, float]:
    """Return the memory in MB of each child of `pilotflame server`, after a rest."""
    processes.log_file("server", folder).unlink(missing_ok=True)
    with processes.run_commands({"server": ["pilotflame", "server"]}, variables, folder) as running:
        await _wait_until_ready("server", api, running, folder)
        await asyncio.sleep(REST_SECONDS)
        children = psutil.Process(running["server"].pid).children()
        ids = {child.name().removeprefix("pf-"): child.pid for child in children}
        return {f"server_{name}_memory_mb": size for name, size in usage.memory_megabytes(ids).items()}


async def _measure_dev(folder: Path) -> dict[str, float]:
    """Return the figures of starts of `dev` in a folder that already has a database."""
    folder = folder / "dev"
    folder.mkdir()
    api = BenchmarkApi(processes.find_free_port(), f"sk-{secrets.token_urlsafe(32)}")
    variables = processes.build_environment(api, folder)
    with processes.run_commands({"dev": ["pilotflame", "dev"]}, variables, folder) as running:
        await _wait_until_ready("dev", api, running, folder)
    return await _measure_starts(("dev",), api, variables, folder)


async def _measure_starts(
    names: Sequence[str], api: BenchmarkApi, variables: Mapping[str, str], folder: Path
) -> dict[str, float]:
    """Return median seconds until ready of each process, and its memory in MB after a rest."""
    figures = {}
    for name in names:
        ready_seconds = []
        for _ in range(STARTS):
            processes.log_file(name, folder).unlink(missing_ok=True)
            began = perf_counter()
            with processes.run_commands({name: ["pilotflame", name]}, variables, folder) as running:
                await _wait_until_ready(name, api, running, folder)
                ready_seconds.append(perf_counter() - began)
                if len(ready_seconds) == STARTS:
                    await asyncio.sleep(REST_SECONDS)
                    figures[f"{name}_memory_mb"] = usage.memory_megabytes({name: running[name].pid})[name]
        figures[f"{name}_ready_seconds"] = median(ready_seconds)
    return figures


async def _wait_until_ready(
    name: str, api: BenchmarkApi, running: processes.RunningProcesses, folder: Path
) -> None:
    """Wait for the log line of a process, or for `/readyz`. Raises `ProcessEnded` if it ends or is late."""
    deadline = perf_counter() + processes.READY_SECONDS
    log = processes.log_file(name, folder)
    while not (
        READY_LINES[name] in log.read_text(errors="replace")
        if name in READY_LINES
        else await processes.is_ready(api)
    ):
        processes.require_running(running, folder)
        if perf_counter() > deadline:
            raise ProcessEnded(f"{name} was not ready after {processes.READY_SECONDS} seconds")
        await asyncio.sleep(POLL_SECONDS)
