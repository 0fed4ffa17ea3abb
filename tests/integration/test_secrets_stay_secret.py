"""Search for the secrets of data sources in all output and in all stored data."""

from __future__ import annotations

import asyncio
from base64 import b64encode
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from ipaddress import ip_network
from pathlib import Path
from typing import Any
from uuid import uuid4

import httpx2
import pytest
from aiohttp import web
from sqlalchemy import select
from sqlmodel import SQLModel, col
from structlog.testing import capture_logs

from gateway.data_sources.data_source_probes import DataSourceProber
from models.data_source import DataSource
from tests.integration.gateway_harness import GatewayHarness, OrganizationUsers, UserClient
from tests.services import PostgresServer
from workers.main import run_worker
from workers.settings import WorkerSettings

PATIENCE_SECONDS = 60.0
LOOPBACK = (ip_network("127.0.0.0/8"),)
CANARY = "canary-77b1e2"
SOURCES: Mapping[str, Mapping[str, Any]] = {
    "bearer": {"type": "http-bearer", "secrets": {"token": f"{CANARY}-bearer"}},
    "basic": {
        "type": "http-basic",
        "settings": {"username": "ada"},
        "secrets": {"password": f'{CANARY}-"basic"'},
    },
    "key": {"type": "api-key", "settings": {"header": "X-Shop"}, "secrets": {"key": f"{CANARY} key"}},
    "database": {
        "type": "postgresql",
        "settings": {"host": "127.0.0.1", "port": 1, "database": "d", "user": "u"},
        "secrets": {"password": f"{CANARY}-database"},
    },
}
TRACES = (CANARY, b64encode(f'ada:{CANARY}-"basic"'.encode()).decode(), CANARY.encode().hex())


@dataclass
class RepeatingServers:
    """Server that echoes its requests, as careless ones do, and another to which it redirects clients."""

    url: str = ""
    elsewhere: str = ""
    told: list[Mapping[str, str]] = field(default_factory=list)
    told_elsewhere: list[Mapping[str, str]] = field(default_factory=list)

    async def answer(self, request: web.Request) -> web.StreamResponse:
        self.told.append(dict(request.headers))
        if request.path == "/moved":
            raise web.HTTPFound(f"{self.elsewhere}/there")
        said = {name: value for name, value in request.headers.items() if name in {"Authorization", "X-Shop"}}
        status = 500 if request.path == "/broken" else 200
        return web.json_response(said, status=status, headers={"X-Said": "; ".join(said.values())})

    async def answer_elsewhere(self, request: web.Request) -> web.StreamResponse:
        self.told_elsewhere.append(dict(request.headers))
        return web.json_response({})


@pytest.fixture
async def repeating_servers() -> AsyncIterator[RepeatingServers]:
    repeating_servers = RepeatingServers()
    async with AsyncExitStack() as stack:
        for handler, place in (
            (repeating_servers.answer, "url"),
            (repeating_servers.answer_elsewhere, "elsewhere"),
        ):
            application = web.Application()
            application.router.add_route("*", "/{path:.*}", handler)
            runner = web.AppRunner(application)
            await runner.setup()
            stack.push_async_callback(runner.cleanup)
            await web.TCPSite(runner, "127.0.0.1", 0).start()
            host, port = runner.addresses[0][:2]
            setattr(repeating_servers, place, f"http://{host}:{port}")
        yield repeating_servers


async def create_sources(person: UserClient) -> dict[str, str]:
    """Create the data sources and return their ids by name."""
    ids = {}
    for name, body in SOURCES.items():
        answer = await person.api.post("/api/v1/datasources", json={"name": name, **body})
        assert answer.status_code == 201, answer.text
        ids[name] = answer.json()["dataSourceId"]
    return ids


def calling_graph(url: str, source_id: str, **config: Any) -> dict[str, Any]:  # noqa: ANN401 - any JSON value
    """Return a graph that calls an address with a data source's credentials, and logs the answer."""
    call = {"url": url, "dataSource": source_id, **config}
    return {
        "nodes": [
            {"id": "start", "nodeId": "manual"},
            {"id": "call", "nodeId": "http-request", "config": call},
            {"id": "log", "nodeId": "log", "config": {"message": "{{ data.body }} {{ data.headers }}"}},
        ],
        "connections": [{"source": "start", "target": "call"}, {"source": "call", "target": "log"}],
    }


