import asyncio

import asyncpg
import pytest

from models import migrating
from models.database import parse_url
from tests.integration.run_world import Where
from tests.services import PgBouncer, PostgreSQL


@pytest.fixture(scope="session")
def on_sqlite(tmp_path_factory: pytest.TempPathFactory) -> Where:
    where = Where(f"sqlite:///{tmp_path_factory.mktemp('sqlite') / 'pilotflame.db'}")
    asyncio.run(migrating.migrate(parse_url(where.url)))
    return where


@pytest.fixture(scope="session")
def on_postgres(postgres: PostgreSQL) -> Where:
    return Where(asyncio.run(_migrated(postgres, "runs")))


@pytest.fixture(scope="session")
def behind_pgbouncer(on_postgres: Where, pgbouncer: PgBouncer) -> Where:
    return Where(pgbouncer.through(on_postgres.url), on_postgres.url)


@pytest.fixture(scope="session")
def on_serializable_postgres(postgres: PostgreSQL) -> Where:
    return Where(asyncio.run(_serializable(asyncio.run(_migrated(postgres, "runs_serializable")))))


async def _migrated(postgres: PostgreSQL, name: str) -> str:
    url = await postgres.create_database(name)
    await migrating.migrate(parse_url(url))
    return url


async def _serializable(url: str) -> str:
    connection = await asyncpg.connect(url.replace("+asyncpg", ""))
    try:
        name = await connection.fetchval("SELECT current_database()")
        await connection.execute(f"ALTER DATABASE {name} SET default_transaction_isolation = 'serializable'")
    finally:
        await connection.close()
    return url
