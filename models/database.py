"""Database access through SQLAlchemy, SQLite or PostgreSQL, for everything but the hot path of runs.

A transaction is a function that may be called again: serialization failures, deadlocks and lost connections
are retried here and nowhere else. Transactions that lock the same row in one process wait for their turns without a
connection. Writers on an SQLite file wait two seconds for other programs, and then fail at once until the file is free;
each attempt checks that.
"""

from __future__ import annotations

import asyncio
import random
import sqlite3
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from contextlib import AbstractContextManager, asynccontextmanager, nullcontext
from functools import partial
from pathlib import Path
from time import monotonic
from typing import Any, Final, TypeAlias, TypeVar
from weakref import WeakKeyDictionary

from sqlalchemy import event, text
from sqlalchemy.engine import URL, make_url
from sqlalchemy.exc import ArgumentError, DBAPIError, InterfaceError, InternalError, OperationalError
from sqlalchemy.exc import TimeoutError as PoolTimeout
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine, create_async_engine

from models import database_time, durable_folders
from models.errors import (
    DatabaseUnavailable,
    LockWaitTimeout,
)
from models.postgresql_failures import DatabaseFailure, failure_of
from models.timestamps import DatabaseClock
from telemetry.process_activity import ACTIVITY, DATABASE

T = TypeVar("T")

_EXECUTION_OPTIONS: Final = {"_result_disable_adapt_to_context": True}
"""Values of rows are read by name or place alone. SQLAlchemy would look up all columns of each statement, too, so that
its column objects could be keys of the rows.
"""
RETRIES = 5
RETRY_SECONDS = 2.0
"""A transaction that took longer than this to fail isn't retried here: its caller has waited long enough."""
SQLITE_BUSY_SECONDS = 2.0
"""Time that a writer waits while other programs lock the file."""
POOL_SIZE: Final = 10
"""Most connections of a pool; they stay open, since a new one costs both sides as much as a hundred statements."""
CONNECT_SECONDS = 10.0
STATEMENT_SECONDS = 30.0

RESTED_SECONDS: Final = 1.0
"""Time without use after which a connection is checked before its next use."""
OWN_WRITES_SECONDS: Final = 30.0
"""Maximum wait of a writer for other writers of its process."""
PRIMARY_CODE_BITS: Final = 0xFF

AUTOCOMMIT: Final = "AUTOCOMMIT"
"""Isolation level of SQLAlchemy without transactions: each statement is one of its own."""

_breakers: dict[str, WriteLockBreaker] = {}
_guard: Final = threading.Lock()


class InvalidDatabaseUrl(ValueError):
    """The URL names no usable database; the text says how to write it."""


def parse_url(url: str) -> URL:
    """Return a database URL with the asynchronous driver for SQLite or PostgreSQL.

    Raises `InvalidDatabaseUrl` for a malformed URL, another kind of database and SQLite in memory.
    """
    try:
        parsed = make_url(url)
    except ArgumentError as error:
        message = "The database URL must look like sqlite:///path or postgresql://user:password@host/database"
        raise InvalidDatabaseUrl(message) from error
    kind = parsed.get_backend_name()
    if kind == "sqlite":
        if not parsed.database or parsed.database == ":memory:":
            raise InvalidDatabaseUrl("SQLite needs a file: sqlite:///path/to/pilotflame.db")
        return parsed.set(drivername="sqlite+aiosqlite")
    if kind in {"postgresql", "postgres"}:
        return parsed.set(drivername="postgresql+asyncpg")
    raise InvalidDatabaseUrl(f"{kind} is not supported: use sqlite:///path or postgresql://…")


def is_sqlite(url: URL) -> bool:
    """Return whether the URL is that of an SQLite database."""
    return url.get_backend_name() == "sqlite"


