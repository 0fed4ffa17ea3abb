"""Databases with all tables in them, of a PostgreSQL server or in a file: migrated once, and copied from then on."""

import asyncio
from pathlib import Path
from weakref import WeakSet

from models import schema_migration
from models.database import parse_url
from tests.services import PostgresServer

TEMPLATE = "migrated"

_with_template: WeakSet[PostgresServer] = WeakSet()
_files: list[bytes] = []


async def create_database(postgres: PostgresServer, name: str) -> str:
    """Create a database with all tables on a PostgreSQL server, in place of one of the same name,
    and return its URL.
    """
    if postgres not in _with_template:
        await schema_migration.migrate(parse_url(await postgres.create_database(TEMPLATE)))
        _with_template.add(postgres)
    return await postgres.create_database(name, template=TEMPLATE)


async def create_sqlite_database(file: Path) -> str:
    """Create an SQLite database with all tables in a file, and return its URL."""
    url = f"sqlite:///{file}"
    if _files:
        await asyncio.to_thread(file.write_bytes, _files[0])
    else:
        await schema_migration.migrate(parse_url(url))
        # The whole database is in this one file: the last connection to close writes the journal into it.
        _files.append(await asyncio.to_thread(file.read_bytes))
    return url


async def create_data_folder(folder: Path) -> Path:
    """Create the data folder of a server with a migrated database, since a migration takes as long as a start."""
    await asyncio.to_thread(folder.mkdir, mode=0o700)
    await create_sqlite_database(folder / "pilotflame.db")
    return folder
