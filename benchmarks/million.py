"""Latency of reads from an organization with a million stored runs, on both databases.

Only the gateway runs, so that nothing changes the rows. `tests.many_runs` and `tests.many_objects` insert them.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Final

from sqlalchemy import text

from benchmarks import authoring, machine, processes, replay_plans, usage
from benchmarks.authoring import WARM_UP, TimedRequest
from benchmarks.million_reads import READS, RUNS
from models.database import Database, is_sqlite, parse_url
from tests import many_objects, many_runs
from tests.many_runs import RunOwner
from tests.services import PostgresServer, RedisServer

if TYPE_CHECKING:
    from sqlalchemy.engine import URL

    from benchmarks.http1 import BenchmarkApi

REQUESTS: Final = 25
LARGE_TABLES: Final = (
    "execution",
    "execution_data",
    "execution_label",
    "span",
    "delivery",
    "event",
    "audit_entry",
)


async def measure(postgres: PostgresServer, redis: RedisServer, folder: Path) -> dict[str, float]:
    """Return latency and CPU milliseconds of each read on both databases, and the scans of large tables, by name."""
    figures: dict[str, float] = {}
    addresses = {
        "sqlite": f"sqlite:///{folder}/million.db",
        "postgresql": await postgres.create_database("million"),
    }
    for name, address in addresses.items():
        of_database = folder / name
        of_database.mkdir()
        async with processes.run_production(of_database, address, redis.url, names=("gateway",)) as server:
            url = parse_url(address)
            await _fill(url)
            ids = dict(server.process_ids)
            if not is_sqlite(url) and postgres.process_id is not None:
                ids["postgresql"] = postgres.process_id
            figures |= await _measure_reads(name, server.api, url, ids)
    return figures


async def _fill(url: URL) -> None:
    """Insert the runs and the other objects, and update PostgreSQL's statistics, as autovacuum would."""
    owner = await _read_owner(url)
    await many_runs.fill(url, owner, RUNS)
    database = Database(url)
    try:
        await database.transaction(lambda connection: many_objects.fill(connection, owner, RUNS))
    finally:
        await database.close()
    await many_runs.analyze(url)


async def _read_owner(url: URL) -> RunOwner:
    """Return the only user of the database, which the bootstrap key belongs to."""
    database = Database(url)
    try:
        async with database.read() as connection:
            row = (
                await connection.execute(text("SELECT organization_id, id, shard FROM user_account"))
            ).one()
    finally:
        await database.close()
    return RunOwner(*row)


async def _measure_reads(
    name: str, api: BenchmarkApi, url: URL, process_ids: Mapping[str, int]
) -> dict[str, float]:
    """Return the figures of each read of one server; their names begin with `name`."""
    figures = {f"{name}_calibration_ms": machine.measure_calibration_ms()}
    begun_with = 0 if is_sqlite(url) else await _count_sequential_scans(url)
    plan = await replay_plans.store_failed_run(api, url)
    requests = {read: TimedRequest("GET", path) for read, path in READS.items()}
    requests["replay_plan_of_100_nodes"] = TimedRequest(
        "POST", plan, {"definition": "current", "dryRun": True}
    )
    requests["replay_plan_of_other_inputs"] = TimedRequest(
        "POST", plan, {"input": {"order": 8}, "dryRun": True}
    )
    run_page = f"/dashboard/runs/{plan.split('/')[-2]}"
    requests["run_page_of_100_nodes"] = TimedRequest("GET", run_page)
    requests["replay_page_of_100_nodes"] = TimedRequest("GET", f"{run_page}/replay")
    for read, asked in requests.items():
        before = sum(usage.cpu_seconds(process_ids).values())
        sample = await authoring.sample_requests(api, [asked] * (WARM_UP + REQUESTS))
        spent = sum(usage.cpu_seconds(process_ids).values()) - before
        figures[f"{name}_{read}_p95_ms"] = sample.milliseconds(95)
        figures[f"{name}_{read}_cpu_ms"] = spent * 1_000 / (WARM_UP + REQUESTS)
    if not is_sqlite(url):
        figures[f"{name}_sequential_scans"] = found = await _count_sequential_scans(url) - begun_with
        if found:
            figures |= await _name_scanning_reads(name, api, url, requests)
    for unit in ("p95_ms", "cpu_ms"):
        figures[f"{name}_slowest_{unit}"] = max(
            value for figure, value in figures.items() if figure.endswith(unit)
        )
    return figures


async def _name_scanning_reads(
    name: str, api: BenchmarkApi, url: URL, requests: Mapping[str, TimedRequest]
) -> dict[str, float]:
    """Send each request once; return the number of scans of whole large tables by those that make any, by name."""
    figures: dict[str, float] = {}
    scans = await _count_sequential_scans(url)
    for read, asked in requests.items():
        await authoring.sample_requests(api, [asked])
        if new := await _count_sequential_scans(url) - scans:
            figures[f"{name}_{read}_sequential_scans"] = new
            scans += new
    return figures


async def _count_sequential_scans(url: URL) -> int:
    """Return PostgreSQL's number of scans of whole large tables so far."""
    database = Database(url)
    statement = text("SELECT sum(seq_scan) FROM pg_stat_user_tables WHERE relname = ANY(:tables)")
    try:
        # Sessions report their scans at intervals, or when asked to.
        async with database.read() as connection:
            await connection.execute(text("SELECT pg_sleep(1.5)"))
            return int(await connection.scalar(statement, {"tables": list(LARGE_TABLES)}))
    finally:
        await database.close()
