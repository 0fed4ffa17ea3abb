import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from pathlib import Path

import asyncpg
import psutil
import pytest
from redis.asyncio import Redis
from redis.exceptions import ConnectionError as RedisConnectionError

from tests import shared_setup
from tests.services import PgBouncer, PostgresServer, RedisServer


@asynccontextmanager
async def open_connection(url: str) -> AsyncIterator["asyncpg.Connection[asyncpg.Record]"]:
    connection = await asyncpg.connect(url.replace("+asyncpg", ""))
    try:
        yield connection
    finally:
        connection.terminate()


async def test_postgresql_keeps_its_commits_through_a_crash(postgres: PostgresServer) -> None:
    url = await postgres.create_database("crash")
    async with open_connection(url) as connection:
        await connection.execute("CREATE TABLE kept (value integer); INSERT INTO kept VALUES (42)")
        postgres.kill()
    with pytest.raises(ConnectionRefusedError):
        await asyncpg.connect(url.replace("+asyncpg", ""))
    postgres.restart()
    async with open_connection(url) as connection:
        assert await connection.fetchval("SELECT value FROM kept") == 42


async def test_a_database_made_again_is_empty(postgres: PostgresServer) -> None:
    url = await postgres.create_database("again")
    async with open_connection(url) as connection:
        await connection.execute("CREATE TABLE gone (value integer)")
        await postgres.create_database("again")
    async with open_connection(url) as connection:
        assert await connection.fetchval("SELECT to_regclass('gone')") is None


async def test_postgres_commits_before_it_answers(postgres: PostgresServer) -> None:
    async with open_connection(postgres.url) as connection:
        assert await connection.fetchval("SHOW synchronous_commit") == "on"


def test_shared_files_are_made_once_however_many_ask_at_once() -> None:
    calls = []

    def make(file: Path) -> None:
        calls.append(file)
        time.sleep(0.01)  # for the others to come
        file.write_text("made")

    with ThreadPoolExecutor(4) as threads:
        paths = list(threads.map(lambda _: shared_setup.make_once("example", make), range(4)))
    assert [path.read_text() for path in paths] == ["made"] * 4
    assert len(calls) == 1


@pytest.mark.parametrize("end", ["kill", "stop"])
async def test_redis_keeps_its_data_over_a_restart(redis_server: RedisServer, end: str) -> None:
    async with Redis.from_url(redis_server.url) as client:
        await client.set("kept", end)
    getattr(redis_server, end)()
    with pytest.raises(RedisConnectionError):
        async with Redis.from_url(redis_server.url) as client:
            await client.ping()
    redis_server.restart()
    async with Redis.from_url(redis_server.url) as client:
        assert await client.get("kept") == end.encode()


async def test_pgbouncer_leads_to_the_same_database(postgres: PostgresServer, pgbouncer: PgBouncer) -> None:
    url = await postgres.create_database("pooled")
    async with open_connection(pgbouncer.through(url)) as pooled, open_connection(url) as direct:
        await pooled.execute("CREATE TABLE seen (value integer)")
        assert await direct.fetchval("SELECT to_regclass('seen')") == "seen"


def test_a_server_does_not_outlive_a_killed_test_process() -> None:
    program = """
from tests.services import run_redis
with run_redis() as server:
    print(server.process_id, flush=True)
    input()
"""
    tests = subprocess.Popen(
        [sys.executable, "-c", program],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env=os.environ | {"TEST_REDIS_URL": ""},
    )
    with tests:
        assert tests.stdout is not None
        server = psutil.Process(int(tests.stdout.readline()))
        folder = server.cwd()
        tests.send_signal(signal.SIGKILL)
        assert psutil.wait_procs([server], timeout=60)[1] == []
        shutil.rmtree(folder)
