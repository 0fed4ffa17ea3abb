import asyncio
from collections.abc import AsyncIterator

import asyncpg
import jinja2
import pytest

from gateway.dashboard import templating
from tests import databases
from tests.integration.gateway_harness import (
    GatewayHarness,
    OrganizationUsers,
    create_gateway,
    run_gateway_on,
)
from tests.integration.lent_database import LentDatabase
from tests.integration.run_database import MigratedDatabase, RunDatabase, open_run_database
from tests.services import PgBouncer, PostgresServer


@pytest.fixture(scope="session", autouse=True)
def _templates(tmp_path_factory: pytest.TempPathFactory, pytestconfig: pytest.Config) -> None:
    """Compile the templates of pages once for all processes of a run: each would take half a second."""
    folder = tmp_path_factory.getbasetemp()
    if hasattr(pytestconfig, "workerinput"):  # one of several processes, whose folders are in that of the run
        folder = folder.parent
    folder /= "templates"
    folder.mkdir(exist_ok=True)
    environment = templating._open_environment()  # noqa: SLF001 - servers compile each once, and need no store
    environment.bytecode_cache = jinja2.FileSystemBytecodeCache(str(folder))


@pytest.fixture(scope="session")
async def lent_database(postgres: PostgresServer) -> AsyncIterator[LentDatabase]:
    """Yield the PostgreSQL database of the gateways of one file after another."""
    lent = LentDatabase(postgres)
    yield lent
    await lent.close()


@pytest.fixture(scope="module", params=["sqlite", "postgresql"])
async def harness(
    request: pytest.FixtureRequest,
    postgres: PostgresServer,
    lent_database: LentDatabase,
    tmp_path_factory: pytest.TempPathFactory,
) -> AsyncIterator[GatewayHarness]:
    """Yield a gateway on each kind of database, shared by the tests of a file."""
    folder = tmp_path_factory.mktemp("gateway")
    if request.param == "sqlite":
        async with create_gateway("sqlite", postgres, folder) as harness:
            yield harness
    else:
        async with lent_database.lend() as opened, run_gateway_on(opened, folder) as harness:
            yield harness


@pytest.fixture
async def people(harness: GatewayHarness) -> OrganizationUsers:
    """Return users that no other test uses."""
    return await harness.people()


@pytest.fixture(scope="session")
def on_sqlite(tmp_path_factory: pytest.TempPathFactory) -> MigratedDatabase:
    """Return an SQLite database with all tables, shared by all tests."""
    folder = tmp_path_factory.mktemp("sqlite")
    return MigratedDatabase(asyncio.run(databases.create_sqlite_database(folder / "pilotflame.db")))


@pytest.fixture(scope="session")
def on_postgres(postgres: PostgresServer) -> MigratedDatabase:
    """Return a PostgreSQL database with all tables, shared by all tests."""
    return MigratedDatabase(asyncio.run(databases.create_database(postgres, "runs")))


@pytest.fixture(scope="session")
def behind_pgbouncer(on_postgres: MigratedDatabase, pgbouncer: PgBouncer) -> MigratedDatabase:
    """Return the database of `on_postgres`, which stores reach through PgBouncer."""
    return MigratedDatabase(pgbouncer.through(on_postgres.url), on_postgres.url)


@pytest.fixture(scope="session")
def on_serializable_postgres(postgres: PostgresServer) -> MigratedDatabase:
    """Return a PostgreSQL database with serializable transactions by default, shared by all tests."""
    return MigratedDatabase(
        asyncio.run(_make_serializable(asyncio.run(databases.create_database(postgres, "runs_serializable"))))
    )


@pytest.fixture(scope="module")
async def shared_run_database(migrated_database: MigratedDatabase) -> AsyncIterator[RunDatabase]:
    """Yield the database that the fixture `migrated_database` of a file chooses, with a store on it."""
    async with open_run_database(migrated_database) as run_database:
        yield run_database


@pytest.fixture
async def run_database(shared_run_database: RunDatabase) -> RunDatabase:
    """Return the database of the file's tests, empty; to open one for each would take longer than many of them."""
    await shared_run_database.clear()
    return shared_run_database


async def _make_serializable(url: str) -> str:
    connection = await asyncpg.connect(url.replace("+asyncpg", ""))
    try:
        name = await connection.fetchval("SELECT current_database()")
        await connection.execute(f"ALTER DATABASE {name} SET default_transaction_isolation = 'serializable'")
    finally:
        await connection.close()
    return url
