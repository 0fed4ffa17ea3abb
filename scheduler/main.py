"""Process of the scheduler: its periodic duties and their intervals."""

from __future__ import annotations

import asyncio
import logging
import signal
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from datetime import UTC, datetime
from functools import partial
from typing import Final

import structlog
import uvloop
from apscheduler.schedulers.asyncio import AsyncIOScheduler
from apscheduler.triggers.interval import IntervalTrigger
from msgspec import Struct
from msgspec.structs import replace

from concurrency import gc_tuning, heartbeat
from execution import abandoned_runs, due_runs
from execution.event_matching import EventMatcher
from journal import audit_chain, clock_sync, process_presence, worker_presence
from journal.store import JournalStore
from journal.store_factory import open_store
from messages.broker import Broker
from messages.broker_connection import connect_broker
from models import database as databases
from models import schema_migration
from models.database import Database
from models.errors import DatabaseUnavailable
from nodes import catalog as catalogs
from scheduler import (
    lifecycle_policies,
    old_executions,
    orphaned_blobs,
    recovery,
    retention,
    row_metrics,
    run_hours,
    unused_definitions,
)
from scheduler.leadership import RENEWALS_PER_LEASE, LeaderElection
from scheduler.row_metrics import RowMetrics
from scheduler.run_hours import RunHourCounter
from scheduler.schedules import ScheduleRunner
from scheduler.settings import SchedulerSettings
from telemetry import instruments
from telemetry.exporter import serve_metrics
from telemetry.process_activity import ACTIVITY, DutyTick

log = structlog.get_logger()

FINISH_SECONDS: Final = 2.0
"""Seconds for which a stopping process waits for running duties."""
WATCH_SECONDS: Final = 1.0
SET_BACK_SECONDS: Final = 0.5
"""Seconds above which a backward step of the clock is not mere correction: it was set."""
_NOT_LEADING: Final = object()
"""Result of a duty that another process does."""


class PeriodicDuty(Struct, frozen=True):
    """Idempotent work that is repeated at an interval."""

    name: str
    every_seconds: float
    do: Callable[[], Awaitable[object]]


def list_duties(
    settings: SchedulerSettings, database: Database, store: JournalStore, broker: Broker
) -> Sequence[PeriodicDuty]:
    """Return all periodic duties of the leading scheduler, each with its name, interval in seconds and work.

    It also adds the retention of `settings` to the reports that this process stores about itself.
    """
    ACTIVITY.retention = {
        "executions": settings.retention_days,
        "events": settings.retention_event_days,
    }
    schedules = ScheduleRunner(database, broker, catalogs.load_catalog())
    awaited = EventMatcher(database, broker)
    counter = RowMetrics(database)
    hours = RunHourCounter(database)
    return (
        PeriodicDuty("start scheduled runs", settings.schedule_seconds, schedules.start_due),
        PeriodicDuty("reset schedules ahead", 60, schedules.reset_ahead),
        PeriodicDuty(
            "promote due executions",
            settings.schedule_seconds,
            partial(recovery.promote_due_runs, store, broker),
        ),
        PeriodicDuty(
            "recover executions", settings.sweep_seconds, partial(recovery.recover_runs, store, broker)
        ),
        PeriodicDuty(
            "end abandoned executions",
            settings.sweep_seconds,
            partial(abandoned_runs.end_abandoned_runs, database, store, broker),
        ),
        PeriodicDuty("forget idempotency keys", 60, partial(retention.forget_expired_keys, database)),
        PeriodicDuty(
            "forget absent workers", 3_600, partial(worker_presence.forget_absent_workers, database)
        ),
        PeriodicDuty(
            "forget absent processes", 3_600, partial(process_presence.forget_absent_processes, database)
        ),
        PeriodicDuty("forget expired throttles", 60, partial(retention.forget_expired_throttles, database)),
        PeriodicDuty("forget system decisions", 3_600, partial(retention.forget_system_decisions, database)),
        PeriodicDuty("forget bulk operations", 3_600, partial(retention.forget_bulk_operations, database)),
        PeriodicDuty("forget model hours", 3_600, partial(retention.forget_model_hours, database)),
        PeriodicDuty(
            "delete old deliveries", 3_600, partial(retention.forget_deliveries, settings, database)
        ),
        PeriodicDuty(
            "delete old executions", 600, partial(old_executions.delete_old_executions, settings, database)
        ),
        PeriodicDuty(
            "delete unused definitions",
            86_400,
            partial(unused_definitions.delete_unused_definitions, database),
        ),
        PeriodicDuty(
            "admit waiting executions",
            settings.sweep_seconds,
            partial(recovery.admit_waiting, database, broker),
        ),
        PeriodicDuty(
            "keep lifecycle policies",
            settings.lifecycle_seconds,
            partial(lifecycle_policies.keep_policies, database, broker),
        ),
        PeriodicDuty(
            "wake due deployments",
            settings.sweep_seconds,
            partial(due_runs.wake_due_deployments, database, broker),
        ),
        PeriodicDuty("chain audit entries", 10, partial(audit_chain.chain_entries, database)),
        PeriodicDuty("count rows", row_metrics.COUNT_SECONDS, counter.count_rows),
        PeriodicDuty("count runs by hour", run_hours.COUNT_SECONDS, hours.count_runs),
        PeriodicDuty("deliver events", settings.sweep_seconds, awaited.deliver_undelivered),
        PeriodicDuty("forget event waits", 600, awaited.delete_finished_waits),
        PeriodicDuty(
            "forget lifecycle decisions", 3_600, partial(lifecycle_policies.forget_decisions, database)
        ),
        PeriodicDuty("sweep blobs", 3_600, partial(orphaned_blobs.delete_orphaned_blobs, settings, database)),
    )


