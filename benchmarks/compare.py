"""Ratios of this checkout to another one, whose servers take turns: `python -m benchmarks.compare CHECKOUT [part ...]`.

A shared machine changes its speed by half for minutes at a time, so only figures of servers that took turns can be
compared. With `--together`, both servers run all the time and get short loads in turn: for machines with other work.
The other checkout needs a virtual environment of its own in `.venv`.
"""

from __future__ import annotations

import argparse
import gc
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import uvloop

from benchmarks import load, machine, postgres_counters, processes, scenario, usage, workflows
from benchmarks.load import InstalledWorkflow
from benchmarks.processes import PROJECT, ServerUnderTest
from benchmarks.scenario import BackingServers, MeasureOptions
from tests import services
from tests.services import PostgresServer, RedisServer

DISK = Path("/var/tmp")  # noqa: S108 - each run makes a folder of its own in it
PARTS = ("dev", "production")
FIGURES = (
    "executions_per_second",
    "cpu_ms_per_run",
    "at_10_per_second_p50_ms",
    "at_10_per_second_p99_ms",
    "saturation_p50_ms",
    "saturation_p99_ms",
    "forty_nodes_ms",
)
TOGETHER_FIGURES = ("executions_per_second", "cpu_ms_per_run", "saturation_p50_ms", "saturation_p99_ms")
"""Figures of servers that run at the same time, with `--together`."""
WRITE_FIGURES = ("write_chains_per_second", "write_chains_p50_ms", "write_chains_p99_ms")
"""Figures of chains of three requests, with `--writes`."""


@dataclass(frozen=True, slots=True)
class CompareRequest:
    """Parsed command line."""

    checkouts: Mapping[str, Path]
    parts: Sequence[str]
    rounds: int
    options: MeasureOptions
    figures: Sequence[str] = FIGURES
    without_redis: bool = False
    """Whether this checkout runs on PostgreSQL alone."""
    is_together: bool = False
    """Whether both servers run all the time and get loads in turn."""
    clients: int = scenario.CLIENTS
    """Number of clients of a load, with `is_together`."""


def main() -> None:
    request = _parse_request()
    tempfile.tempdir = str(DISK)
    uvloop.run(_compare(request))


async def _compare(request: CompareRequest) -> None:
    """Measure both checkouts in turn for each part, and print each figure and the table of ratios."""
    gc.freeze()  # The generator's own garbage collections would show up in the server's latencies.
    for part in request.parts:
        if request.is_together:
            print(
                *_table(part, await _measure_together(part, request), TOGETHER_FIGURES), sep="\n", flush=True
            )
            continue
        figures: dict[str, list[dict[str, float]]] = {name: [] for name in request.checkouts}
        with (
            tempfile.TemporaryDirectory(prefix="pilotflame-compare-") as root,
            services.run_postgres(services.DURABLE) as postgres,
            services.run_redis() as redis,
        ):
            await postgres_counters.require_durable(postgres.url)
            for number in range(request.rounds):
                # The order alternates too, so that neither always follows the other's load.
                for name in list(request.checkouts)[:: -1 if number % 2 else 1]:
                    folder = Path(tempfile.mkdtemp(dir=root))
                    measured = await _measure(
                        part, request.checkouts[name], folder, postgres, redis, f"{name}_{number}", request
                    )
                    figures[name].append(measured)
                    print(
                        f"{part} {number + 1} {name}:",
                        *(f"{measured[one]:.2f}" for one in request.figures),
                        flush=True,
                    )
        print(*_table(part, figures, request.figures), sep="\n", flush=True)


async def _measure_together(part: str, request: CompareRequest) -> dict[str, list[dict[str, float]]]:
    """Run both servers, each with a PostgreSQL and a Redis of its own for `production`, and load them in turn.

    Return the figures of each load by the name of its checkout.
    """
    figures: dict[str, list[dict[str, float]]] = {name: [] for name in request.checkouts}
    installed: dict[str, tuple[InstalledWorkflow, Mapping[str, int]]] = {}
    async with AsyncExitStack() as stack:
        root = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="pilotflame-compare-")))
        for name, checkout in request.checkouts.items():
            folder = Path(tempfile.mkdtemp(dir=root))
            servers: dict[str, int | None] = {}
            if part == "dev":
                running = processes.run_dev(folder, checkout=checkout)
            else:
                postgres = stack.enter_context(services.run_postgres(services.DURABLE))
                redis = stack.enter_context(services.run_redis())
                await postgres_counters.require_durable(postgres.url)
                servers = {"postgresql": postgres.process_id, "redis": redis.process_id}
                url = await postgres.create_database("compare")
                redis_url = None if request.without_redis and name == "this" else redis.url
                running = processes.run_production(folder, url, redis_url, checkout=checkout)
            pilotflame = await stack.enter_async_context(running)
            pure = await load.install_workflow(pilotflame.api, workflows.pure_workflow())
            found = {one: number for one, number in servers.items() if number is not None}
            installed[name] = pure, {**pilotflame.process_ids, **found}
        for number in range(request.rounds):
            for name in list(installed)[:: -1 if number % 2 else 1]:
                figures[name].append(await _measure_turn(*installed[name], request))
    return figures


