"""Databases with all tables in them, of a PostgreSQL server or in a file: migrated once a run, then copied."""

import asyncio
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from weakref import WeakSet

from models import schema_migration
from models.database import parse_url
from tests import services, shared_setup
from tests.services import PostgresServer

TEMPLATE = "migrated"

_with_template: WeakSet[PostgresServer] = WeakSet()


@contextmanager
def run_postgres() -> Iterator[PostgresServer]:
    """Start a PostgreSQL for the block that has the template already, or yield the one that the environment names."""
    with services.run_postgres(copied_data=_find_postgres_data) as server:
        if server.is_alive:  # the environment didn't name it
            _with_template.add(server)
        yield server


async def create_database(postgres: PostgresServer, name: str) -> str:
    """Create a database with all tables on a PostgreSQL server, in place of one of the same name,
    and return its URL.
    """
    if postgres not in _with_template:
        await _create_template(postgres)
    return await postgres.create_database(name, template=TEMPLATE)


async def create_sqlite_database(file: Path) -> str:
    """Create an SQLite database with all tables in a file, and return its URL."""
    migrated = await asyncio.to_thread(shared_setup.make_once, "migrated.db", _create_sqlite_file)
    await asyncio.to_thread(shutil.copyfile, migrated, file)
    return f"sqlite:///{file}"


async def create_data_folder(folder: Path) -> Path:
    """Create the data folder of a server with a migrated database, since a migration takes as long as a start."""
    await asyncio.to_thread(folder.mkdir, mode=0o700)
    await create_sqlite_database(folder / "pilotflame.db")
    return folder


async def _create_template(postgres: PostgresServer) -> None:
    await schema_migration.migrate(parse_url(await postgres.create_database(TEMPLATE)))
    _with_template.add(postgres)


def _find_postgres_data() -> Path:
    return shared_setup.make_once("postgres", _create_postgres_data)


def _create_postgres_data(folder: Path) -> None:
    with services.run_postgres() as server, ThreadPoolExecutor(max_workers=1) as thread:
        # In a thread without an event loop: the first test that needs the server may be a coroutine.
        thread.submit(asyncio.run, _create_template(server)).result()
        server.stop()
        services.copy_data(server.folder / "data", folder)


def _create_sqlite_file(file: Path) -> None:
    # The whole database is in this one file: the last connection to close writes the journal into it.
    asyncio.run(schema_migration.migrate(parse_url(f"sqlite:///{file}")))
