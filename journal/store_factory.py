"""Creation of the journal store for a database."""

from __future__ import annotations

from typing import TYPE_CHECKING

from models.database import is_sqlite
from models.timestamps import DatabaseClock

if TYPE_CHECKING:
    from sqlalchemy.engine import URL

    from journal.store import JournalStore


async def open_store(url: URL, *, clock: DatabaseClock | None = None, connections: int = 6) -> JournalStore:
    """Return the store for a database: SQLite or PostgreSQL, without loading the module of the other kind.

    It connects with the first operation, so an unreachable database raises nothing here. The store updates `clock`,
    which other parts of the process may share. `connections` limits the pool of PostgreSQL.
    """
    clock = clock or DatabaseClock()
    if is_sqlite(url):
        from journal.sqlite.sqlite_store import SQLiteStore  # noqa: PLC0415 - one of the two is never needed

        return SQLiteStore(url.database or "", clock)
    from journal.postgresql import postgresql_store  # noqa: PLC0415 - one of the two is never needed

    return await postgresql_store.connect_postgresql(url, connections=connections, clock=clock)