class Database:
    """Pool of connections, with reads and retried transactions."""

    def __init__(self, url: URL) -> None:
        self.url = url
        self.clock = DatabaseClock()
        self._turns = TransactionTurns()
        self._writes = _SqliteWriteTransactions(url.database or "") if is_sqlite(url) else None
        self.engine, self._guard = (
            _create_postgresql_engine(url)
            if self._writes is None
            else _create_sqlite_engine(url, self._writes)
        )
        self._under_way: set[asyncio.Task[Any]] = set()

    @asynccontextmanager
    async def read(self) -> AsyncIterator[AsyncConnection]:
        """Yield a connection for reads until the block ends.

        Each statement sees all transactions that were committed before it. In PostgreSQL each is a transaction of its
        own, which saves two round trips; see `share_transaction`. Raises `DatabaseUnavailable`, also for such failures
        in the block.
        """
        options = {} if self._writes is not None else {"isolation_level": AUTOCOMMIT}
        try:
            with self._guard():
                async with self.engine.connect() as connection:
                    yield await connection.execution_options(reads_only=True, **options)
        except (DBAPIError, PoolTimeout, OSError, TimeoutError) as error:
            if _translate_failure(error) is None:
                raise
            ACTIVITY.note_failure(DATABASE, error)
            raise DatabaseUnavailable("The database did not answer") from error

    @asynccontextmanager
    async def read_snapshot(self) -> AsyncIterator[AsyncConnection]:
        """Yield a connection whose reads all see the database at one moment; raises `DatabaseUnavailable`."""
        async with self.read() as connection:
            if self._writes is None:
                await connection.execution_options(isolation_level="REPEATABLE READ")
            else:
                await connection.exec_driver_sql("BEGIN")  # each statement would be a snapshot of its own
            yield connection

    async def statement(self, work: Callable[[AsyncConnection], Awaitable[T]]) -> T:
        """Run `work`, which executes exactly one statement, and return its result; retries and errors are those of
        `transaction`.

        PostgreSQL commits a single statement by itself, which saves two round trips.
        """
        return await self._shield(self._transact(work, is_statement=self._writes is None))

    async def transaction(
        self, work: Callable[[AsyncConnection], Awaitable[T]], *, locks: str | None = None
    ) -> T:
        """Run `work` in one transaction, commit it, and return its result.

        After transient failures `work` is called again, up to five times in all and within two seconds, so it must
        change nothing but the database. If the caller is canceled, the transaction still ends by itself: SQLite's
        driver, interrupted inside it, would keep the file locked. Transactions of this process with equal `locks`, a
        name for a row, run one after another. An exception of `work` rolls the transaction back and propagates. Raises
        `DatabaseUnavailable`, and `LockWaitTimeout` if another transaction keeps a row or key locked.
        """
        return await self._shield(
            self._transact(work) if locks is None else self._transact_in_turn(work, locks)
        )

    async def _shield(self, work: Coroutine[Any, Any, T]) -> T:
        task = asyncio.create_task(work)
        self._under_way.add(task)
        task.add_done_callback(self._ended)
        return await asyncio.shield(task)

    async def _transact_in_turn(self, work: Callable[[AsyncConnection], Awaitable[T]], locks: str) -> T:
        async with self._turns.take(locks):
            return await self._transact(work)

    async def _transact(
        self, work: Callable[[AsyncConnection], Awaitable[T]], *, is_statement: bool = False
    ) -> T:
        """Run `work` in one transaction or, with `is_statement`, without one; repeat it after transient failures, up to
        five times in all within two seconds.

        Raises `LockWaitTimeout` if another transaction keeps a lock, or if the last attempt was rolled back because of
        other transactions; `DatabaseUnavailable` after any other last failure; and the exceptions of `work`.
        """
        begun_at = monotonic()
        for attempt in range(1, RETRIES + 1):
            try:
                with self._guard():
                    return await self._transact_once(work, is_statement=is_statement)
            except (DBAPIError, PoolTimeout, OSError, TimeoutError) as error:
                failure = _translate_failure(error)
                if failure is None:
                    raise
                if failure is DatabaseFailure.LOCK_NOT_AVAILABLE:
                    raise LockWaitTimeout("Another transaction holds a lock that this one needs") from error
                if attempt == RETRIES or monotonic() - begun_at > RETRY_SECONDS:
                    if failure is DatabaseFailure.ROLLED_BACK:
                        raise LockWaitTimeout("Other transactions hold locks that this one needs") from error
                    ACTIVITY.note_failure(DATABASE, error)
                    raise DatabaseUnavailable("The database did not confirm the transaction") from error
                await asyncio.sleep(random.uniform(0, 0.02 * 2**attempt))  # noqa: S311 - spreads the retries of concurrent transactions
        raise AssertionError

    async def _transact_once(
        self, work: Callable[[AsyncConnection], Awaitable[T]], *, is_statement: bool
    ) -> T:
        async with self.engine.connect() as connection:
            if is_statement:
                await connection.execution_options(isolation_level=AUTOCOMMIT)
            try:
                async with connection.begin():
                    return await work(connection)
            finally:
                if self._writes is not None:
                    self._writes.end(connection)

    async def learn_time(self) -> None:
        """Set the process's clock by the time of the database; with SQLite, to that of this machine.

        Raises `DatabaseUnavailable`.
        """
        if is_sqlite(self.url):
            self.clock.follow_host()
            return
        async with self.read() as connection:
            asked_at = time.monotonic()
            self.clock.learn(await database_time.read_database_time(connection), asked_at)

    async def ping(self) -> None:
        """Return if the database answers a query; raises `DatabaseUnavailable` otherwise."""
        async with self.read() as connection:
            await connection.execute(text("SELECT 1"))

    async def close(self) -> None:
        """Wait for the transactions in progress, then close all connections."""
        await asyncio.gather(*self._under_way, return_exceptions=True)
        await self.engine.dispose()

    def _ended(self, task: asyncio.Task[Any]) -> None:
        self._under_way.discard(task)
        if not task.cancelled():
            task.exception()  # a caller has it; without one, the event loop must not log it as never retrieved


