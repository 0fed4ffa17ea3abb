"""Throughput of ingest by one gateway: messages, mails, events and webhooks.

Every request is a separate delivery, signed just before where its sender signs. Every accepted request must
have run exactly once in the end.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from itertools import count
from pathlib import Path
from time import perf_counter
from typing import Any

import msgspec

from benchmarks import load, machine, processes, usage
from benchmarks.http1 import BenchmarkApi, HttpAnswer, KeptConnection
from benchmarks.load import WrongAnswer
from benchmarks.processes import ServerUnderTest
from benchmarks.targets import INTAKE_PER_CORE
from tests import signed_requests
from tests.services import PostgresServer, RedisServer
from tests.signed_requests import SECRET, SendGrid, SignedRequest

CLIENTS = 50
BATCH_CLIENTS = 4
BATCH_MESSAGES = 500
WARM_UP_SECONDS = 2.0
MAIL_BYTES = 20_000
PUSH_BYTES = 4_000
DRAIN_SECONDS = 180
POLL_SECONDS = 0.1
BACKLOG = 2_000_000
"""More than a load can queue, because backpressure is not measured here."""
UNFINISHED = ("pending", "running", "waiting")
_numbers = count(1)


@dataclass(slots=True)
class IngestLoad:
    """Requests of one kind to one workflow, and the number of accepted ones."""

    api: BenchmarkApi
    workflow_id: str
    path: str
    make: Callable[[int], SignedRequest]
    runs: int = 1
    """Runs that one request starts."""
    with_key: bool = True
    sent: int = field(default=0, init=False)

    async def run(self, connection: KeptConnection) -> float:
        """Send one request and return the seconds until its answer. Raises `WrongAnswer` unless it was accepted."""
        made = self.make(next(_numbers))
        request = _encode_request(self.api, self.path, made, with_key=self.with_key)
        started_at = perf_counter()
        answer = await connection.send(request)
        seconds = perf_counter() - started_at
        if answer.status not in {200, 201, 202} or b"executionId" not in answer.body:
            raise WrongAnswer(f"{answer.status} to {self.path}: {answer.body.decode()}")
        self.sent += 1
        return seconds


async def measure(
    postgres: PostgresServer, redis: RedisServer, folder: Path, seconds: float
) -> dict[str, float]:
    """Return requests per second, CPU time and latency of each kind, on PostgreSQL with Redis and in `dev`, by name."""
    on_sqlite, on_postgres = folder / "dev", folder / "production"
    on_sqlite.mkdir(parents=True)
    on_postgres.mkdir(parents=True)
    settings = {"MAX_BACKLOG_PER_WORKFLOW": str(BACKLOG), "MAX_BACKLOG_PER_ORGANIZATION": str(BACKLOG)}
    async with processes.run_dev(on_sqlite, settings) as pilotflame:
        figures = await _measure_mode("dev", pilotflame, "dev", seconds)
    database_url = await postgres.create_database("intake")
    async with processes.run_production(on_postgres, database_url, redis.url, settings) as pilotflame:
        return figures | await _measure_mode("production", pilotflame, "gateway", seconds)


async def _measure_mode(
    mode: str, pilotflame: ServerUnderTest, gateway: str, seconds: float
) -> dict[str, float]:
    """Return the figures of each kind of request to one server; their names begin with `mode`."""
    figures = {f"{mode}_calibration_ms": machine.measure_calibration_ms()}
    sendings = await _create_loads(pilotflame.api)
    process_id = pilotflame.process_ids[gateway]
    for name, sending in sendings.items():
        clients = BATCH_CLIENTS if sending.runs > 1 else CLIENTS
        await load.run_closed_loop(sending, clients, WARM_UP_SECONDS)
        before = usage.cpu_seconds({gateway: process_id})[gateway]
        sample = await load.run_closed_loop(sending, clients, seconds)
        spent = usage.cpu_seconds({gateway: process_id})[gateway] - before
        figures |= {
            f"{mode}_{name}_per_second": sample.per_second * sending.runs,
            f"{mode}_{name}_per_{gateway}_core": sample.count * sending.runs / spent,
            f"{mode}_{name}_{gateway}_cpu_ms": 1000 * spent / sample.count / sending.runs,
            f"{mode}_{name}_saturation_p99_ms": sample.milliseconds(99),
        }
        await _wait_until_run(sending)
        if name in INTAKE_PER_CORE:
            rate = INTAKE_PER_CORE[name] / 2
            at_leisure = await load.run_open_loop(sending, rate, seconds)
            figures |= {
                f"{mode}_{name}_at_{rate:g}_per_second_p{percent}_ms": at_leisure.milliseconds(percent)
                for percent in (50, 99)
            }
            await _wait_until_run(sending)
    return figures


async def _wait_until_run(sending: IngestLoad) -> None:
    """Wait until all runs have ended, and check that each accepted request has completed its runs, once."""
    deadline = perf_counter() + DRAIN_SECONDS
    async with _open_connection(sending.api) as connection:
        while await _count_executions(connection, sending, *UNFINISHED):
            if perf_counter() > deadline:
                raise WrongAnswer(f"{sending.path}: runs have not ended after {DRAIN_SECONDS} seconds")
            await asyncio.sleep(POLL_SECONDS)
        found, completed = (
            await _count_executions(connection, sending),
            await _count_executions(connection, sending, "completed"),
        )
    if not found == completed == sending.sent * sending.runs:
        raise WrongAnswer(
            f"{sending.path}: {sending.sent} requests of {sending.runs} made {found} runs; {completed} completed"
        )


async def _count_executions(connection: KeptConnection, sending: IngestLoad, *statuses: str) -> int:
    wanted = "".join(f"&status={status}" for status in statuses)
    path = f"/api/v1/executions?workflow_id={sending.workflow_id}&limit=1{wanted}"
    answer = await connection.send(sending.api.get(path))
    return int(_require_status(answer, 200)["count"])


# ── loads ───────────────────────────────────────────────────────────────────────────────────────────────────


async def _create_loads(api: BenchmarkApi) -> Mapping[str, IngestLoad]:
    """Create the workflows, and return the requests to each by their name."""
    send_grid = SendGrid()
    filling: dict[str, Any] = {
        "commits": [{"id": "0" * 40, "message": "x" * 80} for _ in range(PUSH_BYTES // 150)]
    }
    async with _open_connection(api) as connection:
        secret = await _post(
            connection,
            api,
            "/api/v1/datasources",
            {"name": "signs", "type": "webhook-secret", "settings": {}, "secrets": {"secret": SECRET}},
        )
        verification = {"provider": "github", "dataSource": secret["dataSourceId"]}
        queue, batches = [await _create_workflow(connection, api, "queue-trigger", {}) for _ in range(2)]
        mail = await _create_workflow(
            connection, api, "email-trigger", {"sendgrid": {"publicKey": send_grid.public_key}}
        )
        event = await _create_workflow(
            connection, api, "event-trigger", {"event_type": signed_requests.EVENT_TYPE}
        )
        hook = await _create_workflow(connection, api, "webhook", {"verification": verification})
        token = (await _post(connection, api, f"/api/v1/workflows/{hook}/trigger-token", {}))["token"]
    return {
        "enqueue": IngestLoad(api, queue, f"/api/v1/workflows/{queue}/enqueue", _build_message),
        "mail": IngestLoad(
            api,
            mail,
            f"/api/v1/workflows/{mail}/email-trigger",
            lambda number: send_grid.mail(number, MAIL_BYTES),
            with_key=False,
        ),
        "events": IngestLoad(api, event, "/api/v1/workflows/events", signed_requests.build_native_event),
        "webhooks": IngestLoad(
            api,
            hook,
            f"/hooks/{token}",
            lambda number: signed_requests.sign_github(number, filling),
            with_key=False,
        ),
        "batched_messages": IngestLoad(
            api, batches, f"/api/v1/workflows/{batches}/enqueue-batch", _build_batch, runs=BATCH_MESSAGES
        ),
    }


def _build_message(number: int) -> SignedRequest:
    return SignedRequest({"Content-Type": "application/json"}, b'{"message":{"number":%d}}' % number)


def _build_batch(number: int) -> SignedRequest:
    messages = b",".join(
        b'{"message":{"number":%d,"place":%d}}' % (number, place) for place in range(BATCH_MESSAGES)
    )
    return SignedRequest({"Content-Type": "application/json"}, b'{"messages":[%s]}' % messages)


def _encode_request(api: BenchmarkApi, path: str, made: SignedRequest, *, with_key: bool) -> bytes:
    key = f"X-API-Key: {api.key}\r\n" if with_key else ""
    headers = "".join(f"{name}: {value}\r\n" for name, value in made.headers.items())
    head = f"POST {path} HTTP/1.1\r\nHost: 127.0.0.1:{api.port}\r\n{key}{headers}"
    return f"{head}Content-Length: {len(made.body)}\r\n\r\n".encode() + made.body


# ── the server ──────────────────────────────────────────────────────────────────────────────────────────────


async def _create_workflow(
    connection: KeptConnection, api: BenchmarkApi, trigger: str, config: Mapping[str, Any]
) -> str:
    """Create an active workflow of this trigger and one node without effects; return its id."""
    nodes: Sequence[Mapping[str, Any]] = [
        {"id": "start", "type": trigger, "config": config},
        {"id": "note", "type": "set", "config": {"values": {"seen": True}}},
    ]
    made = await _post(
        connection,
        api,
        "/api/v1/workflows",
        {
            "name": f"Intake {datetime.now(UTC)}",
            "status": "active",
            "nodes": nodes,
            "connections": [{"source": "start", "target": "note"}],
        },
    )
    return str(made["workflowId"])


async def _post(
    connection: KeptConnection, api: BenchmarkApi, path: str, body: Mapping[str, Any]
) -> dict[str, Any]:
    return _require_status(await connection.send(api.post(path, msgspec.json.encode(body))), 201)


def _require_status(answer: HttpAnswer, status: int) -> dict[str, Any]:
    if answer.status != status:
        raise WrongAnswer(f"{answer.status} instead of {status}: {answer.body.decode()}")
    body: dict[str, Any] = msgspec.json.decode(answer.body)
    return body


@asynccontextmanager
async def _open_connection(api: BenchmarkApi) -> AsyncIterator[KeptConnection]:
    connection = await KeptConnection.open(api.port)
    try:
        yield connection
    finally:
        connection.close()
