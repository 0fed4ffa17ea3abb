from __future__ import annotations

import asyncio
import importlib
import pkgutil
import time
from collections.abc import AsyncIterator
from pathlib import Path

import asyncpg
import pytest
from alembic import command
from alembic.autogenerate import compare_metadata
from alembic.config import Config
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import Connection, inspect, text
from sqlalchemy.exc import DBAPIError
from sqlmodel import SQLModel

import models
from models import schema_migration
from models.database import RETRIES, Database, parse_url
from models.postgresql_sessions import SESSION_TIMEOUTS
from models.schema_migration import NewerDatabase, OutdatedDatabase
from tests import databases
from tests.services import PostgresServer

pytestmark = pytest.mark.every_database

for module in pkgutil.iter_modules(models.__path__, "models."):
    importlib.import_module(module.name)  # its tables must be known to the metadata


TABLES_WITHOUT_CLASS = frozenset({"broker_message", "rate_bucket", "schema_support"})
"""Tables of statements in plain SQL alone."""


async def read_revision(database: Database) -> str | None:
    async with database.read() as connection:
        return await connection.run_sync(schema_migration.read_revision)


@pytest.fixture(params=["SQLite", "PostgreSQL"])
async def empty_database(
    request: pytest.FixtureRequest, tmp_path: Path, postgres: PostgresServer
) -> AsyncIterator[Database]:
    if request.param == "SQLite":
        url = f"sqlite:///{tmp_path}/pilotflame.db"
    else:
        url = await postgres.create_database("migrations")
    database = Database(parse_url(url))
    yield database
    await database.close()


@pytest.fixture(params=["SQLite", "PostgreSQL"])
async def database(
    request: pytest.FixtureRequest, tmp_path: Path, postgres: PostgresServer
) -> AsyncIterator[Database]:
    """Yield a copy of the database that this run of the tests has migrated."""
    if request.param == "SQLite":
        url = await databases.create_sqlite_database(tmp_path / "pilotflame.db")
    else:
        url = await databases.create_database(postgres, "migrated_before")
    database = Database(parse_url(url))
    yield database
    await database.close()


async def test_the_migrations_make_the_tables_that_the_code_knows(database: Database) -> None:
    def differences(connection: Connection) -> list[object]:
        context = MigrationContext.configure(
            connection, opts={"include_name": lambda name, *_: name not in TABLES_WITHOUT_CLASS}
        )
        return [*compare_metadata(context, SQLModel.metadata)]

    async with database.read() as connection:
        assert await connection.run_sync(differences) == []


async def test_only_live_runs_stand_in_the_indexes_that_look_for_them(database: Database) -> None:
    def conditions(connection: Connection) -> dict[str, str]:
        return {
            str(index["name"]): str(index["dialect_options"].get(f"{connection.dialect.name}_where", ""))
            for index in inspect(connection).get_indexes("execution")
        }

    async with database.read() as connection:
        found = await connection.run_sync(conditions)
    for status in ("pending", "running", "waiting"):
        assert f"'{status}'" in found[f"ix_execution_{status}"]


async def test_to_migrate_again_changes_nothing(database: Database) -> None:
    await database.transaction(
        lambda connection: connection.execute(
            text("INSERT INTO organization (id, shard, name, created_at) VALUES ('org_1', 1, 'Kept', 1)")
        )
    )
    await schema_migration.migrate(database.url)
    async with database.read() as connection:
        assert (await connection.execute(text("SELECT name FROM organization"))).scalar() == "Kept"


async def test_a_database_is_current_from_its_last_migration_on_although_several_migrate_at_once(
    empty_database: Database,
) -> None:
    assert await read_revision(empty_database) is None
    with pytest.raises(OutdatedDatabase, match="pilotflame migrate"):
        await schema_migration.require_current(empty_database)
    await asyncio.gather(*(schema_migration.migrate(empty_database.url) for _ in range(3)))
    assert await read_revision(empty_database) == schema_migration.HEAD_REVISION
    await schema_migration.require_current(empty_database)


async def test_a_migration_outlasts_a_pause_in_which_other_transactions_end(
    postgres: PostgresServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A busy machine needs seconds to load the scripts for the first time."""
    monkeypatch.setitem(SESSION_TIMEOUTS, "idle_in_transaction_session_timeout", "50")
    upgrade = command.upgrade

    def upgrade_later(config: Config, revision: str) -> None:
        time.sleep(0.1)
        upgrade(config, revision)

    monkeypatch.setattr(command, "upgrade", upgrade_later)
    url = parse_url(await postgres.create_database("slow_migration"))
    await schema_migration.migrate(url)


async def test_several_migrate_a_serializable_database_at_once(postgres: PostgresServer) -> None:
    url = await postgres.create_database("serializable_migrations")
    connection = await asyncpg.connect(url.replace("+asyncpg", ""))
    await connection.execute(
        "ALTER DATABASE serializable_migrations SET default_transaction_isolation = 'serializable'"
    )
    await connection.close()
    migrations = (schema_migration.migrate(parse_url(url)) for _ in range(3))
    assert await asyncio.gather(*migrations, return_exceptions=True) == [None] * 3


@pytest.mark.parametrize("database", ["SQLite"], indirect=True)
async def test_an_older_database_is_refused(database: Database) -> None:
    await rewrite(database, "UPDATE alembic_version SET version_num = '0000'")
    with pytest.raises(OutdatedDatabase):
        await schema_migration.require_current(database)


async def test_a_newer_database_is_used_as_long_as_it_supports_this_code(database: Database) -> None:
    await rewrite(database, "UPDATE alembic_version SET version_num = '9999'")
    await schema_migration.migrate(database.url)
    await schema_migration.require_current(database)
    assert await read_revision(database) == "9999"

    await rewrite(database, "UPDATE schema_support SET oldest_revision = '9998'")
    for refused in (schema_migration.require_current(database), schema_migration.migrate(database.url)):
        with pytest.raises(NewerDatabase, match=r"revision 9999.*newer release"):
            await refused


async def rewrite(database: Database, statement: str) -> None:
    await database.transaction(lambda connection: connection.execute(text(statement)))


def test_the_newest_revision_that_the_code_names_is_the_newest_there_is() -> None:
    config = Config()
    config.set_main_option("script_location", str(Path(schema_migration.__file__).parent / "migrations"))
    assert ScriptDirectory.from_config(config).get_heads() == [schema_migration.HEAD_REVISION]


async def test_a_migration_that_deadlocks_with_a_busy_server_is_repeated(
    postgres: PostgresServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = await postgres.create_database("deadlocked")
    upgrade, attempts = schema_migration._upgrade, iter(range(100))  # noqa: SLF001 - the step that deadlocks

    def deadlock_first(connection: Connection) -> None:
        if next(attempts) < 2 * RETRIES:
            raise DBAPIError("ALTER TABLE", {}, asyncpg.DeadlockDetectedError("deadlock detected"))
        upgrade(connection)

    monkeypatch.setattr(schema_migration, "_upgrade", deadlock_first)
    await schema_migration.migrate(parse_url(url))
    database = Database(parse_url(url))
    assert await read_revision(database) == schema_migration.HEAD_REVISION
    await database.close()
