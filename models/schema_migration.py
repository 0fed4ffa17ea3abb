"""Migration of a database's tables to the newest revision.

Checks of the revision don't load Alembic.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from time import monotonic
from typing import TYPE_CHECKING

from sqlalchemy import inspect, text

from models.database import Database, is_sqlite, share_transaction
from models.errors import LockWaitTimeout

if TYPE_CHECKING:
    from sqlalchemy import Connection, TextClause
    from sqlalchemy.engine import URL

HEAD_REVISION = "0060"
"""Newest revision that this code knows."""
GUARD_MILLISECONDS = 600_000
"""Time for which one migration may block others, even if its process freezes."""
STEP_MILLISECONDS = 60_000
"""Time for which a migration may do other work than statements, such as load the scripts on a busy machine. Tables that
it has changed are locked meanwhile, also if its process freezes.
"""
LOCKED_SECONDS = 60.0
"""Time after which a migration gives up on tables that other transactions have locked."""
PAUSE_SECONDS = 0.2
_IDLE_TIMEOUT = "idle_in_transaction_session_timeout"


class OutdatedDatabase(Exception):
    """The tables are older than this code: run `pilotflame migrate`."""


class NewerDatabase(Exception):
    """A newer release has changed the tables in a way that this code cannot use."""


async def migrate(url: URL) -> None:
    """Run every migration that the database lacks; safe to repeat, and to run from several processes at once.

    Changes nothing in a newer database that this code can use. Raises `DatabaseUnavailable`, `NewerDatabase`, and
    `LockWaitTimeout` if tables stay locked for a minute.
    """
    database = Database(url)
    try:
        async with _migrate_exclusively(database):
            await _upgrade_when_unlocked(database)
    finally:
        await database.close()


async def require_current(database: Database) -> None:
    """Raise `OutdatedDatabase` or `NewerDatabase` unless this code can use the tables.

    Raises `DatabaseUnavailable` too.
    """
    async with database.read() as connection:
        found = await connection.run_sync(read_revision)
        if found is None or found < HEAD_REVISION:
            raise OutdatedDatabase("The database's tables are not up to date: run `pilotflame migrate` first")
        await connection.run_sync(_require_support, found)


def read_revision(connection: Connection) -> str | None:
    """Return the revision of the database, or None if it has no tables."""
    if not inspect(connection).has_table("alembic_version"):
        return None
    row = connection.execute(text("SELECT version_num FROM alembic_version")).first()
    return None if row is None else str(row[0])


def _require_support(connection: Connection, revision: str) -> None:
    """Raise `NewerDatabase` if the tables of a newer revision lack something that this code uses."""
    if revision <= HEAD_REVISION:
        return
    oldest = str(connection.execute(text("SELECT oldest_revision FROM schema_support")).scalar())
    if oldest > HEAD_REVISION:
        raise NewerDatabase(
            f"The database's tables have revision {revision}, which needs a newer release of Pilotflame than this"
            f" one (revision {HEAD_REVISION}): install that release"
        )


@asynccontextmanager
async def _migrate_exclusively(database: Database) -> AsyncIterator[None]:
    """Hold the lock of migrations for the block, so that concurrent migrations wait, without a limit, and find nothing
    to do.

    A transaction of its own holds the lock, since the migrating transaction must see the tables as they are after the
    wait. It stays idle meanwhile, for longer than other transactions may. SQLite serializes transactions by itself.
    """
    if is_sqlite(database.url):
        yield
        return
    async with database.read() as guard:
        await share_transaction(guard)
        await guard.execute(_allow_idle(GUARD_MILLISECONDS))
        try_lock = text("SELECT pg_try_advisory_xact_lock(710465001)")
        while not await guard.scalar(try_lock):  # noqa: ASYNC110 - the lock is another process's
            await asyncio.sleep(PAUSE_SECONDS)
        yield


def _allow_idle(milliseconds: int) -> TextClause:
    """Return the statement of PostgreSQL after which its transaction may be idle for longer than others."""
    return text(f"SELECT set_config('{_IDLE_TIMEOUT}', '{milliseconds}', true)")


async def _upgrade_when_unlocked(database: Database) -> None:
    """Migrate as soon as no other transaction has locked a table; raises `LockWaitTimeout` after a minute of attempts.

    Each attempt is short: other users of a table wait behind a statement that is to change it.
    """
    last_try_at = monotonic() + LOCKED_SECONDS
    while True:
        try:
            # Repeated if necessary: SQLite refuses at once to create a new file's journal while another
            # process does so.
            await database.transaction(lambda connection: connection.run_sync(_upgrade))
        except LockWaitTimeout:
            if monotonic() > last_try_at:
                raise
            await asyncio.sleep(PAUSE_SECONDS)
        else:
            return


def _upgrade(connection: Connection) -> None:
    """Run the missing migrations on a connection; changes nothing for a newer revision that this code can use.

    Raises `NewerDatabase` for a revision that it can't use.
    """
    found = read_revision(connection)
    if found is not None and found > HEAD_REVISION:
        _require_support(connection, found)
        return
    if not is_sqlite(connection.engine.url):
        connection.execute(_allow_idle(STEP_MILLISECONDS))
    from alembic import command  # noqa: PLC0415 - not needed where the database is up to date
    from alembic.config import Config  # noqa: PLC0415 - not needed where the database is up to date

    config = Config()
    config.set_main_option("script_location", str(Path(__file__).parent / "migrations"))
    config.attributes["connection"] = connection
    command.upgrade(config, "head")
