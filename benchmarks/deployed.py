"""Workflows in pods of their own, by `pilotflame dev`: stopped under load, asleep between bursts, cold, and warm."""

from __future__ import annotations

import asyncio
import json
import re
import sqlite3
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from itertools import count
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import msgspec
import psutil

from benchmarks import engine, load, machine, processes, usage, workflows
from benchmarks.http1 import KeptConnection
from benchmarks.load import InstalledWorkflow, LatencySample, WrongAnswer

CALLS_PER_SECOND = 20
STOP_EVERY_SECONDS = 5
STEADY_PER_SECOND_ASKED = 4
"""Factor by which the steady load lasts longer than others."""
BURSTS = 9
BURST_SECONDS = 2
SILENCE_SECONDS = 5
IDLE_SECONDS = 2
"""Shorter than clients may choose: it is put into the row."""
LIFECYCLE_SECONDS = "0.5"
REST_SECONDS = 5
COLD_STARTS = 15
WARM_UP_CALLS = 50
WARM_CALLS = 500
CROWD = 200
STUCK_SECONDS = 60
DECISIONS = 100
IS_COLD = re.compile(rb"\r\nx-cold-start: *true", re.IGNORECASE)
_numbers = count(1)


class TriggerAnswer(msgspec.Struct):
    """Answer of a trigger that waits for the end of its run."""

    status: str
    output: dict[str, Any] = {}


_triggered = msgspec.json.Decoder(TriggerAnswer)


@dataclass(frozen=True, slots=True)
class TriggerCall:
    """Trigger request and its outcome."""

    seconds: float
    is_cold: bool
    """The workflow was found asleep, or about to be."""
    trouble: str
    """Wrong answer of the trigger; empty if the answer was right."""


class TriggerCallers:
    """Senders of triggers to one deployed workflow, each on a free or a new connection, and the calls so far."""

    def __init__(self, installed: InstalledWorkflow) -> None:
        self.calls: list[TriggerCall] = []
        self._installed = installed
        self._idle: list[KeptConnection] = []

    async def call(self) -> None:
        """Trigger a run, wait for its end, and add the call to `calls`, also one with a wrong answer."""
        connection = self._idle.pop() if self._idle else await KeptConnection.open(self._installed.api.port)
        x = next(_numbers)
        path = f"/api/v1/workflows/{self._installed.workflow_id}/trigger"
        request = self._installed.api.post(path, b'{"sync":true,"inputs":{"x":%d}}' % x)
        sent_at = perf_counter()
        answer = await connection.send(request)
        seconds = perf_counter() - sent_at
        self._idle.append(connection)
        is_right = answer.status == 200 and self._is_right(x, _triggered.decode(answer.body))
        trouble = "" if is_right else f"{answer.status} {answer.body.decode()}"
        self.calls.append(TriggerCall(seconds, IS_COLD.search(answer.head) is not None, trouble))

    async def call_steadily(self, seconds: float) -> None:
        """Trigger at even intervals for so many seconds, independent of the answers, and wait for all of them."""
        begun_at = perf_counter()
        async with asyncio.timeout(seconds + STUCK_SECONDS), asyncio.TaskGroup() as tasks:
            for number in range(round(CALLS_PER_SECOND * seconds)):
                await asyncio.sleep(begun_at + number / CALLS_PER_SECOND - perf_counter())
                tasks.create_task(self.call())

    async def call_at_once(self, callers: int) -> None:
        """Trigger by so many clients at once, and wait for all answers."""
        async with asyncio.timeout(STUCK_SECONDS), asyncio.TaskGroup() as tasks:
            for _ in range(callers):
                tasks.create_task(self.call())

    def close(self) -> None:
        for connection in self._idle:
            connection.close()

    def _is_right(self, x: int, triggered: TriggerAnswer) -> bool:
        return triggered.status == "completed" and self._installed.workflow.is_right(x, triggered.output)


async def measure(folder: Path, seconds: float) -> dict[str, float]:
    """Return milliseconds of cold and warm triggers, and the number of triggers lost while pods were stopped."""
    async with processes.run_dev(folder, {"LIFECYCLE_SECONDS": LIFECYCLE_SECONDS}) as pilotflame:
        installed = await load.install_workflow(pilotflame.api, workflows.pure_workflow())
        since = perf_counter()
        await send(installed, "POST", "deploy")
        figures = {
            "calibration_ms": machine.measure_calibration_ms(),
            "deploy_ms": 1000 * (perf_counter() - since),
        }
        figures |= await _measure_pod(installed, pilotflame.process_ids["dev"])
        figures |= await _measure_warm(installed)
        figures |= await _measure_cold(installed)
        figures |= await _measure_crowd(installed)
        figures |= await _measure_stops(installed, STEADY_PER_SECOND_ASKED * seconds)
        figures |= await _measure_bursts(installed, pilotflame.folder / "data")
    return figures


