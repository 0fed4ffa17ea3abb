"""Chooses the store that fits a database."""

from __future__ import annotations

from typing import TYPE_CHECKING

from models.database import is_sqlite

if TYPE_CHECKING:
    from sqlalchemy.engine import URL

    from journal.store import Store


async def open_store(url: URL, *, connections: int = 6) -> Store:
    """Return the store on a database; the module of the other kind is not even loaded."""
    if is_sqlite(url):
        from journal.sqlite import SQLiteStore  # noqa: PLC0415 - one of the two is never needed

        return SQLiteStore(url.database or "")
    from journal import postgresql  # noqa: PLC0415 - one of the two is never needed

    return await postgresql.connect(url, connections=connections)
