"""Endpoint about the processes of the server and its database; their totals are for the operator alone."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from datetime import timedelta
from typing import TYPE_CHECKING, Final, Literal

from msgspec import structs
from sqlalchemy import select, text
from sqlmodel import col

from doctor import alert_states
from doctor.alert_notices import AlertSeverity
from doctor.alert_states import AlertState, ProcessFacts
from gateway.drift import process_reports, server_figures
from gateway.drift.process_reports import (
    ALL_IN_ONE,
    ClusterHealth,
    ConnectionFailure,
    ProcessQueue,
    ProcessReport,
    find_time,
)
from gateway.drift.server_figures import ServerFigures
from gateway.http.request import GatewayRequest
from gateway.http.responses import JsonResponse
from gateway.http.wire import Instant, WireStruct, instant, optional_instant
from journal.presence_reports import ABSENT_SECONDS, program_version
from messages.broker import BrokerUnavailable
from models import access_store
from models.column_types import build_row
from models.database import is_sqlite
from models.execution import Leadership
from models.process_presence import ProcessPresence
from models.schema_migration import HEAD_REVISION
from models.worker_presence import WorkerPresence
from telemetry.process_activity import BROKER, DATABASE

if TYPE_CHECKING:
    from datetime import datetime

    from sqlalchemy.ext.asyncio import AsyncConnection

    from doctor.alert_states import QueueFacts
    from models.database import Database

SHOWN_PROCESSES: Final = 100
"""Workers, and other processes, that are listed: those that reported last."""
SHOWN_TABLES: Final = 20
_POSTGRESQL_TABLES: Final = text(
    "SELECT c.relname AS name, pg_total_relation_size(c.oid) AS bytes, c.reltuples AS rows FROM pg_class c"
    " JOIN pg_namespace n ON n.oid = c.relnamespace"
    " WHERE n.nspname = current_schema() AND c.relkind = 'r' ORDER BY 2 DESC"
)
_SQLITE_BYTES: Final = text("SELECT page_count * page_size FROM pragma_page_count(), pragma_page_size()")


class ServerProcess(WireStruct):
    """Process of the server, by its reports."""

    role: str
    """`gateway`, `scheduler`, `deployer`, `worker`, or `all-in-one` for the workers of `pilotflame dev`."""
    name: str
    host: str | None
    """Name of its machine or container; null for a process of before 0.2."""
    version: str | None
    """Null for a worker of before 0.2."""
    is_present: bool
    """Whether it has reported within the last 15 seconds."""
    started_at: Instant | None
    """Null for a process of before 0.2."""
    seen_at: Instant
    """Last report."""
    loop_lag_ms: int
    """Longest delay of a timer of its event loop in the ten seconds before the last report."""
    held_runs: int | None
    concurrency: int | None
    """Runs that a worker holds, and holds at most; null for other roles."""
    queues: Sequence[ProcessQueue]
    """Queues from which it takes work; empty for gateways and schedulers."""
    lease_renewed_at: Instant | None
    """Last renewal of its leases of runs, or of the lead of a scheduler; null before the first."""
    claims_per_second: float | None
    """Claims of a worker before its last report; null for other roles."""
    event_streams: int | None
    """Open event streams of a gateway; null for other roles."""


class SchedulerLead(WireStruct):
    """Lead of the scheduler that does the duties of which there is one."""

    name: str | None
    """Null unless `isOperator`."""
    is_held: bool
    since: Instant | None
    """Begin of the lead, by the last report of its process; null unless `isOperator`, and for one that is over."""
    lease_until: Instant


class SchedulerDuty(WireStruct):
    """Periodic duty of the leading scheduler."""

    name: str
    every_seconds: float
    last_at: Instant
    """End of its last tick that ended well, by the last report of the process."""
    seconds: float
    """Time that it took."""


class TableSize(WireStruct):
    """Size of a table with its indexes."""

    name: str
    bytes: int
    rows: int | None
    """Estimate of the database; null before its first analysis."""


class ServerAlert(WireStruct):
    """Alert of the shipped rules, as the stores show it now."""

    name: str
    severity: AlertSeverity
    state: AlertState
    """`firing`, `quiet`, or `unknown`: it needs rates, which Prometheus alone has."""
    summary: str
    remedy: str


class DatabaseHealth(WireStruct):
    """Database as this gateway sees it."""

    kind: Literal["postgresql", "sqlite"]
    latency_ms: float
    revision: str
    """Revision of its tables, by the last migration."""
    program_revision: str
    """Revision that this gateway's version needs; the tables may be of a later one while versions change."""
    bytes: int | None
    """Null unless `isOperator`."""
    tables: Sequence[TableSize]
    """The 20 largest; empty unless `isOperator`, and with SQLite, which does not keep sizes of tables."""
    last_failure: ConnectionFailure | None
    """Newest failure that processes have met, by their last reports; null unless `isOperator`."""


