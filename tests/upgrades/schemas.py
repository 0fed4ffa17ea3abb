"""Tables of a database with everything that belongs to them, to be compared."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from alembic import command
from alembic.config import Config
from sqlalchemy import Connection, inspect, text

from models import schema_migration
from models.database import Database, parse_url

_SQLITE = """
SELECT type, name, tbl_name, replace(sql, '"', '') FROM sqlite_master WHERE name NOT LIKE 'sqlite_%' ORDER BY 1, 2
"""
_POSTGRESQL = """
SELECT 'column', table_name, column_name, ordinal_position::text, data_type, is_nullable, column_default, collation_name
    FROM information_schema.columns WHERE table_schema = 'public'
UNION ALL
SELECT 'index', tablename, indexname, indexdef, NULL, NULL, NULL, NULL FROM pg_indexes WHERE schemaname = 'public'
UNION ALL
SELECT 'constraint', conrelid::regclass::text, conname, pg_get_constraintdef(oid), NULL, NULL, NULL, NULL
    FROM pg_constraint WHERE connamespace = 'public'::regnamespace
UNION ALL
SELECT 'table', relname, reloptions::text, NULL, NULL, NULL, NULL, NULL
    FROM pg_class WHERE relnamespace = 'public'::regnamespace AND relkind = 'r'
ORDER BY 1, 2, 3
"""


@dataclass(frozen=True)
class Schema:
    """Tables, indexes and constraints of a database as it describes them, and the number of rows."""

    parts: Sequence[tuple[Any, ...]]
    columns: Collection[tuple[str, str, str, bool]]
    """Table, name, type, and whether it may be NULL."""
    row_counts: Mapping[str, int]


async def read(url: str) -> Schema:
    """Return the schema of a database; fails if its rows break foreign keys or its file is damaged (SQLite)."""
    database = Database(parse_url(url))
    try:
        async with database.read() as connection:
            return await connection.run_sync(_read)
    finally:
        await database.close()


async def downgrade(url: str, revision: str) -> None:
    """Undo the migrations of a database down to a revision."""
    config = Config()
    config.set_main_option("script_location", str(Path(schema_migration.__file__).parent / "migrations"))

    def undo(connection: Connection) -> None:
        config.attributes["connection"] = connection
        command.downgrade(config, revision)

    await _transact(url, undo)


async def execute(url: str, statements: Sequence[str]) -> None:
    """Execute statements in one transaction."""

    def work(connection: Connection) -> None:
        for statement in statements:
            connection.execute(text(statement))

    await _transact(url, work)


async def _transact(url: str, work: Callable[[Connection], None]) -> None:
    database = Database(parse_url(url))
    try:
        await database.transaction(lambda connection: connection.run_sync(work))
    finally:
        await database.close()


def _read(connection: Connection) -> Schema:
    """Return the schema of a database; fails for damaged SQLite files."""
    is_sqlite = connection.dialect.name == "sqlite"
    parts = [tuple(row) for row in connection.execute(text(_SQLITE if is_sqlite else _POSTGRESQL))]
    if is_sqlite:
        assert connection.execute(text("PRAGMA foreign_key_check")).all() == []
        assert connection.execute(text("PRAGMA integrity_check")).scalar() == "ok"
    tables = [part[1] for part in parts if part[0] == "table"]
    counts = {name: connection.execute(text(f"SELECT count(*) FROM {name}")).scalar_one() for name in tables}
    inspector = inspect(connection)
    columns = {
        (table, column["name"], str(column["type"]), column["nullable"])
        for table in tables
        for column in inspector.get_columns(table)
    }
    return Schema(parts, columns, counts)
