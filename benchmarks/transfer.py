"""Rows copied from one table to another: by a workflow of three nodes, and by hand-written code with the same
driver.

The workflow reads with `postgresql-source`, changes each row with `map`, and writes with
`postgresql-destination`. It runs in `pilotflame dev`, with all records of a run. The hand-written code
fetches on one connection, changes rows in a comprehension, and inserts with `executemany` in one
transaction, like the destination; or it writes with COPY, which has no upsert.
"""

from __future__ import annotations

import asyncio
import tempfile
from collections.abc import Awaitable, Callable, Sequence
from itertools import pairwise
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any, TypeAlias

import asyncpg
import msgspec
from sqlalchemy.engine import make_url

from benchmarks import processes
from benchmarks.http1 import BenchmarkApi, KeptConnection
from benchmarks.load import WrongAnswer
from benchmarks.postgres_counters import asyncpg_dsn
from tests import services
from tests.services import PostgresServer

ROWS = 30_000
ROUNDS = 5
COUNTRIES = 50
WAIT_SECONDS = 30
SELECT = "SELECT id, customer, country, total FROM source ORDER BY id"
_TABLES = f"""
CREATE TABLE source (id integer PRIMARY KEY, customer text NOT NULL, country text NOT NULL, total double precision);
CREATE TABLE target (id integer PRIMARY KEY, customer text NOT NULL, gross double precision);
INSERT INTO source SELECT number, 'customer ' || number, 'country ' || number % {COUNTRIES}, number / 4.0
FROM generate_series(1, {ROWS}) AS number;
"""  # noqa: S608 - of constants
_GROSS = {"$op": "multiply", "args": ["{{ item.total }}", 1.25]}


Rows: TypeAlias = Sequence[tuple[int, str, float]]


async def measure(postgres: PostgresServer, folder: Path) -> dict[str, float]:
    """Return rows per second of a transfer by hand, by COPY and by a workflow,
    and ratios of the workflow's duration.
    """
    address = asyncpg_dsn(await postgres.create_database("transfer"))
    connection = await asyncpg.connect(address)
    await connection.execute(_TABLES)
    async with processes.run_dev(folder) as pilotflame:
        client = await KeptConnection.open(pilotflame.api.port)
        workflow_id = await _install_workflow(pilotflame.api, client, address)
        times: dict[str, list[float]] = {"by_hand": [], "by_copy": [], "by_workflow": []}
        for _ in range(ROUNDS):
            times["by_hand"].append(await _time_by_hand(address, _insert))
            await _check_and_empty(connection)
            times["by_copy"].append(await _time_by_hand(address, _copy))
            await _check_and_empty(connection)
            times["by_workflow"].append(await _time_by_workflow(pilotflame.api, client, workflow_id))
            await _check_and_empty(connection)
        client.close()
    await connection.close()
    middle = {way: median(seconds) for way, seconds in times.items()}
    return {
        **{f"{way}_rows_per_second": ROWS / seconds for way, seconds in middle.items()},
        "times_by_hand": middle["by_workflow"] / middle["by_hand"],
        "times_by_copy": middle["by_workflow"] / middle["by_copy"],
    }


async def _time_by_hand(address: str, write: Callable[[Any, Rows], Awaitable[object]]) -> float:
    since = perf_counter()
    connection = await asyncpg.connect(address)
    async with connection.transaction():
        rows = await connection.fetch(SELECT)
        await write(connection, [(row["id"], row["customer"], row["total"] * 1.25) for row in rows])
    await connection.close()
    return perf_counter() - since


async def _insert(connection: Any, rows: Rows) -> None:  # noqa: ANN401 - the driver's own type needs a record type
    await connection.executemany("INSERT INTO target (id, customer, gross) VALUES ($1, $2, $3)", rows)


async def _copy(connection: Any, rows: Rows) -> None:  # noqa: ANN401 - as above
    await connection.copy_records_to_table("target", records=rows, columns=["id", "customer", "gross"])


async def _time_by_workflow(api: BenchmarkApi, client: KeptConnection, workflow_id: str) -> float:
    since = perf_counter()
    started = await _send(client, api.post(f"/api/v1/workflows/{workflow_id}/execute", b"{}"), 201)
    path = f"/api/v1/executions/{started['executionId']}/progress?wait={WAIT_SECONDS}"
    progress = await _send(client, api.get(path), 200)
    if progress["status"] != "completed" or progress["outputs"]["write"] != {"written": ROWS}:
        raise WrongAnswer(progress)
    return perf_counter() - since


async def _check_and_empty(connection: Any) -> None:  # noqa: ANN401 - the driver's own type needs a record type
    """Check that all rows have arrived in the target, and delete them there."""
    count, gross = await connection.fetchrow("SELECT count(*), sum(gross) FROM target")
    assert (count, gross) == (ROWS, sum(number / 4 * 1.25 for number in range(1, ROWS + 1)))
    await connection.execute("TRUNCATE target")


async def _install_workflow(api: BenchmarkApi, client: KeptConnection, address: str) -> str:
    """Create a data source and a workflow that transfers the rows; return the workflow's id."""
    url = make_url(address)
    settings = {"host": url.host, "port": url.port, "database": url.database, "user": url.username}
    secrets = {"password": url.password or "none"}
    body = {"name": "Shop", "type": "postgresql", "settings": settings, "secrets": secrets}
    source = await _send(client, api.post("/api/v1/datasources", msgspec.json.encode(body)), 201)
    source_id = source["dataSourceId"]
    config = {
        "items": "{{ data.rows }}",
        "value": {"id": "{{ item.id }}", "customer": "{{ item.customer }}", "gross": _GROSS},
    }
    nodes: list[dict[str, Any]] = [
        {"id": "start", "type": "manual"},
        {
            "id": "read",
            "type": "postgresql-source",
            "config": {"dataSource": source_id, "query": SELECT, "maxRows": ROWS},
        },
        {"id": "change", "type": "map", "config": config},
        {
            "id": "write",
            "type": "postgresql-destination",
            "config": {
                "dataSource": source_id,
                "table": "target",
                "rows": "{{ data.items }}",
                "batchSize": 10_000,
            },
        },
    ]
    order = ["start", "read", "change", "write"]
    connections = [{"source": one, "target": other} for one, other in pairwise(order)]
    workflow = {"name": "Transfer", "nodes": nodes, "connections": connections}
    created = await _send(client, api.post("/api/v1/workflows", msgspec.json.encode(workflow)), 201)
    workflow_id: str = created["workflowId"]
    return workflow_id


async def _send(client: KeptConnection, request: bytes, status: int) -> dict[str, Any]:
    answer = await client.send(request)
    if answer.status != status:
        raise WrongAnswer(answer)
    body: dict[str, Any] = msgspec.json.decode(answer.body)
    return body


async def _main() -> None:
    with services.run_postgres(services.DURABLE) as postgres, tempfile.TemporaryDirectory() as folder:
        for figure, measured in (await measure(postgres, Path(folder))).items():
            print(f"{figure:32} {measured:12,.1f}")


if __name__ == "__main__":
    asyncio.run(_main())
