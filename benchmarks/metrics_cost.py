"""Cost of metrics per run: that of the instruments alone, and the CPU time of `pilotflame dev` with and without them.

The instruments are called as a pure run calls them, in this process; other work only adds time to the least of many
repetitions. One server counts metrics and doesn't, in turn (`benchmarks.metrics_switch`), so that neither the speed of
the machine nor the state of the server favors one of them; on a busy machine that ratio is good to a few percent only.
"""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import time
import urllib.request
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from statistics import median
from types import SimpleNamespace
from typing import Any, Final

from benchmarks import load, metrics_switch, processes, scenario, workflows
from benchmarks.load import InstalledWorkflow
from engine.run_records import RunStatus, SpanStatus
from execution import run_metrics
from gateway.http import edge
from journal import recorder
from models import ids
from telemetry import instruments

PAIRS: Final = 100
LOAD_SECONDS: Final = 0.3
SCRAPES: Final = 20
SCRAPE_INTERVAL_SECONDS: Final = 15
"""Usual interval of Prometheus."""
ROUNDS: Final = 300
CALLS: Final = 200
STEP: Final = timedelta(milliseconds=2)
NODE_TYPES: Final = ("manual", "set", "conditional", "set")
"""Types of the nodes that the pure workflow executes; it skips one more."""


async def measure(folder: Path) -> dict[str, float]:
    """Return the cost of metrics per run in microseconds and percent, and the CPU time of a scrape."""
    port = processes.find_free_port()
    program = [sys.executable, "-m", "benchmarks.metrics_switch"]
    settings = {"METRICS_PORT": str(port)}
    figures = _measure_instruments()
    async with processes.run_dev(folder, settings, program=program) as pilotflame:
        process_id = pilotflame.process_ids["dev"]
        pure = await load.install_workflow(pilotflame.api, workflows.pure_workflow())
        for number in (signal.SIGUSR2, signal.SIGUSR1):
            await _measure_load(pure, process_id, number, scenario.WARM_UP_SECONDS)
        figures |= await _compare(pure, process_id)
        figures |= await _measure_scrapes(process_id, port)
    cost = figures["instruments_us_per_run"] - figures["unread_instruments_us_per_run"]
    # Against the least CPU time of any load, which gives the largest share.
    return {"percent_of_a_run": cost / figures["least_cpu_us_per_run"] * 100, **figures}


# ── instruments alone ───────────────────────────────────────────────────────────────────────────────────────


def _measure_instruments() -> dict[str, float]:
    count_run = _make_counts()
    metrics_switch.stop_counting()
    unread = _measure_least(count_run)
    metrics_switch.start_counting()
    return {"instruments_us_per_run": _measure_least(count_run), "unread_instruments_us_per_run": unread}


def _make_counts() -> Callable[[], None]:
    """Return a function that updates all metrics that the processes update for one pure run."""
    now = datetime.now(UTC)
    execution_id = ids.new_id("exec")
    run: Any = SimpleNamespace(
        workflow_id="wf_1", has_journal=False, execution_id=execution_id, started_at=now + STEP
    )
    spans: list[Any] = [
        SimpleNamespace(
            type=kind, status=SpanStatus.COMPLETED, started_at=now, ended_at=now + STEP, is_iteration=False
        )
        for kind in NODE_TYPES
    ]
    skipped = SimpleNamespace(type="set", status=SpanStatus.SKIPPED, started_at=None, ended_at=None)

    def count_run() -> None:
        run_metrics.count_claims([run], "worker:1")
        run_metrics.set_held_runs(2)
        for span in (*spans, skipped):
            recorder._count_node(span)  # noqa: SLF001 - its cost alone
        run_metrics.count_end(run, RunStatus.COMPLETED, now + 2 * STEP)
        run_metrics.set_held_runs(1)
        if instruments.is_exposed:
            instruments.counter("executions_accepted_total", "manual").inc()
            edge._count_answer("POST", "/api/v1/workflows/{id}/execute", 200, 0.004)  # noqa: SLF001 - as above
            # Several runs share a commit; here each has its own.
            instruments.histogram("commit_seconds").observe(0.003)
            instruments.histogram("commit_batch_size").observe(20)

    return count_run


def _measure_least(action: Callable[[], None]) -> float:
    """Return the least microseconds of one call of the action, over many rounds."""
    least = float("inf")
    for _ in range(ROUNDS):
        began_at = time.perf_counter()
        for _ in range(CALLS):
            action()
        least = min(least, time.perf_counter() - began_at)
    return least / CALLS * 1e6


# ── a server ────────────────────────────────────────────────────────────────────────────────────────────────


async def _compare(pure: InstalledWorkflow, process_id: int) -> dict[str, float]:
    """Return ratios of CPU time with to that without metrics, of loads that alternate on one server."""
    counting: list[float] = []
    silent: list[float] = []
    for pair in range(PAIRS):
        turns = [(signal.SIGUSR1, counting), (signal.SIGUSR2, silent)]
        for number, spent in turns[:: -1 if pair % 2 else 1]:
            spent.append(await _measure_load(pure, process_id, number, LOAD_SECONDS))
    ratios = sorted(one / other for one, other in zip(counting, silent, strict=True))
    return {
        "least_cpu_us_per_run": min(*counting, *silent),
        "times_without": median(ratios),
        "times_without_lower_quartile": ratios[PAIRS // 4],
        "times_without_upper_quartile": ratios[3 * PAIRS // 4],
    }


async def _measure_load(pure: InstalledWorkflow, process_id: int, number: int, seconds: float) -> float:
    """Switch the server's metrics on or off by a signal, and return its CPU microseconds per run in a load."""
    os.kill(process_id, number)
    before = _cpu_seconds(process_id)
    sample = await load.run_closed_loop(pure, scenario.CLIENTS, seconds)
    return (_cpu_seconds(process_id) - before) / sample.count * 1e6


async def _measure_scrapes(process_id: int, port: int) -> dict[str, float]:
    """Return the CPU milliseconds of one scrape, and its percentage of a core at the usual interval."""

    def scrape() -> None:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics") as answer:
            answer.read()

    before = _cpu_seconds(process_id)
    for _ in range(SCRAPES):
        await asyncio.to_thread(scrape)
    milliseconds = (_cpu_seconds(process_id) - before) / SCRAPES * 1000
    return {
        "scrape_cpu_ms": milliseconds,
        "scrapes_percent_of_a_core": milliseconds / (SCRAPE_INTERVAL_SECONDS * 1000) * 100,
    }


def _cpu_seconds(process_id: int) -> float:
    """Return the CPU time of all threads of a process, to the nanosecond; `/proc` knows it to 10 ms only."""
    clock = (~process_id << 3) | 2  # as clock_getcpuclockid(3) makes it
    return time.clock_gettime(clock)
