"""Steps of own Python code: tasks that workers of the Python SDK perform, alone and as three steps of each run."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Final

import asyncpg

from benchmarks.http1 import KeptConnection
from benchmarks.postgres_counters import asyncpg_dsn
from benchmarks.processes import PROJECT

if TYPE_CHECKING:
    from benchmarks.http1 import BenchmarkApi

STEPS: Final = 3
RUNS: Final = 1_000
STARTERS: Final = 16
WORKERS: Final = 2
SLOTS: Final = 50
"""Workers of the runs with three steps, and the tasks that each performs at once."""
PATIENCE_SECONDS: Final = 300.0


@contextmanager
def run_workers(api: BenchmarkApi, workers: int, slots: int) -> Iterator[None]:
    """Run so many workers of the SDK in one process of their own during the block."""
    environment = os.environ | {
        "PILOTFLAME_URL": f"http://127.0.0.1:{api.port}",
        "PILOTFLAME_API_KEY": api.key,
    }
    command = [sys.executable, "-m", "benchmarks.sdk_worker", str(workers), str(slots)]
    process = subprocess.Popen(command, cwd=PROJECT, env=environment, stderr=subprocess.DEVNULL)
    try:
        yield
    finally:
        process.terminate()
        process.wait()


async def measure_tasks(api: BenchmarkApi, database_url: str, workers: int, slots: int) -> float:
    """Let workers perform all waiting tasks; return tasks per second from the first claim to the last report."""
    connection = await asyncpg.connect(asyncpg_dsn(database_url))
    try:
        first = await connection.fetchval("SELECT max(id) FROM task WHERE state = 'completed'") or ""
        with run_workers(api, workers, slots):
            await _wait_for(connection, "SELECT count(*) = 0 FROM task WHERE ended_at IS NULL")
        row = await connection.fetchrow(
            "SELECT count(*), max(ended_at) - min(started_at) FROM task WHERE id > $1", first
        )
        assert row is not None
        return float(row[0]) * 1_000_000 / float(row[1])
    finally:
        await connection.close()


async def measure_runs(api: BenchmarkApi, database_url: str, workflow_id: str) -> float:
    """Return steps per second of runs with three steps each, from the first request to the last end."""
    connection = await asyncpg.connect(asyncpg_dsn(database_url))
    left = RUNS

    async def start() -> None:
        nonlocal left
        own = await KeptConnection.open(api.port)
        while left > 0:
            left -= 1
            await own.send(api.post(f"/api/v1/workflows/{workflow_id}/execute", b"{}"))
        own.close()

    try:
        known = await connection.fetchval("SELECT count(*) FROM task_worker")
        with run_workers(api, WORKERS, SLOTS):
            await _wait_for(connection, "SELECT count(*) >= $1 FROM task_worker", known + WORKERS)
            await asyncio.gather(*(start() for _ in range(STARTERS)))
            await _wait_for(connection, "SELECT count(*) = 0 FROM execution WHERE ended_at IS NULL")
        row = await connection.fetchrow(
            "SELECT count(*) FILTER (WHERE status = 'completed'), max(ended_at) - min(created_at)"
            " FROM execution WHERE workflow_id = $1",
            workflow_id,
        )
        assert row is not None
        return STEPS * float(row[0]) * 1_000_000 / float(row[1])
    finally:
        await connection.close()


def chain_of_steps() -> dict[str, Any]:
    """Return the definition of a workflow with three steps in a row."""
    steps = [{"id": f"step{n}", "nodeId": "bench/step", "config": {"n": n}} for n in range(STEPS)]
    names = ["start", *(str(step["id"]) for step in steps)]
    return {
        "name": "Three steps",
        "nodes": [{"id": "start", "nodeId": "manual"}, *steps],
        "connections": [{"source": a, "target": b} for a, b in pairwise(names)],
    }


async def _wait_for(connection: asyncpg.Connection, condition: str, *values: object) -> None:
    async with asyncio.timeout(PATIENCE_SECONDS):
        while not await connection.fetchval(condition, *values):  # noqa: ASYNC110 - commits of other processes
            await asyncio.sleep(0.25)
