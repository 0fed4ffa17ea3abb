"""Run all benchmarks, or the named parts: `python -m benchmarks [part ...]`.

`python -m benchmarks soak`, `fuzz` and `faults` start those programs, which have options of their own.
"""

from __future__ import annotations

import argparse
import gc
import runpy
import shutil
import sys
import tempfile
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import uvloop

from benchmarks import (
    agents,
    authoring,
    baseline,
    claims,
    cluster,
    dashboard,
    deployed,
    durability,
    engine,
    intake,
    machine,
    mass_starts,
    metrics_cost,
    million,
    node_loss,
    postgres_counters,
    processes,
    report,
    scenario,
    starts,
    targets,
    tasks,
    transfer,
)
from benchmarks.profiles import ProcessProfiler
from benchmarks.scenario import BackingServers, MeasureOptions
from tests import services

DISK = Path("/var/tmp")  # noqa: S108 - each run makes a folder of its own in it
PARTS = (
    "baseline",
    "dev",
    "production",
    "start",
    "claims",
    "authoring",
    "engine",
    "transfer",
    "deployed",
    "cluster",
    "intake",
    "durability",
    "mass_starts",
    "node_loss",
    "million",
    "dashboard",
    "tasks",
    "agents",
    "metrics",
)
PROGRAMS = ("faults", "fuzz", "soak")
"""Modules that are no measurements: they look for errors, and exit with 1 if there is one."""
PART_OF_PROCESS = {"gateway": "production", "worker": "production", "dev": "dev"}
SHORTEST_PROFILE_SECONDS = 6


@dataclass(frozen=True, slots=True)
class BenchmarkRequest:
    """Parsed command line."""

    parts: Sequence[str]
    repeat: int
    folder: Path
    options: MeasureOptions
    json: Path | None


def main() -> None:
    """Run one of `PROGRAMS`, or measure the requested parts, print all figures, and save them if asked to."""
    if sys.argv[1:2] and sys.argv[1] in PROGRAMS:
        runpy.run_module(f"benchmarks.{sys.argv.pop(1)}", run_name="__main__", alter_sys=True)
        return
    request = _parse_request()
    # PostgreSQL and Redis create their folders below tempfile's; /tmp may be in memory, without a disk's
    # latency.
    request.folder.mkdir(parents=True, exist_ok=True)
    tempfile.tempdir = str(request.folder)
    figures = uvloop.run(_measure(request))
    outcomes = [*targets.judge_targets(figures)]
    print(*report.format_table(figures), "", *outcomes, sep="\n")
    if request.json is not None:
        report.save_report(request.json, machine.describe_machine(), figures, outcomes)


async def _measure(request: BenchmarkRequest) -> dict[str, list[dict[str, float]]]:
    """Measure the requested parts; return the figures of each repetition, by part.

    Each repetition starts fresh servers.
    """
    gc.freeze()  # The generator's own garbage collections would show up in the server's latencies.
    figures: dict[str, list[dict[str, float]]] = {part: [] for part in PARTS if part in request.parts}
    with tempfile.TemporaryDirectory(prefix="pilotflame-benchmarks-") as root:
        for number in range(request.repeat):
            folder = Path(tempfile.mkdtemp(dir=root))
            if "baseline" in figures:
                figures["baseline"].append(_baseline(folder, request.options))
            for part, run in (("dev", _dev), ("production", _production)):
                if part in figures:
                    print(f"{part}, repetition {number + 1} of {request.repeat} ...", flush=True)
                    figures[part].append(await run(folder, request.options))
                    _compare(figures, part)
        for part, measure in ONE_SHOT_PARTS.items():
            if part in figures:
                print(f"{part} ...", flush=True)
                folder = Path(tempfile.mkdtemp(dir=root))
                figures[part].append(await measure(folder, request.options))
    return figures


def _baseline(folder: Path, options: MeasureOptions) -> dict[str, float]:
    print("baseline ...", flush=True)
    with services.run_redis() as redis:
        return baseline.measure(redis.url, folder, options.seconds)


async def _dev(folder: Path, options: MeasureOptions) -> dict[str, float]:
    async with processes.run_dev(folder) as pilotflame:
        return await scenario.measure(pilotflame, BackingServers(), options)


async def _production(folder: Path, options: MeasureOptions) -> dict[str, float]:
    with services.run_postgres(services.DURABLE) as postgres, services.run_redis() as redis:
        await postgres_counters.require_durable(postgres.url)
        database_url = await postgres.create_database("benchmark")
        ids = {"postgresql": postgres.process_id, "redis": redis.process_id}
        servers = BackingServers(
            database_url, {name: number for name, number in ids.items() if number is not None}
        )
        async with processes.run_production(folder, database_url, redis.url) as pilotflame:
            return await scenario.measure(pilotflame, servers, options)


async def _engine(_folder: Path, _options: MeasureOptions) -> dict[str, float]:
    return await engine.measure()


async def _transfer(folder: Path, _options: MeasureOptions) -> dict[str, float]:
    with services.run_postgres(services.DURABLE) as postgres:
        return await transfer.measure(postgres, folder)


async def _deployed(folder: Path, options: MeasureOptions) -> dict[str, float]:
    return await deployed.measure(folder, options.seconds)


