"""Load generator that runs workflows over HTTP and checks their results: closed (fixed clients) or open
(Poisson).
"""

from __future__ import annotations

import asyncio
import math
import random
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from itertools import count
from time import perf_counter
from typing import Any, Protocol

import msgspec

from benchmarks.http1 import BenchmarkApi, HttpAnswer, KeptConnection
from benchmarks.workflows import BenchmarkWorkflow

WAIT_SECONDS = 9
PREFER = f"Prefer: wait={WAIT_SECONDS}\r\n"
"""Servers of versions that do not know it answer at once, and are polled."""
STUCK_SECONDS = 60
"""A load that ends this much later than it should is given up: a run was lost, or the server hangs."""
UNFINISHED = frozenset({"pending", "running", "waiting"})


class WrongAnswer(Exception):
    """Refusal or wrong result of a run. It invalidates every figure of the load."""


class CreatedWorkflow(msgspec.Struct, rename="camel"):
    workflow_id: str


class StartedExecution(msgspec.Struct, rename="camel"):
    execution_id: str


class ExecutionProgress(msgspec.Struct):
    status: str
    outputs: dict[str, Any] = {}


_created = msgspec.json.Decoder(CreatedWorkflow)
_started = msgspec.json.Decoder(StartedExecution)
_progress = msgspec.json.Decoder(ExecutionProgress)
_numbers = count(1)
_wait = random.Random(1).expovariate


@dataclass(frozen=True, slots=True)
class LatencySample:
    """Durations of the runs of a load, from sending the request to reading the outputs."""

    window_seconds: float
    ended_in_window: int
    sorted_latencies_seconds: Sequence[float]

    @property
    def count(self) -> int:
        return len(self.sorted_latencies_seconds)

    @property
    def per_second(self) -> float:
        return self.ended_in_window / self.window_seconds

    def milliseconds(self, percent: float) -> float:
        """Return the latency in milliseconds that `percent` of the runs did not exceed."""
        rank = math.ceil(percent / 100 * self.count)
        return self.sorted_latencies_seconds[max(rank, 1) - 1] * 1000


class LoadTarget(Protocol):
    """Action that a load repeats."""

    @property
    def api(self) -> BenchmarkApi: ...

    async def run(self, connection: KeptConnection) -> float:
        """Perform the action once, and return the seconds that it took."""


@dataclass(frozen=True, slots=True)
class InstalledWorkflow:
    """Workflow on a server, with its id there."""

    api: BenchmarkApi
    workflow: BenchmarkWorkflow
    workflow_id: str

    async def run(self, connection: KeptConnection) -> float:
        """Run the workflow once with a new number, and return the seconds until its result.

        Raises `WrongAnswer` for a wrong one.
        """
        x = next(_numbers)
        started_at = perf_counter()
        path = f"/api/v1/workflows/{self.workflow_id}/execute"
        answer = await connection.send(self.api.post(path, b'{"triggerInputs":{"x":%d}}' % x, PREFER))
        if answer.status == 200:
            progress = _progress.decode(answer.body)
        else:
            execution_id = _started.decode(_require_status(answer, 201)).execution_id
            poll = self.api.get(f"/api/v1/executions/{execution_id}/progress?wait={WAIT_SECONDS}")
            while True:
                answer = await connection.send(poll)
                progress = _progress.decode(_require_status(answer, 200))
                if progress.status not in UNFINISHED:
                    break
        seconds = perf_counter() - started_at
        if progress.status != "completed" or not self.workflow.is_right(x, progress.outputs):
            raise WrongAnswer(f"{self.workflow.name} for {x}: {answer.body.decode()}")
        return seconds


async def install_workflow(api: BenchmarkApi, workflow: BenchmarkWorkflow) -> InstalledWorkflow:
    """Create a workflow on a server; raises `WrongAnswer` if it is refused."""
    fields: Mapping[str, Any] = {
        "name": workflow.name,
        "nodes": workflow.nodes,
        "connections": workflow.connections,
    }
    async with _open_connections(api, 1) as (connection,):
        answer = await connection.send(api.post("/api/v1/workflows", msgspec.json.encode(fields)))
    return InstalledWorkflow(api, workflow, _created.decode(_require_status(answer, 201)).workflow_id)


async def run_sequentially(installed: InstalledWorkflow, times: int) -> LatencySample:
    """Run the workflow so many times, each after the one before, and return the latencies."""
    async with _open_connections(installed.api, 1) as (connection,):
        begun_at = perf_counter()
        latencies = [await installed.run(connection) for _ in range(times)]
    return LatencySample(perf_counter() - begun_at, times, sorted(latencies))


async def run_closed_loop(installed: LoadTarget, clients: int, seconds: float) -> LatencySample:
    """Let so many clients repeat the action for `seconds`, each after its last result, and return the latencies."""
    latencies: list[float] = []
    ended_in_window = 0

    async def work(connection: KeptConnection, deadline: float) -> None:
        nonlocal ended_in_window
        while perf_counter() < deadline:
            latencies.append(await installed.run(connection))
            ended_in_window += perf_counter() <= deadline

    async with (
        _open_connections(installed.api, clients) as connections,
        asyncio.timeout(seconds + STUCK_SECONDS),
    ):
        deadline = perf_counter() + seconds
        async with asyncio.TaskGroup() as tasks:
            for connection in connections:
                tasks.create_task(work(connection, deadline))
    return LatencySample(seconds, ended_in_window, sorted(latencies))


async def run_open_loop(installed: LoadTarget, per_second: float, seconds: float) -> LatencySample:
    """Perform the action at random times, independent of the server (a Poisson process), and return the latencies."""
    latencies: list[float] = []

    async with _open_connections(installed.api, 1) as connections:
        idle = [*connections]

        async def run_once() -> None:
            # Runs seldom overlap, so the server closes most further connections before their next use.
            connection = idle.pop() if idle else await KeptConnection.open(installed.api.port)
            if not connection.is_open:
                connection = await KeptConnection.open(installed.api.port)
            connections.add(connection)
            latencies.append(await installed.run(connection))
            idle.append(connection)

        async with asyncio.timeout(seconds + STUCK_SECONDS), asyncio.TaskGroup() as tasks:
            due = perf_counter() + _wait(per_second)
            deadline = perf_counter() + seconds
            while due < deadline:
                await asyncio.sleep(due - perf_counter())
                tasks.create_task(run_once())
                due += _wait(per_second)
    return LatencySample(seconds, len(latencies), sorted(latencies))


def _require_status(answer: HttpAnswer, status: int) -> bytes:
    if answer.status != status:
        raise WrongAnswer(f"{answer.status} instead of {status}: {answer.body.decode()}")
    return answer.body


@asynccontextmanager
async def _open_connections(api: BenchmarkApi, number: int) -> AsyncIterator[set[KeptConnection]]:
    connections = {await KeptConnection.open(api.port) for _ in range(number)}
    try:
        yield connections
    finally:
        for connection in connections:
            connection.close()
