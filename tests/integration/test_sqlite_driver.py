"""Driver for SQLite: one call to the thread of a connection for each statement, and connections that stay usable."""

from __future__ import annotations

import asyncio
import sqlite3
import threading
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import aiosqlite
import pytest
from sqlalchemy import text
from sqlalchemy.exc import IntegrityError
from sqlalchemy.ext.asyncio import AsyncConnection

from models import sqlite_driver
from models.database import Database, parse_url

LATE = "SELECT 1 AS late"
SOON_SECONDS = 0.05
LONG_SECONDS = 30.0


@pytest.fixture
async def database(tmp_path: Path) -> AsyncIterator[Database]:
    database = Database(parse_url(f"sqlite:///{tmp_path / 'driver.db'}"))
    await database.transaction(
        lambda connection: connection.execute(text("CREATE TABLE item (id INTEGER PRIMARY KEY, name TEXT)"))
    )
    yield database
    await database.close()


async def test_a_statement_and_its_rows_take_one_call(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[object] = []
    execute: Any = aiosqlite.Connection._execute  # noqa: SLF001 - the calls are counted there

    async def note(connection: aiosqlite.Connection, *arguments: object) -> object:
        calls.append(arguments)
        return await execute(connection, *arguments)

    async with database.read() as connection:
        monkeypatch.setattr(aiosqlite.Connection, "_execute", note)
        rows = (await connection.execute(text("SELECT 1 AS a UNION SELECT 2"))).mappings().all()
        assert (len(calls), [row["a"] for row in rows]) == (1, [1, 2])
        assert (await connection.execute(text("SELECT id FROM item"))).all() == []


async def test_writes_and_their_errors_are_those_of_sqlite(database: Database) -> None:
    async def insert(connection: AsyncConnection) -> int:
        rows = [{"id": 1, "name": "a"}, {"id": 2, "name": "b"}]
        await connection.execute(text("INSERT INTO item VALUES (:id, :name)"), rows)
        changed = await connection.execute(text("UPDATE item SET name = 'c' WHERE id > :least"), {"least": 0})
        return int(changed.rowcount)

    assert await database.transaction(insert) == 2
    with pytest.raises(IntegrityError, match="UNIQUE"):
        await database.transaction(
            lambda connection: connection.execute(text("INSERT INTO item VALUES (1, 'd')"))
        )
    async with database.read() as connection:
        names = await connection.scalars(text("SELECT name FROM item ORDER BY id"))
        assert names.all() == ["c", "c"]


async def test_a_canceled_caller_leaves_a_usable_pool(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    loop, is_executing, may_end = asyncio.get_running_loop(), asyncio.Event(), threading.Event()
    execute: Any = sqlite_driver._execute  # noqa: SLF001 - a statement is held up there

    def execute_late(cursor: sqlite3.Cursor, operation: str, parameters: object) -> object:
        if operation == LATE:
            loop.call_soon_threadsafe(is_executing.set)
            may_end.wait(LONG_SECONDS)
        return execute(cursor, operation, parameters)

    async def read(statement: str) -> object:
        async with database.read() as connection:
            return await connection.scalar(text(statement))

    monkeypatch.setattr(sqlite_driver, "_execute", execute_late)
    reading = asyncio.create_task(read(LATE))
    async with asyncio.timeout(LONG_SECONDS):
        await is_executing.wait()
    reading.cancel()
    await asyncio.wait([reading], timeout=SOON_SECONDS)  # it may wait for its statement
    may_end.set()
    with pytest.raises(asyncio.CancelledError):
        await reading
    for _ in range(3):
        assert await read("SELECT count(*) FROM item") == 0


async def test_a_canceled_reader_leaves_no_connection_open(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[sqlite3.Connection] = []
    loop, is_opening, may_open = asyncio.get_running_loop(), asyncio.Event(), threading.Event()
    connect: Any = sqlite3.connect

    def connect_late(path: str, **options: object) -> sqlite3.Connection:
        loop.call_soon_threadsafe(is_opening.set)
        may_open.wait(LONG_SECONDS)
        opened.append(connect(path, **options))
        return opened[-1]

    monkeypatch.setattr(sqlite3, "connect", connect_late)
    database = Database(parse_url(f"sqlite:///{tmp_path / 'driver.db'}"))
    reader = asyncio.create_task(database.ping())
    await is_opening.wait()
    reader.cancel()
    await asyncio.wait([reader])
    may_open.set()
    async with asyncio.timeout(LONG_SECONDS):
        while not opened or is_open(opened[0]):  # noqa: ASYNC110 - the thread sets no event after the end
            await asyncio.sleep(SOON_SECONDS)
    await database.ping()
    await database.close()


def is_open(connection: sqlite3.Connection) -> bool:
    """Return whether a connection accepts statements."""
    try:
        connection.execute("SELECT 1")
    except sqlite3.ProgrammingError:
        return False
    return True