async def _cluster(folder: Path, _options: MeasureOptions) -> dict[str, float]:
    with services.run_postgres(services.DURABLE) as postgres, services.run_redis() as redis:
        return await cluster.measure(postgres, redis, folder)


async def _mass_starts(folder: Path, _options: MeasureOptions) -> dict[str, float]:
    with services.run_postgres(services.DURABLE) as postgres, services.run_redis() as redis:
        return await mass_starts.measure(postgres, redis, folder)


async def _node_loss(folder: Path, _options: MeasureOptions) -> dict[str, float]:
    with services.run_postgres(services.DURABLE) as postgres, services.run_redis() as redis:
        return await node_loss.measure(postgres, redis, folder)


async def _start(folder: Path, _options: MeasureOptions) -> dict[str, float]:
    with services.run_postgres(services.DURABLE) as postgres, services.run_redis() as redis:
        return await starts.measure(postgres, redis, folder)


async def _claims(folder: Path, _options: MeasureOptions) -> dict[str, float]:
    with services.run_postgres(services.DURABLE) as postgres:
        return await claims.measure(postgres, folder)


async def _authoring(folder: Path, _options: MeasureOptions) -> dict[str, float]:
    with services.run_postgres(services.DURABLE) as postgres, services.run_redis() as redis:
        await postgres_counters.require_durable(postgres.url)
        return await authoring.measure(postgres, redis, folder)


async def _intake(folder: Path, options: MeasureOptions) -> dict[str, float]:
    with services.run_postgres(services.DURABLE) as postgres, services.run_redis() as redis:
        await postgres_counters.require_durable(postgres.url)
        return await intake.measure(postgres, redis, folder, options.seconds)


async def _million(folder: Path, _options: MeasureOptions) -> dict[str, float]:
    with services.run_postgres(services.DURABLE) as postgres, services.run_redis() as redis:
        return await million.measure(postgres, redis, folder)


async def _dashboard(folder: Path, _options: MeasureOptions) -> dict[str, float]:
    return await dashboard.measure(folder)


async def _durability(folder: Path, _options: MeasureOptions) -> dict[str, float]:
    return await durability.measure(folder)


async def _tasks(folder: Path, _options: MeasureOptions) -> dict[str, float]:
    return await tasks.measure(folder)


async def _agents(folder: Path, _options: MeasureOptions) -> dict[str, float]:
    return await agents.measure(folder)


async def _metrics(folder: Path, _options: MeasureOptions) -> dict[str, float]:
    return await metrics_cost.measure(folder)


ONE_SHOT_PARTS: Mapping[str, Callable[[Path, MeasureOptions], Awaitable[dict[str, float]]]] = {
    "engine": _engine,
    "transfer": _transfer,
    "deployed": _deployed,
    "cluster": _cluster,
    "start": _start,
    "claims": _claims,
    "authoring": _authoring,
    "intake": _intake,
    "durability": _durability,
    "mass_starts": _mass_starts,
    "node_loss": _node_loss,
    "million": _million,
    "dashboard": _dashboard,
    "tasks": _tasks,
    "agents": _agents,
    "metrics": _metrics,
}
"""Parts that are measured once, however often the others are repeated."""


def _compare(figures: dict[str, list[dict[str, float]]], part: str) -> None:
    """Add to the newest repetition of a part its ratio to the baseline just before it, if that was measured."""
    if stock := figures.get("baseline"):
        newest = figures[part][-1]
        newest["times_stock_dramatiq"] = newest["executions_per_second"] / stock[-1]["chains_per_second"]


def _parse_request() -> BenchmarkRequest:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    add = parser.add_argument
    add("parts", nargs="*", type=_parse_part, metavar="part", help=f"any of {', '.join(PARTS)}; default: all")
    add("--seconds", type=float, default=15, help="length of each load (default: %(default)s)")
    add("--repeat", type=int, default=1, help="repetitions, each on fresh servers (default: %(default)s)")
    add("--idle-seconds", type=float, default=30, help="rest before memory is read (default: %(default)s)")
    add("--profile", choices=PART_OF_PROCESS, help="sample this process while it is saturated")
    add("--json", type=Path, metavar="FILE", help="write all figures there")
    add(
        "--folder",
        type=Path,
        default=DISK,
        help="where data is put: on a real disk (default: %(default)s)",
    )
    given = parser.parse_args()
    parts = given.parts or [part for part in PARTS if part != "durability" or shutil.which("cc")]
    if given.profile and PART_OF_PROCESS[given.profile] not in parts:
        parser.error(
            f"{given.profile} is a process of {PART_OF_PROCESS[given.profile]}, which is not measured"
        )
    if given.profile and given.seconds < SHORTEST_PROFILE_SECONDS:
        parser.error(f"a profile needs loads of at least {SHORTEST_PROFILE_SECONDS} seconds")
    folder = given.folder.resolve()
    profiler = ProcessProfiler(given.profile, folder / "pilotflame-profiles") if given.profile else None
    options = MeasureOptions(given.seconds, given.idle_seconds, profiler)
    return BenchmarkRequest(parts, given.repeat, folder, options, given.json)


def _parse_part(name: str) -> str:
    if name not in PARTS:
        raise argparse.ArgumentTypeError(f"{name!r} is none of {', '.join(PARTS)}")
    return name


if __name__ == "__main__":
    main()