async def _measure_turn(
    pure: InstalledWorkflow, process_ids: Mapping[str, int], request: CompareRequest
) -> dict[str, float]:
    """Return rate, latency and CPU time of one short load, after a shorter one that isn't counted."""
    await load.run_closed_loop(pure, request.clients, request.options.seconds / 4)
    before = usage.cpu_seconds(process_ids)
    sample = await load.run_closed_loop(pure, request.clients, request.options.seconds)
    after = usage.cpu_seconds(process_ids)
    spent = {name: 1000 * (after[name] - before[name]) / sample.count for name in process_ids}
    return {
        "executions_per_second": sample.per_second,
        "saturation_p50_ms": sample.milliseconds(50),
        "saturation_p99_ms": sample.milliseconds(99),
        "cpu_ms_per_run": sum(spent.values()),
        **{f"cpu_ms_per_run_{name}": milliseconds for name, milliseconds in spent.items()},
    }


async def _measure(
    part: str,
    checkout: Path,
    folder: Path,
    postgres: PostgresServer,
    redis: RedisServer,
    name: str,
    request: CompareRequest,
) -> dict[str, float]:
    """Start fresh servers of a checkout for a part, `dev` or `production`, and return their figures."""
    if part == "dev":
        async with processes.run_dev(folder, checkout=checkout) as pilotflame:
            return await _measure_path(pilotflame, BackingServers(), request)
    database_url = await postgres.create_database(f"compare_{name}")
    ids = {"postgresql": postgres.process_id, "redis": redis.process_id}
    servers = BackingServers(database_url, {one: number for one, number in ids.items() if number is not None})
    redis_url = None if request.without_redis and name.startswith("this") else redis.url
    async with processes.run_production(folder, database_url, redis_url, checkout=checkout) as pilotflame:
        return await _measure_path(pilotflame, servers, request)


async def _measure_path(
    pilotflame: ServerUnderTest, servers: BackingServers, request: CompareRequest
) -> dict[str, float]:
    """Return the figures of single runs, or with `--writes` those of chains of requests."""
    options = request.options
    if request.figures is WRITE_FIGURES:
        return await scenario.measure_three_writes(pilotflame, options.seconds)
    pure = await load.install_workflow(pilotflame.api, workflows.pure_workflow())
    process_ids = {**pilotflame.process_ids, **servers.process_ids}
    return {
        **await scenario.measure_saturated(pure, process_ids, servers.database_url, options),
        **await scenario.measure_at_leisure(pure, options.seconds),
        **await scenario.measure_forty_nodes(pilotflame),
    }


def _table(
    part: str, figures: Mapping[str, Sequence[Mapping[str, float]]], shown_first: Sequence[str]
) -> list[str]:
    """Return lines with the medians of both checkouts and the ratio of each pair of neighbors in time."""
    base, this = figures.values()
    names = [*shown_first, *sorted(one for one in this[0] if one.startswith("cpu_ms_per_run_"))]
    names += [
        one for one in ("calibration_ms", "runs_per_transaction", "wal_bytes_per_run") if one in this[0]
    ]
    lines = [f"\n{part:32}{'base':>10}{'this':>10}{'ratio':>8}  ratio of each round"]
    for name in names:
        ratios = [
            after[name] / before[name] if before[name] else 0.0
            for before, after in zip(base, this, strict=True)
        ]
        of_base, of_this = (median(one[name] for one in of) for of in (base, this))
        shown = " ".join(f"{one:.2f}" for one in ratios)
        lines.append(f"{name:32}{of_base:10.3f}{of_this:10.3f}{median(ratios):8.2f}  {shown}")
    return lines


def _parse_request() -> CompareRequest:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.compare", description=__doc__)
    parser.add_argument("checkout", type=Path, help="the other checkout, with a virtual environment in .venv")
    parser.add_argument("part", nargs="*", help=f"any of {', '.join(PARTS)}; default: all")
    parser.add_argument("--seconds", type=float, default=6.0, help="length of each load (default: 6)")
    parser.add_argument("--rounds", type=int, default=4, help="turns of each checkout (default: 4)")
    parser.add_argument("--writes", action="store_true", help="measure chains of three requests only")
    parser.add_argument("--without-redis", action="store_true", help="run this checkout on PostgreSQL alone")
    parser.add_argument(
        "--together", action="store_true", help="run both servers all the time, and load them in turn"
    )
    parser.add_argument(
        "--clients",
        type=int,
        default=scenario.CLIENTS,
        help=f"clients of a load with --together (default: {scenario.CLIENTS})",
    )
    given = parser.parse_args()
    if given.together and given.writes:
        parser.error("--together measures pure runs: leave out --writes")
    unknown = set(given.part) - set(PARTS)
    if unknown:
        parser.error(f"unknown: {', '.join(sorted(unknown))}")
    print(machine.describe_machine())
    return CompareRequest(
        {"base": given.checkout.resolve(), "this": PROJECT},
        given.part or PARTS,
        given.rounds,
        MeasureOptions(given.seconds, 0.0),
        WRITE_FIGURES if given.writes else FIGURES,
        given.without_redis,
        given.together,
        given.clients,
    )


if __name__ == "__main__":
    main()