async def _measure_pod(installed: InstalledWorkflow, deployer_id: int) -> dict[str, float]:
    """Return the time from the start of the pod's process until it was ready, and its memory before its first run."""
    await asyncio.sleep(REST_SECONDS)
    (process,) = (
        child
        for child in psutil.Process(deployer_id).children()
        if child.environ().get("PILOTFLAME_RUNNER_WORKFLOW_ID") == installed.workflow_id
    )
    lines = [json.loads(line["text"]) for line in (await send(installed, "GET", "logs"))["lines"]]
    (ready_at,) = (datetime.fromisoformat(line["time"]) for line in lines if line["event"] == "runner ready")
    return {
        "pod_ready_ms": 1000 * (ready_at.timestamp() - usage.started_at(process.pid)),
        "pod_memory_mb": usage.memory_megabytes({"pod": process.pid})["pod"],
    }


# ── one at a time ───────────────────────────────────────────────────────────────────────────────────────────


async def _measure_warm(installed: InstalledWorkflow) -> dict[str, float]:
    """Return the latencies of triggers of a running pod, and the part of them that the engine alone doesn't explain."""
    callers = TriggerCallers(installed)
    for _ in range(WARM_UP_CALLS):
        await callers.call()
    callers.calls.clear()
    for _ in range(WARM_CALLS):
        await callers.call()
    callers.close()
    warm = latency_sample(correct_calls(callers.calls))
    by_engine_ms = await engine.measure_run_ms(installed.workflow)
    return {
        "warm_p50_ms": warm.milliseconds(50),
        "warm_p99_ms": warm.milliseconds(99),
        "engine_p50_ms": by_engine_ms,
        "warm_above_engine_p50_ms": warm.milliseconds(50) - by_engine_ms,
    }


async def _measure_cold(installed: InstalledWorkflow) -> dict[str, float]:
    """Return the latencies of triggers that each start a stopped workflow; raises `WrongAnswer` if it was running."""
    callers = TriggerCallers(installed)
    for _ in range(COLD_STARTS):
        await put_to_sleep(installed)
        await callers.call()
    callers.close()
    calls = correct_calls(callers.calls)
    if not all(call.is_cold for call in calls):
        raise WrongAnswer("A workflow that was stopped was found running")
    return {
        "cold_p50_ms": median(1000 * call.seconds for call in calls),
        "cold_longest_ms": latency_sample(calls).milliseconds(100),
    }


# ── many ────────────────────────────────────────────────────────────────────────────────────────────────────


async def _measure_crowd(installed: InstalledWorkflow) -> dict[str, float]:
    """Trigger a stopped workflow by many clients at once; return the number of its starts, and the longest latency."""
    await put_to_sleep(installed)
    before = await _count_wakes(installed)
    callers = TriggerCallers(installed)
    await callers.call_at_once(CROWD)
    callers.close()
    return {
        f"starts_for_{CROWD}_callers": await _count_wakes(installed) - before,
        f"longest_of_{CROWD}_callers_ms": latency_sample(correct_calls(callers.calls)).milliseconds(100),
    }


async def _measure_stops(installed: InstalledWorkflow, seconds: float) -> dict[str, float]:
    """Stop a workflow repeatedly under load, and return the calls that were lost, failed or woke it, and latencies."""
    before, completed_before = await _count_wakes(installed), await _count_completed(installed)
    callers = TriggerCallers(installed)
    async with asyncio.TaskGroup() as tasks:
        calling = tasks.create_task(callers.call_steadily(seconds))
        stops: list[asyncio.Task[Any]] = []
        while not (await asyncio.wait({calling}, timeout=STOP_EVERY_SECONDS))[0]:
            # Its answer waits until the pods are gone, which frequent calls can delay for long.
            stops.append(tasks.create_task(send(installed, "POST", "stop")))
        for stop in stops:
            await stop
    callers.close()
    figures = _summarize_load("stopped", callers.calls, await _count_completed(installed) - completed_before)
    return {
        **figures,
        "stopped_stops": float(len(stops)),
        "stopped_wakes": await _count_wakes(installed) - before,
    }


