"""Failed run of a hundred nodes, whose replay is planned."""

from __future__ import annotations

from datetime import UTC, datetime
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Final

import msgspec
from sqlalchemy import text

from benchmarks.http1 import KeptConnection
from engine.graph import ParsedGraph
from engine.program import WorkflowProgram
from engine.triggers import trigger_output
from journal.run_rows import SPAN_COLUMNS, span_rows
from journal.store import RunWrite
from json_text import decoding
from models.database import Database
from nodes.catalog import load_catalog
from tests.unit.run_harness import SimulatedWorker

if TYPE_CHECKING:
    from sqlalchemy.engine import URL
    from sqlalchemy.ext.asyncio import AsyncConnection

    from benchmarks.http1 import BenchmarkApi

NODES: Final = 100
CHANGED: Final = 50
"""Place of the node that is mended after the run."""


async def store_failed_run(api: BenchmarkApi, url: URL) -> str:
    """Store a failed run of a chain of nodes, then change one node of the workflow;
    return the path of the run's replay.
    """
    connection = await KeptConnection.open(api.port)
    workflow = {"name": "Replayed", **_graph("a")}
    workflow_id = (await _post(api, connection, "/api/v1/workflows", workflow))["workflowId"]
    path = f"/api/v1/workflows/{workflow_id}/execute"
    execution_id = (await _post(api, connection, path, {"inputs": {"order": 7}}))["executionId"]
    database = Database(url)
    try:
        async with database.read() as reading:
            statement = text(
                "SELECT definition.body, execution.shard FROM execution JOIN definition"
                " ON definition.hash = execution.definition_hash WHERE execution.id = :id"
            )
            row = (await reading.execute(statement, {"id": execution_id})).one()
        catalog = load_catalog()
        program = WorkflowProgram.compile(
            ParsedGraph.from_stored(decoding.decode(row.body)), catalog, catalog.implementation
        )
        worker = SimulatedWorker(program, trigger_output("manual", {"order": 7}, datetime.now(UTC)))
        await worker.work()
        write = RunWrite(execution_id, row.shard, 0, spans=list(worker.notebook.rows.values()))
        rows = [dict(zip(SPAN_COLUMNS, values, strict=True)) for values in span_rows([write])]

        async def insert(writing: AsyncConnection) -> None:
            columns, values = ", ".join(SPAN_COLUMNS), ", ".join(f":{name}" for name in SPAN_COLUMNS)
            insert_spans = f"INSERT INTO span ({columns}) VALUES ({values})"  # noqa: S608 - names of columns
            await writing.execute(text(insert_spans), rows)
            ended = (
                "UPDATE execution SET status = 'failed', started_at = created_at, ended_at = created_at"
                " WHERE id = :id"
            )
            await writing.execute(text(ended), {"id": execution_id})

        await database.transaction(insert)
    finally:
        await database.close()
    await _send(api, connection, "PUT", f"/api/v1/workflows/{workflow_id}", _graph("b"))
    return f"/api/v1/executions/{execution_id}/replay"


def _graph(changed: str) -> dict[str, Any]:
    steps = [
        {
            "id": f"step{number}",
            "nodeId": "set",
            "config": {
                "mode": "replace",
                "values": {"n": "{{ trigger.body.order }}", "is": changed if number == CHANGED else "a"},
            },
        }
        for number in range(NODES - 2)
    ]
    nodes = [
        {"id": "start", "nodeId": "manual", "config": {}},
        *steps,
        {"id": "last", "nodeId": "stop-with-error", "config": {"message": "no"}},
    ]
    connections = [{"sourceNodeId": one["id"], "targetNodeId": other["id"]} for one, other in pairwise(nodes)]
    return {"nodes": nodes, "connections": connections}


async def _post(api: BenchmarkApi, connection: KeptConnection, path: str, body: object) -> dict[str, Any]:
    return await _send(api, connection, "POST", path, body)


async def _send(
    api: BenchmarkApi, connection: KeptConnection, method: str, path: str, body: object
) -> dict[str, Any]:
    answer = await connection.send(api.request(method, path, msgspec.json.encode(body)))
    found: dict[str, Any] = msgspec.json.decode(answer.body)
    if "error" in found and found.get("success") is False:
        raise RuntimeError(f"{method} {path}: {found['error']}")
    return found
