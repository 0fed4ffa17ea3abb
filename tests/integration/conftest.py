import asyncio
from collections.abc import AsyncIterator

import asyncpg
import pytest

from tests import databases
from tests.integration.gateway_world import People, World, open_world
from tests.integration.run_world import Where
from tests.services import PgBouncer, PostgreSQL


@pytest.fixture(scope="module", params=["sqlite", "postgresql"])
async def world(
    request: pytest.FixtureRequest, postgres: PostgreSQL, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[World]:
    """Yield a gateway on each kind of database, that of one file of tests."""
    async with open_world(request.param, postgres, tmp_path_factory.mktemp("world")) as world:
        yield world


@pytest.fixture
async def people(world: World) -> People:
    return await world.people()


@pytest.fixture(scope="session")
def on_sqlite(tmp_path_factory: pytest.TempPathFactory) -> Where:
    folder = tmp_path_factory.mktemp("sqlite")
    return Where(asyncio.run(databases.migrated_file(folder / "pilotflame.db")))


@pytest.fixture(scope="session")
def on_postgres(postgres: PostgreSQL) -> Where:
    return Where(asyncio.run(databases.migrated(postgres, "runs")))


@pytest.fixture(scope="session")
def behind_pgbouncer(on_postgres: Where, pgbouncer: PgBouncer) -> Where:
    return Where(pgbouncer.through(on_postgres.url), on_postgres.url)


@pytest.fixture(scope="session")
def on_serializable_postgres(postgres: PostgreSQL) -> Where:
    return Where(asyncio.run(_serializable(asyncio.run(databases.migrated(postgres, "runs_serializable")))))


async def _serializable(url: str) -> str:
    connection = await asyncpg.connect(url.replace("+asyncpg", ""))
    try:
        name = await connection.fetchval("SELECT current_database()")
        await connection.execute(f"ALTER DATABASE {name} SET default_transaction_isolation = 'serializable'")
    finally:
        await connection.close()
    return url