class ServerHealth(WireStruct):
    """Processes of the server, its database and its broker."""

    as_of: Instant
    is_operator: bool
    """Whether the organization is the operator's, which the first start of the server has made."""
    version: str
    processes: Sequence[ServerProcess]
    """Processes that reported within a day and have not ended in order, at most 100 workers and 100 others.
    Empty unless `isOperator`.
    """
    figures: ServerFigures | None
    """Null unless `isOperator`."""
    alerts: Sequence[ServerAlert]
    """Alerts of all organizations' work, firing ones first; empty unless `isOperator`."""
    lead: SchedulerLead | None
    """Null if no scheduler ever led, as in a server of one process."""
    duties: Sequence[SchedulerDuty]
    """Last ticks of the leading scheduler, by name; empty unless `isOperator`."""
    database: DatabaseHealth
    broker_latency_ms: float | None
    """Null if the broker does not answer."""
    broker_last_failure: ConnectionFailure | None
    """Newest failure of the broker, by the last reports of processes; null unless `isOperator`."""
    cluster: ClusterHealth | None
    """Null unless `isOperator`, and while no deployer has used a cluster, as without deployments."""


async def show(request: GatewayRequest) -> JsonResponse:
    """Show the processes of the server with their versions and loads, and latency and sizes of its database.

    Processes and sizes add up the work of all organizations, so they are shown only to admins of the operator's
    organization. Others see whether database, broker and scheduler answer.
    """
    gateway = request.gateway
    now = gateway.clock()
    begun = time.perf_counter()
    await gateway.database.ping()
    latency_ms = _milliseconds_since(begun)
    async with gateway.database.read() as connection:
        is_operator = await access_store.is_operator_organization(connection, request.caller.organization_id)
        lead = await _find_lead(connection, now)
        processes: Sequence[ServerProcess] = ()
        alerts: Sequence[ServerAlert] = ()
        figures = None
        duties: Sequence[SchedulerDuty] = ()
        reports: Sequence[ProcessReport] = ()
        if is_operator:
            reports = [*await _read_processes(connection), *await _read_workers(connection)]
            queue = await alert_states.read_queue_facts(connection)
            duties = _list_duties(reports)
            present = [one.activity or {} for one in reports if _is_present(one.seen_at, now)]
            figures = await server_figures.read_figures(connection, request.caller, now, present, queue)
            processes = [_show_process(one, figures, now) for one in reports]
            alerts = _list_alerts(processes, lead, queue)
            lead = _date_lead(lead, reports)
        database = await _measure_database(connection, gateway.database, latency_ms)
    return JsonResponse(
        ServerHealth(
            as_of=instant(now),
            is_operator=is_operator,
            version=program_version(),
            processes=processes,
            figures=figures,
            alerts=alerts,
            duties=duties,
            lead=lead if lead is None or is_operator else structs.replace(lead, name=None),
            database=structs.replace(database, last_failure=process_reports.find_failure(reports, DATABASE))
            if is_operator
            else structs.replace(database, bytes=None, tables=()),
            broker_latency_ms=await _ping_broker(request),
            broker_last_failure=process_reports.find_failure(reports, BROKER),
            cluster=process_reports.find_cluster(reports),
        )
    )


def _list_alerts(
    processes: Sequence[ServerProcess], lead: SchedulerLead | None, queue: QueueFacts
) -> Sequence[ServerAlert]:
    """Return the alerts with their states, by the present ones of `processes`, the lead, and the facts about all rows
    in `queue`.

    A present process with all roles counts as a leading scheduler.
    """
    present = [one for one in processes if one.is_present]
    has_all_roles = any(one.role == ALL_IN_ONE for one in present)
    facts = ProcessFacts(
        has_worker=any(one.concurrency is not None for one in present),
        has_leader=has_all_roles or (lead is not None and lead.is_held),
        versions=frozenset(one.version for one in present),
        longest_loop_lag_ms=max((one.loop_lag_ms for one in present), default=0),
    )
    return [
        ServerAlert(
            name=alert.notice.name,
            severity=alert.notice.severity,
            state=alert.state,
            summary=alert.notice.summary,
            remedy=alert.notice.remedy,
        )
        for alert in alert_states.evaluate(facts, queue)
    ]


def _date_lead(lead: SchedulerLead | None, reports: Sequence[ProcessReport]) -> SchedulerLead | None:
    """Return a lead with the time at which it began, if the report of the process that holds it has that; else
    unchanged, and None for None.
    """
    for one in reports:
        reported = (one.activity or {}).get("lead")
        if lead is not None and lead.is_held and reported is not None and reported["owner"] == lead.name:
            return structs.replace(lead, since=optional_instant(find_time(one, reported["age"])))
    return lead


