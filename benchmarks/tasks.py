"""Tasks of custom nodes: throughput of claims and reports, time until a task begins, and the cost of idle polls."""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from http import HTTPStatus
from pathlib import Path
from statistics import median, quantiles
from time import perf_counter
from typing import Any, Final
from uuid import uuid4

from pilotflame_sdk.task_channel import POLL_SECONDS

from benchmarks import processes, task_steps, usage
from benchmarks.http1 import BenchmarkApi, KeptConnection
from benchmarks.processes import ServerUnderTest
from tests import services

TASKS: Final = 3_000
"""Tasks for each batch size."""
STARTERS: Final = 16
PACE_PER_SECOND: Final = 10
PACED_RUNS: Final = 100
IDLE_POLLS: Final = 5_000
OPENING_SECONDS: Final = 20.0
SETTLE_SECONDS: Final = 30.0
"""Time after which every idle poll has sent a heartbeat."""
IDLE_SECONDS: Final = 60.0
"""Time in which every idle poll sends two heartbeats, and a fifth of them are renewed."""
TYPE: Final = "bench/step"


async def measure(folder: Path) -> dict[str, float]:
    """Return the figures of one gateway with workers, on PostgreSQL and Redis, by name."""
    with services.run_postgres(services.DURABLE) as postgres, services.run_redis() as redis:
        database_url = await postgres.create_database("tasks")
        async with processes.run_production(
            folder, database_url, redis.url, names=("gateway", "worker", "scheduler")
        ) as server:
            workflow_id = await _prepare(server.api)
            figures: dict[str, float] = {}
            for batch, workers in ((50, 2), (1, 16)):
                figures |= await _measure_batches(server.api, workflow_id, batch, workers)
            for batch, workers in ((50, 2), (1, 16)):
                await _start_runs(server.api, workflow_id, TASKS)
                speed = await task_steps.measure_tasks(server.api, database_url, workers, batch)
                figures[f"sdk_tasks_per_second_batch_{batch}"] = speed
            async with _connection(server.api) as connection:
                steps = await _post(connection, server.api, "/workflows", task_steps.chain_of_steps())
            figures["sdk_steps_per_second_of_runs_with_3"] = await task_steps.measure_runs(
                server.api, database_url, steps["workflowId"]
            )
            figures |= await _measure_begin(server.api, workflow_id)
            figures |= await _measure_idle(server)
            return figures


@asynccontextmanager
async def _connection(api: BenchmarkApi) -> AsyncIterator[KeptConnection]:
    connection = await KeptConnection.open(api.port)
    try:
        yield connection
    finally:
        connection.close()


async def _post(connection: KeptConnection, api: BenchmarkApi, path: str, body: Any) -> Any:  # noqa: ANN401 - any JSON value
    answer = await connection.send(api.post(f"/api/v1{path}", json.dumps(body).encode()))
    if answer.status >= 300:
        raise ValueError(f"{path}: {answer.status} {answer.body[:500]!r}")
    return json.loads(answer.body)


async def _prepare(api: BenchmarkApi) -> str:
    """Create a node type and a workflow with one task; return the workflow's id."""
    work = {"id": "work", "nodeId": TYPE, "config": {"n": 1}}
    document = {
        "type": TYPE,
        "version": "1.0.0",
        "config": {"type": "object", "properties": {"n": {"type": "integer"}}},
    }
    body = {
        "name": "A workflow with a task",
        "nodes": [{"id": "start", "nodeId": "manual"}, work],
        "connections": [{"source": "start", "target": "work"}],
    }
    async with _connection(api) as connection:
        await _post(connection, api, "/workflow-nodes", document)
        workflow_id: str = (await _post(connection, api, "/workflows", body))["workflowId"]
        return workflow_id


def _poll(worker: str, limit: int, wait: float) -> dict[str, Any]:
    return {
        "worker": {"id": worker},
        "requestId": uuid4().hex,
        "max": limit,
        "wait": wait,
        "types": [{"type": TYPE, "version": "1.0.0"}],
    }


async def _measure_batches(api: BenchmarkApi, workflow_id: str, batch: int, workers: int) -> dict[str, float]:
    """Return tasks per second of waiting tasks that clients claim and report, `batch` at a time."""
    await _start_runs(api, workflow_id, TASKS)
    done, ended_at = 0, 0.0

    async def work() -> None:
        nonlocal done, ended_at
        worker = f"w_{uuid4().hex}"
        async with _connection(api) as connection:
            while done < TASKS:
                claimed = await _post(connection, api, "/tasks/claim", _poll(worker, batch, 1))
                items = [
                    {"id": one["id"], "lease": one["lease"], "kind": "complete", "output": {"n": 1}}
                    for one in claimed["tasks"]
                ]
                if not items:
                    continue
                report = {"worker": worker, "held": [one["id"] for one in items], "items": items}
                results = (await _post(connection, api, "/tasks/report", report))["results"]
                done += sum(one["status"] == "ok" for one in results)
                ended_at = perf_counter()  # the last polls wait for nothing

    began = perf_counter()
    await asyncio.gather(*(work() for _ in range(workers)))
    return {f"tasks_per_second_batch_{batch}": done / (ended_at - began)}