class AnswerCollector:
    """Client that requests everything, and stores every answer."""

    def __init__(self, api: httpx2.AsyncClient) -> None:
        self._api = api
        self.texts: list[str] = []

    async def ask(self, method: str, path: str, body: object = None) -> Any:  # noqa: ANN401 - any JSON value
        response = await self._api.request(method, path, json=body)
        self.texts.append(f"{response.headers}\n{response.text}")
        return response.json() if response.content else None

    async def run(self, workflow_id: str) -> str:
        """Execute a workflow, read everything about the execution, and return its status."""
        started = await self.ask("POST", f"/api/v1/workflows/{workflow_id}/execute", {})
        run = f"/api/v1/executions/{started['executionId']}"
        async with asyncio.timeout(PATIENCE_SECONDS):
            while (await self.ask("GET", f"{run}/progress?wait=5"))["status"] in {"pending", "running"}:
                pass
        for part in ("/spans", "/logs", "", "/progress"):
            shown = await self.ask("GET", run + part)
        status: str = shown["status"]
        return status


@pytest.mark.every_database
async def test_no_answer_no_log_and_no_row_holds_a_secret(
    harness: GatewayHarness, people: OrganizationUsers, repeating_servers: RepeatingServers, tmp_path: Path
) -> None:
    reader, gateway = AnswerCollector(people.owner.api), harness.gateway
    settings = WorkerSettings(
        data_dir=tmp_path,
        database_url=gateway.settings.database_url,
        secret_key=gateway.settings.secret_key,
        outbound_allowed_networks=LOOPBACK,
    )
    with capture_logs() as lines:
        ids = await create_sources(people.owner)
        tokens = await exercise_event_token(people.admin, reader)
        graphs = {
            "bearer": (calling_graph(f"{repeating_servers.url}/", ids["bearer"]), "completed"),
            "basic": (
                calling_graph(f"{repeating_servers.url}/", ids["basic"], headers={"authorization": "mine"}),
                "completed",
            ),
            "key": (calling_graph(f"{repeating_servers.url}/", ids["key"], method="POST"), "completed"),
            "broken": (calling_graph(f"{repeating_servers.url}/broken", ids["basic"]), "failed"),
            "moved": (calling_graph(f"{repeating_servers.url}/moved", ids["key"]), "completed"),
            "wrong type": (calling_graph(f"{repeating_servers.url}/", ids["database"]), "failed"),
            "refused": (calling_graph("http://10.0.0.1/", ids["bearer"]), "failed"),
        }
        async with run_worker(settings, gateway.store, gateway.broker, gateway.database):
            for name, (graph, expected) in graphs.items():
                workflow_id = await people.owner.create(name=name, **graph)
                assert await reader.run(workflow_id) == expected, name
                path = f"/api/v1/workflows/{workflow_id}"
                for below in ("", "/export", "/versions/1", "/nodes"):
                    await reader.ask("GET", path + below)
                for action in ("/validate", "/compute-scopes", "/duplicate"):
                    await reader.ask("POST", path + action)
        await exercise_sources(reader, ids)
    trail = AnswerCollector(people.admin.api)
    await trail.ask("GET", "/api/v1/audit?limit=100")

    # They were used, where they belong and nowhere else.
    sent = [told.get("Authorization") or told.get("X-Shop") for told in repeating_servers.told]
    login = b64encode(f'ada:{CANARY}-"basic"'.encode()).decode()
    assert sent == [
        f"Bearer {CANARY}-bearer", f"Basic {login}", f"{CANARY} key", f"Basic {login}", f"{CANARY} key",
    ]  # fmt: skip
    assert len(repeating_servers.told_elsewhere) == 1

    kept = await dump(harness)
    assert "[hidden]" in kept
    assert all(source_id in kept for source_id in ids.values())
    places = {
        "answers": "\n".join(reader.texts + trail.texts),
        "logs": repr(lines),
        "rows": kept,
        "another server": repr(repeating_servers.told_elsewhere),
    }
    places |= {path.name: path.read_bytes().decode("latin-1") for path in database_files(harness)}
    traces = [*TRACES, *tokens]
    found = [(place, trace) for place, text in places.items() for trace in traces if trace in text]
    assert found == []


async def exercise_event_token(admin: UserClient, reader: AnswerCollector) -> list[str]:
    """Create an event token, send events with it, read it, and return it."""
    body = {
        "name": "Hooks",
        "secrets": {"github": [f"{CANARY}-github"], "slack": [f"{CANARY}-slack", f"{CANARY}-next"]},
    }
    answer = (await admin.api.post("/api/v1/auth/event-tokens", json=body)).json()
    unsigned = (await admin.api.post("/api/v1/auth/event-tokens", json={"name": "Plain"})).json()
    tokens: list[str] = [answer["token"], unsigned["token"]]
    for token in tokens:
        await reader.ask("POST", f"/api/v1/workflows/events?key={token}", {"event_type": "a.b"})
        await reader.ask("POST", f"/api/v1/workflows/events?key={token}", {"event_type": 7})
        await reader.ask("GET", f"/api/v1/workflows?key={token}")
    looked = AnswerCollector(admin.api)
    for path in ("/api/v1/auth/event-tokens", "/api/v1/events", "/api/v1/audit"):
        await looked.ask("GET", path)
    await looked.ask("POST", "/api/v1/auth/event-tokens", {"name": "", "secrets": {"github": [CANARY, 7]}})
    reader.texts += looked.texts
    return tokens


