"""Brings a database's tables to the newest form, and tells whether that is needed without loading Alembic."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from sqlalchemy import inspect, text

from models.database import Database, is_sqlite

if TYPE_CHECKING:
    from sqlalchemy import Connection
    from sqlalchemy.engine import URL

HEAD = "0001"
"""The newest revision that this code knows."""


class OutdatedDatabase(Exception):
    """The database's tables are older than this code: `pilotflame migrate` mends that."""


async def migrate(url: URL) -> None:
    """Run every migration that the database lacks; safe to repeat, and to run from several processes at once.

    Raises `DatabaseUnavailable`.
    """
    database = Database(url)
    try:
        async with _alone(database):
            # Repeated where it must be: SQLite refuses at once whoever makes a new file's journal when another does.
            await database.transaction(lambda connection: connection.run_sync(_upgrade))
    finally:
        await database.close()


async def revision(database: Database) -> str | None:
    """Return the database's revision, or None where it has no tables yet."""
    async with database.read() as connection:
        if not await connection.run_sync(lambda sync: inspect(sync).has_table("alembic_version")):
            return None
        row = (await connection.execute(text("SELECT version_num FROM alembic_version"))).first()
        return None if row is None else str(row[0])


async def require_current(database: Database) -> None:
    """Raise `OutdatedDatabase` unless the tables are at least as new as this code."""
    found = await revision(database)
    if found is None or found < HEAD:
        raise OutdatedDatabase("The database's tables are not up to date: run `pilotflame migrate` first")


@asynccontextmanager
async def _alone(database: Database) -> AsyncIterator[None]:
    """Let those who migrate at once take turns: whoever comes second finds nothing to do.

    The lock is held by a transaction of its own, since the one that migrates must see what was there after the wait.
    SQLite's transactions take turns by themselves.
    """
    if is_sqlite(database.url):
        yield
        return
    async with database.engine.connect() as guard, guard.begin():
        await guard.execute(text("SELECT pg_advisory_xact_lock(710465001)"))
        yield


def _upgrade(connection: Connection) -> None:
    from alembic import command  # noqa: PLC0415 - not needed where the database is up to date
    from alembic.config import Config  # noqa: PLC0415 - not needed where the database is up to date

    config = Config()
    config.set_main_option("script_location", str(Path(__file__).parent / "migrations"))
    config.attributes["connection"] = connection
    command.upgrade(config, "head")
