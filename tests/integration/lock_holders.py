"""PostgreSQL transactions that stay open and hold locks, and databases with short lock timeouts."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable
from contextlib import asynccontextmanager
from typing import TypeVar

import asyncpg
import pytest
from sqlalchemy import URL

from models import postgresql_sessions as sessions
from models.database import Database, is_sqlite

Answer = TypeVar("Answer")

PROMPT_SECONDS = 10.0
"""Far above the time of any statement on a busy machine, far below the wait for a lock that is never
released.
"""


@asynccontextmanager
async def hold_transaction_open(url: URL, statement: str, *arguments: object) -> AsyncIterator[None]:
    """Execute a statement in a transaction that stays open during the block, like one of a process that hangs."""
    connection = await asyncpg.connect(sessions.driver_address(url))
    try:
        async with connection.transaction():
            await connection.execute(statement, *arguments)
            yield
    finally:
        await connection.close()


@asynccontextmanager
async def open_impatient_database(url: URL, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Database]:
    """Yield a database with a short lock timeout; skip the test if the database has no row locks."""
    if is_sqlite(url):
        pytest.skip("SQLite locks no rows")
    monkeypatch.setitem(sessions.SESSION_TIMEOUTS, "lock_timeout", "200")
    database = Database(url)
    yield database
    await database.close()


async def require_prompt(call: Awaitable[Answer]) -> Answer:
    """Return the result of a call; raises TimeoutError unless it ends within ten seconds."""
    async with asyncio.timeout(PROMPT_SECONDS):
        return await call
