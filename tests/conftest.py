from collections.abc import Iterator

import pytest

from tests import services


@pytest.fixture(scope="session")
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(scope="session")
def postgres() -> Iterator[services.PostgreSQL]:
    with services.running_postgres() as server:
        yield server


@pytest.fixture(scope="session")
def mysql() -> Iterator[services.MySQL]:
    with services.running_mysql() as server:
        if server is None:
            pytest.skip("MariaDB is not installed, and TEST_MYSQL_URL names no server")
        yield server


@pytest.fixture(scope="session")
def redis_server() -> Iterator[services.Redis]:
    with services.running_redis() as server:
        yield server


@pytest.fixture(scope="session")
def pgbouncer(postgres: services.PostgreSQL) -> Iterator[services.PgBouncer]:
    with services.running_pgbouncer(postgres) as server:
        if server is None:
            pytest.skip("pgbouncer is not installed")
        yield server
