"""Keeps the clock of a process at the database's time, and durations right when the clock of an SQLite host is set.

On PostgreSQL the server's clock is asked for now and then. On SQLite the database's clock is that of the host: when
somebody sets it, rows that hold the end of a duration are moved by as much, in one transaction, before the process
follows. Schedules and dates go by the new time; leases, timeouts and waits last as long as they would have.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Final

import structlog
from sqlalchemy import BigInteger, and_, type_coerce, update
from sqlmodel import SQLModel, col

from engine.run_records import SpanStatus
from journal.held_runs import UNTIL_RESUMED
from models import ids
from models.database import is_sqlite
from models.deployment import Deployment
from models.errors import DatabaseUnavailable
from models.event_wait import EventWait
from models.execution import Execution, Idempotency, Leadership, SpanRow, ThrottleRow
from models.execution_status import ExecutionStatus
from models.host_time import HOST_TIME

if TYPE_CHECKING:
    from sqlalchemy import ColumnElement
    from sqlalchemy.ext.asyncio import AsyncConnection

    from models.database import Database

log = structlog.get_logger()

POLL_SECONDS: Final = 10.0
CHECK_SECONDS: Final = 1.0
CLOCK_SET_MICROSECONDS: Final = 500_000
"""A clock that is off by more was set, and not only trimmed."""
STOP_SECONDS: Final = 3.0
"""Processes that don't move rows themselves leave so much time to the one that does."""

_IS_RUNNING: Final = col(Execution.status) == ExecutionStatus.RUNNING
_IS_WAITING: Final = col(Execution.status) == ExecutionStatus.WAITING
_IS_SLEEPING: Final = col(SpanRow.status).in_([SpanStatus.WAITING.value, SpanStatus.RETRYING.value])
DEADLINE_COLUMNS: Final[tuple[tuple[type[SQLModel], str, ColumnElement[bool] | None], ...]] = (
    (Execution, "lease_until", _IS_RUNNING),
    # A run that waits keeps what is left of its time instead.
    (Execution, "deadline_at", ~_IS_WAITING & col(Execution.ended_at).is_(None)),
    (Execution, "due_at", and_(_IS_WAITING, col(Execution.due_at) != UNTIL_RESUMED)),
    (Execution, "follow_up_at", None),
    (SpanRow, "wake_at", _IS_SLEEPING),
    (EventWait, "expires_at", None),
    (ThrottleRow, "next_at", None),
    (Idempotency, "expires_at", None),
    (Leadership, "lease_until", None),
    (Deployment, "held_until", None),
    (Deployment, "drain_until", None),
)
"""Columns that say when a duration ends, and in which rows it is still going on."""


@asynccontextmanager
async def run_clock_sync(
    database: Database, moves: Callable[[], bool] = lambda: False
) -> AsyncIterator[None]:
    """Keep the database's clock, and that of ids, as long as the context lasts.

    `moves` tells whether this process is the one that moves rows when the clock of an SQLite host was set. A database
    that doesn't answer yet is no error: the clock of the host counts until it does.
    """
    ids.use_clock(database.clock)
    await _learn_time(database)
    keep = _watch_host_clock if is_sqlite(database.url) else _poll_database_time
    task = asyncio.create_task(keep(database, moves))
    try:
        yield
    finally:
        task.cancel()


async def follow_host_clock(database: Database) -> None:
    """Take the time of a host whose clock was set, and move the ends of all durations; raises `DatabaseUnavailable`."""
    step = HOST_TIME.step()
    has_moved = False

    async def work(connection: AsyncConnection) -> None:
        nonlocal has_moved
        for table, name, is_going_on in DEADLINE_COLUMNS:
            column = getattr(table, name)
            statement = update(table).values({name: type_coerce(column, BigInteger) + step})
            statement = statement.where(column.is_not(None))
            await connection.execute(statement if is_going_on is None else statement.where(is_going_on))
        # While this transaction keeps all others from writing: nobody writes the old time behind it.
        if not has_moved:
            HOST_TIME.move(step)
            database.clock.follow_host()
            has_moved = True

    try:
        await database.transaction(work)
    except BaseException:
        if has_moved:
            HOST_TIME.move(-step)
            database.clock.follow_host()
        raise
    log.warning("the clock of this host was set", seconds=round(step / 1_000_000, 1))


async def _watch_host_clock(database: Database, moves: Callable[[], bool]) -> None:
    while True:
        await asyncio.sleep(CHECK_SECONDS)
        if abs(HOST_TIME.step()) > CLOCK_SET_MICROSECONDS:
            await _follow_host_once(database, moves)
        # In any case: the monotonic clock stands still while a machine sleeps, and that of the host goes on.
        database.clock.follow_host()


async def _follow_host_once(database: Database, moves: Callable[[], bool]) -> None:
    if not moves():
        await asyncio.sleep(STOP_SECONDS)
        HOST_TIME.move(HOST_TIME.step())
        return
    try:
        await follow_host_clock(database)
    except DatabaseUnavailable as error:
        log.warning("the clock of this host was set, and rows are not moved yet", error=str(error))
    except Exception:
        log.exception("the clock of this host was set, and rows are not moved yet")


async def _poll_database_time(database: Database, _moves: Callable[[], bool]) -> None:
    while True:
        await asyncio.sleep(POLL_SECONDS)
        await _learn_time(database)


async def _learn_time(database: Database) -> None:
    try:
        await database.learn_time()
    except DatabaseUnavailable as error:
        log.debug("the database's time is not known", error=str(error))
    except Exception:
        log.exception("the database's time is not known")
