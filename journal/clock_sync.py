"""Synchronization of clocks with the database, and of deadlines with an SQLite host's clock.

On PostgreSQL the process polls the server's clock. On SQLite the clock of the database is that of the host:
when somebody sets it, all stored deadlines move by the same step, in one transaction, before the process
follows. Schedules and dates follow the new time; leases, timeouts and waits keep their durations.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Final, TypeAlias

import structlog
from sqlalchemy import BigInteger, and_, type_coerce, update
from sqlmodel import SQLModel, col

from engine.run_records import SpanStatus
from journal.held_runs import UNTIL_RESUMED
from models import ids
from models.approval import ApprovalRequest
from models.database import is_sqlite
from models.deployment import Deployment
from models.errors import DatabaseUnavailable
from models.event_wait import EventWait
from models.execution import Execution, Idempotency, Leadership, SpanRow, ThrottleRow
from models.execution_status import ExecutionStatus
from models.signal import SignalWait
from models.timestamps import HOST_TIME

if TYPE_CHECKING:
    from sqlalchemy import ColumnElement
    from sqlalchemy.ext.asyncio import AsyncConnection

    from models.database import Database

log = structlog.get_logger()

POLL_SECONDS: Final = 10.0
CHECK_SECONDS: Final = 1.0
CLOCK_SET_MICROSECONDS: Final = 500_000
"""Smallest step that counts as a clock that was set, not as one that was slewed."""
STOP_SECONDS: Final = 3.0
"""Time that processes which move no rows leave to the process that does."""

DeadlineColumn: TypeAlias = "tuple[type[SQLModel], str, ColumnElement[bool] | None]"

_IS_RUNNING: Final = col(Execution.status) == ExecutionStatus.RUNNING
_IS_WAITING: Final = col(Execution.status) == ExecutionStatus.WAITING
_IS_SLEEPING: Final = col(SpanRow.status).in_([SpanStatus.WAITING.value, SpanStatus.RETRYING.value])
_COLUMNS: Final[tuple[DeadlineColumn, ...]] = (
    (Execution, "lease_until", _IS_RUNNING),
    # A waiting run stores its remaining time instead.
    (Execution, "deadline_at", ~_IS_WAITING & col(Execution.ended_at).is_(None)),
    (Execution, "due_at", and_(_IS_WAITING, col(Execution.due_at) != UNTIL_RESUMED)),
    (Execution, "completion_due_at", None),
    (SpanRow, "wake_at", _IS_SLEEPING),
    (EventWait, "expires_at", None),
    (SignalWait, "expires_at", None),
    (ThrottleRow, "next_at", None),
    (Idempotency, "expires_at", None),
    (Leadership, "lease_until", None),
    (Deployment, "held_until", None),
    (Deployment, "drain_until", None),
    (ApprovalRequest, "due_at", None),
)


@asynccontextmanager
async def run_clock_sync(
    database: Database, moves: Callable[[], bool] = lambda: False
) -> AsyncIterator[None]:
    """Keep the clocks of the database and of ids synchronized for as long as the context lasts.

    With PostgreSQL, its time is asked every ten seconds. With SQLite, the host's clock is checked each
    second; if it was set and `moves()` is true, this process moves the stored deadlines. An unreachable
    database is no error: the clock of the host applies until it answers.
    """
    ids.use_clock(database.clock)
    await _learn_time(database)
    keep = _watch_host_clock if is_sqlite(database.url) else _poll_database_time
    task = asyncio.create_task(keep(database, moves))
    try:
        yield
    finally:
        task.cancel()


def deadline_columns() -> Sequence[DeadlineColumn]:
    """Return the columns with deadlines that a step of the clock moves, each with a condition for its rows or
    None for all.
    """
    # Clocks are rarely set: no process loads these tables for that alone when it starts.
    from models.ai_model import AiModel  # noqa: PLC0415 - see above
    from models.bulk_operation import IS_OPEN, BulkOperation  # noqa: PLC0415 - see above
    from models.invitation import Invitation  # noqa: PLC0415 - see above
    from models.task import Task  # noqa: PLC0415 - see above

    is_open = col(Invitation.accepted_at).is_(None) & col(Invitation.revoked_at).is_(None)
    # Ended tasks have no time of these.
    of_tasks = [(Task, name, None) for name in ("lease_until", "deadline_at", "due_at", "check_at")]
    is_held = col(Task.lease_until).is_not(None)
    return [
        *_COLUMNS,
        *of_tasks,
        (Task, "claimed_at", is_held),  # The time of a task and of its run count from there.
        (Invitation, "expires_at", is_open),
        (AiModel, "blocked_until", None),
        (BulkOperation, "leased_until", IS_OPEN),
    ]


async def follow_host_clock(database: Database) -> None:
    """Adopt the host's time after its clock was set, and move all stored deadlines by the same step, in one
    transaction.

    It is for SQLite. A failed transaction changes nothing. Raises `DatabaseUnavailable`.
    """
    columns = deadline_columns()
    step = HOST_TIME.step()
    has_moved = False

    async def work(connection: AsyncConnection) -> None:
        nonlocal has_moved
        for table, name, is_going_on in columns:
            column = getattr(table, name)
            statement = update(table).values({name: type_coerce(column, BigInteger) + step})
            statement = statement.where(column.is_not(None))
            await connection.execute(statement if is_going_on is None else statement.where(is_going_on))
        # Inside the transaction, which blocks all other writers: nobody writes the old time after it.
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
    """Check each second whether the clock of this host was set, and follow it; runs until it is canceled."""
    while True:
        await asyncio.sleep(CHECK_SECONDS)
        if abs(HOST_TIME.step()) > CLOCK_SET_MICROSECONDS:
            await _follow_host_once(database, moves)
        # Always: while a machine sleeps, its monotonic clock stops and the clock of the host does not.
        database.clock.follow_host()


async def _follow_host_once(database: Database, moves: Callable[[], bool]) -> None:
    """Follow a clock that was set: move the stored deadlines if `moves()` is true, else only adopt the new time after
    three seconds.

    A failure is logged, and the next check tries again.
    """
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
    """Ask the database for its time every ten seconds, until it is canceled."""
    while True:
        await asyncio.sleep(POLL_SECONDS)
        await _learn_time(database)


async def _learn_time(database: Database) -> None:
    """Ask the database for its time once; an unreachable database is ignored."""
    try:
        await database.learn_time()
    except DatabaseUnavailable as error:
        log.debug("the database's time is not known", error=str(error))
    except Exception:
        log.exception("the database's time is not known")