async def _measure_bursts(installed: InstalledWorkflow, data: Path) -> dict[str, float]:
    """Send bursts of calls, with pauses that exceed the workflow's idle time,
    and return the same figures as for stops.
    """
    await put_to_sleep(installed)
    _set_idle_seconds(data / "pilotflame.db", installed.workflow_id)
    before, completed_before = await _count_wakes(installed), await _count_completed(installed)
    callers = TriggerCallers(installed)
    for _ in range(BURSTS):
        await callers.call_steadily(BURST_SECONDS)
        await asyncio.sleep(SILENCE_SECONDS)
    callers.close()
    figures = _summarize_load("bursts", callers.calls, await _count_completed(installed) - completed_before)
    return {**figures, "bursts_wakes": await _count_wakes(installed) - before}


def _summarize_load(load_name: str, calls: Sequence[TriggerCall], completed: int) -> dict[str, float]:
    """Return the figures of a load by name: calls, those without a completed run,
    those that failed or woke a pod, latencies.
    """
    failed = [call.trouble for call in calls if call.trouble]
    if failed:
        print(f"{load_name}: {failed[0]}", flush=True)
    everything, waking = latency_sample(calls), latency_sample([call for call in calls if call.is_cold])
    return {
        f"{load_name}_calls": float(len(calls)),
        f"{load_name}_lost": float(len(calls) - completed),
        f"{load_name}_failed": float(len(failed)),
        f"{load_name}_calls_that_woke": float(waking.count),
        f"{load_name}_wake_p50_ms": waking.milliseconds(50),
        f"{load_name}_wake_p99_ms": waking.milliseconds(99),
        f"{load_name}_p50_ms": everything.milliseconds(50),
        f"{load_name}_longest_ms": everything.milliseconds(100),
    }


def correct_calls(calls: Sequence[TriggerCall]) -> Sequence[TriggerCall]:
    """Return the calls, or raise `WrongAnswer` for the first with a wrong answer."""
    for call in calls:
        if call.trouble:
            raise WrongAnswer(call.trouble)
    return calls


def latency_sample(calls: Sequence[TriggerCall]) -> LatencySample:
    seconds = sorted(call.seconds for call in calls)
    return LatencySample(sum(seconds), len(seconds), seconds)


# ── the deployment ──────────────────────────────────────────────────────────────────────────────────────────


async def put_to_sleep(installed: InstalledWorkflow) -> None:
    """Stop the workflow, and wait until none of its pods is left."""
    stopped = await send(installed, "POST", "stop")
    if stopped["deploymentStatus"] != "stopped":
        raise WrongAnswer(stopped)


async def _count_wakes(installed: InstalledWorkflow) -> int:
    """Return the number of wakes among the workflow's last decisions."""
    history = await send(installed, "GET", f"lifecycle/history?limit={DECISIONS}")
    return sum(decision["action"] == "wake" for decision in history["decisions"])


async def _count_completed(installed: InstalledWorkflow) -> int:
    path = f"/api/v1/executions?workflow_id={installed.workflow_id}&status=completed&limit=1"
    listed = await _request(installed, installed.api.get(path))
    return int(listed["count"])


async def send(
    installed: InstalledWorkflow, method: str, subpath: str, body: dict[str, Any] | None = None
) -> dict[str, Any]:
    """Send a request to a path below the workflow's, and return the JSON of the answer;
    raises `WrongAnswer` for a refusal.
    """
    path = f"/api/v1/workflows/{installed.workflow_id}/{subpath}"
    content = None if body is None else msgspec.json.encode(body)
    return await _request(installed, installed.api.request(method, path, content))


async def _request(installed: InstalledWorkflow, request: bytes) -> dict[str, Any]:
    connection = await KeptConnection.open(installed.api.port)
    try:
        answer = await connection.send(request)
    finally:
        connection.close()
    if answer.status not in {200, 202}:
        raise WrongAnswer(f"{answer.status}: {answer.body.decode()}")
    body: dict[str, Any] = msgspec.json.decode(answer.body)
    return body


def _set_idle_seconds(database: Path, workflow_id: str) -> None:
    policy = {"type": "idle-shutdown", "idleTimeoutMinutes": IDLE_SECONDS / 60}
    connection = sqlite3.connect(database, timeout=10)
    with connection:
        connection.execute(
            "UPDATE workflow SET lifecycle = ? WHERE id = ?",
            (msgspec.json.encode(policy).decode(), workflow_id),
        )
    connection.close()
