"""Pools of PostgreSQL connections: reuse, and connections that the server has ended."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncConnection

from models.database import Database, parse_url, share_transaction
from tests.services import PostgresServer


@pytest.fixture
async def database(postgres: PostgresServer) -> AsyncIterator[Database]:
    database = Database(parse_url(await postgres.create_database("pool")))
    yield database
    await database.close()


async def read_process_id(connection: AsyncConnection) -> int:
    found = await connection.scalar(text("SELECT pg_backend_pid() FROM pg_sleep(0.05)"))
    assert isinstance(found, int)
    return found


async def test_many_calls_at_once_keep_their_connections(database: Database) -> None:
    seen: set[int] = set()
    for _ in range(3):
        seen |= set(await asyncio.gather(*(database.transaction(read_process_id) for _ in range(10))))
    assert len(seen) == 10


async def test_a_connection_that_the_server_has_just_ended_is_replaced(database: Database) -> None:
    operator = Database(database.url)
    async with operator.read() as other:
        async with database.read() as connection:
            ended = await read_process_id(connection)
        await other.execute(text("SELECT pg_terminate_backend(:id, 5000)"), {"id": ended})
    await operator.close()
    for _ in range(3):
        async with database.read() as connection:
            assert await read_process_id(connection) != ended


async def test_a_statement_is_committed_by_itself(database: Database) -> None:
    async def change(connection: AsyncConnection) -> None:
        await connection.execute(text("CREATE TABLE kept (id integer)"))

    await database.statement(change)
    async with database.read() as connection:
        assert await connection.scalar(text("SELECT count(*) FROM kept")) == 0


async def count_rows(connection: AsyncConnection) -> int:
    return int(await connection.scalar(text("SELECT count(*) FROM seen")) or 0)


async def test_reads_need_no_transaction_unless_they_share_settings(database: Database) -> None:
    async def add(connection: AsyncConnection) -> None:
        await connection.execute(text("CREATE TABLE IF NOT EXISTS seen AS SELECT 1 AS id"))
        await connection.execute(text("INSERT INTO seen VALUES (2)"))

    set_locally = text("SELECT set_config('application_name', 'shared', true)")
    read_setting = text("SELECT current_setting('application_name')")
    state = text("SELECT xact_start FROM pg_stat_activity WHERE pid = :id")
    await database.transaction(add)
    operator = Database(database.url)
    async with database.read() as connection, operator.read() as other:
        idle = {"id": await read_process_id(connection)}
        assert await other.scalar(state, idle) is None, "an open block holds no old row versions"
        await connection.execute(set_locally)
        assert await connection.scalar(read_setting) != "shared"

        await share_transaction(connection)
        await connection.execute(set_locally)
        await share_transaction(connection)
        assert await connection.scalar(read_setting) == "shared"
        assert await other.scalar(state, idle) is not None
        seen = await count_rows(connection)
        await database.transaction(add)
        assert await count_rows(connection) == seen + 1, "each statement sees what was committed before it"
    async with database.read_snapshot() as connection:
        seen = await count_rows(connection)
        await share_transaction(connection)
        await database.transaction(add)
        assert await count_rows(connection) == seen
    async with database.read() as connection:
        assert await connection.scalar(read_setting) != "shared"
        idle = {"id": await read_process_id(connection)}
        async with operator.read() as other:
            assert await other.scalar(state, idle) is None, "the pool forgets the level of its last user"
    await operator.close()
