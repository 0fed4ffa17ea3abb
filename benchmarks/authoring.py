"""Latencies for authors: lists of an organization with 10,000 workflows, and edits of a graph of 1,000 nodes.

One client sends one HTTP request after the other.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from time import perf_counter
from typing import Any

import msgspec
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncConnection

from benchmarks import machine, processes
from benchmarks.http1 import BenchmarkApi, HttpAnswer, KeptConnection
from benchmarks.load import LatencySample, WrongAnswer
from benchmarks.processes import ServerUnderTest
from models import access_store
from models.access import Organization, User, UserRole
from models.database import Database, is_sqlite, parse_url
from tests import many_workflows
from tests.many_workflows import ABSENT_WORD, COMMON_TAG, COMMON_WORD, RARE_TAG, RARE_WORD, WorkflowOwners
from tests.services import PostgresServer, RedisServer

WORKFLOWS = 10_000
"""Workflows in each of two organizations; only one of them sends requests."""
NODES = many_workflows.build_nodes(1_000)
CONNECTIONS = many_workflows.build_connections(NODES)
WARM_UP = 3
REQUESTS = 20
PERCENTS = (50, 95)

PATH = "/api/v1/workflows"
LISTS: Mapping[str, str] = {
    "list": "",
    "list_of_100": "?limit=100",
    "by_created_upwards": "?sort=createdAt:asc",
    "by_updated": "?sort=updatedAt:desc",
    "by_name": "?sort=name:asc",
    "by_status": "?sort=status:desc",
    "by_version": "?sort=version:desc",
    "from_9000_on": "?offset=9000",
    "by_name_from_1000_on": "?sort=name:asc&offset=1000",
    "with_a_common_status": "?status=draft",
    "with_a_rare_status": "?status=paused",
    "with_a_common_tag": f"?tag={COMMON_TAG}",
    "with_a_rare_tag": f"?tag={RARE_TAG}",
    "search_for_a_common_word": f"?search={COMMON_WORD}",
    "search_for_a_rare_word": f"?search={RARE_WORD[4:]}",
    "search_for_an_absent_word": f"?search={ABSENT_WORD}",
    "search_for_a_name": "?search=sync%20orders",
    "status_tag_and_search": f"?status=active&tag={COMMON_TAG}&search={COMMON_WORD}&sort=name:asc",
    "statistics": "/stats",
}

JsonBody = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class TimedRequest:
    """Request to measure, with a body of JSON or none."""

    method: str
    path: str
    body: JsonBody | None = None


async def measure(postgres: PostgresServer, redis: RedisServer, folder: Path) -> dict[str, float]:
    """Return latency percentiles in milliseconds of each kind of request, on both databases, by name of figure."""
    on_sqlite = folder / "sqlite"
    on_postgres = folder / "postgresql"
    on_sqlite.mkdir()
    on_postgres.mkdir()
    async with processes.run_dev(on_sqlite) as pilotflame:
        figures = await _measure_database("sqlite", pilotflame, f"sqlite:///{on_sqlite}/data/pilotflame.db")
    database_url = await postgres.create_database("authoring")
    async with processes.run_production(on_postgres, database_url, redis.url) as pilotflame:
        return figures | await _measure_database("postgresql", pilotflame, database_url)


async def _measure_database(name: str, pilotflame: ServerUnderTest, database_url: str) -> dict[str, float]:
    """Fill the database of a server, and return the latencies of lists and edits;
    the figures' names begin with `name`.
    """
    callers = await _prepare(pilotflame, database_url)
    calibration_ms = machine.measure_calibration_ms()
    queries = await _measure_lists(callers)
    workflow = await _create_large_workflow(pilotflame.api)
    edits = await _measure_edits(pilotflame.api, workflow)
    whole = await _measure_whole_graph(pilotflame.api, workflow)
    figures = {f"{name}_calibration_ms": (calibration_ms + machine.measure_calibration_ms()) / 2}
    figures |= {
        f"{name}_{request}_p{percent}_ms": sample.milliseconds(percent)
        for request, sample in {**queries, **edits, **whole}.items()
        for percent in PERCENTS
    }
    slowest = {
        f"{name}_slowest_{kind}_p95_ms": max(sample.milliseconds(95) for sample in samples.values())
        for kind, samples in (("query", queries), ("edit", edits))
    }
    return figures | slowest


# ── lists ───────────────────────────────────────────────────────────────────────────────────────────────────


async def _measure_lists(callers: Sequence[BenchmarkApi]) -> dict[str, LatencySample]:
    """Return for each list the latencies of the caller with the largest p95."""
    samples: dict[str, LatencySample] = {}
    for name, query in LISTS.items():
        asked = [TimedRequest("GET", PATH + query)] * (WARM_UP + REQUESTS)
        several = [await sample_requests(api, asked) for api in callers]
        samples[name] = max(several, key=lambda sample: sample.milliseconds(95))
    return samples


async def _prepare(pilotflame: ServerUnderTest, database_url: str) -> Sequence[BenchmarkApi]:
    """Fill the database, and return the callers: an admin, an owner of many workflows, and a member with few."""
    async with _open_client(pilotflame.api) as client:
        whoami = await client.expect(TimedRequest("GET", "/api/v1/auth/whoami"))
    database = Database(parse_url(database_url))
    try:
        crowd = await database.transaction(lambda connection: _fill(connection, whoami["organizationId"]))
        if not is_sqlite(database.url):
            await _vacuum(database)
    finally:
        await database.close()
    keys = [await _create_key(pilotflame.api, user) for user in (crowd.owner, crowd.member)]
    return [pilotflame.api, *(BenchmarkApi(pilotflame.api.port, key) for key in keys)]


async def _fill(connection: AsyncConnection, organization_id: str) -> WorkflowOwners:
    here = await access_store.find_organization(connection, organization_id)
    assert here is not None
    elsewhere = await access_store.create_organization(connection, name="Elsewhere", now=datetime.now(UTC))
    crowds = [await _create_members(connection, organization) for organization in (here, elsewhere)]
    for crowd in crowds:
        await many_workflows.fill(connection, crowd, WORKFLOWS)
    return crowds[0]


async def _create_members(connection: AsyncConnection, organization: Organization) -> WorkflowOwners:
    users = [
        await access_store.create_user(
            connection,
            organization=organization,
            email=f"{name}@example.com",
            name=name,
            role=UserRole.MEMBER,
            now=datetime.now(UTC),
        )
        for name in ("owner", "other", "member")
    ]
    return WorkflowOwners(organization, *users)


async def _vacuum(database: Database) -> None:
    """Vacuum as autovacuum would have during so many inserts."""
    async with database.engine.connect() as connection:
        alone = await connection.execution_options(isolation_level="AUTOCOMMIT")
        await alone.execute(text("VACUUM (ANALYZE)"))


async def _create_key(api: BenchmarkApi, user: User) -> str:
    async with _open_client(api) as client:
        body = {"name": "benchmark", "userId": user.id}
        made = await client.expect(TimedRequest("POST", "/api/v1/auth/keys", body))
    key: str = made["key"]
    return key


# ── edits ───────────────────────────────────────────────────────────────────────────────────────────────────


async def _create_large_workflow(api: BenchmarkApi) -> str:
    """Create an active workflow, whose graph has to be valid after each edit, and return its path."""
    async with _open_client(api) as client:
        body = {"name": "Large", "status": "active", "nodes": NODES, "connections": CONNECTIONS}
        made = await client.expect(TimedRequest("POST", PATH, body))
    return f"{PATH}/{made['workflowId']}"


async def _measure_edits(api: BenchmarkApi, workflow: str) -> dict[str, LatencySample]:
    """Return the latencies of each kind of edit of the large workflow."""
    kinds: Mapping[str, Callable[[int], TimedRequest]] = {
        "rename": lambda number: TimedRequest("PUT", workflow, {"name": f"Large {number}"}),
        "replace_the_graph": lambda number: TimedRequest(
            "PUT",
            workflow,
            {"nodes": [*NODES[:-1], {**NODES[-1], "label": f"{number}"}], "connections": CONNECTIONS},
        ),
        "add_a_node": lambda number: TimedRequest(
            "POST", f"{workflow}/nodes", {"id": f"added-{number}", "nodeId": "set", "config": {"values": {}}}
        ),
        "configure_a_node": lambda number: TimedRequest(
            "PUT", f"{workflow}/nodes/node-1", {"config": {"values": {"total": number}}}
        ),
        "set_mappings": lambda number: TimedRequest(
            "PUT", f"{workflow}/nodes/node-1/input-mappings", {"mappings": {"total": number}}
        ),
        "set_pass_through": lambda number: TimedRequest(
            "PUT", f"{workflow}/nodes/node-1/passthrough-values", {"values": {"total": f"total{number}"}}
        ),
        "connect": lambda number: TimedRequest(
            "POST",
            f"{workflow}/connections",
            {"id": f"added-{number}", "source": "node-3", "target": f"added-{number}"},
        ),
        "disconnect": lambda number: TimedRequest("DELETE", f"{workflow}/connections/added-{number}"),
        "remove_a_node": lambda number: TimedRequest("DELETE", f"{workflow}/nodes/added-{number}"),
    }
    numbers = range(WARM_UP + REQUESTS)
    return {
        name: await sample_requests(api, [ask(number) for number in numbers]) for name, ask in kinds.items()
    }


async def _measure_whole_graph(api: BenchmarkApi, workflow: str) -> dict[str, LatencySample]:
    """Return the latencies of requests about every node.

    The first layout moves the nodes; the others leave them in place.
    """
    asked = {
        "validate": TimedRequest("POST", f"{workflow}/validate"),
        "lay_out": TimedRequest("POST", f"{workflow}/layout"),
    }
    return {name: await sample_requests(api, [one] * (WARM_UP + REQUESTS)) for name, one in asked.items()}


# ── one client ──────────────────────────────────────────────────────────────────────────────────────────────


async def sample_requests(api: BenchmarkApi, several: Sequence[TimedRequest]) -> LatencySample:
    """Send requests one after the other, and return the latencies; those of the first `WARM_UP` are left out."""
    async with _open_client(api) as client:
        for asked in several[:WARM_UP]:
            await client.seconds(asked)
        begun_at = perf_counter()
        latencies = sorted([await client.seconds(asked) for asked in several[WARM_UP:]])
        return LatencySample(perf_counter() - begun_at, len(latencies), latencies)


@dataclass(frozen=True, slots=True)
class _TimedClient:
    api: BenchmarkApi
    connection: KeptConnection

    async def expect(self, asked: TimedRequest) -> dict[str, Any]:
        """Send a request and return the JSON of its answer; raises `WrongAnswer` for a refusal."""
        answer = await self.connection.send(self._encode(asked))
        _require_success(asked, answer)
        body: dict[str, Any] = msgspec.json.decode(answer.body)
        return body

    async def seconds(self, asked: TimedRequest) -> float:
        """Send a request and return its duration in seconds; raises `WrongAnswer` for a refusal."""
        request = self._encode(asked)
        started_at = perf_counter()
        answer = await self.connection.send(request)
        seconds = perf_counter() - started_at
        _require_success(asked, answer)
        return seconds

    def _encode(self, asked: TimedRequest) -> bytes:
        body = None if asked.body is None else msgspec.json.encode(asked.body)
        return self.api.request(asked.method, asked.path, body)


def _require_success(asked: TimedRequest, answer: HttpAnswer) -> None:
    if answer.status not in {200, 201}:
        raise WrongAnswer(f"{asked.method} {asked.path}: {answer.status}: {answer.body.decode()[:1000]}")


@asynccontextmanager
async def _open_client(api: BenchmarkApi) -> AsyncIterator[_TimedClient]:
    connection = await KeptConnection.open(api.port)
    try:
        yield _TimedClient(api, connection)
    finally:
        connection.close()