async def share_transaction(connection: AsyncConnection) -> None:
    """Run further statements on a connection of `Database.read` in one transaction, so that they share its settings and
    locks.

    Changes nothing inside a transaction or snapshot, and for SQLite.
    """
    if connection.sync_connection is not None and (
        connection.sync_connection.get_execution_options().get("isolation_level") == AUTOCOMMIT
    ):
        await connection.rollback()  # The level can't be changed after a statement, though none is left open.
        await connection.execution_options(isolation_level="READ COMMITTED")


def _translate_failure(error: Exception) -> DatabaseFailure | None:
    """Return the kind of a transient failure of the database; None for the fault of a statement or value, which a retry
    repeats.
    """
    if isinstance(error, PoolTimeout):
        return DatabaseFailure.UNAVAILABLE
    if not isinstance(error, DBAPIError):
        return failure_of(error)
    if (failure := failure_of(error)) is not None or error.connection_invalidated:
        return failure or DatabaseFailure.UNAVAILABLE
    cause = error.orig.__cause__ if error.orig is not None else None
    if getattr(error.orig, "sqlstate", None) is not None or isinstance(cause, ValueError):
        return None  # the fault of a statement or of one of its values
    # SQLite's errors, and the driver's own error for a connection that ended during a statement.
    is_passing = isinstance(error, OperationalError | InterfaceError | InternalError)
    return DatabaseFailure.UNAVAILABLE if is_passing else None


GuardConnection: TypeAlias = "Callable[[], AbstractContextManager[None]]"
"""Function that returns the context of a call; entering it raises `DatabaseUnavailable` during an outage of
the server.
"""


