"""Pools of PostgreSQL connections: reuse, and connections that the server has ended."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncConnection

from models.database import Database, parse_url
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
