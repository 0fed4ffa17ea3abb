"""Latency of reads from an organization with a million stored runs, on both databases.

Only the gateway runs, so that nothing changes the rows. `tests.many_runs` inserts them.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Final

from sqlalchemy import text

from benchmarks import authoring, machine, processes, replay_plans
from benchmarks.authoring import WARM_UP, TimedRequest
from models.database import Database, is_sqlite, parse_url
from tests.many_runs import (
    COMMON_TAG,
    CUSTOMER_KEY,
    ORDER_KEY,
    RARE_TAG,
    RunOwner,
    cursor_behind,
    fill,
    run_id,
    workflow_id,
)
from tests.services import PostgresServer, RedisServer

if TYPE_CHECKING:
    from sqlalchemy.engine import URL

    from benchmarks.http1 import BenchmarkApi

RUNS: Final = 1_000_000
REQUESTS: Final = 25
_PATH: Final = "/api/v1/executions"
READS: Final[Mapping[str, str]] = {
    "run": f"{_PATH}/{run_id(RUNS // 2)}",
    "why_of_an_ended_run": f"{_PATH}/{run_id(RUNS // 2)}/why",
    "why_of_a_pending_run": f"{_PATH}/{run_id(RUNS // 2 + 7)}/why",
    "why_of_a_workflow": f"/api/v1/workflows/{workflow_id(3)}/why",
    "why_of_all": "/api/v1/why",
    "spans_of_a_run": f"{_PATH}/{run_id(RUNS // 2)}/spans",
    "newest_page": f"{_PATH}?after=start",
    "page_after_half": f"{_PATH}?after={cursor_behind(RUNS // 2)}",
    "newest_100": f"{_PATH}?after=start&limit=100",
    "oldest_page": f"{_PATH}?after=start&sort=createdAt:asc",
    "page_of_a_workflow": f"{_PATH}?after=start&workflow_id={workflow_id(3)}",
    "failed_page": f"{_PATH}?after=start&status=failed",
    "live_page": f"{_PATH}?after=start&status=pending,running,waiting",
    "page_of_a_trigger": f"{_PATH}?after=start&trigger_type=webhook",
    "page_of_an_hour": f"{_PATH}?after=start&since=2023-11-14T22:30:00Z&until=2023-11-14T23:30:00Z",
    "page_of_metadata": f"{_PATH}?after=start&metadata.{ORDER_KEY}=700000",
    "list_of_metadata": f"{_PATH}?metadata.{ORDER_KEY}=700000",
    "page_of_common_metadata": f"{_PATH}?after=start&metadata.{CUSTOMER_KEY}=c7",
    "page_of_two_keys": f"{_PATH}?after=start&metadata.{CUSTOMER_KEY}=c7&metadata.{ORDER_KEY}=7007",
    "page_of_a_common_tag": f"{_PATH}?after=start&tag={COMMON_TAG}",
    "page_of_a_rare_tag": f"{_PATH}?after=start&tag={RARE_TAG}",
    "failed_page_of_a_common_tag": f"{_PATH}?after=start&tag={COMMON_TAG}&status=failed",
    "deliveries": f"/api/v1/workflows/{workflow_id(0)}/deliveries?after=start",
    "events": "/api/v1/events?after=start",
    "audit_trail": "/api/v1/audit?after=start",
    "graph_of_a_run": f"{_PATH}/{run_id(RUNS // 2)}/graph",
    "statistics_of_a_workflow": f"/api/v1/workflows/{workflow_id(3)}/statistics",
    "statistics_of_all": f"{_PATH}/statistics",
    "activity": "/api/v1/workflows/activity",
    "deployments": "/api/v1/deployments",
    "dead_letter_groups": "/api/v1/dead-letters/groups",
    "overview_page": "/dashboard/overview",
    "runs_page": "/dashboard/runs",
    "runs_page_after_half": f"/dashboard/runs?after={cursor_behind(RUNS // 2)}",
    "failed_runs_page": "/dashboard/runs?status=failed",
    "runs_page_of_a_workflow": f"/dashboard/runs?workflow_id={workflow_id(3)}",
    "run_page": f"/dashboard/runs/{run_id(RUNS // 2)}",
    "workflows_page": "/dashboard/workflows",
    "workflow_page": f"/dashboard/workflows/{workflow_id(3)}",
    "lifecycle_page": f"/dashboard/workflows/{workflow_id(3)}/lifecycle",
    "trigger_page": f"/dashboard/workflows/{workflow_id(3)}/trigger",
    "versions_page": f"/dashboard/workflows/{workflow_id(3)}/versions",
    "schedule_page": "/dashboard/schedule",
    "approvals_page": "/dashboard/approvals",
    "sources_page": "/dashboard/sources",
    "keys_page": "/dashboard/keys",
    "deliveries_page": "/dashboard/deliveries",
    "delivery_page": f"/dashboard/deliveries/dlv_{RUNS // 10:026}",
    "rejected_deliveries_page": "/dashboard/deliveries?outcome=rejected",
    "dead_letters_page": "/dashboard/dead-letters",
    "audit_page": "/dashboard/audit",
    "health_page": "/dashboard/health",
}
"""Paths of the measured reads by name."""
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
    """Return the latency of each read on both databases, in milliseconds."""
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
            await fill(url, await _read_owner(url), RUNS)
            figures |= await _measure_reads(name, server.api, url)
    return figures


async def _read_owner(url: URL) -> RunOwner:
    """Return the user that the bootstrap key belongs to."""
    database = Database(url)
    try:
        async with database.read() as connection:
            row = (
                await connection.execute(text("SELECT organization_id, id, shard FROM user_account"))
            ).one()
    finally:
        await database.close()
    return RunOwner(*row)


async def _measure_reads(name: str, api: BenchmarkApi, url: URL) -> dict[str, float]:
    figures = {f"{name}_calibration_ms": machine.measure_calibration_ms()}
    begun_with = scans = 0 if is_sqlite(url) else await _count_sequential_scans(url)
    plan = await replay_plans.store_failed_run(api, url)
    requests = {read: TimedRequest("GET", path) for read, path in READS.items()}
    requests["replay_plan_of_100_nodes"] = TimedRequest(
        "POST", plan, {"definition": "current", "dryRun": True}
    )
    requests["replay_plan_of_other_inputs"] = TimedRequest(
        "POST", plan, {"input": {"order": 8}, "dryRun": True}
    )
    for read, asked in requests.items():
        sample = await authoring.sample_requests(api, [asked] * (WARM_UP + REQUESTS))
        figures[f"{name}_{read}_p95_ms"] = sample.milliseconds(95)
        if not is_sqlite(url) and (new := await _count_sequential_scans(url) - scans):
            figures[f"{name}_{read}_sequential_scans"] = new
            scans += new
    if not is_sqlite(url):
        figures[f"{name}_sequential_scans"] = scans - begun_with
    figures[f"{name}_slowest_p95_ms"] = max(
        value for figure, value in figures.items() if figure.endswith("p95_ms")
    )
    return figures


async def _count_sequential_scans(url: URL) -> int:
    """Return the number of scans of whole large tables so far; SQLite does not count them."""
    database = Database(url)
    statement = text("SELECT sum(seq_scan) FROM pg_stat_user_tables WHERE relname = ANY(:tables)")
    try:
        # Sessions report their scans at intervals, or when asked to.
        async with database.read() as connection:
            await connection.execute(text("SELECT pg_sleep(1.5)"))
            return int(await connection.scalar(statement, {"tables": list(LARGE_TABLES)}))
    finally:
        await database.close()