class _SqliteWriteTransactions:
    """Write transactions of one pool, coordinated with all other writers of the file."""

    def __init__(self, path: str) -> None:
        self._breaker = write_breaker(path)
        self._under_way: set[object] = set()

    def begin(self, connection: Any) -> None:  # noqa: ANN401 - the driver's own connection
        """Begin a write transaction at once, unless the connection is marked by `reads_only`.

        A transaction that begins by reading could fail at its first write, because another transaction was faster.
        Raises `DatabaseUnavailable` while another process keeps the file locked.
        """
        if not connection.get_execution_options().get("reads_only"):
            self._breaker.begin(connection.exec_driver_sql, busy_seconds=SQLITE_BUSY_SECONDS)
            self._under_way.add(connection)

    def end(self, connection: AsyncConnection) -> None:
        """Record the end of a connection's write transaction, if it had one."""
        if connection.sync_connection in self._under_way:
            self._under_way.remove(connection.sync_connection)
            self._breaker.end()


def _create_sqlite_engine(url: URL, writes: _SqliteWriteTransactions) -> tuple[AsyncEngine, GuardConnection]:
    from models import sqlite_driver  # noqa: PLC0415 - not loaded where there is no SQLite

    path = url.database or ""
    durable_folders.make_folder(Path(path).parent, 0o777)
    engine = create_async_engine(
        url,
        module=sqlite_driver.build_driver(),
        async_creator=partial(sqlite_driver.open_connection, path, busy_seconds=SQLITE_BUSY_SECONDS),
        execution_options=_EXECUTION_OPTIONS,
    )
    event.listen(engine.sync_engine, "begin", writes.begin)
    return engine, nullcontext


def _create_postgresql_engine(url: URL) -> tuple[AsyncEngine, GuardConnection]:
    from models import postgresql_sessions as sessions  # noqa: PLC0415 - not loaded where there is no PostgreSQL

    def set_timeouts(connection: Any) -> None:  # noqa: ANN401 - SQLAlchemy's own
        is_read = connection.get_execution_options().get("reads_only")
        if not is_read and not sessions.has_timeouts(connection.connection.driver_connection):
            connection.exec_driver_sql(sessions.timeout_statement())

    address = sessions.driver_address(url)
    engine = create_async_engine(
        url,
        async_creator=partial(
            sessions.open_checked_session, address, timeout=CONNECT_SECONDS, command_timeout=STATEMENT_SECONDS
        ),
        pool_size=POOL_SIZE,
        max_overflow=0,
        pool_use_lifo=True,
        pool_timeout=CONNECT_SECONDS,
        pool_pre_ping=True,
        execution_options=_EXECUTION_OPTIONS,
    )
    event.listen(engine.sync_engine, "begin", set_timeouts)
    _ping_rested_connections(engine)
    return engine, partial(sessions.guard_server, address)


def _ping_rested_connections(engine: AsyncEngine) -> None:
    """Make the pool ping only connections that were unused for over a second: a ping takes as long as a short
    transaction.

    The driver itself detects a connection that the server has ended.
    """
    dialect = engine.sync_engine.dialect
    ping, used_at = dialect.do_ping, WeakKeyDictionary[Any, float]()

    def ping_after_rest(connection: Any) -> bool:  # noqa: ANN401 - the dialect's own
        session = connection.driver_connection
        if monotonic() - used_at.get(session, 0.0) > RESTED_SECONDS:
            return ping(connection)
        return not session.is_closed()

    def note_use(connection: Any, _record: object) -> None:  # noqa: ANN401 - the dialect's own
        if connection is not None:
            used_at[connection.driver_connection] = monotonic()

    # SQLAlchemy has no hook for the ping of its pool.
    dialect.do_ping = ping_after_rest  # type: ignore[method-assign, assignment]
    event.listen(engine.sync_engine, "checkin", note_use)