async def exercise_sources(reader: AnswerCollector, ids: Mapping[str, str]) -> None:
    """Read the data sources in every way, and cause every error."""
    for path in ("/api/v1/datasources", "/openapi.json"):
        await reader.ask("GET", path)
    for source_id in ids.values():
        path = f"/api/v1/datasources/{source_id}"
        await reader.ask("GET", path)
        await reader.ask("PUT", path, {"name": f"Renamed {source_id}"})
        await reader.ask("PUT", path, {"secrets": CANARY})
        await reader.ask("PUT", path, {"secrets": {"password": [CANARY], "token": f"{CANARY}\n", "key": 7}})
        await reader.ask("PUT", path, {"settings": {"host": f"{CANARY}@host", "header": f"{CANARY}\n"}})
        tested = await reader.ask("POST", f"{path}/test")
        assert set(tested) == {"ok", "message", "durationMs", "phases"}
        await reader.ask("DELETE", path)


async def dump(harness: GatewayHarness) -> str:
    """Return every value of every row, encrypted values as bytes."""
    rows = []
    async with harness.gateway.database.read() as connection:
        for table in SQLModel.metadata.sorted_tables:
            rows += [repr(tuple(row)) for row in await connection.execute(select(table))]
    return "\n".join(rows)


def database_files(harness: GatewayHarness) -> list[Path]:
    """Return the files of the database, if it has its own."""
    folder = harness.gateway.settings.data_dir
    return [path for path in folder.rglob("*") if path.is_file()]


# ── tests of data sources ───────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
async def server(postgres: PostgresServer) -> Mapping[str, Any]:
    """Return the settings of a data source that leads to a real database."""
    url = httpx2.URL((await postgres.create_database("probed_by_tests")).replace("+asyncpg", ""))
    return {"host": url.host, "port": url.port, "user": url.username, "database": url.path.lstrip("/")}


async def probe_source(
    harness: GatewayHarness,
    person: UserClient,
    probes: DataSourceProber,
    **settings: Any,  # noqa: ANN401 - any JSON value
) -> tuple[bool, str, Sequence[tuple[str, bool]]]:
    """Return success, message and phases of the test of a new data source."""
    body = {"name": uuid4().hex, "type": "postgresql", "settings": settings}
    body["secrets"] = {"password": f"{CANARY}-probed"}
    source_id = (await person.api.post("/api/v1/datasources", json=body)).json()["dataSourceId"]
    async with harness.gateway.database.read() as connection:
        statement = select(DataSource).where(col(DataSource.id) == source_id)
        row = (await connection.execute(statement)).mappings().one()
    found = await probes.probe(DataSource(**row))
    assert CANARY not in found.message
    return found.is_ok, found.message, [(one.phase.value, one.is_ok) for one in found.phases]


@pytest.mark.every_database
async def test_a_data_source_is_tested_by_connecting_to_it(
    harness: GatewayHarness, people: OrganizationUsers, server: Mapping[str, Any]
) -> None:
    allowed = harness.gateway.settings.model_copy(update={"outbound_allowed_networks": LOOPBACK})
    probes = DataSourceProber(harness.gateway.vault, allowed)
    connected = [("dns", True), ("tcp", True)]
    whole = [*connected, ("auth", True), ("query", True)]
    assert await probe_source(harness, people.owner, probes, **server) == (
        True,
        "The database answers",
        whole,
    )
    refused = [*connected, ("auth", False)]
    for wrong, expected in (
        ({"database": "no_such_database"}, refused),
        ({"user": "nobody_there"}, refused),
        ({"port": 1}, [("dns", True), ("tcp", False)]),
    ):
        is_ok, message, phases = await probe_source(harness, people.owner, probes, **{**server, **wrong})
        assert (is_ok, message.startswith("No connection")) == (False, True), message
        assert phases == expected, message
    is_ok, message, phases = await probe_source(harness, people.owner, harness.gateway.probes, **server)
    assert (is_ok, "not a public address" in message) == (False, True)
    # A forbidden address is not connected, so that no time tells whether a server is there.
    assert phases == [("dns", False)]


async def test_an_organisation_tests_only_so_often(
    people: OrganizationUsers, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gateway.http.limits.DATA_SOURCE_TESTS", 2)
    body = {"name": "A token", "type": "http-bearer", "secrets": {"token": "a-token"}}
    source_id = (await people.owner.api.post("/api/v1/datasources", json=body)).json()["dataSourceId"]
    path = f"/api/v1/datasources/{source_id}/test"
    answers = [await people.owner.api.post(path) for _ in range(3)]
    assert [answer.status_code for answer in answers] == [200, 200, 429]
    assert answers[0].json()["ok"]
    assert answers[0].json()["phases"] == []
    assert int(answers[2].headers["Retry-After"]) > 0
