"""SQLAlchemy's driver of SQLite: a statement takes one call to the thread of its connection.

aiosqlite makes four calls: for a cursor, the statement, its rows, and the end of the cursor. Each takes longer than
most statements, since the threads wait for each other's turns of the interpreter.
"""

from __future__ import annotations

import sqlite3
from collections import deque
from collections.abc import Sequence
from functools import cache, partial
from typing import Any

import aiosqlite
from sqlalchemy.dialects.sqlite import aiosqlite as adapter

from concurrency.shielded_opening import open_shielded

PRAGMAS = ("journal_mode = WAL", "synchronous = FULL", "foreign_keys = ON", "cache_size = -8000")
"""Write-ahead log, full durability, foreign keys, and a cache of 8 MB.

A search through ten thousand workflows takes three times as long if its pages don't stay in memory.
"""
ROWS_PER_FETCH = 64
"""Rows that aiosqlite reads at once for its own iterators, which nothing here uses."""


async def open_connection(path: str, *, busy_seconds: float) -> aiosqlite.Connection:
    """Open an SQLite file, in a new thread that serves this connection.

    A statement waits up to `busy_seconds` while other programs lock the file. If the caller is canceled, the connection
    is closed as soon as it is open. Raises `sqlite3.Error` if the file can't be opened.
    """
    connection = aiosqlite.Connection(partial(_connect, path, busy_seconds), ROWS_PER_FETCH)
    connection._thread.daemon = True  # noqa: SLF001 - as SQLAlchemy does for connections that it opens
    return await open_shielded(connection, aiosqlite.Connection.stop)


def _connect(path: str, busy_seconds: float) -> sqlite3.Connection:
    """Open a connection that any thread may use, without transactions of the driver's own, and set its pragmas."""
    # The driver's own BEGIN is late and deferred.
    connection = sqlite3.connect(path, timeout=busy_seconds, check_same_thread=False, isolation_level=None)
    try:
        for pragma in PRAGMAS:
            connection.execute(f"PRAGMA {pragma}")
    except BaseException:
        connection.close()
        raise
    return connection


@cache
def build_driver() -> object:
    """Return the driver, for the parameter `module` of an engine that connects by `open_connection`; the same object
    each time.
    """
    return _SqliteDriver(aiosqlite, sqlite3)


def _execute(cursor: sqlite3.Cursor, operation: str, parameters: Any) -> Sequence[Any]:  # noqa: ANN401 - any values
    """Execute a statement and return all of its rows."""
    cursor.execute(operation, parameters or ())
    return cursor.fetchall() if cursor.description else ()


class _SqliteCursor(adapter.AsyncAdapt_aiosqlite_cursor):
    """Cursor whose rows are read by the call that executes the statement."""

    __slots__ = ()

    def _make_new_cursor(self, connection: Any) -> Any:  # noqa: ANN401 - the driver's own types
        # Opening a cursor takes no time, and connections are opened for use in any thread.
        return aiosqlite.Cursor(connection, connection._conn.cursor())  # noqa: SLF001 - see above

    def _aenter_cursor(self, cursor: Any) -> Any:  # noqa: ANN401 - the driver's own types
        return cursor

    async def _execute_async(self, operation: Any, parameters: Any) -> None:  # noqa: ANN401 - the driver's own
        async with self._adapt_connection._execute_mutex:  # noqa: SLF001 - as the class above does
            # The adapter's types hide the cursor of sqlite3, and aiosqlite has no public call for a function.
            cursor, thread = self._cursor._cursor, self._connection  # type: ignore[attr-defined]  # noqa: SLF001 - see above
            rows = await thread._execute(_execute, cursor, operation, parameters)  # noqa: SLF001 - see above
            self._rows = deque(rows)

    async def _async_soft_close(self) -> None:
        """Do nothing: all rows are read already."""

    def close(self) -> None:
        # The statement has ended with its last row, or still runs for a caller that was canceled.
        self._rows.clear()


class _SqliteConnection(adapter.AsyncAdapt_aiosqlite_connection):
    __slots__ = ()
    _cursor_cls = _SqliteCursor

    def create_function(self, *args: Any, **kw: Any) -> None:  # noqa: ANN401 - the arguments of SQLite
        # SQLAlchemy defines `regexp` in each new connection. A call to the thread could be canceled, and the pool would
        # forget the connection without closing it.
        self._connection._conn.create_function(*args, **kw)  # noqa: SLF001 - as the cursor does


class _SqliteDriver(adapter.AsyncAdapt_aiosqlite_dbapi):
    def connect(self, *arg: Any, **kw: Any) -> _SqliteConnection:  # noqa: ANN401 - the arguments of SQLite
        opened = super().connect(*arg, **kw)
        return _SqliteConnection(self, opened._connection)  # noqa: SLF001 - as the class above does
