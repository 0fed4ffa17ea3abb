"""Gateway process: limits of its server, health, and behavior without a dependency."""

import asyncio
import json
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import httpx2
import pytest
from pydantic import SecretStr

from gateway import main, state
from gateway.settings import GatewaySettings
from journal.store_factory import open_store
from messages.broker_connection import connect_broker
from models.database import Database, parse_url
from models.settings import InvalidSettings
from tests import databases
from tests.command_runs import command_environment, run_command
from tests.integration.gateway_harness import SECRET, assert_refused
from tests.integration.gateway_server import KEY, Address, serve_gateway
from tests.services import PostgresServer, RedisServer

UNFINISHED = (
    f"POST /api/v1/workflows HTTP/1.1\r\nHost: x\r\nX-API-Key: {KEY}\r\nContent-Length: 10\r\n\r\n".encode()
)


@pytest.fixture
async def address(tmp_path: Path) -> AsyncIterator[Address]:
    """Run a server in this process, on SQLite, and yield where it listens."""
    async with serve_gateway(tmp_path) as served:
        yield served


async def exchange_bytes(address: Address, *pieces: bytes) -> bytes:
    """Send raw bytes and return the response until the server closes the connection."""
    reader, writer = await asyncio.open_connection(*address)
    for piece in pieces:
        writer.write(piece)
        await writer.drain()
    answer = await asyncio.wait_for(reader.read(), 60)
    writer.close()
    return answer


def read_error_code(answer: bytes) -> str:
    """Return the code in the body of a raw answer."""
    code: str = json.loads(answer.partition(b"\r\n\r\n")[2])["error"]["code"]
    return code


@pytest.mark.parametrize(
    "request_bytes",
    [
        b"nonsense\r\n\r\n",
        b"GET / HTTP/9.9\r\n\r\n",
        b"GET /\xff HTTP/1.1\r\nHost: x\r\n\r\n",
        b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: -1\r\n\r\n",
        b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 1\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\nab",
    ],
)
async def test_malformed_http_is_refused_with_the_error_envelope(
    address: Address, request_bytes: bytes
) -> None:
    answer = await exchange_bytes(address, request_bytes)
    assert answer.startswith(b"HTTP/1.1 400 ")
    assert read_error_code(answer) == "malformed-request"


async def test_an_endless_head_is_cut_off(address: Address) -> None:
    header = b"x-filler: " + b"y" * 8_000 + b"\r\n"
    reader, writer = await asyncio.open_connection(*address)
    writer.write(b"GET /healthz HTTP/1.1\r\nHost: x\r\n")
    with pytest.raises(ConnectionError):  # noqa: PT012 - either the write or the read finds it closed
        for _ in range(1_000):
            writer.write(header)
            await writer.drain()
            await asyncio.sleep(0)
        await reader.readexactly(1)
    writer.close()


@pytest.mark.parametrize(
    "beginning",
    [
        b"",
        b"GET /healthz HTTP/1.1\r\nHost:",
        UNFINISHED,
        UNFINISHED + b'{"name',
        UNFINISHED.replace(KEY.encode(), b"unknown") + b'{"name',
    ],
)
async def test_a_request_that_does_not_go_on_is_cut_off(tmp_path: Path, beginning: bytes) -> None:
    async with serve_gateway(tmp_path, head_seconds=0.2, body_seconds=0.2) as address:
        answer = await exchange_bytes(address, beginning)
    assert not answer or answer.startswith(b"HTTP/1.1 401 ")


async def test_a_body_without_a_length_is_cut_off_at_the_limit(address: Address) -> None:
    async def chunks() -> AsyncIterator[bytes]:
        for _ in range(150):
            yield b" " * 100_000

    headers = {"X-API-Key": KEY, "Content-Type": "application/json"}
    async with httpx2.AsyncClient(
        base_url=f"http://{address[0]}:{address[1]}", headers=headers, timeout=60
    ) as client:
        assert_refused(await client.post("/api/v1/workflows", content=chunks()), 413, "payload-too-large")
        assert (await client.post("/api/v1/workflows", json={"name": "x"})).status_code == 201


async def test_a_connection_serves_one_request_after_another(address: Address) -> None:
    async with httpx2.AsyncClient(base_url=f"http://{address[0]}:{address[1]}", timeout=60) as client:
        for _ in range(3):
            response = await client.get("/healthz")
            assert (response.status_code, response.json()) == (200, {"status": "ok"})
        head = await client.head("/healthz")
        assert (head.status_code, head.content) == (200, b"")
        assert "server" not in head.headers
        known = await client.get("/api/v1/auth/whoami", headers={"X-API-Key": KEY})
        assert known.json()["role"] == "admin"


