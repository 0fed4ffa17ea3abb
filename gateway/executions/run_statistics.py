"""Endpoint of the counts and times of an organization's runs by hour."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import TYPE_CHECKING, Any, TypeAlias

from sqlalchemy import Row, select
from sqlmodel import col

from gateway.executions.model_usage import ModelSumsShape
from gateway.http.request import GatewayRequest
from gateway.http.responses import JsonResponse
from gateway.http.wire import Instant, WireStruct, instant
from journal import run_hours
from journal.run_hours import HOUR, HOURS
from models.duration_histogram import estimate_quantile, merge_histograms
from models.run_hour import ALL_WORKFLOWS, RunHour

if TYPE_CHECKING:
    from sqlalchemy import Select
    from sqlalchemy.ext.asyncio import AsyncConnection


CountedHour: TypeAlias = Row[*tuple[Any, ...]]
"""Row with the columns of `RunHour` as attributes."""


class RunCountsShape(WireStruct):
    """Counts of the runs that were accepted within a time, by their present status, and their times.

    Times are milliseconds, within 10 %; null without a run that has one.
    """

    accepted: int
    unfinished: int
    """Runs that are pending, running or waiting."""
    completed: int
    failed: int
    stopped: int
    cancelled: int
    run_p50_ms: int | None
    """Median of the times from start to end of completed and failed runs."""
    run_p95_ms: int | None
    queue_p50_ms: int | None
    """Median of the times from acceptance to start of runs that have started."""
    queue_p95_ms: int | None
    wake_p50_ms: int | None
    """Median of the times for which runs have waited for pods to start; waits under 250 ms are left out."""
    wake_p95_ms: int | None
    usage: ModelSumsShape
    """Calls of language models that ended within the time, of private runs too; a second or so old."""


class RunHourShape(RunCountsShape, kw_only=True):
    """Counts of the runs that were accepted within one hour."""

    starts_at: Instant


class RunStatistics(WireStruct):
    """Counts of an organization's runs over 24 hours, the present one included."""

    since: Instant
    as_of: Instant
    total: RunCountsShape
    hours: Sequence[RunHourShape]
    """The earliest hour first; hours without runs have zeros."""


async def show(request: GatewayRequest) -> JsonResponse:
    """Count the organization's runs of 24 hours by hour and status, with the median and the 95th percentile of
    their times.

    A run counts in the hour of its acceptance. All runs of the organization count, whoever may see them, but
    private ones, such as node tests. The counts are a few seconds old, on a server with thousands of runs per
    minute up to a few minutes. `usage` has the calls of language models that ended within the time, with tokens and
    costs: those of all models for admins, and of their own models for others, as the metrics of models.
    """
    from gateway.executions import model_hour_sums  # noqa: PLC0415 - loaded with the first request

    now = request.gateway.clock()
    since = run_hours.first_hour(now)
    async with request.gateway.database.read() as connection:
        rows = await read_hours(connection, request.caller.organization_id, (ALL_WORKFLOWS,), now)
        called = await model_hour_sums.read_hours(connection, request.caller, since, now)
    found = rows[ALL_WORKFLOWS]
    hours = []
    for number, row in enumerate(found):
        begin = since + number * HOUR
        usage = model_hour_sums.sum_rows([called[begin]] if begin in called else [])
        counts = sum_hours([row] if row else [])
        hours.append(RunHourShape(starts_at=instant(begin), usage=usage, **counts))
    total = RunCountsShape(
        usage=model_hour_sums.sum_rows(called.values()), **sum_hours([row for row in found if row])
    )
    return JsonResponse(RunStatistics(since=instant(since), as_of=instant(now), total=total, hours=hours))


async def read_hours(
    connection: AsyncConnection, organization_id: str, workflow_ids: Sequence[str], now: datetime
) -> Mapping[str, Sequence[CountedHour | None]]:
    """Return the counted rows of each workflow's 24 hours up to `now`, by workflow id, the earliest hour first; None
    for an hour without runs.

    They are rows as the database has them: objects of 1,200 rows would take longer to build than to read.
    """
    since = run_hours.first_hour(now)
    found: dict[str, list[CountedHour | None]] = {one: [None] * HOURS for one in workflow_ids}
    for row in await connection.execute(hours_statement(organization_id, workflow_ids, since)):
        number = (row.starts_at - since) // HOUR
        if number < HOURS:
            found[row.workflow_id][number] = row
    return found


def hours_statement(
    organization_id: str, workflow_ids: Sequence[str], since: datetime
) -> Select[*tuple[Any, ...]]:
    """Return the statement that reads the counts of some workflows from an hour on."""
    return select(RunHour).where(
        col(RunHour.organization_id) == organization_id,
        col(RunHour.workflow_id).in_(workflow_ids),
        col(RunHour.starts_at) >= since,
    )


def sum_hours(rows: Sequence[CountedHour]) -> dict[str, Any]:
    """Return the fields of `RunCountsShape` except `usage` as sums over hours; zeros, and None for times,
    without any hour.
    """
    counts = {
        name: sum(getattr(row, name) for row in rows)
        for name in ("accepted", "completed", "failed", "stopped", "cancelled")
    }
    run_times = merge_histograms(row.run_times for row in rows)
    queue_times = merge_histograms(row.queue_times for row in rows)
    wake_times = merge_histograms(row.wake_times for row in rows)
    return {
        **counts,
        "unfinished": 2 * counts["accepted"] - sum(counts.values()),
        "run_p50_ms": estimate_quantile(run_times, 50),
        "run_p95_ms": estimate_quantile(run_times, 95),
        "queue_p50_ms": estimate_quantile(queue_times, 50),
        "queue_p95_ms": estimate_quantile(queue_times, 95),
        "wake_p50_ms": estimate_quantile(wake_times, 50),
        "wake_p95_ms": estimate_quantile(wake_times, 95),
    }