async def _start_runs(api: BenchmarkApi, workflow_id: str, count: int) -> None:
    """Start so many runs, and wait until the task of each is ready."""
    left = count

    async def start() -> None:
        nonlocal left
        async with _connection(api) as connection:
            while left > 0:
                left -= 1
                await _post(connection, api, f"/workflows/{workflow_id}/execute", {})

    await asyncio.gather(*(start() for _ in range(STARTERS)))
    async with _connection(api) as connection:
        await _wait_for_ready(connection, api, count)


async def _wait_for_ready(connection: KeptConnection, api: BenchmarkApi, count: int) -> None:
    while True:
        answer = await connection.send(api.get("/api/v1/tasks?state=ready&limit=1"))
        if json.loads(answer.body)["count"] >= count:
            return
        await asyncio.sleep(0.1)


async def _measure_begin(api: BenchmarkApi, workflow_id: str) -> dict[str, float]:
    """Return p50 and p99 of the time between the commit of a task and its claim by an open poll, at a low rate."""
    started: list[str] = []
    worker = f"w_{uuid4().hex}"

    async def perform() -> None:
        async with _connection(api) as connection:
            while len(started) < PACED_RUNS:
                claimed = await _post(connection, api, "/tasks/claim", _poll(worker, 10, 5))
                items = [
                    {"id": one["id"], "lease": one["lease"], "kind": "complete", "output": {}}
                    for one in claimed["tasks"]
                ]
                started.extend(one["id"] for one in items)
                if items:
                    await _post(connection, api, "/tasks/report", {"worker": worker, "items": items})

    performing = asyncio.create_task(perform())
    async with _connection(api) as connection:
        for _ in range(PACED_RUNS):
            await _post(connection, api, f"/workflows/{workflow_id}/execute", {})
            await asyncio.sleep(1 / PACE_PER_SECOND)
        await performing
        delays = [await _read_delay(connection, api, task_id) for task_id in started]
    return {
        "begin_p50_ms": median(delays) * 1_000,
        "begin_p99_ms": quantiles(delays, n=100)[98] * 1_000,
    }


async def _read_delay(connection: KeptConnection, api: BenchmarkApi, task_id: str) -> float:
    """Return the seconds between creation and claim of a task."""
    shown = json.loads((await connection.send(api.get(f"/api/v1/tasks/{task_id}"))).body)
    return _seconds(shown["startedAt"]) - _seconds(shown["createdAt"])


def _seconds(moment: str) -> float:
    clock = moment.rstrip("Z").partition("T")[2].split(":")
    return int(clock[0]) * 3600 + int(clock[1]) * 60 + float(clock[2])


async def _measure_idle(server: ServerUnderTest) -> dict[str, float]:
    """Return the CPU share and the memory that the gateway takes for open polls without a task.

    The figures without polls are subtracted.
    """
    gateway = {"gateway": server.process_ids["gateway"]}
    at_rest = await _measure_cores(gateway)
    memory = usage.memory_megabytes(gateway)["gateway"]
    polls = []
    for number in range(IDLE_POLLS):
        polls.append(asyncio.create_task(_repeat_poll(server.api, number)))
        await asyncio.sleep(OPENING_SECONDS / IDLE_POLLS)
    await asyncio.sleep(SETTLE_SECONDS)
    spent = await _measure_cores(gateway)
    grown = usage.memory_megabytes(gateway)["gateway"] - memory
    if any(poll.done() for poll in polls):
        raise ValueError("a poll has failed: the limits of connections may be too low")
    for poll in polls:
        poll.cancel()
    await asyncio.gather(*polls, return_exceptions=True)
    return {
        "idle_polls": IDLE_POLLS,
        "idle_cores_for_10000": (spent - at_rest) * 10_000 / IDLE_POLLS,
        "idle_kb_per_poll": grown * 1_000 / IDLE_POLLS,
    }


async def _measure_cores(process_ids: Mapping[str, int]) -> float:
    """Wait `IDLE_SECONDS`, and return the average number of cores that the processes used meanwhile."""
    before, began = sum(usage.cpu_seconds(process_ids).values()), perf_counter()
    await asyncio.sleep(IDLE_SECONDS)
    return (sum(usage.cpu_seconds(process_ids).values()) - before) / (perf_counter() - began)


async def _repeat_poll(api: BenchmarkApi, number: int) -> None:
    """Repeat a poll as a worker of the SDK does, until canceled.

    The first one is shorter by a random time, so that polls end at different times.
    """
    wait = random.uniform(1, POLL_SECONDS)
    async with _connection(api) as connection:
        while True:
            body = json.dumps(_poll(f"w_idle_{number}", 1, wait)).encode()
            answer = await connection.send(api.post("/api/v1/tasks/claim", body))
            if answer.status == HTTPStatus.SERVICE_UNAVAILABLE:
                await asyncio.sleep(1)  # a slow disk holds up the row of a new worker
            elif answer.status == HTTPStatus.OK:
                wait = POLL_SECONDS
            else:
                raise ValueError(f"a poll was refused: {answer.status} {answer.body[:500]!r}")
