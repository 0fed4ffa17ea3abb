"""Steps that are performed on a freshly started server, and their figures."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from time import perf_counter

from benchmarks import load, machine, postgres_counters, sink, usage, workflows
from benchmarks.load import InstalledWorkflow, WrongAnswer
from benchmarks.processes import ServerUnderTest
from benchmarks.profiles import ProcessProfiler

CLIENTS = 50
RUNS_PER_SECOND = 10
SINGLE_RUNS = 10
WARM_UP_SECONDS = 2.0
COMMITS_OF_A_RUN = 2
"""Accept, record: write transactions of a pure run that is not claimed and shares none with other runs."""


@dataclass(frozen=True, slots=True)
class MeasureOptions:
    """Durations in seconds of each load and of the rest before memory is read, and a profiler if one is wanted."""

    seconds: float
    idle_seconds: float
    profiler: ProcessProfiler | None = None


@dataclass(frozen=True, slots=True)
class BackingServers:
    """Servers that Pilotflame depends on; none for `dev`."""

    database_url: str | None = None
    process_ids: Mapping[str, int] = field(default_factory=dict)


async def measure(
    pilotflame: ServerUnderTest, servers: BackingServers, options: MeasureOptions
) -> dict[str, float]:
    """Return every figure of a started server once, by name.

    Raises `WrongAnswer` as soon as a run has a wrong result.
    """
    pure = await load.install_workflow(pilotflame.api, workflows.pure_workflow())
    await load.run_sequentially(pure, 1)
    figures = {
        "ready_seconds": pilotflame.ready_seconds,
        "first_result_seconds": perf_counter() - pilotflame.started_at,
    }
    await asyncio.sleep(options.idle_seconds)
    process_ids = {**pilotflame.process_ids, **servers.process_ids}
    figures |= _figures_by_process("memory_mb", usage.memory_megabytes(process_ids))
    figures |= await measure_saturated(pure, process_ids, servers.database_url, options)
    figures |= await measure_at_leisure(pure, options.seconds)
    figures |= await measure_forty_nodes(pilotflame)
    figures |= await measure_three_writes(pilotflame, options.seconds)
    return figures


async def measure_saturated(
    installed: InstalledWorkflow,
    process_ids: Mapping[str, int],
    database_url: str | None,
    options: MeasureOptions,
) -> dict[str, float]:
    """Return rate, latency and CPU time with clients that never pause."""
    await load.run_closed_loop(installed, CLIENTS, WARM_UP_SECONDS)
    calibration_ms = machine.measure_calibration_ms()
    before = await _measure_spent(process_ids, database_url)
    sampling = _sample_process(process_ids, options)
    sample = await load.run_closed_loop(installed, CLIENTS, options.seconds)
    after = await _measure_spent(process_ids, database_url)
    for file in await sampling if sampling else ():
        print(f"profile: {file}")
    cpu_seconds = {name: after.cpu_seconds[name] - before.cpu_seconds[name] for name in process_ids}
    figures = {
        "calibration_ms": (calibration_ms + machine.measure_calibration_ms()) / 2,
        "executions_per_second": sample.per_second,
        "saturation_p50_ms": sample.milliseconds(50),
        "saturation_p95_ms": sample.milliseconds(95),
        "saturation_p99_ms": sample.milliseconds(99),
        "saturation_longest_ms": sample.milliseconds(100),
        **_figures_by_process(
            "cpu_ms_per_run", {name: 1000 * spent / sample.count for name, spent in cpu_seconds.items()}
        ),
        "generator_cpu_ms_per_run": 1000 * (after.own_cpu_seconds - before.own_cpu_seconds) / sample.count,
    }
    if before.counters is not None and after.counters is not None:
        figures |= after.counters.per_run(before.counters, sample.count)
        figures["runs_per_transaction"] = COMMITS_OF_A_RUN / figures["transaction_ids_per_run"]
    return figures


async def measure_at_leisure(installed: InstalledWorkflow, seconds: float) -> dict[str, float]:
    """Return latencies at ten runs per second."""
    sample = await load.run_open_loop(installed, RUNS_PER_SECOND, seconds)
    return {f"at_10_per_second_p{percent}_ms": sample.milliseconds(percent) for percent in (50, 95, 99)}


async def measure_forty_nodes(pilotflame: ServerUnderTest) -> dict[str, float]:
    """Return the median milliseconds of a run of forty nodes, one at a time."""
    installed = await load.install_workflow(pilotflame.api, workflows.light_chain_workflow())
    await load.run_sequentially(installed, 1)
    sample = await load.run_sequentially(installed, SINGLE_RUNS)
    return {"forty_nodes_ms": sample.milliseconds(50)}


async def measure_three_writes(pilotflame: ServerUnderTest, seconds: float) -> dict[str, float]:
    """Return rate and latencies of runs that make three requests; raises `WrongAnswer` if requests are missing."""
    async with sink.run_sink() as called:
        installed = await load.install_workflow(pilotflame.api, workflows.three_writes_workflow(called.url))
        warm_up = await load.run_closed_loop(installed, CLIENTS, WARM_UP_SECONDS / 2)
        sample = await load.run_closed_loop(installed, CLIENTS, seconds)
        runs = warm_up.count + sample.count
    if called.calls < 3 * runs:
        raise WrongAnswer(f"{runs} runs of three writes made {called.calls} calls")
    return {
        "write_chains_per_second": sample.per_second,
        "write_chains_p50_ms": sample.milliseconds(50),
        "write_chains_p99_ms": sample.milliseconds(99),
    }


@dataclass(frozen=True, slots=True)
class _SpentResources:
    cpu_seconds: Mapping[str, float]
    own_cpu_seconds: float
    counters: postgres_counters.PostgresCounters | None


async def _measure_spent(process_ids: Mapping[str, int], database_url: str | None) -> _SpentResources:
    counters = await postgres_counters.read_counters(database_url) if database_url else None
    return _SpentResources(usage.cpu_seconds(process_ids), time.process_time(), counters)


def _sample_process(
    process_ids: Mapping[str, int], options: MeasureOptions
) -> asyncio.Task[list[Path]] | None:
    profiler = options.profiler
    if profiler is None or profiler.process not in process_ids:
        return None
    return asyncio.create_task(profiler.record(process_ids[profiler.process], options.seconds))


def _figures_by_process(name: str, values: Mapping[str, float]) -> dict[str, float]:
    return {name: sum(values.values()), **{f"{name}_{process}": value for process, value in values.items()}}