class WriteLockBreaker:
    """Breaker for the write transactions of one process on one file; thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._under_way = 0
        self._changes = 0
        """Number of transactions begun and ended here; its growth shows that waiting writers wait for one
        another.
        """
        self._is_open = False

    def begin(self, execute: Callable[[str], object], *, busy_seconds: float) -> None:
        """Begin a write transaction on a connection, and wait for the lock of the file.

        `execute` runs a statement on it; `busy_seconds` is the connection's own wait for a lock, and is restored. The
        wait takes up to 30 seconds while writers of this process hold the lock. After a timeout because of another
        process, calls fail at once for as long as that keeps the lock. Raises `DatabaseUnavailable`.
        """
        if not self._is_open or not self._try_begin_at_once(execute, busy_seconds):
            self._wait(execute)
        with self._lock:
            self._is_open = False
            self._under_way += 1
            self._changes += 1

    def end(self) -> None:
        """Record the end of a transaction that `begin` has begun."""
        with self._lock:
            self._under_way -= 1
            self._changes += 1

    def _wait(self, execute: Callable[[str], object]) -> None:
        """Begin a transaction, and retry for up to 30 seconds while writers of this process hold the lock.

        Raises `DatabaseUnavailable` after that, and if another process holds the lock; then later calls don't wait.
        """
        give_up_at = monotonic() + OWN_WRITES_SECONDS
        while True:
            before = self._changes
            error = _try_begin(execute)
            if error is None:
                return
            with self._lock:
                is_ours = self._under_way > 0 or self._changes != before
                if not is_ours or monotonic() > give_up_at:
                    self._is_open = True
                    raise _lock_error() from error

    def _try_begin_at_once(self, execute: Callable[[str], object], busy_seconds: float) -> bool:
        """Try to begin a transaction without waiting; return whether it has begun.

        False if another writer of this process holds the lock. Raises `DatabaseUnavailable` while another process does.
        """
        execute("PRAGMA busy_timeout = 0")
        try:
            error = _try_begin(execute)
        finally:
            execute(f"PRAGMA busy_timeout = {int(busy_seconds * 1000)}")
        if error is not None and self._is_open:
            raise _lock_error() from error
        return error is None


def write_breaker(path: str) -> WriteLockBreaker:
    """Return the breaker for an SQLite file by its path, which all connections of this process share."""
    with _guard:
        return _breakers.setdefault(path, WriteLockBreaker())


def _try_begin(execute: Callable[[str], object]) -> Exception | None:
    """Try to begin a write transaction; return None, or the error if the file is locked; raise other errors."""
    try:
        execute("BEGIN IMMEDIATE")
    except Exception as error:
        code = getattr(getattr(error, "orig", error), "sqlite_errorcode", 0)
        if code & PRIMARY_CODE_BITS != sqlite3.SQLITE_BUSY:
            raise
        return error
    return None


def _lock_error() -> DatabaseUnavailable:
    return DatabaseUnavailable("Another program keeps the database file locked")


class TransactionTurns:
    """Queues of turns by key.

    If one turn ends with a lock timeout, those behind it fail at once: they need the same lock.
    """

    def __init__(self) -> None:
        self._queues: dict[str, _TurnQueue] = {}

    @asynccontextmanager
    async def take(self, key: str) -> AsyncIterator[None]:
        """Hold the turn of `key` for the block, after all earlier callers of this process with the same key.

        So their transactions don't wait for each other's locks in the database. Raises `LockWaitTimeout` if the block
        of an earlier caller has raised it meanwhile.
        """
        queue = self._queues.setdefault(key, _TurnQueue())
        queue.users += 1
        timeouts = queue.timeouts
        try:
            async with queue.lock:
                if queue.timeouts > timeouts:
                    raise LockWaitTimeout("Another transaction holds a lock that this one needs")
                try:
                    yield
                except LockWaitTimeout:
                    queue.timeouts += 1
                    raise
        finally:
            queue.users -= 1
            if not queue.users:
                del self._queues[key]


class _TurnQueue:
    __slots__ = ("lock", "timeouts", "users")

    def __init__(self) -> None:
        self.lock = asyncio.Lock()
        self.users = 0
        self.timeouts = 0