def serve(settings: SchedulerSettings) -> None:
    """Run the scheduler in this process until a stop signal.

    Raises `InvalidSettings` if a setting is missing that only `pilotflame dev` can omit.
    """
    settings.check_for_production()
    uvloop.run(_serve(settings))


async def _serve(settings: SchedulerSettings) -> None:
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    async with AsyncExitStack() as stack:
        await stack.enter_async_context(heartbeat.run_heartbeat(settings.heartbeat_file))
        await stack.enter_async_context(
            serve_metrics(settings.metrics_address, settings.scheduler_metrics_port)
        )
        url = databases.parse_url(settings.database_url)
        database = Database(url)
        stack.push_async_callback(database.close)
        await schema_migration.require_current(database)
        store = await open_store(url, clock=database.clock, connections=1)
        stack.push_async_callback(store.close)
        broker = await connect_broker(settings.broker_url)
        stack.push_async_callback(broker.close)
        is_leading = await stack.enter_async_context(_run_leadership(settings, database))
        await stack.enter_async_context(clock_sync.run_clock_sync(database, moves=is_leading))
        led = [_while_leading(is_leading, duty) for duty in list_duties(settings, database, store, broker)]
        await stack.enter_async_context(process_presence.report_process(database, "scheduler"))
        await stack.enter_async_context(run_duties(led))
        gc_tuning.freeze_loaded(asyncio.get_running_loop())
        log.info("scheduler ready")
        await stop.wait()
        log.info("scheduler stops")


@asynccontextmanager
async def run_duties(duties: Sequence[PeriodicDuty]) -> AsyncIterator[None]:
    """Do each duty now, and then at its interval, while the context lasts; a duty never runs twice at once.

    Exceptions of duties are logged. A duty that missed several turns is done once for all of them. At the end, duties
    in progress are canceled after two seconds.
    """
    # It logs at every tick that a slow duty is still running.
    logging.getLogger("apscheduler").setLevel(logging.ERROR)
    ticker = AsyncIOScheduler(timezone=UTC)
    running: set[asyncio.Task[None]] = set()
    for duty in duties:
        ticker.add_job(
            _run_duty,
            IntervalTrigger(seconds=duty.every_seconds, timezone=UTC),
            args=[duty, running],
            next_run_time=datetime.now(UTC),  # noqa: TID251 - the ticker counts by the clock of this host
            max_instances=1,
            coalesce=True,
            misfire_grace_time=None,
        )
    ticker.start()
    watch = asyncio.create_task(_watch_clock(ticker))
    try:
        yield
    finally:
        watch.cancel()
        ticker.pause()
        if running:
            await asyncio.wait(running, timeout=FINISH_SECONDS)
        ticker.shutdown(wait=False)


async def _watch_clock(ticker: AsyncIOScheduler) -> None:
    """Do all duties at once after the host's clock was set back by over half a second: else they would wait
    until it caught up.
    """
    ahead = time.time() - time.monotonic()  # noqa: TID251 - looks whether that was set
    while True:
        await asyncio.sleep(WATCH_SECONDS)
        before, ahead = ahead, time.time() - time.monotonic()  # noqa: TID251 - looks whether that was set
        if before - ahead > SET_BACK_SECONDS:
            log.warning("the clock was set back", seconds=round(before - ahead, 1))
            for job in ticker.get_jobs():
                job.modify(next_run_time=datetime.now(UTC))  # noqa: TID251 - the ticker counts by the clock of this host


async def _run_duty(duty: PeriodicDuty, running: set[asyncio.Task[None]]) -> None:
    """Do a duty once, as a task that is in `running` until its end; log any exception instead of raising it.

    Only a success is measured, and reported as the duty's last turn unless another process leads.
    """
    if task := asyncio.current_task():
        running.add(task)
        task.add_done_callback(running.discard)
    begun_at = time.monotonic()
    try:
        done = await duty.do()
        ended_at = time.monotonic()
        instruments.histogram("tick_seconds", duty.name).observe(ended_at - begun_at)
        if done is not _NOT_LEADING:
            ACTIVITY.duties[duty.name] = DutyTick(duty.every_seconds, ended_at - begun_at, ended_at)
    except DatabaseUnavailable as error:
        log.warning("database not reached", duty=duty.name, error=str(error))
    except Exception:
        log.exception("duty failed", duty=duty.name)


@asynccontextmanager
async def _run_leadership(
    settings: SchedulerSettings, database: Database
) -> AsyncIterator[Callable[[], bool]]:
    """Lead whenever no other process does, while the context lasts; resign after it.

    It yields a function that returns whether this process leads now. Raises `DatabaseUnavailable` at the
    start.
    """
    leader = LeaderElection(database, settings.leadership_seconds)
    await leader.renew()
    renewal = PeriodicDuty("renew leadership", settings.leadership_seconds / RENEWALS_PER_LEASE, leader.renew)
    async with run_duties([renewal]):
        yield leader.is_leading
    try:
        async with asyncio.timeout(FINISH_SECONDS):
            await leader.resign()
    except (DatabaseUnavailable, TimeoutError) as error:
        log.warning("leadership not resigned: its lease expires", error=str(error))


def _while_leading(is_true: Callable[[], bool], duty: PeriodicDuty) -> PeriodicDuty:
    """Return a duty that does its work only while `is_true()` holds, and returns `_NOT_LEADING` otherwise."""

    async def do() -> object:
        return await duty.do() if is_true() else _NOT_LEADING

    return replace(duty, do=do)