def _list_duties(reports: Sequence[ProcessReport]) -> Sequence[SchedulerDuty]:
    """Return the last successful run of each periodic duty, in whichever process, sorted by the duty's name; a duty
    without one is left out.
    """
    found: dict[str, tuple[datetime, Mapping[str, float]]] = {}
    for one in reports:
        for name, tick in ((one.activity or {}).get("duties") or {}).items():
            ended_at = one.seen_at - timedelta(seconds=tick["age"])
            if name not in found or ended_at > found[name][0]:
                found[name] = (ended_at, tick)
    return [
        SchedulerDuty(
            name=name, every_seconds=tick["every"], last_at=instant(ended_at), seconds=tick["seconds"]
        )
        for name, (ended_at, tick) in sorted(found.items())
    ]


def _milliseconds_since(begun: float) -> float:
    """Return the milliseconds since a time of the performance counter, with two digits."""
    return round((time.perf_counter() - begun) * 1_000, 2)


def _is_present(seen_at: datetime, now: datetime) -> bool:
    """Return whether a process with its last report at `seen_at` counts as present: within the last 15 seconds."""
    return seen_at > now - timedelta(seconds=ABSENT_SECONDS)


async def _find_lead(connection: AsyncConnection, now: datetime) -> SchedulerLead | None:
    """Return the scheduler that leads or led last, without the time at which it began; None if none ever did."""
    row = (await connection.execute(select(Leadership).limit(1))).mappings().first()
    if row is None:
        return None
    leader = build_row(Leadership, row)
    return SchedulerLead(
        name=leader.owner,
        is_held=leader.lease_until > now,
        since=None,
        lease_until=instant(leader.lease_until),
    )


async def _read_processes(connection: AsyncConnection) -> Sequence[ProcessPresence]:
    """Return the last reports of gateways, schedulers and deployers, at most 100, by role and the newest first."""
    statement = (
        select(ProcessPresence)
        .order_by(col(ProcessPresence.role), col(ProcessPresence.seen_at).desc())
        .limit(SHOWN_PROCESSES)
    )
    return [build_row(ProcessPresence, row) for row in (await connection.execute(statement)).mappings()]


async def _read_workers(connection: AsyncConnection) -> Sequence[WorkerPresence]:
    """Return the last 100 reports of workers, the newest first; those that ended in order are left out."""
    statement = (
        select(WorkerPresence)
        .where(col(WorkerPresence.ended_at).is_(None))
        .order_by(col(WorkerPresence.seen_at).desc())
        .limit(SHOWN_PROCESSES)
    )
    return [build_row(WorkerPresence, row) for row in (await connection.execute(statement)).mappings()]


def _show_process(one: ProcessReport, figures: ServerFigures, now: datetime) -> ServerProcess:
    """Return a process as the API shows it, by its last report."""
    worker = one if isinstance(one, WorkerPresence) else None
    activity = one.activity or {}
    return ServerProcess(
        role=process_reports.name_role(one),
        name=one.owner,
        host=one.host,
        version=one.version,
        is_present=_is_present(one.seen_at, now),
        started_at=optional_instant(one.started_at),
        seen_at=instant(one.seen_at),
        loop_lag_ms=one.loop_lag_ms,
        held_runs=worker.held_runs if worker else None,
        concurrency=worker.concurrency if worker else None,
        queues=process_reports.list_queues(one, figures.queues),
        lease_renewed_at=optional_instant(find_time(one, activity.get("renewalAge"))),
        claims_per_second=activity.get("claims") if worker else None,
        event_streams=activity.get("streams"),
    )


async def _measure_database(
    connection: AsyncConnection, database: Database, latency_ms: float
) -> DatabaseHealth:
    """Return kind, revision and size of the database, with the 20 largest tables of PostgreSQL."""
    revision = await connection.scalar(text("SELECT version_num FROM alembic_version"))
    if is_sqlite(database.url):
        size = await connection.scalar(_SQLITE_BYTES) or 0
        return DatabaseHealth(
            kind="sqlite",
            latency_ms=latency_ms,
            revision=str(revision),
            program_revision=HEAD_REVISION,
            bytes=size,
            tables=[],
            last_failure=None,
        )
    rows = (await connection.execute(_POSTGRESQL_TABLES)).all()
    return DatabaseHealth(
        kind="postgresql",
        latency_ms=latency_ms,
        revision=str(revision),
        program_revision=HEAD_REVISION,
        bytes=sum(row.bytes for row in rows),
        tables=[
            TableSize(name=row.name, bytes=row.bytes, rows=None if row.rows < 0 else int(row.rows))
            for row in rows[:SHOWN_TABLES]
        ],
        last_failure=None,
    )


async def _ping_broker(request: GatewayRequest) -> float | None:
    """Return the latency of the broker in milliseconds; None if it does not answer."""
    begun = time.perf_counter()
    try:
        await request.gateway.broker.ping()
    except BrokerUnavailable:
        return None
    return _milliseconds_since(begun)
