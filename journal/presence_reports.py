"""Reports of a process that it lives, at an interval, for as long as it does."""

from __future__ import annotations

import asyncio
import socket
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from functools import cache
from importlib import metadata
from typing import TYPE_CHECKING, Any, Final, TypeAlias

import structlog

from models.errors import DatabaseUnavailable
from telemetry.loop_lag import LoopLagMeter
from telemetry.process_activity import ACTIVITY, DATABASE, ActivityMeter, ServerAnswer

if TYPE_CHECKING:
    from sqlalchemy.ext.asyncio import AsyncConnection

    from models.database import Database

    Report: TypeAlias = Callable[[AsyncConnection], Awaitable[None]]
    """Statement of a transaction."""
    Reporter: TypeAlias = Callable[[int, Mapping[str, Any]], Report]
    """Returns the next report from the delay of the event loop in milliseconds, and the activity since the last one."""

log = structlog.get_logger()

REPORT_SECONDS: Final = 5.0
ABSENT_SECONDS: Final = 15.0
"""Time without a report after which a process counts as gone."""
ABSENT_MICROSECONDS: Final = int(ABSENT_SECONDS * 1_000_000)
LONGEST_HOST_NAME: Final = 255
FORGET_MICROSECONDS: Final = 86_400_000_000
"""Age of the last report after which a row is deleted."""


@cache
def program_version() -> str:
    """Return the version of the installed package."""
    return metadata.version("pilotflame")


@cache
def host_name() -> str:
    """Return the name of the machine or container, cut to 255 characters."""
    return socket.gethostname()[:LONGEST_HOST_NAME]


@asynccontextmanager
async def report_regularly(database: Database, report: Reporter, report_end: Report) -> AsyncIterator[None]:
    """Perform a report at once and every five seconds while the context lasts, and `report_end` after it, for which it
    waits five seconds at most.

    `report` gets the delay of the event loop in milliseconds and the activity since the last report, and returns the
    work of a transaction. An unreachable database is no error.
    """
    meter = LoopLagMeter()
    tasks = (
        asyncio.create_task(meter.measure_forever()),
        asyncio.create_task(_report_forever(database, report, meter)),
    )
    try:
        yield
    finally:
        for task in tasks:
            task.cancel()
        try:
            async with asyncio.timeout(REPORT_SECONDS):
                await database.transaction(report_end)
        except (DatabaseUnavailable, TimeoutError) as error:
            log.debug("end of process not reported", error=str(error))


async def _report_forever(database: Database, report: Reporter, meter: LoopLagMeter) -> None:
    """Report the process every five seconds until it is canceled; failures are logged."""
    activity = ActivityMeter()
    while True:
        begun_at = time.monotonic()
        try:
            await database.transaction(report(round(meter.seconds * 1_000), activity.take()))
            now = time.monotonic()
            ACTIVITY.connections[DATABASE].answer = ServerAnswer(now, now - begun_at)
        except DatabaseUnavailable as error:
            log.debug("process not reported", error=str(error))
        except Exception:
            log.exception("process not reported")
        await asyncio.sleep(REPORT_SECONDS)
