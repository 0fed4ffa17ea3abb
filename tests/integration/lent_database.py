"""One PostgreSQL database with open connections, for the gateways of one file of tests after another."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Final
from uuid import uuid4

from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncConnection

from journal.store import JournalStore
from journal.store_factory import open_store
from models.database import Database, parse_url
from tests import databases
from tests.services import PostgresServer

MOST_BYTES: Final = 4 << 20
"""Size of all tables together above which a new database costs less than the rows that a file has left."""
OF_MIGRATIONS: Final = frozenset({"alembic_version", "schema_support"})
"""Tables with rows of migrations, which no server changes."""
TABLES_WITH_PAGES: Final = text(
    """SELECT relname FROM pg_class WHERE relnamespace = 'public'::regnamespace AND relkind = 'r'
    AND pg_relation_size(oid) > 0"""
)
CONDITION: Final = text(
    """SELECT concat_ws(' ', count(*), max(oid), sum(relnatts), max(reltuples)) AS schema,
    sum(pg_relation_size(oid)) FILTER (WHERE relkind = 'r') AS bytes
    FROM pg_class WHERE relnamespace = 'public'::regnamespace"""
)
"""Text that changes with any table, index, column or statistics of rows, and the size of all tables."""


@dataclass(frozen=True)
class OpenDatabase:
    """Migrated database with its store."""

    url: str
    database: Database
    store: JournalStore

    async def close(self) -> None:
        await self.store.close()
        await self.database.close()


class LentDatabase:
    """Database that is lent to one borrower after another, each of which finds it without rows.

    To create a database, and to open a gateway's connections, takes PostgreSQL and the tests as long as a dozen
    requests. A database with another schema, with statistics, or with much data is not lent again.
    """

    def __init__(self, postgres: PostgresServer) -> None:
        self._postgres = postgres
        self._free: OpenDatabase | None = None
        self._schema: object = None
        """Schema of a database from the template."""

    @asynccontextmanager
    async def lend(self) -> AsyncIterator[OpenDatabase]:
        """Yield the database for the block, without rows."""
        opened, self._free = self._free or await self._create(), None
        try:
            yield opened
        finally:
            schema, size = await _examine(opened.database)
            if schema == self._schema and size <= MOST_BYTES:
                await opened.database.transaction(_delete_rows)
                self._free = opened
            else:
                await opened.close()

    async def close(self) -> None:
        """Close the connections."""
        if self._free is not None:
            await self._free.close()

    async def _create(self) -> OpenDatabase:
        url = await databases.create_database(self._postgres, f"lent_{uuid4().hex}")
        database = Database(parse_url(url))
        self._schema, _ = await _examine(database)
        return OpenDatabase(url, database, await open_store(database.url, clock=database.clock))


async def _examine(database: Database) -> tuple[object, int]:
    """Return the schema with its statistics as text, and the bytes of all tables."""
    async with database.read() as connection:
        row = (await connection.execute(CONDITION)).one()
    return row.schema, int(row.bytes)


async def _delete_rows(connection: AsyncConnection) -> None:
    tables = set((await connection.execute(TABLES_WITH_PAGES)).scalars()) - OF_MIGRATIONS
    # One statement: keys of other tables are checked at its end.
    deletions = ", ".join(f"in_{table} AS (DELETE FROM {table})" for table in sorted(tables))
    if deletions:
        await connection.exec_driver_sql(f"WITH {deletions} SELECT 1")