# ── without a part ──────────────────────────────────────────────────────────────────────────────────────────


@asynccontextmanager
async def run_gateway_on(
    database_url: str, redis_url: str | None, folder: Path
) -> AsyncIterator[httpx2.AsyncClient]:
    """Run a gateway on a migrated database and on servers that tests may stop."""
    settings = GatewaySettings(
        data_dir=folder,
        database_url=database_url,
        secret_key=SecretStr(SECRET),
        bootstrap_api_key=SecretStr(KEY),
    )
    url = parse_url(database_url)
    database, store, broker = Database(url), await open_store(url), await connect_broker(redis_url)
    app = main.create_app(lambda: state.assemble_state(settings, database, store, broker))
    transport = httpx2.ASGITransport(app)
    headers = {"X-API-Key": KEY}
    async with (
        app.router.lifespan_context(app),
        httpx2.AsyncClient(transport=transport, base_url="http://gateway", headers=headers) as client,
    ):
        yield client
    await broker.close()
    await store.close()
    await database.close()


async def test_without_its_database_it_lives_but_is_not_ready(
    postgres: PostgresServer, tmp_path: Path
) -> None:
    url = await databases.create_database(postgres, "gateway_readiness")
    async with run_gateway_on(url, None, tmp_path) as client:
        assert (await client.get("/readyz")).status_code == 200
        postgres.stop()
        try:
            assert (await client.get("/healthz")).status_code == 200
            not_ready = await client.get("/readyz")
            assert_refused(not_ready, 503, "not-ready")
            assert [detail["path"] for detail in not_ready.json()["error"]["details"]] == ["database"]
            assert_refused(await client.get("/api/v1/workflows"), 503, "not-ready")
            assert_refused(await client.post("/api/v1/workflows", json={"name": "x"}), 503, "not-ready")
        finally:
            postgres.start()
        assert (await client.post("/api/v1/workflows", json={"name": "x"})).status_code == 201
        assert (await client.get("/readyz")).status_code == 200


async def test_without_its_broker_it_is_not_ready_and_still_serves(
    redis_server: RedisServer, tmp_path: Path
) -> None:
    url = await databases.create_sqlite_database(tmp_path / "test.db")
    async with run_gateway_on(url, redis_server.url, tmp_path) as client:
        assert (await client.get("/readyz")).status_code == 200
        redis_server.stop()
        try:
            not_ready = await client.get("/readyz")
            assert_refused(not_ready, 503, "not-ready")
            assert [detail["path"] for detail in not_ready.json()["error"]["details"]] == ["broker"]
            assert (await client.post("/api/v1/workflows", json={"name": "x"})).status_code == 201
        finally:
            redis_server.start()


# ── the process ─────────────────────────────────────────────────────────────────────────────────────────────


async def test_the_process_serves_until_it_is_told_to_stop(
    redis_server: RedisServer, tmp_path: Path, free_tcp_port: int
) -> None:
    given = command_environment(
        tmp_path,
        REDIS_URL=redis_server.url,
        SECRET_KEY=SECRET,
        BOOTSTRAP_API_KEY=KEY,
        PORT=str(free_tcp_port),
    )
    await databases.create_sqlite_database(tmp_path / "pilotflame.db")
    with run_command("gateway", given=given, log=tmp_path / "log") as gateway:
        async with httpx2.AsyncClient(base_url=f"http://127.0.0.1:{free_tcp_port}", timeout=60) as client:
            while True:
                try:
                    response = await client.get("/readyz")
                    break
                except httpx2.ConnectError:
                    assert gateway.process.poll() is None
                    await asyncio.sleep(0.05)
            assert response.status_code == 200
            made = await client.post("/api/v1/workflows", json={"name": "x"}, headers={"X-API-Key": KEY})
            assert made.status_code == 201
        assert await asyncio.to_thread(gateway.stop) in {0, -signal.SIGTERM}


@pytest.mark.parametrize(
    ("settings", "variable"),
    [
        ({"redis_url": "redis://localhost"}, "PILOTFLAME_SECRET_KEY"),
        ({"redis_url": "redis://localhost", "secret_key": SecretStr("short")}, "PILOTFLAME_SECRET_KEY"),
        ({"secret_key": SecretStr(SECRET)}, "PILOTFLAME_REDIS_URL"),
    ],
)
def test_it_refuses_to_start_without_a_secret_or_a_broker(settings: dict[str, object], variable: str) -> None:
    with pytest.raises(InvalidSettings, match=variable):
        main.serve(GatewaySettings.model_validate(settings))
