"""Driver for SQLite: one call to the thread of a connection for each statement, and connections that stay usable."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import aiosqlite
import pytest
from sqlalchemy import text
from sqlalchemy.exc import IntegrityError
from sqlalchemy.ext.asyncio import AsyncConnection

from models.database import Database, parse_url

LONG = "WITH RECURSIVE n (i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < 3000000) SELECT count(*) FROM n"
SOON_SECONDS = 0.05


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


async def test_a_canceled_caller_leaves_a_usable_pool(database: Database) -> None:
    async def read(statement: str) -> object:
        async with database.read() as connection:
            return await connection.scalar(text(statement))

    reading = asyncio.ensure_future(read(LONG))
    await asyncio.sleep(SOON_SECONDS)
    reading.cancel()
    with pytest.raises(asyncio.CancelledError):
        await reading
    for _ in range(3):
        assert await read("SELECT count(*) FROM item") == 0
