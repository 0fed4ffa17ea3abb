"""The doctor names a pooler in a wrong mode and a Redis that evicts, and exits with 1."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import asyncpg
import pytest
from redis import Redis

from doctor import connection_checks
from doctor.connection_checks import ServerAddresses
from doctor.findings import DriftFinding, DriftSeverity
from models.database import parse_url
from tests import command_runs, databases, services
from tests.command_runs import command_environment

SECRET = "k3J9x-Qw7_zLm2Pv8RtYc1Bn5Dg4Hf6S"


async def check(database_url: str, broker_url: str | None) -> Sequence[DriftFinding]:
    return await connection_checks.check_connections(ServerAddresses(parse_url(database_url), broker_url))


def subjects(found: Sequence[DriftFinding]) -> set[str]:
    assert all(finding.remedy for finding in found)
    return {finding.subject.id for finding in found}


async def test_postgresql_without_a_pooler_has_no_finding(postgres: services.PostgresServer) -> None:
    assert await check(postgres.url, postgres.url) == []


async def test_servers_that_do_not_answer_have_no_finding() -> None:
    assert await check("postgresql://nobody@127.0.0.1:1/none", "redis://127.0.0.1:1") == []


@pytest.mark.parametrize(
    ("mode", "names"),
    [
        ("statement", {"pool_mode"}),
        ("transaction", {"PILOTFLAME_LISTEN_URL", "plan_cache_mode", "jit"}),
        ("session", set()),
    ],
)
async def test_the_mode_of_a_pooler_is_examined(
    postgres: services.PostgresServer, mode: str, names: set[str]
) -> None:
    database_url = await postgres.create_database(f"pooled_{mode}")
    with services.run_pgbouncer(postgres, mode) as pooler:
        if pooler is None:
            pytest.skip("pgbouncer is not installed")
        found = await check(pooler.through(database_url), pooler.through(database_url))
    assert subjects(found) == names


async def test_a_pooler_that_is_set_up_as_documented_has_no_finding(
    postgres: services.PostgresServer,
) -> None:
    database_url = await postgres.create_database("pooled_well")
    connection = await asyncpg.connect(database_url.replace("+asyncpg", "", 1))
    for name, value in connection_checks.POOLED_SETTINGS.items():
        await connection.execute(f"ALTER DATABASE pooled_well SET {name} = {value}")
    await connection.close()
    with services.run_pgbouncer(postgres) as pooler:
        if pooler is None:
            pytest.skip("pgbouncer is not installed")
        assert await check(pooler.through(database_url), postgres.url) == []


def test_a_redis_that_evicts_is_a_finding_and_the_other_stores_are_examined(
    postgres: services.PostgresServer, tmp_path: Path
) -> None:
    with services.run_redis() as server, Redis.from_url(server.url) as client:
        database_url = asyncio.run(databases.create_database(postgres, "evicting"))
        given = command_environment(
            tmp_path, DATABASE_URL=database_url, REDIS_URL=server.url, SECRET_KEY=SECRET
        )
        client.config_set("maxmemory-policy", "allkeys-lru")
        report = examine(given)
        client.config_set("maxmemory-policy", "noeviction")
        assert "maxmemory-policy" not in {one["subject"]["id"] for one in examine(given)["findings"]}
    (finding,) = [one for one in report["findings"] if one["subject"]["id"] == "maxmemory-policy"]
    assert finding["severity"] == DriftSeverity.CRITICAL
    assert "not allkeys-lru" in finding["message"]
    assert report["stores"]["redis"] == "ok"
    assert {one["class"] for one in report["findings"]} >= {"no-worker", "unsafe-setting"}


def examine(given: dict[str, str]) -> Any:  # noqa: ANN401 - JSON
    done = command_runs.run("doctor", "--json", given=given)
    assert done.returncode == 1, done.stderr
    return json.loads(done.stdout)
